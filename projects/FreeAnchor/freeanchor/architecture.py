"""What the models of other implementations have otherwise than Detectron2's RetinaNet.

Detectron2 computes P6 from res5 and P7 from ReLU(P6), and its anchors have exact areas. The paper's
repository computes P6 from P5 and rounds the shapes of its anchors; MMDetection computes P7 from P6
as it is. The keys are in :mod:`freeanchor.config`; the defaults are Detectron2's.
"""

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, BACKBONE_REGISTRY, FPN
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7, build_retinanet_resnet_fpn_backbone
from torch import Tensor
from torch.nn import functional as F

__all__ = ["RoundedAnchorGenerator", "TopBlock", "build_freeanchor_resnet_fpn_backbone"]


class TopBlock(LastLevelP6P7):
    """P6 and P7 of the feature pyramid."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, relu: bool) -> None:
        """Build the two convolutions.

        Args:
            in_channels: channels of `in_feature`.
            out_channels: channels of P6 and P7.
            in_feature: what P6 is computed from, "res5" or "p5".
            relu: whether P7 is computed from ReLU(P6) or from P6.
        """
        super().__init__(in_channels, out_channels, in_feature)
        self.relu = relu

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute [P6, P7] from the input feature, each of half the size of the one before."""
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6) if self.relu else p6)]


@BACKBONE_REGISTRY.register()
def build_freeanchor_resnet_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's backbone of RetinaNet, with P6 and P7 as the keys of FreeAnchor say."""
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    in_feature = cfg.MODEL.FREEANCHOR.P6_IN_FEATURE
    shapes = {**backbone.bottom_up.output_shape(), **backbone.output_shape()}
    if in_feature not in ("res5", "p5"):
        raise ValueError(f"MODEL.FREEANCHOR.P6_IN_FEATURE must be res5 or p5, got {in_feature!r}")
    backbone.top_block = TopBlock(
        shapes[in_feature].channels,
        cfg.MODEL.FPN.OUT_CHANNELS,
        in_feature,
        cfg.MODEL.FREEANCHOR.P7_RELU,
    )
    return backbone


@ANCHOR_GENERATOR_REGISTRY.register()
class RoundedAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of Faster R-CNN's first implementation, which the paper's repository uses.

    The shape of an aspect ratio is rounded to whole pixels at the size of one cell, and then
    enlarged. With `MODEL.ANCHOR_GENERATOR.OFFSET` 0.5, the boxes cover the same pixels as the
    repository's, whose right and bottom edges are inclusive and thus smaller by one.
    """

    def _calculate_anchors(self, sizes: list[Any], aspect_ratios: list[Any]) -> BufferList:
        return BufferList(
            [
                _rounded_cell_anchors(*level)
                for level in zip(self.strides, sizes, aspect_ratios, strict=True)
            ]
        )


def _rounded_cell_anchors(stride: int, sizes: list[float], aspect_ratios: list[float]) -> Tensor:
    """(len(sizes) * len(aspect_ratios), 4) boxes around (0, 0), size-major as Detectron2's."""
    ratios = torch.tensor(aspect_ratios, dtype=torch.float64)  # height / width
    widths = (stride**2 / ratios).sqrt().round()
    shapes = torch.stack([widths, (widths * ratios).round()], dim=1)  # of one cell
    half = shapes * torch.tensor(sizes, dtype=torch.float64)[:, None, None] / (2 * stride)
    return torch.cat([-half, half], dim=2).flatten(0, 1).float()
