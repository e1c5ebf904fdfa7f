"""Parts of the objects that FreeAnchor is about: slender and crowded ones."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

__all__ = [
    "ASPECT_RATIOS",
    "CROWDING",
    "aspect_ratios",
    "best_matches",
    "by_aspect_ratio",
    "by_crowding",
    "crowding",
]

# Name and highest value of each part; the one before ends where the next begins.
ASPECT_RATIOS = (("<=2", 2.0), ("2..3", 3.0), ("3..5", 5.0), (">5", float("inf")))
CROWDING = (("0", 0.0), ("<=0.3", 0.3), (">0.3", 1.0))


def aspect_ratios(boxes: NDArray[Any]) -> NDArray[Any]:
    """Longer over shorter side of (M, 4) boxes, x y width height: (M,), at least 1."""
    sides = np.maximum(boxes[:, 2:], 1e-6)
    ratios: NDArray[Any] = sides.max(axis=1) / sides.min(axis=1)
    return ratios


def crowding(boxes: NDArray[Any]) -> NDArray[Any]:
    """Largest IoU of each of the (M, 4) boxes of an image with another one: (M,)."""
    iou = _iou(boxes, boxes)
    np.fill_diagonal(iou, 0)
    largest: NDArray[Any] = iou.max(axis=1, initial=0)
    return largest


def best_matches(objects: NDArray[Any], boxes: NDArray[Any]) -> NDArray[Any]:
    """IoU of each of (M, 4) objects with the box of its own among (N, 4), the best first: (M,)."""
    iou = _iou(objects, boxes)
    best = np.zeros(len(objects))
    for _ in range(min(iou.shape)):
        i, j = np.unravel_index(iou.argmax(), iou.shape)
        best[i] = iou[i, j]
        iou[i], iou[:, j] = -1, -1
    return best


def _iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """(M, N) IoU of (M, 4) and (N, 4) boxes, x y width height."""
    return np.asarray(mask_api.iou(a, b, [0] * len(b)), dtype=np.float64).reshape(len(a), len(b))


def _boxes(records: list[dict[str, Any]]) -> NDArray[Any]:
    return np.array([x["bbox"] for x in records], dtype=np.float64).reshape(-1, 4)


def by_aspect_ratio(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Longer over shorter side of objects and detections, which are COCO's records."""
    return aspect_ratios(_boxes(objects)).tolist(), aspect_ratios(_boxes(detections)).tolist()


def by_crowding(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Crowding of objects, and of detections that of the object they overlap most, 0 without one.

    Args:
        objects: COCO's annotations.
        detections: COCO's results.
    """
    in_image: dict[Any, tuple[list[int], list[int]]] = {}
    for kind, records in enumerate((objects, detections)):
        for i, x in enumerate(records):
            if not x.get("iscrowd"):  # a crowd region is no object
                in_image.setdefault(x["image_id"], ([], []))[kind].append(i)
    of_objects, of_detections = np.zeros(len(objects)), np.zeros(len(detections))
    for those, found in in_image.values():
        boxes = _boxes([objects[i] for i in those])
        of_objects[those] = values = crowding(boxes)
        if those and found:
            iou = _iou(_boxes([detections[i] for i in found]), boxes)
            of_detections[found] = np.where(iou.max(axis=1) > 0, values[iou.argmax(axis=1)], 0)
    return of_objects.tolist(), of_detections.tolist()
