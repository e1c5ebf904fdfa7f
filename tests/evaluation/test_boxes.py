"""COCO AP against pycocotools, and its parts by hand."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from freeanchor import evaluation
from freeanchor.evaluation import BoxEvaluator, aspect_ratios, boxes, crowding
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate(evaluator, detections, num_images):
    """Evaluate (image, class, box, score), the box as x y width height."""
    evaluator.reset()
    for image in range(1, num_images + 1):
        those = [d for d in detections if d[0] == image]
        found = Instances((300, 400))
        boxes = torch.tensor(np.array([d[2] for d in those]), dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes)
        found.pred_classes = torch.tensor([d[1] for d in those], dtype=torch.int64)
        found.scores = torch.tensor([d[3] for d in those], dtype=torch.float32)
        evaluator.process([{"image_id": image}], [{"instances": found}])
    return evaluator.evaluate()


def random_boxes(rng, count):
    sides = np.exp(rng.uniform(np.log(6), np.log(180), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([400, 300]) - sides)
    return np.concatenate([corner, sides], axis=1).round(1)


def random_case(seed, num_images=12):
    """Objects with crowds, empty images and missing classes; detections near them and elsewhere."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, num_images + 1):
        boxes = random_boxes(rng, rng.integers(0, 9))
        for box in boxes:
            c = rng.integers(0, 2)
            objects.append((image, c, box, rng.random() < 0.15))
            for _ in range(rng.integers(0, 4)):
                moved = np.maximum(box + rng.normal(0, 0.1, 4) * box[[2, 3, 2, 3]], 1)
                detections.append((image, c, moved, round(rng.random(), 2)))
        for box in random_boxes(rng, rng.integers(0, 6)):
            detections.append((image, rng.integers(0, 3), box, round(rng.random(), 2)))
    return objects, detections


def test_the_fast_library_is_the_one_that_runs(register, caplog):
    """It is installed here, and the log says which one it is."""
    assert evaluation.COCO_API == "faster-coco-eval"
    with caplog.at_level("INFO"):
        objects = [(1, 0, (10, 10, 20, 20), False)]
        evaluate(BoxEvaluator(register("a", objects)), [(1, 0, (10, 10, 20, 20), 0.5)], 2)
    assert "Evaluating 1 detections with faster-coco-eval" in caplog.text


@pytest.mark.parametrize("seed", range(8))
def test_ap_is_pycocotools(register, tmp_path, monkeypatch, seed):
    """All metrics equal those of Detectron2 with pycocotools, also without the library."""
    objects, detections = random_case(seed)
    name = register("random", objects, num_images=12)
    expected = evaluate(COCOEvaluator(name, use_fast_impl=False), detections, 12)["bbox"]
    fast = evaluate(BoxEvaluator(name, output_dir=str(tmp_path / "out")), detections, 12)
    monkeypatch.setattr(boxes, "COCO", COCO)
    monkeypatch.setattr(boxes, "COCOeval", COCOeval)
    slow = evaluate(BoxEvaluator(name), detections, 12)
    for key, value in expected.items():
        assert fast["bbox"][key] == pytest.approx(value, rel=1e-12, nan_ok=True)
    assert {*METRICS, "AP-class 3", "AP-class 7", "AP-class 8"} <= expected.keys()
    for task in ("bbox", "aspect_ratio", "crowding"):
        assert fast[task] == pytest.approx(slow[task], rel=1e-12, nan_ok=True)
    assert (tmp_path / "out" / "precision_recall.png").stat().st_size > 1000
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {x["category_id"] for x in results} <= {3, 7, 8}
    assert len(results) == len(detections)


@pytest.mark.parametrize("parts", ["aspect_ratio", "crowding"])
def test_parts_are_coco_on_those_objects_alone(register, parts):
    """With detections that are the objects or like them, a part is COCO on the part's objects."""
    rng = np.random.default_rng(1)
    objects = [(i, 0, box, False) for i in range(1, 9) for box in random_boxes(rng, 12)]
    found = [(i, c, box, rng.random()) for i, c, box, _ in objects if rng.random() < 0.7]
    name = register("all", objects, num_images=8)
    results = evaluate(BoxEvaluator(name), found, 8)[parts]
    boxes = {i: np.array([o[2] for o in objects if o[0] == i]) for i in range(1, 9)}
    value = {
        (i, *box): v
        for i, those in boxes.items()
        for box, v in zip(
            those, {"aspect_ratio": aspect_ratios, "crowding": crowding}[parts](those)
        )
    }
    limits = {"aspect_ratio": evaluation.ASPECT_RATIOS, "crowding": evaluation.CROWDING}[parts]
    start = -1.0
    for label, end in limits:

        def is_in(x, start=start, end=end):
            return start < value[(x[0], *x[2])] <= end

        part = register(f"part {label}", [o for o in objects if is_in(o)], num_images=8)
        expected = evaluate(COCOEvaluator(part, use_fast_impl=False), list(filter(is_in, found)), 8)
        assert results[f"AP{label}"] == pytest.approx(expected["bbox"]["AP"], rel=1e-9)
        start = end
    assert len(set(results.values())) > 3


def test_parts_by_hand(register):
    """One object of each kind; one of them found, a second time badly, and one false detection."""
    objects = [
        (1, 0, (10, 10, 40, 40), False),  # square, crowded
        (1, 0, (30, 10, 40, 40), False),  # square, crowded: IoU 1/3
        (1, 0, (10, 100, 200, 20), False),  # slender, alone
        (2, 0, (0, 0, 300, 200), True),  # a crowd region, of nothing
        (2, 0, (10, 10, 25, 10), False),  # 2.5
    ]
    detections = [
        (1, 0, (10, 10, 40, 40), 0.9),
        (1, 0, (12, 10, 40, 40), 0.8),  # a duplicate, square and in the crowd
        (1, 0, (10, 100, 200, 20), 0.7),
        (1, 0, (300, 200, 60, 10), 0.95),  # false, slender and alone
    ]
    results = evaluate(BoxEvaluator(register("hand", objects)), detections, 2)
    aspect, crowd = results["aspect_ratio"], results["crowding"]
    assert aspect["AR<=2"] == pytest.approx(50)
    assert aspect["AP<=2"] == pytest.approx(100 * 51 / 101)  # of 101 recalls, up to 0.5
    assert aspect["AR2..3"] == 0
    assert math.isnan(aspect["AP3..5"])
    assert aspect["AR>5"] == pytest.approx(100)
    assert aspect["AP>5"] == pytest.approx(50)  # after the false one
    assert crowd["AR0"] == pytest.approx(50)
    assert math.isnan(crowd["AR<=0.3"])
    assert crowd["AR>0.3"] == pytest.approx(50)
    assert crowd["AP>0.3"] == pytest.approx(100 * 51 / 101)


def test_no_detections(register):
    """An untrained model has NaN, not an error."""
    results = evaluate(BoxEvaluator(register("a", [(1, 0, (9, 9, 9, 9), False)])), [], 2)
    assert set(results) == {"bbox", "aspect_ratio", "crowding"}
    assert all(math.isnan(x) for task in results.values() for x in task.values())


def test_data_without_annotations(register, tmp_path):
    """A test set is written for the server, and not evaluated."""
    name = register("test", [])
    path = tmp_path / "test.json"
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    evaluator = BoxEvaluator(name, output_dir=str(tmp_path / "out"))
    assert evaluate(evaluator, [(1, 0, (9, 9, 9, 9), 0.5)], 2) == {}
    assert len(json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())) == 1


def test_aspect_ratios_and_crowding():
    """By hand, with degenerate boxes."""
    boxes = np.array([[0, 0, 10, 20], [0, 10, 10, 20], [50, 50, 6, 2], [50, 60, 0, 4.0]])
    assert aspect_ratios(boxes)[:3].tolist() == [2, 2, 3]
    assert aspect_ratios(boxes)[3] > 1e6
    np.testing.assert_allclose(crowding(boxes), [1 / 3, 1 / 3, 0, 0])
    assert crowding(boxes[:0]).shape == (0,)
