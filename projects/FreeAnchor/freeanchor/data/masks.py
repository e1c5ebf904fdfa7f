"""Segmentations of objects: polygons and run-length encodings, as COCO has them.

They are in pixels of the image as a viewer shows it, like the boxes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from ..errors import DatasetError
from .findings import Findings, show

__all__ = ["MaskColumn", "decode_mask", "encode_mask", "read_mask", "to_rle"]

_MISSING = "is missing"
_NO_POLYGON = "has no polygon of three points or more"
_OUTSIDE = "is outside its image, or leaves it by more than its size"
_OTHER_SIZE = "is of another size than its image"
_NOT_WHOLE = "is a run-length encoding that does not fill its image"
_EMPTY = "has no pixel"
_COVERS_NONE = "covers no pixel, though its numbers are taken for pixels"
_UNKNOWN = "is neither polygons nor a run-length encoding"
# As for boxes: a data set is refused if a larger share of its masks cannot be used.
_MOST_UNUSABLE = 0.5
# Masks belong to other objects, or mean something else, if more of them overlap their boxes less.
_LEAST_OVERLAP = 0.3

_Extent = tuple[float, float, float, float]  # x, y, width, height


def read_mask(value: Any, size: tuple[int, int]) -> tuple[Any, _Extent] | str:
    """Read the `segmentation` of an object.

    Args:
        value: as it is in the file: polygons, one polygon, or a run-length encoding, compressed or
            not.
        size: width and height of the image.

    Returns:
        The mask as Detectron2 and COCO's evaluation take it, and the box around it: a list of (2n,)
        float64 polygons, or a dict with `size` and compressed `counts`. Or else why it cannot be
        used, as a message says it of a `segmentation`.
    """
    if isinstance(value, dict):
        return _read_rle(value, size)
    if value is None or (isinstance(value, list | str) and not value):
        return _MISSING
    if not isinstance(value, list):
        return _UNKNOWN
    try:
        parts = [value] if isinstance(value[0], int | float) else value
        arrays = [np.asarray(x, dtype=np.float64).squeeze() for x in parts]
    except (TypeError, ValueError, OverflowError):
        return _UNKNOWN
    # Numbers or points, but neither rings within a polygon nor points of three numbers.
    if any(x.ndim > 2 or (x.ndim == 2 and x.shape[1] != 2) for x in arrays):
        return _UNKNOWN
    polygons = [x.ravel() for x in arrays if x.size >= 6 and x.size % 2 == 0]
    polygons = [x for x in polygons if bool(np.isfinite(x).all())]
    if not polygons:
        return _NO_POLYGON
    points = np.concatenate(polygons).reshape(-1, 2)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    width, height = size
    is_outside = right <= 0 or bottom <= 0 or left >= width or top >= height
    # pycocotools walks along the polygon, pixel by pixel, and crashes where there are too many.
    if is_outside or max(-left, right - width) > width or max(-top, bottom - height) > height:
        return _OUTSIDE
    # Within its image, and wider than a pixel on average, it covers some: counting takes longer.
    is_inside = left >= 0 and top >= 0 and right <= width and bottom <= height
    is_wide = sum(map(_area, polygons)) >= right - left + bottom - top
    if not (is_inside and is_wide) and not mask_api.area(to_rle(polygons, size)):
        return _COVERS_NONE
    return polygons, (left, top, right - left, bottom - top)


def _area(polygon: NDArray[np.float64]) -> float:
    """Of (2n,) x, y, ..., by the shoelace formula."""
    x, y = polygon[::2], polygon[1::2]
    doubled = np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:]) + x[-1] * y[0] - y[-1] * x[0]
    return abs(float(doubled)) / 2


def _read_rle(value: dict[str, Any], size: tuple[int, int]) -> tuple[Any, _Extent] | str:
    width, height = size
    counts = value.get("counts")
    if not isinstance(counts, list | str | bytes):
        return _UNKNOWN
    own = value.get("size")
    if not isinstance(own, list | tuple) or [*own] != [height, width]:
        return _OTHER_SIZE
    runs = _runs(counts)
    if runs is None or (runs < 0).any() or runs.sum() != width * height:
        return _NOT_WHOLE
    ends = runs.cumsum()
    start, end = ends[:-1:2], ends[1::2]  # of the runs inside the mask, in pixels by columns
    start, end = start[end > start], end[end > start]
    if len(start) == 0:
        return _EMPTY
    columns, last_columns = start // height, (end - 1) // height
    is_split = last_columns > columns
    top = np.where(is_split, 0, start % height).min()
    bottom = np.where(is_split, height, (end - 1) % height + 1).max()
    left, right = columns.min(), last_columns.max() + 1
    if isinstance(counts, list):
        encoded = {"size": [height, width], "counts": runs.tolist()}
        counts = mask_api.frPyObjects(encoded, height, width)["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    extent = (float(left), float(top), float(right - left), float(bottom - top))
    return {"size": [height, width], "counts": text}, extent


def _runs(counts: list[int] | str | bytes) -> NDArray[np.int64] | None:
    """Lengths of the runs, outside and inside in turn; None if they are damaged.

    Compressed, a number is groups of five bits, the lowest first, in characters from "0" on whose
    sixth bit says that there are more. From the fourth on it is the difference to the last but one.
    """
    if isinstance(counts, list):
        try:
            numbers = np.array(counts)
        except (ValueError, OverflowError):
            return None
        return numbers.astype(np.int64) if numbers.dtype.kind in "iu" else None
    data = counts.encode(errors="replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # no image has so many pixels
        return None
    group = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * group, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def to_rle(polygons: Sequence[Any], size: tuple[int, int]) -> dict[str, Any]:
    """COCO's run-length encoding of polygons in an image of some width and height."""
    width, height = size
    lists = [np.asarray(x, dtype=np.float64).tolist() for x in polygons]
    encoded: dict[str, Any] = mask_api.merge(mask_api.frPyObjects(lists, height, width))
    return encoded


def decode_mask(mask: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) whether a pixel is of the object, of what :func:`read_mask` gives."""
    encoded = to_rle(mask, size) if isinstance(mask, list) else mask
    decoded: NDArray[np.bool_] = mask_api.decode(encoded).astype(bool)
    return decoded


def encode_mask(mask: NDArray[Any]) -> dict[str, Any]:
    """COCO's run-length encoding, for JSON, of (H, W) whether a pixel is of the object."""
    encoded = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


class MaskColumn:
    """The masks of the annotations of a data set, in their order."""

    def __init__(self) -> None:
        """There are none yet."""
        self.masks: list[Any] = []
        self._problems: list[str] = []
        self._extents: list[_Extent] = []

    def add(self, values: Sequence[Any], sizes: NDArray[Any]) -> None:
        """Read those of the next annotations.

        Args:
            values: (M,) their `segmentation`.
            sizes: (M, 2) width and height of their images.
        """
        for value, (width, height) in zip(values, sizes.tolist(), strict=True):
            found = read_mask(value, (width, height))
            mask, extent = (None, (0.0,) * 4) if isinstance(found, str) else found
            self.masks.append(mask)
            self._problems.append(found if isinstance(found, str) else "")
            self._extents.append(extent)

    def usable(
        self,
        boxes: NDArray[Any],
        crowd: NDArray[Any],
        is_wanted: NDArray[Any],
        name: Callable[[int], str],
        findings: Findings,
    ) -> NDArray[Any]:
        """Find the annotations whose masks can be used; those without are counted.

        A crowd without a mask gets its box: it says where nothing is counted.

        Args:
            boxes: (M, 4) x, y, width, height.
            crowd: (M,) which are crowds.
            is_wanted: (M,) which are looked at.
            name: of an annotation, for messages.
            findings: where to count.

        Returns:
            (M,) which are wanted and have a mask.

        Raises:
            DatasetError: most cannot be used, or do not lie where the boxes are.
        """
        for i in np.flatnonzero(is_wanted & crowd).tolist():
            if self.masks[i] is None:
                x, y, width, height = boxes[i].tolist()
                right, bottom = x + width, y + height
                self.masks[i] = [np.array([x, y, right, y, right, bottom, x, bottom])]
                problem, self._problems[i] = self._problems[i], ""
                findings.add(
                    f"crowds have their box for a mask, as their `segmentation` {problem}",
                    int(problem != _MISSING),
                    lambda i=i: name(i),  # type: ignore[misc]
                )
        problems = np.array(self._problems, dtype=object)
        objects = is_wanted & ~crowd.astype(bool)
        unusable = objects & (problems != "")
        kinds = {
            kind: np.flatnonzero(unusable & (problems == kind))
            for kind in sorted({*problems})
            if kind
        }
        if unusable.sum() > _MOST_UNUSABLE * objects.sum():
            kind, those = max(kinds.items(), key=lambda x: len(x[1]))
            raise DatasetError(
                f"{int(unusable.sum())} of {int(objects.sum())} objects have no `segmentation` "
                f"that can be used (of {name(int(those[0]))} it {kind}), and MODEL.MASK_ON needs "
                "them: correct them, or set MODEL.MASK_ON False, for boxes alone"
            )
        for kind, those in kinds.items():
            findings.add(
                f"objects are left out, whose `segmentation` {kind}",
                len(those),
                lambda those=those: name(int(those[0])),  # type: ignore[misc]
            )
        usable: NDArray[Any] = is_wanted & (problems == "")
        self._check_overlap(boxes, usable & objects, name)
        return usable

    def _check_overlap(
        self, boxes: NDArray[Any], chosen: NDArray[Any], name: Callable[[int], str]
    ) -> None:
        rows = np.flatnonzero(chosen)
        if len(rows) == 0:
            return
        a, b = boxes[rows], np.array(self._extents)[rows]
        start = np.maximum(a[:, :2], b[:, :2])
        end = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
        inside = (end - start).clip(min=0).prod(axis=1)
        union = a[:, 2:].prod(axis=1) + b[:, 2:].prod(axis=1) - inside
        is_elsewhere = inside < _LEAST_OVERLAP * union
        if is_elsewhere.mean() > _MOST_UNUSABLE:
            i = int(np.flatnonzero(is_elsewhere)[0])
            raise DatasetError(
                f"{int(is_elsewhere.sum())} of {len(rows)} objects have a `segmentation` that does "
                f"not lie where their `bbox` is: {name(int(rows[i]))} has the bbox "
                f"{show(a[i].tolist())}, and around its mask it is {show(b[i].tolist())}; both "
                "are in pixels, x before y"
            )
