"""Thresholds that travel with weights."""

import json

import pytest
import torch
from freeanchor.checkpoint import (
    Thresholds,
    convert_file,
    copy_thresholds,
    read_checkpoint,
    read_thresholds,
    write_checkpoint,
    write_thresholds,
)
from freeanchor.errors import FileError

FOUND = Thresholds("val", 0.4, {"a": 0.3, "b": 0.6})


def weights(value):
    return {"a.weight": torch.full((2, 3), value), "b.bias": torch.tensor(value)}


def test_weights_have_their_own(tmp_path):
    """Several in one folder, the newest of each; and none that are not theirs."""
    write_thresholds(tmp_path, weights(1.0), FOUND._replace(score=0.1))
    write_thresholds(tmp_path, weights(1.0), FOUND)
    write_thresholds(tmp_path, weights(2.0), FOUND._replace(score=0.2))
    assert read_thresholds(tmp_path, weights(1.0)) == FOUND
    assert read_thresholds(tmp_path, weights(2.0)).score == 0.2
    other = weights(1.0)
    other["a.weight"][1, 2] = 1.0001
    assert read_thresholds(tmp_path, other) is None
    assert read_thresholds(tmp_path / "nowhere", other) is None


def test_what_weights_are(tmp_path):
    """Neither their order nor their layout, batch norm's counters and torch.compile's names."""
    write_thresholds(tmp_path, weights(1.0), FOUND)
    same = dict(reversed(weights(1.0).items()))
    same["_orig_mod.a.weight"] = same.pop("a.weight").t().contiguous().t()
    same["a.num_batches_tracked"] = torch.tensor(7)
    assert read_thresholds(tmp_path, same) == FOUND
    assert read_thresholds(tmp_path, {**same, "c": torch.zeros(0)}) is None


def test_masks_switched_off(tmp_path):
    """The scores of boxes are the same without the head that finds masks."""
    masks = {"roi_heads.mask_head.predictor.weight": torch.ones(2)}
    write_thresholds(tmp_path, {**weights(1.0), **masks}, FOUND)
    assert read_thresholds(tmp_path, weights(1.0)) == FOUND


def test_conversion_takes_them_along(tmp_path):
    """Into another folder and format."""
    write_checkpoint(tmp_path / "run" / "model.pth", weights(1.0), {})
    write_thresholds(tmp_path / "run", weights(1.0), FOUND)
    convert_file(str(tmp_path / "run" / "model.pth"), tmp_path / "out" / "x.safetensors")
    state = read_checkpoint(str(tmp_path / "out" / "x.safetensors"))["model"]
    assert read_thresholds(tmp_path / "out", state) == FOUND
    copy_thresholds(tmp_path / "run", tmp_path / "other", weights(2.0))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"x": {}}', '{"x": 3}', "nan"])
def test_damaged(tmp_path, content):
    """It is said, and not taken for none."""
    (tmp_path / "thresholds.json").write_text(content)
    with pytest.raises(FileError, match=r"thresholds\.json is damaged"):
        read_thresholds(tmp_path, weights(1.0))
    bad = {"x": {"dataset": "a", "score": float("nan"), "classes": {}}}
    (tmp_path / "thresholds.json").write_text(json.dumps(bad))
    with pytest.raises(FileError, match="from 0 to 1"):
        read_thresholds(tmp_path, weights(1.0))


def test_conversion_of_an_average(tmp_path):
    """What is evaluated and loaded of a run with SOLVER.EMA_DECAY is what is converted."""
    average = {f"module.{k}": v for k, v in weights(3.0).items()}
    content = {"model": weights(1.0), "ema": {**average, "n_averaged": torch.tensor(5)}}
    torch.save(content, tmp_path / "model.pth")
    convert_file(str(tmp_path / "model.pth"), tmp_path / "out.pth")
    assert read_checkpoint(str(tmp_path / "out.pth"))["model"]["b.bias"] == 3
