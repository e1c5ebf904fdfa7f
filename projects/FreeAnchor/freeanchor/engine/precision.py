"""How the steps of a run are computed: precision, memory layout, compilation.

What is chosen here changes the backbone and the head only. Weights, their gradients, the optimiser,
checkpoints and losses are in float32 in every case.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn

from ..modeling.optimize import use_contiguous_group_norm
from ..modeling.precision import choose_precision, is_channels_last

__all__ = ["autocast", "inference_autocast", "optimize", "set_float32_precision"]

logger = logging.getLogger(__name__)


def autocast(cfg: CfgNode) -> torch.autocast:
    """The context of a forward pass in training."""
    return _autocast(cfg, cfg.SOLVER.AMP.ENABLED)


def _autocast(cfg: CfgNode, enabled: bool) -> torch.autocast:
    dtype = choose_precision(cfg, enabled).dtype
    is_mixed = dtype != torch.float32
    return torch.autocast(
        torch.device(cfg.MODEL.DEVICE).type,
        dtype=dtype if is_mixed else torch.bfloat16,  # it takes no float32
        enabled=is_mixed,
    )


@contextlib.contextmanager
def inference_autocast(cfg: CfgNode, model: nn.Module) -> Iterator[None]:
    """The same in evaluation, by `TEST.AMP.ENABLED`: boxes, scores and NMS stay in float32.

    Args:
        cfg: config of the run.
        model: a RetinaNet, FreeAnchor or GeneralizedRCNN; of others, the precision is float32.
    """
    if cfg.TEST.AMP.ENABLED and isinstance(model, GeneralizedRCNN):  # it has its own casts
        with _autocast(cfg, cfg.TEST.AMP.ENABLED):
            yield
        return
    head = getattr(model, "head", None)
    if not (cfg.TEST.AMP.ENABLED and isinstance(head, nn.Module)):
        yield
        return

    def to_float32(head: nn.Module, inputs: Any, outputs: list[list[Tensor]]) -> Any:
        return [[level.float() for level in levels] for levels in outputs]

    handle = head.register_forward_hook(to_float32, prepend=True)
    try:
        with _autocast(cfg, cfg.TEST.AMP.ENABLED):
            yield
    finally:
        handle.remove()


def set_float32_precision(cfg: CfgNode) -> None:
    """Let GPUs compute float32 in TensorFloat-32 or not, by a key that 0.6 does not have.

    As Detectron2's main branch: "highest" is without, and an empty string is PyTorch's defaults.
    """
    if torch.cuda.is_available() and (precision := cfg.get("FLOAT32_PRECISION")):
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
        logger.info(f"Float32 on GPUs in precision {precision}")


class _Bfloat16Conv2d(nn.Conv2d):
    """A convolution in float32, also within autocast, where oneDNN is wrong or slow in bfloat16.

    Version 3.10 (PyTorch 2.11): on maps smaller than the kernel, the gradient of weights that no
    pixel reaches is not written, so it is what was in memory before (with stride 2 on a map one
    pixel wide). And the gradient of a 1 x 1 convolution with a stride and fewer than 16 channels is
    written past its end. The gradients of a depthwise convolution that has a stride or is larger
    than 3 x 3 take 2 to 40 times as long as in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        is_small = min(x.shape[-2:]) < max(2, *self.kernel_size)
        is_narrow = self.in_channels < 16 and max(self.kernel_size) == 1 < max(self.stride)
        is_depthwise = self.groups == self.in_channels > 1
        is_trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        is_slow = is_depthwise and is_trained and max(self.kernel_size) * max(self.stride) > 3
        in_float32 = is_small or is_narrow or is_slow
        if not in_float32 or not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(dtype)


class _Float32ROIAlign(ROIAlign):
    """A pooling whose boxes stay in float32, also within autocast.

    Detectron2 gives them the dtype of the features: from 512 pixels on, in bfloat16, only every
    fourth position is left of them. Torchvision pools in float32 in either case.
    """

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        pooled: Tensor = super().forward(features.float(), boxes)
        return pooled.to(features.dtype)


def _masks_to_float32(head: nn.Module, inputs: Any, outputs: Any) -> None:
    """Let found masks be pasted at positions in float32: their dtype is that of the positions."""
    if not head.training:
        for found in outputs:
            found.pred_masks = found.pred_masks.float()


def optimize(cfg: CfgNode, model: nn.Module) -> None:
    """Lay the weights of a detector out in memory, and compile it, as the config says.

    Names and values of the weights stay as they are, and what the convolutions compute.

    Args:
        cfg: config of the run.
        model: changed in place.

    Raises:
        FreeAnchorError: `MODEL.MEMORY_FORMAT` is unknown.
    """
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = _Float32ROIAlign
        elif isinstance(module, BaseMaskRCNNHead):
            module.register_forward_hook(_masks_to_float32)
    precision = choose_precision(cfg, cfg.SOLVER.AMP.ENABLED)
    is_bfloat16_on_cpu = cfg.MODEL.DEVICE == "cpu" and precision.dtype == torch.bfloat16
    if is_bfloat16_on_cpu:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                kind = type(module)
                module.__class__ = type(kind.__name__, (_Bfloat16Conv2d, kind), {})
    channels_last = is_channels_last(cfg, is_bfloat16_on_cpu)
    if channels_last:
        use_contiguous_group_norm(model)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cfg.MODEL.COMPILE:
        for name in ("backbone", "head"):
            if hasattr(model, name):
                getattr(model, name).compile()
    logger.info(
        f"Convolutions in {str(precision.dtype).removeprefix('torch.')}, as {precision.reason}; "
        f"memory format {'channels_last' if channels_last else 'contiguous'}"
        f"{', compiled' if cfg.MODEL.COMPILE else ''}; weights and losses in float32"
    )
