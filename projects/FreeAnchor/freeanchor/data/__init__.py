"""A user's images and annotations: registered, read and checked before any work is done."""

from .anchors import best_anchor_iou, propose_anchors, training_boxes
from .datasets import (
    NUM_CLASSES_FROM_DATA,
    load_training_set,
    register_datasets,
    resolve_num_classes,
)
from .images import Mapper, check_images
from .shapes import write_shapes

__all__ = [
    "NUM_CLASSES_FROM_DATA",
    "Mapper",
    "best_anchor_iou",
    "check_images",
    "load_training_set",
    "propose_anchors",
    "register_datasets",
    "resolve_num_classes",
    "training_boxes",
    "write_shapes",
]
