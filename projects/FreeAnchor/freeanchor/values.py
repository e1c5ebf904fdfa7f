"""The values of a config: what they may be, and which of them something cannot be built of."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from .config import value_of
from .errors import FreeAnchorError

__all__ = ["building", "check_values"]

# Outside of it, nothing is trained or found, silently or after the first work is done.
_RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        (
            *("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATION_STEPS"),
            *("INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST", "TEST.PRECISE_BN.NUM_ITER"),
            *("MODEL.RETINANET.NUM_CONVS", "MODEL.RETINANET.TOPK_CANDIDATES_TEST"),
            *("MODEL.FPN.OUT_CHANNELS", "MODEL.RESNETS.STEM_OUT_CHANNELS"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", "MODEL.RESNETS.WIDTH_PER_GROUP"),
            *("MODEL.RESNETS.NUM_GROUPS", "MODEL.ROI_BOX_HEAD.FC_DIM"),
            *("MODEL.ROI_BOX_HEAD.CONV_DIM", "MODEL.ROI_MASK_HEAD.CONV_DIM"),
        ),
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        (
            *("SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR"),
            *("SOLVER.BASE_LR", "SOLVER.BACKBONE_LR_FACTOR", "SOLVER.BIAS_LR_FACTOR"),
            *("SOLVER.GAMMA", "SOLVER.WEIGHT_DECAY", "DATALOADER.NUM_WORKERS"),
            "DATALOADER.REPEAT_THRESHOLD",
            *("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "TEST.AUG.MIN_SIZES"),
            *("TEST.AUG.MAX_SIZE_RATIO", "TEST.EARLY_STOPPING"),
            *("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "MODEL.FREEANCHOR.BBOX_REG_WEIGHT"),
        ),
    ),
    (
        "above 0",
        lambda x: x > 0,
        (
            *("MODEL.PIXEL_STD", "MODEL.ANCHOR_GENERATOR.SIZES"),
            *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "MODEL.RETINANET.BBOX_REG_WEIGHTS"),
            "TEST.AUG.MAX_SIZE",
        ),
    ),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("SOLVER.EMA_DECAY", "SOLVER.MOMENTUM")),
    ("above 0 and below 1", lambda x: 0 < x < 1, ("MODEL.RETINANET.PRIOR_PROB",)),
    (
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
        (
            *("MODEL.RETINANET.FOCAL_LOSS_ALPHA", "MODEL.RETINANET.NMS_THRESH_TEST"),
            *("MODEL.ROI_HEADS.NMS_THRESH_TEST", "MODEL.RPN.NMS_THRESH"),
        ),
    ),
    ("below 2 ** 32", lambda x: x < 2**32, ("SEED",)),
)
_CROPS = ("relative", "relative_range", "absolute", "absolute_range")
# Whose code fails at values of a config; a user's own parts keep their tracebacks.
_BUILDERS = {"detectron2", "freeanchor", "fvcore", "timm", "torch", *sys.stdlib_module_names}
_ERRORS = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError)


def check_values(cfg: CfgNode, training: bool) -> None:
    """Refuse numbers with which nothing would be trained or found.

    Args:
        cfg: config of the run.
        training: whether the keys of `SOLVER` matter.

    Raises:
        FreeAnchorError: a value is out of its range; the message has the key.
    """
    for what, is_right, keys in _RANGES:
        for key in keys:
            value = value_of(cfg, key)
            if (training or not key.startswith("SOLVER.")) and not all(map(is_right, _flat(value))):
                raise FreeAnchorError(f"{key} must be {what}, got {value}")
    for key in ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"):
        if not all(levels := value_of(cfg, key)):
            raise FreeAnchorError(f"{key} must have a number for each level, got {levels}")
    if len(weights := cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS) != 4:
        raise FreeAnchorError(f"MODEL.RETINANET.BBOX_REG_WEIGHTS must be four, got {weights}")
    # A key of Detectron2's main branch.
    if (precision := cfg.get("FLOAT32_PRECISION", "")) not in ("", "highest", "high", "medium"):
        raise FreeAnchorError(
            f"FLOAT32_PRECISION must be highest, high, medium or empty, got {precision}"
        )
    if training and cfg.INPUT.CROP.ENABLED:
        _check_crop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and sorted(sizes) != list(sizes):
        raise FreeAnchorError(f"INPUT.MIN_SIZE_TRAIN must be the smaller size first, got {sizes}")
    if not sizes:
        raise FreeAnchorError("INPUT.MIN_SIZE_TRAIN is empty: name a size of the shorter side")


def _check_crop(kind: str, size: Sequence[float]) -> None:
    if kind not in _CROPS:
        raise FreeAnchorError(f"INPUT.CROP.TYPE must be one of {', '.join(_CROPS)}, got {kind}")
    is_share = kind.startswith("relative")
    if len(size) != 2 or not all(0 < x <= 1 if is_share else x >= 1 for x in size):
        what = "shares above 0 and up to 1" if is_share else "numbers of pixels"
        raise FreeAnchorError(f"INPUT.CROP.SIZE must be two {what} with {kind}, got {size}")
    if kind == "absolute_range" and size[0] > size[1]:
        raise FreeAnchorError(f"INPUT.CROP.SIZE must be the smaller size first, got {size}")


@contextmanager
def building(what: str, cfg: CfgNode, *parts: str) -> Iterator[None]:
    """Name the keys of a config that something cannot be built of.

    Args:
        what: is built.
        cfg: config of the run.
        parts: of the config that it is built of, as `SOLVER`.

    Raises:
        FreeAnchorError: instead of errors of Detectron2, PyTorch and this package about a value.
    """
    try:
        yield
    except _ERRORS as e:
        frames = list(traceback.walk_tb(e.__traceback__))
        if not {x.f_globals.get("__name__", "").split(".")[0] for x, _ in frames} <= _BUILDERS:
            raise
        last = traceback.extract_tb(e.__traceback__)[-1]
        text = str(e) or str(last.line)
        keys = [key for part in parts for key in _suspects(cfg, part, text)]
        named = ", ".join(f"{key} {value_of(cfg, key)!r}" for key in keys)
        raise FreeAnchorError(
            f"{what} cannot be built of {named or ' and '.join(parts)}: {type(e).__name__}: {text} "
            f"({Path(last.filename).name}, line {last.lineno})"
        ) from e


def _suspects(cfg: CfgNode, part: str, text: str) -> Iterator[str]:
    """The keys that an error may be about: it has their value, or their name as an argument."""
    words = {x.strip(".") for x in re.findall(r"[\w.+-]+", text)}
    names = {x.lower() for x in words}
    for key, value in cfg[part].items():
        if isinstance(value, CfgNode):
            yield from (f"{part}.{x}" for x in _suspects(cfg[part], key, text))
            continue
        name = key.lower()
        is_named = name in names or any("_" in x and x in name for x in names)
        if is_named or any(_is_telling(x) and str(x) in words for x in _flat(value)):
            yield f"{part}.{key}"


def _is_telling(value: Any) -> bool:
    """Whether a value stands for itself: neither the length of a list nor what many keys have."""
    return isinstance(value, str) or (isinstance(value, int | float) and value not in range(10))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for x in value:
            yield from _flat(x)
    else:
        yield value
