"""The bag losses of FreeAnchor: pure tensor functions, letters as in `matching.py`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import at_least_float32, locate, take
from .matching import BoxCoding, Objects, box_prob

# Elements per step of the dense sum: temporaries that stay in a CPU's cache, and few launches on
# a GPU.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 24


def bag_logit(log_prob: Tensor) -> Tensor:
    """Log odds of each matched probability: log(P / (1 - P)) from log P.

    Args:
        log_prob: log P, at most 0.

    Returns:
        Finite log odds, also for P = 1 and for P that underflows.
    """
    # P == 1 has infinite odds. The bound is far below what moves the loss.
    log_prob = log_prob.clamp(max=-(torch.finfo(log_prob.dtype).eps ** 2))
    return log_prob - torch.log(-torch.expm1(log_prob))


def positive_bag_loss(log_prob: Tensor) -> Tensor:
    """-log Mean-max of each bag: the recall likelihood of an object (paper, section 3.3).

    Mean-max(P) = sum_j w_j P_j with w_j = (1 / (1 - P_j)) / sum_k 1 / (1 - P_k). With the odds
    o_j = P_j / (1 - P_j) and 1 / (1 - P_j) = 1 + o_j this is sum(o) / (K + sum(o)): Mean-max is
    the probability whose odds are the *mean odds* of the bag. Written so, the loss is a softplus.
    It can neither exceed the range of a probability by rounding, nor divide by 1 - P = 0, nor
    lose its gradient when every P underflows.

    Args:
        log_prob: (M, K) log matched probabilities, K >= 1.

    Returns:
        (M,) losses, finite and not negative.
    """
    log_sum_odds = bag_logit(log_prob).logsumexp(dim=1)
    return F.softplus(math.log(max(1, log_prob.shape[1])) - log_sum_odds)


@torch.no_grad()
def negative_bag_loss(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_images: Tensor,
    coding: Sequence[float],
    threshold: float,
    gamma: float,
    grad_scale: Tensor,
    grads: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Precision loss: the focal loss of every anchor and class, as far as it is background.

    The sum over all cells of q^gamma * -log(1 - q) with q = P^cls * (1 - P{a in A+}) (paper,
    section 3.3), and its gradient.

    Args:
        logits: L levels (N, ..., C) of class logits.
        deltas: L levels (N, ..., 4) of predicted deltas.
        anchors: L levels of the anchors, (R_l, 4) or (H, W, A, 4).
        gt_boxes: (M, 4) boxes, see :class:`Objects`.
        gt_classes: (M,) their classes.
        gt_images: (M,) their images.
        coding: the numbers of a :class:`BoxCoding`, one after the other.
        threshold: as for :func:`freeanchor.layers.matching.box_prob`.
        gamma: focusing parameter, at least 1.
        grad_scale: scalar factor of the gradient.
        grads: where to write the gradient times `grad_scale`: a tensor for each level, of its shape
            and memory layout, or none if the gradient is not wanted.

    Returns:
        Tuple of the scalar loss in float64, and the (M,) highest IoUs of `box_prob`.
    """
    objects = Objects(gt_boxes, gt_classes, gt_images)
    *weights, clamp = coding
    box_coding = BoxCoding(tuple(weights), clamp)  # type: ignore[arg-type]
    num_classes = logits[0].shape[-1]
    cells, prob, max_iou = box_prob(deltas, anchors, objects, num_classes, box_coding, threshold)
    total = background_loss(logits, cells, prob, gamma, grad_scale, grads)
    return total, max_iou


def background_loss(
    logits: Sequence[Tensor],
    cells: Tensor,
    prob: Tensor,
    gamma: float,
    grad_scale: Tensor,
    grads: Sequence[Tensor],
) -> Tensor:
    """:func:`negative_bag_loss` for known P{a in A+}.

    The sum does not depend on the order of the logits, so they are read as they lie in memory, as
    if P{a in A+} were 0 everywhere, and the few cells where it is not are put right afterwards.
    Arithmetic is in logit space, so a false positive with a saturated sigmoid still gets its
    gradient, and in float32 for half precision logits.

    Args:
        logits: as for :func:`negative_bag_loss`.
        cells: (S,) int64 distinct indices of the elements of the levels where P{a in A+} is not 0.
        prob: (S,) P{a in A+} there.
        gamma: as for :func:`negative_bag_loss`.
        grad_scale: as for :func:`negative_bag_loss`.
        grads: as for :func:`negative_bag_loss`.
    """
    dtype = at_least_float32(logits)
    total = torch.zeros((), dtype=torch.float64, device=logits[0].device)
    chunk = _CHUNK_GPU if logits[0].is_cuda else _CHUNK_CPU
    for i, level in enumerate(logits):
        order = sorted(range(level.dim()), key=level.stride, reverse=True)  # as it lies in memory
        parts = outs = level.permute(order).reshape(-1).split(chunk)
        if grads:
            outs = grads[i].permute(order).view(-1).split(chunk)
        for x, out in zip(parts, outs):
            p, not_p, nll = _background(x.to(dtype))
            if grads:
                # d/dx of p^gamma * nll, where dp/dx = p (1 - p) and dnll/dx = p
                slope = not_p.mul_(nll).mul_(gamma).add_(p).mul_(grad_scale)
                torch.mul(p.pow_(gamma), slope, out=out)
            else:
                p.pow_(gamma)
            total += p.mul_(nll).sum(dtype=torch.float64)
    # The few cells with P{a in A+} > 0 were counted as plain background: put them right. They may
    # be nearly all of the sum, hence float64.
    x = take(logits, cells, "cells")
    p, _, nll = _background(x)
    q, not_q, nll_q = _background(x, prob)
    total += (q.pow(gamma) * nll_q).sum(dtype=torch.float64)
    total -= (p.pow(gamma) * nll).sum(dtype=torch.float64)
    # The same gradient with dq/dx = q (1 - p) and dnll/dq = 1 / (1 - q)
    slope = q.pow(gamma) * (-x).sigmoid() * (gamma * nll_q + q / not_q) * grad_scale
    if grads:
        for grad, here, position in locate(grads, cells):
            grad[position] = slope[here].to(grad.dtype)
    return total


def _background(x: Tensor, prob: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Give q = sigmoid(x) * (1 - prob), 1 - q and -log(1 - q) without cancellation."""
    p = x.sigmoid()
    not_p = (-x).sigmoid()  # 1 - p would round to 0 from x = 17 on
    if prob is None:
        return p, not_p, F.softplus(x, threshold=40)
    q, not_q = p * (1 - prob), not_p + p * prob
    return q, not_q, torch.where(q < 0.5, -torch.log1p(-q), -torch.log(not_q))
