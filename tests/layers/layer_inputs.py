"""Inputs of the operators, and which implementation of them the tests run on."""

import math
import sys
from typing import NamedTuple

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from freeanchor.layers import ops
from freeanchor.layers.matching import BoxCoding, Objects
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

CODING = BoxCoding((10.0, 10.0, 5.0, 5.0), math.log(1000 / 16))
EMULATED = "emulated" in sys.modules
ON_REFERENCE = not torch._C._dispatch_has_kernel_for_dispatch_key("freeanchor::take", "CPU")
DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))][:3]
# The same examples in every run: a rounding next to a threshold must not fail one run of many.
FUZZ = settings(max_examples=80 if EMULATED else 400, deadline=None, derandomize=True)

fuzzes_the_kernels = pytest.mark.skipif(ON_REFERENCE, reason="there is nothing to compare")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def to(device, tree):
    return tree_map_only(Tensor, lambda x: x if x.is_meta else x.to(device), tree)


def raw(levels):
    """Levels (N, A * D, H, W) as a head computes them, as views (N, H, W, A, D)."""
    return [x.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2) for x in levels]


def random_levels(depth, dtype=torch.float32, images=2, requires_grad=False, device="cpu"):
    """Two levels of raw head outputs, of a grid that is not square."""
    shapes = [(images, 3 * depth, 5, 4), (images, 3 * depth, 2, 3)]
    return [
        (torch.randn(shape, device=device) * 3).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


def grid_anchors(dtype=torch.float32, device="cpu"):
    """The anchors of the same grid."""
    generator = DefaultAnchorGenerator(
        sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16, 32], offset=0.5
    )
    features = [torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 2, 3)]
    return [
        boxes.tensor.view(*x.shape[-2:], 3, 4).to(device, dtype)
        for boxes, x in zip(generator(features), features)
    ]


def objects(counts, dtype=torch.float32, device="cpu"):
    """Objects of 5 classes, so many of each image."""
    corner = torch.rand(sum(counts), 2) * 50
    boxes = torch.cat((corner, corner + 8 + torch.rand(sum(counts), 2) * 50), dim=1)
    images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Objects(*to(device, (boxes.to(dtype), torch.arange(sum(counts)) % 5, images)))


class Case(NamedTuple):
    """Arguments of the negative loss: some cells with P{a in A+}, and a bag with repetitions."""

    leaves: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]
    objects: Objects
    bag: Tensor

    def loss(self, levels=None, gamma=2.0, scale=0.3):
        return ops.negative_bag_loss(
            raw(self.leaves) if levels is None else levels,
            *self[1:],
            CODING,
            threshold=0.3,
            gamma=gamma,
            scale=scale,
        )


def negative_case(dtype=torch.float32, device="cpu", counts=(3, 1)):
    compute = torch.promote_types(dtype, torch.float32)
    leaves = random_levels(5, dtype, requires_grad=True, device=device)
    deltas = [x / 9 for x in raw(random_levels(4, dtype, device=device))]
    bag = torch.randint(0, sum(x.numel() for x in leaves), (3, 6), device=device)
    bag[1] = bag[0]
    anchors, gt = grid_anchors(compute, device), objects(counts, compute, device)
    return Case(leaves, deltas, anchors, gt, bag)


def no_objects(dtype=torch.float32, device="cpu"):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Objects(torch.zeros(0, 4, dtype=dtype, device=device), none, none)


def background_loss(x, scale=1.0):
    """The negative loss of an image without objects, of logits (N, R, C)."""
    gt = no_objects(torch.promote_types(x.dtype, torch.float32), x.device)
    anchors = gt.boxes.new_zeros(1, 4).expand(x.shape[1], 4)
    deltas = x.detach()[..., :1].expand(*x.shape[:2], 4)
    loss, *_ = ops.negative_bag_loss(
        [x], [deltas], [anchors], gt, gt.classes, CODING, 0.6, scale=scale
    )
    return loss


def grids(data):
    """Anchors of a `DefaultAnchorGenerator` with any parameters, as grids."""
    num_levels = data.draw(st.integers(1, 3))
    sizes = st.lists(st.sampled_from([8, 20, 32, 45.25, 64, 100]), min_size=1, max_size=3)
    ratios = st.lists(st.sampled_from([0.2, 0.5, 1.0, 2.0, 3.7]), min_size=1, max_size=3)
    shared = data.draw(st.booleans())
    strides = [data.draw(st.sampled_from([4, 7, 8, 16, 32])) for _ in range(num_levels)]
    generator = DefaultAnchorGenerator(
        sizes=[data.draw(sizes) for _ in range(1 if shared else num_levels)],
        aspect_ratios=[data.draw(ratios) for _ in range(1 if shared else num_levels)],
        strides=strides,
        offset=data.draw(st.sampled_from([0.0, 0.5, 0.3])),
    )
    height, width = (data.draw(st.integers(1, 40 if EMULATED else 100)) for _ in range(2))
    features = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
    levels = []
    for boxes, feature in zip(generator(features), features):
        levels.append(boxes.tensor.view(*feature.shape[-2:], -1, 4))
    return levels


def boxes_among(data, anchors):
    """Objects on, between, in, around and outside of the anchors, with and without area."""
    kind = st.sampled_from(["anchor", "near", "tiny", "large", "slender", "outside", "empty"])
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    result = []
    for what in data.draw(st.lists(kind, min_size=1, max_size=6)):
        box = anchors[torch.randint(len(anchors), (), generator=random)].clone()
        noise = torch.rand(4, generator=random)
        if what == "near":
            box += noise * torch.tensor([-9.0, -9.0, 9.0, 9.0])
        elif what == "tiny":
            box = box[:2].round().repeat(2) + torch.cat((noise[:2], noise[:2] + noise[2:] * 3))
        elif what == "large":
            box = torch.tensor([-20.0, -20.0, 90.0, 90.0]) * (1 + noise)
        elif what == "slender":
            box = torch.stack((noise[0], box[1], 150 + noise[1], box[1] + 3))
        elif what == "outside":
            box += 1000 * noise[0]
        elif what == "empty":
            box[2:] = box[:2]
        result.append(box)
    return torch.stack(result)
