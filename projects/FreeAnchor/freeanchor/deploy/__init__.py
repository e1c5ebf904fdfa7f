"""From a checkpoint to something used: detections in images, and files for other runtimes."""

from .checkpoints import class_names, find_checkpoint
from .export import FORMATS, export, metadata
from .graph import Detector
from .outputs import draw_boxes
from .predict import predict
from .predictor import Predictor
from .push import push

__all__ = [
    "FORMATS",
    "Detector",
    "Predictor",
    "class_names",
    "draw_boxes",
    "export",
    "find_checkpoint",
    "metadata",
    "predict",
    "push",
]
