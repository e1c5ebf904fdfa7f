"""The paper's formulas, transcribed with plain loops over Python floats.

Independent of the package and of PyTorch: nothing here is clever, fast or shared with it.
"""

import math
from dataclasses import dataclass

K, BETA = 50, 0.11


@dataclass
class Hyper:
    """The method's constants, with the values of the paper and its code."""

    k: int = K
    threshold: float = 0.6
    weight: float = 0.75
    beta: float = BETA
    alpha: float = 0.5
    gamma: float = 2.0
    box_weights: tuple = (10.0, 10.0, 5.0, 5.0)
    scale_clamp: float = math.log(1000 / 16)
    box_loss: str = "smooth_l1"


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def iou_loss(a, b, kind):
    if kind == "iou":
        return 1 - iou(a, b)
    width, height = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    union = sum(areas) / (1 + iou(a, b))
    return 1 - iou(a, b) + (width * height - union) / (width * height)


def bag(anchors, box, k=K):
    """Anchor indices: higher IoU, then nearer centre, then lower index."""

    def key(j):
        a = anchors[j]
        distance = (a[0] + a[2] - box[0] - box[2]) ** 2 + (a[1] + a[3] - box[1] - box[3]) ** 2
        return -iou(a, box), distance, j

    return sorted(range(len(anchors)), key=key)[:k]


def centre_and_size(box):
    width, height = box[2] - box[0], box[3] - box[1]
    return box[0] + width / 2, box[1] + height / 2, width, height


def encode(box, anchor, box_weights):
    bx, by, bw, bh = centre_and_size(box)
    ax, ay, aw, ah = centre_and_size(anchor)
    deltas = ((bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah))
    return [w * d for w, d in zip(box_weights, deltas)]


def decode(delta, anchor, hyper):
    dx, dy, dw, dh = (d / w for w, d in zip(hyper.box_weights, delta))
    dw, dh = min(dw, hyper.scale_clamp), min(dh, hyper.scale_clamp)
    ax, ay, aw, ah = centre_and_size(anchor)
    x, y = ax + dx * aw, ay + dy * ah
    width, height = math.exp(dw) * aw, math.exp(dh) * ah
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def smooth_l1(d, beta=BETA):
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean_max(probs):
    weights = [1 / (1 - p) for p in probs]
    return sum(w * p for w, p in zip(weights, probs)) / sum(weights)


def losses(anchors, logits, deltas, boxes, classes, hyper=None):
    """Positive and negative loss.

    anchors [R][4]; logits [N][R][C]; deltas [N][R][4]; boxes [N][M][4]; classes [N][M].
    """
    hyper = hyper or Hyper()
    num_objects = sum(len(b) for b in boxes)
    positive = negative = 0.0
    for n in range(len(logits)):
        for box, cls in zip(boxes[n], classes[n]):
            matched = []
            for j in bag(anchors, box, hyper.k):
                if hyper.box_loss == "smooth_l1":
                    target = encode(box, anchors[j], hyper.box_weights)
                    pairs = zip(deltas[n][j], target)
                    distance = sum(smooth_l1(d - t, hyper.beta) for d, t in pairs)
                else:
                    predicted = decode(deltas[n][j], anchors[j], hyper)
                    distance = iou_loss(predicted, box, hyper.box_loss)
                matched.append(sigmoid(logits[n][j][cls]) * math.exp(-hyper.weight * distance))
            positive -= math.log(mean_max(matched))
        predicted = [decode(d, a, hyper) for d, a in zip(deltas[n], anchors)]
        in_positives = [[0.0] * len(row) for row in logits[n]]
        for box, cls in zip(boxes[n], classes[n]):
            overlaps = [iou(p, box) for p in predicted]
            best = max(overlaps)
            for j, overlap in enumerate(overlaps):
                if overlap > hyper.threshold:
                    p = min(1.0, (overlap - hyper.threshold) / (best - hyper.threshold))
                    in_positives[j][cls] = max(in_positives[j][cls], p)
        for row, p_row in zip(logits[n], in_positives):
            for x, p in zip(row, p_row):
                q = sigmoid(x) * (1 - p)
                negative += q**hyper.gamma * -math.log(1 - q)
    num_objects = max(1, num_objects)
    return (
        hyper.alpha * positive / num_objects,
        (1 - hyper.alpha) * negative / (hyper.k * num_objects),
    )
