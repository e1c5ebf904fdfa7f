"""What became of detections and objects."""

import contextlib
import io

import numpy as np
import pytest
from conftest import random_image
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from freeanchor.evaluation import (
    confusion,
    count_errors,
    found_rows,
    outcomes,
    precision_recall,
    truth_rows,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CLASSES = 3


@pytest.mark.parametrize(
    ("detections", "found", "truth"),
    [
        ([], [], ["miss", "crowd"]),
        ([(0, 0, 10, 10, 0, 0.9)], ["hit"], ["hit", "crowd"]),
        ([(0, 0, 10, 10, 0, 0.9), (0, 0, 10, 9, 0, 0.8)], ["hit", "duplicate"], ["hit", "crowd"]),
        ([(0, 0, 10, 10, 1, 0.9)], ["wrong class"], ["miss", "crowd"]),
        ([(0, 0, 10, 4, 0, 0.9)], ["poor box"], ["miss", "crowd"]),
        ([(0, 0, 10, 0.9, 0, 0.9)], ["background"], ["miss", "crowd"]),
        ([(80, 80, 90, 90, 0, 0.9)], ["background"], ["miss", "crowd"]),
        ([(45, 45, 50, 50, 0, 0.9)] * 2, ["ignored"] * 2, ["miss", "crowd"]),
        ([(45, 45, 50, 50, 1, 0.9)], ["background"], ["miss", "crowd"]),  # no crowd of its class
    ],
)
def test_outcomes_by_hand(detections, found, truth):
    """An object in a corner, and a crowd of the same class elsewhere."""
    objects = np.array([(0, 0, 10, 10, 0, 0), (40, 40, 60, 60, 0, 1)], dtype=float)
    result = outcomes(np.array(detections, dtype=float).reshape(-1, 6), objects)
    assert (result.found, result.truth) == (found, truth)
    overlaps = [kind not in ("background", "ignored") for kind in found]
    assert [j == 0 for j in result.objects] == overlaps


def test_mean_precision_is_cocos():
    """AP of each class at an IoU of 0.5 and 0.75, over images with crowds, is pycocotools'."""
    rng = np.random.default_rng(0)
    images = [random_image(rng) for _ in range(60)]
    content = {
        "images": [{"id": i} for i in range(1, len(images) + 1)],
        "categories": [{"id": c} for c in range(CLASSES + 1)],
        "annotations": [],
    }
    detections = []
    for i, (found, truth) in enumerate(images, 1):
        for rows, into in ((truth, content["annotations"]), (found, detections)):
            for x0, y0, x1, y1, label, value in rows.tolist():
                box = [x0, y0, x1 - x0, y1 - y0]
                row = {"image_id": i, "category_id": int(label), "bbox": box}
                row |= {"score": value, "area": box[2] * box[3], "iscrowd": int(value)}
                into.append({**row, "id": len(into) + 1})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        evaluated = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
    for iou, t in ((0.5, 0), (0.75, 5)):
        expected = evaluated.eval["precision"][t, :, :, 0, -1].T  # of each class
        judged = [(found, truth, outcomes(found, truth, iou)) for found, truth in images]
        curves = precision_recall(judged, CLASSES + 1)
        assert np.isnan(curves[CLASSES]).all()  # without objects
        assert (expected[CLASSES] == -1).all()
        assert 0.1 < expected[:CLASSES].mean() < 0.9
        np.testing.assert_allclose(curves[:CLASSES], expected[:CLASSES], atol=1e-9)


def test_confusion_adds_up():
    """A row holds the objects of its class, and all detections but those in crowds are there."""
    rng = np.random.default_rng(1)
    judged = []
    for _ in range(50):
        found, truth = random_image(rng)
        judged.append((found, truth, outcomes(found, truth)))
    table = confusion(judged, CLASSES)
    labels = np.concatenate([truth[truth[:, 5] == 0, 4] for _, truth, _ in judged])
    assert table[:CLASSES].sum(axis=1).tolist() == [(labels == c).sum() for c in range(CLASSES)]
    kinds = [kind for _, _, result in judged for kind in result.found]
    assert table[:, :CLASSES].sum() == len(kinds) - kinds.count("ignored")
    assert np.trace(table) == kinds.count("hit")
    assert 0 < table[:CLASSES, :CLASSES].sum() - np.trace(table) <= kinds.count("wrong class")


def test_rows_of_records():
    """Boxes of both formats, ids of the user's or indices, and images without annotations."""
    assert truth_rows({}) is None
    assert truth_rows({"annotations": []}).shape == (0, 6)
    found = [
        {"bbox": [1, 2, 3, 4], "category_id": "b", "score": 0.3},
        {"bbox": [5, 6, 7, 8], "category_id": "a", "score": 0.4},
    ]
    ids = Metadata(name="with ids", thing_dataset_id_to_contiguous_id={"a": 1, "b": 0})
    assert found_rows(found, ids).tolist() == [[5, 6, 12, 14, 1, 0.4], [1, 2, 4, 6, 0, 0.3]]
    indices = [{**found[0], "category_id": 2}]
    assert found_rows(indices, Metadata(name="none")).tolist() == [[1, 2, 4, 6, 2, 0.3]]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], 0.0),
        ([(0, 0.9, 0)], 1.0),
        ([(0, 0.9, 1)], 0.0),  # another class
        ([(15, 0.9, 0)], 0.0),  # too far
        ([(0, 0.9, 0), (1, 0.8, 0)], 2 / 3),  # a duplicate
    ],
)
def test_f1_of_an_image(dataset, detections, expected):
    """By hand: one object, and detections that are moved to the right by some pixels."""
    name = dataset[0]
    record, metadata = DatasetCatalog.get(name)[0], MetadataCatalog.get(name)
    (truth,) = record["annotations"]
    ids = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
    found = [
        {
            "bbox": [truth["bbox"][0] + shift, *truth["bbox"][1:]],
            "score": score,
            "category_id": ids[(truth["category_id"] + other) % 2],
        }
        for shift, score, other in detections
    ]
    rows, objects = found_rows(found, metadata), truth_rows(record)
    assert count_errors(outcomes(rows, objects))["f1"] == pytest.approx(expected)
    assert count_errors(outcomes(rows[:0], objects[:0]))["f1"] == 1
