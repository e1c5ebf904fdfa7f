"""Loading weights: what fits is loaded, and what does not is an error that says so."""

import logging
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import GOLDEN, quick_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from freeanchor.checkpoint import (
    Checkpointer,
    convert,
    described_config,
    read_checkpoint,
    read_class_names,
    write_checkpoint,
)
from freeanchor.config import CONFIGS, read_config
from freeanchor.errors import FileError
from torch import nn

MMDET = str(GOLDEN / "mmdet_r50.pth")
QUICK, LITE0 = "quick/free_anchor_R_18_FPN.yaml", "finetune/free_anchor_Lite0_FPN.yaml"


def build(cfg, *options):
    cfg = cfg.clone()
    cfg.merge_from_list(list(options))
    return cfg, build_model(cfg)


def saved(tmp_path, cfg, *options):
    """Weights that no initialisation has, of a model with other options."""
    _, model = build(cfg, *options)
    state = {
        k: torch.rand_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()
    }
    write_checkpoint(tmp_path / "saved.pth", state, {})
    return str(tmp_path / "saved.pth"), state


def loaded_names(model, state):
    return {k for k, v in model.state_dict().items() if k in state and torch.equal(v, state[k])}


def test_fine_tuning_to_other_classes(cfg, tmp_path, caplog):
    """All but the class predictor is loaded; it keeps its initial values, and the log names it."""
    path, state = saved(tmp_path, cfg, "MODEL.RETINANET.NUM_CLASSES", 5)
    cfg, model = build(cfg)
    before = model.head.cls_score.bias.clone()
    with caplog.at_level(logging.INFO):
        Checkpointer(model, cfg).load_start(path)
    anew = {"head.cls_score.weight", "head.cls_score.bias"}
    assert loaded_names(model, state) == model.state_dict().keys() - anew
    assert torch.equal(model.head.cls_score.bias, before)
    message = next(r.message for r in caplog.records if "Initialised anew" in r.message)
    assert re.findall(r"head\.\w+\.\w+", message) == [
        "head.cls_score.weight",
        "head.cls_score.bias",
    ]
    assert "(45, 64, 3, 3) instead of (27, 64, 3, 3)" in message
    count = sum(not k.endswith("num_batches_tracked") for k in model.state_dict())
    assert f"Loaded {count - 2} of {count} tensors" in caplog.text


def test_fine_tuning_to_other_anchors(cfg, tmp_path):
    """Both predictors are initialised anew."""
    path, state = saved(tmp_path, cfg)
    cfg, model = build(cfg, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
    Checkpointer(model, cfg).load_start(path)
    names = model.state_dict().keys() - loaded_names(model, state)
    assert {k.rpartition(".")[0] for k in names} == {"head.cls_score", "head.bbox_pred"}


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.RETINANET.NUM_CLASSES", 5),
        ("MODEL.RETINANET.NUM_CONVS", 1),
        ("MODEL.RETINANET.NUM_CONVS", 3),
        ("MODEL.FPN.OUT_CHANNELS", 32),
        ("MODEL.RESNETS.DEPTH", 34),
    ],
)
def test_a_whole_model_must_match(cfg, tmp_path, options):
    """To evaluate or resume, one tensor too few or too many is an error."""
    path, _ = saved(tmp_path, cfg, *options)
    cfg, model = build(cfg)
    with pytest.raises(FileError, match=r"saved\.pth are not of this model"):
        Checkpointer(model, cfg).load(path)


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.FPN.OUT_CHANNELS", 32),
        ("MODEL.RESNETS.DEPTH", 34),
        ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
        (
            *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 32),
        ),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_training_does_not_start_from_another_backbone(cfg, tmp_path, options, swapped):
    """Neither a deeper nor a shallower one: Detectron2 would load what has the same name."""
    path, _ = saved(tmp_path, cfg, *(() if swapped else options))
    cfg, model = build(cfg, *(options if swapped else ()))
    with pytest.raises(FileError, match=r"saved\.pth are not of this model: they fill \d+ of its"):
        Checkpointer(model, cfg).load_start(path)


def test_a_part_of_the_backbone(cfg, tmp_path, caplog):
    """What is not in the file is named apart from the rest of the model, or refused if frozen."""
    _, state = saved(tmp_path, cfg)
    path, stem = str(tmp_path / "part.pth"), "backbone.bottom_up.stem.conv1.weight"
    write_checkpoint(path, {k: v for k, v in state.items() if k != stem}, {})
    cfg, model = build(cfg)
    Checkpointer(model, cfg).load_start(path)
    assert f"lack a part of the backbone, which starts at random: {stem}\n" in caplog.text
    cfg, model = build(cfg, "MODEL.BACKBONE.FREEZE_AT", 1)
    with pytest.raises(FileError, match=rf"frozen by FREEZE_AT .*, but random: {re.escape(stem)}$"):
        Checkpointer(model, cfg).load_start(path)


@pytest.mark.parametrize("start", [False, True])
def test_weights_of_something_else(cfg, tmp_path, start):
    """A checkpoint that matches nothing is no random model."""
    cfg, model = build(cfg)
    path = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 3).state_dict(), path)
    checkpointer = Checkpointer(model, cfg)
    with pytest.raises(FileError, match=r"other\.pth are not of this model: they fill 0 of its"):
        (checkpointer.load_start if start else checkpointer.load)(str(path))


def test_weights_of_another_detector(cfg, tmp_path, caplog):
    """A Mask R-CNN's backbone is a start; what it lacks and has besides is named."""
    path, state = saved(tmp_path, cfg)
    state = {k: v for k, v in state.items() if k.startswith("backbone.") and "top_block" not in k}
    state["roi_heads.box_predictor.weight"] = torch.zeros(2)
    write_checkpoint(path, state, {})
    cfg, model = build(cfg)
    Checkpointer(model, cfg).load_start(path)
    assert loaded_names(model, state) == state.keys() - {"roi_heads.box_predictor.weight"}
    assert "not in the model: roi_heads.box_predictor.weight" in caplog.text
    assert re.search(r"Initialised anew: .*backbone\.top_block\.p6\.weight.*head\.cls", caplog.text)


def imagenet_state(model):
    prefix = "backbone.bottom_up."
    state = model.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("kind", ["zoo.pkl", "pycls.pyth"])
def test_detectron2s_own_formats(cfg, tmp_path, kind, norm):
    """Weights in its names are matched by its heuristics, as in Detectron2."""
    cfg, model = build(cfg, "MODEL.RESNETS.NORM", norm)
    state = {
        k: torch.rand_like(v) for k, v in imagenet_state(model).items() if v.is_floating_point()
    }
    path = tmp_path / kind
    if kind == "zoo.pkl":
        arrays = {k: v.numpy() for k, v in state.items()}
        content = {"model": arrays, "__author__": "me", "matching_heuristics": True}
        path.write_bytes(pickle.dumps({**content, "linear.weight": None}))
    else:
        torch.save({"model_state": state, "optimizer_state": {}}, path)
    Checkpointer(model, cfg).load_start(str(path))
    assert {k: v for k, v in imagenet_state(model).items() if k in state}.keys() == state.keys()
    assert all(torch.equal(v, imagenet_state(model)[k]) for k, v in state.items())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_caffe2(cfg, tmp_path, norm):
    """ImageNet weights of MSRA: in Caffe2's names and without the statistics of batch norm."""
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256])
    cfg, model = build(cfg, "MODEL.RESNETS.NORM", norm)
    blobs = {}
    for name, tensor in imagenet_state(model).items():
        if name.endswith((".running_mean", ".running_var", ".num_batches_tracked")):
            continue
        name = name.replace("stem.conv1.norm.", "res.conv1_bn.").replace("stem.conv1.", "conv1.")
        name = re.sub(r"res(\d)\.(\d+)\.shortcut", r"res\1_\2_branch1", name)
        for number, letter in zip("123", "abc"):
            name = re.sub(rf"res(\d)\.(\d+)\.conv{number}", rf"res\1_\2_branch2{letter}", name)
        name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b")
        name = name.replace("res.conv1_bn.weight", "res_conv1_bn_s")
        name = name.replace("res.conv1_bn.bias", "res_conv1_bn_b").replace(".weight", "_w")
        blobs[name] = torch.rand_like(tensor).numpy()
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": {**blobs, "lr_momentum": 1}}, 2))
    Checkpointer(model, cfg).load_start(str(tmp_path / "R-50.pkl"))
    stem = model.backbone.bottom_up.stem.conv1
    assert torch.equal(stem.weight, torch.tensor(blobs["conv1_w"]))
    assert torch.equal(stem.norm.weight, torch.tensor(blobs["res_conv1_bn_s"]))
    last = model.backbone.bottom_up.res5[2].conv3
    assert torch.equal(last.weight, torch.tensor(blobs["res5_2_branch2c_w"]))


@pytest.mark.parametrize("load", ["load", "load_start"])
def test_old_checkpoints_of_detectron2(cfg, tmp_path, load):
    """Its zoo's have pixels and anchors, which are the config's now; other pixels are refused."""
    cfg, model = build(cfg)
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    arrays["anchor_generator.cell_anchors.0"] = torch.zeros(9, 4).numpy()
    arrays["pixel_mean"] = model.pixel_mean.numpy()
    arrays["pixel_std"] = model.pixel_std.numpy()
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    getattr(Checkpointer(model, cfg), load)(str(tmp_path / "zoo.pkl"))
    cfg, model = build(cfg, "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])
    message = re.escape('add MODEL.PIXEL_STD "[57.375, 57.12, 58.395]"')
    with pytest.raises(FileError, match=message):
        getattr(Checkpointer(model, cfg), load)(str(tmp_path / "zoo.pkl"))


def test_config_that_does_not_fit_the_weights(tmp_path):
    """It is refused, and the message has the options to add, on the fly and after conversion."""
    converted = convert(read_checkpoint(MMDET), MMDET)
    write_checkpoint(tmp_path / "converted.safetensors", converted.weights, converted.config)
    cfg = converted.build_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(["INPUT.FORMAT", "BGR", "MODEL.FREEANCHOR.P7_RELU", True])
    cfg.merge_from_list(["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]])
    for path in (MMDET, str(tmp_path / "converted.safetensors")):
        with pytest.raises(FileError, match=re.escape(path)) as error:
            Checkpointer(build_model(cfg), cfg).load(path)
        options = re.findall(r'([A-Z]+\.[A-Z0-9_.]+) "(.*?)"', str(error.value))
        assert [k for k, _ in options] == [
            "INPUT.FORMAT",
            "MODEL.PIXEL_STD",
            "MODEL.FREEANCHOR.P7_RELU",
        ]
        fixed = cfg.clone()
        fixed.merge_from_list([x for option in options for x in option])
        Checkpointer(build_model(fixed), fixed).load(path)


def test_fine_tuning_a_converted_model_to_other_classes():
    """The number of classes is the one key that may differ."""
    cfg = convert(read_checkpoint(MMDET), MMDET).build_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = 7
    model = build_model(cfg)
    with pytest.raises(FileError, match=r'NUM_CLASSES "3"'):
        Checkpointer(model, cfg).load(MMDET)
    Checkpointer(model, cfg).load_start(MMDET)


@pytest.mark.parametrize("path", ["nowhere.pth", "catalog://nothing", "detectron2x://a.pkl"])
def test_weights_that_are_not_there(cfg, model, path):
    """The name is in the message."""
    with pytest.raises(FileError, match=path):
        Checkpointer(model, cfg).load(path)


def test_no_weights(cfg, model):
    """An empty name loads nothing, as in Detectron2."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert Checkpointer(model, cfg).load("") == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_checkpoints_are_detectron2s(tmp_path, cfg, model):
    """What is saved loads in Detectron2's own checkpointer, and the other way round."""
    Checkpointer(model, cfg, str(tmp_path)).save("ours")
    assert "model" in torch.load(tmp_path / "ours.pth", weights_only=True)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # for which its checkpointer is its own
    other = build_model(cfg)
    DetectionCheckpointer(other).load(str(tmp_path / "ours.pth"))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    DetectionCheckpointer(other, str(tmp_path)).save("theirs")
    Checkpointer(model, cfg).load(str(tmp_path / "theirs.pth"))


def test_resuming_where_the_best_alone_is_left(tmp_path, cfg, model):
    """In a script too, it does not start anew, in which the best would be overwritten."""
    checkpointer = Checkpointer(model, cfg, str(tmp_path))
    checkpointer.save("model_best")
    with pytest.raises(FileError, match=r"only model_best\.pth: to train it further, give MODEL"):
        checkpointer.resume_or_load("", resume=True)
    checkpointer.resume_or_load("", resume=False)


class Backbone(nn.Module):
    """One of the user's own: no `bottom_up`, and a pyramid that may be new."""

    def __init__(self, depth=12):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(depth)])
        self.pyramid = nn.ModuleList([nn.Conv2d(3, 3, 3) for _ in range(12)])


@pytest.mark.parametrize("what", ["all", "body", "shallow", "nothing"])
def test_a_backbone_of_the_users_own(cfg, tmp_path, what):
    """What the file has something of must be whole; a new pyramid is a warning, not an error."""
    model = nn.Module()
    model.backbone, model.head = Backbone(), nn.ModuleList([nn.Linear(2, 2) for _ in range(40)])
    state = {
        f"backbone.{k}": v for k, v in Backbone(8 if what == "shallow" else 12).state_dict().items()
    }
    if what != "all":
        state = {k: v for k, v in state.items() if ".body." in k}
    if what == "nothing":
        state = {f"net.{k}": v for k, v in state.items()}
    write_checkpoint(tmp_path / "backbone.pth", state, {})
    checkpointer = Checkpointer(model, cfg)
    if what in ("shallow", "nothing"):
        with pytest.raises(FileError, match=r"backbone\.pth are not of this model"):
            checkpointer.load_start(str(tmp_path / "backbone.pth"))
    else:
        checkpointer.load_start(str(tmp_path / "backbone.pth"))
        assert loaded_names(model, state) == state.keys()


def test_matching_heuristics_on_demand(cfg, tmp_path):
    """`?matching_heuristics=True` behind a file matches names as Detectron2 does for its zoo's."""
    cfg, model = build(cfg)
    state = {
        k: torch.rand_like(v) for k, v in imagenet_state(model).items() if v.is_floating_point()
    }
    write_checkpoint(tmp_path / "names.pth", state, {})
    path = str(tmp_path / "names.pth")
    for suffix in ("", "?matching_heuristics=False"):
        with pytest.raises(FileError, match="fill 0 of its"):
            Checkpointer(model, cfg).load_start(path + suffix)
    Checkpointer(model, cfg).load_start(f"{path}?matching_heuristics=True")
    assert all(torch.equal(v, imagenet_state(model)[k]) for k, v in state.items())


def predictor(cfg, weights):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = "cpu", str(weights), ()
    return DefaultPredictor(cfg)


@pytest.mark.parametrize("kind", ["mmdet_r50.pth", "official_r50.pth", "ours.safetensors"])
def test_default_predictor(tmp_path, kind):
    """Weights of other projects and formats detect as converted ones, or the config is refused."""
    source = str(GOLDEN / (kind if kind.endswith(".pth") else "mmdet_r50.pth"))
    converted = convert(read_checkpoint(source), source)
    path = source
    if kind.endswith(".safetensors"):
        path = tmp_path / kind
        write_checkpoint(path, converted.weights, converted.config)
    cfg = converted.build_config()
    model = predictor(cfg, path).model
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in converted.weights.items())
    cfg.INPUT.FORMAT = cfg.INPUT.FORMAT[::-1]
    with pytest.raises(FileError, match=r"add INPUT.FORMAT .*`freeanchor convert`") as error:
        predictor(cfg, path)
    assert str(path) in str(error.value)


def test_default_predictor_on_half_a_model(cfg, model, tmp_path):
    """Weights of a backbone are a start for training, and not a detector."""
    write_checkpoint(tmp_path / "backbone.pth", model.backbone.state_dict(prefix="backbone."), {})
    with pytest.raises(FileError, match=r"backbone\.pth are not of this model.*head"):
        predictor(cfg, tmp_path / "backbone.pth")
    DetectionCheckpointer(model.train()).load(str(tmp_path / "backbone.pth"))


def test_masks_switched_off(tmp_path, caplog):
    """A model that finds masks is evaluated without them too; its training goes on with them."""
    cfg = quick_cfg("quick/mask_rcnn_free_anchor_R_18_FPN.yaml")
    path, state = saved(tmp_path, cfg)
    cfg, model = build(cfg, "MODEL.MASK_ON", False)
    with caplog.at_level(logging.WARNING):
        Checkpointer(model, cfg).load(path)
    assert loaded_names(model, state) == model.state_dict().keys()
    assert "but not in the model: roi_heads.mask_head.mask_fcn1.weight" in caplog.text
    with pytest.raises(FileError, match=r"not in the model: roi_heads\.mask_head"):
        Checkpointer(model, cfg, trainer=nn.Module()).load(path)  # of --resume
    cfg, model = build(cfg, "MODEL.MASK_ON", True)
    boxes = {k: v for k, v in state.items() if "mask" not in k}
    write_checkpoint(tmp_path / "boxes.pth", boxes, {})
    with pytest.raises(FileError, match=r"missing: roi_heads\.mask_head"):
        Checkpointer(model, cfg).load(str(tmp_path / "boxes.pth"))


@pytest.mark.parametrize("name", ["free_anchor", "faster_rcnn_free_anchor"])
def test_default_predictor_takes_the_average(tmp_path, name):
    """The weights that were evaluated, of models with one stage and with two."""
    cfg = read_config(CONFIGS / "quick" / f"{name}_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    average = {f"module.{k}": v + 1 for k, v in model.state_dict().items()}
    Checkpointer(model, cfg, str(tmp_path)).save("run", ema={"n_averaged": 3, **average})
    found = predictor(cfg, tmp_path / "run.pth").model.state_dict()
    assert all(torch.equal(v, average[f"module.{k}"]) for k, v in found.items())
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    with pytest.raises(FileError, match=r"run\.pth are not of this model"):
        predictor(cfg, tmp_path / "run.pth")


def test_detectron2s_checkpointer_in_training(cfg, model, tmp_path):
    """It saves and resumes a FreeAnchor with all that it was given, as always."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    saved = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    saved.save("model", iteration=7)
    cfg, other = build(cfg)
    resumed = torch.optim.SGD(other.parameters(), lr=1.0)
    loaded = DetectionCheckpointer(other, str(tmp_path), optimizer=resumed)
    assert loaded.resume_or_load("", resume=True)["iteration"] == 7
    assert resumed.param_groups[0]["lr"] == 0.125
    assert torch.equal(other.head.cls_score.weight, model.head.cls_score.weight)


def test_a_model_that_was_built_without_a_config(cfg, tmp_path, caplog):
    """As by a LazyConfig: what the weights need cannot be compared, so it is said."""
    converted = convert(read_checkpoint(MMDET), MMDET)
    full = converted.build_config()
    full.MODEL.DEVICE = "cpu"
    model = build_model(full).eval()
    model.config = None
    DetectionCheckpointer(model).load(MMDET)
    assert 'needs: INPUT.FORMAT "' in caplog.text
    assert 'MODEL.FREEANCHOR.P7_RELU "False"' in caplog.text


def with_classes(cfg, *names):
    cfg = cfg.clone()
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = list(names)
    return cfg


def test_classes_travel_with_the_weights(tmp_path, cfg, model, caplog):
    """Other ones, or the same in another order, are refused with the option to add."""
    own = with_classes(cfg, "a", "b", "c")
    Checkpointer(model, own, str(tmp_path)).save("own")
    path = str(tmp_path / "own.pth")
    assert read_class_names(path) == ["a", "b", "c"]
    Checkpointer(model, own).load(path)
    Checkpointer(model, cfg).load(path)  # a config that does not say
    assert "which classes" not in caplog.text
    for names in (("b", "a", "c"), ("a", "b", "d")):
        expected = r"add MODEL\.FREEANCHOR\.CLASS_NAMES \"\['a', 'b', 'c'\]\""
        with pytest.raises(FileError, match=expected):
            Checkpointer(model, with_classes(cfg, *names)).load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "RGB"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
        ("MODEL.PIXEL_STD", [57.0, 57.0, 58.0]),
        ("MODEL.RESNETS.STRIDE_IN_1X1", False),
        ("MODEL.FREEANCHOR.P7_RELU", False),
        ("MODEL.FREEANCHOR.INCLUSIVE_CORNERS", True),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.1, 0.2, 0.3]]),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
        ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)),
        ("MODEL.FPN.FUSE_TYPE", "avg"),
    ],
)
def test_what_no_shape_tells_travels_with_the_weights(tmp_path, cfg, model, caplog, key, value):
    """A config that fits the tensors, but would find something else, is refused with the option.

    Training may start from the weights with other anchors, and says so.
    """
    own = cfg.clone()
    own.merge_from_list([key, value])
    Checkpointer(model, own, str(tmp_path)).save("own")
    path = str(tmp_path / "own.pth")
    write_checkpoint(tmp_path / "own.safetensors", model.state_dict(), described_config(own))
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(FileError, match=rf"add {re.escape(key)} \"[^\"]*\", or use their own"):
            Checkpointer(model, cfg).load(str(tmp_path / f"own{suffix}"))
        Checkpointer(model, own).load(str(tmp_path / f"own{suffix}"))
    if "ANCHOR_GENERATOR" in key or "BBOX" in key:
        Checkpointer(model, cfg).load_start(path)
        assert f"trained with other boxes: {key} " in caplog.text
    else:
        with pytest.raises(FileError, match=rf"add {re.escape(key)} "):
            Checkpointer(model, cfg).load_start(path)


def test_checkpoint_that_does_not_say_its_classes(tmp_path, cfg, model, caplog):
    """An old one, or another project's: a warning says what is assumed."""
    write_checkpoint(tmp_path / "old.pth", model.state_dict(), {})
    assert read_class_names(str(tmp_path / "old.pth")) == []
    Checkpointer(model, with_classes(cfg, "a", "b", "c")).load(str(tmp_path / "old.pth"))
    assert "do not say which classes they are for. They are taken to be, in this" in caplog.text


def test_training_from_a_detector_with_other_names(tmp_path, cfg, model, caplog):
    """As many classes, but others: their predictor is not taken over, all else is."""
    Checkpointer(model, with_classes(cfg, "a", "b", "c"), str(tmp_path)).save("own")
    other = build_model(cfg)
    before = other.head.cls_score.weight.clone()
    Checkpointer(other, with_classes(cfg, "d", "e", "f")).load_start(str(tmp_path / "own.pth"))
    assert "are for other classes: ['a', 'b', 'c']" in caplog.text
    assert "Initialised anew: head.cls_score.weight, head.cls_score.bias" in caplog.text
    assert torch.equal(other.head.cls_score.weight, before)
    assert torch.equal(other.head.bbox_pred.weight, model.head.bbox_pred.weight)


@pytest.mark.parametrize("names", ["cab", "cdae", "b"])
def test_classes_that_the_weights_know(tmp_path, cfg, caplog, names):
    """They keep their scores, in whatever place; new ones have those of the initialisation."""
    path, state = saved(tmp_path, cfg)
    write_checkpoint(path, state, described_config(with_classes(cfg, "a", "b", "c")))
    cfg, model = build(cfg, "MODEL.RETINANET.NUM_CLASSES", len(names))
    initial = model.head.cls_score.weight.unflatten(0, (-1, len(names))).clone()
    Checkpointer(model, with_classes(cfg, *names)).load_start(path)
    theirs = {k: state[f"head.cls_score.{k}"].unflatten(0, (-1, 3)) for k in ("weight", "bias")}
    ours = {k: v.unflatten(0, (-1, len(names))) for k, v in model.head.cls_score.named_parameters()}
    for i, name in enumerate(names):
        if name in "abc":
            assert all(torch.equal(ours[k][:, i], theirs[k][:, "abc".index(name)]) for k in ours)
        else:
            assert torch.equal(ours["weight"][:, i], initial[:, i])
            assert ours["bias"][:, i].sigmoid().allclose(torch.tensor(0.02))
    known, anew = ([x for x in names if (x in "abc") == is_known] for is_known in (True, False))
    message = f"{', '.join(known)} keep what {path} has learned of them"
    message += f", and {', '.join(anew)} start anew" if anew else ""
    assert f"{message}: head.cls_score.weight, head.cls_score.bias" in caplog.text
    assert loaded_names(model, state) >= model.state_dict().keys() - {
        "head.cls_score.weight",
        "head.cls_score.bias",
    }


def test_known_classes_of_other_anchors(tmp_path, cfg):
    """Six classes of one anchor have as many logits as three of two, and share nothing."""
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[x, x + 1] for x in (32, 64, 128, 256, 512)]
    path, state = saved(tmp_path, cfg)
    write_checkpoint(path, state, described_config(with_classes(cfg, "a", "b", "c")))
    sizes = [[x] for x in (32, 64, 128, 256, 512)]
    options = ("MODEL.ANCHOR_GENERATOR.SIZES", sizes, "MODEL.RETINANET.NUM_CLASSES", 6)
    cfg, model = build(cfg, *options)
    before = {k: v.clone() for k, v in model.head.cls_score.named_parameters()}
    Checkpointer(model, with_classes(cfg, *"abcdef")).load_start(path)
    assert all(torch.equal(v, before[k]) for k, v in model.head.cls_score.named_parameters())


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_classes_that_the_weights_of_two_stages_know(tmp_path, heads, agnostic):
    """Scores with the background, boxes and masks; what is for all classes stays as it is."""
    cfg = quick_cfg("quick/mask_rcnn_free_anchor_R_18_FPN.yaml")
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = heads, agnostic
    agnostic_boxes = agnostic or heads == "CascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic_boxes
    path, state = saved(tmp_path, cfg)
    write_checkpoint(path, state, described_config(with_classes(cfg, "a", "b", "c")))
    cfg, model = build(cfg, "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    Checkpointer(model, with_classes(cfg, "c", "d")).load_start(path)
    found, moved = model.state_dict(), set()
    for name in found:
        scores = name.startswith("roi_heads.box_predictor") and ".cls_score." in name
        boxes = name.startswith("roi_heads.box_predictor") and not scores and not agnostic_boxes
        masks = name.startswith("roi_heads.mask_head.predictor") and not agnostic
        if not (scores or boxes or masks):
            assert torch.equal(found[name], state[name]), name
            continue
        ours, theirs = found[name], state[name]
        moved.add(name)
        if scores:
            assert torch.equal(ours[[0, 2]], theirs[[2, 3]])  # c and the background
            assert torch.equal(ours[1], initial[name][1])
        else:
            n = 4 if boxes else 1
            assert torch.equal(ours[:n], theirs[2 * n :])
            assert torch.equal(ours[n:], initial[name][n:])
    stages = 3 if heads == "CascadeROIHeads" else 1
    assert len(moved) == 2 * (stages + (not agnostic_boxes) + (not agnostic))


@pytest.mark.parametrize("author", ["Detectron2 Model Zoo", "me"])
@pytest.mark.parametrize(
    ("config", "scores"),
    [
        ("quick/free_anchor_R_18_FPN.yaml", "head.cls_score.bias"),
        ("quick/faster_rcnn_free_anchor_R_18_FPN.yaml", "roi_heads.box_predictor.cls_score.bias"),
    ],
)
def test_detectors_of_the_zoo_are_for_coco(tmp_path, config, scores, author):
    """Those with 80 classes: training on some of these begins with what they know."""
    cfg = quick_cfg(config)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    arrays = {k: v.numpy() for k, v in build_model(cfg).state_dict().items()}
    arrays[scores] = np.arange(len(arrays[scores]), dtype=np.float32)
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": author}))
    names = read_class_names(str(path))
    assert names == (MetadataCatalog.get("coco_2017_val").thing_classes if author != "me" else [])
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    model = build_model(cfg)
    Checkpointer(model, with_classes(cfg, "blimp", "dog")).load_start(str(path))
    found = model.state_dict()[scores]
    if "roi_heads" in scores:  # blimp, dog, background
        expected = [found[0], 16, 80]
    else:
        expected = [x for a in range(9) for x in (found[2 * a], 80 * a + 16)]
    assert (found.tolist() == torch.tensor(expected).tolist()) == (author != "me")
    arrays[scores] = arrays[scores][:-3]
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": author}))
    assert read_class_names(str(path)) == []


@pytest.mark.parametrize("image_format", ["L", "RGBA"])
def test_first_convolution_of_another_width(tmp_path, cfg, model, caplog, image_format):
    """Training on grey images may start from weights for colours; evaluation may not."""
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    arrays["pixel_mean"], arrays["pixel_std"] = model.pixel_mean.numpy(), model.pixel_std.numpy()
    (tmp_path / "colour.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    channels = {"L": 1, "RGBA": 4}[image_format]
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0] * channels, [50.0] * channels
    other = build_model(cfg)
    stem = other.backbone.bottom_up.stem.conv1
    before = stem.weight.clone()
    Checkpointer(other, cfg).load_start(str(tmp_path / "colour.pkl"))
    assert re.search(r"Initialised anew: backbone\.bottom_up\.stem\.conv1\.weight", caplog.text)
    assert torch.equal(stem.weight, before)
    assert torch.equal(other.head.bbox_pred.weight, model.head.bbox_pred.weight)
    frozen, model = build(cfg, "MODEL.BACKBONE.FREEZE_AT", 1)
    with pytest.raises(FileError, match="frozen by FREEZE_AT"):
        Checkpointer(model, frozen).load_start(str(tmp_path / "colour.pkl"))
    with pytest.raises(FileError, match="need another model than the config makes"):
        Checkpointer(other, cfg).load(str(tmp_path / "colour.pkl"))


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (QUICK, [], ""),
        (QUICK, ["MODEL.BACKBONE.FREEZE_AT", 1], "bottom_up.stem.conv1.weight"),
        (LITE0, [], "bottom_up.model.model.conv_stem.weight"),
        (LITE0, ["MODEL.TIMM.FREEZE_AT", 0], "bottom_up.model.model.bn1.weight"),
        (LITE0, ["MODEL.TIMM.FREEZE_AT", 0, "MODEL.TIMM.NORM", ""], ""),
    ],
)
def test_frozen_layers_without_weights(caplog, config, options, expected):
    """What would stay random is named, whichever backbone freezes it and whoever trains."""
    cfg, model = build(quick_cfg(config), *options)
    Checkpointer(model, cfg).resume_or_load("", resume=False)
    said = "".join(x for x in caplog.messages if "MODEL.WEIGHTS is empty" in x)
    assert f"backbone.{expected}" in said if expected else not said
