"""Weights of other projects in Detectron2's format.

Formats are recognised from the names of the tensors, see :mod:`freeanchor.checkpoint.formats`. What
the weights need of the model comes with them as config keys, which
:class:`freeanchor.checkpoint.Checkpointer` compares with the config in use.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from ..config import read_config
from ..errors import FileError
from .converter import Converted, is_counter
from .described import is_described_here
from .files import (
    CONFIG_KEY,
    check_checkpoint_path,
    config_beside,
    find,
    read_checkpoint,
    replacing,
    write_checkpoint,
)
from .formats import CONVERTERS
from .thresholds import copy_thresholds
from .weights import MOMENTUM, find_weights

__all__ = ["convert", "convert_file", "take_average", "to_detectron2"]

logger = logging.getLogger(__name__)


def to_detectron2(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """Bring what a file holds into the form that Detectron2's checkpointer loads.

    Args:
        checkpoint: see :func:`freeanchor.checkpoint.read_checkpoint`.
        source: the name of the file.

    Returns:
        A dictionary with "model", the tensors by name. Weights of other projects are converted and
        come with the config keys that they need; all else is taken for Detectron2's own.

    Raises:
        FileError: see :func:`convert`.
    """
    weights = find_weights(checkpoint, source)
    converted = _convert(weights, checkpoint, source)
    if converted is not None:
        return {"model": converted.weights, CONFIG_KEY: converted.config}
    if "model_state" in checkpoint:
        weights = {k: v for k, v in weights.items() if not is_counter(k)}
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    if "model" in checkpoint:
        return checkpoint
    if Path(source).suffix.lower() != ".pkl":
        return {"model": weights}
    weights = {k: v for k, v in weights.items() if not k.endswith(MOMENTUM)}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def take_average(checkpoint: dict[str, Any], source: str) -> None:
    """Put the average of the weights (`SOLVER.EMA_DECAY`) in their place, if there is one.

    Args:
        checkpoint: see :func:`freeanchor.checkpoint.read_checkpoint`; changed.
        source: the name of the file.
    """
    average = checkpoint.get("ema")
    if isinstance(average, dict) and "n_averaged" in average:  # others' may be anything
        logger.info(f"Taking the average of the weights (SOLVER.EMA_DECAY) in {source}")
        del checkpoint["ema"], average["n_averaged"]
        checkpoint["model"] = {k.removeprefix("module."): v for k, v in average.items()}


def convert(checkpoint: dict[str, Any], source: str) -> Converted | None:
    """Convert the weights of another project.

    Args:
        checkpoint: see :func:`freeanchor.checkpoint.read_checkpoint`.
        source: the name of the file, for messages.

    Returns:
        The converted weights, or None if the format is not one of the known others.

    Raises:
        FileError: tensors are unknown, missing or of the wrong shape, which the message lists, or
            the model has something that FreeAnchor's configs cannot say; or see
            :func:`freeanchor.checkpoint.weights.find_weights`.
    """
    return _convert(find_weights(checkpoint, source), checkpoint, source)


def _convert(weights: dict[str, Any], checkpoint: dict[str, Any], source: str) -> Converted | None:
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    meta = checkpoint.get("meta")
    for marker, converter in CONVERTERS.items():
        if marker in weights:
            return converter(weights, meta if isinstance(meta, dict) else {}, source).convert()
    return None


def convert_file(source: str, out: Path) -> None:
    """Convert a checkpoint and write it, with its config beside it.

    Raises:
        FileError: see :func:`convert`; or the weights are Detectron2's, but need its heuristics;
            or `out` cannot be written, which is found out first.
    """
    check_checkpoint_path(out)
    path = find(source)
    if out.exists() and out.samefile(path):
        raise FileError(f"{out} is the source: give another name")
    checkpoint = read_checkpoint(path)
    take_average(checkpoint, path)
    loadable = to_detectron2(checkpoint, path)
    if loadable.get("matching_heuristics"):
        raise FileError(f"{path} has no names of Detectron2 yet: load it by MODEL.WEIGHTS")
    weights = {k: torch.as_tensor(v) for k, v in loadable["model"].items()}
    config = loadable.get(CONFIG_KEY, {})
    if is_described_here(config):
        # Trained here, or by Detectron2: the weights do not say all that they need of the model.
        own = config_beside(Path(path))
        cfg = read_config(own) if own else None
    else:
        cfg = Converted("", weights, config).build_config()
    write_checkpoint(out, weights, config)
    copy_thresholds(Path(path).parent, out.parent, weights)
    if cfg is None:
        logger.info(
            f"{path} is of no format that is converted: wrote its {len(weights)} tensors to {out} "
            "as they are, and no config"
        )
        return
    cfg.MODEL.WEIGHTS = str(out)
    with replacing(out.with_suffix(".yaml")) as f:
        f.write(cfg.dump().encode())
    logger.info(
        f"Wrote {len(weights)} tensors to {out}, their config to {out.with_suffix('.yaml')}"
    )
