"""Checkpoint and config files from anywhere: read without running what may be in them.

Pickle, and with it PyTorch's and Detectron2's checkpoints, can call any function while it is read,
and so can yaml with Python tags. Here, tensors, arrays and plain containers are all that a file can
make. Who trusts the source of another file sets FREEANCHOR_UNSAFE_LOAD=1: an environment variable,
because a config could set a config key.
"""

import json
import logging
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import add_freeanchor_config

__all__ = [
    "FileError",
    "find",
    "merge_config",
    "read_checkpoint",
    "read_config",
    "shorten",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

# Entry of a checkpoint: the config keys that its weights need, see :mod:`freeanchor.convert`.
CONFIG_KEY = "freeanchor_config"
_MOST_NAMED = 5
_UNSAFE = "FREEANCHOR_UNSAFE_LOAD"
_OPT_IN = f"If you trust where it comes from, set the environment variable {_UNSAFE}=1"


class FileError(Exception):
    """A checkpoint or config cannot be used. The message names the file and says what to do."""


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first few of possibly many names or messages, and say how many more there are."""
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return separator.join([*names[:_MOST_NAMED], *more])


def _is_unsafe_allowed() -> bool:
    return os.environ.get(_UNSAFE) == "1"


def read_config(path: str | Path) -> CfgNode:
    """Read a config file on top of the defaults of Detectron2 and FreeAnchor.

    Raises:
        FileError: see :func:`merge_config`.
    """
    cfg = get_cfg()
    add_freeanchor_config(cfg)
    merge_config(cfg, path)
    return cfg


def merge_config(cfg: CfgNode, path: str | Path) -> None:
    """Merge a yaml file into a config, like `cfg.merge_from_file` but never by unsafe loading.

    Raises:
        FileError: the file is not there or no yaml, holds Python objects or unknown keys, or makes
            Detectron2 read pickles.
    """
    try:
        cfg.merge_from_file(str(path), allow_unsafe=_is_unsafe_allowed())
    except yaml.constructor.ConstructorError as e:
        raise FileError(
            f"{path}: {e.problem} {e.problem_mark}. Python objects could run code: write the value "
            f"out, or: {_OPT_IN[0].lower()}{_OPT_IN[1:]}"
        ) from e
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise FileError(f"{path} cannot be read: {e}") from e
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as e:
        # What yacs and Detectron2 make of unknown keys and of values of another type.
        raise FileError(f"{path}: {e.args[0] if e.args else e!r}") from e
    if cfg.MODEL.LOAD_PROPOSALS and not _is_unsafe_allowed():
        raise FileError(
            f"{path}: MODEL.LOAD_PROPOSALS has Detectron2 read pickles, which could run code; "
            "FreeAnchor needs no proposals, so leave it out"
        )


def find(path: str) -> str:
    """The local file of what `MODEL.WEIGHTS` takes; it is downloaded if need be.

    Args:
        path: a file, http(s)://, detectron2://, catalog:// or mmdet://.

    Raises:
        FileError: there is no such file, or it cannot be downloaded.
    """
    try:
        local: str = PathManager.get_local_path(path)
    except FileError:
        raise
    except Exception as e:  # of the catalogue, the network or the disk
        raise FileError(f"{path} cannot be found: {e}") from e
    if not os.path.isfile(local):
        raise FileError(f"There is no file {local}")
    return local


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a local file: PyTorch's (.pth, .pt, .pyth), Detectron2's and Caffe2's pickles (.pkl)
            or .safetensors.

    Returns:
        What the file holds; of .safetensors {"model": tensors}.

    Raises:
        FileError: the file is damaged, or holds more than tensors and plain containers.
    """
    read = _READERS.get(Path(path).suffix.lower())
    if read is None:
        if not _is_unsafe_allowed():
            raise FileError(f"{path}: only {', '.join(_READERS)} are read as weights. {_OPT_IN}")
        read = _read_torch
    try:
        checkpoint = read(path)
    except FileError:
        raise
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e}") from e
    except _RefusedError as e:
        raise FileError(
            f"{path} holds {e}, and not only tensors and plain containers, so that reading it "
            f"could run code. {_OPT_IN}"
        ) from e
    except Exception as e:  # whatever a parser makes of bytes that are not what they should be
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise FileError(
            f"{path} is damaged, cut off or of another type than its name says ({reason}): get it "
            "again from where it came from"
        ) from e
    if not isinstance(checkpoint, dict):
        raise FileError(f"{path} holds one {type(checkpoint).__name__}, not tensors with names")
    return checkpoint


def write_checkpoint(path: str | Path, model: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights, as a whole or not at all.

    Args:
        path: .pth, in Detectron2's format, or .safetensors.
        model: the tensors of a model by name.
        config: the config keys that they need, kept in the file.

    Raises:
        FileError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise FileError(f"{path}: weights are written as .pth or .safetensors")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            torch.save({"model": model, "__author__": "FreeAnchor", CONFIG_KEY: config}, unfinished)
        else:
            # Copies: safetensors has no views and no two names of one memory.
            tensors = {k: v.detach().cpu().clone().contiguous() for k, v in model.items()}
            save_file(tensors, unfinished, {"format": "pt", CONFIG_KEY: json.dumps(config)})
        unfinished.replace(path)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e}") from e
    finally:
        unfinished.unlink(missing_ok=True)


class _RefusedError(Exception):
    """What a file holds that could run code."""


def _read_safetensors(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as f:
        config = json.loads((f.metadata() or {}).get(CONFIG_KEY, "{}"))
        return {"model": {k: f.get_tensor(k) for k in f.keys()}, CONFIG_KEY: config}  # noqa: SIM118


def _read_torch(path: str) -> Any:
    if _is_unsafe_allowed():
        return torch.load(path, map_location="cpu", weights_only=False)
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 6):
        raise FileError(
            f"{path} is not read: checkpoints can make PyTorch {torch.__version__} run code "
            f"(CVE-2025-32434). Update it to 2.6 or newer. {_OPT_IN}"
        )
    if version < (2, 10):
        logger.warning(
            f"Checkpoints can corrupt the memory of PyTorch {torch.__version__} (CVE-2026-24747): "
            "before you read one that you do not trust, update it to 2.10 or newer"
        )
    named: list[Any] = [(value, name) for name, value in {**_PLAIN, **_MMENGINE}.items()]
    try:
        with torch.serialization.safe_globals(named):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as e:
        # Only PyTorch's words tell a file that is refused from one that is damaged.
        refused = re.search(
            r"GLOBAL (\S+)|(TorchScript)|(?:Trying to|Can only) .*(?:function|got) (\S+)", str(e)
        )
        if refused is None:
            raise
        raise _RefusedError(next(filter(None, refused.groups()))) from e


class _DType:
    """Stands in for `numpy.dtype` in a pickle: numbers only, in either byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d+", name):
            raise _RefusedError(f"an array of {name!r}")
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
        raise _RefusedError("an array of objects")
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
_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "builtins.bytes": _no_bytes,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
}
for _core in ("core", "_core"):  # NumPy 1 and 2
    _PLAIN[f"numpy.{_core}.multiarray._reconstruct"] = _Array
    _PLAIN[f"numpy.{_core}.multiarray.scalar"] = _scalar
    _PLAIN[f"numpy.{_core}.numeric._frombuffer"] = _from_buffer


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[f"{module}.{name}"]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _read_pickle(path: str) -> Any:
    with open(path, "rb") as f:
        if _is_unsafe_allowed():
            return pickle.load(f, encoding="latin1")  # Caffe2's are of Python 2
        return _arrays(_PlainUnpickler(f, encoding="latin1").load())


def _arrays(value: Any) -> Any:
    """The same containers with arrays instead of what stood in for them."""
    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_arrays(v) for v in value)
    return value.array if isinstance(value, _Array) else value


# What MMEngine keeps beside the weights is read over.


class _Log:
    """Stands in for its `HistoryBuffer`, the logs of a run."""


def _no_method(*_: Any) -> None:
    """Stands in for `getattr`, by which the methods of `HistoryBuffer` are written."""


_MMENGINE: dict[str, Callable[..., Any]] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Log,
    "__builtin__.getattr": _no_method,
    "builtins.getattr": _no_method,
}


_READERS = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".pyth": _read_torch,
    ".pkl": _read_pickle,
    ".safetensors": _read_safetensors,
}
