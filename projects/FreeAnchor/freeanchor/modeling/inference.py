"""Detections before non-maximum suppression, which evaluation and test-time augmentation need."""

from collections.abc import Iterator, Sequence

import torch
from detectron2.modeling import RetinaNet
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["candidates", "dense_detector"]


def dense_detector(model: nn.Module) -> RetinaNet:
    """The RetinaNet or FreeAnchor that a model is, possibly in DistributedDataParallel.

    Raises:
        TypeError: it is another one.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(model, RetinaNet):
        raise TypeError(f"{type(model).__name__} is not a RetinaNet or FreeAnchor")
    return model


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
    logits, deltas = model._transpose_dense_predictions(predictions, [model.num_classes, 4])
    anchors = model.anchor_generator(features)
    for i, image_size in enumerate(image_sizes):
        with torch.no_grad():
            levels = [
                model._decode_per_level_predictions(
                    level_anchors,
                    level_logits[i].sigmoid(),
                    level_deltas[i],
                    score_thresh,
                    level_logits[i].numel() if topk is None else topk,
                    image_size,
                )
                for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas)
            ]
        yield Instances.cat(levels)
