"""LTM, "Learning to Match Anchors for Visual Object Detection" (TPAMI 2021): matching in the bag.

Pure tensor functions, letters as in `matching.py`. None waits for the device.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["background_loss_of_bags", "matched_in_bag", "nearest_points", "precision_bag_loss"]

# Points beside the object by this, of half its size, are left out, but for those of the finest
# level, so that no object is without candidates.
_BESIDE = 0.8


@torch.no_grad()
def nearest_points(levels: Sequence[Tensor], gt_boxes: Tensor, k: int) -> Tensor:
    """Bags of points: those that are nearest to the centre of each object, in sizes of both.

    The distance is d = max(dx, dy) / s, where s is the stride of the point, dx = |2x - x1 - x2| /
    (width + 1) and dy likewise. Points with dx or dy above 0.8 come after all others, unless they
    are of the finest level, so they are in a bag only if that level has fewer than k points.

    Many points have the same d: of a row that is far from the centre, all whose column is nearer.
    The order is therefore part of the contract: lower d, then the finer level, then lower
    min(dx, dy), then the lower index.

    Only points that can be in the bag are looked at. The point in the r-th nearest row and the c-th
    nearest column comes after the r * c points (itself included) whose row and column are no
    farther, so r * c <= k: 158 points of a level for k = 40, however large it is.

    Args:
        levels: L grids (H, W, 1, 4) of squares around the points with the stride as their side,
            finer levels first.
        gt_boxes: (M, 4) objects.
        k: the size of a bag.

    Returns:
        (M, min(k, R)) int64 indices into the points of all levels, in the order above.
    """
    x1, y1, x2, y2 = gt_boxes[:, :, None].unbind(1)  # (M, 1)
    distances, indices = [], []
    first = 0
    for i, points in enumerate(levels):
        height, width = points.shape[:2]
        if height * width == 0:
            continue
        x, y = points[0, :, 0], points[:, 0, 0]
        dx = ((x[:, 0] + x[:, 2]) - (x1 + x2)).abs() / (x2 - x1 + 1)  # (M, W)
        dy = ((y[:, 1] + y[:, 3]) - (y1 + y2)).abs() / (y2 - y1 + 1)  # (M, H)
        rank_y, rank_x = _ranks(k, height, width, gt_boxes.device)
        # Stable, so that those as near are in the order of their indices.
        dx, column = (t[:, rank_x] for t in dx.sort(dim=1, stable=True))
        dy, row = (t[:, rank_y] for t in dy.sort(dim=1, stable=True))
        far, near, index = torch.maximum(dx, dy), torch.minimum(dx, dy), row * width + column
        distance = far / (x[0, 2] - x[0, 0])
        if i > 0:
            distance = torch.where(far > _BESIDE, torch.inf, distance)
        # By min(dx, dy) and index; what is below sorts by the distance, and keeps the level.
        index, order = index.sort(dim=1)
        order = order.gather(1, near.gather(1, order).argsort(dim=1, stable=True))
        distances.append(distance.gather(1, order))
        indices.append((row * width + column).gather(1, order) + first)
        first += height * width
    if not indices:
        return gt_boxes.new_zeros((len(gt_boxes), 0), dtype=torch.int64)
    order = torch.cat(distances, 1).argsort(dim=1, stable=True)[:, : min(k, first)]
    return torch.cat(indices, 1).gather(1, order)


@functools.lru_cache(maxsize=256)
def _ranks(k: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (r - 1, c - 1) of the rows and columns with r * c <= k."""
    pairs = [(r, c) for r in range(min(k, height)) for c in range(min(k // (r + 1), width))]
    ranks = torch.tensor(pairs, dtype=torch.int64, device=device)
    return ranks[:, 0], ranks[:, 1]


@torch.no_grad()
def matched_in_bag(iou: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """P{a_j in A+} of the members of bags: their IoU over the largest of the bag.

    A pair of anchor and class that is in the bags of several objects has the largest of them.

    Args:
        iou: (M, K) IoU of each object with the predicted boxes of its bag.
        pairs: (M, K) int64, the same number for the same image, anchor and class.

    Returns:
        Tuple of (M, K) probabilities in [0, 1], 0 in a bag without overlap, and an (M, K) mask that
        is True for one of the members of each distinct pair: the set E.
    """
    largest = iou.amax(dim=1, keepdim=True)
    prob = torch.where(largest > 0, iou / torch.where(largest > 0, largest, 1), 0)
    sorted_pairs, order = pairs.flatten().sort(stable=True)
    is_first = torch.ones_like(sorted_pairs, dtype=torch.bool)
    is_first[1:] = sorted_pairs[1:] != sorted_pairs[:-1]
    run = is_first.cumsum(0) - 1
    most = torch.zeros_like(prob).flatten().scatter_reduce_(0, run, prob.flatten()[order], "amax")
    prob = torch.empty_like(most).scatter_(0, order, most[run])
    is_first = torch.empty_like(is_first).scatter_(0, order, is_first)
    return prob.view_as(iou), is_first.view_as(iou)


def precision_bag_loss(logits: Tensor, prob: Tensor) -> Tensor:
    """-log of the precision likelihood of each bag: its strongest candidate that is not matched.

    With q_j = sigmoid(x_j) * (1 - P_j) and the odds o_j = q_j / (1 - q_j), it is the softplus of
    log(sum(o^2) / sum(o)), the contraharmonic mean of the odds. In log odds, as in
    :func:`freeanchor.layers.losses.positive_bag_loss`, nothing overflows.

    Args:
        logits: (M, K) logits x of each object's class at the members of its bag.
        prob: (M, K) P{a_j in A+}, without a gradient.

    Returns:
        (M,) losses, finite and not negative. 0, with no gradient, where all q are 0.
    """
    is_matched = (prob == 1).all(dim=1, keepdim=True)
    prob = torch.where(is_matched, 0, prob)  # any that keeps what is not used finite
    log_odds = logits + torch.log1p(-prob) - F.softplus(logits + prob.log())
    log_mean = (2 * log_odds).logsumexp(dim=1) - log_odds.logsumexp(dim=1)
    return torch.where(is_matched[:, 0], 0, F.softplus(log_mean))


def background_loss_of_bags(logits: Tensor, is_first: Tensor, gamma: float) -> Tensor:
    """The focal loss of the distinct pairs in bags, which are no background.

    Taken from that of all pairs, it leaves the loss of those in no bag. Terms are not negative and
    those of E are among all, so the error of the difference is some roundings of the larger sum.
    Divided by the size of E, that is the loss plus the mean loss of a pair in a bag, which is of
    the order of 1: the error is too small to see, however little is left.

    Args:
        logits: (M, K) logits of each object's class at the members of its bag.
        is_first: as :func:`matched_in_bag` gives it.
        gamma: focusing parameter, at least 1.

    Returns:
        The sum of sigmoid(x)^gamma * softplus(x), a scalar.
    """
    loss = logits.sigmoid().pow(gamma) * F.softplus(logits, threshold=40)
    return (loss * is_first).sum()
