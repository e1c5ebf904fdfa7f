"""COCO files whose boxes mean something else: `freeanchor import --boxes`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..checkpoint import replacing
from ..errors import DatasetError, shorten
from .coco import read_coco
from .containers import read_json
from .fields import read_boxes, read_numbers, refer
from .findings import show

__all__ = ["READINGS", "import_boxes"]

# What the four numbers of a box may be, besides x, y, width, height in pixels.
READINGS = ("xyxy", "cxcywh", "normalised")


def import_boxes(source: Path, out: Path, readings: Sequence[str]) -> None:
    """Write a COCO file whose boxes are something else as one with x, y, width, height in pixels.

    Args:
        source: the file, which is not changed.
        out: the new one.
        readings: of `READINGS`: `xyxy` (two corners) or `cxcywh` (centre, width, height); and
            `normalised` (fractions of the image).

    Raises:
        DatasetError: the file cannot be read, or the boxes are not what they are said to be; `out`
            is as it was.
    """
    if {"xyxy", "cxcywh"} <= set(readings):
        raise DatasetError("--boxes: they are either xyxy or cxcywh")
    if out.exists() and os.path.samefile(source, out):
        raise DatasetError(f"{out} is the file that is to be read: give another name")
    content = read_json(str(source))
    images, annotations = content["images"], content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise DatasetError(f"{source}: `images` and `annotations` should be lists")
    if not set(map(type, [*images, *annotations])) <= {dict}:
        raise DatasetError(f"{source}: an entry of `images` or `annotations` is no object")
    positions = refer([x.get("image_id") for x in annotations], [x.get("id") for x in images])
    sizes = np.stack([read_numbers([x.get(k) for x in images]) for k in ("width", "height")], 1)
    boxes, broken = read_boxes([x.get("bbox") for x in annotations])
    for i in np.flatnonzero((positions >= 0) & ~broken).tolist():
        size = sizes[positions[i]]
        if "normalised" in readings and not (size > 0).all():
            raise DatasetError(
                f"{source}: image {show(images[positions[i]].get('id'))} needs `width` and "
                "`height`, as its boxes are fractions of them"
            )
        first, second = boxes[i, :2], boxes[i, 2:]
        if "normalised" in readings:
            first, second = first * size, second * size
        if "xyxy" in readings:
            second = second - first
        elif "cxcywh" in readings:
            first = first - second / 2
        annotation = annotations[i]
        annotation["bbox"] = [round(float(v), 4) for v in (*first, *second)]
        # It may have been computed from numbers that mean something else.
        annotation["area"] = round(float(second[0] * second[1]), 4)
    with replacing(out) as f:
        f.write(json.dumps(content).encode())
        f.flush()
        try:
            read_coco(str(f.name), str(out.parent))
        except DatasetError as e:
            reason = str(e).replace(str(f.name), str(source))
            raise DatasetError(f"read as {shorten(readings, ' and ')}, {reason}") from e
