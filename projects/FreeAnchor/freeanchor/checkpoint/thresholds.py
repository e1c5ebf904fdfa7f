"""Recommended score thresholds: `thresholds.json` beside the weights that they were found with.

An entry names its weights by a checksum of their values, so that it holds for a file of any name
and format with them, and for no others.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileError
from .converter import MASK_HEAD, is_counter
from .files import replacing

__all__ = [
    "Thresholds",
    "checksum",
    "copy_thresholds",
    "describe_scores",
    "read_thresholds",
    "write_thresholds",
]

_FILE = "thresholds.json"


class Thresholds(NamedTuple):
    """Scores above which detections are taken for right ones.

    Attributes:
        dataset: name of the data set that they were found on.
        score: for all classes together.
        classes: for each class, by its name.
    """

    dataset: str
    score: float
    classes: dict[str, float]

    @property
    def reason(self) -> str:
        """Why they apply, for :func:`describe_scores`."""
        return f"with the best F1 on {self.dataset} ({_FILE})"


def describe_scores(scores: float | Mapping[str, float], reason: str) -> str:
    """The end of a sentence that says which scores apply, and why.

    Args:
        scores: of all classes, or by the name of each.
        reason: such as "as given".
    """
    if not isinstance(scores, Mapping):
        return f"{scores:g}, {reason}"
    of_class = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
    return f"those {reason}: {of_class}"


def write_thresholds(
    folder: str | Path, state: Mapping[str, Tensor], thresholds: Thresholds
) -> None:
    """Add the thresholds of weights to those in a folder.

    Args:
        folder: where the weights are.
        state: the tensors of the model by name.
        thresholds: replace those that the weights have there.

    Raises:
        FileError: the file cannot be read or written.
    """
    path = Path(folder) / _FILE
    entries = {**_read(path), _key(state): thresholds}
    content = {key: value._asdict() for key, value in entries.items()}
    with replacing(path) as f:
        f.write(json.dumps(content, indent=1).encode())


def read_thresholds(folder: str | Path, state: Mapping[str, Tensor]) -> Thresholds | None:
    """The thresholds of weights, None where the folder has none of them.

    Args:
        folder: where the weights are.
        state: the tensors of the model by name, as loaded.

    Raises:
        FileError: the file is damaged.
    """
    entries = _read(Path(folder) / _FILE)
    return entries.get(_key(state)) if entries else None


def copy_thresholds(source: str | Path, target: str | Path, state: Mapping[str, Tensor]) -> None:
    """Let thresholds travel with weights from one folder to another, if there are any."""
    thresholds = read_thresholds(source, state)
    if thresholds is not None:
        write_thresholds(target, state, thresholds)


def _read(path: Path) -> dict[str, Thresholds]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        entries = {
            key: Thresholds(
                str(x["dataset"]),
                float(x["score"]),
                {str(name): float(score) for name, score in x["classes"].items()},
            )
            for key, x in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise FileError(f"{path} is damaged ({e!r}): remove it, and evaluate again") from e
    for x in entries.values():
        if not all(math.isfinite(v) and 0 <= v < 1 for v in (x.score, *x.classes.values())):
            raise FileError(f"{path} is damaged: scores are from 0 to 1. Remove it")
    return entries


def _key(state: Mapping[str, Tensor]) -> str:
    """What names weights: what the scores depend on."""
    return checksum({k: v for k, v in state.items() if MASK_HEAD not in k})


def checksum(state: Mapping[str, Tensor]) -> str:
    """Of the values, under whatever order of the names; batch norm's counters do not count."""
    digest = hashlib.sha256()
    # torch.compile puts a name of its own before those of what it compiled.
    tensors = {k.replace("_orig_mod.", ""): v for k, v in state.items() if not is_counter(k)}
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
