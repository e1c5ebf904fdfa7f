"""The levels of a feature pyramid, addressed as the one (N, R, D) tensor that they stand for.

What there is for each anchor comes as L tensors, one per level, because that is how a head leaves
it, and a level is a view into whatever memory layout the head chose: (N, H, W, A, D), or flattened
(N, H * W * A, D), of D numbers per anchor; letters as in `matching.py`. An element of all levels
together has the index (n * R + j) * D + d, as if they were one (N, R, D) tensor, which is never
made.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def at_least_float32(levels: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which levels are computed."""
    return torch.promote_types(levels[0].dtype, torch.float32)


def count_anchors(levels: Sequence[Tensor]) -> int:
    """R: the anchors of one image in levels (N, ..., D)."""
    return sum(math.prod(level.shape[1:-1]) for level in levels)


@torch.no_grad()
def take(levels: Sequence[Tensor], index: Tensor, name: str = "index") -> Tensor:
    """Elements of the levels: `torch.take` of the (N, R, D) tensor that they stand for.

    Args:
        levels: L tensors (N, ..., D), see the top of this module.
        index: int64 indices into N * R * D elements, of any shape.
        name: what the index is called in an error.

    Returns:
        The elements, of the shape of `index`, in float32 or better.

    Raises:
        ValueError: an index is out of range.
    """
    out = levels[0].new_zeros(index.shape, dtype=at_least_float32(levels))
    for level, here, position in locate(levels, index, name):
        out[here] = level[position].to(out.dtype)
    return out


@torch.no_grad()
def put_(levels: Sequence[Tensor], index: Tensor, source: Tensor) -> None:
    """Add `source` at `index` to the levels: the gradient of `take`.

    In float32 or better: each element is rounded to its dtype once, after the sum of its sources,
    however many they are, was added.

    Args:
        levels: L tensors (N, ..., D), changed in place.
        index: int64 indices as for :func:`take`. The sources of an index that is there twice add.
        source: what to add, of the shape of `index`, in float32 or better.
    """
    unique, inverse = index.flatten().unique(return_inverse=True)
    total = take(levels, unique).index_add_(0, inverse, source.flatten())
    for level, here, position in locate(levels, unique):
        level[position] = total[here].to(level.dtype)


def locate(
    levels: Sequence[Tensor], index: Tensor, name: str = "index"
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Give each level, which of the indices are its own, and their positions in it.

    Raises:
        ValueError: an index is out of range.
    """
    if index.numel() == 0:
        return
    size = len(levels[0]) * count_anchors(levels) * levels[0].shape[-1]
    if not bool(((index >= 0) & (index < size)).all()):
        raise ValueError(f"{name} must be in [0, {size})")
    row = index // levels[0].shape[-1]
    d = index % levels[0].shape[-1]
    image = row // count_anchors(levels)
    anchor = row % count_anchors(levels)
    first = 0
    for level in levels:
        middle = level.shape[1:-1]
        last = first + math.prod(middle)
        here = (anchor >= first) & (anchor < last)
        if last > first:
            position = torch.unravel_index(anchor[here] - first, middle)
            yield level, here, (image[here], *position, d[here])
        first = last
