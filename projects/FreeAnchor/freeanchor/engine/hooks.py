"""What happens between two iterations."""

from typing import Any

from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import get_event_storage
from torch import nn

from ..modeling import match_inputs
from ..visualization import draw_matching, to_image

__all__ = ["MatchingPictures", "PreciseBN"]


class MatchingPictures(HookBase):
    """Puts the matching of a training image to the EventStorage, every so many iterations."""

    def __init__(self, model: nn.Module, period: int) -> None:
        """Build the hook.

        Args:
            model: the model that is trained, without DistributedDataParallel; see
                :func:`freeanchor.modeling.has_bags`.
            period: the iterations from one picture to the next.
        """
        self.model = model
        self.period = period
        self._batch: list[dict[str, Any]] = []

    def before_step(self) -> None:
        if self.trainer.iter % self.period == 0:

            def keep(model: nn.Module, inputs: tuple[list[dict[str, Any]]]) -> None:
                self._batch = inputs[0]
                handle.remove()

            # Before INCLUSIVE_CORNERS moves the objects, which `match_inputs` does by itself.
            handle = self.model.register_forward_pre_hook(keep, prepend=True)

    def after_step(self) -> None:
        batch, self._batch = self._batch, []
        image = next((x for x in batch if len(x["instances"])), None)
        if image is None:
            return
        self.model.eval()  # the running statistics of batch norm stay as they are
        (matching,) = match_inputs(self.model, [image])
        self.model.train()
        pixels = convert_image_to_rgb(image["image"].permute(1, 2, 0), self.model.input_format)
        picture = to_image(draw_matching(pixels, {"now": matching}))
        get_event_storage().put_image("matching", picture.transpose(2, 0, 1))


class PreciseBN(hooks.PreciseBN):
    """Detectron2's, on the images that are trained on next, whenever the run was resumed."""

    def update_stats(self) -> None:
        loader = self.trainer.data_loader
        if hasattr(loader, "state_dict"):  # one of the user's own goes on instead
            self._data_loader.load_state_dict(loader.state_dict())
            self._data_iter = None
        super().update_stats()
