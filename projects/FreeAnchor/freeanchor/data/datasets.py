"""The data sets of a run: loaded for training, and checked before any work is done."""

import functools
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ..errors import DatasetError, shorten
from .catalog import file_of, take_over
from .images import ImageReader, ImageState

__all__ = [
    "check_alike",
    "check_images",
    "check_overlap",
    "fingerprint",
    "load_training_set",
    "report_findings",
    "sum_up",
]

logger = logging.getLogger(__name__)

# 16-bit images whose largest value is below would become nearly black.
_LOW_16_BIT = 16384


def load_training_set(names: Sequence[str], filter_empty: bool) -> list[dict[str, Any]]:
    """Load data sets for training, without the boxes that no detector can learn from.

    Args:
        names: registered data sets.
        filter_empty: leave out images without a usable box.

    Returns:
        Dicts in Detectron2's standard format.

    Raises:
        DatasetError: an annotation file cannot be used, or no usable box is left.
    """
    files = ", ".join(map(file_of, names))
    dicts: list[dict[str, Any]] = []
    for name in names:
        records = take_over(name)()
        if not any("annotations" in x for x in records):
            raise DatasetError(f"{file_of(name)} has no `annotations`, so it cannot be trained on")
        for record in records:  # Python's may leave them out where there is no object
            record.setdefault("annotations", [])
        dicts += records
        take_over(name).report()
    if all(a["iscrowd"] for x in dicts for a in x["annotations"]):
        raise DatasetError(
            f"{files}: no usable box in {len(dicts)} images (crowd boxes not counted), so there is "
            "nothing to train on"
        )
    print_instances_class_histogram(dicts, MetadataCatalog.get(names[0]).thing_classes)
    return filter_images_with_only_crowd_annotations(dicts) if filter_empty else dicts


def report_findings(names: Sequence[str]) -> None:
    """Log once what is left out of data sets, or read in another way than it is written.

    Args:
        names: registered data sets.
    """
    for name in names:
        dataset = take_over(name)
        if not dataset.is_coco:
            dataset()
        dataset.report()


def check_overlap(training: Sequence[str], test: Sequence[str]) -> None:
    """Find images that several data sets have.

    In two training sets with other objects, as of two tools, what one of them lacks would be
    background there. The figures of a test set that is trained on are pointed out.

    Args:
        training: registered data sets.
        test: those that are evaluated.

    Raises:
        DatasetError: training sets have other objects in the same image.
    """
    owner: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(training):
        for path in _files(name):
            if path in owner:
                shared.setdefault((owner[path], name), []).append(path)
            owner.setdefault(path, name)
    for (first, second), paths in shared.items():
        objects, others = _objects(first), _objects(second)
        if differing := [x for x in paths if objects[x] != others[x]]:
            raise DatasetError(
                f"{len(differing)} images are in {file_of(first)} and with other objects in "
                f"{file_of(second)}, as {differing[0]}: what one of them lacks would be background "
                "there. Put all objects of an image into one file"
            )
    for name in dict.fromkeys(test):
        if both := [x for x in _files(name) if x in owner]:
            logger.warning(
                f"{file_of(name)}: {len(both)} of its images are trained on, as {both[0]} of "
                f"{file_of(owner[both[0]])}: what is measured on them does not hold for others"
            )


def fingerprint(files: Iterable[str]) -> int:
    """A number for images, by their names and order, in whatever folder."""
    return zlib.crc32(ascii([os.path.basename(x) for x in files]).encode())


def check_alike(names: Sequence[str]) -> None:
    """Compare what the processes see of data sets, as each takes its part of them by numbers.

    Args:
        names: registered data sets, the same on all processes.

    Raises:
        DatasetError: one has other images, or these in another order, on another process.
    """
    if comm.get_world_size() == 1:
        return
    for name in names:
        if len(set(comm.all_gather(fingerprint(take_over(name).image_files())))) > 1:
            raise DatasetError(
                f"{file_of(name)}: the processes have other images of it than each other, or in "
                "another order: its file must be the same on all machines, and a function of "
                "Python must give the same list in each process (sort what comes from a set or "
                "from a folder)"
            )


def _files(name: str) -> list[str]:
    """The file of each image of a data set, by one path however its folder is written."""
    real = functools.cache(os.path.realpath)  # of folders, which are few
    paths = map(os.path.split, take_over(name).image_files())
    return [os.path.join(real(folder), file) for folder, file in paths]


def _objects(name: str) -> dict[str, list[Any]]:
    """The objects of each file, to be compared."""
    boxes = {
        path: [
            (x["category_id"], BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS))
            for x in record.get("annotations", ())
        ]
        for path, record in zip(_files(name), take_over(name)())
    }
    return {path: sorted((c, *np.round(x, 1)) for c, x in boxes[path]) for path in boxes}


def check_images(names: Sequence[str], reader: ImageReader | None = None) -> None:
    """Look at every image, so that a missing one does not end a training hours later.

    Reads the headers and looks whether the files are whole.

    Args:
        names: registered data sets.
        reader: what reads the images later.

    Raises:
        DatasetError: an annotation file cannot be used, or images are missing, unreadable or not
            of the annotated size. It names the first of them.
    """
    reader = reader or ImageReader()
    for name in names:
        records = take_over(name)()
        with ThreadPoolExecutor() as pool:
            states = list(pool.map(reader.check, records))
        problem = sum_up(states, reader)
        if problem:
            raise DatasetError(f"{file_of(name)}: {problem}")


def sum_up(states: Sequence[ImageState], reader: ImageReader) -> str:
    """What is wrong with the images of a data set, if anything."""
    problems = [x.problem for x in states if x.problem]
    if problems:
        return (
            f"{len(problems)} of {len(states)} images cannot be used. "
            f"{shorten(problems, '; ')}. Correct the image directory or the annotation file"
        )
    largest = max((x.largest for x in states if x.largest is not None), default=None)
    if largest is not None and largest < _LOW_16_BIT and reader.max_value == 0:
        return (
            f"its images have 16 bits, of which they use little: the largest value is {largest}. "
            f"Add INPUT.MAX_VALUE {largest} to make that white, or 65535 to leave them so dark"
        )
    return ""
