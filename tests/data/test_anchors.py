"""Anchors from the data: how well they fit, and that proposed ones fit better."""

import ast
import re

import numpy as np
import pytest
from conftest import QUICK
from detectron2.structures import BoxMode
from freeanchor.__main__ import main
from freeanchor.data import anchors
from freeanchor.errors import DatasetError

SIZE = 320


def records(shapes, seed=0, per_image=5):
    """Objects of (width, height) shapes at random places of images of 320 x 320 pixels."""
    rng = np.random.default_rng(seed)
    result = []
    for start in range(0, len(shapes), per_image):
        boxes = []
        for width, height in shapes[start : start + per_image]:
            x, y = rng.uniform(0, [SIZE - width, SIZE - height])
            boxes.append([x, y, width, height])
        result.append(
            {
                "height": SIZE,
                "width": SIZE,
                "annotations": [{"bbox": b, "bbox_mode": BoxMode.XYWH_ABS} for b in boxes],
            }
        )
    return result


def fit(images, cfg, proposed=None):
    cfg = cfg.clone()
    if proposed:
        cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = proposed
    return anchors.best_anchor_iou(images, cfg)


def test_best_iou_by_hand(cfg):
    """An object on an anchor has IoU 1, one of half its height 0.5."""
    record = {
        "height": SIZE,
        "width": SIZE,
        "annotations": [
            {"bbox": [112, 112, 144, 144], "bbox_mode": BoxMode.XYXY_ABS},
            {"bbox": [112, 120, 144, 136], "bbox_mode": BoxMode.XYXY_ABS},
            {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 1},
        ],
    }
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
    assert fit(anchors.training_boxes([record], cfg), cfg).tolist() == [1.0, 0.5]


def test_objects_in_the_size_of_the_training(cfg):
    """Resized as Detectron2 does, to the middle of several sizes; images without any left out."""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (100, 160, 500), 2000
    first = records([(40, 20)])
    found = anchors.training_boxes([*first, {"height": 9, "width": 9, "annotations": []}], cfg)
    ((size, boxes),) = found
    assert size == (160, 160)
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], [[20, 10]])
    with pytest.raises(DatasetError, match="no object"):
        anchors.training_boxes([], cfg)


@pytest.mark.parametrize(
    ("features", "best"),
    [
        (["p3", "p4", "p5", "p6", "p7"], 1 / 9),
        (["p2", "p3", "p4", "p5", "p6", "p7"], 1.0),
        (["p2", "p3", "p4"], 1.0),
        (["p4", "p5"], 1 / 16),
        (["res4"], 1 / 16),
    ],
)
@pytest.mark.parametrize("name", ["RETINANET", "RPN"])
def test_levels_of_the_config(cfg, features, best, name):
    """An object of 4 x 4 pixels on an anchor of P2, and what the other levels have for it."""
    cfg.MODEL[name].IN_FEATURES = features
    cfg.MODEL.META_ARCHITECTURE = {"RETINANET": "FreeAnchor", "RPN": "GeneralizedRCNN"}[name]
    keys = cfg.MODEL.ANCHOR_GENERATOR
    keys.SIZES, keys.ASPECT_RATIOS = [[2 ** int(x[-1])] for x in features], [[1.0]]
    images = [((64, 96), np.array([[30.0, 34, 34, 38]]))]
    assert anchors.best_anchor_iou(images, cfg) == pytest.approx([best])
    assert len(anchors.propose_anchors(images, cfg)[0]) == len(features)


def test_points_have_no_anchors(coco, capsys):
    """None are proposed for them, nor are they said not to fit."""
    _, annotations, folder = coco()
    config = ["--config-file", str(QUICK.with_name("ltm_af_R_18_FPN.yaml"))]
    with pytest.raises(SystemExit, match=r"freeanchor anchors: .* has no anchors"):
        main(["anchors", annotations, folder, *config])
    main(["check", annotations, folder, *config])
    assert "anchor" not in capsys.readouterr().out


def test_features_without_a_level(cfg):
    cfg.MODEL.RETINANET.IN_FEATURES = ["fine", "coarse"]
    with pytest.raises(DatasetError, match="strides of the features fine, coarse are not known"):
        anchors.best_anchor_iou([], cfg)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["INPUT.MIN_SIZE_TRAIN", "(0,)"], (320, 200)),  # as they are
        (["INPUT.SCALE_JITTER", "(0.5, 2.0)", "INPUT.MAX_SIZE_TRAIN", "256"], (320, 200)),
        (["INPUT.SCALE_JITTER", "(0.5, 0.5)", "INPUT.MAX_SIZE_TRAIN", "640"], (320, 200)),
        (["INPUT.MIN_SIZE_TRAIN", "(400,)"], (640, 400)),
        (["INPUT.MIN_SIZE_TRAIN", "(1,)", "INPUT.MAX_SIZE_TRAIN", "1"], (1, 1)),
    ],
)
def test_whatever_the_resizing_is(cfg, options, size):
    """Objects are looked at in the size in which they are trained."""
    cfg.merge_from_list(options)
    record = {"height": 320, "width": 200}
    record["annotations"] = [{"bbox": [20, 32, 100, 160], "bbox_mode": BoxMode.XYWH_ABS}]
    ((shape, boxes),) = images = anchors.training_boxes([record], cfg)
    assert shape == size
    factors = np.array([size[1] / 200, size[0] / 320] * 2)
    np.testing.assert_allclose(boxes[0], np.array([20, 32, 120, 192]) * factors)
    assert len(anchors.best_anchor_iou(images, cfg)) == 1


@pytest.mark.parametrize(
    "shapes",
    [
        [(150, 12)] * 50 + [(100, 9)] * 50,
        [(10, 90)] * 60,
        [(14, 14)] * 60,
        [(40, 40)] * 30 + [(120, 30)] * 30 + [(250, 300)] * 30,
        [(33, 57)],
    ],
)
def test_proposed_anchors_fit_better(cfg, shapes):
    """Never fewer objects by 0.5, and of slender ones many more; as many anchors as before."""
    images = anchors.training_boxes(records(shapes), cfg)
    proposed = anchors.propose_anchors(images, cfg)
    before, after = fit(images, cfg), fit(images, cfg, proposed)
    assert (np.mean(after >= 0.5), after.mean()) >= (np.mean(before >= 0.5), before.mean())
    assert np.mean(after >= 0.5) > 0.8
    assert np.shape(proposed[0]) == np.shape(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    assert np.shape(proposed[1]) == np.shape(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)


def test_command(coco, capsys):
    """It prints the shares before and after, and options that a config takes."""
    _, path, images = coco()
    main(["anchors", path, images, "--config-file", str(QUICK), "--opts", "SEED", "3"])
    out = capsys.readouterr().out
    assert re.search(
        r"Of 4 objects, \S+% have an IoU of at least 0\.5 with the config's anchors", out
    )
    sizes, ratios = re.findall(r'"(\[\[.*?\]\])"', out)
    assert np.shape(ast.literal_eval(sizes)) == (5, 3)
    assert np.shape(ast.literal_eval(ratios)) == (1, 3)
