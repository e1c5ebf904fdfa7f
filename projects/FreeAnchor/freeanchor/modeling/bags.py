"""What passes between the parts of a model with bags; letters as in `layers.matching`."""

from typing import NamedTuple

from torch import Tensor

from ..layers.matching import Objects

__all__ = ["BagLosses", "Bags", "Matching", "Predictions"]


class Matching(NamedTuple):
    """How the M objects of an image are matched, for pictures.

    Attributes:
        boxes: (M, 4) objects.
        anchors: (M, K, 4) bags.
        prob: (M, K) matched probabilities P_ij^cls * P_ij^loc.
        assigned: per object, (n, 4) anchors that Detectron2's RetinaNet would train for it.
        assigned_iou: per object, (n,) their IoU with it.
    """

    boxes: Tensor
    anchors: Tensor
    prob: Tensor
    assigned: list[Tensor]
    assigned_iou: list[Tensor]


class Bags(NamedTuple):
    """The bags of the M objects of a batch; indices as in :mod:`freeanchor.layers.matching`."""

    levels: list[Tensor]  # anchors, as the search takes them
    objects: Objects
    row: Tensor  # (M, K) of (N, R)
    anchors: Tensor  # (M, K, 4)


class Predictions(NamedTuple):
    """What the head gave for a batch: per level (N, ..., D), all of one dtype."""

    logits: list[Tensor]
    background: list[Tensor]  # the logits, without what ignore regions leave out
    deltas: list[Tensor]


class BagLosses(NamedTuple):
    """What the losses of a method are, and what of them is logged."""

    losses: dict[str, Tensor]
    log_prob: Tensor  # (M, K) of the matched probabilities
    positive: Tensor  # (M,) -log Mean-max
    max_iou: Tensor  # (M,) highest IoU of a predicted box
