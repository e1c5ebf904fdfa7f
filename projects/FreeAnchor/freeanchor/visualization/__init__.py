"""Pictures of data, matching and runs, and the report of a run."""

from .drawing import draw_curves, draw_detections, draw_matching, to_image
from .pictures import match_images, write_pictures
from .report import image_f1, write_report
from .runs import read_detections, read_metrics, read_run

__all__ = [
    "draw_curves",
    "draw_detections",
    "draw_matching",
    "image_f1",
    "match_images",
    "read_detections",
    "read_metrics",
    "read_run",
    "to_image",
    "write_pictures",
    "write_report",
]
