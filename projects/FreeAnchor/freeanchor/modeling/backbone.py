"""Feature pyramids of other implementations than Detectron2's RetinaNet.

Detectron2 computes P6 from res5 and P7 from ReLU(P6). The paper's repository computes P6 from P5,
MMDetection computes P7 from P6 as it is, LTM without anchors normalises both. The keys are in
:mod:`freeanchor.config`; the defaults are Detectron2's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7, build_retinanet_resnet_fpn_backbone
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import HAS_COMPILED_OPS
from ..errors import FreeAnchorError

__all__ = [
    "TopBlock",
    "build_freeanchor_resnet_fpn_backbone",
    "build_top_block",
    "check_deformable",
    "check_top_block",
]


def check_deformable(cfg: CfgNode, training: bool) -> None:
    """Refuse deformable convolutions where Detectron2 would do so in the first forward pass.

    Args:
        cfg: config of the model.
        training: whether it is to be trained. On a CPU, the plain kind can detect only.

    Raises:
        FreeAnchorError: the device or this Detectron2 does not have them.
    """
    resnets = cfg.MODEL.RESNETS
    if "resnet" not in cfg.MODEL.BACKBONE.NAME or not any(resnets.DEFORM_ON_PER_STAGE):
        return
    is_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    is_simple = not resnets.DEFORM_MODULATED and resnets.DEFORM_NUM_GROUPS == 1
    if (is_simple and not training) if is_cpu else HAS_COMPILED_OPS:
        return
    lacking = "a GPU" if is_cpu else "Detectron2's compiled operators, which are not installed"
    raise FreeAnchorError(
        f"MODEL.RESNETS.DEFORM_ON_PER_STAGE {resnets.DEFORM_ON_PER_STAGE}: deformable convolution "
        f"needs {lacking}"
    )


class TopBlock(LastLevelP6P7):
    """P6 and P7 of the feature pyramid."""

    def __init__(
        self, in_channels: int, out_channels: int, in_feature: str, relu: bool, norm: str = ""
    ) -> None:
        """Build the two convolutions.

        Args:
            in_channels: channels of `in_feature`.
            out_channels: channels of P6 and P7.
            in_feature: what P6 is computed from, "res5" or "p5".
            relu: whether P7 is computed from ReLU(P6) or from P6.
            norm: of both, see :func:`detectron2.layers.get_norm`; they have a bias without one.
        """
        super().__init__(in_channels, out_channels, in_feature)
        self.relu = relu
        if norm:
            for name, channels in (("p6", in_channels), ("p7", out_channels)):
                layer = get_norm(norm, out_channels)
                conv = Conv2d(channels, out_channels, 3, 2, 1, bias=False, norm=layer)
                c2_xavier_fill(conv)
                setattr(self, name, conv)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute [P6, P7] from the input feature, each of half the size of the one before."""
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]


def build_top_block(cfg: Any, bottom_up: Mapping[str, ShapeSpec]) -> TopBlock:
    """Build P6 and P7 as the keys of FreeAnchor say.

    Args:
        cfg: its `MODEL.FREEANCHOR.{P6_IN_FEATURE, P6P7_NORM, P7_RELU}`.
        bottom_up: the features that the pyramid is built on.

    Raises:
        ValueError: P6_IN_FEATURE is neither of the two that there are.
    """
    keys = cfg.MODEL.FREEANCHOR
    in_feature = keys.P6_IN_FEATURE
    if in_feature not in ("res5", "p5"):
        raise ValueError(f"MODEL.FREEANCHOR.P6_IN_FEATURE must be res5 or p5, got {in_feature!r}")
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    in_channels = out_channels if in_feature == "p5" else bottom_up["res5"].channels
    norm = cfg.MODEL.FPN.NORM if keys.P6P7_NORM else ""
    return TopBlock(in_channels, out_channels, in_feature, keys.P7_RELU, norm)


def check_top_block(cfg: Any, backbone: nn.Module) -> None:
    """Refuse keys of P6 and P7 that a backbone ignores.

    Raises:
        ValueError: it is none of those that have them.
    """
    keys = cfg.MODEL.FREEANCHOR
    is_default = keys.P6_IN_FEATURE == "res5" and keys.P7_RELU and not keys.P6P7_NORM
    if not is_default and not isinstance(getattr(backbone, "top_block", None), TopBlock):
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} ignores MODEL.FREEANCHOR."
            "P6_IN_FEATURE, P6P7_NORM and P7_RELU: set it to build_freeanchor_resnet_fpn_backbone"
        )


@BACKBONE_REGISTRY.register()
def build_freeanchor_resnet_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's backbone of RetinaNet, with P6 and P7 as the keys of FreeAnchor say."""
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    backbone.top_block = build_top_block(cfg, backbone.bottom_up.output_shape())
    return backbone
