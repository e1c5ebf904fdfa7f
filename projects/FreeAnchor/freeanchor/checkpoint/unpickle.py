"""Pickles of arrays, tensors and plain containers, read without calling what else they name.

A pickle can call any function while it is read. Here, stand-ins are all that it finds.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np

__all__ = ["MMENGINE", "PLAIN", "RefusedError", "load"]


class RefusedError(Exception):
    """What a file holds that could run code."""


class _DType:
    """Stands in for `numpy.dtype` in a pickle: numbers only, in either byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d+", name):
            raise RefusedError(f"an array of {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray`, whose own `__setstate__` trusts what it is given."""

    array: np.ndarray[Any, Any]

    def __init__(self, *_: Any) -> None:
        """Empty, as `numpy.core.multiarray._reconstruct` leaves it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, is_fortran, content = state
        if isinstance(content, str):  # Python 2's bytes
            content = content.encode("latin1")
        self.array = _from_buffer(content, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(content: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    """`numpy.core.numeric._frombuffer`, how protocol 5 writes arrays."""
    if not (isinstance(content, bytes | bytearray) and isinstance(dtype, _DType)):
        raise RefusedError("an array of objects")
    array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return array.astype(dtype.dtype.newbyteorder("="))  # PyTorch has no other byte order


def _scalar(dtype: Any, content: Any) -> Any:
    """`numpy.core.multiarray.scalar`."""
    return _from_buffer(content, dtype, (1,), "C")[0]


def _encode(text: str, _: str) -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes."""
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """`bytes()`, by which protocol 2 writes those of an empty array."""
    return b""


# All that a pickle may call.
PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
}
for _core in ("core", "_core"):  # NumPy 1 and 2
    PLAIN[f"numpy.{_core}.multiarray._reconstruct"] = _Array
    PLAIN[f"numpy.{_core}.multiarray.scalar"] = _scalar
    PLAIN[f"numpy.{_core}.numeric._frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return PLAIN[f"{module}.{name}"]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None


def load(file: IO[bytes]) -> Any:
    """Unpickle arrays and plain containers, also those that Python 2 wrote.

    Raises:
        RefusedError: the pickle holds something else.
    """
    return _arrays(_Unpickler(file, encoding="latin1").load(), {})


def _arrays(value: Any, done: dict[int, Any]) -> Any:
    """The same containers with arrays instead of what stood in for them.

    What is there many times is done once: a pickle of a few bytes can nest it without end.
    """
    if isinstance(value, dict | list | tuple):
        if id(value) not in done:
            if isinstance(value, dict):
                done[id(value)] = {k: _arrays(v, done) for k, v in value.items()}
            else:
                done[id(value)] = type(value)(_arrays(v, done) for v in value)
        return done[id(value)]
    return value.array if isinstance(value, _Array) else value


# What MMEngine keeps beside the weights is read over.


class _Log:
    """Stands in for its `HistoryBuffer`, the logs of a run."""


def _no_method(*_: Any) -> None:
    """Stands in for `getattr`, by which the methods of `HistoryBuffer` are written."""


MMENGINE: dict[str, Callable[..., Any]] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Log,
    "__builtin__.getattr": _no_method,
    "builtins.getattr": _no_method,
}
