"""The tensors of a checkpoint, wherever the file has them, and whether they can be weights."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError, shorten
from .files import CONFIG_KEY

__all__ = ["MOMENTUM", "find_weights"]

logger = logging.getLogger(__name__)

# The entries that projects keep them in: PyTorch's habit, Detectron2, pycls and Caffe2.
_ENTRIES = ("state_dict", "model", "model_state", "blobs")
MOMENTUM = "_momentum"  # ends the names of what Caffe2's optimiser keeps beside the weights


def find_weights(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """Find the tensors by name: an entry of the checkpoint, or all of it.

    Args:
        checkpoint: see :func:`freeanchor.checkpoint.read_checkpoint`.
        source: the name of the file.

    Returns:
        Tensors and arrays by their names in the file: the dictionary itself, which may say of which
        versions of their modules they are.

    Raises:
        FileError: they are none, or hold values with which a model would compute nonsense.
    """
    entry = next((x for x in _ENTRIES if x in checkpoint), None)
    weights = checkpoint if entry is None else checkpoint[entry]
    if not isinstance(weights, dict):
        raise FileError(f"{source} holds one {type(weights).__name__} as {entry!r}, and no weights")
    if not weights:
        raise FileError(f"{source} holds no tensors")
    faults = [f"{k} is {fault}" for k, v in weights.items() if (fault := _fault(k, v))]
    if faults:
        raise FileError(
            f"{source} cannot be used as weights: {shorten(faults)}. What counts is its "
            "'state_dict' or 'model', or tensors with names alone"
        )
    # A file of a run here has its average of the weights besides, which is known.
    others = [
        str(k)
        for k, v in checkpoint.items()
        if k != entry and 2 * _count_tensors(v) >= len(weights)
    ]
    if entry is not None and CONFIG_KEY not in checkpoint and others:
        logger.warning(f"{source}: took the weights in {entry!r}, not those in {shorten(others)}")
    return weights


def _fault(name: Any, value: Any) -> str:
    """What is wrong with a tensor, empty if nothing is."""
    if not isinstance(name, str):
        return "no name"
    if name.endswith(MOMENTUM):
        return ""
    if not isinstance(value, Tensor | np.ndarray):
        return f"of type {type(value).__name__}"
    try:
        tensor = torch.as_tensor(value)
    except TypeError:
        return f"an array of {value.dtype}"
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        return "sparse, quantized or without values"
    if tensor.is_floating_point():
        return "" if tensor.float().isfinite().all() else "not finite (NaN or infinite)"
    # Whole numbers may be counters and indices, but as weights want a scale that is not here.
    is_weight = tensor.is_complex() or name.endswith((".weight", ".bias"))
    return f"of {tensor.dtype}" if is_weight else ""


def _count_tensors(value: Any, depth: int = 2) -> int:
    """The number of tensors in a dictionary, or those in it."""
    if isinstance(value, dict) and depth:
        return sum(_count_tensors(x, depth - 1) for x in value.values())
    return int(isinstance(value, Tensor | np.ndarray))
