"""The checks of records in Detectron2's standard format that Python registered."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from ..errors import DatasetError
from .fields import read_boxes, read_flags, read_ids
from .findings import BOX_PROBLEMS, Findings, box_problems, check_plausible, show
from .masks import MaskColumn

__all__ = ["check_records"]

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def check_records(
    records: Iterable[dict[str, Any]], name: str, num_classes: int, masks: bool = False
) -> tuple[list[dict[str, Any]], Findings]:
    """Check records that Python registered.

    Args:
        records: they, not changed.
        name: of the data set, for messages.
        num_classes: how many there are.
        masks: whether the objects need a mask.

    Returns:
        New records without the boxes that cannot be used, and what was found. An annotation has
        a whole number as `category_id`, `iscrowd` and `area`, a record `image_id`.

    Raises:
        DatasetError: a record is not in the format, or most boxes cannot be used.
    """
    records = [dict(x) for x in records]
    if not records:
        raise DatasetError(f"{name} has no images")
    for i, record in enumerate(records):
        if not isinstance(record.get("file_name"), str):
            raise DatasetError(
                f"{name}: record {i + 1} has the file_name {show(record.get('file_name'))}"
            )
        record.setdefault("image_id", i)
    read_ids([x["image_id"] for x in records], lambda i: f"{name}: {records[i]['file_name']}")
    annotations = [a for x in records for a in x.get("annotations") or ()]
    owners = [x for x in records for _ in x.get("annotations") or ()]
    boxes, broken = _boxes(annotations, owners, name)
    sizes = np.array(
        [(x.get("width") or math.inf, x.get("height") or math.inf) for x in owners],
        dtype=np.float64,
    ).reshape(-1, 2)
    problems = box_problems(boxes, sizes)
    problems[broken] = 1
    check_plausible(boxes, sizes, problems, name)
    findings = Findings()
    for kind in range(1, len(BOX_PROBLEMS)):
        those = np.flatnonzero(problems == kind)
        findings.add(
            f"boxes are left out, where a `bbox` {BOX_PROBLEMS[kind]}",
            len(those),
            lambda those=those: (  # type: ignore[misc]
                f"{owners[those[0]]['file_name']}: {show(annotations[those[0]].get('bbox'))}"
            ),
        )
    _check_classes(annotations, owners, name, num_classes)
    crowd, _ = read_flags([a.get("iscrowd") or a.get("ignore") or 0 for a in annotations])
    if masks:
        annotations, has_mask = _with_masks(
            annotations, owners, boxes, crowd, problems == 0, name, findings
        )
        problems[~has_mask] = 1
    checked = iter(zip(annotations, problems, boxes, crowd))
    for record in records:
        if record.get("annotations") is None:
            record.pop("annotations", None)
            continue
        kept = []
        for _ in record["annotations"]:
            annotation, problem, box, is_crowd = next(checked)
            if not problem:
                area = float(annotation.get("area") or 0)
                # Else COCO's evaluation would leave the object out, without a word.
                area = area if 0 < area < math.inf else float(box[2] * box[3])
                own = {"category_id": int(annotation["category_id"]), "iscrowd": int(is_crowd)}
                kept.append({**annotation, **own, "area": area})
        record["annotations"] = kept
    return records, findings


def _boxes(
    annotations: Sequence[dict[str, Any]], owners: Sequence[dict[str, Any]], name: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(M, 4) x, y, width, height, and (M,) which are not four numbers."""
    values = []
    for annotation, owner in zip(annotations, owners):
        box: Any = annotation.get("bbox")
        if hasattr(box, "tolist"):  # an array or a tensor
            box = box.tolist()
        mode = annotation.get("bbox_mode")
        if mode not in _MODES:
            raise DatasetError(
                f"{name}: an annotation of {owner['file_name']} has the bbox_mode {show(mode)}: it "
                "must be BoxMode.XYXY_ABS or BoxMode.XYWH_ABS"
            )
        values.append(list(box) if isinstance(box, tuple) else box)
    boxes, broken = read_boxes(values)
    is_corners = np.array([a["bbox_mode"] == BoxMode.XYXY_ABS for a in annotations], dtype=bool)
    boxes[is_corners, 2:] -= boxes[is_corners, :2]
    # Unlike a file, Python can give numbers that are no JSON: Detectron2 would not convert text.
    text = [isinstance(x, list) and any(isinstance(v, str) for v in x) for x in values]
    return boxes, broken | np.array(text, dtype=bool)


def _with_masks(
    annotations: Sequence[dict[str, Any]],
    owners: Sequence[dict[str, Any]],
    boxes: NDArray[Any],
    crowd: NDArray[Any],
    is_usable: NDArray[Any],
    name: str,
    findings: Findings,
) -> tuple[list[dict[str, Any]], NDArray[Any]]:
    """The annotations with their masks as they were read, and (M,) which have one."""
    sizeless = next((x for x in owners if not (x.get("width") and x.get("height"))), None)
    if sizeless is not None:
        raise DatasetError(
            f"{name}: {sizeless['file_name']} needs `width` and `height` in its record, as it has "
            "masks"
        )
    column = MaskColumn()
    sizes = np.array([(x["width"], x["height"]) for x in owners]).reshape(-1, 2)
    column.add([a.get("segmentation") for a in annotations], sizes)
    try:
        has_mask = column.usable(
            boxes, crowd, is_usable, lambda i: str(owners[i]["file_name"]), findings
        )
    except DatasetError as e:
        raise DatasetError(f"{name}: {e}") from e
    read = [{**a, "segmentation": mask} for a, mask in zip(annotations, column.masks)]
    return read, has_mask


def _check_classes(
    annotations: Sequence[dict[str, Any]],
    owners: Sequence[dict[str, Any]],
    name: str,
    num_classes: int,
) -> None:
    for annotation, owner in zip(annotations, owners):
        category = annotation.get("category_id")
        try:
            is_known = 0 <= category < num_classes and int(category) == category  # type: ignore[operator, arg-type]
        except (TypeError, ValueError):
            is_known = False
        if not is_known:
            raise DatasetError(
                f"{name}: an annotation of {owner['file_name']} has the category_id "
                f"{show(category)}: it must be from 0 to {num_classes - 1}, as `thing_classes` "
                f"has {num_classes} names"
            )
