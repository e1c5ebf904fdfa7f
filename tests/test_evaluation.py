"""COCO AP against pycocotools, its parts by hand, and NMS recall against slow versions."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import make_it_detect, quick_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from freeanchor import data, evaluation, inference
from freeanchor.evaluation import BoxEvaluator, NMSRecallEvaluator, aspect_ratios, crowding
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture
def register(tmp_path):
    """Registers objects, (image, class, box, crowd), as a data set of 400 x 300 pixel images."""

    def write(name, objects, num_images=2, category_ids=(3, 7, 8)):
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 400, "height": 300}
                for i in range(1, num_images + 1)
            ],
            "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": category_ids[c],
                    "bbox": list(map(float, box)),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(crowd),
                }
                for i, (image, c, box, crowd) in enumerate(objects, start=1)
            ],
        }
        folder = tmp_path / name
        folder.mkdir()
        for i in range(1, num_images + 1):
            Image.new("RGB", (400, 300)).save(folder / f"{i}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        data.register_datasets([(name, str(tmp_path / f"{name}.json"), str(folder))])
        DatasetCatalog.get(name)  # fills the metadata
        return name

    return write


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
    monkeypatch.setattr(evaluation, "COCO", COCO)
    monkeypatch.setattr(evaluation, "COCOeval", COCOeval)
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


def slow_nms_recall(candidates, objects):
    """The protocol in plain loops: per image, (boxes, scores, classes) and objects."""
    ratios = []
    for t in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        before = after = 0
        for (boxes, scores, classes), truth in zip(candidates, objects):
            kept, ious = [], box_iou(boxes, boxes).tolist()
            for c in set(classes.tolist()):
                index = [i for i in range(len(boxes)) if classes[i] == c]
                index.sort(key=lambda i: -scores[i])
                while index:
                    best = index.pop(0)
                    kept.append(best)
                    index = [i for i in index if ious[best][i] <= 0.5]
            for box in truth:
                iou = box_iou(box[None], boxes)[0]
                before += int(len(boxes) > 0 and iou.max().item() > t)
                after += int(len(kept) > 0 and iou[kept].max().item() > t)
        ratios.append(100 * after / max(before, 1))
    return [sum(ratios) / 9, *ratios]


@pytest.fixture
def nms_case(register):
    """A small model with random heads, and objects near what it detects."""
    cfg = quick_cfg()
    model = build_model(cfg).eval()
    make_it_detect(model)
    images = [torch.randint(0, 256, (3, 96, 128)).float() for _ in range(3)]
    found, objects = [], []
    for i, image in enumerate(images):
        (x,) = decoded(model, image)
        found.append((x.pred_boxes.tensor, x.scores, x.pred_classes))
        boxes = x.pred_boxes.tensor[torch.randperm(len(x))[:12]]
        if i < 2:  # no object in the last image
            jitter = boxes + torch.randn_like(boxes) * 2
            objects.append(jitter.clamp(min=0).round())
    name = register(
        "nms",
        [
            (
                i + 1,
                0,
                (*(box[:2] * 3.125).tolist(), *((box[2:] - box[:2]) * 3.125).tolist()),
                False,
            )
            for i, boxes in enumerate(objects)
            for box in boxes
            if (box[2:] - box[:2] > 2).all()
        ]
        + [(1, 0, (0, 0, 400, 300), True)],
        num_images=3,
    )
    inputs = [
        {"image": image, "image_id": i + 1, "height": 300, "width": 400}
        for i, image in enumerate(images)
    ]
    return model, name, inputs, found


@torch.no_grad()
def decoded(model, image):
    """All candidates, by the model's own inference with nothing left out."""
    plain = copy.deepcopy(model)
    plain.test_score_thresh, plain.test_topk_candidates = 0.05, 10**9
    plain.test_nms_thresh, plain.max_detections_per_image = 1.0, 10**9
    results = plain([{"image": image}])
    return [x["instances"] for x in results]


def run(model, name, batches):
    evaluator = NMSRecallEvaluator(name, model)
    return inference_on_dataset(model, batches, evaluator).get("nms_recall")


def test_nms_recall_is_the_slow_one(nms_case):
    """Every figure equals that of the loops; the model's own limits do not matter."""
    model, name, inputs, found = nms_case
    objects = evaluation.NMSRecallEvaluator(name, model).objects
    truth = [objects[x["image_id"]].tensor / 3.125 for x in inputs]
    annotations = [a for x in DatasetCatalog.get(name) for a in x["annotations"]]
    assert sum(map(len, truth)) == sum(not a["iscrowd"] for a in annotations) < len(annotations)
    expected = slow_nms_recall(found, truth)
    model.max_detections_per_image = 3
    model.test_topk_candidates = 5
    results = run(model, name, [[inputs[0]], inputs[1:]])
    assert list(results) == ["NR", *(f"NR{t}" for t in range(50, 95, 5))]
    assert list(results.values()) == pytest.approx(expected, abs=1e-3)
    assert len({round(x, 3) for x in expected}) > 3
    assert not model.head._forward_hooks


@torch.no_grad()
def test_candidates_without_limits(nms_case):
    """Every pair of anchor and class is there, and a limit is one per level."""
    model, _, inputs, _ = nms_case
    features = model.backbone(model.preprocess_image(inputs).tensor)
    features = [features[name] for name in model.head_in_features]
    predictions = model.head(features)
    sizes = [(96, 128)] * len(inputs)
    per_level = [x[0].numel() for x in predictions[0]]
    assert per_level[0] > 1000
    for topk, expected in ((None, sum(per_level)), (20, sum(min(20, n) for n in per_level))):
        found = list(inference.candidates(model, features, predictions, sizes, 0.0, topk))
        assert [len(x) for x in found] == [expected] * len(inputs)


def test_evaluating_nms_recall_does_not_change_detections(nms_case):
    """Hooked or not, the outputs of the model are the same."""
    model, name, inputs, _ = nms_case
    with torch.no_grad():
        expected = model(inputs)
        evaluator = NMSRecallEvaluator(name, model)
        evaluator.reset()
        found = model(inputs)
    for a, b in zip(found, expected):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_nms_recall_by_hand(register, model):
    """Two objects of one class that overlap: NMS removes the box of the second."""
    objects = [(10, 10, 100, 100), (40, 10, 100, 100), (200, 150, 64, 64)]
    name = register("three", [(1, 0, box, False) for box in objects], 1)
    # The third object is found with IoU 0.5, which is not above any threshold.
    # IoU of the objects is 7/13; the boxes are the objects, and a worse one of another class.
    boxes = [[10, 10, 110, 110], [40, 10, 140, 110], [40, 10, 140, 82], [200, 150, 264, 182]]
    found = Instances((300, 400), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    found.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    found.pred_classes = torch.tensor([0, 0, 1, 0])
    evaluator = NMSRecallEvaluator(name, model)
    evaluator.reset()
    evaluator._candidates = [found]
    evaluator.process([{"image": torch.zeros(3, 300, 400), "image_id": 1}], [{}])
    results = evaluator.evaluate()["nms_recall"]
    # The second object keeps IoU 0.72, of the box of another class.
    assert results["NR50"] == results["NR70"] == 100
    assert results["NR75"] == results["NR90"] == 50
    assert results["NR"] == pytest.approx((5 * 100 + 4 * 50) / 9)


def test_nms_recall_without_detections_or_objects(register, model, monkeypatch):
    """Nothing found is 0, as in the repository."""
    name = register("none", [(1, 0, (0, 0, 50, 50), True)], 1)
    inputs = [{"image": torch.zeros(3, 64, 64), "image_id": 1, "height": 300, "width": 400}]
    assert set(run(model, name, [inputs]).values()) == {0.0}


def test_nms_recall_in_chunks(nms_case, monkeypatch):
    """Memory is bounded by parts that do not change the result."""
    model, name, inputs, _ = nms_case
    expected = run(model, name, [inputs])
    monkeypatch.setattr(NMSRecallEvaluator, "_MOST_PAIRS", 50)
    assert run(model, name, [inputs]) == expected


def _one_process(rank, rendezvous, state, json_file, folder, inputs, out):
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    data.register_datasets([("nms", json_file, folder)])
    model = build_model(quick_cfg()).eval()
    model.load_state_dict(state)
    results = run(model, "nms", [[x] for x in inputs[rank::2]])
    if rank == 0:
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_nms_recall_of_several_processes(nms_case, tmp_path):
    """Each process evaluates its images, and the first has the results of all."""
    model, name, inputs, _ = nms_case
    expected = run(model, name, [inputs])
    metadata = MetadataCatalog.get(name)
    arguments = (model.state_dict(), metadata.json_file, metadata.image_root, inputs)
    torch.multiprocessing.spawn(
        _one_process, (tmp_path / "rendezvous", *arguments, tmp_path / "out.json"), nprocs=2
    )
    assert json.loads((tmp_path / "out.json").read_text()) == pytest.approx(expected)


def test_other_models_have_no_nms_recall(register):
    """The evaluator says which it is for."""
    with pytest.raises(TypeError, match="Linear is not a RetinaNet"):
        NMSRecallEvaluator(register("a", []), torch.nn.Linear(1, 1))
