"""A user's images and annotations: registered, read and checked before any work is done."""

from .anchors import best_anchor_iou, propose_anchors, training_boxes
from .catalog import register_datasets
from .checking import check_dataset
from .classes import NUM_CLASSES_FROM_DATA, resolve_classes
from .coco import read_coco
from .coco_file import CocoFile
from .datasets import (
    check_alike,
    check_images,
    check_overlap,
    fingerprint,
    load_training_set,
    report_findings,
)
from .images import IMAGE_SUFFIXES, ImageReader, num_channels, read_image
from .mapper import Mapper
from .masks import decode_mask, encode_mask
from .readings import READINGS, import_boxes
from .shapes import write_shapes
from .voc import import_voc
from .yolo import import_yolo

__all__ = [
    "IMAGE_SUFFIXES",
    "NUM_CLASSES_FROM_DATA",
    "READINGS",
    "CocoFile",
    "ImageReader",
    "Mapper",
    "best_anchor_iou",
    "check_alike",
    "check_dataset",
    "check_images",
    "check_overlap",
    "decode_mask",
    "encode_mask",
    "fingerprint",
    "import_boxes",
    "import_voc",
    "import_yolo",
    "load_training_set",
    "num_channels",
    "propose_anchors",
    "read_coco",
    "read_image",
    "register_datasets",
    "report_findings",
    "resolve_classes",
    "training_boxes",
    "write_shapes",
]
