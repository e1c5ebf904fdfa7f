"""What a checkpoint says of the config that its weights need: what their shapes do not tell."""

import math
from typing import Any

from detectron2.config import CfgNode

from ..config import value_of
from .files import CLASS_NAMES

__all__ = ["BOX_KEYS", "described_config", "is_described_here", "is_same"]

# What predicted boxes are relative to, which training can learn anew.
BOX_KEYS = (
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.RETINANET.BBOX_REG_WEIGHTS",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
)
# With other values the same weights would be another model, and find something else.
_KEYS = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.FPN.FUSE_TYPE",
    "MODEL.FREEANCHOR.P6_IN_FEATURE",
    "MODEL.FREEANCHOR.P7_RELU",
    "MODEL.FREEANCHOR.INCLUSIVE_CORNERS",
    *BOX_KEYS,
)


def described_config(cfg: CfgNode | None) -> dict[str, Any]:
    """What is written into a checkpoint besides the weights.

    Args:
        cfg: config of the model, or None if it was built without one.

    Returns:
        Keys of the config and their values; the names of the classes only where they are known.
    """
    if cfg is None:
        return {}
    names = list(cfg.MODEL.FREEANCHOR.CLASS_NAMES)
    found = {key: value_of(cfg, key) for key in _KEYS}
    return {**found, **({CLASS_NAMES: names} if names else {})}


def is_described_here(config: dict[str, Any]) -> bool:
    """Whether keys are those of :func:`described_config`, and not of a converted checkpoint."""
    return config.keys() <= {CLASS_NAMES, *_KEYS}


def is_same(a: Any, b: Any) -> bool:
    """Whether two values of a config are equal: numbers but for their rounding as text."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
