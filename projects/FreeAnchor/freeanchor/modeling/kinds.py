"""Which kind of model there is: that of a config, or one that is built."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import is_two_stage
from .bag_detector import BagDetector

__all__ = ["dense_detector", "has_bags", "is_one_stage", "without_ddp"]


def _is_kind(cfg: CfgNode, kind: type[nn.Module]) -> bool:
    name = cfg.MODEL.META_ARCHITECTURE
    return name in META_ARCH_REGISTRY and issubclass(META_ARCH_REGISTRY.get(name), kind)


def is_one_stage(cfg: CfgNode) -> bool:
    """Whether the model of a config is a RetinaNet; one of the user's own may have no stages."""
    return _is_kind(cfg, RetinaNet)


def has_bags(cfg: CfgNode) -> bool:
    """Whether the model of a config, or its first stage, is a :class:`BagDetector`."""
    if is_two_stage(cfg):
        return bool(cfg.MODEL.PROPOSAL_GENERATOR.NAME == "FreeAnchorRPN")
    return _is_kind(cfg, BagDetector)


def without_ddp(model: nn.Module) -> nn.Module:
    """The model itself, if it is in DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def dense_detector(model: nn.Module) -> RetinaNet:
    """The RetinaNet or FreeAnchor that a model is, possibly in DistributedDataParallel.

    Raises:
        TypeError: it is another one.
    """
    model = without_ddp(model)
    if not isinstance(model, RetinaNet):
        raise TypeError(f"{type(model).__name__} is not a RetinaNet or FreeAnchor")
    return model
