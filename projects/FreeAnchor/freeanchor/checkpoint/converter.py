"""What the converters of all formats share: renaming, the config, the check against the model."""

import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from .. import modeling  # noqa: F401  # registers what the configs name
from ..config import CONFIGS, merge_options, read_config
from ..errors import FileError, shorten

__all__ = ["MASK_HEAD", "Converted", "Converter", "is_counter", "numbered"]

logger = logging.getLogger(__name__)

BACKBONE = "backbone.bottom_up."
# Of models that find masks, which find the same boxes without it.
MASK_HEAD = "roi_heads.mask_head."
NUM_CLASSES = "MODEL.RETINANET.NUM_CLASSES"
# The anchors of a location, as in Base-FreeAnchor.yaml. Detectron2 orders them by size first, the
# others by aspect ratio.
RATIOS, NUM_SIZES = [0.5, 1.0, 2.0], 3
NUM_ANCHORS = len(RATIOS) * NUM_SIZES
# Whether blocks are bottlenecks, and their number in each stage: the depth of a ResNet.
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


class Converted(NamedTuple):
    """Weights in Detectron2's names.

    Attributes:
        format: what they were recognised as.
        weights: tensors by the names of `FreeAnchor.state_dict()`: all of them, or those of the
            backbone for an ImageNet model.
        config: the config keys that they need, beyond those of `Base-FreeAnchor.yaml`.
    """

    format: str
    weights: dict[str, Tensor]
    config: dict[str, Any]

    def build_config(self) -> CfgNode:
        """The whole config of these weights."""
        cfg = read_config(CONFIGS / "Base-FreeAnchor.yaml")
        merge_options(cfg, [x for item in self.config.items() for x in item])
        return cfg


class Converter:
    """What the formats share: rename all tensors, derive the config, compare with its model."""

    format: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]  # re.sub, one after another

    def __init__(self, state: dict[str, Any], meta: dict[str, Any], source: str) -> None:
        self.meta = meta
        self.source = source
        counters = [k for k in state if is_counter(k)]
        if counters:
            logger.info(f"{source}: left out {len(counters)} counters of batches")
        self.weights: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}  # from the new name to the old one
        for name, tensor in state.items():
            if is_counter(name):
                continue
            if not isinstance(tensor, Tensor | np.ndarray):
                raise self.error(f"{name} is a {type(tensor).__name__}, not a tensor")
            new = name
            for pattern, replacement in self.rules:
                new = re.sub(pattern, replacement, new)
            self.weights[new] = torch.as_tensor(tensor)
            self.origin[new] = name

    def convert(self) -> Converted:
        converted = Converted(self.format, self.weights, self.adapt())
        self.check(converted)
        logger.info(f"{self.source}: {self.format}")
        return converted

    def adapt(self) -> dict[str, Any]:
        """Change what names do not change, and return the config keys."""
        raise NotImplementedError

    def error(self, message: str) -> FileError:
        return FileError(f"{self.source} was taken for {self.format}, but {message}")

    def shape(self, name: str) -> torch.Size:
        if name not in self.weights:
            raise self.error(f"it lacks what Detectron2 calls {name}")
        return self.weights[name].shape

    def leave_out(self, names: list[str], reason: str) -> None:
        for name in names:
            del self.weights[name]
        if names:
            originals = ", ".join(self.origin[name] for name in names)
            logger.info(f"{self.source}: left out {originals}: {reason}")

    def check(self, converted: Converted) -> None:
        """Compare all names and shapes with those of the model that the config builds."""
        cfg = converted.build_config()
        cfg.MODEL.DEVICE = "meta"  # no memory, no time
        with torch.device("meta"):
            expected = {k: v.shape for k, v in build_model(cfg).state_dict().items()}
        if NUM_CLASSES not in converted.config:
            expected = {k: v for k, v in expected.items() if k.startswith(BACKBONE)}
        found = {k: v.shape for k, v in converted.weights.items()}
        problems = {
            "unknown": [self.origin[k] for k in found.keys() - expected.keys()],
            "missing, by Detectron2's names": list(expected.keys() - found.keys()),
            "of another shape than in the rest of the model": [
                f"{self.origin[k]} {tuple(found[k])} instead of {tuple(expected[k])}"
                for k in found.keys() & expected.keys()
                if found[k] != expected[k]
            ],
        }
        if any(problems.values()):
            raise self.error(
                "its tensors are not those of such a model; "
                + "; ".join(f"{k}: {shorten(sorted(v))}" for k, v in problems.items() if v)
            )

    def resnet_config(self) -> dict[str, Any]:
        blocks = tuple(
            len({k.split(".")[3] for k in self.weights if k.startswith(f"{BACKBONE}res{stage}.")})
            for stage in range(2, 6)
        )
        is_bottleneck = f"{BACKBONE}res2.0.conv3.weight" in self.weights
        if (is_bottleneck, blocks) not in _DEPTHS:
            raise self.error(f"no ResNet has stages of {blocks} such blocks")
        last = self.shape(f"{BACKBONE}res2.0.conv{3 if is_bottleneck else 2}.weight")
        middle = self.shape(f"{BACKBONE}res2.0.conv2.weight")
        config = {
            "MODEL.RESNETS.DEPTH": _DEPTHS[is_bottleneck, blocks],
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.shape(f"{BACKBONE}stem.conv1.weight")[0],
            "MODEL.RESNETS.RES2_OUT_CHANNELS": last[0],
        }
        if is_bottleneck:
            config["MODEL.RESNETS.NUM_GROUPS"] = middle[0] // middle[1]
            config["MODEL.RESNETS.WIDTH_PER_GROUP"] = middle[1]
        return config

    def detector_config(self) -> dict[str, Any]:
        num_deltas = self.shape("head.bbox_pred.weight")[0]
        num_logits = self.shape("head.cls_score.weight")[0]
        if num_deltas != 4 * NUM_ANCHORS or num_logits % NUM_ANCHORS:
            raise self.error(f"it has {num_deltas / 4:g} anchors per location, not {NUM_ANCHORS}")
        out_channels, in_channels = self.shape("backbone.top_block.p6.weight")[:2]
        return {
            **self.resnet_config(),
            "MODEL.FPN.OUT_CHANNELS": out_channels,
            "MODEL.FREEANCHOR.P6_IN_FEATURE": "p5" if in_channels == out_channels else "res5",
            "MODEL.RETINANET.NUM_CONVS": sum(
                bool(re.fullmatch(r"head\.cls_subnet\.\d+\.weight", k)) for k in self.weights
            ),
            NUM_CLASSES: num_logits // NUM_ANCHORS,
        }

    def order_anchors_by_size(self) -> None:
        """From the order of the channels that all but Detectron2 have."""
        for name in ("head.cls_score", "head.bbox_pred"):
            for kind in (".weight", ".bias"):
                if name + kind in self.weights:
                    channels = self.weights[name + kind]
                    channels = channels.unflatten(0, (len(RATIOS), NUM_SIZES, -1))
                    self.weights[name + kind] = channels.transpose(0, 1).flatten(0, 2).contiguous()


def is_counter(name: str) -> bool:
    """Whether it counts the batches that a batch norm has seen: of no use to a frozen one."""
    return name.endswith(".num_batches_tracked")


def numbered(template: str, factor: int = 1, offset: int = 0) -> Callable[[re.Match[str]], str]:
    """A replacement for `re.sub` that puts the number of the first group into a template."""
    return lambda match: template.format(factor * int(match[1]) + offset)
