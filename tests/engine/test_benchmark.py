"""Speed and memory of a config beside RetinaNet's: what is measured, not how fast it is."""

import re

import pytest
from freeanchor.__main__ import main
from freeanchor.engine import benchmark as measure
from freeanchor.engine.benchmark import Setting, _batch, _contestant, _training_step, alternate
from freeanchor.errors import FreeAnchorError
from tiny_run import TINY_MODEL

QUICK = "quick/free_anchor_R_18_FPN.yaml"


def test_command(capsys):
    """Both contestants have speed and memory, and the machine is named."""
    options = ["--images", "2", "--size", "64", "96", "--runs", "1", "--device", "cpu"]
    main(["benchmark", QUICK, *options, "--opts", *TINY_MODEL])
    printed = capsys.readouterr().out
    assert re.search(r"^CPU \(.+\), \d+ threads, PyTorch .* in float32\. Random weights", printed)
    assert "| | FreeAnchor | RetinaNet | ratio |" in printed
    rows = re.findall(r"^\| (.*), [^,]*\| ([\d.e+]+) \| ([\d.e+]+) \| [\d.]+ \|$", printed, re.M)
    assert [x for x, _, _ in rows] == ["training", "inference", "training"]
    assert all(float(x) > 0 for row in rows for x in row[1:])
    assert all(50 < float(x) < 1e5 for x in rows[2][1:])  # MiB of a process with PyTorch


def test_contestants(cfg):
    """They differ in the meta-architecture alone, and train on the same images."""
    cfg.merge_from_list(TINY_MODEL)
    setting = Setting(2, (64, 96), objects=3)
    steps = [_training_step(_contestant(cfg, x), setting) for x in ("FreeAnchor", "RetinaNet")]
    ours, theirs = (dict(step.model.named_parameters()) for step in steps)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    a, b = (next(step.data_loader) for step in steps)
    assert len(a) == 2
    for x, y in zip(a, b, strict=True):
        assert x["image"].equal(y["image"])
        assert x["image"].shape == (3, 64, 96)
        boxes = x["instances"].gt_boxes.tensor
        assert boxes.equal(y["instances"].gt_boxes.tensor)
        assert len(boxes) == 3
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= 96.01).all()
        assert (boxes[:, 3] <= 64.01).all()
    assert len(_batch(cfg, setting._replace(objects=0))[0]["instances"]) == 0


def test_turns():
    """Works take turns, and the first one of each warms up."""
    order = []
    times = alternate(2, "cpu", lambda: order.append("a"), lambda: order.append("b"))
    assert order == ["a", "b"] * 3
    assert len(times) == 2


def test_refused(cfg):
    """RetinaNet is no opponent of itself, nor of two stages, and nothing cannot be measured."""
    with pytest.raises(FreeAnchorError, match="must be at least 1"):
        measure(cfg, Setting(1, (64, 64), runs=0))
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(FreeAnchorError, match="give one of FreeAnchor"):
        measure(cfg, Setting(1, (64, 64)))
    with pytest.raises(SystemExit, match="the config has two stages"):
        main(["benchmark", "quick/mask_rcnn_free_anchor_R_18_FPN.yaml"])
    with pytest.raises(SystemExit, match=r"nothing\.yaml is not in the model zoo"):
        main(["benchmark", "nothing.yaml"])
