"""Multi-scale and flip testing of dense detectors, for which Detectron2 has none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from .inclusive_corners import inclusive_shift
from .inference import apply_nms, candidates
from .kinds import dense_detector

__all__ = ["MultiScaleTest"]


class MultiScaleTest(nn.Module):
    """A RetinaNet or FreeAnchor that detects at several scales, called like the model itself.

    As in the paper's repository, the candidates of all scales (and of their mirror images) go into
    one per-class NMS. With one scale and no flip, the detections are those of the model. Scales
    run one after another, so that memory does not grow with their number.

    `TEST.AUG.MIN_SIZES`, `MAX_SIZE`, `MAX_SIZE_RATIO` and `FLIP` say which. Images are resized from
    their file, or from the given image where there is no `file_name`.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        read: Callable[[str], np.ndarray[Any, Any]] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            cfg: the config.
            model: a RetinaNet or FreeAnchor, possibly in DistributedDataParallel.
            read: reads the (H, W, C) pixels of a file, by default as Detectron2 does.

        Raises:
            TypeError: it is another model.
            ValueError: there is no scale.
        """
        super().__init__()
        aug = cfg.TEST.AUG
        if not aug.MIN_SIZES:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: name a size of the shorter side")
        self.model = dense_detector(model)
        self.read = read or partial(read_image, format=self.model.input_format)
        self.inclusive_corners = getattr(self.model, "inclusive_corners", False)
        self.flips = (False, True) if aug.FLIP else (False,)
        self.resizes = [
            ResizeShortestEdge(size, min(aug.MAX_SIZE, int(size * aug.MAX_SIZE_RATIO) or np.inf))
            for size in aug.MIN_SIZES
        ]

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detect, see :class:`detectron2.modeling.RetinaNet`."""
        return [{"instances": self._detect(image)} for image in batched_inputs]

    def _detect(self, image: dict[str, Any]) -> Instances:
        model = self.model
        pixels = self._read(image)
        found = []
        for resize in self.resizes:
            resized = resize.get_transform(pixels).apply_image(pixels)
            found += [self._candidates(resized, flip) for flip in self.flips]
        size = found[0].image_size
        merged = Instances.cat([self._to_size(x, size) for x in found])
        merged = apply_nms(merged, model.test_nms_thresh, model.max_detections_per_image)
        height, width = image.get("height", pixels.shape[0]), image.get("width", pixels.shape[1])
        merged = detector_postprocess(merged, height, width)
        if self.inclusive_corners:
            scale = width / size[1], height / size[0]
            merged.pred_boxes.tensor = inclusive_shift(merged.pred_boxes.tensor, scale)
            merged.pred_boxes.clip((height, width))
        return merged

    def _read(self, image: dict[str, Any]) -> np.ndarray[Any, Any]:
        """(H, W, C) pixels, as `TEST.AUG` is to resize them."""
        if "file_name" in image:
            pixels = self.read(image["file_name"])
        else:
            pixels = image["image"].permute(1, 2, 0).numpy()
        return np.asarray(pixels)

    def _candidates(self, pixels: np.ndarray[Any, Any], flip: bool) -> Instances:
        """Those of the resized image, or of its mirror image; all else is freed on return."""
        model = self.model
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        images = model.preprocess_image([{"image": tensor.flip(2) if flip else tensor}])
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        (found,) = candidates(
            model,
            features,
            model.head(features),
            images.image_sizes,
            model.test_score_thresh,
            model.test_topk_candidates,
        )
        if flip:
            left, top, right, bottom = found.pred_boxes.tensor.unbind(1)
            width = found.image_size[1]
            found.pred_boxes = Boxes(torch.stack([width - right, top, width - left, bottom], dim=1))
        return found

    def _to_size(self, found: Instances, size: tuple[int, int]) -> Instances:
        if found.image_size == size:
            return found
        scale = size[1] / found.image_size[1], size[0] / found.image_size[0]
        boxes = found.pred_boxes.clone()
        boxes.scale(*scale)
        if self.inclusive_corners:
            boxes.tensor = inclusive_shift(boxes.tensor, scale)
        return Instances(size, **{**found.get_fields(), "pred_boxes": boxes})
