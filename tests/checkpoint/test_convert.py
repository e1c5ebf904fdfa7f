"""Weights of other projects give those projects' outputs."""

import logging
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import GOLDEN
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_backbone, build_model
from freeanchor.__main__ import main
from freeanchor.checkpoint import (
    Checkpointer,
    convert,
    read_checkpoint,
    read_class_names,
    to_detectron2,
    write_checkpoint,
)
from freeanchor.checkpoint.classes import openmmlab_classes
from freeanchor.checkpoint.files import CLASS_NAMES, CONFIG_KEY
from freeanchor.config import read_config
from freeanchor.errors import FileError
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

MMDET, OFFICIAL = str(GOLDEN / "mmdet_r50.pth"), str(GOLDEN / "official_r50.pth")


def converted(source, **changes):
    return convert({**read_checkpoint(source), **changes}, source)


def load(cfg, weights):
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    Checkpointer(model, cfg).load(str(weights))
    return model


@torch.no_grad()
def head_outputs(model, image):
    """Logits and deltas of each level, in Detectron2's layout."""
    pixels = image[..., ::-1] if model.input_format == "RGB" else image
    pixels = torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))
    features = model.backbone(model.preprocess_image([{"image": pixels}]).tensor)
    features = [features[f] for f in model.head_in_features]
    anchors = [a.tensor for a in model.anchor_generator(features)]
    return anchors, *model.head(features)


def ratio_major(tensor, depth):
    """Channels in the order of the other projects."""
    return tensor.unflatten(1, (3, 3, depth)).transpose(1, 2).flatten(1, 3)


def flat(levels, depth):
    """(R, depth) in the order of the anchors."""
    return torch.cat(
        [x.unflatten(1, (-1, depth)).permute(0, 3, 4, 1, 2).reshape(-1, depth) for x in levels]
    )


@pytest.mark.parametrize("source", [MMDET, OFFICIAL], ids=["mmdet", "official"])
def test_raw_outputs(source):
    """The head's outputs are those that the other implementation computed, see data/README.md."""
    golden = np.load(source.replace(".pth", "_outputs.npz"))
    model = load(converted(source).build_config(), source)
    _, logits, deltas = head_outputs(model, golden["image_bgr"])
    for i in range(5):
        for ours, name in ((logits[i], "cls"), (deltas[i], "reg")):
            ours = ratio_major(ours, 3 if name == "cls" else 4)
            np.testing.assert_allclose(ours.numpy(), golden[f"{name}_{i}"], rtol=0, atol=1e-4)


def test_boxes_of_mmdetection():
    """Its fifty best boxes, classes and scores."""
    golden = np.load(MMDET.replace(".pth", "_outputs.npz"))
    model = load(converted(MMDET).build_config(), MMDET)
    anchors, logits, deltas = head_outputs(model, golden["image_bgr"])
    scores, best = flat(logits, 3).sigmoid().flatten().topk(50)
    boxes = model.box2box_transform.apply_deltas(
        flat(deltas, 4)[best // 3], torch.cat(anchors)[best // 3]
    )
    np.testing.assert_allclose(scores, golden["top_scores"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(best % 3, golden["top_classes"])
    np.testing.assert_allclose(boxes, golden["top_boxes"], rtol=1e-5, atol=1e-4)


def test_boxes_of_the_official_repository():
    """Its anchors, and its boxes by its own formulas, with edges on the last pixel."""
    golden = np.load(OFFICIAL.replace(".pth", "_outputs.npz"))
    cfg = converted(OFFICIAL).build_config()
    assert cfg.MODEL.FREEANCHOR.INCLUSIVE_CORNERS
    model = load(cfg, OFFICIAL)
    anchors, _, deltas = head_outputs(model, golden["image_bgr"])
    for i in range(5):
        theirs = golden[f"anchors_{i}"].reshape(-1, 3, 3, 4).swapaxes(1, 2).reshape(-1, 4)
        np.testing.assert_allclose(anchors[i] - torch.tensor([0, 0, 1, 1]), theirs, atol=1e-4)

        theirs, d = golden[f"anchors_{i}"], golden[f"reg_{i}"].reshape(9, 4, -1)
        d = d.transpose(2, 0, 1).reshape(-1, 4) / [10, 10, 5, 5]
        sizes = theirs[:, 2:] - theirs[:, :2] + 1
        centers = theirs[:, :2] + 0.5 * sizes + d[:, :2] * sizes
        sizes = np.exp(np.minimum(d[:, 2:], np.log(1000 / 16))) * sizes
        theirs = np.concatenate([centers - sizes / 2, centers + sizes / 2 - 1], axis=1)
        theirs = theirs.reshape(-1, 3, 3, 4).swapaxes(1, 2).reshape(-1, 4)
        ours = model.box2box_transform.apply_deltas(flat([deltas[i]], 4), anchors[i])
        np.testing.assert_allclose(ours - torch.tensor([0, 0, 1, 1]), theirs, rtol=1e-5, atol=1e-4)


def random_resnet(block, layers, **options):
    """A torchvision ResNet whose batch norms all do something."""
    resnet = ResNet(block, layers, **options).eval()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return resnet


@pytest.mark.parametrize(
    ("block", "layers", "groups", "width", "depth"),
    [
        (BasicBlock, [2, 2, 2, 2], 1, 64, 18),
        (BasicBlock, [3, 4, 6, 3], 1, 64, 34),
        (Bottleneck, [3, 4, 6, 3], 1, 64, 50),
        (Bottleneck, [3, 4, 23, 3], 32, 4, 101),
        (Bottleneck, [3, 8, 36, 3], 1, 64, 152),
    ],
    ids=["R-18", "R-34", "R-50", "X-101-32x4d", "R-152"],
)
@torch.no_grad()
def test_imagenet_backbones(tmp_path, block, layers, groups, width, depth):
    """The features are those of torchvision's own model, from uint8 pixels."""
    theirs = random_resnet(block, layers, groups=groups, width_per_group=width)
    path = str(tmp_path / "backbone.pth")
    torch.save(theirs.state_dict(), path)
    result = converted(path)
    assert result.config["MODEL.RESNETS.DEPTH"] == depth
    cfg = result.build_config()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    Checkpointer(model, cfg).load_start(path)

    image = torch.randint(0, 256, (3, 64, 96))
    ours = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
    x = torchvision.transforms.functional.normalize(
        image[None] / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    x = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
    for stage, name in ((theirs.layer2, "res3"), (theirs.layer3, "res4"), (theirs.layer4, "res5")):
        x = stage(x)
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-4 * x.abs().max().item())


def test_wrappers_of_imagenet_backbones(tmp_path):
    """Arrays, "state_dict", "model" and the prefix of data parallel training are all the same."""
    state = random_resnet(BasicBlock, [2, 2, 2, 2]).state_dict()
    expected = to_detectron2(state, "a.pth")
    for checkpoint in (
        {"state_dict": state, "epoch": 3},
        {"model": state},
        {f"module.{k}": v for k, v in state.items()},
        {k: v.numpy() for k, v in state.items()},
    ):
        found = to_detectron2(checkpoint, "a.pth")
        assert found["model"].keys() == expected["model"].keys()
        assert all(torch.equal(found["model"][k], v) for k, v in expected["model"].items())
        assert found[CONFIG_KEY] == expected[CONFIG_KEY]


DESCRIPTION = """
import os  # MMDetection runs its configs; this must not
os.mkdir("{folder}")
{pixels}
model = dict(
    type='RetinaNet',
    {preprocessor}
    backbone=dict(type='ResNet', depth=50, style='{style}', init_cfg=dict(type=os.name)),
    neck=dict(type='FPN', add_extra_convs='on_input', relu_before_extra_convs={relu}),
    bbox_head=dict(
        type='RetinaHead',
        anchor_generator=dict(octave_base_scale={scale}, scales_per_octave=3, ratios=[.5, 1., 2.]),
        bbox_coder=dict(type='{coder}', target_stds=[{std}, {std}, {std}, {std}])))
"""
MMDET_3 = "data_preprocessor=dict(mean=[1.5, 2, 3], std=[4.0, 5.0, 6.0], bgr_to_rgb=False),"
MMDET_2 = "img_norm_cfg = dict(mean=[1.5, 2, 3], std=[4.0, 5.0, 6.0], to_rgb=False)"


def description(tmp_path, **options):
    defaults = {"pixels": "", "preprocessor": "", "style": "pytorch", "relu": False, "scale": 4}
    defaults.update(coder="DeltaXYWHBBoxCoder", std=1.0, folder=tmp_path / "canary")
    return DESCRIPTION.format(**{**defaults, **options})


@pytest.mark.parametrize(
    ("key", "pixels"),
    [("cfg", {"preprocessor": MMDET_3}), ("config", {"pixels": MMDET_2})],
    ids=["MMDetection 3", "MMDetection 2"],
)
def test_what_only_the_config_in_the_checkpoint_tells(tmp_path, key, pixels):
    """RetinaNet's box weights, the Caffe style and the pixels are read, and nothing is run."""
    text = description(tmp_path, style="caffe", relu=True, **pixels)
    config = converted(MMDET, meta={key: text}).config
    assert config["MODEL.RETINANET.BBOX_REG_WEIGHTS"] == (1, 1, 1, 1)
    assert config["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    assert config["MODEL.FREEANCHOR.P7_RELU"] is True
    assert config["INPUT.FORMAT"] == "BGR"
    assert config["MODEL.PIXEL_MEAN"] == [1.5, 2, 3]
    assert config["MODEL.PIXEL_STD"] == [4, 5, 6]
    assert not (tmp_path / "canary").exists()
    freeanchor = converted(MMDET, meta={key: description(tmp_path, std=0.1)}).config
    assert freeanchor["MODEL.RETINANET.BBOX_REG_WEIGHTS"] == (10, 10, 10, 10)
    assert freeanchor["INPUT.FORMAT"] == "RGB"


@pytest.mark.parametrize("meta", [3, {}, {"config": "no Python ("}, {"cfg": "a = 1"}, {"cfg": 3}])
def test_without_a_config_in_the_checkpoint(caplog, meta):
    """FreeAnchor and RetinaNet have the same tensors: the log says so, the config decides."""
    with caplog.at_level(logging.WARNING):
        result = converted(MMDET, meta=meta)
    assert "MODEL.RETINANET.BBOX_REG_WEIGHTS" in caplog.text
    assert "MODEL.RETINANET.BBOX_REG_WEIGHTS" not in result.config


COCO = [x["name"] for x in COCO_CATEGORIES if x["isthing"]]


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("a", "b_c", "d")}, ["a", "b_c", "d"]),
        ({"dataset_meta": {"classes": ["a", "b", "c"]}, "CLASSES": 3}, ["a", "b", "c"]),
        ({"dataset_meta": {"CLASSES": ("a", "b", "c"), "PALETTE": [(1, 2, 3)]}}, ["a", "b", "c"]),
        ({"CLASSES": ("a", "a", "c")}, []),
        ({"CLASSES": (1, 2, 3)}, []),
        ({"CLASSES": None, "dataset_meta": 3}, []),
        ({"dataset_meta": {}}, []),
        (None, []),
    ],
)
def test_classes_that_mmdetection_names(tmp_path, meta, names):
    """They come with the weights, so that no other order of them is taken for theirs."""
    assert converted(MMDET, meta=meta).config.get(CLASS_NAMES, []) == names
    torch.save({**read_checkpoint(MMDET), "meta": meta}, tmp_path / "theirs.pth")
    assert read_class_names(str(tmp_path / "theirs.pth")) == names
    if names:
        main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")])
        assert read_class_names(str(tmp_path / "ours.pth")) == names
        assert names == read_config(tmp_path / "ours.yaml").MODEL.FREEANCHOR.CLASS_NAMES


def test_classes_of_coco_as_mmdetection_1_wrote_them():
    assert openmmlab_classes({"CLASSES": [x.replace(" ", "_") for x in COCO]}) == COCO
    assert openmmlab_classes({"CLASSES": COCO}) == COCO


def test_mmdetection_names_more_classes_than_it_scores(caplog):
    """As where its data set had the names of COCO, and its annotations others."""
    assert CLASS_NAMES not in converted(MMDET, meta={"CLASSES": COCO}).config
    assert "names 80 classes and scores 3" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scale": 8}, "octave_base_scale=8"),
        ({"coder": "TBLRBBoxCoder"}, "type='TBLR"),
        ({"std": 0.0}, "ZeroDivisionError"),
        ({"preprocessor": "data_preprocessor=3,"}, "the config in it is not"),
    ],
)
def test_config_in_the_checkpoint_that_freeanchor_cannot_have(tmp_path, option, message):
    """Other anchors or boxes would give silently wrong detections."""
    with pytest.raises(FileError, match=message):
        converted(MMDET, meta={"cfg": description(tmp_path, **option)})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ratios", "strides=[4, 8, 16, 32, 64], ratios"),
        ("ratios", "base_sizes=[4, 4, 4, 4, 4], ratios"),
        ("octave_base_scale=4, scales_per_octave=3", "scales=[2, 3, 8]"),
        ("anchor_generator=dict(", "anchor_generator=dict(type='LegacyAnchorGenerator', "),
        ("target_stds", "target_means=[1., 0., 0., 0.], target_stds"),
        ("depth=50", "depth=50, strides=(1, 2, 2, 1)"),
        ("depth=50", "depth=50, dilations=(1, 1, 1, 2)"),
        ("add_extra_convs", "upsample_cfg=dict(mode='bilinear'), add_extra_convs"),
        ("anchor_generator", "loss_cls=dict(use_sigmoid=False), anchor_generator"),
    ],
)
def test_what_the_tensors_of_mmdetection_do_not_show(tmp_path, before, after):
    """Anchors, boxes and strides of other values have tensors of the same shapes."""
    text = description(tmp_path)
    assert before in text
    converted(MMDET, meta={"cfg": text})
    with pytest.raises(FileError, match="is supported"):
        converted(MMDET, meta={"cfg": text.replace(before, after)})


def test_pixels_of_mmdetection_3_are_bgr_unless_it_says_rgb(tmp_path):
    text = description(
        tmp_path, preprocessor="data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6]),"
    )
    assert converted(MMDET, meta={"cfg": text}).config["INPUT.FORMAT"] == "BGR"


@pytest.mark.parametrize(
    ("groups", "width", "std", "stride_in_1x1"),
    [(1, 64, [1.0, 1.0, 1.0], True), (32, 8, [57.375, 57.12, 58.395], False)],
    ids=["MSRA's R-50", "Facebook's X-50"],
)
def test_caffe_style_of_openmmlab(groups, width, std, stride_in_1x1):
    """Torchvision's names, but BGR and other strides: as Detectron's, statistics are folded."""
    state = random_resnet(
        Bottleneck, [3, 4, 6, 3], groups=groups, width_per_group=width
    ).state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.fill_(name.endswith("var"))
    config = convert({"state_dict": state}, "resnet50_msra.pth").config
    assert config["INPUT.FORMAT"] == "BGR"
    assert config["MODEL.PIXEL_MEAN"] == [103.53, 116.28, 123.675]
    assert config["MODEL.PIXEL_STD"] == std
    assert config["MODEL.RESNETS.STRIDE_IN_1X1"] is stride_in_1x1


BROKEN = {
    "unknown": lambda state, key: state.update({key.replace("1.weight", "9.weight"): state[key]}),
    "missing": lambda state, key: state.pop(key),
    "of another shape": lambda state, key: state.update({key: state[key][:-1]}),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("source", [MMDET, OFFICIAL, "torchvision"])
def test_tensors_that_do_not_fit_are_listed(source, kind):
    """Each by its name, and none is dropped."""
    if source == "torchvision":
        state, key = random_resnet(Bottleneck, [3, 4, 6, 3]).state_dict(), "layer3.2.conv1.weight"
    else:
        checkpoint = read_checkpoint(source)
        state = checkpoint.get("state_dict", checkpoint.get("model"))
        key = next(k for k in state if k.endswith("layer3.2.conv1.weight"))
    BROKEN[kind](state, key)
    name = {
        "unknown": r"layer3\.2\.conv9\.weight",
        "missing": r"backbone\.bottom_up\.res4\.2\.conv1\.weight",
        "of another shape": r"layer3\.2\.conv1\.weight \(\d+, \d+, 1, 1\) instead of",
    }[kind]
    with pytest.raises(FileError, match=rf"(?s)file\.pth.*{kind}.*{name}"):
        convert(state, "file.pth")


@pytest.mark.parametrize(
    ("source", "key"),
    [(MMDET, "bbox_head.retina_reg.weight"), (OFFICIAL, "module.rpn.head.bbox_pred.weight")],
)
def test_other_numbers_of_anchors(source, key):
    """Nine per location are known; others have sizes that no tensor tells."""
    checkpoint = read_checkpoint(source)
    state = checkpoint.get("state_dict", checkpoint.get("model"))
    state[key] = state[key][:12]
    with pytest.raises(FileError, match="3 anchors per location, not 9"):
        convert(state, "file.pth")


def test_other_anchors_of_the_official_repository():
    """Its checkpoints hold their anchors, which are compared with those of the config."""
    checkpoint = read_checkpoint(OFFICIAL)
    checkpoint["model"]["module.rpn.anchor_generator.cell_anchors.2"] += 0.5
    with pytest.raises(FileError, match=r"cell_anchors\.2"):
        convert(checkpoint, "file.pth")


def test_p6_of_mmdetection_that_no_tensor_describes():
    """P6 may be computed from P5 or from before its last convolution."""
    state = read_checkpoint(MMDET)["state_dict"]
    key = "neck.fpn_convs.3.conv.weight"
    state[key] = state[key][:, :16]
    with pytest.raises(FileError, match="on_input"):
        convert(state, "file.pth")


def test_what_is_left_out_is_said(caplog):
    """Counters, compared anchors and the classes of ImageNet have no place in Detectron2."""
    with caplog.at_level(logging.INFO):
        converted(MMDET)
        converted(OFFICIAL)
        convert(random_resnet(BasicBlock, [2, 2, 2, 2]).state_dict(), "resnet.pth")
    assert "left out 53 counters" in caplog.text
    assert "left out rpn.anchor_generator.cell_anchors.0, rpn" in caplog.text
    assert "resnet.pth: left out fc.weight, fc.bias" in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("source", [MMDET, OFFICIAL], ids=["mmdet", "official"])
def test_command(tmp_path, source, suffix):
    """OUT and its config detect what the source detects when it is converted on the fly."""
    out = tmp_path / f"model{suffix}"
    main(["convert", source, str(out)])
    cfg = read_config(out.with_suffix(".yaml"))
    assert str(out) == cfg.MODEL.WEIGHTS
    image = np.load(source.replace(".pth", "_outputs.npz"))["image_bgr"]
    _, *ours = head_outputs(load(cfg, out), image)
    _, *expected = head_outputs(load(converted(source).build_config(), source), image)
    for a, b in zip(ours, expected):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_command_on_what_was_converted_before(tmp_path):
    """Another container keeps the config; a file is not written over itself."""
    for out in ("a.pth", "b.safetensors", "b.safetensors"):
        source = {"a.pth": MMDET, "b.safetensors": tmp_path / "a.pth"}[out]
        main(["convert", str(source), str(tmp_path / out)])
    first, second = ((tmp_path / f"{x}.yaml").read_text() for x in "ab")
    assert first.replace("a.pth", "b.safetensors") == second
    with pytest.raises(SystemExit, match=r"a\.pth is the source"):
        main(["convert", *[str(tmp_path / "a.pth")] * 2])


def test_command_on_detectron2s_own_weights(tmp_path, model):
    """They only change their container, there and back."""
    write_checkpoint(tmp_path / "a.pth", model.state_dict(), {})
    for source, out in (("a.pth", "b.safetensors"), ("b.safetensors", "c.pth")):
        main(["convert", *map(str, (tmp_path / source, tmp_path / out))])
        assert not (tmp_path / out).with_suffix(".yaml").exists()
    found = read_checkpoint(str(tmp_path / "c.pth"))["model"]
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["config.yaml", "model_final.yaml", None])
def test_command_on_weights_of_a_run(tmp_path, cfg, name):
    """They name their classes and no more: what else they need is in the config beside them."""
    cfg.INPUT.FORMAT, names = "RGB", ["a", "b", "c"]
    run, out = tmp_path / "run", tmp_path / "out"
    weights = build_model(cfg).state_dict()
    write_checkpoint(run / "model_final.pth", weights, {CLASS_NAMES: names})
    if name:
        (run / name).write_text(cfg.dump())
    main(["convert", str(run / "model_final.pth"), str(out / "model.safetensors")])
    assert (out / "model.yaml").is_file() == bool(name)
    if name:
        written = read_config(out / "model.yaml")
        assert written.INPUT.FORMAT == "RGB"
        load(written, out / "model.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.pth", "nowhere.pth"), ("caffe.pkl", "load it by MODEL.WEIGHTS")],
)
def test_command_on_what_cannot_be_converted(tmp_path, monkeypatch, source, message):
    """One sentence, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caffe.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": np.zeros(3)}}, 2))
    with pytest.raises(SystemExit, match=rf"freeanchor convert: .*{message}"):
        main(["convert", source, "out.pth"])
    assert not (tmp_path / "out.pth").exists()


def test_features_of_a_converted_backbone_need_its_config():
    """The keys that come with the weights are all keys of the config."""
    for source in (MMDET, OFFICIAL):
        result = converted(source)
        cfg = result.build_config()
        assert isinstance(cfg, CfgNode)
        assert build_backbone(cfg).output_shape()["p7"].channels == 16
