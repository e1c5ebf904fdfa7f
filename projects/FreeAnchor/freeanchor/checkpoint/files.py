"""Checkpoint files from anywhere: read without running what may be in them.

Pickle, and with it PyTorch's and Detectron2's checkpoints, can call any function while it is read.
Here, tensors, arrays and plain containers are all that a file can make, unless the user allows
more, see :mod:`freeanchor.config`.
"""

import contextlib
import json
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import OPT_IN, is_unsafe_allowed
from ..errors import FileError, check_folder, first_line
from . import unpickle

__all__ = [
    "CLASS_NAMES",
    "CONFIG_KEY",
    "check_checkpoint_path",
    "config_beside",
    "find",
    "is_whole",
    "read_checkpoint",
    "remove_unfinished",
    "replacing",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

# Entry of a checkpoint: the config keys that its weights need, see `freeanchor.checkpoint.convert`.
CONFIG_KEY = "freeanchor_config"
_HEURISTICS = "?matching_heuristics="
# The one among them that names the classes.
CLASS_NAMES = "MODEL.FREEANCHOR.CLASS_NAMES"
_UNFINISHED = ".unfinished"
# What a file holds may take more memory than the file: tied weights, small headers.
_MOST_TIMES_LARGER = 10
_ALWAYS_ALLOWED = 2**24


def wants_heuristics(path: str) -> bool:
    """Whether a `MODEL.WEIGHTS` ends in `?matching_heuristics=True`, as Detectron2's may."""
    return path.endswith(f"{_HEURISTICS}True")


def find(path: str) -> str:
    """The local file of what `MODEL.WEIGHTS` takes; it is downloaded if need be.

    Args:
        path: a file, http(s)://, detectron2://, catalog:// or mmdet://, possibly followed by
            `?matching_heuristics=True`.

    Raises:
        FileError: there is no such file, or it cannot be downloaded.
    """
    path = path.removesuffix(f"{_HEURISTICS}True").removesuffix(f"{_HEURISTICS}False")
    try:
        local: str = PathManager.get_local_path(path)
    except FileError:
        raise
    except Exception as e:  # of the catalogue, the network or the disk
        raise FileError(f"{path} cannot be found: {e}") from e
    if os.path.isdir(local):
        raise FileError(f"{local} is a folder: name the file with the weights in it")
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
        if not is_unsafe_allowed():
            raise FileError(f"{path}: only {', '.join(_READERS)} are read as weights. {OPT_IN}")
        read = _read_torch
    try:
        checkpoint = read(path)
    except FileError:
        raise
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e}") from e
    except unpickle.RefusedError as e:
        raise FileError(
            f"{path} holds {e}, and not only tensors and plain containers, so that reading it "
            f"could run code. {OPT_IN}"
        ) from e
    except Exception as e:  # whatever a parser makes of bytes that are not what they should be
        raise FileError(
            f"{path} is damaged, cut off or of another type than its name says ({first_line(e)}): "
            "remove it, and get it again from where it came from"
        ) from e
    if not is_unsafe_allowed():
        _check_size(path, _num_bytes(checkpoint, set()))
    if not isinstance(checkpoint, dict):
        raise FileError(f"{path} holds one {type(checkpoint).__name__}, not tensors with names")
    if not _is_config(checkpoint.get(CONFIG_KEY, {})):
        raise FileError(f"{path} is damaged: the config keys in it are none")
    return checkpoint


def _is_config(value: Any) -> bool:
    """Whether an entry can be config keys, among them names as names of classes."""
    if not isinstance(value, dict):
        return False
    names = value.get(CLASS_NAMES, [])
    return isinstance(names, list) and all(isinstance(x, str) for x in (*value, *names))


def _check_size(path: str, num_bytes: int) -> None:
    """Refuse what would fill the memory from a small file: no format here compresses tensors."""
    limit = _MOST_TIMES_LARGER * os.path.getsize(path) + _ALWAYS_ALLOWED
    if num_bytes > limit:
        raise FileError(
            f"{path} would take {num_bytes / 2**20:.0f} MiB of memory, though the file has only "
            f"{os.path.getsize(path) / 2**20:.1f}: it is damaged or made to do harm. {OPT_IN}"
        )


def _num_bytes(value: Any, seen: set[int]) -> int:
    """The size of all tensors and arrays in containers, as if each had its own memory."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()  # sparse ones have no nbytes
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(_num_bytes(v, seen) for v in value)


def config_beside(path: Path) -> Path | None:
    """The config of weights: of the same name, or the `config.yaml` of a run; None without."""
    beside = (path.with_suffix(".yaml"), path.with_name("config.yaml"))
    return next((x for x in beside if x.is_file()), None)


def check_checkpoint_path(path: Path) -> None:
    """Find out before any work whether :func:`write_checkpoint` can write there.

    Raises:
        FileError: another suffix than those that it writes, or its folder cannot be one.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise FileError(f"{path}: weights are written as .pth or .safetensors")
    check_folder(path.parent)


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
    check_checkpoint_path(path)
    with replacing(path) as unfinished:
        if path.suffix == ".pth":
            torch.save({"model": model, "__author__": "FreeAnchor", CONFIG_KEY: config}, unfinished)
        else:
            # Copies: safetensors has no views and no two names of one memory.
            tensors = {k: v.detach().cpu().clone().contiguous() for k, v in model.items()}
            content = save(tensors, {"format": "pt", CONFIG_KEY: json.dumps(config)})
            unfinished.write(content)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file as a whole or not at all, also where the machine loses its power meanwhile.

    Args:
        path: the file, whose folder is made if need be.

    Yields:
        A file that takes its place, once it is on the disk.

    Raises:
        FileError: it cannot be written; nothing is left of it, and `path` is as it was.
    """
    path = Path(path)
    check_folder(path.parent)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # of the new name
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as e:
        # PyTorch's writer hides the reason behind an error of its own.
        reason = e.__context__ if isinstance(e.__context__, OSError) else e
        raise FileError(f"{path} cannot be written: {reason}") from e
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def remove_unfinished(folder: str | Path) -> None:
    """Remove what :func:`replacing` could not, because its process was killed."""
    for path in Path(folder).glob(f"*.*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def is_whole(path: str | Path) -> bool:
    """Whether a PyTorch file (.pth) is there and as it was written, by its checksums."""
    try:
        with zipfile.ZipFile(path) as f:
            return f.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return False


def _read_safetensors(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
        config = {k: json.loads(metadata[k]) for k in (CONFIG_KEY,) if k in metadata}
        return {"model": {k: f.get_tensor(k) for k in f.keys()}, **config}  # noqa: SIM118


def _read_torch(path: str) -> Any:
    if is_unsafe_allowed():
        return torch.load(path, map_location="cpu", weights_only=False)
    if zipfile.is_zipfile(path):  # PyTorch's own are not compressed, but would be read
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(x.file_size for x in archive.infolist()))
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 6):
        raise FileError(
            f"{path} is not read: checkpoints can make PyTorch {torch.__version__} run code "
            f"(CVE-2025-32434). Update it to 2.6 or newer. {OPT_IN}"
        )
    if version < (2, 10):
        logger.warning(
            f"Checkpoints can corrupt the memory of PyTorch {torch.__version__} (CVE-2026-24747): "
            "before you read one that you do not trust, update it to 2.10 or newer"
        )
    named: list[Any] = [
        (value, name) for name, value in {**unpickle.PLAIN, **unpickle.MMENGINE}.items()
    ]
    try:
        with torch.serialization.safe_globals(named):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as e:
        # Only PyTorch's words tell a file that is refused from one that is damaged.
        refused = re.search(
            r"GLOBAL (\S+)|(TorchScript)|(?:Trying to|Can only) .*(?:function|got) (\S+)", str(e)
        )
        if refused is None:
            # What PyTorch says first is how to read it unsafely.
            raise ValueError(re.split(r"WeightsUnpickler error: ", str(e))[-1].strip()) from e
        raise unpickle.RefusedError(next(filter(None, refused.groups()))) from e


def _read_pickle(path: str) -> Any:
    with open(path, "rb") as f:
        if is_unsafe_allowed():
            return pickle.load(f, encoding="latin1")  # Caffe2's are of Python 2
        return unpickle.load(f)


_READERS = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".pyth": _read_torch,
    ".pkl": _read_pickle,
    ".safetensors": _read_safetensors,
}
