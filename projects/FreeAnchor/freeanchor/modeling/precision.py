"""Dtype and memory layout of convolutions, by the keys of the config and the device."""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode

from ..errors import FreeAnchorError

__all__ = ["Precision", "bfloat16_instructions", "choose_precision", "is_channels_last"]


class Precision(NamedTuple):
    """The dtype of convolutions, and why it is that."""

    dtype: torch.dtype
    reason: str


def bfloat16_instructions() -> str:
    """The instructions of this CPU that make bfloat16 faster than float32: their name, or "".

    Without them PyTorch computes in bfloat16 too, but more slowly than in float32.
    """
    # Private, and younger than the oldest PyTorch that is supported.
    for name, question in (
        ("AMX", "_is_amx_tile_supported"),
        ("AVX512-BF16", "_is_avx512_bf16_supported"),
    ):
        if hasattr(torch.cpu, question) and getattr(torch.cpu, question)():
            return name
    return ""


def choose_precision(cfg: CfgNode, enabled: bool) -> Precision:
    """Choose the dtype of convolutions by `SOLVER.AMP.PRECISION` and the device.

    Args:
        cfg: config of the run.
        enabled: `SOLVER.AMP.ENABLED` for training, `TEST.AMP.ENABLED` for inference.

    Raises:
        FreeAnchorError: the key has an unknown value, or the GPU has no bfloat16.
    """
    wanted = cfg.SOLVER.AMP.PRECISION
    if wanted not in ("auto", "bfloat16", "float16"):
        raise FreeAnchorError(
            f"SOLVER.AMP.PRECISION must be auto, bfloat16 or float16, got {wanted!r}"
        )
    if not enabled:
        return Precision(torch.float32, "AMP.ENABLED is False")
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        return _choose_on_cpu(wanted)
    if wanted == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise FreeAnchorError(
                "SOLVER.AMP.PRECISION bfloat16: this GPU cannot compute in it, set float16"
            )
        return Precision(torch.bfloat16, "SOLVER.AMP.PRECISION says")
    return Precision(torch.float16, "AMP.ENABLED is True")


def _choose_on_cpu(wanted: str) -> Precision:
    instructions = bfloat16_instructions()
    if wanted == "float16":  # of a run that was on a GPU before
        return Precision(torch.float32, "SOLVER.AMP.PRECISION float16 is for GPUs")
    if instructions:
        return Precision(torch.bfloat16, f"the CPU has {instructions}")
    if wanted == "bfloat16":
        return Precision(
            torch.bfloat16,
            "SOLVER.AMP.PRECISION says; slow, as the CPU has neither AMX nor AVX512-BF16",
        )
    return Precision(torch.float32, "the CPU has neither AMX nor AVX512-BF16")


def is_channels_last(cfg: CfgNode, automatic: bool) -> bool:
    """Whether images and weights are to be NHWC in memory, by `MODEL.MEMORY_FORMAT`.

    Args:
        cfg: config of the run.
        automatic: what "auto" stands for.

    Raises:
        FreeAnchorError: the key has an unknown value.
    """
    wanted = cfg.MODEL.MEMORY_FORMAT
    if wanted not in ("auto", "contiguous", "channels_last"):
        raise FreeAnchorError(
            f"MODEL.MEMORY_FORMAT must be auto, contiguous or channels_last, got {wanted!r}"
        )
    return automatic if wanted == "auto" else wanted == "channels_last"
