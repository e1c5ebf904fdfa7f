"""NMS recall against slow versions and by hand."""

import copy
import json
import math

import pytest
import torch
from conftest import make_it_detect, quick_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from freeanchor import data
from freeanchor.evaluation import NMSRecallEvaluator
from freeanchor.modeling import candidates
from torchvision.ops import box_iou


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
    objects = NMSRecallEvaluator(name, model).objects
    for boxes in objects.values():
        boxes.clip((300, 400))  # as the evaluator does, when it knows the size
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
        found = list(candidates(model, features, predictions, sizes, 0.0, topk))
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
    """Nothing found is 0, as in the repository; without objects, there is nothing to find."""
    inputs = [{"image": torch.zeros(3, 64, 64), "image_id": 1, "height": 300, "width": 400}]
    box = (0, 0, 50, 50)
    name = register("missed", [(1, 0, box, False)], 1)
    assert set(run(model, name, [inputs]).values()) == {0.0}
    name = register("none", [(1, 0, box, True)], 1)
    assert all(math.isnan(x) for x in run(model, name, [inputs]).values())


def test_nms_recall_of_records_without_sizes(nms_case):
    """Records of Python may leave them out: they are those of the images."""
    model, name, inputs, _ = nms_case
    expected = run(model, name, [inputs])
    records = DatasetCatalog.get(name)
    for record in records:
        del record["height"], record["width"]
    DatasetCatalog.register("sizeless", lambda: records)
    assert run(model, "sizeless", [inputs]) == expected


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
