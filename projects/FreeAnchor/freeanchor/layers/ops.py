"""The operators of FreeAnchor: checks, dispatch, shapes and gradients.

Each is a schema in the namespace `freeanchor`, with the readable function of `matching` or `losses`
as its reference. The C++ and CUDA kernels of `csrc`, where they are built, take precedence. Shapes
and dtypes are checked here; values by whoever reads them, the kernel or the reference.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import losses, matching

__all__ = ["box_prob", "iou_topk", "negative_bag_loss", "take"]

logger = logging.getLogger(__name__)

# Gradients are computed before the scale of AMP is known, and float16 loses them below 6e-8. The
# slope of the negative loss is below 4 for any gamma, so this keeps the largest in range too.
_FLOAT16_GRAD_SCALE = 2.0**13


def _load_kernels() -> str:
    """Load the extension, and say what is wrong if it cannot be used."""
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None:
        return "are not built"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:  # it was built for another PyTorch
        return f"do not load ({error})"
    return "are built without CUDA"


_WHY_REFERENCE = _load_kernels()


@functools.cache
def _log_reference(device: str) -> None:
    logger.warning(
        "The C++ operators of FreeAnchor %s: on the device %r their PyTorch reference runs, which "
        "gives the same results more slowly. To build them, for CUDA with FORCE_CUDA=1: pip "
        "install --no-build-isolation --no-deps -e . in the folder of FreeAnchor",
        _WHY_REFERENCE,
        device,
    )


def _define(schema: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator that runs `reference` where no kernel is registered."""
    name = "freeanchor::" + schema.partition("(")[0]

    @functools.wraps(reference)
    def logged_reference(*args: Any) -> Any:
        _log_reference(args[0][0].device.type)
        return reference(*args)

    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", logged_reference)
    operator: Callable[..., Any] = getattr(torch.ops.freeanchor, schema.partition("(")[0])
    return operator


_iou_topk = _define(
    "iou_topk(Tensor[] anchors, Tensor gt_boxes, int k) -> Tensor", matching.iou_topk
)
_box_prob = _define(
    "box_prob(Tensor[] deltas, Tensor[] anchors, Tensor gt_boxes, Tensor gt_classes, int[] counts, "
    "int num_classes, float[] weights, float scale_clamp, float threshold) "
    "-> (Tensor, Tensor, Tensor)",
    matching.box_prob,
)
_take = _define("take(Tensor[] levels, Tensor index) -> Tensor", matching.take)
_put_ = _define(
    "put_(Tensor(a!)[] levels, Tensor index, Tensor source, Tensor? factor) -> ()", matching.put_
)
_negative_bag_loss = _define(
    "negative_bag_loss(Tensor[] logits, Tensor cells, Tensor prob, Tensor bag, float gamma, "
    "float scale, float grad_scale, Tensor(a!)[] grads) -> (Tensor, Tensor)",
    losses.negative_bag_loss,
)


def iou_topk(anchors: Sequence[Tensor], gt_boxes: Tensor, k: int) -> Tensor:
    """:func:`freeanchor.layers.matching.iou_topk`, checked and fast.

    The memory that it needs does not depend on the number of anchors. Where all levels are grids,
    the kernels read no anchors but those of the first row and column of each.

    Raises:
        ValueError: a wrong shape, dtype or device, boxes that are not finite or inverted, or k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_boxes("gt_boxes", gt_boxes)
    _check_anchors(anchors, gt_boxes)
    bags: Tensor = _iou_topk(anchors, gt_boxes, k)
    return bags


@torch.library.register_fake("freeanchor::iou_topk")
def _(anchors: Sequence[Tensor], gt_boxes: Tensor, k: int) -> Tensor:
    num_anchors = sum(level.numel() // 4 for level in anchors)
    return gt_boxes.new_empty((len(gt_boxes), min(k, num_anchors)), dtype=torch.int64)


def box_prob(
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    gt_boxes: Tensor,
    gt_classes: Tensor,
    counts: Sequence[int],
    num_classes: int,
    weights: Sequence[float],
    scale_clamp: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`freeanchor.layers.matching.box_prob`, checked and fast.

    Raises:
        ValueError: a wrong shape, dtype or device, boxes that are not finite or inverted, classes
            out of range, or another number of objects than `counts` says.
    """
    deltas = [level.detach() for level in deltas]
    _check_levels("deltas", deltas, 4)
    _check_boxes("gt_boxes", gt_boxes)
    _check_anchors(anchors, gt_boxes)
    _check_like("deltas", deltas[0], gt_boxes, None)
    _check_like("gt_classes", gt_classes, gt_boxes, torch.int64)
    if len(deltas[0]) != len(counts) or any(count < 0 for count in counts):
        raise ValueError(
            f"counts must be a number for each of {len(deltas[0])} images, got {list(counts)}"
        )
    shapes = [math.prod(level.shape[1:-1]) for level in deltas]
    if shapes != [level.numel() // 4 for level in anchors]:
        raise ValueError("deltas and anchors must have as many anchors in each level")
    if gt_classes.shape != gt_boxes.shape[:1] or sum(counts) != len(gt_boxes):
        raise ValueError(
            f"gt_classes and counts must be those of {len(gt_boxes)} gt_boxes, got "
            f"{len(gt_classes)} and {list(counts)}"
        )
    if len(weights) != 4 or not all(weight > 0 for weight in weights):
        raise ValueError(f"weights must be 4 positive numbers, got {list(weights)}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    result: tuple[Tensor, Tensor, Tensor] = _box_prob(
        deltas,
        anchors,
        gt_boxes,
        gt_classes,
        counts,
        num_classes,
        weights,
        scale_clamp,
        threshold,
    )
    return result


@torch.library.register_fake("freeanchor::box_prob")
def _(
    deltas: Sequence[Tensor], anchors: Sequence[Tensor], gt_boxes: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_cells = torch.library.get_ctx().new_dynamic_size()
    return (
        gt_boxes.new_empty(num_cells, dtype=torch.int64),
        gt_boxes.new_empty(num_cells),
        gt_boxes.new_empty(len(gt_boxes)),
    )


def take(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """:func:`freeanchor.layers.matching.take` with a gradient.

    Raises:
        ValueError: a wrong shape, dtype or device, or an index out of range.
    """
    _check_levels("levels", levels)
    _check_like("index", index, levels[0], torch.int64)
    elements: Tensor = _take(levels, index)
    return elements


@torch.library.register_fake("freeanchor::take")
def _(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    return levels[0].new_empty(index.shape, dtype=_at_least_float32(levels))


def _take_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, index = inputs
    ctx.save_for_backward(index)
    ctx.like = [torch.empty_like(level, device="meta") for level in levels]


def _take_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    (index,) = ctx.saved_tensors
    grads = [torch.zeros_like(level, device=grad.device) for level in ctx.like]
    _put_(grads, index, grad, None)
    return grads, None


torch.library.register_autograd("freeanchor::take", _take_backward, setup_context=_take_setup)


@torch.library.register_fake("freeanchor::put_")
def _(levels: Sequence[Tensor], index: Tensor, source: Tensor, factor: Tensor | None) -> None:
    return None


def negative_bag_loss(
    logits: Sequence[Tensor],
    cells: Tensor,
    prob: Tensor,
    bag: Tensor,
    gamma: float = 2.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`freeanchor.layers.losses.negative_bag_loss` with a gradient.

    The logits at `bag` are returned by the same operator so that there is one gradient of the
    logits, into which those of the bags are added. As an operator of their own they would cost a
    second tensor of the size of all logits, and a sum.

    Returns:
        Tuple of the scalar loss and the logits at `bag`, both with a gradient.

    Raises:
        ValueError: a wrong shape, dtype or device, an index out of range, or gamma < 1.
    """
    _check_levels("logits", logits)
    _check_like("cells", cells, logits[0], torch.int64)
    _check_like("bag", bag, logits[0], torch.int64)
    _check_like("prob", prob, cells, _at_least_float32(logits))
    if prob.shape != cells.shape or cells.dim() != 1:
        raise ValueError(f"cells and prob must be (S,), got {[*cells.shape]} and {[*prob.shape]}")
    if not gamma >= 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}")
    # Levels with gaps in memory cannot have gradients of their layout: those are copied.
    logits = [
        level
        if torch.empty_like(level, device="meta").stride() == level.stride()
        else level.contiguous()
        for level in logits
    ]
    result: tuple[Tensor, Tensor]
    if torch.is_grad_enabled() and any(level.requires_grad for level in logits):
        result = _NegativeBagLoss.apply(cells, prob, bag, gamma, scale, *logits)
    else:
        result = _negative_bag_loss(logits, cells, prob, bag, gamma, scale, 0.0, [])
    return result


@torch.library.register_fake("freeanchor::negative_bag_loss")
def _(
    logits: Sequence[Tensor], cells: Tensor, prob: Tensor, bag: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = _at_least_float32(logits)
    return logits[0].new_empty((), dtype=dtype), logits[0].new_empty(bag.shape, dtype=dtype)


class _NegativeBagLoss(torch.autograd.Function):
    """Computes the gradient with the loss, and finishes it in place once its factor is known."""

    @staticmethod
    def forward(
        ctx: Any,
        cells: Tensor,
        prob: Tensor,
        bag: Tensor,
        gamma: float,
        scale: float,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cells, prob, bag, *logits)
        ctx.constants = gamma, scale
        ctx.set_materialize_grads(False)
        loss, bag_logits, ctx.grads = _with_grads(logits, cells, prob, bag, gamma, scale)
        return loss, bag_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, grad_bag: Tensor | None) -> tuple[Any, ...]:
        cells, prob, bag, *logits = ctx.saved_tensors
        factor = None
        if grad_loss is None:
            grads = [torch.zeros_like(level) for level in logits]
        else:
            # They are changed in place, so a second backward pass has to compute them again.
            grads, ctx.grads = ctx.grads, None
            if grads is None:
                grads = _with_grads(logits, cells, prob, bag, *ctx.constants)[2]
            _, scale = ctx.constants
            stored = _grad_scale(logits, scale)
            factor = grad_loss if stored == scale else grad_loss * (scale / stored)
        if grad_bag is None:
            bag, grad_bag = bag.flatten()[:0], prob[:0]
        _put_(grads, bag, grad_bag, factor)
        return None, None, None, None, None, *grads


def _with_grads(
    logits: Sequence[Tensor], cells: Tensor, prob: Tensor, bag: Tensor, gamma: float, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grads = [torch.empty_like(level) for level in logits]
    grad_scale = _grad_scale(logits, scale)
    loss, bag_logits = _negative_bag_loss(logits, cells, prob, bag, gamma, scale, grad_scale, grads)
    return loss, bag_logits, grads


def _grad_scale(logits: Sequence[Tensor], scale: float) -> float:
    """The factor of stored gradients: final in most cases, so that they are written once."""
    return _FLOAT16_GRAD_SCALE if logits[0].dtype == torch.float16 else scale


def _at_least_float32(levels: Sequence[Tensor]) -> torch.dtype:
    return torch.promote_types(levels[0].dtype, torch.float32)


def _check_levels(name: str, levels: Sequence[Tensor], depth: int | None = None) -> None:
    """Levels are (N, ..., D) with 1 to 3 dimensions of anchors, and agree in all else."""
    if len(levels) == 0:
        raise ValueError(f"{name} must have a tensor for each level, got none")
    first = levels[0]
    for i, level in enumerate(levels):
        if not 3 <= level.dim() <= 5 or level.shape[-1] != (depth or first.shape[-1]):
            raise ValueError(
                f"{name}[{i}] must be (N, anchors, {depth or 'C'}) or (N, H, W, A, {depth or 'C'}) "
                f"as the other levels, got {list(level.shape)}"
            )
        if len(level) != len(first):
            raise ValueError(f"{name}[{i}] has {len(level)} images, {name}[0] {len(first)}")
        if not level.is_floating_point():
            raise ValueError(f"{name}[{i}] must be of a floating point dtype, got {level.dtype}")
        _check_like(f"{name}[{i}]", level, first, first.dtype)


def _check_like(name: str, tensor: Tensor, other: Tensor, dtype: torch.dtype | None) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def _check_anchors(anchors: Sequence[Tensor], gt_boxes: Tensor) -> None:
    if len(anchors) == 0:
        raise ValueError("anchors must have a tensor for each level, got none")
    for i, level in enumerate(anchors):
        if level.dim() not in (2, 4) or level.shape[-1] != 4:
            raise ValueError(
                f"anchors[{i}] must be (R, 4), or (H, W, A, 4) for a grid, got {list(level.shape)}"
            )
        _check_like(f"anchors[{i}]", level, gt_boxes, gt_boxes.dtype)


def _check_boxes(name: str, boxes: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must be (M, 4), got {list(boxes.shape)}")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {boxes.dtype}")
