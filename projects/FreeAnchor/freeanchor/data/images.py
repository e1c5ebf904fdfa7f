"""Images of a data set: checked before any work is done, and read with errors that name them."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.transforms import ResizeTransform
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import DatasetError, shorten
from .datasets import files_of, load

__all__ = ["Mapper", "check_images"]

_EXIF_ORIENTATION = 274
# What the last bytes of a whole file have in them.
_ENDINGS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 64


def check_images(names: Sequence[str]) -> None:
    """Look at every image, so that a missing one does not end a training hours later.

    Reads the headers, and looks whether JPEG and PNG files are whole.

    Args:
        names: registered data sets.

    Raises:
        DatasetError: an annotation file cannot be used, or images are missing, unreadable or not
            of the annotated size. It names the first of them.
    """
    dicts = load(names)
    with ThreadPoolExecutor() as pool:
        problems = [p for p in pool.map(_image_problem, dicts) if p is not None]
    if problems:
        raise DatasetError(
            f"{files_of(names)}: {len(problems)} of {len(dicts)} images cannot be used. "
            f"{shorten(problems, '; ')}. Correct the image directory or the annotation file"
        )


def _image_problem(record: dict[str, Any]) -> str | None:
    file_name = record["file_name"]
    if not PathManager.isfile(file_name):
        return f"{file_name} is missing"
    try:
        with PathManager.open(file_name, "rb") as f, Image.open(f) as image:
            size = image.size
            # Without EXIF in the header, getexif() would decode a whole PNG to look for it.
            if "exif" in image.info and _is_turned(image):
                size = size[::-1]
            position = f.tell()
            f.seek(-min(_TAIL_BYTES, f.seek(0, os.SEEK_END)), os.SEEK_END)
            is_whole = _ENDINGS.get(image.format or "", b"") in f.read()
            f.seek(position)
            if not is_whole:
                image.load()  # cut off, or with something behind its end: decoding tells
    except Exception as e:  # Pillow's decoders raise many kinds
        return f"{file_name} is not a readable image ({e})"
    # Data that Python registered may leave them out.
    annotated = record.get("width", size[0]), record.get("height", size[1])
    if size != annotated:
        return (
            f"{file_name} has {size[0]} x {size[1]} pixels, but {annotated[0]} x {annotated[1]} "
            "in its annotation"
        )
    return None


def _is_turned(image: Image.Image) -> bool:
    """Whether Detectron2 turns the image by 90 degrees on reading."""
    try:
        return bool(image.getexif().get(_EXIF_ORIENTATION, 1) >= 5)
    except Exception:  # damaged EXIF, which Detectron2 ignores
        return False


class Mapper(DatasetMapper):
    """Detectron2's mapper, whose errors name the image: a header does not show every damage."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            mapped: dict[str, Any] = super().__call__(dataset_dict)
        except (OSError, ValueError, SyntaxError) as e:
            raise DatasetError(f"{dataset_dict['file_name']} cannot be read: {e}") from e
        return mapped

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        # After a crop, sizes do not tell it, and INCLUSIVE_CORNERS needs it.
        resizes = [t for t in transforms.transforms if isinstance(t, ResizeTransform)]
        dataset_dict["resize_factors"] = (
            math.prod(t.new_w / t.w for t in resizes),
            math.prod(t.new_h / t.h for t in resizes),
        )
        super()._transform_annotations(dataset_dict, transforms, image_shape)
