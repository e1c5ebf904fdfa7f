"""FreeAnchor's configs and published weights, as in `detectron2.model_zoo`."""

from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import Checkpointer
from .config import CONFIGS, read_config
from .errors import FileError
from .modeling import choose_device

__all__ = ["ZooModel", "get", "get_checkpoint_url", "get_config", "get_config_file", "models"]

_TRAINED = {
    "MMDetection/free_anchor_R_50_FPN_1x": "mmdet://freeanchor_r50_fpn_1x_coco",
    "MMDetection/free_anchor_R_101_FPN_1x": "mmdet://freeanchor_r101_fpn_1x_coco",
    "MMDetection/free_anchor_X_101_32x4d_FPN_1x": "mmdet://freeanchor_x101-32x4d_fpn_1x_coco",
}
# COCO AP on val2017 as published, not run with this code.
_PAPER, _MMDETECTION = "the paper's repository", "MMDetection"
_PUBLISHED = {
    "COCO-Detection/free_anchor_R_50_FPN_1x": (38.7, _PAPER),
    "COCO-Detection/free_anchor_R_101_FPN_1x": (40.5, _PAPER),
    "COCO-Detection/free_anchor_R_101_FPN_j2x": (42.7, _PAPER),
    "COCO-Detection/free_anchor_R_101_FPN_e2x": (43.2, _PAPER),
    "COCO-Detection/free_anchor_X_101_64x4d_FPN_j2x": (44.5, _PAPER),
    "COCO-Detection/free_anchor_X_101_64x4d_FPN_e2x": (45.6, _PAPER),
    "MMDetection/free_anchor_R_50_FPN_1x": (38.7, _MMDETECTION),
    "MMDetection/free_anchor_R_101_FPN_1x": (40.3, _MMDETECTION),
    "MMDetection/free_anchor_X_101_32x4d_FPN_1x": (41.9, _MMDETECTION),
}
# Configs that others are made of, or that check another one.
_NO_MODEL = ("Base-", "MultiScaleTest", "_ms.yaml", "_acc_test.yaml")


class ZooModel(NamedTuple):
    """What the zoo has of a model.

    Attributes:
        config: what the functions here take.
        start: the weights that training starts from, empty for none.
        trained: the weights that were trained with it, empty for none.
        published_ap: COCO AP from the literature, None if there is none.
        source: where that is from.
    """

    config: str
    start: str
    trained: str
    published_ap: float | None
    source: str

    def __str__(self) -> str:
        """Some lines to be printed."""
        lines = [self.config, f"    training starts from {self.start or 'nothing'}"]
        if self.trained:
            lines.append(f"    trained weights: {self.trained}")
        if self.published_ap is not None:
            lines.append(
                f"    COCO AP {self.published_ap} in the literature ({self.source}), not run here"
            )
        return "\n".join(lines)


def models() -> list[ZooModel]:
    """Return what there is, in the order of the names."""
    found = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = path.relative_to(CONFIGS).as_posix()
        if not any(x in name for x in _NO_MODEL):
            stem = name.removesuffix(".yaml")
            ap, source = _PUBLISHED.get(stem, (None, ""))
            start = read_config(path).MODEL.WEIGHTS
            found.append(ZooModel(name, start, _TRAINED.get(stem, ""), ap, source))
    return found


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
        FreeAnchorError: see :func:`get_config`; or the weights cannot be had, or the device.
    """
    cfg = get_config(config_path, trained)
    cfg.MODEL.DEVICE = choose_device(device)
    model: nn.Module = build_model(cfg)
    checkpointer = Checkpointer(model, cfg)
    if trained:
        checkpointer.load(cfg.MODEL.WEIGHTS)
    else:
        checkpointer.load_start(cfg.MODEL.WEIGHTS)
    return model
