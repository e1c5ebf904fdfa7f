"""COCO AP of masks against Detectron2 with pycocotools."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from freeanchor.data import register_datasets
from freeanchor.evaluation import BoxEvaluator, boxes
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

HEIGHT, WIDTH = 90, 120


def ellipse(x, y, width, height):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return ((columns - x) / width) ** 2 + ((rows - y) / height) ** 2 < 0.25


def annotation(i, image, label, mask, kind):
    encoded = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    box = mask_api.toBbox(encoded).tolist()
    x, y, w, h = box
    segmentation = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    if kind == "polygon":
        segmentation = [[x, y, x + w, y, x + w, y + h / 2, x, y + h]]
    return {
        "id": i,
        "image_id": image,
        "category_id": (3, 7)[label],
        "bbox": box,
        "area": float(mask.sum()),
        "iscrowd": int(kind == "crowd"),
        "segmentation": segmentation,
    }


@pytest.fixture
def case(tmp_path):
    """A data set with masks of all kinds, and detections near its objects and elsewhere."""
    rng = np.random.default_rng(0)
    annotations, found = [], []
    for image in range(1, 7):
        masks, labels, scores = [], [], []
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = rng.uniform((10, 10, 12, 12), (110, 80, 60, 60))
            label = int(rng.integers(2))
            kind = ("polygon", "rle", "rle", "crowd")[rng.integers(4)]
            mask = ellipse(x, y, w, h)
            annotations.append(annotation(len(annotations) + 1, image, label, mask, kind))
            for _ in range(rng.integers(0, 3)):
                masks.append(ellipse(x + rng.normal(), y + rng.normal(), w * 1.1, h))
                labels.append(label)
                scores.append(round(rng.random(), 2))
        found.append((masks, labels, scores))
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(1, 7)
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": annotations,
    }
    for i in range(1, 7):
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / f"{i}.png")
    (tmp_path / "masks.json").write_text(json.dumps(content))
    register_datasets([("masks", str(tmp_path / "masks.json"), str(tmp_path))], masks=True)
    return "masks", found


def evaluate(evaluator, found):
    evaluator.reset()
    for image, (masks, labels, scores) in enumerate(found, start=1):
        instances = Instances((HEIGHT, WIDTH))
        stack = np.array(masks, dtype=bool).reshape(-1, HEIGHT, WIDTH)
        instances.pred_masks = torch.from_numpy(stack)
        encoded = [mask_api.encode(np.asfortranarray(x, dtype=np.uint8)) for x in stack]
        corners = np.array([mask_api.toBbox(x) for x in encoded]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        instances.pred_boxes = Boxes(torch.from_numpy(corners).float())
        instances.scores = torch.tensor(scores, dtype=torch.float32)
        instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()


def test_ap_is_pycocotools(case, tmp_path, monkeypatch):
    """By both libraries, also of sizes, which are the masks'; the masks are in the result file."""
    name, found = case
    expected = evaluate(COCOEvaluator(name, use_fast_impl=False), found)
    fast = evaluate(BoxEvaluator(name, output_dir=str(tmp_path / "out")), found)
    monkeypatch.setattr(boxes, "COCO", COCO)
    monkeypatch.setattr(boxes, "COCOeval", COCOeval)
    slow = evaluate(BoxEvaluator(name), found)
    assert 1 < expected["segm"]["AP"] < 99
    assert expected["segm"]["APm"] != expected["bbox"]["APm"]
    for task in ("bbox", "segm"):
        assert fast[task] == pytest.approx(expected[task], rel=1e-12, nan_ok=True)
        assert slow[task] == pytest.approx(expected[task], rel=1e-12, nan_ok=True)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert len(written) == sum(len(labels) for _, labels, _ in found)
    assert all(x["segmentation"]["size"] == [HEIGHT, WIDTH] for x in written)


def test_models_that_find_nothing(case):
    """Of masks too: the result is there, and not a number."""
    name, found = case
    nothing = evaluate(BoxEvaluator(name), [([], [], [])] * len(found))
    assert np.isnan(nothing["segm"]["AP"])
    MetadataCatalog.get(name)
