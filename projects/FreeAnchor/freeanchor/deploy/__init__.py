"""From a checkpoint to something used: detections in images."""

from .checkpoints import class_names, find_checkpoint
from .outputs import draw_boxes
from .predict import predict
from .predictor import Predictor

__all__ = ["Predictor", "class_names", "draw_boxes", "find_checkpoint", "predict"]
