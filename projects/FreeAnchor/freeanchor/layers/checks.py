"""Shapes and dtypes of the operators' arguments, with messages for users."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .levels import at_least_float32
from .matching import BoxCoding, Objects


def check_levels(name: str, levels: Sequence[Tensor], depth: int | None = None) -> None:
    """Levels are (N, ..., D) with 1 to 3 dimensions of anchors, and agree in all else."""
    if len(levels) == 0:
        raise ValueError(f"{name} must have a tensor for each level, got none")
    first = levels[0]
    for i, level in enumerate(levels):
        if not 3 <= level.dim() <= 5 or level.shape[-1] != (depth or first.shape[-1]):
            raise ValueError(
                f"{name}[{i}] must be (N, anchors, {depth or 'C'}) or (N, H, W, A, {depth or 'C'}) "
                f"as the other levels, got {list(level.shape)}"
            )
        if len(level) != len(first):
            raise ValueError(f"{name}[{i}] has {len(level)} images, {name}[0] {len(first)}")
        if not level.is_floating_point():
            raise ValueError(f"{name}[{i}] must be of a floating point dtype, got {level.dtype}")
        check_like(f"{name}[{i}]", level, first, first.dtype)


def check_matching(
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    objects: Objects,
    coding: BoxCoding,
    threshold: float,
) -> None:
    """What predictions are matched with objects by."""
    check_levels("deltas", deltas, 4)
    check_boxes(objects.boxes)
    check_anchors(anchors, objects.boxes)
    check_like("gt_boxes", objects.boxes, deltas[0], at_least_float32(deltas))
    for name, values in (("gt_classes", objects.classes), ("gt_images", objects.images)):
        check_like(name, values, deltas[0], torch.int64)
        if values.shape != objects.boxes.shape[:1]:
            raise ValueError(
                f"{name} must be ({len(objects.boxes)},) as gt_boxes, got {list(values.shape)}"
            )
    shapes = [math.prod(level.shape[1:-1]) for level in deltas]
    if shapes != [level.numel() // 4 for level in anchors]:
        raise ValueError("deltas and anchors must have as many anchors in each level")
    if len(coding.weights) != 4 or not all(weight > 0 for weight in coding.weights):
        raise ValueError(f"weights must be 4 positive numbers, got {list(coding.weights)}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")


def check_like(name: str, tensor: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """`tensor` is on the device of `other`, and of `dtype`."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {tensor.device}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_anchors(anchors: Sequence[Tensor], gt_boxes: Tensor) -> None:
    """Anchors are (R_l, 4) or (H, W, A, 4), of the dtype and device of the boxes."""
    if len(anchors) == 0:
        raise ValueError("anchors must have a tensor for each level, got none")
    for i, level in enumerate(anchors):
        if level.dim() not in (2, 4) or level.shape[-1] != 4:
            raise ValueError(
                f"anchors[{i}] must be (R, 4), or (H, W, A, 4) for a grid, got {list(level.shape)}"
            )
        check_like(f"anchors[{i}]", level, gt_boxes, gt_boxes.dtype)


def check_boxes(gt_boxes: Tensor) -> None:
    """Boxes of objects are (M, 4) in float32 or float64."""
    if gt_boxes.dim() != 2 or gt_boxes.shape[1] != 4:
        raise ValueError(f"gt_boxes must be (M, 4), got {list(gt_boxes.shape)}")
    if gt_boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gt_boxes must be float32 or float64, got {gt_boxes.dtype}")
