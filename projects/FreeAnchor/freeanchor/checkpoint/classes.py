"""Which classes the weights of a detector are for, and what they know of those of a model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from .files import CLASS_NAMES, CONFIG_KEY, find, read_checkpoint

__all__ = [
    "CLASS_PREDICTOR",
    "keep_known_classes",
    "openmmlab_classes",
    "read_class_names",
    "zoo_classes",
]

# What differs with the classes, of one-stage models and of two stages.
CLASS_PREDICTOR = re.compile(
    r"^head\.cls_score\."
    r"|^roi_heads\.(?:box_predictor\.(?:\d\.)?(?:cls_score|bbox_pred)|mask_head\.predictor)\."
)
_ROI_SCORES = re.compile(r"^roi_heads\.box_predictor\.(?:\d\.)?cls_score\.")
# As its files say who made them.
_ZOO = "Detectron2 Model Zoo"
_COCO = [x["name"] for x in COCO_CATEGORIES if x["isthing"]]


def read_class_names(path: str) -> list[str]:
    """The classes that a checkpoint is for, in the order of its outputs.

    Args:
        path: see :func:`freeanchor.checkpoint.find`.

    Returns:
        Their names; none of a checkpoint that does not say.

    Raises:
        FileError: the file cannot be read.
    """
    checkpoint = read_checkpoint(find(path))
    names: list[str] = checkpoint.get(CONFIG_KEY, {}).get(CLASS_NAMES, [])
    return names or openmmlab_classes(checkpoint.get("meta")) or zoo_classes(checkpoint)


def openmmlab_classes(meta: Any) -> list[str]:
    """The classes that checkpoints of MMDetection (1, 2 or 3) name.

    Args:
        meta: their entry "meta", whatever it is.

    Returns:
        Their names; none where it does not say.
    """
    part = meta.get("dataset_meta", meta) if isinstance(meta, dict) else None
    names = part.get("classes", part.get("CLASSES")) if isinstance(part, dict) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(x, str) for x in names):
        return []
    if len(set(names)) < len(names):  # no class could be found by its name
        return []
    # MMDetection 1 wrote COCO's with underscores.
    return _COCO if [x.replace("_", " ") for x in names] == _COCO else list(names)


def zoo_classes(checkpoint: Mapping[str, Any]) -> list[str]:
    """The classes of a detector of Detectron2's model zoo, whose only one with 80 are COCO's.

    Args:
        checkpoint: in Detectron2's format.

    Returns:
        Their names; none if it is something else.
    """
    weights = checkpoint.get("model")
    if checkpoint.get("__author__") != _ZOO or not isinstance(weights, Mapping):
        return []
    rows = {k: x.shape[0] for k, x in weights.items() if getattr(x, "ndim", 0) == 1}
    anchors = rows.get("head.bbox_pred.bias", 0) // 4
    is_coco = 0 < anchors * len(_COCO) == rows.get("head.cls_score.bias") or any(
        _ROI_SCORES.match(k) and n == len(_COCO) + 1 for k, n in rows.items()
    )
    return _COCO if is_coco else []


def keep_known_classes(
    weights: dict[str, Any], model: Mapping[str, Tensor], old: Sequence[str], new: Sequence[str]
) -> list[str]:
    """Bring the class predictor of weights to the classes of a model, by their names.

    What the weights have for a class of the model moves to its place there; for the others, the
    initial values of the model stay. Tensors for all classes at once stay as they are.

    Args:
        weights: tensors or arrays by name; changed. Tensors of the class predictor that are for
            other anchors or features, or of which the model has no class, are taken out.
        model: the tensors of the initialised model by name.
        old: the classes of the weights.
        new: the classes of the model.

    Returns:
        The names of the tensors that were brought to the classes of the model.
    """
    known = [x for x in new if x in old]
    changed = []
    for name in [k for k in weights if CLASS_PREDICTOR.match(k) and k in model]:
        theirs, ours = torch.as_tensor(weights[name]), model[name].detach().cpu()
        is_two_stage, is_boxes = name.startswith("roi_heads."), ".bbox_pred." in name
        # The last score of two stages is that of the background.
        common = [None] if is_two_stage and ".cls_score." in name else []
        before, after, values = [*old, *common], [*new, *common], 4 if is_boxes else 1
        is_agnostic = len(theirs) == values != values * len(before)
        if is_two_stage and is_agnostic and theirs.shape == ours.shape:
            continue
        # Rows are by anchor (of one stage), class and value.
        anchors, rest = divmod(len(theirs), values * len(before))
        if not known or rest or ours.shape != (anchors * values * len(after), *theirs.shape[1:]):
            del weights[name]
            continue
        rows = ours.to(theirs.dtype, copy=True).unflatten(0, (anchors, len(after), values))
        source = theirs.unflatten(0, (anchors, len(before), values))
        for x in [*known, *common]:
            rows[:, after.index(x)] = source[:, before.index(x)]
        weights[name] = rows.flatten(0, 2)
        changed.append(name)
    return changed
