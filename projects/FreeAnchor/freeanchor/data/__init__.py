"""A user's images and annotations: registered, read and checked before any work is done."""

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
    "check_images",
    "load_training_set",
    "register_datasets",
    "resolve_num_classes",
    "write_shapes",
]
