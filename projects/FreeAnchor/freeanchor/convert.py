"""Weights of other projects in Detectron2's format: `python -m freeanchor.convert SOURCE OUT`.

Known are RetinaNet and FreeAnchor of MMDetection, FreeAnchor of the paper's repository
(maskrcnn-benchmark), and ImageNet ResNets and ResNeXts of torchvision, timm and OpenMMLab. Formats
are recognised from the names of the tensors. What the weights need of the model comes with them as
config keys, which :class:`freeanchor.checkpoint.Checkpointer` compares with the config in use.
"""

import argparse
import ast
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_model
from detectron2.utils.logger import setup_logger
from torch import Tensor

from . import model  # noqa: F401  # registers what the configs name
from .config import CONFIGS
from .files import (
    CONFIG_KEY,
    FileError,
    find,
    read_checkpoint,
    read_config,
    shorten,
    write_checkpoint,
)

__all__ = ["Converted", "convert", "to_detectron2"]

logger = logging.getLogger("freeanchor.convert")  # also when run as __main__

_BACKBONE = "backbone.bottom_up."
_NUM_CLASSES = "MODEL.RETINANET.NUM_CLASSES"
_FROZEN_BATCH_NORM_EPS = 1e-5
# Whether blocks are bottlenecks, and their number in each stage: the depth of a ResNet.
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
# The anchors of a location, as in Base-FreeAnchor.yaml. Detectron2 orders them by size first, the
# others by aspect ratio.
_RATIOS, _NUM_SIZES = [0.5, 1.0, 2.0], 3
_NUM_ANCHORS = len(_RATIOS) * _NUM_SIZES
_TORCHVISION_PIXELS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
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
        cfg.merge_from_list([x for item in self.config.items() for x in item])
        return cfg


def to_detectron2(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """Bring what a file holds into the form that Detectron2's checkpointer loads.

    Args:
        checkpoint: see :func:`freeanchor.files.read_checkpoint`.
        source: the name of the file.

    Returns:
        A dictionary with "model", the tensors by name. Weights of other projects are converted and
        come with the config keys that they need; all else is taken for Detectron2's own.

    Raises:
        FileError: see :func:`convert`.
    """
    converted = convert(checkpoint, source)
    if converted is not None:
        return {"model": converted.weights, CONFIG_KEY: converted.config}
    if "model_state" in checkpoint:
        weights = {k: v for k, v in checkpoint["model_state"].items() if not _is_counter(k)}
        return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    if "model" in checkpoint:
        return checkpoint
    if not source.endswith(".pkl"):
        return {"model": checkpoint}
    weights = checkpoint.get("blobs", checkpoint)
    weights = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def convert(checkpoint: dict[str, Any], source: str) -> Converted | None:
    """Convert the weights of another project.

    Args:
        checkpoint: see :func:`freeanchor.files.read_checkpoint`.
        source: the name of the file, for messages.

    Returns:
        The converted weights, or None if the format is not one of the known others.

    Raises:
        FileError: tensors are unknown, missing or of the wrong shape, which the message lists, or
            the model has something that FreeAnchor's configs cannot say.
    """
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(state, dict):
        return None
    state = {k.removeprefix("module."): v for k, v in state.items()}
    for marker, converter in _CONVERTERS.items():
        if marker in state:
            return converter(state, checkpoint.get("meta", {}), source).convert()
    return None


class _Converter:
    """What the formats share: rename all tensors, derive the config, compare with its model."""

    format: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]  # re.sub, one after another

    def __init__(self, state: dict[str, Any], meta: dict[str, Any], source: str) -> None:
        self.meta = meta
        self.source = source
        counters = [k for k in state if _is_counter(k)]
        if counters:
            logger.info(f"{source}: left out {len(counters)} counters of batches")
        self.weights: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}  # from the new name to the old one
        for name, tensor in state.items():
            if _is_counter(name):
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
        if _NUM_CLASSES not in converted.config:
            expected = {k: v for k, v in expected.items() if k.startswith(_BACKBONE)}
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
            len({k.split(".")[3] for k in self.weights if k.startswith(f"{_BACKBONE}res{stage}.")})
            for stage in range(2, 6)
        )
        is_bottleneck = f"{_BACKBONE}res2.0.conv3.weight" in self.weights
        if (is_bottleneck, blocks) not in _DEPTHS:
            raise self.error(f"no ResNet has stages of {blocks} such blocks")
        last = self.shape(f"{_BACKBONE}res2.0.conv{3 if is_bottleneck else 2}.weight")
        middle = self.shape(f"{_BACKBONE}res2.0.conv2.weight")
        config = {
            "MODEL.RESNETS.DEPTH": _DEPTHS[is_bottleneck, blocks],
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.shape(f"{_BACKBONE}stem.conv1.weight")[0],
            "MODEL.RESNETS.RES2_OUT_CHANNELS": last[0],
        }
        if is_bottleneck:
            config["MODEL.RESNETS.NUM_GROUPS"] = middle[0] // middle[1]
            config["MODEL.RESNETS.WIDTH_PER_GROUP"] = middle[1]
        return config

    def detector_config(self) -> dict[str, Any]:
        num_deltas = self.shape("head.bbox_pred.weight")[0]
        num_logits = self.shape("head.cls_score.weight")[0]
        if num_deltas != 4 * _NUM_ANCHORS or num_logits % _NUM_ANCHORS:
            raise self.error(f"it has {num_deltas / 4:g} anchors per location, not {_NUM_ANCHORS}")
        out_channels, in_channels = self.shape("backbone.top_block.p6.weight")[:2]
        return {
            **self.resnet_config(),
            "MODEL.FPN.OUT_CHANNELS": out_channels,
            "MODEL.FREEANCHOR.P6_IN_FEATURE": "p5" if in_channels == out_channels else "res5",
            "MODEL.RETINANET.NUM_CONVS": sum(
                bool(re.fullmatch(r"head\.cls_subnet\.\d+\.weight", k)) for k in self.weights
            ),
            _NUM_CLASSES: num_logits // _NUM_ANCHORS,
        }

    def order_anchors_by_size(self) -> None:
        """From the order of the channels that all but Detectron2 have."""
        for name in ("head.cls_score", "head.bbox_pred"):
            for kind in (".weight", ".bias"):
                if name + kind in self.weights:
                    channels = self.weights[name + kind]
                    channels = channels.unflatten(0, (len(_RATIOS), _NUM_SIZES, -1))
                    self.weights[name + kind] = channels.transpose(0, 1).flatten(0, 2).contiguous()


def _is_counter(name: str) -> bool:
    """Whether it counts the batches that a batch norm has seen: of no use to a frozen one."""
    return name.endswith(".num_batches_tracked")


def _numbered(template: str, factor: int = 1, offset: int = 0) -> Callable[[re.Match[str]], str]:
    """A replacement for `re.sub` that puts the number of the first group into a template."""
    return lambda match: template.format(factor * int(match[1]) + offset)


# From torchvision's names.
_RESNET_RULES = (
    (r"^backbone\.bottom_up\.(conv1|bn1)\.", r"backbone.bottom_up.stem.\1."),
    (r"^backbone\.bottom_up\.layer(\d)\.", _numbered("backbone.bottom_up.res{}.", offset=1)),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
)


class _ImageNet(_Converter):
    format = "an ImageNet model, as torchvision's and timm's"
    rules = ((r"^(?!fc\.)", _BACKBONE), *_RESNET_RULES)

    def adapt(self) -> dict[str, Any]:
        self.leave_out([k for k in self.weights if k.startswith("fc.")], "the classes of ImageNet")
        return {
            **_TORCHVISION_PIXELS,
            **self.resnet_config(),
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        }


class _MMDetection(_Converter):
    format = "RetinaNet or FreeAnchor of MMDetection"
    rules = (
        (r"^backbone\.", _BACKBONE),
        *_RESNET_RULES,
        (r"^neck\.lateral_convs\.(\d)\.conv\.", _numbered("backbone.fpn_lateral{}.", offset=3)),
        (r"^neck\.fpn_convs\.([012])\.conv\.", _numbered("backbone.fpn_output{}.", offset=3)),
        (r"^neck\.fpn_convs\.([34])\.conv\.", _numbered("backbone.top_block.p{}.", offset=3)),
        # Every second module of Detectron2's subnets is a ReLU.
        (r"^bbox_head\.cls_convs\.(\d+)\.conv\.", _numbered("head.cls_subnet.{}.", factor=2)),
        (r"^bbox_head\.reg_convs\.(\d+)\.conv\.", _numbered("head.bbox_subnet.{}.", factor=2)),
        (r"^bbox_head\.retina_cls\.", "head.cls_score."),
        (r"^bbox_head\.retina_reg\.", "head.bbox_pred."),
    )

    def adapt(self) -> dict[str, Any]:
        config = {
            **_TORCHVISION_PIXELS,
            **self.detector_config(),
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.FREEANCHOR.P7_RELU": False,
            **self.described_config(),
        }
        self.order_anchors_by_size()
        if config["MODEL.FREEANCHOR.P6_IN_FEATURE"] != "res5":
            # It would be from P5 before or after its last convolution, which no name tells.
            raise self.error("its P6 is not computed from C5 (add_extra_convs='on_input')")
        return config

    def described_config(self) -> dict[str, Any]:
        """What no tensor tells, from the config that MMDetection keeps in its checkpoints."""
        text = self.meta.get("cfg") or self.meta.get("config")
        try:
            settings = _read_assignments(text if isinstance(text, str) else "")
        except SyntaxError:
            settings = {}
        described = settings.get("model")
        if not isinstance(described, dict):
            logger.warning(
                f"{self.source} does not say whether it is FreeAnchor or RetinaNet. If it is "
                'RetinaNet, set MODEL.RETINANET.BBOX_REG_WEIGHTS "(1.0, 1.0, 1.0, 1.0)"'
            )
            return {}
        try:
            return self.read_description(described, settings.get("img_norm_cfg"))
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise self.error(f"the config in it is not that of such a model ({e!r})") from e

    def read_description(self, described: dict[str, Any], pixels: Any) -> dict[str, Any]:
        head = described.get("bbox_head") or {}
        coder = head.get("bbox_coder") or head
        anchors = head.get("anchor_generator") or head
        for key, value, known in (
            ("bbox_coder", coder.get("type") if coder is not head else None, "DeltaXYWHBBoxCoder"),
            ("octave_base_scale", anchors.get("octave_base_scale"), 4),
            ("scales_per_octave", anchors.get("scales_per_octave"), _NUM_SIZES),
            ("ratios", anchors.get("ratios"), _RATIOS),
            ("center_offset", anchors.get("center_offset"), 0.0),
        ):
            if value is not None and value != known:
                raise self.error(f"its config has {key}={value!r}, and only {known!r} is supported")
        config = {
            "MODEL.RETINANET.BBOX_REG_WEIGHTS": tuple(
                round(1 / std, 6) for std in coder.get("target_stds") or (1, 1, 1, 1)
            ),
            "MODEL.RESNETS.STRIDE_IN_1X1": described["backbone"].get("style") == "caffe",
            "MODEL.FREEANCHOR.P7_RELU": bool(described["neck"].get("relu_before_extra_convs")),
        }
        pixels = described.get("data_preprocessor") or pixels
        if pixels:
            is_rgb = pixels.get("bgr_to_rgb", pixels.get("to_rgb", True))
            config["INPUT.FORMAT"] = "RGB" if is_rgb else "BGR"
            config["MODEL.PIXEL_MEAN"] = [float(x) for x in pixels["mean"]]
            config["MODEL.PIXEL_STD"] = [float(x) for x in pixels["std"]]
        return config


def _read_assignments(text: str) -> dict[str, Any]:
    """The literals (and `dict(...)` of literals) that Python source assigns; nothing is run."""

    def value(node: ast.expr | None) -> Any:
        match node:
            case ast.Call(func=ast.Name(id="dict")):
                return {k.arg: value(k.value) for k in node.keywords}
            case ast.Dict():
                return {value(k): value(v) for k, v in zip(node.keys, node.values)}
            case ast.List() | ast.Tuple():
                return [value(x) for x in node.elts]
        try:
            return ast.literal_eval(node) if node else None
        except ValueError:
            return None  # no literal

    return {
        target.id: value(statement.value)
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


class _Official(_Converter):
    format = "FreeAnchor of the paper's repository"
    rules = (
        (r"^backbone\.body\.(stem\.)?", _BACKBONE),
        *_RESNET_RULES,
        (r"^backbone\.fpn\.fpn_inner(\d)\.", _numbered("backbone.fpn_lateral{}.", offset=1)),
        (r"^backbone\.fpn\.fpn_layer(\d)\.", _numbered("backbone.fpn_output{}.", offset=1)),
        (r"^backbone\.fpn\.top_blocks\.", "backbone.top_block."),
        (r"^rpn\.head\.cls_tower\.", "head.cls_subnet."),
        (r"^rpn\.head\.bbox_tower\.", "head.bbox_subnet."),
        (r"^rpn\.head\.cls_logits\.", "head.cls_score."),
        (r"^rpn\.head\.bbox_pred\.", "head.bbox_pred."),
    )

    def adapt(self) -> dict[str, Any]:
        for name, tensor in self.weights.items():
            if name.endswith(".running_var"):  # used without the eps that Detectron2 adds to it
                self.weights[name] = tensor - _FROZEN_BATCH_NORM_EPS
        config = {
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
            "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
            **self.detector_config(),
            "MODEL.FREEANCHOR.INCLUSIVE_CORNERS": True,
            "MODEL.ANCHOR_GENERATOR.NAME": "RoundedAnchorGenerator",
            "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
            "MODEL.RETINANET.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        }
        self.order_anchors_by_size()
        # Its ResNets are MSRA's, its ResNeXts Facebook's.
        config["MODEL.RESNETS.STRIDE_IN_1X1"] = config.get("MODEL.RESNETS.NUM_GROUPS", 1) == 1
        self.leave_out(self.check_anchors(config), "compared with the computed anchors")
        return config

    def check_anchors(self, config: dict[str, Any]) -> list[str]:
        cfg = Converted(self.format, {}, config).build_config()
        strides = [8, 16, 32, 64, 128]
        generator = build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in strides])
        names = []
        for i, (stride, anchors) in enumerate(zip(strides, generator.cell_anchors)):
            name = f"rpn.anchor_generator.cell_anchors.{i}"
            if name in self.weights:
                # Theirs lie around the centre of the first cell and end on their last pixel.
                theirs = self.weights[name] + torch.tensor([0, 0, 1, 1]) - stride / 2
                ours = (
                    anchors.unflatten(0, (_NUM_SIZES, len(_RATIOS))).transpose(0, 1).flatten(0, 1)
                )
                if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-3):
                    raise self.error(f"its anchors have other sizes or aspect ratios ({name})")
                names.append(name)
        return names


# By the name of a tensor that no other format has.
_CONVERTERS: dict[str, type[_Converter]] = {
    "bbox_head.retina_cls.weight": _MMDetection,
    "rpn.head.cls_logits.weight": _Official,
    "layer1.0.conv1.weight": _ImageNet,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m freeanchor.convert", description=__doc__)
    parser.add_argument("source", help="a checkpoint file, or else what MODEL.WEIGHTS takes")
    parser.add_argument("out", type=Path, help="OUT.pth or OUT.safetensors; OUT.yaml is its config")
    args = parser.parse_args()
    setup_logger(name="freeanchor")
    try:
        write(args.source, args.out)
    except FileError as e:
        raise SystemExit(f"freeanchor.convert: {e}") from e


def write(source: str, out: Path) -> None:
    """Convert a checkpoint and write it, with its config beside it.

    Raises:
        FileError: see :func:`convert`; or the weights are Detectron2's, but need its heuristics.
    """
    path = find(source)
    if out.exists() and out.samefile(path):
        raise FileError(f"{out} is the source: give another name")
    checkpoint = read_checkpoint(path)
    loadable = to_detectron2(checkpoint, path)
    if loadable.get("matching_heuristics"):
        raise FileError(f"{path} has no names of Detectron2 yet: load it by MODEL.WEIGHTS")
    weights = {k: torch.as_tensor(v) for k, v in loadable["model"].items()}
    config = loadable.get(CONFIG_KEY, {})
    write_checkpoint(out, weights, config)
    if not config:
        logger.info(f"{path} is Detectron2's: wrote {len(weights)} tensors to {out}, and no config")
        return
    cfg = Converted("", weights, config).build_config()
    cfg.MODEL.WEIGHTS = str(out)
    out.with_suffix(".yaml").write_text(cfg.dump())
    logger.info(
        f"Wrote {len(weights)} tensors to {out}, their config to {out.with_suffix('.yaml')}"
    )


if __name__ == "__main__":
    main()
