"""Values of an annotation file, column by column: fast where they are as they should be.

A column of millions of numbers is looked at as a whole (which types, which lengths), and value by
value only where something is odd.
"""

import math
import re
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from .findings import show

__all__ = ["MISSING", "UNKNOWN", "read_boxes", "read_flags", "read_ids", "read_numbers", "refer"]

# What `refer` gives instead of a position.
UNKNOWN, MISSING = -1, -2

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
# Python reads no longer integers from text.
_LONGEST_INTEGER = 4000


def _id(value: Any) -> int | str | None:
    """An id: an integer or a text; None where it is neither."""
    if type(value) is int or (type(value) is str and value.strip()):
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    return None


def _as_integer(value: Hashable) -> Hashable:
    """What an id and another way to write it have in common: 7, "7" and "007"."""
    if isinstance(value, str) and len(value) < _LONGEST_INTEGER:
        text = value.strip()
        return int(text) if _INTEGER.fullmatch(text) else value
    return value


def read_ids(values: Sequence[Any], name: Callable[[int], str]) -> list[int | str]:
    """Read ids that must be there and unique.

    Args:
        values: as they are in the file.
        name: of the entry at a position, for messages.

    Raises:
        DatasetError: one is missing or no id, or two are the same.
    """
    ids: list[Any] = list(values)
    kinds = set(map(type, ids))
    if not kinds <= {int} and not (kinds == {str} and all(map(str.strip, ids))):
        ids = [_id(x) for x in ids]
        if None in ids:
            i = ids.index(None)
            raise DatasetError(
                f"{name(i)} has the id {show(values[i])}: give it one of its own, a number or a "
                "text"
            )
    if len(set(ids)) == len(ids) and len({type(x) for x in ids}) == 1:
        return ids
    seen: dict[Hashable, int] = {}
    for i, x in enumerate(map(str, ids)):
        if x in seen:
            raise DatasetError(
                f"{name(seen[x])} and {name(i)} have the same id {show(values[i])}: give each one "
                "of its own"
            )
        seen[x] = i
    return ids


def refer(values: Sequence[Any], ids: Sequence[int | str]) -> NDArray[Any]:
    """Find what ids refer to.

    Args:
        values: (M,) ids as they are in the file.
        ids: (N,) the ids that there are. One that is written in another way (7, 7.0, "7", "007")
            is meant where no other could be.

    Returns:
        (M,) positions in `ids`; `UNKNOWN` or, where there is no id, `MISSING`.
    """
    position: dict[Any, int] = {x: i for i, x in enumerate(ids)}
    if not set(map(type, values)) <= {int, str}:
        values = [_id(x) for x in values]
    found = np.fromiter((position.get(x, UNKNOWN) for x in values), np.int64, len(values))
    odd = np.flatnonzero(found == UNKNOWN)
    if len(odd):
        others: dict[Hashable, int] = {}
        for i, x in enumerate(ids):
            key = _as_integer(x)
            others[key] = UNKNOWN if key in others else i
        for i in odd.tolist():
            value = values[i]
            found[i] = MISSING if value is None else others.get(_as_integer(value), UNKNOWN)
    return found


def _number(value: Any) -> float:
    """A number, also as a text; not a number where it is none."""
    try:
        if type(value) in (int, float) or (
            type(value) is str and len(value) < _LONGEST_INTEGER and _NUMBER.fullmatch(value)
        ):
            return float(value)
    except OverflowError:
        return math.inf
    return math.nan


def read_numbers(values: Sequence[Any]) -> NDArray[Any]:
    """(M,) float64 numbers; not a number where there is none."""
    if set(map(type, values)) <= {int, float}:
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:
            pass
    return np.array([_number(x) for x in values], dtype=np.float64)


def read_boxes(values: Sequence[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read boxes.

    Returns:
        (M, 4) float64 numbers, and (M,) whether the value is not four numbers, whose row is NaN.
    """
    if (
        set(map(type, values)) <= {list}
        and set(map(len, values)) <= {4}
        and set(map(type, chain.from_iterable(values))) <= {int, float}
    ):
        try:
            numbers = np.fromiter(chain.from_iterable(values), np.float64, 4 * len(values))
            return numbers.reshape(-1, 4), np.zeros(len(values), dtype=bool)
        except OverflowError:
            pass
    boxes = np.full((len(values), 4), math.nan)
    broken = np.ones(len(values), dtype=bool)
    for i, value in enumerate(values):
        if isinstance(value, list) and len(value) == 4:
            boxes[i] = [_number(x) for x in value]
            # What is NaN in the file is a number that is not finite.
            broken[i] = any(
                math.isnan(y) and not isinstance(x, float) for x, y in zip(value, boxes[i])
            )
    return boxes, broken


_FLAGS = {"0": False, "1": True, "false": False, "true": True}


def _flag(value: Any) -> bool | None:
    """Yes or no, missing for no; None where it is neither."""
    if value is None:
        return False
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def read_flags(values: Sequence[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(M,) which are set, and (M,) which are neither set nor unset, and taken for unset."""
    try:
        known: dict[Hashable, bool | None] = {x: _flag(x) for x in set(values)}
        flags = [known[x] for x in values]
    except TypeError:  # a list or a dict among them
        flags = [_flag(x) for x in values]
    odd = np.array([x is None for x in flags], dtype=bool)
    return np.array(flags, dtype=object).astype(bool), odd
