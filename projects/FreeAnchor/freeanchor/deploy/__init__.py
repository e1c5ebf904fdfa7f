"""From a checkpoint to something used: detections in images."""

from .predictor import Predictor

__all__ = ["Predictor"]
