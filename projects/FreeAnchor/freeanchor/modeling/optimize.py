"""Models for inference: fewer operations, in the precision and memory layout that suit the device.

What is done here cannot be undone: a model is loaded first, and not trained any more.
"""

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import FreeAnchorError, first_line
from .precision import choose_precision, is_channels_last

__all__ = [
    "InferenceSettings",
    "choose_device",
    "fold_batch_norm",
    "inference_settings",
    "optimize_inference",
    "use_contiguous_group_norm",
]

_NORMS: Any = (FrozenBatchNorm2d, nn.BatchNorm2d)


class InferenceSettings(NamedTuple):
    """What :func:`optimize_inference` takes."""

    dtype: torch.dtype
    channels_last: bool
    compiled: bool


def choose_device(name: str | None) -> str:
    """The device of this name, by default a GPU if there is one.

    Raises:
        FreeAnchorError: it is none, or not there.
    """
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as e:
        raise FreeAnchorError(f"the device {name} cannot be used here: {first_line(e)}") from e
    return name


def inference_settings(cfg: CfgNode) -> InferenceSettings:
    """Read the keys of inference.

    `TEST.AMP.ENABLED` is for the precision `SOLVER.AMP.PRECISION`: "auto" is float16 on a GPU, and
    on a CPU bfloat16 where it has instructions for it. `MODEL.MEMORY_FORMAT` "auto" is
    channels-last on a CPU, which was measured to be faster there in both precisions.
    `MODEL.COMPILE` compiles.

    Raises:
        FreeAnchorError: a value is unknown, or the device cannot have it.
    """
    is_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    dtype = choose_precision(cfg, cfg.TEST.AMP.ENABLED).dtype
    return InferenceSettings(dtype, is_channels_last(cfg, is_cpu), cfg.MODEL.COMPILE)


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> None:
    """Make the batch norm behind each convolution part of the convolution.

    The model, in evaluation mode, computes the same up to rounding.

    Args:
        model: a model of Detectron2's layers, changed in place. Norms that are not of the
            convolution's own layer, as in a head whose levels share convolutions, are left alone.
    """
    for conv in model.modules():
        norm: Any = getattr(conv, "norm", None)
        if not isinstance(conv, Conv2d) or not isinstance(norm, _NORMS):
            continue
        mean, var = norm.running_mean, norm.running_var
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias
        )
        conv.norm = None


class _ContiguousGroupNorm(nn.GroupNorm):
    """A group norm that has NCHW in memory, and leaves the layout of its input as it was."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def use_contiguous_group_norm(model: nn.Module) -> None:
    """Let narrow group norms of a model in channels-last compute in NCHW, where it is on a CPU.

    With fewer than 8 channels in a group, PyTorch's takes 2 to 10 times as long in channels-last.
    """
    for module in model.modules():
        if type(module) is nn.GroupNorm and module.num_channels < 8 * module.num_groups:
            module.__class__ = _ContiguousGroupNorm


def optimize_inference(
    model: RetinaNet | GeneralizedRCNN,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    compiled: bool = False,
) -> None:
    """Make a model faster that is only to detect.

    Args:
        model: a RetinaNet, FreeAnchor or two-stage model in evaluation mode, changed in place.
        dtype: of backbone and head, and of the backbone alone where there are two stages. Boxes,
            scores and NMS stay in float32.
        channels_last: whether images and weights are NHWC in memory.
        compiled: whether `torch.compile` compiles backbone and head, at their first call with
            each size of image.
    """
    fold_batch_norm(model)
    if channels_last:
        use_contiguous_group_norm(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def to_layout(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        dtype = next(module.parameters()).dtype
        return (inputs[0].to(dtype=dtype, memory_format=layout),)

    def to_float32(module: nn.Module, inputs: Any, features: dict[str, Tensor]) -> Any:
        return {name: x.float() for name, x in features.items()}

    parts = [model.backbone]
    if isinstance(model, RetinaNet):
        parts.append(model.head)
    else:
        model.backbone.register_forward_hook(to_float32)
    for part in parts:
        part.to(dtype=dtype, memory_format=layout)
    model.backbone.register_forward_pre_hook(to_layout)
    if compiled:
        for part in parts:
            part.compile()
