"""Which detections of a model are handed out: of which classes, and above which scores."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import nn

__all__ = ["Selection", "detect_only"]


class Selection:
    """Detections above the thresholds of their classes, and no more than an image may have.

    Attributes:
        thresholds: of the classes, (C,); detections have higher scores.
        confidence: the lowest of them.
    """

    def __init__(self, model: nn.Module, thresholds: Sequence[float]) -> None:
        """Set the thresholds of a model, which is changed.

        Args:
            model: a RetinaNet, FreeAnchor or GeneralizedRCNN.
            thresholds: of its classes.
        """
        self.thresholds, self.confidence = torch.tensor(thresholds), min(thresholds)
        self._parts, self._limit = _scored_parts(model), "max_detections_per_image"
        if isinstance(model, GeneralizedRCNN):
            self._limit = "test_topk_per_image"
            heads: Any = model.roi_heads
            of_boxes = heads.forward_with_given_boxes  # masks, of those alone that are handed out
            heads.forward_with_given_boxes = lambda features, found: of_boxes(
                features, [self.best(x) for x in found]
            )
        for part in self._parts:
            part.test_score_thresh = self.confidence
            most = getattr(part, self._limit)
            self._most = most if most >= 0 else sys.maxsize  # as ROI heads have it

    def best(self, found: Instances) -> Instances:
        """Choose among detections, the highest scores of which come first."""
        of_class = self.thresholds.to(found.scores.device)[found.pred_classes]
        return found[found.scores > of_class][: self._most]

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let the model have as many detections as it finds, where thresholds differ.

        Those below the threshold of their class would take the places of others.
        """
        if bool((self.thresholds == self.confidence).all()):
            yield
            return
        for part in self._parts:
            setattr(part, self._limit, sys.maxsize)
        try:
            yield
        finally:
            for part in self._parts:
                setattr(part, self._limit, self._most)


def _scored_parts(model: Any) -> list[Any]:
    """What gives scores: the model, or the predictors of its ROI heads."""
    if not isinstance(model, GeneralizedRCNN):
        return [model]
    predictors = model.roi_heads.box_predictor
    return [*predictors] if isinstance(predictors, nn.ModuleList) else [predictors]


@torch.no_grad()
def detect_only(model: Any, classes: list[int], num_classes: int) -> None:
    """Give all other classes score 0, so that they take no place among the detections."""
    if isinstance(model, GeneralizedRCNN):
        for predictor in _scored_parts(model):
            # After the softmax: the scores of the chosen ones stay as they are.
            predictor.predict_probs = partial(_probs_of, predictor.predict_probs, classes)
        return
    bias = model.head.cls_score.bias.view(-1, num_classes)
    others = [i for i in range(num_classes) if i not in classes]
    bias[:, others] = -torch.inf


def _probs_of(predict: Callable[..., Any], classes: list[int], *args: Any) -> tuple[Any, ...]:
    """What `predict_probs` of Detectron2's ROI heads gives, 0 for other classes than these."""
    chosen = []
    for probs in predict(*args):
        index = torch.tensor(classes, device=probs.device)
        chosen.append(torch.zeros_like(probs).index_copy(1, index, probs[:, index]))
    return tuple(chosen)
