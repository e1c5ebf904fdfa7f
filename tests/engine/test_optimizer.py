"""The optimisers, and the learning rates of their parameters."""

import pytest
import torch
from detectron2.solver import build_optimizer as detectron2s
from freeanchor.engine import build_optimizer
from freeanchor.errors import FreeAnchorError
from tiny_run import difference, result

NORMS = (torch.nn.BatchNorm2d, torch.nn.GroupNorm)


@pytest.fixture
def norms(model):
    return {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}


def test_detectron2s_by_default(cfg, model):
    """Groups, values and order of the parameters, so that its checkpoints go on."""
    mine, its = build_optimizer(cfg, model), detectron2s(cfg, model)
    assert isinstance(mine, torch.optim.SGD)
    for group, other in zip(mine.param_groups, its.param_groups, strict=True):
        assert all(x is y for x, y in zip(group["params"], other["params"], strict=True))
        # "foreach" is how it computes, which PyTorch chooses and Detectron2's main branch says.
        other_keys = {k: v for k, v in other.items() if k not in ("params", "foreach")}
        assert {k: group[k] for k in other_keys} == other_keys


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("bias", [1.0, 2.0])
def test_rates(cfg, model, norms, name, bias):
    """Of each trained parameter once: the backbone's by its factor, norms without weight decay."""
    solver = cfg.SOLVER
    solver.OPTIMIZER, solver.BACKBONE_LR_FACTOR, solver.BIAS_LR_FACTOR = name, 0.1, bias
    solver.BASE_LR, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_BIAS = 0.5, 0.25, None
    model.backbone.bottom_up.stem.conv1.weight.requires_grad_(False)
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is getattr(torch.optim, name)
    found = {id(x): group for group in optimizer.param_groups for x in group["params"]}
    trained = {k: x for k, x in model.named_parameters() if x.requires_grad}
    assert found.keys() == {id(x) for x in trained.values()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for parameter, x in trained.items():
        rate = 0.5 * (0.1 if parameter.startswith("backbone.bottom_up.") else 1)
        rate *= bias if parameter.endswith("bias") else 1
        assert found[id(x)]["lr"] == pytest.approx(rate), parameter
        assert found[id(x)]["weight_decay"] == (0 if id(x) in norms else 0.25), parameter


@pytest.mark.parametrize("kind", ["norm", "full_model"])
def test_clipping(cfg, kind):
    """Per parameter by the optimiser, of the whole model by the step, for both optimisers."""
    for name in ("SGD", "AdamW"):
        cfg.SOLVER.OPTIMIZER = name
        clip = cfg.SOLVER.CLIP_GRADIENTS
        clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, kind, 1e-3
        layer = torch.nn.Linear(4, 4)
        optimizer = build_optimizer(cfg, layer)
        for x in layer.parameters():
            x.grad = torch.ones_like(x)
        optimizer.step()
        assert (layer.weight.grad.norm() < 0.01) == (kind == "norm")
        assert clip.ENABLED  # the config is as it was


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("OPTIMIZER", "Adam", "SGD or AdamW, got 'Adam'"), ("BACKBONE_LR_FACTOR", 0.1, "bottom_up")],
)
def test_refusals(cfg, key, value, message):
    setattr(cfg.SOLVER, key, value)
    with pytest.raises(FreeAnchorError, match=message):
        build_optimizer(cfg, torch.nn.Linear(2, 2))


def test_resumed_exactly(tiny):
    """A checkpoint holds AdamW's moments, and the rates of the groups follow the schedule."""
    keys = ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BACKBONE_LR_FACTOR", "0.1")
    whole = tiny(*keys, output="whole")
    output = tiny(*keys)
    for path in output.glob("model_*.pth"):
        if path.name != "model_0000001.pth":
            path.unlink()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    resumed = tiny("--resume", *keys)
    log = (resumed / "log.txt").read_text()
    assert "Starting training from iteration 2" in log
    assert "other values" not in log
    assert not difference(result(whole), result(resumed))
