"""Boxes that end on their last pixel, as the paper's repository resizes them."""

from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

__all__ = [
    "from_inclusive_corners",
    "inclusive_shift",
    "shift_objects",
    "to_inclusive_corners",
]


def inclusive_shift(boxes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Correct resized boxes for inclusive corners.

    With them, a box of width w is w - 1 wide from its first to its last pixel, and that is what is
    resized. The network itself has Detectron2's boxes: its anchors, losses and NMS come out the
    same in both conventions.

    Args:
        boxes: (M, 4) boxes in Detectron2's convention, resized by `scale`.
        scale: factors of width and height.

    Returns:
        (M, 4) boxes in Detectron2's convention: (w - 1) * scale + 1 wide instead of w * scale.
    """
    return boxes + boxes.new_tensor([0, 0, 1 - scale[0], 1 - scale[1]])


def _sizes(image: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the original image and of the network's input."""
    height, width = image["image"].shape[-2:]
    return (image.get("width", width), image.get("height", height)), (width, height)


def _resize_factors(model: Any, image: dict[str, Any]) -> tuple[float, float]:
    """By which the width and height of a training image were resized."""
    if "resize_factors" in image:
        factors: tuple[float, float] = image["resize_factors"]
        return factors
    if model.config is not None and model.config.INPUT.CROP.ENABLED:
        raise ValueError(
            "MODEL.FREEANCHOR.INCLUSIVE_CORNERS with INPUT.CROP needs the `resize_factors` of each "
            "image, which freeanchor.data.Mapper gives"
        )
    original, resized = _sizes(image)
    return resized[0] / original[0], resized[1] / original[1]


def shift_objects(model: Any, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Resize ground truth as the paper's repository does, where a box is at least a pixel wide."""
    batch = []
    for image in batched_inputs:
        instances = Instances(image["instances"].image_size, **image["instances"].get_fields())
        scale = _resize_factors(model, image)
        boxes = inclusive_shift(instances.gt_boxes.tensor, scale)
        start, end = boxes.split(2, dim=1)
        instances.gt_boxes = Boxes(torch.cat([start, end.maximum(start + 1)], dim=1))
        batch.append({**image, "instances": instances})
    return batch


def to_inclusive_corners(
    model: nn.Module, inputs: tuple[list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]]] | None:
    """What training has of its inputs, see :func:`shift_objects`."""
    return (shift_objects(model, inputs[0]),) if model.training else None


def from_inclusive_corners(
    model: nn.Module, inputs: tuple[list[dict[str, Any]]], outputs: Any
) -> None:
    """Resize detections as the paper's repository does."""
    if model.training:
        return
    for image, output in zip(*inputs, outputs):
        original, resized = _sizes(image)
        boxes = output["instances"].pred_boxes
        scale = original[0] / resized[0], original[1] / resized[1]
        boxes.tensor = inclusive_shift(boxes.tensor, scale)
        boxes.clip(output["instances"].image_size)
