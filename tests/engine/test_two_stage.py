"""Two-stage models with masks, on the command line from the training to the pictures."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, quick_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from freeanchor.__main__ import main
from freeanchor.checkpoint import Checkpointer, read_checkpoint
from freeanchor.data import decode_mask, encode_mask, write_shapes
from freeanchor.deploy import Predictor
from freeanchor.deploy.app import detect, find_bag
from freeanchor.errors import FreeAnchorError
from freeanchor.visualization import read_metrics
from PIL import Image
from pycocotools import mask as mask_api

QUICK = REPOSITORY / "configs" / "quick"
MASK_RCNN = QUICK / "mask_rcnn_free_anchor_R_18_FPN.yaml"
TINY = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"),
    *("DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.PROPOSAL_RECALL", "True"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "50", "TEST.DETECTIONS_PER_IMAGE", "20"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, 4, 2, seed=0, masks=True)
    return folder


@pytest.fixture
def arguments(shapes, tmp_path):
    """Of `train_net.py`: data sets, then keys."""
    names = ("train", "val")
    sets = [x for n in names for x in ("--dataset", n, shapes / f"{n}.json", shapes / "images")]
    keys = ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]
    return sets, [*keys, *TINY, "OUTPUT_DIR", tmp_path / "output"]


def test_from_training_to_pictures(train_net, arguments, shapes, tmp_path):
    """Masks are trained, evaluated, resumed, drawn, written and asked for by class."""
    sets, keys = arguments
    output = tmp_path / "output"
    train_net(*sets, *keys, config=MASK_RCNN)
    train_net("--resume", *sets, *keys, "SOLVER.MAX_ITER", "3", config=MASK_RCNN)
    assert "Starting training from iteration 2" in (output / "log.txt").read_text()
    metrics = read_metrics(output / "metrics.json")
    losses = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_positive", "loss_rpn_negative"}
    assert losses | {"freeanchor/bag_likelihood"} <= metrics[0].keys()
    assert {"bbox/AP", "segm/AP", "segm/AP-ring", "proposal_recall/AR@100"} <= metrics[-1].keys()
    results = output / "inference" / "val" / "coco_instances_results.json"
    first = json.loads(results.read_text())
    assert all(x["segmentation"]["size"] == [256, 256] for x in first)
    config = (output / "config.yaml").read_text()
    assert re.search(r"ROI_HEADS:(\n    .*)*NUM_CLASSES: 4", config)
    train_net("--eval-only", "--resume", *sets, *keys, config=MASK_RCNN)
    assert json.loads(results.read_text()) == first

    main(["visualize", str(output), *map(str, sets), "--num-images", "1"])
    assert len([*(output / "pictures").glob("*_matching.png")]) == 1
    main(["report", str(output), *map(str, sets), "--num-images", "2"])
    text = (output / "report.html").read_text()
    content = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text).group(1)
    viewer = json.loads(content)
    assert viewer["hasMasks"]
    assert viewer["hasBags"]
    assert all(len(x["bags"][0]) == len(x["truth"]) for x in viewer["images"])
    truth = {x["image_id"]: x["annotations"] for x in DatasetCatalog.get("val")}
    for picture in viewer["images"]:
        number = int(picture["name"][-5])
        (found,) = picture["found"]
        mine = sorted((x for x in first if x["image_id"] == number), key=lambda x: -x["score"])
        assert len(found) > 5
        expected = [x["segmentation"] for x in mine[: len(found)]]
        assert [row[6] for row in found] == expected
        masks = [decode_mask(x["segmentation"], (256, 256)) for x in truth[number]]
        assert [row[6] for row in picture["truth"]] == [encode_mask(x) for x in masks]

    image = shapes / "images" / "val_00001.png"
    out = tmp_path / "predictions"
    options = ["--confidence", "0.0", "--classes", "ring", "--formats", "pictures", "coco"]
    main(["predict", str(output), str(image), "--out", str(out), *options])
    found = json.loads((out / "detections.json").read_text())["annotations"]
    assert {x["category_id"] for x in found} == {3}
    for x in found:
        assert x["area"] == mask_api.area(x["segmentation"])
    drawn = np.asarray(Image.open(out / "pictures" / "val_00001.png"))
    assert drawn.shape == (256, 256, 3)
    every = [x for x in first if x["image_id"] == 1 and x["category_id"] == 3]
    scores = sorted((x["score"] for x in found), reverse=True)  # as without --classes
    for a, b in zip(sorted((x["score"] for x in every), reverse=True), scores):
        assert a == pytest.approx(b, abs=1e-4)
    predictor = Predictor(output, device="cpu", confidence=0.0)
    pixels = cv2.imread(str(image))
    answer, (expected,) = detect(predictor, pixels), predictor([pixels])
    bag = find_bag(predictor, pixels, (10, 20, 30, 40), 2)["bag"]
    assert len(bag) == 50
    assert bag == find_bag(predictor, pixels, (10, 20, 30, 40), 0)["bag"]  # whatever the class
    for detection, mask in zip(answer["detections"], expected.pred_masks.numpy(), strict=True):
        assert (decode_mask(detection["segmentation"], (256, 256)) == mask).all()
    amp = ["TEST.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    half = Predictor(output, device="cpu", confidence=0.0, options=amp)
    (instances,) = half([image])
    assert len(instances) == 20
    assert instances.pred_boxes.tensor.dtype == instances.scores.dtype == torch.float32
    train_net("--eval-only", "--resume", *sets, *keys, *amp, config=MASK_RCNN)
    assert len(json.loads(results.read_text())) == len(first)
    with pytest.raises(SystemExit, match="only one-stage models can be exported"):
        main(["export", str(output), str(tmp_path / "model.onnx")])
    with pytest.raises(FreeAnchorError, match="aug is of one-stage models"):
        Predictor(output, device="cpu", aug=True)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (MASK_RCNN, ["TEST.NMS_RECALL", "True"], "TEST.NMS_RECALL is of models with one stage"),
        (MASK_RCNN, ["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED is of models with one stage"),
        (
            QUICK / "free_anchor_R_18_FPN.yaml",
            ["MODEL.MASK_ON", "True", "TEST.PROPOSAL_RECALL", "False"],
            "MODEL.MASK_ON is of models with two stages",
        ),
        (
            QUICK / "free_anchor_R_18_FPN.yaml",
            [],
            "TEST.PROPOSAL_RECALL is of models with two stages",
        ),
        (MASK_RCNN, ["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "MODEL.ROI_HEADS.NUM_CLASSES is 7, but"),
    ],
)
def test_what_does_not_go_together(train_net, arguments, config, options, expected):
    """It is said before any work is done, by the name of the key."""
    sets, keys = arguments
    with pytest.raises(SystemExit, match=re.escape(expected)):
        train_net(*sets, *keys, *options, config=config)


def test_starts_from_detectron2s_mask_rcnn(tmp_path, caplog):
    """Its backbone, pyramid and ROI heads but for the predictors; its RPN has no place."""
    cfg = quick_cfg("quick/mask_rcnn_free_anchor_R_18_FPN.yaml")
    theirs = cfg.clone()
    theirs.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    theirs.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    theirs.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    theirs.MODEL.ROI_HEADS.NUM_CLASSES = 80
    zoo = build_model(theirs)
    torch.save({"model": zoo.state_dict()}, tmp_path / "zoo.pth")
    model = build_model(cfg)
    with caplog.at_level("WARNING"):
        Checkpointer(model, cfg).load_start(str(tmp_path / "zoo.pth"))
    ours, theirs = model.state_dict(), zoo.state_dict()
    same = {k for k, v in theirs.items() if k in ours and torch.equal(ours[k], v)}
    expected = {k for k in theirs if k.startswith(("backbone.", "roi_heads."))}
    predictors = ("cls_score", "bbox_pred", "mask_head.predictor")
    assert same >= {k for k in expected if not any(x in k for x in predictors)}
    assert not any("cls_score" in k for k in same)
    assert "proposal_generator.detector.head.cls_score.weight" in caplog.text  # initialised anew


@pytest.mark.parametrize("mask_format", ["encoded", "polygons"])
def test_replay_of_masks(train_net, arguments, shapes, tmp_path, before_step, capsys, mask_format):
    """A step that is not finite is saved with the masks that its losses need."""

    def overflow(step):
        torch.nn.init.constant_(step.model.roi_heads.mask_head.predictor.weight, torch.inf)

    before_step(overflow)
    sets, keys = arguments
    if mask_format == "polygons":
        content = json.loads((shapes / "train.json").read_text())
        for x in content["annotations"]:
            left, top, width, height = x["bbox"]
            right, bottom = left + width, top + height
            x["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        (tmp_path / "train.json").write_text(json.dumps(content))
        sets = [tmp_path / "train.json" if x == shapes / "train.json" else x for x in sets]
    with pytest.raises(SystemExit, match=r"loss_mask nan"):
        train_net(*sets, *keys, config=MASK_RCNN)
    (file,) = (tmp_path / "output").glob("non_finite_*.pth")
    main(["replay", str(file)])
    assert "roi_heads.mask_head.predictor.weight was not finite" in capsys.readouterr().out
    content = read_checkpoint(str(file))
    content["model"]["roi_heads.mask_head.predictor.weight"].zero_()
    torch.save(content, file)
    main(["replay", str(file)])
    assert "loss_mask 0.6931" in capsys.readouterr().out


def test_report_beside_a_run_without_masks(train_net, arguments, tmp_path):
    """The masks of the objects are there, whichever run is the first."""
    sets, keys = arguments
    train_net(*sets, *keys, config=MASK_RCNN)
    keys = [*keys, "TEST.PROPOSAL_RECALL", "False", "OUTPUT_DIR", tmp_path / "boxes"]
    train_net(*sets, *keys, config=QUICK / "free_anchor_R_18_FPN.yaml")
    runs = [str(tmp_path / "output"), str(tmp_path / "boxes")]
    for order in (runs, runs[::-1]):
        main(["report", *order, *map(str, sets), "--num-images", "1"])
        text = Path(order[0], "report.html").read_text()
        content = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text).group(1)
        (image,) = json.loads(content)["images"]
        assert all(mask for *_, mask in image["truth"])
