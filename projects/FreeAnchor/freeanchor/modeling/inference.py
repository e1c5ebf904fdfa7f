"""Detections: what Detectron2's RetinaNet finds, without a pass over what is not found.

RetinaNet copies all logits of an image, takes their sigmoid, and sorts all that are above the
threshold. Here, logits are read once, as they lie in memory: the largest of each block of them
tell in which blocks the best can be. Only the best become scores and boxes.
"""

from collections.abc import Iterator, Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.modeling import RetinaNet
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .anchors import generate_anchors

__all__ = ["apply_nms", "candidates", "detect"]

# Logits in a block. Larger ones make the first pass a little faster and the second one slower.
_BLOCK = 128


def detect(
    model: RetinaNet,
    features: list[Tensor],
    predictions: list[list[Tensor]],
    image_sizes: Sequence[tuple[int, int]],
) -> list[Instances]:
    """Detect in each image of a batch, with the thresholds and limits of the model.

    Args: as of :func:`candidates`.

    Returns:
        Per image, `pred_boxes`, `scores` and `pred_classes`, the highest scores first, in the size
        of the network's input: those of `RetinaNet.forward_inference`, but for the choice among
        equal scores.
    """
    threshold, topk = model.test_score_thresh, model.test_topk_candidates
    return [
        apply_nms(found, model.test_nms_thresh, model.max_detections_per_image)
        for found in candidates(model, features, predictions, image_sizes, threshold, topk)
    ]


def apply_nms(found: Instances, nms_thresh: float, most: int | None = None) -> Instances:
    """What NMS of each class leaves of detections, the highest scores first.

    Args:
        found: `pred_boxes`, `scores` and `pred_classes` of an image.
        nms_thresh: IoU above which the lower score is left out.
        most: as many are kept; None keeps all.
    """
    boxes = found.pred_boxes.tensor
    keep = batched_nms(boxes, found.scores, found.pred_classes, nms_thresh)
    return found[keep[:most]]


@torch.no_grad()
def candidates(
    model: RetinaNet,
    features: list[Tensor],
    predictions: list[list[Tensor]],
    image_sizes: Sequence[tuple[int, int]],
    score_thresh: float,
    topk: int | None = None,
) -> Iterator[Instances]:
    """Decode the detections of each image of a batch.

    Args:
        model: a RetinaNet or FreeAnchor.
        features: per level, (N, C, H, W): the input of its head.
        predictions: what its head gave, logits and deltas of each level. They are not changed.
        image_sizes: (height, width) of each image of the batch.
        score_thresh: scores above it are kept.
        topk: as many of each level are kept, those with the highest scores; None keeps all.

    Yields:
        Per image, `pred_boxes`, `scores` and `pred_classes`, in the size of the network's input.
    """
    anchors = generate_anchors(model.anchor_generator, features)
    logits, deltas = predictions
    flat = [_flatten(x) for x in logits]
    best = [None if topk is None else top_indices(x, topk) for x in flat]
    for i, image_size in enumerate(image_sizes):
        parts = []
        for level, (x, level_best) in enumerate(zip(flat, best, strict=True)):
            # In float32 before the sigmoid: scores, and what passes, do not depend on the order.
            if level_best is None:
                index = (x[i].float().sigmoid() > score_thresh).nonzero()[:, 0]
                score = x[i, index].float().sigmoid()
            else:
                score = x[i, level_best[i]].float().sigmoid()
                passes = (score > score_thresh).nonzero()[:, 0]
                index, score = level_best[i, passes], score[passes]
            cell, anchor, label = locate(index, logits[level], model.num_classes)
            delta = deltas[level][i].unflatten(0, (-1, 4)).flatten(2)[anchor, :, cell]
            row = cell * (logits[level].shape[1] // model.num_classes) + anchor
            parts.append((delta.float(), anchors[level].tensor[row], score, label))
        delta, anchor, score, label = (torch.cat(x) for x in zip(*parts, strict=True))
        boxes = Boxes(model.box2box_transform.apply_deltas(delta, anchor))
        yield Instances(image_size, pred_boxes=boxes, scores=score, pred_classes=label)


def _flatten(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, C * H * W), or as (N, H * W * C) where that is the order in memory."""
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def top_indices(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest values of each row, in no order.

    They lie in those k blocks whose largest values are the largest, so that one pass finds the
    blocks, whatever the values are, and the values themselves are chosen among few.

    Args:
        x: (N, n) values.
        k: number of values.

    Returns:
        (N, min(k, n)) indices.
    """
    number = x.shape[1] // _BLOCK
    if number <= 2 * k:
        return x.topk(min(k, x.shape[1]), dim=1, sorted=False).indices
    blocks = x[:, : number * _BLOCK].unflatten(1, (number, _BLOCK)).amax(2)
    chosen = blocks.topk(k, dim=1, sorted=False).indices
    offset = torch.arange(_BLOCK, device=x.device)
    index = (chosen[..., None] * _BLOCK + offset).flatten(1)
    rest = torch.arange(number * _BLOCK, x.shape[1], device=x.device)  # behind the last block
    index = torch.cat([index, rest.expand(len(x), -1)], dim=1)
    return index.gather(1, x.gather(1, index).topk(k, dim=1, sorted=False).indices)


def locate(index: Tensor, logits: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where in a level flattened logits are: cell of the grid, anchor of the cell, class."""
    channels, cells = logits.shape[1], logits.shape[2] * logits.shape[3]
    if _is_channels_last(logits):
        cell, channel = index // channels, index % channels
    else:
        cell, channel = index % cells, index // cells
    return cell, channel // num_classes, channel % num_classes
