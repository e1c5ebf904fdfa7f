"""Checkpoints from anywhere: read without running them, converted, and loaded if they fit."""

from . import catalog, packages  # noqa: F401  # MODEL.WEIGHTS understands their addresses
from .checkpointer import Checkpointer
from .classes import read_class_names
from .convert import convert, convert_file, to_detectron2
from .converter import Converted
from .delegate import hand_over
from .described import described_config
from .files import (
    config_beside,
    find,
    read_checkpoint,
    replacing,
    write_checkpoint,
)
from .thresholds import (
    Thresholds,
    checksum,
    copy_thresholds,
    describe_scores,
    read_thresholds,
    write_thresholds,
)

__all__ = [
    "Checkpointer",
    "Converted",
    "Thresholds",
    "checksum",
    "config_beside",
    "convert",
    "convert_file",
    "copy_thresholds",
    "describe_scores",
    "described_config",
    "find",
    "hand_over",
    "read_checkpoint",
    "read_class_names",
    "read_thresholds",
    "replacing",
    "to_detectron2",
    "write_checkpoint",
    "write_thresholds",
]

hand_over()
