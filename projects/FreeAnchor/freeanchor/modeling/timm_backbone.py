"""Backbones of timm with a feature pyramid: ConvNeXt, Swin, EfficientNet and some hundred others.

timm is an optional dependency. Its models keep their names of tensors, so that its weights load by
adding a prefix, see :mod:`freeanchor.checkpoint.timm_weights`.
"""

import math
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import build_top_block

__all__ = ["TimmBackbone", "build_timm_fpn_backbone"]


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as e:
        raise ImportError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs timm: pip install timm"
        ) from e
    return timm


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding, of features whose sizes its stride divides.

    timm's computes its padding of the sizes, whose terms hold `torch.export` up for minutes.
    """

    def forward(self, x: Tensor) -> Tensor:
        reach = zip(self.kernel_size, self.dilation, self.stride)
        rows, columns = (max((k - 1) * d + 1 - s, 0) for k, d, s in reach)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class TimmBackbone(Backbone):
    """The features of a model of timm, named as Detectron2's ResNets name theirs.

    A feature of stride 2^n is "res<n>": "res3" has stride 8, "res5" stride 32.
    """

    def __init__(
        self,
        name: str,
        out_indices: tuple[int, ...] = (),
        freeze_at: int = 0,
        norm: str = "",
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        """Build the model without weights.

        Args:
            name: a model of timm that has features, as "convnext_tiny.fb_in1k".
            out_indices: which of its features to give; without any, those of stride 8, 16 and 32.
            freeze_at: as many of its features, from the first, are computed by layers that are not
                trained: 1 freezes the stem of a ResNet, 2 its first stage too, as
                `MODEL.BACKBONE.FREEZE_AT` does with Detectron2's.
            norm: "FrozenBN" fixes statistics and weights of its batch norms, "" trains them.
            drop_path: rate of stochastic depth, for models that have it.
            in_channels: of the images.

        Raises:
            ImportError: timm is not installed.
            ValueError: timm has no such model or it has no such features, or another value is none.
        """
        super().__init__()
        timm = _import_timm()
        if norm not in ("", "FrozenBN"):
            raise ValueError(f"MODEL.TIMM.NORM must be FrozenBN or empty, got {norm!r}")
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        if "swin" in name:
            options["strict_img_size"] = False  # not only images of the size of its pretraining

        def create(**more: Any) -> Any:
            try:
                return timm.create_model(
                    name,
                    features_only=True,
                    feature_cls="getter",  # which keeps the names of the tensors
                    in_chans=in_channels,
                    **options,
                    **more,
                )
            except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as e:
                raise ValueError(f"MODEL.TIMM.NAME {name!r} cannot be a backbone: {e}") from e

        with torch.device("meta"):  # no memory, hardly any time
            strides = [x["reduction"] for x in create().feature_info.info]
            if not out_indices:
                if not {8, 16, 32} <= set(strides):
                    raise ValueError(
                        f"MODEL.TIMM.NAME {name!r} has features of the strides {strides}, and a "
                        "pyramid needs 8, 16 and 32"
                    )
                # The last of a stride, as the deepest.
                out_indices = tuple(len(strides) - 1 - strides[::-1].index(s) for s in (8, 16, 32))
            self._check_features(name, create(out_indices=tuple(out_indices)), in_channels)
        self.model = create(out_indices=tuple(out_indices))
        for module in self.model.modules():
            if type(module) is timm.layers.Conv2dSame:
                module.__class__ = _SameConv2d
        info = self.model.feature_info
        self._names = [f"res{math.log2(s):g}" for s in info.reduction()]
        self._out_feature_strides = dict(zip(self._names, info.reduction()))
        self._out_feature_channels = dict(zip(self._names, info.channels()))
        self._out_features = self._names
        self._frozen_norms: list[nn.BatchNorm2d] = []
        if freeze_at:
            self._freeze([x["module"] for x in info.info], freeze_at)
        if norm == "FrozenBN":
            for module in self.model.modules():
                self._freeze_batch_norm(module)

    @staticmethod
    def _check_features(name: str, model: Any, in_channels: int) -> None:
        """Some models take images of one size alone, or give other features than they say."""
        size = 256, 320
        try:
            features = model.eval()(torch.zeros(1, in_channels, *size))
        except (AssertionError, RuntimeError, ValueError) as e:
            raise ValueError(f"MODEL.TIMM.NAME {name!r} takes no images of any size: {e}") from e
        info = model.feature_info
        for feature, channels, stride in zip(features, info.channels(), info.reduction()):
            if feature.shape != (1, channels, *(s // stride for s in size)):
                raise ValueError(
                    f"MODEL.TIMM.NAME {name!r} gives features of {[*feature.shape]} for an image "
                    f"of {size}, not of {channels} channels and stride {stride}"
                )

    def _freeze(self, stages: list[str], freeze_at: int) -> None:
        """Freeze all layers up to the last one of a stage, in the order of the model."""
        if not 0 <= freeze_at <= len(stages):
            raise ValueError(f"MODEL.TIMM.FREEZE_AT must be 0 to {len(stages)}, got {freeze_at}")
        last = stages[freeze_at - 1]
        modules = list(self.model.model.named_modules())
        end = max(i for i, (k, _) in enumerate(modules) if k == last or k.startswith(f"{last}."))
        for _, module in modules[: end + 1]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            self._freeze_batch_norm(module)  # with its statistics

    def _freeze_batch_norm(self, module: nn.Module) -> None:
        """Fix the weights and statistics of a module that is a batch norm.

        It stays one, in evaluation mode: one pass over the features in their own dtype. timm's
        frozen norm takes two, in float32.
        """
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
            module.num_batches_tracked = None
            self._frozen_norms.append(module)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the mode; batch norms that are frozen stay as in evaluation."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    @property
    def size_divisibility(self) -> int:
        """What images are padded to multiples of, also for a model without a pyramid."""
        return max(int(x) for x in self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of (N, C, H, W) images, H and W multiples of size_divisibility."""
        return dict(zip(self._names, self.model(x)))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> FPN:
    """Build a model of timm with P3 to P7, the keys of FPN and of P6 and P7 as for the ResNets.

    Raises:
        ImportError: timm is not installed.
        ValueError: see :class:`TimmBackbone`.
    """
    keys = cfg.MODEL.TIMM
    bottom_up = TimmBackbone(
        keys.NAME,
        tuple(keys.OUT_INDICES),
        keys.FREEZE_AT,
        keys.NORM,
        keys.DROP_PATH,
        input_shape.channels,
    )
    shapes = bottom_up.output_shape()
    in_features = cfg.MODEL.FPN.IN_FEATURES
    if not set(in_features) <= shapes.keys():
        raise ValueError(f"MODEL.FPN.IN_FEATURES {in_features} are not among {[*shapes]}")
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=build_top_block(cfg, shapes),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
