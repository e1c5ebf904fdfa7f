"""Proposal recall: what share of the objects do the proposals of a first stage find?"""

import logging
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from numpy.typing import NDArray
from torch import nn

from ..errors import FreeAnchorError
from ..modeling import without_ddp
from .parts import ASPECT_RATIOS, CROWDING, aspect_ratios, best_matches, crowding
from .truth import read_truth

__all__ = ["ProposalRecallEvaluator"]

logger = logging.getLogger(__name__)


class ProposalRecallEvaluator(DatasetEvaluator):
    """Average recall of proposals, whatever their classes, also of slender and crowded objects.

    AR@n is the share of the objects that the n proposals with the highest scores find, each by a
    proposal of its own, the mean over IoU thresholds 0.5, 0.55 .. 0.95; the best overlap is taken
    first, as in Detectron2. It is evaluated in the model's own forward pass. Results are in
    percent: "AR@100" and "AR@1000", and of the objects of each aspect ratio and crowding, as
    "AR@100 aspect_ratio>5". Where there is no such object, it is NaN.
    """

    LIMITS = (100, 1000)
    IOU_THRESHS = np.arange(50, 100, 5) / 100

    def __init__(self, dataset_name: str, model: nn.Module) -> None:
        """Build the evaluator of a data set.

        Args:
            dataset_name: a registered data set; crowd regions are left out.
            model: the two-stage model that is then evaluated.

        Raises:
            FreeAnchorError: it is another one.
        """
        model = without_ddp(model)
        if not isinstance(model, GeneralizedRCNN):
            raise FreeAnchorError(
                f"TEST.PROPOSAL_RECALL is of two-stage models: {type(model).__name__} has no "
                "proposals"
            )
        self.stage = model.proposal_generator
        truth = read_truth(dataset_name)
        self.objects: dict[Any, list[list[float]]] = {x: [] for x in truth.images}
        user_ids = {number: user_id for user_id, number in truth.images.items()}
        for x in truth.dataset["annotations"]:
            if not x["iscrowd"]:
                self.objects[user_ids[x["image_id"]]].append(x["bbox"])
        self._hook: Any = None
        self._proposals: list[Instances] = []
        self._found: dict[Any, NDArray[Any]] = {}

    def reset(self) -> None:
        self._found = {}
        if self._hook is None:
            self._hook = self.stage.register_forward_hook(self._record)

    def _record(self, stage: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        self._proposals = outputs[0]

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, found in zip(inputs, self._proposals, strict=True):
            objects = np.array(self.objects[image["image_id"]]).reshape(-1, 4)
            height, width = found.image_size
            boxes = found.proposal_boxes.clone()
            boxes.scale(image.get("width", width) / width, image.get("height", height) / height)
            order = found.objectness_logits.argsort(descending=True)
            rows = boxes.tensor[order].cpu().numpy().astype(np.float64)
            rows[:, 2:] -= rows[:, :2]
            best = [best_matches(objects, rows[:limit]) for limit in self.LIMITS]
            values = [aspect_ratios(objects), crowding(objects), *best]
            self._found[image["image_id"]] = np.stack(values, axis=1)

    def evaluate(self) -> dict[str, dict[str, float]]:
        self._hook.remove()
        self._hook = None
        self._proposals = []
        found: dict[Any, NDArray[Any]] = {}
        for part in comm.gather(self._found):
            found.update(part)
        if not comm.is_main_process():
            return {}
        table = np.concatenate([np.zeros((0, 2 + len(self.LIMITS))), *found.values()])
        results = {}
        for i, limit in enumerate(self.LIMITS):
            results[f"AR@{limit}"] = self._recall(table[:, 2 + i])
        for column, (name, parts) in enumerate(
            (("aspect_ratio", ASPECT_RATIOS), ("crowding", CROWDING))
        ):
            start = -1.0
            for label, end in parts:
                those = table[(table[:, column] > start) & (table[:, column] <= end)]
                for i, limit in enumerate(self.LIMITS):
                    results[f"AR@{limit} {name}{label}"] = self._recall(those[:, 2 + i])
                start = end
        logger.info(f"Proposals of {len(table)} objects:\n{create_small_table(results)}")
        return {"proposal_recall": results}

    def _recall(self, iou: NDArray[Any]) -> float:
        """Of objects with these IoUs of their proposals, in percent."""
        if len(iou) == 0:
            return float("nan")
        return float((iou[:, None] >= self.IOU_THRESHS).mean() * 100)
