"""The operators of FreeAnchor: checks, dispatch, shapes and gradients.

Each is a schema in the namespace `freeanchor`, with the readable function of `matching`, `levels`
or `losses` as its reference. The C++ and CUDA kernels of `csrc`, where they are built, take
precedence. Shapes and dtypes are checked here; values by whoever reads them, the kernel or the
reference. The kernels of CUDA do not wait for the device, so there the error of a bad value is
raised by the first operator that is called after the device has met it. Until then they read
nothing out of bounds.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import levels as pyramid
from . import losses, matching
from .checks import check_anchors, check_boxes, check_levels, check_like, check_matching
from .matching import BoxCoding, Objects

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
_take = _define("take(Tensor[] levels, Tensor index) -> Tensor", pyramid.take)
_put_ = _define("put_(Tensor(a!)[] levels, Tensor index, Tensor source) -> ()", pyramid.put_)
_negative_bag_loss = _define(
    "negative_bag_loss(Tensor[] logits, Tensor[] deltas, Tensor[] anchors, Tensor gt_boxes, "
    "Tensor gt_classes, Tensor gt_images, float[] coding, float threshold, float gamma, "
    "Tensor grad_scale, Tensor(a!)[] grads) -> (Tensor, Tensor)",
    losses.negative_bag_loss,
)


def iou_topk(anchors: Sequence[Tensor], gt_boxes: Tensor, k: int) -> Tensor:
    """:func:`freeanchor.layers.matching.iou_topk`, checked and fast.

    The memory that it needs does not depend on the number of anchors. Where all levels are grids,
    the kernels of the CPU read no anchors but those of the first row and column of each and the
    last ones; those of CUDA read all, and refuse a grid for any of them.

    Raises:
        ValueError: a wrong shape, dtype or device, boxes that are not finite or inverted, or k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_boxes(gt_boxes)
    check_anchors(anchors, gt_boxes)
    bags: Tensor = _iou_topk(anchors, gt_boxes, k)
    return bags


@torch.library.register_fake("freeanchor::iou_topk")
def _(anchors: Sequence[Tensor], gt_boxes: Tensor, k: int) -> Tensor:
    num_anchors = sum(level.numel() // 4 for level in anchors)
    return gt_boxes.new_empty((len(gt_boxes), min(k, num_anchors)), dtype=torch.int64)


def box_prob(
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    objects: Objects,
    num_classes: int,
    coding: BoxCoding,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`freeanchor.layers.matching.box_prob`, checked.

    To look at P{a in A+}: :func:`negative_bag_loss` computes it by itself, faster, and without
    waiting for the number of its cells.

    Raises:
        ValueError: a wrong shape, dtype or device, boxes that are not finite or inverted, or
            classes or images out of range.
    """
    deltas = [level.detach() for level in deltas]
    check_matching(deltas, anchors, objects, coding, threshold)
    return matching.box_prob(deltas, anchors, objects, num_classes, coding, threshold)


def take(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """:func:`freeanchor.layers.levels.take` with a gradient.

    Raises:
        ValueError: a wrong shape, dtype or device, or an index out of range.
    """
    check_levels("levels", levels)
    check_like("index", index, levels[0], torch.int64)
    elements: Tensor = _take(levels, index)
    return elements


@torch.library.register_fake("freeanchor::take")
def _(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    return levels[0].new_empty(index.shape, dtype=pyramid.at_least_float32(levels))


def _take_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, index = inputs
    ctx.save_for_backward(index)
    ctx.like = [torch.empty_like(level, device="meta") for level in levels]


def _take_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    (index,) = ctx.saved_tensors
    return list(_Put.apply(grad, index, ctx.like)), None


torch.library.register_autograd("freeanchor::take", _take_backward, setup_context=_take_setup)


class _Put(torch.autograd.Function):
    """The gradient of `take`: zeros, to which its own gradient is added at the indices."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, index: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        grads = [torch.zeros_like(level, device=grad.device) for level in like]
        _put_(grads, index, grad)
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _take(grads, index), None, None


@torch.library.register_fake("freeanchor::put_")
def _(levels: Sequence[Tensor], index: Tensor, source: Tensor) -> None:
    return None


def negative_bag_loss(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    objects: Objects,
    bag: Tensor,
    coding: BoxCoding,
    threshold: float,
    gamma: float = 2.0,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`freeanchor.layers.losses.negative_bag_loss` with a gradient of the logits.

    The logits at `bag` are returned by the same operator so that there is one gradient of the
    logits, into which those of the bags are added. As an operator of their own they would cost a
    second tensor of the size of all logits, and a sum.

    Args:
        logits: L levels (N, ..., C) of class logits.
        deltas: L levels (N, ..., 4) of predicted deltas, of the dtype of the logits.
        anchors: L levels of the anchors, (R_l, 4) or (H, W, A, 4), in float32 or better.
        objects: the M objects, of the dtype of the anchors.
        bag: int64 indices of the logits that the positive loss needs, of any shape.
        coding: what the deltas mean.
        threshold: as for :func:`freeanchor.layers.matching.box_prob`.
        gamma: focusing parameter, at least 1.
        scale: factor of the loss, a number or a scalar on the device of the logits.

    Returns:
        Tuple of the scalar loss and the logits at `bag`, both with a gradient, but no second one,
        and the (M,) highest IoUs of `box_prob`.

    Raises:
        ValueError: a wrong shape, dtype or device, a value out of range, or gamma < 1.
    """
    deltas = [level.detach() for level in deltas]
    check_levels("logits", logits)
    check_matching(deltas, anchors, objects, coding, threshold)
    if [x.shape[:-1].numel() for x in logits] != [x.shape[:-1].numel() for x in deltas]:
        raise ValueError("logits and deltas must have as many anchors in each level")
    check_like("logits", logits[0], deltas[0], deltas[0].dtype)
    check_like("bag", bag, logits[0], torch.int64)
    if not gamma >= 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}")
    if not isinstance(scale, Tensor):
        # Filled on the device: a copy from the host would wait.
        scale = torch.full((), scale, dtype=objects.boxes.dtype, device=bag.device)
    check_like("scale", scale, objects.boxes, objects.boxes.dtype)
    # Levels with gaps in memory cannot have gradients of their layout: those are copied.
    logits = [
        level
        if torch.empty_like(level, device="meta").stride() == level.stride()
        else level.contiguous()
        for level in logits
    ]
    arguments = (deltas, anchors, *objects, [*coding.weights, coding.scale_clamp], threshold, gamma)
    result: tuple[Tensor, Tensor, Tensor]
    if torch.is_grad_enabled() and any(level.requires_grad for level in logits):
        result = _NegativeBagLoss.apply(bag, arguments, scale.detach(), *logits)
    else:
        loss, max_iou = _negative_bag_loss(logits, *arguments, scale, [])
        result = (loss * scale.detach()).to(scale.dtype), _take(logits, bag), max_iou
    return result


@torch.library.register_fake("freeanchor::negative_bag_loss")
def _(logits: Sequence[Tensor], deltas: Any, anchors: Any, gt_boxes: Tensor, *_: Any) -> Any:
    return gt_boxes.new_empty((), dtype=torch.float64), gt_boxes.new_empty(len(gt_boxes))


class _NegativeBagLoss(torch.autograd.Function):
    """Computes the gradient with the loss, and finishes it in place once its factor is known."""

    @staticmethod
    def forward(
        ctx: Any, bag: Tensor, arguments: tuple[Any, ...], scale: Tensor, *logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(bag, scale, *logits)
        ctx.arguments = arguments
        ctx.set_materialize_grads(False)
        loss, max_iou, ctx.grads = _with_grads(logits, arguments, scale)
        ctx.mark_non_differentiable(max_iou)
        return loss, _take(logits, bag), max_iou

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_bag: Tensor | None, _: None
    ) -> tuple[Any, ...]:
        bag, scale, *logits = ctx.saved_tensors
        with torch.no_grad():
            if grad_loss is None:
                grads = [torch.zeros_like(level) for level in logits]
            else:
                # They are changed in place, so a second backward pass computes them again.
                grads, ctx.grads = ctx.grads, None
                if grads is None:
                    grads = _with_grads(logits, ctx.arguments, scale)[2]
                factor = grad_loss
                if logits[0].dtype == torch.float16:
                    factor = grad_loss * (scale / _FLOAT16_GRAD_SCALE)
                _multiply_(grads, factor)
            if grad_bag is not None:
                _put_(grads, bag, grad_bag)
        if torch.is_grad_enabled():  # with create_graph=True
            # Autograd would take them for constants, and second derivatives would be silently zero.
            refusal = torch._C._functions.DelayedError(_NO_SECOND_DERIVATIVE, len(grads))
            grads = list(refusal(*[grad.requires_grad_() for grad in grads]))
        return None, None, None, *grads


_NO_SECOND_DERIVATIVE = (
    "negative_bag_loss has no second derivative: compute its gradient without create_graph=True"
)


def _multiply_(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply by a scalar of float32 or better, which float16 may not hold."""
    if not factor.is_cpu:
        for grad in grads:
            torch.mul(grad, factor[None], out=grad)  # without a dimension it would be rounded first
    # It mostly is 1, which neither a device is to be asked for nor a tracer knows.
    elif torch.compiler.is_compiling() or factor != 1:
        torch._foreach_mul_(grads, factor)


def _with_grads(
    logits: Sequence[Tensor], arguments: tuple[Any, ...], scale: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grads = [torch.empty_like(level) for level in logits]
    # Else the factor is final in most cases, so that gradients are written once.
    is_half = logits[0].dtype == torch.float16
    grad_scale = torch.full_like(scale, _FLOAT16_GRAD_SCALE) if is_half else scale
    loss, max_iou = _negative_bag_loss(logits, *arguments, grad_scale, grads)
    return (loss * scale).to(scale.dtype), max_iou, grads
