"""COCO AP against pycocotools, and its parts by hand."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from freeanchor import engine, evaluation
from freeanchor.errors import DatasetError
from freeanchor.evaluation import BoxEvaluator, aspect_ratios, boxes, crowding
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def evaluate(evaluator, detections, num_images, image_id=lambda i: i):
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
        evaluator.process([{"image_id": image_id(image)}], [{"instances": found}])
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


def test_a_full_disk_costs_no_figures(register, tmp_path, caplog):
    """A training goes on when its evaluation cannot be written."""
    objects, detections = random_case(0)
    name = register("random", objects, num_images=12)
    expected = evaluate(BoxEvaluator(name), detections, 12)
    for file in ("coco_instances_results.json", "precision_recall.png"):
        (tmp_path / file).symlink_to("/dev/full")
    found = evaluate(BoxEvaluator(name, output_dir=str(tmp_path)), detections, 12)
    assert str(found) == str(expected)
    assert caplog.text.count("No space left on device. The evaluation goes on") == 2


def with_ids(content, image_id, category_id, annotation_id):
    """The same data set with other ids, and without what COCO files may lack."""
    content = json.loads(json.dumps(content))
    for x in content["images"]:
        x["id"] = image_id(x["id"])
    for x in content["categories"]:
        x["id"] = category_id(x["id"])
    for i, x in enumerate(content["annotations"]):
        x["id"] = annotation_id(i)
        x["image_id"], x["category_id"] = image_id(x["image_id"]), category_id(x["category_id"])
        del x["area"]
        if not x["iscrowd"]:
            x["iscrowd"] = None
    return content


@pytest.mark.parametrize("back_end", ["faster-coco-eval", "pycocotools"])
@pytest.mark.parametrize(
    "ids",
    [
        (lambda i: i - 5, lambda c: -c, lambda i: -i),
        (lambda i: f"{i:06}", lambda c: f"c{9 - c}", lambda i: f"a{i}"),
        (lambda i: f"../{i}" if i % 2 else i, lambda c: c - 3, lambda i: 0 if i == 1 else 9 - i),
    ],
    ids=["negative", "text", "mixed and zero"],
)
def test_ids_change_no_figure(register, tmp_path, monkeypatch, ids, back_end):
    """Whatever the ids, the results are pycocotools' with ids from 1; written are the user's."""
    objects, detections = random_case(3)
    expected = evaluate(
        COCOEvaluator(register("plain", objects, num_images=12), use_fast_impl=False),
        detections,
        12,
    )["bbox"]
    content = with_ids(json.loads((tmp_path / "plain.json").read_text()), *ids)
    (tmp_path / "other.json").write_text(json.dumps(content))
    MetadataCatalog.get("other").set(
        json_file=str(tmp_path / "other.json"),
        thing_classes=[f"class {c}" for c in (3, 7, 8)],
        thing_dataset_id_to_contiguous_id={ids[1](c): i for i, c in enumerate((3, 7, 8))},
    )
    if back_end == "pycocotools":
        monkeypatch.setattr(boxes, "COCO", COCO)
        monkeypatch.setattr(boxes, "COCOeval", COCOeval)
    evaluator = BoxEvaluator("other", output_dir=str(tmp_path))
    found = evaluate(evaluator, detections, 12, image_id=ids[0])["bbox"]
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {x["image_id"] for x in written} == {ids[0](d[0]) for d in detections}
    assert {x["category_id"] for x in written} == {ids[1]((3, 7, 8)[d[1]]) for d in detections}
    MetadataCatalog.pop("other")


@pytest.mark.parametrize("is_checked", [True, False])
def test_truth_from_elsewhere_than_a_file(register, is_checked):
    """Records that Python registers give the same, and those that `freeanchor.data` has checked."""
    objects, detections = random_case(4)
    name = register("file", objects, num_images=12)
    expected = evaluate(BoxEvaluator(name), detections, 12)
    records = DatasetCatalog.get(name)
    DatasetCatalog.register("other", lambda: records)
    MetadataCatalog.get("other").thing_classes = [f"class {c}" for c in (3, 7, 8)]
    if is_checked:  # whatever file they are of
        MetadataCatalog.get("other").set(is_checked=True, json_file="gone.json")
    results = evaluate(BoxEvaluator("other"), detections, 12)
    assert results == {
        task: pytest.approx(values, rel=1e-12, nan_ok=True) for task, values in expected.items()
    }
    MetadataCatalog.pop("other")


@pytest.mark.parametrize("back_end", ["faster-coco-eval", "pycocotools"])
def test_more_than_100_detections(register, cfg, tmp_path, monkeypatch, back_end):
    """A model with more detections per image is not measured by its first 100."""
    if back_end == "pycocotools":
        monkeypatch.setattr(boxes, "COCO", COCO)
        monkeypatch.setattr(boxes, "COCOeval", COCOeval)
    objects = [(1, 0, (x * 13, y * 14, 12, 13), False) for x in range(20) for y in range(15)]
    found = [(*x[:3], 0.3 + i / 1000) for i, x in enumerate(objects)]
    name = register("many", objects, num_images=1)
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    cfg.OUTPUT_DIR = str(tmp_path)
    results = evaluate(engine.Trainer.build_evaluator(cfg, name), found, 1)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["crowding"]["AR0"] == pytest.approx(100)
    assert evaluate(BoxEvaluator(name), found, 1)["bbox"]["AP"] < 34
    found = [*[(1, 0, (390, 290, 9, 9), 0.9)] * 2, (*objects[0][:3], 0.8)]
    assert evaluate(BoxEvaluator(name, max_dets_per_image=2), found, 1)["bbox"]["AP"] == 0
    assert evaluate(BoxEvaluator(name, max_dets_per_image=3), found, 1)["bbox"]["AP"] > 0


@pytest.mark.parametrize("back_end", ["faster-coco-eval", "pycocotools"])
@pytest.mark.parametrize("objects", [[], [(1, 1, (9, 9, 50, 60), True)]], ids=["none", "a crowd"])
def test_without_objects(register, monkeypatch, tmp_path, back_end, objects):
    """The AP of nothing is not 0: of a data set and of a class."""
    if back_end == "pycocotools":
        monkeypatch.setattr(boxes, "COCO", COCO)
        monkeypatch.setattr(boxes, "COCOeval", COCOeval)
    detections = [(1, 0, (9, 9, 20, 20), 0.9), (2, 1, (9, 9, 20, 20), 0.8)]
    evaluator = BoxEvaluator(register("empty", objects), output_dir=str(tmp_path / "out"))
    results = evaluate(evaluator, detections, 2)
    assert not (tmp_path / "out" / "precision_recall.png").exists()
    results.pop("calibration")  # all detections are wrong
    assert all(math.isnan(x) for task in results.values() for x in task.values())
    objects = [*objects, (2, 0, (9, 9, 20, 20), False)]
    results = evaluate(BoxEvaluator(register("one", objects)), detections, 2)["bbox"]
    assert results["AP-class 3"] == results["AP"] == 0
    assert math.isnan(results["AP-class 7"])


def test_classes_that_the_data_set_lacks(register, tmp_path, caplog):
    """Their detections have no id of the user's, count for nothing and are left out, counted."""
    name = register("a", [(1, 0, (10, 10, 20, 20), False)], category_ids=(3,))
    metadata = MetadataCatalog.pop(name)
    MetadataCatalog.get(name).set(
        json_file=metadata.json_file,
        thing_classes=["other", "class 3"],
        thing_dataset_id_to_contiguous_id={3: 1},
    )
    found = [(1, 1, (10, 10, 20, 20), 0.5), (1, 0, (10, 10, 20, 20), 0.9)]
    results = evaluate(BoxEvaluator(name, output_dir=str(tmp_path)), found, 2)["bbox"]
    assert results["AP"] == results["AP-class 3"] == pytest.approx(100)
    assert math.isnan(results["AP-other"])
    assert "1 detections are of classes that the data set does not have" in caplog.text
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [x["category_id"] for x in written] == [3]


def test_detections_of_another_data_set(register):
    """An image that the data set does not have is named."""
    evaluator = BoxEvaluator(register("a", []))
    with pytest.raises(DatasetError, match="image 3 is not in the data set"):
        evaluate(evaluator, [], 3)


def test_no_detections(register):
    """An untrained model has NaN, not an error."""
    results = evaluate(BoxEvaluator(register("a", [(1, 0, (9, 9, 9, 9), False)])), [], 2)
    assert set(results) == {"bbox", "aspect_ratio", "crowding", "calibration", "threshold"}
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
