"""The optimiser of a run: SGD as Detectron2's, or AdamW; the backbone may have its own rate."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..errors import FreeAnchorError

__all__ = ["build_optimizer", "load_momentum"]

_BOTTOM_UP = "backbone.bottom_up."  # what Detectron2's FPN calls the network under the pyramid


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser that `SOLVER.OPTIMIZER` names.

    Weight decay, the learning rate of biases and clipping are those of Detectron2's keys. Clipping
    by the norm of all gradients is left to the step, see :class:`freeanchor.engine.step.TrainStep`.

    Raises:
        FreeAnchorError: the optimiser is none of the two, or the factor has nothing to act on.
    """
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    if solver.CLIP_GRADIENTS.CLIP_TYPE == "full_model":
        solver.CLIP_GRADIENTS.ENABLED = False
    options: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        kind: type[torch.optim.Optimizer] = torch.optim.SGD
        options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    elif solver.OPTIMIZER == "AdamW":
        kind = torch.optim.AdamW
    else:
        raise FreeAnchorError(f"SOLVER.OPTIMIZER must be SGD or AdamW, got {solver.OPTIMIZER!r}")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.BACKBONE_LR_FACTOR != 1:
        groups = _scale_backbone(groups, model, solver.BACKBONE_LR_FACTOR)
    optimizer: torch.optim.Optimizer = maybe_add_gradient_clipping(cfg, kind)(groups, **options)
    return optimizer


def _scale_backbone(
    groups: list[dict[str, Any]], model: nn.Module, factor: float
) -> list[dict[str, Any]]:
    """Give the parameters of the pretrained network groups of their own, at another rate."""
    bottom_up = {x for name, x in model.named_parameters() if name.startswith(_BOTTOM_UP)}
    if not bottom_up:
        raise FreeAnchorError(
            f"SOLVER.BACKBONE_LR_FACTOR {factor} has nothing to act on: no parameter of the model "
            f"is named {_BOTTOM_UP}*. Set it to 1"
        )
    result = []
    for group in groups:
        for is_bottom_up in (False, True):
            chosen = [x for x in group["params"] if (x in bottom_up) == is_bottom_up]
            rate = group["lr"] * (factor if is_bottom_up else 1)
            if chosen:
                result.append({**group, "params": chosen, "lr": rate})
    return result


def load_momentum(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> list[str]:
    """Go on with what an optimiser keeps of each parameter; all else is as the config says.

    Args:
        optimizer: that of this run.
        state: that of a checkpoint, or None.

    Returns:
        What starts anew, in words.
    """
    if state is None:
        return ["the momentum of the optimiser"]
    groups = optimizer.state_dict()["param_groups"]
    if _kinds(groups) != _kinds(state["param_groups"]):
        return [
            "the momentum of this optimiser (another SOLVER.OPTIMIZER, or other groups of "
            "parameters: BACKBONE_LR_FACTOR, BIAS_LR_FACTOR, WEIGHT_DECAY_NORM or _BIAS)"
        ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    return []


def _kinds(groups: list[dict[str, Any]]) -> list[Any]:
    """What the state of an optimiser depends on: what is kept of which parameters."""
    return [("betas" in group, group["params"]) for group in groups]
