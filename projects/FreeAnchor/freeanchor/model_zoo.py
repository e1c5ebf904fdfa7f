"""FreeAnchor's configs and published weights, as in `detectron2.model_zoo`."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import Checkpointer
from .config import CONFIGS, read_config
from .errors import FileError

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]

_TRAINED = {
    "MMDetection/free_anchor_R_50_FPN_1x": "mmdet://freeanchor_r50_fpn_1x_coco",
    "MMDetection/free_anchor_R_101_FPN_1x": "mmdet://freeanchor_r101_fpn_1x_coco",
    "MMDetection/free_anchor_X_101_32x4d_FPN_1x": "mmdet://freeanchor_x101-32x4d_fpn_1x_coco",
}


def get_config_file(config_path: str) -> str:
    """Return the path of a config.

    Args:
        config_path: its path in `configs/`, as "COCO-Detection/free_anchor_R_50_FPN_1x.yaml".

    Raises:
        FileError: there is no such config. The message lists those that there are.
    """
    path = CONFIGS / config_path
    if not path.is_file():
        known = sorted(x.relative_to(CONFIGS).as_posix() for x in CONFIGS.rglob("*.yaml"))
        raise FileError(f"{config_path} is not in the model zoo, only {', '.join(known)}")
    return str(path)


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """Return a config.

    Args:
        config_path: see :func:`get_config_file`.
        trained: whether `MODEL.WEIGHTS` are those trained with this config, instead of those that
            training starts from.

    Raises:
        FileError: see :func:`get_config_file` and :func:`get_checkpoint_url`.
    """
    cfg = read_config(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get_checkpoint_url(config_path: str) -> str:
    """Return where the weights trained with a config are, as `MODEL.WEIGHTS` takes it.

    Args:
        config_path: see :func:`get_config_file`.

    Raises:
        FileError: there are none. The message lists the configs that have some.
    """
    try:
        return _TRAINED[config_path.removesuffix(".yaml")]
    except KeyError:
        raise FileError(
            f"There are no published weights of {config_path}, only of {', '.join(_TRAINED)}"
        ) from None


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Return a model with its weights, in training mode.

    Args:
        config_path: see :func:`get_config_file`.
        trained: see :func:`get_config`.
        device: where it is to be, by default a GPU if there is one.

    Raises:
        FileError: see :func:`get_config`; or the weights cannot be had.
    """
    cfg = get_config(config_path, trained)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = build_model(cfg)
    checkpointer = Checkpointer(model, cfg)
    if trained:
        checkpointer.load(cfg.MODEL.WEIGHTS)
    else:
        checkpointer.load_start(cfg.MODEL.WEIGHTS)
    return model
