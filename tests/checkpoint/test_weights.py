"""Weights are found wherever a file has them, and what cannot be weights is refused by name."""

import pickle

import numpy as np
import pytest
import torch
from freeanchor.checkpoint import (
    Checkpointer,
    convert_file,
    read_checkpoint,
    to_detectron2,
    write_checkpoint,
)
from freeanchor.errors import FileError
from safetensors.torch import save_file

KEY = "backbone.bottom_up.stem.conv1.weight"


@pytest.fixture
def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def load_each_way(path, model, cfg):
    """By MODEL.WEIGHTS to train and to detect, and by the command."""
    checkpointer = Checkpointer(model, cfg)
    yield lambda: checkpointer.load_start(str(path))
    yield lambda: checkpointer.load(str(path))
    yield lambda: convert_file(str(path), path.with_name("out.pth"))


TENSORS = {
    "NaN": lambda x: x * float("nan"),
    "infinite": lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
    "too large for float16": lambda x: (x + 1e6).half(),
    "int8": lambda x: (100 * x).to(torch.int8),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "list": lambda x: x.tolist(),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", TENSORS)
def test_values_that_are_no_weights(tmp_path, cfg, model, state, kind):
    """One such tensor would be copied into the model, and it would detect nonsense."""
    path = tmp_path / "bad.pth"
    torch.save({"model": {**state, KEY: TENSORS[kind](state[KEY])}}, path)
    for load in load_each_way(path, model, cfg):
        with pytest.raises(FileError, match=rf"bad\.pth cannot be used as weights: {KEY} is"):
            load()
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": None}, "NoneType as 'model'"),
        ({"state_dict": [1, 2]}, "list as 'state_dict'"),
        ({"blobs": 3}, "int as 'blobs'"),
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({"model": {"model": {KEY: torch.zeros(1)}}}, "model is of type dict"),
        ({"teacher": {KEY: torch.zeros(1)}, "student": {}}, "teacher is of type dict, student"),
        ({"model": {1: torch.zeros(1)}}, "1 is no name"),
        ({"model": {KEY: torch.zeros(1), "epoch": 3}}, "epoch is of type int"),
    ],
)
def test_other_things_than_tensors_by_name(tmp_path, cfg, model, content, named):
    """Each is named, instead of a traceback or a file that is taken for weights."""
    path = tmp_path / "bad.pth"
    torch.save(content, path)
    for load in load_each_way(path, model, cfg):
        with pytest.raises(FileError, match=rf"bad\.pth .*{named}"):
            load()


def test_arrays_of_a_type_that_tensors_lack():
    with pytest.raises(FileError, match="a is an array of"):
        to_detectron2({"a": np.zeros(3, np.longdouble)}, "a.pkl")


def test_versions_of_modules_reach_them(tmp_path, model):
    """PyTorch keeps them beside the tensors, and modules read old files by them."""
    state = model.state_dict()
    for content in ({"model": state}, {"state_dict": state}, state):
        torch.save(content, tmp_path / "old.pth")
        found = to_detectron2(read_checkpoint(str(tmp_path / "old.pth")), "old.pth")["model"]
        assert found._metadata == state._metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_weights(tmp_path, cfg, model, state, dtype):
    saved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"state_dict": saved, "epoch": 3}, tmp_path / "other.pth")
    Checkpointer(model, cfg).load(str(tmp_path / "other.pth"))
    assert torch.equal(model.state_dict()[KEY], saved[KEY].float())


@pytest.mark.parametrize(
    ("entry", "wrap"),
    [
        ("model_ema", lambda x: {"n_averaged": torch.tensor(3), **x}),  # torchvision's
        ("state_dict_ema", dict),  # timm's
        ("ema", lambda x: {"module": x, "updates": 4}),
        ("ema", dict),
    ],
)
def test_averages_of_other_projects(state, caplog, entry, wrap):
    """Not taken, and said: which of the two a user wants, nothing tells."""
    found = to_detectron2({"model": state, entry: wrap(state), "epoch": 3}, "other.pth")
    assert f"other.pth: took the weights in 'model', not those in {entry}" in caplog.text
    assert found["model"].keys() == state.keys()


def test_optimisers_and_own_averages_are_no_other_weights(tmp_path, cfg, model, state, caplog):
    optimizer = torch.optim.AdamW(model.parameters())
    for x in model.parameters():
        x.grad = torch.zeros_like(x)
    optimizer.step()
    to_detectron2({"model": state, "optimizer": optimizer.state_dict()}, "other.pth")
    Checkpointer(model, cfg, str(tmp_path)).save("own", ema={"n_averaged": 1, **state})
    Checkpointer(model, cfg).load(str(tmp_path / "own.pth"))
    assert "took the weights" not in caplog.text


@pytest.mark.parametrize(
    "names", [("weight",), ("conv1.weight", "conv1_w")], ids=["ambiguous", "twice"]
)
def test_names_that_cannot_be_matched(tmp_path, cfg, model, names):
    """Detectron2 matches those of Caffe2, and gives up by an error of its own."""
    path = tmp_path / "names.PKL"
    path.write_bytes(pickle.dumps({name: np.zeros(64, "f4") for name in names}))
    with pytest.raises(FileError, match=r"names\.PKL are not of this model: their names are not"):
        Checkpointer(model, cfg).load_start(str(path))


@pytest.mark.parametrize(
    "config", [{1: 2}, {"MODEL.FREEANCHOR.CLASS_NAMES": 3}, {"MODEL.FREEANCHOR.CLASS_NAMES": [3]}]
)
def test_config_keys_that_are_none(tmp_path, config):
    write_checkpoint(tmp_path / "bad.pth", {}, config)
    with pytest.raises(FileError, match=r"bad\.pth is damaged: the config keys"):
        read_checkpoint(str(tmp_path / "bad.pth"))


def test_a_retinanet_of_detectron2(tmp_path, cfg, model, state, caplog):
    """It has the tensors of a FreeAnchor, but boxes of another scale, which nothing tells."""
    torch.save({"model": state, "__author__": "Detectron2 Model Zoo"}, tmp_path / "zoo.pth")
    save_file(state, str(tmp_path / "zoo.safetensors"))
    for name in ("zoo.pth", "zoo.safetensors"):
        Checkpointer(model, cfg).load(str(tmp_path / name))
        assert 'set MODEL.RETINANET.BBOX_REG_WEIGHTS "(1.0, 1.0, 1.0, 1.0)"' in caplog.text
        caplog.clear()
    Checkpointer(model, cfg, str(tmp_path)).save("own")
    Checkpointer(model, cfg).load(str(tmp_path / "own.pth"))
    assert "BBOX_REG_WEIGHTS" not in caplog.text
