"""Which anchors stand for which object: bags, matched probabilities and P{a in A+}.

Pure tensor functions, in the order of section 3 of "FreeAnchor: Learning to Match Anchors for
Visual Object Detection" (NeurIPS 2019). Shapes are written with

    N images, M objects (of all images), R anchors (of one image, all levels), C classes,
    K anchors in a bag, L levels of the feature pyramid

and the paper's symbols: object b_i, anchor a_j, P_ij^cls, P_ij^loc, P{a_j in A+}. Boxes are
(x1, y1, x2, y2) in pixels of the input image.

What there is for each anchor comes as L tensors, one per level, see `levels.py`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Upper bound on the elements of one (objects, anchors) block. It bounds the memory of the search,
# whatever the number of objects: a block has some ten temporaries of this size.
_BLOCK_ELEMENTS = 1 << 20


class Objects(NamedTuple):
    """The M objects of a batch, those of the first image first.

    Attributes:
        boxes: (M, 4) boxes.
        classes: (M,) int64 classes in [0, C).
        images: (M,) int64 indices n of their images, which never decrease.
    """

    boxes: Tensor
    classes: Tensor
    images: Tensor


class BoxCoding(NamedTuple):
    """How deltas describe boxes, as in Detectron2's `Box2BoxTransform`.

    Attributes:
        weights: factors of (dx, dy, dw, dh), `MODEL.RETINANET.BBOX_REG_WEIGHTS`.
        scale_clamp: upper bound of the log scales dw and dh, without their weights.
    """

    weights: tuple[float, float, float, float]
    scale_clamp: float


def _check_boxes(name: str, boxes: Tensor) -> None:
    size = boxes[:, 2:] - boxes[:, :2]  # NaN or inf if a coordinate is
    if not bool(((size >= 0) & (size < math.inf)).all()):
        raise ValueError(f"{name} must have finite coordinates with x1 <= x2 and y1 <= y2")


def _check_objects(objects: Objects, num_images: int, num_classes: int) -> None:
    _check_boxes("gt_boxes", objects.boxes)
    if not bool(((objects.classes >= 0) & (objects.classes < num_classes)).all()):
        raise ValueError(f"gt_classes must be in [0, {num_classes})")
    images = F.pad(F.pad(objects.images, (1, 0)), (0, 1), value=num_images - 1)
    if not bool((images.diff() >= 0).all()):
        raise ValueError(f"gt_images must be in [0, {num_images}) and never decrease")


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of boxes whose leading dimensions broadcast.

    Args:
        boxes1: (..., 4) boxes.
        boxes2: (..., 4) boxes.

    Returns:
        (...) IoU in [0, 1]. Zero where the boxes do not overlap, so also for boxes without area.
    """
    ax1, ay1, ax2, ay2 = boxes1.unbind(-1)
    bx1, by1, bx2, by2 = boxes2.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    inter = width.mul_(height)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    # 0, not NaN, for two boxes without area and for a prediction whose area overflowed.
    return torch.where((inter > 0) & (union < math.inf), inter / union, 0)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Regression targets of `boxes` relative to `anchors`.

    The arithmetic of Detectron2's `Box2BoxTransform.get_deltas`, for any leading dimensions,
    without its device synchronisation, and finite for a box without width or height.

    Args:
        boxes: (..., 4) target boxes.
        anchors: (..., 4) anchors, with positive width and height.
        weights: factors of (dx, dy, dw, dh), `MODEL.RETINANET.BBOX_REG_WEIGHTS`.

    Returns:
        (..., 4) deltas.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    shift = boxes[..., :2] + 0.5 * size - anchors[..., :2] - 0.5 * anchor_size
    # log(0) of an empty box would make the whole bag's likelihood zero and its gradient NaN.
    log_scale = torch.log(size.clamp(min=torch.finfo(size.dtype).eps) / anchor_size)
    return _scale(torch.cat((shift / anchor_size, log_scale), dim=-1), weights)


def _scale(deltas: Tensor, weights: Iterable[float]) -> Tensor:
    """Multiply by the weights, which are no tensor: to copy one to the device would wait for it."""
    return torch.stack([x * weight for x, weight in zip(deltas.unbind(-1), weights)], dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, coding: BoxCoding | None) -> Tensor:
    """Boxes that `deltas` predict from `anchors`: the inverse of :func:`encode_boxes`.

    The arithmetic of Detectron2's `Box2BoxTransform.apply_deltas`, in the dtype of `deltas`
    instead of always in float32.

    Args:
        deltas: (..., 4) predicted deltas.
        anchors: (..., 4) anchors.
        coding: what the deltas mean. None: distances from the centre of the anchor to the left,
            top, right and bottom in units of its width, as in `Box2BoxTransformLinear`.

    Returns:
        (..., 4) boxes, not clipped to the image.
    """
    if coding is None:
        centre = 0.5 * (anchors[..., :2] + anchors[..., 2:])
        distances = F.relu(deltas) * (anchors[..., 2:3] - anchors[..., :1])
        return torch.cat((centre - distances[..., :2], centre + distances[..., 2:]), dim=-1)
    deltas = torch.stack([x / w for x, w in zip(deltas.unbind(-1), coding.weights)], dim=-1)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=coding.scale_clamp)) * anchor_size
    return torch.cat((centre - half, centre + half), dim=-1)


@torch.no_grad()
def iou_topk(anchors: Sequence[Tensor], gt_boxes: Tensor, k: int) -> Tensor:
    """Bags of anchors: the `k` anchors with the highest IoU with each object (A_i in the paper).

    Every anchor that contains a small object has the same IoU with it, so ties at the k-th place
    are common, and which of the tied anchors enter the bag changes the gradient by several
    percent. The order is therefore part of the contract: higher IoU first, then the nearer
    centre, then the lower index. It is the same on every device and in every run.

    Args:
        anchors: L levels of anchors, the same for all images. A level is (R_l, 4), or (H, W, A, 4)
            if it is a grid: the x coordinates depend on the column and on a only, the y coordinates
            on the row and on a, and the centres move to the right and down. Of a grid, no more
            than the first row, the first column and the last anchors are read.
        gt_boxes: (M, 4) objects, of any number of images.
        k: the size of a bag.

    Returns:
        (M, min(k, R)) int64 indices into the anchors of all levels, in the order above.

    Raises:
        ValueError: boxes that are not finite or inverted.
    """
    _check_boxes("gt_boxes", gt_boxes)
    flat = torch.cat([_flatten_level(level) for level in anchors])
    k = min(k, len(flat))
    if k == 0 or len(gt_boxes) == 0:
        return torch.zeros((len(gt_boxes), k), dtype=torch.int64, device=gt_boxes.device)
    block = max(1, _BLOCK_ELEMENTS // len(flat))
    return torch.cat([_iou_topk_block(flat, boxes, k) for boxes in gt_boxes.split(block)])


def _flatten_level(anchors: Tensor) -> Tensor:
    """Check a level of anchors, and give it as (R_l, 4)."""
    if anchors.dim() == 2 or anchors.numel() == 0:
        _check_boxes("anchors", anchors.reshape(-1, 4))
        return anchors.reshape(-1, 4)
    x, y = anchors[:1, ..., ::2], anchors[:, :1, :, 1::2]  # (1, W, A, 2), (H, 1, A, 2)
    valid = torch.equal(anchors[-1, -1, :, ::2], x[0, -1])
    valid &= torch.equal(anchors[-1, -1, :, 1::2], y[-1, 0])
    for axis, corners in ((1, x), (0, y)):
        size, centre = corners.diff(dim=-1), corners.double().sum(dim=-1)
        valid &= bool(((size >= 0) & (size < math.inf)).all() & (centre.diff(dim=axis) >= 0).all())
    if not valid:
        raise ValueError(
            "anchors of the form (H, W, A, 4) must be grids: finite coordinates with x1 <= x2 and "
            "y1 <= y2, x that depends on the column only and y on the row only, and centres that "
            "move to the right and down"
        )
    x, y = (corners.expand(*anchors.shape[:3], 2) for corners in (x, y))
    return torch.stack((x, y), dim=-1).flatten(-2).reshape(-1, 4)  # x1, y1, x2, y2


def _iou_topk_block(anchors: Tensor, gt_boxes: Tensor, k: int) -> Tensor:
    """:func:`iou_topk` by exhaustive search, for 1 <= k <= R and as many objects as fit."""
    iou = box_iou(gt_boxes[:, None], anchors)  # (m, R)
    kth_iou = iou.topk(k, dim=1).values[:, -1:]
    # All anchors that may be in the bag: more than k of them where the k-th place is tied.
    objects, candidates = torch.nonzero(iou >= kth_iou, as_tuple=True)
    offset = anchors[candidates] - gt_boxes[objects]
    distance = (offset[:, 0] + offset[:, 2]).square() + (offset[:, 1] + offset[:, 3]).square()
    # Candidates come by object and index. Stable sorts by the less important keys first leave
    # them by object, IoU, distance and index.
    order = distance.argsort(stable=True)
    order = order[iou[objects[order], candidates[order]].argsort(descending=True, stable=True)]
    order = order[objects[order].argsort(stable=True)]
    counts = objects.bincount(minlength=len(gt_boxes))
    first = counts.cumsum(0) - counts
    rank = torch.arange(k, device=anchors.device)
    return candidates[order[first[:, None] + rank]]


def matched_log_probability(
    logits: Tensor, deltas: Tensor, targets: Tensor, bbox_reg_weight: float, smooth_l1_beta: float
) -> Tensor:
    """log(P_ij^cls * P_ij^loc): how well anchor j already does for object i (paper, section 3.1).

    P^cls is the sigmoid of the logit of the object's class, P^loc = exp(-weight * SmoothL1). The
    logarithm is kept because P itself underflows to 0 for anchors far from a slender object, and
    with it the gradient.

    Args:
        logits: (M, K) logits of each object's class at the anchors of its bag.
        deltas: (M, K, 4) predicted deltas at the same anchors.
        targets: (M, K, 4) deltas that would hit the object.
        bbox_reg_weight: the weight beta of the localisation loss, 0.75 in the paper.
        smooth_l1_beta: where Smooth L1 turns from quadratic to linear, 0.11 in the paper's code.

    Returns:
        (M, K) log probabilities, at most 0.
    """
    distance = F.smooth_l1_loss(deltas, targets, reduction="none", beta=smooth_l1_beta).sum(-1)
    return F.logsigmoid(logits) - bbox_reg_weight * distance


@torch.no_grad()
def box_prob(
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    objects: Objects,
    num_classes: int,
    coding: BoxCoding,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """P{a_j in A+} of a batch: does the predicted box of anchor j localise an object?

    P{a_j -> b_i} rises linearly from 0 where the predicted box has IoU `threshold` with object i
    to 1 for the predicted box with the highest IoU (the saturated linear function of the paper,
    section 3.2). P{a_j in A+} is its maximum over the objects of one class. It is zero almost
    everywhere, so only its non-zero cells are returned.

    An object that no box localises above the threshold has no cells. The other implementations
    divide 0 by 0 when its highest IoU is float32(0.6) exactly, which is a plausible cause of the
    NaN that their users meet late in training.

    Args:
        deltas: L levels (N, ..., 4) of predicted deltas.
        anchors: L levels of the anchors, (R_l, 4) or (H, W, A, 4).
        objects: the M objects, in the dtype of what is to be computed.
        num_classes: C.
        coding: what the deltas mean.
        threshold: IoU in [0, 1) at which the ramp starts, `MODEL.FREEANCHOR.BBOX_THRESHOLD`.

    Returns:
        Tuple of (S,) int64 cells `(n * R + j) * C + class` in increasing order without repetition,
        (S,) probabilities in (0, 1], and (M,) the highest IoU of any predicted box with each
        object, or 0 if it is not above the threshold.

    Raises:
        ValueError: boxes that are not finite or inverted, or classes or images out of range.
    """
    dtype = objects.boxes.dtype
    flat_anchors = torch.cat([level.reshape(-1, 4) for level in anchors])
    _check_objects(objects, len(deltas[0]), num_classes)
    _check_boxes("anchors", flat_anchors)
    cells, probs, max_ious = [], [], []
    for n in range(len(deltas[0])):
        image_deltas = torch.cat([level[n].reshape(-1, 4) for level in deltas]).to(dtype)
        boxes = decode_boxes(image_deltas, flat_anchors, coding)
        gt_boxes, gt_classes = (x[objects.images == n] for x in objects[:2])
        cell, prob, max_iou = _box_prob_image(boxes, gt_boxes, gt_classes, num_classes, threshold)
        cells.append(cell + n * len(boxes) * num_classes)
        probs.append(prob)
        max_ious.append(max_iou)
    return torch.cat(cells), torch.cat(probs), torch.cat(max_ious)


def _box_prob_image(
    boxes: Tensor, gt_boxes: Tensor, gt_classes: Tensor, num_classes: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`box_prob` of the predicted boxes of one image."""
    cells, probs = [], []
    max_iou = boxes.new_zeros(len(gt_boxes))
    block = max(1, _BLOCK_ELEMENTS // max(1, len(boxes)))
    for start in range(0, len(gt_boxes) if len(boxes) else 0, block):
        objects = slice(start, start + block)
        iou = box_iou(gt_boxes[objects, None], boxes)  # (m, R)
        highest = iou.amax(dim=1)
        max_iou[objects] = torch.where(highest > threshold, highest, 0)
        i, j = torch.nonzero(iou > threshold, as_tuple=True)
        # Strictly positive: the maximum is at least this IoU, which is above the threshold.
        ramp = max_iou[objects][i] - threshold
        probs.append((iou[i, j] - threshold) / ramp)
        cells.append(j * num_classes + gt_classes[objects][i])
    if not cells:
        return gt_classes.new_zeros(0), max_iou.new_zeros(0), max_iou
    # Objects of the same class may share an anchor: the maximum, not whichever comes last.
    unique, inverse = torch.cat(cells).unique(return_inverse=True)
    prob = max_iou.new_zeros(len(unique)).scatter_reduce_(0, inverse, torch.cat(probs), "amax")
    return unique, prob, max_iou
