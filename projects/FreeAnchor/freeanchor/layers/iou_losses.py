"""Localisation losses that compare boxes instead of deltas."""

import torch
from torch import Tensor

__all__ = ["IOU_LOSSES", "iou_loss"]

IOU_LOSSES = ("iou", "giou")


def iou_loss(boxes: Tensor, targets: Tensor, kind: str) -> Tensor:
    """1 - IoU, or 1 - GIoU (CVPR 2019), of boxes whose leading dimensions broadcast.

    GIoU = IoU - (hull - union) / hull, where the hull is the smallest box around both. A box that
    does not overlap its target has a gradient by its hull alone: with "iou" it has none. Value and
    gradient are finite for boxes without area, and for areas that overflow.

    Args:
        boxes: (..., 4) predicted boxes.
        targets: (..., 4) boxes.
        kind: one of :data:`IOU_LOSSES`.

    Returns:
        (...) losses in [0, 1], or in [0, 2] for "giou".
    """
    start = torch.maximum(boxes[..., :2], targets[..., :2])
    end = torch.minimum(boxes[..., 2:], targets[..., 2:])
    intersection = _area(start, end)
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(targets[..., :2], targets[..., 2:])
    union = union - intersection
    loss = 1 - _ratio(intersection, union)
    if kind == "giou":
        start = torch.minimum(boxes[..., :2], targets[..., :2])
        end = torch.maximum(boxes[..., 2:], targets[..., 2:])
        loss = loss + (1 - _ratio(union, _area(start, end)))
    return loss


def _area(start: Tensor, end: Tensor) -> Tensor:
    width, height = (end - start).clamp(min=0).unbind(-1)
    return width * height


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Of two areas: 0 without a gradient where the whole is 0 or infinite."""
    valid = (whole > 0) & whole.isfinite()
    return torch.where(valid, part, 0) / torch.where(valid, whole, 1)
