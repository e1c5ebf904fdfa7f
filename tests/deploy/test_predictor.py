"""Detections in images, by a trained model."""

import json
import os
import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_same, quick_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from freeanchor import model_zoo
from freeanchor.__main__ import main
from freeanchor.checkpoint import (
    Thresholds,
    read_checkpoint,
    write_checkpoint,
    write_thresholds,
)
from freeanchor.config import read_config
from freeanchor.data import Mapper, num_channels
from freeanchor.deploy import Predictor, export, metadata
from freeanchor.errors import DatasetError, FileError, FreeAnchorError

ABOVE = "Detections have scores above"


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_equals_detectron2(run_folder, images, input_format, tmp_path):
    """Arrays and files give what Detectron2's DefaultPredictor gives, in both channel orders."""
    options = ["INPUT.FORMAT", input_format]
    predictor = Predictor(run_folder, confidence=0.05, device="cpu", options=options)
    cfg = read_config(run_folder / "config.yaml")
    cfg.merge_from_list(options)
    cfg.MODEL.WEIGHTS = str(run_folder / "model_final.pth")
    theirs = DefaultPredictor(cfg)
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    from_arrays = predictor(images)
    from_files = predictor([tmp_path / f"{i}.png" for i in range(len(images))])
    assert sum(map(len, from_arrays)) > 20
    for image, a, b in zip(images, from_arrays, from_files, strict=True):
        assert_same(a, theirs(image)["instances"])
        assert_same(b, a)


def test_batches(run_folder, predictor, images):
    """In a batch of any sizes, each image is detected as if it was alone."""
    together = Predictor(run_folder, confidence=0.05, device="cpu", batch_size=4)(images)
    for image, found in zip(images, together, strict=True):
        assert_same(found, predictor([image])[0])


def test_threads(predictor, images):
    """Calls from several threads at once give each its own detections."""
    expected = predictor(images)
    found = {}

    def work(i):
        found[i] = predictor(images[i:] + images[:i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for a, b in zip(found[i], expected[i:] + expected[:i], strict=True):
            assert_same(a, b)


def test_stream_is_bounded(run_folder, images):
    """An endless stream is read no further ahead than the next batch."""
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield images[0]

    predictor = Predictor(run_folder, device="cpu", batch_size=2)
    stream = predictor.stream(endless())
    for count in range(1, 6):
        given, pixels, _ = next(stream)
        assert given is images[0]
        assert pixels is images[0]
        assert len(read) <= count + 4
    stream.close()
    assert len(read) < 12


def test_confidence(run_folder, predictor, images):
    """A higher confidence leaves the detections with higher scores, and changes nothing else."""
    all_found = predictor(images)
    confidence = torch.cat([x.scores for x in all_found]).median().item()
    sure = Predictor(run_folder, confidence=confidence, device="cpu")(images)
    for a, b in zip(all_found, sure, strict=True):
        assert_same(a[a.scores > confidence], b)


def test_classes(run_folder, predictor, images):
    """Only the named classes are detected, and others take no place among the best 100."""
    options = ["TEST.DETECTIONS_PER_IMAGE", "1000"]
    everything = Predictor(run_folder, confidence=0.05, device="cpu", options=options)(images)
    some = Predictor(run_folder, confidence=0.05, classes=["class 1", 2], device="cpu")(images)
    for a, b in zip(everything, some, strict=True):
        assert_same(a[a.pred_classes > 0][:100], b)
    with pytest.raises(FreeAnchorError, match="no class bird, only class 0, class 1, class 2"):
        Predictor(run_folder, classes=["bird"])


def test_aug(run_folder, images):
    """With one scale, that of the model, multi-scale testing detects the same."""
    options = ["TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", "96", "TEST.AUG.FLIP", "False"]
    plain = Predictor(run_folder, confidence=0.05, device="cpu")(images)
    augmented = Predictor(run_folder, confidence=0.05, device="cpu", aug=True, options=options)(
        images
    )
    for a, b in zip(plain, augmented, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_precision(run_folder, predictor, images, layout):
    """In bfloat16 the same objects are found, about where and about as sure."""
    options = ["TEST.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    options += ["MODEL.MEMORY_FORMAT", layout]
    fast = Predictor(run_folder, confidence=0.05, device="cpu", options=options)
    assert next(fast.model.parameters()).dtype == torch.bfloat16
    for a, b in zip(fast(images), predictor(images), strict=True):
        iou = pairwise_iou(a.pred_boxes, b.pred_boxes).amax(1)
        assert iou.median() > 0.9
        assert abs(a.scores[0] - b.scores[0]) < 0.1


def test_wrong_precision(run_folder):
    """Values that the device cannot have, or that nothing has, are named."""
    for options, message in (
        (["SOLVER.AMP.PRECISION", "half"], "PRECISION must be auto, bfloat16 or float16"),
        (["MODEL.MEMORY_FORMAT", "NHWC"], "must be auto, contiguous or channels_last, got 'NHWC'"),
    ):
        with pytest.raises(FreeAnchorError, match=message):
            Predictor(run_folder, device="cpu", options=options)


def test_sources(run_folder, predictor, images, tmp_path):
    """The folder, its weights, config and weights, and a converted pair are the same model."""
    cfg = read_config(run_folder / "config.yaml")
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    weights = read_checkpoint(str(run_folder / "model_final.pth"))["model"]
    write_checkpoint(tmp_path / "mine.safetensors", weights, {})
    expected = predictor(images[:1])[0]
    for source, other in (
        (str(run_folder), ""),
        (run_folder / "model_final.pth", ""),
        (run_folder / "config.yaml", run_folder / "model_final.pth"),
        (tmp_path / "mine.safetensors", ""),
        (cfg, str(tmp_path / "mine.safetensors")),
    ):
        assert_same(
            Predictor(source, other, confidence=0.05, device="cpu")(images[:1])[0], expected
        )


def test_newest_weights(run_folder, tmp_path):
    """Of a run's checkpoints the last is taken, and nothing outside its folder."""
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    with pytest.raises(FileError, match="has no checkpoint of its training; if it is of an eval"):
        Predictor(tmp_path)
    data = (run_folder / "model_final.pth").read_bytes()
    (tmp_path / "model_best.pth").write_bytes(data)
    with pytest.raises(FileError, match=r"only model_best\.pth: name that file"):
        Predictor(tmp_path)
    (tmp_path / "model_0000001.pth").write_bytes(data)
    (tmp_path / "last_checkpoint").write_text("../../model_0000001.pth")
    assert str(tmp_path / "model_0000001.pth") == Predictor(tmp_path).cfg.MODEL.WEIGHTS
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_final.pth").write_bytes(data)
    assert str(tmp_path / "model_final.pth") == Predictor(tmp_path).cfg.MODEL.WEIGHTS
    os.utime(tmp_path / "model_final.pth", (1, 1))  # the run went on from it
    assert str(tmp_path / "model_0000001.pth") == Predictor(tmp_path).cfg.MODEL.WEIGHTS


def test_wrong_sources(run_folder, tmp_path):
    """What is missing is named, with what to do."""
    with pytest.raises(FileError, match="There is no nowhere: give the folder of a run"):
        Predictor("nowhere")
    with pytest.raises(FileError, match=r"has no config\.yaml"):
        Predictor(tmp_path)
    (tmp_path / "a.pth").write_bytes((run_folder / "model_final.pth").read_bytes())
    with pytest.raises(FileError, match=r"neither a\.yaml nor config\.yaml"):
        Predictor(tmp_path / "a.pth")
    with pytest.raises(FileError, match="names no weights"):
        Predictor(run_folder / "config.yaml")
    with pytest.raises(FreeAnchorError, match="ProposalNetwork is no FreeAnchor"):
        Predictor(run_folder, options=["MODEL.META_ARCHITECTURE", "ProposalNetwork"])
    with pytest.raises(FreeAnchorError, match="confidence"):
        Predictor(run_folder, confidence=1.5)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_devices_that_are_not_there(run_folder, device):
    """One sentence names the device, for whoever loads a model."""
    message, own = f"the device {device} cannot be used here: ", run_folder / "config.yaml"
    with pytest.raises(FreeAnchorError, match=message):
        Predictor(run_folder, device=device)
    with pytest.raises(FreeAnchorError, match=message):
        model_zoo.get("quick/free_anchor_R_18_FPN.yaml", device=device)
    for command, source in ((["serve", "--port", "0"], run_folder), (["benchmark"], own)):
        with pytest.raises(SystemExit, match=message):
            main([*command, str(source), "--device", device])


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), 3]
)
def test_wrong_images(predictor, image):
    """What is no BGR image is refused, and by default nothing is left out."""
    with pytest.raises(DatasetError, match="a path or a"):
        predictor([image])


def test_unreadable_files(run_folder, images, tmp_path):
    """An unreadable image is an error that names it, or is left out where one asks for that."""
    (tmp_path / "bad.png").write_text("no image")
    predictor = Predictor(run_folder, device="cpu", batch_size=3)
    with pytest.raises(DatasetError, match=r"bad\.png cannot be read"):
        predictor([tmp_path / "bad.png"])
    errors = []
    given = [images[0], tmp_path / "bad.png", tmp_path / "none.png", images[1], images[2]]
    found = list(predictor.stream(given, errors.append))
    assert [x[1].shape for x in found] == [x.shape for x in images[:3]]
    assert len(errors) == 2


def test_no_images(predictor):
    """None in, none out."""
    assert predictor([]) == []


def test_recommended_thresholds(train_net, run_folder, predictor, coco, tmp_path):
    """Where some score parts objects from the rest, an evaluation finds it, and Predictor uses it.

    Not with weights that were changed since, and not against the user's word.
    """
    name, path, folder = coco(category_ids=(1, 2, 3))
    content = json.loads(Path(path).read_text())
    files = [f"{folder}/{x['file_name']}" for x in content["images"]]
    found = predictor(files)
    scores = torch.cat([x.scores for x in found]).sort().values
    middle = len(scores) // 2
    cut = middle + int((scores[middle + 1 :] - scores[middle:-1])[: middle // 2].argmax())
    threshold = float(scores[cut : cut + 2].mean())
    objects = [x[x.scores > threshold] for x in found]
    content["annotations"] = []
    for image, here in zip(content["images"], objects, strict=True):
        for box, c in zip(here.pred_boxes.tensor.tolist(), here.pred_classes.tolist()):
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            ids = {"id": len(content["annotations"]) + 1, "image_id": image["id"]}
            content["annotations"].append({**ids, "bbox": box, "category_id": c + 1})
    Path(path).write_text(json.dumps(content))
    output = tmp_path / "output"
    train_net(
        *("--eval-only", "--export-safetensors", "--dataset", name, path, folder),
        *("DATASETS.TEST", f"('{name}',)", "MODEL.WEIGHTS", run_folder / "model_final.pth"),
        *("OUTPUT_DIR", output, "DATALOADER.NUM_WORKERS", "0"),
        config=run_folder / "config.yaml",
    )
    recommended = Predictor(output, device="cpu")
    expected = f"{ABOVE} those with the best F1 on train (thresholds.json): class 1 0."
    assert recommended.describe_thresholds().startswith(expected)
    assert sum(map(len, objects)) > 10
    for a, b in zip(recommended(files), objects, strict=True):
        assert_same(a, b)
    assert metadata(recommended)["recommended_scores"].keys() == {"class 1", "class 2", "class 3"}
    assert Predictor(output, confidence=0.7, device="cpu").describe_thresholds() == (
        f"{ABOVE} 0.7, as given"
    )
    several = Predictor(output, device="cpu", aug=True).describe_thresholds()
    assert several.startswith(f"{ABOVE} 0.5, as several scales")
    state = read_checkpoint(str(output / "model_final.safetensors"))
    state["model"]["head.cls_score.bias"] += 0.01
    write_checkpoint(output / "model_final.safetensors", state["model"], {})
    assert Predictor(output, device="cpu").describe_thresholds() == (
        f"{ABOVE} 0.5, the default, as no thresholds.json is of these weights"
    )


@pytest.mark.parametrize("input_format", ["L", "RGBA", "CMYK", "YUV-BT.601"])
def test_other_formats(images, input_format, tmp_path):
    """The model sees of a file what it saw in training, and of an array the same colours."""
    cfg = quick_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = input_format, 64, 96
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [100.0] * num_channels(input_format)
    model = build_model(cfg)
    write_checkpoint(tmp_path / "model_final.pth", model.state_dict(), {})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    predictor = Predictor(tmp_path, device="cpu")
    seen = []
    predictor.model.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]["image"]))
    cv2.imwrite(str(tmp_path / "image.png"), images[0])
    record = {"file_name": str(tmp_path / "image.png"), "image_id": 1}
    list(predictor.stream([record["file_name"], images[0]]))
    expected = Mapper(cfg, is_train=False)(record)["image"]
    assert expected.shape[0] == num_channels(input_format)
    for image in seen:
        torch.testing.assert_close(image, expected)
    with pytest.raises(FreeAnchorError, match=r"INPUT\.FORMAT .* must be BGR or RGB"):
        export(predictor, tmp_path / "model.onnx")


def test_thresholds_of_classes_and_the_most_detections(run_folder, images, tmp_path):
    """What is below the threshold of its class takes no place from what is above its own."""
    folder = shutil.copytree(run_folder, tmp_path / "run")
    state = read_checkpoint(str(folder / "model_final.pth"))["model"]
    scores = {"class 0": 0.05, "class 1": 0.9, "class 2": 0.9}
    write_thresholds(folder, state, Thresholds("d", 0.5, scores))
    few, many = (
        Predictor(folder, device="cpu", options=["TEST.DETECTIONS_PER_IMAGE", number])
        for number in ("20", "1000")
    )
    for a, b in zip(few(images), many(images), strict=True):
        assert_same(a, b[:20])
        assert (b.scores > many.thresholds[b.pred_classes]).all()
    assert any(len(x) > 20 for x in many(images))
    assert few.model.max_detections_per_image == 20


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_thresholds_of_classes_and_the_most_masks(images, tmp_path, monkeypatch, heads):
    """So it is in two stages, which make no masks of what is below the threshold of its class."""
    cfg = quick_cfg("quick/mask_rcnn_free_anchor_R_18_FPN.yaml")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60
    cfg.MODEL.ROI_HEADS.NAME = heads
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = heads == "CascadeROIHeads"
    torch.manual_seed(0)
    model = build_model(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    write_checkpoint(tmp_path / "model_final.pth", model.state_dict(), {})
    all_of = ["TEST.DETECTIONS_PER_IMAGE", "-1"]
    (found,) = Predictor(tmp_path, confidence=0, device="cpu", options=all_of)(images[:1])
    # Half of the detections of the class with the highest scores, and all others, are too low.
    label = int(found.pred_classes[0])
    scores = {f"class {i}": 0.99 for i in range(3)}
    scores[f"class {(label + 1) % 3}"] = 0.001
    scores[f"class {label}"] = found.scores[found.pred_classes == label].median().item()
    write_thresholds(tmp_path, model.state_dict(), Thresholds("d", 0.5, scores))
    few, many = (
        Predictor(tmp_path, device="cpu", options=["TEST.DETECTIONS_PER_IMAGE", number])
        for number in ("20", "-1")
    )
    with_masks = []
    forward_mask = type(few.model.roi_heads)._forward_mask

    def count(self, features, found):
        with_masks.append(sum(map(len, found)))
        return forward_mask(self, features, found)

    monkeypatch.setattr(type(few.model.roi_heads), "_forward_mask", count)
    for a, b in zip(few(images), many(images), strict=True):
        assert_same(a, b[:20])
        assert (b.scores > many.thresholds[b.pred_classes]).all()
    assert max(with_masks) > 20
    assert [*map(len, few(images))] == with_masks[-len(images) :] == [20] * len(images)
