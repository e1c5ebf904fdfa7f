"""Anchors: where they are made, and those of another implementation than Detectron2's."""

from typing import Any

import torch
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn

__all__ = ["RoundedAnchorGenerator", "generate_anchors"]


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


def generate_anchors(generator: nn.Module, features: list[Tensor]) -> list[Boxes]:
    """The anchors of each level, made on the device of the features.

    Detectron2's main branch would count their positions on the CPU and copy them in each step,
    which waits for a GPU.
    """
    with features[0].device:
        anchors: list[Boxes] = generator(features)
    return anchors
