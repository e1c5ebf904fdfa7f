"""The formats of other projects that are converted, and by what they are recognised.

RetinaNet and FreeAnchor of MMDetection, FreeAnchor of the paper's repository (maskrcnn-benchmark),
and ImageNet ResNets and ResNeXts of torchvision, timm and OpenMMLab.
"""

import ast
import logging
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator

from .classes import openmmlab_classes
from .converter import (
    BACKBONE,
    NUM_CLASSES,
    NUM_SIZES,
    RATIOS,
    Converted,
    Converter,
    numbered,
)
from .files import CLASS_NAMES

__all__ = ["CONVERTERS"]

logger = logging.getLogger(__name__)

_FROZEN_BATCH_NORM_EPS = 1e-5
_TORCHVISION_PIXELS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}


# From torchvision's names.
_RESNET_RULES = (
    (r"^backbone\.bottom_up\.(conv1|bn1)\.", r"backbone.bottom_up.stem.\1."),
    (r"^backbone\.bottom_up\.layer(\d)\.", numbered("backbone.bottom_up.res{}.", offset=1)),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
)


class _ImageNet(Converter):
    format = "an ImageNet model, as torchvision's and timm's"
    rules = ((r"^(?!fc\.)", BACKBONE), *_RESNET_RULES)

    def adapt(self) -> dict[str, Any]:
        self.leave_out([k for k in self.weights if k.startswith("fc.")], "the classes of ImageNet")
        if self.has_any("norm.bias") and not self.has_any("norm.running_mean"):
            # Torchvision's names, but the statistics are in the weights: OpenMMLab's "caffe" style,
            # which it made of Detectron's.
            return self.caffe_config()
        return {
            **_TORCHVISION_PIXELS,
            **self.resnet_config(),
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        }

    def has_any(self, suffix: str) -> bool:
        """Whether tensors of such a name have a value besides 0."""
        return any(bool(v.any()) for k, v in self.weights.items() if k.endswith(suffix))

    def caffe_config(self) -> dict[str, Any]:
        self.format = "an ImageNet model in Caffe's style, as OpenMMLab's"
        config = self.resnet_config()
        is_msra = config.get("MODEL.RESNETS.NUM_GROUPS", 1) == 1  # the ResNeXts are Facebook's
        return {
            **config,
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
            "MODEL.PIXEL_STD": [1.0, 1.0, 1.0] if is_msra else [57.375, 57.12, 58.395],
            "MODEL.RESNETS.STRIDE_IN_1X1": is_msra,
        }


class _MMDetection(Converter):
    format = "RetinaNet or FreeAnchor of MMDetection"
    rules = (
        (r"^backbone\.", BACKBONE),
        *_RESNET_RULES,
        (r"^neck\.lateral_convs\.(\d)\.conv\.", numbered("backbone.fpn_lateral{}.", offset=3)),
        (r"^neck\.fpn_convs\.([012])\.conv\.", numbered("backbone.fpn_output{}.", offset=3)),
        (r"^neck\.fpn_convs\.([34])\.conv\.", numbered("backbone.top_block.p{}.", offset=3)),
        # Every second module of Detectron2's subnets is a ReLU.
        (r"^bbox_head\.cls_convs\.(\d+)\.conv\.", numbered("head.cls_subnet.{}.", factor=2)),
        (r"^bbox_head\.reg_convs\.(\d+)\.conv\.", numbered("head.bbox_subnet.{}.", factor=2)),
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
        names = openmmlab_classes(self.meta)
        if len(names) == config[NUM_CLASSES]:
            config[CLASS_NAMES] = names
        elif names:
            logger.warning(
                f"{self.source} names {len(names)} classes and scores {config[NUM_CLASSES]}: the "
                "names are not taken"
            )
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
        for part, key, known in (
            (coder if coder is not head else {}, "type", "DeltaXYWHBBoxCoder"),
            (coder, "target_means", [0, 0, 0, 0]),
            (anchors if anchors is not head else {}, "type", "AnchorGenerator"),
            (anchors, "octave_base_scale", 4),
            (anchors, "scales_per_octave", NUM_SIZES),
            (anchors, "scales", None),  # instead of these two
            (anchors, "base_sizes", None),
            (anchors, "ratios", RATIOS),
            (anchors, "strides", [8, 16, 32, 64, 128]),
            (anchors, "center_offset", 0),
            (head.get("loss_cls") or {}, "use_sigmoid", True),
            (described["backbone"], "strides", [1, 2, 2, 2]),
            (described["backbone"], "dilations", [1, 1, 1, 1]),
            (described["neck"].get("upsample_cfg") or {}, "mode", "nearest"),
        ):
            value = part.get(key)
            if value is not None and value != known:
                raise self.error(f"its config has {key}={value!r}, and only {known!r} is supported")
        config = {
            "MODEL.RETINANET.BBOX_REG_WEIGHTS": tuple(
                round(1 / std, 6) for std in coder.get("target_stds") or (1, 1, 1, 1)
            ),
            "MODEL.RESNETS.STRIDE_IN_1X1": described["backbone"].get("style") == "caffe",
            "MODEL.FREEANCHOR.P7_RELU": bool(described["neck"].get("relu_before_extra_convs")),
        }
        preprocessor = described.get("data_preprocessor")  # of MMDetection 3
        if preprocessor or pixels:
            default = not preprocessor
            pixels = preprocessor or pixels
            is_rgb = pixels.get("bgr_to_rgb", pixels.get("to_rgb", default))
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


class _Official(Converter):
    format = "FreeAnchor of the paper's repository"
    rules = (
        (r"^backbone\.body\.(stem\.)?", BACKBONE),
        *_RESNET_RULES,
        (r"^backbone\.fpn\.fpn_inner(\d)\.", numbered("backbone.fpn_lateral{}.", offset=1)),
        (r"^backbone\.fpn\.fpn_layer(\d)\.", numbered("backbone.fpn_output{}.", offset=1)),
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
                ours = anchors.unflatten(0, (NUM_SIZES, len(RATIOS))).transpose(0, 1).flatten(0, 1)
                if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-3):
                    raise self.error(f"its anchors have other sizes or aspect ratios ({name})")
                names.append(name)
        return names


# By the name of a tensor that no other format has.
CONVERTERS: dict[str, type[Converter]] = {
    "bbox_head.retina_cls.weight": _MMDetection,
    "rpn.head.cls_logits.weight": _Official,
    "layer1.0.conv1.weight": _ImageNet,
}
