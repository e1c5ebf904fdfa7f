"""Ignore regions: parts of an image where nobody said what is an object and what is not.

COCO marks crowds so. In the paper and the other implementations their anchors are background.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .matching import BoxCoding, decode_boxes

__all__ = ["IGNORED_LOGIT", "ignored_anchors", "without_ignored"]

# Of an anchor that is ignored, in every dtype: its sigmoid, and with it loss and gradient, is 0.
IGNORED_LOGIT = -100.0
_MOSTLY = 0.5  # the share of a predicted box that must be inside, exclusively


@torch.no_grad()
def ignored_anchors(
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    regions: Sequence[Tensor | None],
    coding: BoxCoding | None,
) -> list[Tensor]:
    """Find the anchors whose predicted box lies mostly inside one ignore region of its image.

    Args:
        deltas: L levels (N, ..., 4) of predicted deltas.
        anchors: L levels of the anchors, (R_l, 4) or (H, W, A, 4).
        regions: of each image, (G, 4) boxes x1 y1 x2 y2, or None.
        coding: what the deltas mean.

    Returns:
        Per level, (N, ...) whether an anchor is to be ignored.
    """
    masks = [
        torch.zeros(level.shape[:-1], dtype=torch.bool, device=level.device) for level in deltas
    ]
    for level, level_anchors, mask in zip(deltas, anchors, masks):
        for n, boxes in enumerate(regions):
            if boxes is None or len(boxes) == 0:
                continue
            found = level[n].to(level_anchors.dtype)
            found = decode_boxes(found, level_anchors.reshape(found.shape), coding)
            area = (found[..., 2:] - found[..., :2]).prod(dim=-1)
            for box in boxes.to(found):
                start = torch.maximum(found[..., :2], box[:2])
                end = torch.minimum(found[..., 2:], box[2:])
                inside = (end - start).clamp(min=0).prod(dim=-1)
                # Not of a box that overflowed: infinity is inside nothing.
                mask[n] |= (inside > _MOSTLY * area) & (area < math.inf)
    return masks


def without_ignored(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Logits (N, ..., C) with which anchors that are ignored have neither loss nor gradient."""
    return [
        torch.where(mask[..., None], IGNORED_LOGIT, level) for level, mask in zip(logits, masks)
    ]
