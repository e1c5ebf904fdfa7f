"""Pictures of data, matching and runs, and the report of a run."""

from .drawing import draw_curves, draw_detections, draw_matching, overlay_masks, to_image
from .labels import find_font
from .page import VIEWER, data_element, make_page, read_asset
from .pictures import match_images, write_pictures
from .report import write_report
from .runs import NOT_LEARNING, Run, read_detections, read_metrics, read_run

__all__ = [
    "NOT_LEARNING",
    "VIEWER",
    "Run",
    "data_element",
    "draw_curves",
    "draw_detections",
    "draw_matching",
    "find_font",
    "make_page",
    "match_images",
    "overlay_masks",
    "read_asset",
    "read_detections",
    "read_metrics",
    "read_run",
    "to_image",
    "write_pictures",
    "write_report",
]
