"""A user's own COCO-format data: registering it, and checking it before any work is done."""

import json
import logging
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import DatasetError, shorten

__all__ = [
    "NUM_CLASSES_FROM_DATA",
    "files_of",
    "load",
    "load_training_set",
    "register_datasets",
    "resolve_num_classes",
]

logger = logging.getLogger(__name__)

# The value of MODEL.RETINANET.NUM_CLASSES that stands for "as many as the data set has".
NUM_CLASSES_FROM_DATA = 0


def register_datasets(datasets: Sequence[Sequence[str]]) -> None:
    """Register data sets in COCO format with Detectron2. Doing so twice is fine.

    Args:
        datasets: (name, annotation file, image directory) triples.

    Raises:
        DatasetError: a name is taken, the file or directory is missing, or the file is not a COCO
            annotation file.
    """
    for name, json_file, image_root in datasets:
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) == (json_file, image_root):
                continue
            raise DatasetError(f"--dataset {name}: this name is taken, choose another one")
        if not PathManager.isfile(json_file):
            raise DatasetError(f"--dataset {name}: there is no annotation file {json_file}")
        if not PathManager.isdir(image_root):
            raise DatasetError(f"--dataset {name}: there is no image directory {image_root}")
        classes = _read_classes(json_file)
        register_coco_instances(name, {}, json_file, image_root)
        # Detectron2 sets them when it loads the data; they are needed before.
        MetadataCatalog.get(name).thing_classes = classes


def _read_classes(json_file: str) -> list[str]:
    """Names of the classes in a COCO annotation file, in the order of their ids."""
    try:
        with PathManager.open(json_file) as f:
            content = json.load(f)
    except ValueError as e:  # both broken JSON and broken UTF-8
        raise DatasetError(f"{json_file} is not a JSON file: {e}") from e
    if not isinstance(content, dict):
        raise DatasetError(f"{json_file} is not a COCO annotation file: it holds no object")
    for key in ("images", "categories"):
        if not content.get(key):
            raise DatasetError(f"{json_file} is not a COCO annotation file: it has no `{key}`")
    try:
        return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    except (KeyError, TypeError) as e:
        raise DatasetError(
            f"{json_file}: every entry of `categories` needs an `id` and a `name`"
        ) from e


def load(names: Sequence[str]) -> list[dict[str, Any]]:
    """Registered data sets in Detectron2's standard format; errors name their files."""
    try:
        dicts: list[dict[str, Any]] = get_detection_dataset_dicts(list(names), filter_empty=False)
    except (AssertionError, KeyError, TypeError, ValueError, OSError) as e:
        raise DatasetError(f"{files_of(names)} cannot be loaded: {e!r}") from e
    return dicts


def files_of(names: Sequence[str]) -> str:
    """The annotation files of registered data sets, for messages."""
    return ", ".join(str(MetadataCatalog.get(name).get("json_file", name)) for name in names)


def _classes(name: str) -> list[str]:
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"data set {name} is not known: register it with --dataset {name} ANNOTATIONS.json "
            f"IMAGE_DIR, or use one of {shorten(DatasetCatalog.list())}"
        )
    if MetadataCatalog.get(name).get("thing_classes") is None:
        load([name])  # Detectron2 learns the classes of some data sets only then
    return list(MetadataCatalog.get(name).get("thing_classes", []))


def resolve_num_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Make model and data sets agree on the classes.

    Args:
        cfg: its `MODEL.RETINANET.NUM_CLASSES` is set from the first data set if it is
            `NUM_CLASSES_FROM_DATA`.
        names: the data sets to be used, training first.

    Raises:
        DatasetError: there is no data set, one is not registered, or two of them, or one and the
            config, do not have the same classes.
    """
    if not names:
        raise DatasetError("there is no data set: name one in DATASETS.TRAIN or DATASETS.TEST")
    first = _classes(names[0])
    for name in names[1:]:
        other = _classes(name)
        if len(other) != len(first):
            raise DatasetError(
                f"{names[0]} has {len(first)} classes and {name} has {len(other)}: the "
                "`categories` of their annotation files must be the same"
            )
        for i, (ours, theirs) in enumerate(zip(first, other)):
            if ours != theirs:
                raise DatasetError(
                    f"class {i} of {len(first)} is {ours!r} in {names[0]} and {theirs!r} in "
                    f"{name}: the `categories` of their annotation files must be the same"
                )
    if cfg.MODEL.RETINANET.NUM_CLASSES == NUM_CLASSES_FROM_DATA:
        cfg.MODEL.RETINANET.NUM_CLASSES = len(first)
    elif len(first) != cfg.MODEL.RETINANET.NUM_CLASSES:
        raise DatasetError(
            f"MODEL.RETINANET.NUM_CLASSES is {cfg.MODEL.RETINANET.NUM_CLASSES}, but {names[0]} "
            f"has {len(first)} classes: leave the key out to take the number from the data"
        )


def load_training_set(names: Sequence[str], filter_empty: bool) -> list[dict[str, Any]]:
    """Load data sets for training, without the boxes that no detector can learn from.

    Boxes without width or height, outside their image, or not finite are dropped, counted and
    logged with an example.

    Args:
        names: registered data sets.
        filter_empty: leave out images without a usable box.

    Returns:
        Dicts in Detectron2's standard format.

    Raises:
        DatasetError: an annotation file cannot be used, or no usable box is left.
    """
    dicts = load(names)
    dropped: list[str] = []
    num_boxes = 0
    for record in dicts:
        usable = []
        for annotation in record["annotations"]:
            problem = _box_problem(annotation, record)
            if problem is None:
                usable.append(annotation)
            else:
                dropped.append(f"{record['file_name']}: box {annotation.get('bbox')} {problem}")
        record["annotations"] = usable
        num_boxes += sum(not a.get("iscrowd", 0) for a in usable)
    if dropped:
        logger.warning(f"Dropped {len(dropped)} boxes. {shorten(dropped, '; ')}")
    if num_boxes == 0:
        raise DatasetError(
            f"{files_of(names)}: no usable box in {len(dicts)} images ({len(dropped)} boxes "
            "dropped, crowd boxes not counted), so there is nothing to train on"
        )
    return filter_images_with_only_crowd_annotations(dicts) if filter_empty else dicts


def _box_problem(annotation: dict[str, Any], record: dict[str, Any]) -> str | None:
    box = annotation.get("bbox", ())
    if len(box) != 4 or not all(isinstance(v, Real) for v in box):
        return "is not four numbers"
    x1, y1, x2, y2 = BoxMode.convert(
        [float(v) for v in box], annotation["bbox_mode"], BoxMode.XYXY_ABS
    )
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return "is not finite"
    if x2 <= x1 or y2 <= y1:
        return "has no area"
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return f"is outside the image of {width} x {height} pixels"
    return None
