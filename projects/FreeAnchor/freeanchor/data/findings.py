"""What a check of a data set found: counts and examples, and the boxes that mean something else."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError

__all__ = ["BOX_PROBLEMS", "Findings", "box_problems", "check_plausible", "show"]

# By the numbers that `box_problems` gives; 0 is a box without one.
BOX_PROBLEMS = (
    "",
    "is not four numbers",
    "is not finite",
    "has no area",
    "is outside its image",
)
# A data set is refused if a larger share of its boxes cannot be used.
_MOST_UNUSABLE = 0.5
# Boxes may leave their image by rounding: so many pixels, or that share of its side.
_TOLERANCE = (1.0, 0.01)
_LONGEST_SHOWN = 60


def show(value: Any) -> str:
    """A value from a file, for a message: on one line, and not too long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


class Findings:
    """Counts of what is left out or read in another way, each with an example."""

    def __init__(self) -> None:
        """Nothing is found yet."""
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, count: int, example: Callable[[], str]) -> None:
        """Count `count` more of a kind; the first one's example is kept."""
        if count:
            known, first = self._found.get(kind, (0, ""))
            self._found[kind] = (known + count, first or example())

    def lines(self) -> list[str]:
        """One line for each kind."""
        return [f"{count} {kind} ({example})" for kind, (count, example) in self._found.items()]


def box_problems(boxes: NDArray[Any], sizes: NDArray[Any]) -> NDArray[Any]:
    """Find boxes that no detector can learn from or be measured by.

    Args:
        boxes: (M, 4) x, y, width, height in pixels; not a number where it is not four of them.
        sizes: (M, 2) width and height of the image of each box; infinite where it is not known.

    Returns:
        (M,) index of `BOX_PROBLEMS`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        start = boxes[:, :2].astype(np.float32)  # as the model has them
        end = (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
        problems = np.zeros(len(boxes), dtype=np.int8)
        problems[((start >= sizes) | (end <= 0)).any(axis=1)] = 4
        problems[((end <= start) | (boxes[:, 2:] <= 0)).any(axis=1)] = 3
        problems[~(np.isfinite(start) & np.isfinite(end)).all(axis=1)] = 2
    return problems


def check_plausible(
    boxes: NDArray[Any], sizes: NDArray[Any], problems: NDArray[Any], what: str, path: str = ""
) -> None:
    """Refuse a data set whose boxes are mostly unusable, or of another kind than they should be.

    Args:
        boxes: (M, 4) x, y, width, height of all boxes.
        sizes: (M, 2) width and height of their images.
        problems: (M,) of each box, see :func:`box_problems`.
        what: the data set, for the message.
        path: its annotation file, if `freeanchor import` can read it.

    Raises:
        DatasetError: most boxes are smaller than a pixel, or many leave their image and another
            reading explains it; or a larger share than `_MOST_UNUSABLE` cannot be used.
    """
    finite = (problems == 0) | (problems > 2)
    readings = _readings(boxes[finite], sizes[finite]) if finite.any() else None
    if readings:
        reason, options = readings
        command = f"freeanchor import {options} {path} OUT.json" if options and path else ""
        remedy = f"`{command}` reads them so" if command else "correct them, or their `bbox_mode`"
        raise DatasetError(
            f"{what}: {reason}, but x, y, width, height in pixels are needed; {remedy}"
        )
    unusable = np.count_nonzero(problems)
    if unusable > _MOST_UNUSABLE * len(problems):
        kinds = np.bincount(problems, minlength=len(BOX_PROBLEMS))
        counts = ", ".join(f"{n} {k}" for n, k in zip(kinds[1:], BOX_PROBLEMS[1:]) if n)
        raise DatasetError(
            f"{what}: {unusable} of {len(problems)} boxes cannot be used ({counts}): correct them, "
            "they are x, y, width, height in pixels"
        )


def _readings(boxes: NDArray[Any], sizes: NDArray[Any]) -> tuple[str, str] | None:
    """Why boxes are not x, y, width, height in pixels, and what they seem to be; None if they are.

    Args:
        boxes: (M, 4) finite boxes.
        sizes: (M, 2) of their images.
    """
    count = len(boxes)
    inside = np.abs(boxes) <= 1.001
    sides = boxes[:, 2:][(boxes[:, 2:] != 0).all(axis=1)]
    if len(sides) and (np.abs(sides) < 1).all(axis=1).mean() > 0.5:
        if inside.all(axis=1).mean() < 0.9 or not np.isfinite(sizes).all():
            return "most boxes are smaller than a pixel", ""
        pixels = boxes * np.tile(sizes, 2)
        fits = _best_reading(pixels, sizes)
        return (
            "most boxes are smaller than a pixel, as if they were fractions of the image",
            " ".join(["--boxes normalised", *([f"--boxes {fits}"] if fits else [])]),
        )
    known = np.isfinite(sizes).all(axis=1)
    if not known.any():
        return None
    boxes, sizes = boxes[known], sizes[known]
    fits = _best_reading(boxes, sizes)
    if fits:
        name = {"xyxy": "corners (x1, y1, x2, y2)", "cxcywh": "centre, width, height"}[fits]
        share = _leaving(boxes, sizes, "xywh").mean()
        return (
            f"{share:.0%} of the boxes leave their image to the right or below, and none would if "
            f"they were {name} instead of x, y, width, height",
            f"--boxes {fits}",
        )
    leaving = _leaving(boxes, sizes, "xywh")
    if count >= 5 and leaving.mean() > _MOST_UNUSABLE:
        swapped = _leaving(boxes, sizes[:, ::-1], "xywh").mean() < 0.02
        return (
            f"{leaving.mean():.0%} of the boxes leave their image"
            + (", as if width and height of the images were swapped" if swapped else ""),
            "",
        )
    return None


def _leaving(boxes: NDArray[Any], sizes: NDArray[Any], reading: str) -> NDArray[Any]:
    """(M,) which boxes leave their image, or have no area, under a reading of their numbers."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if reading == "xyxy":
        start, end = first, second
    elif reading == "cxcywh":
        start, end = first - second / 2, first + second / 2
    else:
        start, end = first, first + second
    slack = np.maximum(_TOLERANCE[0], _TOLERANCE[1] * sizes)
    # On the left and above, boxes of another reading do not leave, and sloppy ones may.
    leaving = np.any((end > sizes + slack) | (end <= start), axis=1)
    result: NDArray[Any] = leaving
    return result if reading == "xywh" else result | np.any(start < -slack, axis=1)


def _best_reading(boxes: NDArray[Any], sizes: NDArray[Any]) -> str:
    """`xyxy` or `cxcywh` where the boxes are that rather than x, y, width, height; else nothing."""
    with np.errstate(invalid="ignore"):
        usable = (boxes[:, 2:] > 0).all(axis=1)
        boxes, sizes = boxes[usable], sizes[usable]
        if len(boxes) == 0:
            return ""
        leaving = np.count_nonzero(_leaving(boxes, sizes, "xywh"))
        share = leaving / len(boxes)
        for reading, least in (("xyxy", 0.1), ("cxcywh", 0.02)):
            others = _leaving(boxes, sizes, reading).mean()
            if leaving >= 3 and share >= least and others <= min(0.02, share / 20):
                return reading
    return ""
