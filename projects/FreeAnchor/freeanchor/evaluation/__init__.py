"""COCO AP, also of slender and crowded objects, what NMS and proposals find, what scores mean."""

from .boxes import COCO_API, BoxEvaluator, box_metrics
from .calibration import calibration, score_thresholds
from .nms_recall import NMSRecallEvaluator
from .outcomes import (
    FALSE_POSITIVES,
    Outcomes,
    class_index,
    confusion,
    count_errors,
    found_rows,
    outcomes,
    precision_recall,
    truth_rows,
)
from .parts import ASPECT_RATIOS, CROWDING, aspect_ratios, crowding
from .proposal_recall import ProposalRecallEvaluator
from .truth import read_truth

__all__ = [
    "ASPECT_RATIOS",
    "COCO_API",
    "CROWDING",
    "FALSE_POSITIVES",
    "BoxEvaluator",
    "NMSRecallEvaluator",
    "Outcomes",
    "ProposalRecallEvaluator",
    "aspect_ratios",
    "box_metrics",
    "calibration",
    "class_index",
    "confusion",
    "count_errors",
    "crowding",
    "found_rows",
    "outcomes",
    "precision_recall",
    "read_truth",
    "score_thresholds",
    "truth_rows",
]
