"""What a COCO annotation file holds, by columns."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from .findings import Findings

__all__ = ["CocoFile", "without_collection"]


@dataclass
class CocoFile:
    """What a COCO file holds, by columns: N images, M boxes that can be used, C classes."""

    path: str
    # (C,) by the order of their ids.
    class_names: list[str]
    class_ids: list[int | str]
    # (N,) by the order of their ids.
    image_ids: list[int | str]
    file_names: list[str]
    sizes: NDArray[Any]  # (N, 2) width and height
    # (M,) and (M, 4), image by image: those of image i are starts[i] up to starts[i + 1].
    starts: NDArray[Any] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    boxes: NDArray[Any] = field(default_factory=lambda: np.zeros((0, 4)))  # x, y, width, height
    areas: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    classes: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    crowd: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # in the file
    # (M,) see `freeanchor.data.masks`; None where they were not asked for.
    masks: list[Any] | None = None
    # Whether the file has `annotations`: without, there is nothing to train on or to evaluate by.
    has_truth: bool = False
    # What was left out or read in another way.
    findings: Findings = field(default_factory=Findings)

    def records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The images in Detectron2's standard format.

        Args:
            indices: (C,) the class of the model that each class of the file is.
        """
        with without_collection():
            records: list[dict[str, Any]] = []
            new = np.asarray(indices, dtype=np.int64)
            sizes = self.sizes.tolist()
            for i, (image_id, file_name) in enumerate(zip(self.image_ids, self.file_names)):
                width, height = sizes[i]
                record = {
                    "file_name": file_name,
                    "height": height,
                    "width": width,
                    "image_id": image_id,
                }
                if self.has_truth:
                    rows = slice(self.starts[i], self.starts[i + 1])
                    record["annotations"] = [
                        {
                            "iscrowd": crowd,
                            "bbox": box,
                            "category_id": category,
                            "bbox_mode": BoxMode.XYWH_ABS,
                            "area": area,
                        }
                        for crowd, box, category, area in zip(
                            self.crowd[rows].astype(int).tolist(),
                            self.boxes[rows].tolist(),
                            new[self.classes[rows]].tolist(),
                            self.areas[rows].tolist(),
                        )
                    ]
                    if self.masks is not None:
                        for annotation, mask in zip(record["annotations"], self.masks[rows]):
                            annotation["segmentation"] = mask
                records.append(record)
            return records


@contextmanager
def without_collection() -> Iterator[None]:
    """Millions of new objects, none of which is garbage: looking for it would take most time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
