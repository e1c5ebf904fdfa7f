"""Checkpoints from anywhere: read without running them, converted, and loaded if they fit."""

from . import catalog, packages  # noqa: F401  # MODEL.WEIGHTS understands their addresses
from .checkpointer import Checkpointer, class_config
from .convert import convert, convert_file, to_detectron2
from .converter import Converted
from .delegate import hand_over
from .files import find, read_checkpoint, read_class_names, replacing, write_checkpoint

__all__ = [
    "Checkpointer",
    "Converted",
    "class_config",
    "convert",
    "convert_file",
    "find",
    "hand_over",
    "read_checkpoint",
    "read_class_names",
    "replacing",
    "to_detectron2",
    "write_checkpoint",
]

hand_over()
