"""One saved training step, run again to find where it stops being finite."""

import math
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from ..checkpoint import read_checkpoint
from ..config import parse_config
from ..errors import FileError, FreeAnchorError
from .precision import autocast, optimize

__all__ = ["replay"]


def replay(path: Path) -> str:
    """Run a step that a training has saved because it was not finite, with anomaly detection.

    Args:
        path: the file that its message names.

    Returns:
        What there is to say of it: the losses, and the operation or the first module that gives
        numbers which are not finite.

    Raises:
        FileError: it is not such a file, or of a model that cannot be built here.
    """
    content = read_checkpoint(str(path))
    if not {"model", "batch", "config", "iteration"} <= content.keys():
        raise FileError(f"{path} is not a training step that was saved (non_finite_*.pth)")
    try:
        cfg = parse_config(content["config"])
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg).train()
        model.load_state_dict(content["model"])
    except (FreeAnchorError, KeyError, RuntimeError) as e:
        raise FileError(
            f"{path} cannot be replayed here, but with the version of FreeAnchor and the modules "
            f"of your own that its training had: {' '.join(str(e).split())}"
        ) from e
    weights = [name for name, x in model.named_parameters() if not _is_finite(x)]
    if weights:
        return f"Iteration {content['iteration']}: {weights[0]} was not finite before the step"
    optimize(cfg, model)
    with autocast(cfg):
        found = _forward_backward(model, [_from_plain(x) for x in content["batch"]])
    return f"Iteration {content['iteration']}: {found}"


def _forward_backward(model: torch.nn.Module, batch: list[dict[str, Any]]) -> str:
    places: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = output if isinstance(output, list | tuple) else [output]
        for x in tensors:
            if isinstance(x, torch.Tensor) and not places and not _is_finite(x):
                places.append(name)

    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
    images = [x["image"].float() for x in batch]
    look("an image", images)
    with EventStorage():
        losses: dict[str, torch.Tensor] = model(batch)
        said = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
        if places:
            return f"{said}. The first output that is not finite is that of {places[0]}"
        try:
            with torch.autograd.set_detect_anomaly(True):
                torch.stack(list(losses.values())).sum().backward()
        except RuntimeError as e:  # anomaly detection's
            return f"{said}. In the backward pass: {e}"
    bad = [n for n, x in model.named_parameters() if x.grad is not None and not _is_finite(x.grad)]
    if bad:
        return f"{said}. The gradient of {bad[0]} is not finite"
    if not all(math.isfinite(loss.item()) for loss in losses.values()):
        return f"{said}. All outputs of modules are finite: it begins in the losses"
    return f"{said}, all finite: with this precision and in one process, the step is sound"


def _is_finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())


def _from_plain(image: dict[str, Any]) -> dict[str, Any]:
    instances = Instances(tuple(image["image"].shape[-2:]))
    instances.gt_boxes, instances.gt_classes = Boxes(image["boxes"]), image["classes"]
    masks = image.get("masks")
    if isinstance(masks, torch.Tensor):
        instances.gt_masks = BitMasks(masks)
    elif masks is not None:
        instances.gt_masks = PolygonMasks([[x.numpy() for x in polygons] for polygons in masks])
    return {**image, "instances": instances}
