"""LTM's formulas, transcribed with loops over scalars: of tensors, for the gradient alone.

Nothing of the package is here, and probabilities are probabilities, not log odds.
"""

import torch
from paper import bag, encode, iou, mean_max


def points_bag(levels, box, k):
    """Indices of points by distance; levels are [(stride, [(x, y), ...]), ...], finer first."""
    ranked = []
    for level, (stride, points) in enumerate(levels):
        for x, y in points:
            dx = abs(2 * x - box[0] - box[2]) / (box[2] - box[0] + 1)
            dy = abs(2 * y - box[1] - box[3]) / (box[3] - box[1] + 1)
            is_out = level > 0 and max(dx, dy) > 0.8
            key = (is_out, max(dx, dy) / stride if not is_out else 0, level, min(dx, dy))
            ranked.append((*key, len(ranked)))
    return [key[-1] for key in sorted(ranked)[:k]]


def smooth_l1(d, beta):
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


def giou_loss(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - width * height / union + (hull - union) / hull


def decode(delta, anchor, box_weights):
    x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    if box_weights is None:  # distances
        left, top, right, bottom = (d.clamp(min=0) * width for d in delta)
        return x - left, y - top, x + right, y + bottom
    dx, dy, dw, dh = (d / w for d, w in zip(delta, box_weights))
    x, y = x + dx * width, y + dy * height
    width, height = width * dw.exp(), height * dh.exp()
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def losses(anchors, logits, deltas, boxes, classes, *, k=40, weight=0.5, box_weights, points=None):
    """Recall, precision and focal term.

    anchors [R][4]; logits (N, R, C) and deltas (N, R, 4) tensors; boxes [N][M][4]; classes [N][M];
    points as for `points_bag`. Smooth L1 with box weights, GIoU without.
    """
    bags, matched, recall = [], {}, []
    for n in range(len(boxes)):
        for box, c in zip(boxes[n], classes[n]):
            members = points_bag(points, box, k) if points else bag(anchors, box, k)
            bags.append((n, c, members))
            candidates, overlaps = [], []
            for j in members:
                predicted = decode(deltas[n, j], anchors[j], box_weights)
                overlaps.append(iou([x.item() for x in predicted], box))
                if box_weights is None:
                    distance = giou_loss(predicted, box)
                else:
                    target = encode(box, anchors[j], box_weights)
                    distance = sum(smooth_l1(d - t, 1 / 9) for d, t in zip(deltas[n, j], target))
                candidates.append(torch.sigmoid(logits[n, j, c]) * torch.exp(-weight * distance))
            recall.append(-torch.log(mean_max(candidates)))
            for j, overlap in zip(members, overlaps):
                p = overlap / max(overlaps) if max(overlaps) > 0 else 0.0
                matched[n, j, c] = max(p, matched.get((n, j, c), 0.0))
    precision = []
    for n, c, members in bags:
        q = [torch.sigmoid(logits[n, j, c]) * (1 - matched[n, j, c]) for j in members]
        odds = [x / (1 - x) for x in q if x > 0]
        mean = sum(o * o for o in odds) / sum(odds) if odds else torch.zeros(())
        precision.append(torch.log(1 + mean))
    focal = 0
    for n in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            for c in range(logits.shape[2]):
                if (n, j, c) not in matched:
                    p = torch.sigmoid(logits[n, j, c])
                    focal = focal - p * p * torch.log(1 - p)
    count = max(1, len(bags))
    return sum(recall) / count, sum(precision) / count, focal / max(len(matched), k)
