"""Writing COCO annotation files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..checkpoint import replacing

__all__ = ["CocoWriter", "write_coco"]


def write_coco(out: Path, content: dict[str, Any]) -> None:
    """Write a COCO file, as a whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    with replacing(out) as f:
        f.write(json.dumps(content).encode())


class CocoWriter:
    """Gathers the `content` of a COCO file from corners and classes."""

    def __init__(self, names: Sequence[str]) -> None:
        """Begin a file with the names of its classes."""
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        }

    def add(
        self,
        file_name: str,
        size: tuple[int, int],
        corners: NDArray[Any],
        classes: Any,
        others: Sequence[dict[str, Any]],
    ) -> None:
        """Add an image and its boxes (M, 4) x1, y1, x2, y2, which end where it does.

        Args:
            file_name: of the image, in the folder of the images.
            size: its width and height.
            corners: of the boxes.
            classes: (M,) their indices.
            others: (M,) the other keys that their annotations have.
        """
        image_id = len(self.content["images"]) + 1
        width, height = size
        image = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        self.content["images"].append(image)
        for (x1, y1, x2, y2), c, other in zip(corners.tolist(), classes, others, strict=True):
            x1, y1, x2, y2 = max(0.0, x1), max(0.0, y1), min(width, x2), min(height, y2)
            box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            annotation = {
                "id": len(self.content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": int(c) + 1,
                "bbox": box,
                "area": round(box[2] * box[3], 3),
                "iscrowd": 0,
            }
            self.content["annotations"].append({**annotation, **other})
