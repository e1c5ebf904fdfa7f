"""Recall of proposals."""

import numpy as np
import pytest
import torch
from conftest import quick_cfg
from detectron2.data import DatasetCatalog
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from freeanchor.errors import FreeAnchorError
from freeanchor.evaluation import ProposalRecallEvaluator
from pycocotools.coco import COCO


@pytest.fixture(scope="module")
def model():
    """Its weights do not matter: the tests say what it proposes."""
    return build_model(quick_cfg("quick/faster_rcnn_free_anchor_R_18_FPN.yaml")).eval()


def evaluate(model, name, proposals, monkeypatch, scale=1.0):
    """Evaluate (N, 4) corners of each image, the best first, in the size of the network's input."""
    evaluator = ProposalRecallEvaluator(name, model)
    evaluator.reset()
    results = iter(
        Instances(
            (int(300 * scale), int(400 * scale)),
            proposal_boxes=Boxes(torch.as_tensor(x, dtype=torch.float32).reshape(-1, 4) * scale),
            objectness_logits=-torch.arange(len(x), dtype=torch.float32),
        )
        for x in proposals
    )
    monkeypatch.setattr(model.proposal_generator, "forward", lambda *_: ([next(results)], {}))
    for image in range(1, len(proposals) + 1):
        model.proposal_generator(None, None)
        evaluator.process([{"image_id": image, "width": 400, "height": 300}], [None])
    return evaluator.evaluate()["proposal_recall"]


def test_recall_is_detectron2s(model, register, monkeypatch, tmp_path):
    """The same number from random proposals, also where they are of a resized image."""
    rng = np.random.default_rng(0)
    objects, proposals = [], []
    for image in range(1, 9):
        corner, size = rng.uniform(0, 200, (6, 2)), rng.uniform(10, 90, (6, 2))
        boxes = np.concatenate([corner, size], axis=1)
        count = image % 7  # none, too
        objects += [(image, 0, x, i == 4) for i, x in enumerate(boxes[:count])]
        moved = boxes + rng.normal(0, 4, (30, 6, 4))
        moved = moved.reshape(-1, 4)[: 20 * image]
        moved[:, 2:] += moved[:, :2]
        proposals.append(moved[rng.permutation(len(moved))])
    name = register("random", objects, num_images=8)
    found = evaluate(model, name, proposals, monkeypatch, scale=0.5)
    predictions = [
        {
            "image_id": i,
            "proposals": Instances(
                (300, 400),
                proposal_boxes=Boxes(torch.tensor(x)),
                objectness_logits=-torch.arange(len(x)),
            ),
        }
        for i, x in enumerate(proposals, start=1)
    ]
    coco = COCO(str(tmp_path / "random.json"))
    for limit in (100, 1000):
        expected = 100 * float(_evaluate_box_proposals(predictions, coco, limit=limit)["ar"])
        assert found[f"AR@{limit}"] == pytest.approx(expected, abs=0.02)
    assert 10 < found["AR@100"] < 95


def test_parts_and_limits(model, register, monkeypatch):
    """A slender object is found exactly, a square one not, one only by the 101st proposal."""
    objects = [(1, 0, (0, 0, 100, 10), False), (1, 1, (0, 50, 40, 40), False)]
    objects.append((2, 0, (0, 0, 50, 50), False))
    far = [300, 200, 310, 210]
    proposals = [[[0, 0, 100, 10], far], [far] * 100 + [[0, 0, 50, 50]]]
    name = register("parts", objects)
    found = evaluate(model, name, proposals, monkeypatch)
    assert found["AR@100"] == pytest.approx(100 / 3)
    assert found["AR@1000"] == pytest.approx(200 / 3)
    assert found["AR@100 aspect_ratio>5"] == 100
    assert found["AR@100 aspect_ratio<=2"] == 0
    assert found["AR@1000 aspect_ratio<=2"] == 50
    assert found["AR@1000 crowding0"] == pytest.approx(200 / 3)
    assert np.isnan(found["AR@100 crowding>0.3"])
    # One box cannot find two objects.
    twins = register("twins", [(1, 0, (0, 0, 50, 50), False), (1, 1, (0, 0, 50, 50), False)])
    found = evaluate(model, twins, [[[0, 0, 50, 50]], []], monkeypatch)
    assert found["AR@100"] == 50
    assert found["AR@100 crowding>0.3"] == 50
    assert len(DatasetCatalog.get(twins)) == 2


def test_one_stage_has_no_proposals(register):
    """It is refused by a sentence."""
    name = register("a", [(1, 0, (0, 0, 50, 50), False)])
    with pytest.raises(FreeAnchorError, match="FreeAnchor has no proposals"):
        ProposalRecallEvaluator(name, build_model(quick_cfg()))
