"""What the paper measures: COCO AP, also of slender and crowded objects, and NMS recall."""

from .boxes import ASPECT_RATIOS, COCO_API, CROWDING, BoxEvaluator, aspect_ratios, crowding
from .nms_recall import NMSRecallEvaluator
from .truth import read_truth

__all__ = [
    "ASPECT_RATIOS",
    "COCO_API",
    "CROWDING",
    "BoxEvaluator",
    "NMSRecallEvaluator",
    "aspect_ratios",
    "crowding",
    "read_truth",
]
