"""How a model with bags, or its first stage, matches the objects of images, for pictures."""

from typing import Any

import torch
from torch import nn

from .anchors import generate_anchors
from .bag_detector import BagDetector
from .bags import Matching
from .inclusive_corners import shift_objects
from .proposals import of_one_class

__all__ = ["match_inputs"]


@torch.no_grad()
def match_inputs(model: nn.Module, batched_inputs: list[dict[str, Any]]) -> list[Matching]:
    """Match the objects of images, see :meth:`BagDetector.match`.

    Args:
        model: of a config that :func:`freeanchor.modeling.has_bags`. A first stage matches whatever
            the class.
        batched_inputs: images with objects, as training gets them.

    Returns:
        The matching of each image, in the size of the network's input.
    """
    whole: Any = model
    if getattr(model, "inclusive_corners", False):
        batched_inputs = shift_objects(model, batched_inputs)
    features = whole.backbone(whole.preprocess_image(batched_inputs).tensor)
    objects = [x["instances"].to(whole.device) for x in batched_inputs]
    detector: BagDetector = whole
    if not isinstance(model, BagDetector):
        detector = whole.proposal_generator.detector
        objects = [of_one_class(x) for x in objects]
    features = [features[name] for name in detector.head_in_features]
    logits, deltas = detector.by_anchor(detector.head(features))
    anchors = generate_anchors(detector.anchor_generator, features)
    return detector.match(anchors, logits, deltas, objects)
