"""Weights of a detector for other classes: what they know of the classes of a model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CLASS_PREDICTOR", "keep_known_classes"]

# What differs with the classes, of one-stage models and of two stages.
CLASS_PREDICTOR = re.compile(
    r"^head\.cls_score\."
    r"|^roi_heads\.(?:box_predictor\.(?:\d\.)?(?:cls_score|bbox_pred)|mask_head\.predictor)\."
)


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
