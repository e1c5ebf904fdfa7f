"""Pictures of data, matching and runs, and the report of a run."""

from .drawing import draw_curves, draw_detections, draw_matching, to_image
from .outcomes import (
    Outcomes,
    confusion,
    found_rows,
    image_f1,
    outcomes,
    precision_recall,
    truth_rows,
)
from .page import VIEWER, data_element, make_page, read_asset
from .pictures import match_images, write_pictures
from .report import write_report
from .runs import read_detections, read_metrics, read_run

__all__ = [
    "VIEWER",
    "Outcomes",
    "confusion",
    "data_element",
    "draw_curves",
    "draw_detections",
    "draw_matching",
    "found_rows",
    "image_f1",
    "make_page",
    "match_images",
    "outcomes",
    "precision_recall",
    "read_asset",
    "read_detections",
    "read_metrics",
    "read_run",
    "to_image",
    "truth_rows",
    "write_pictures",
    "write_report",
]
