"""Bags, matched probabilities and P{a in A+}."""

import math

import paper
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from freeanchor.layers import matching, ops
from freeanchor.layers.matching import BoxCoding, Objects
from hypothesis import given, settings
from hypothesis import strategies as st

CODING = BoxCoding((10.0, 10.0, 5.0, 5.0), math.log(1000 / 16))


def random_boxes(count, size=64.0):
    corner = torch.rand(count, 2) * size
    return torch.cat((corner, corner + 1 + torch.rand(count, 2) * size / 2), dim=1)


def box_prob(predicted, gt_boxes, gt_classes, num_classes, threshold, module=ops):
    """`box_prob` of one image whose predicted boxes are known: anchors that are not moved."""
    return module.box_prob(
        [torch.zeros_like(predicted)[None]],
        [predicted],
        Objects(gt_boxes, gt_classes, torch.zeros_like(gt_classes)),
        num_classes,
        CODING,
        threshold,
    )


def test_box_iou_is_detectron2s():
    """IoU equals Detectron2's bit for bit, so thresholds mean the same."""
    a, b = random_boxes(40), random_boxes(50)
    assert torch.equal(matching.box_iou(a[:, None], b), pairwise_iou(Boxes(a), Boxes(b)))


def test_box_iou_of_boxes_without_area_is_zero():
    """Neither a point nor an inverted pair of boxes gives NaN."""
    point = torch.tensor([3.0, 3.0, 3.0, 3.0])
    assert matching.box_iou(point, point) == 0
    assert matching.box_iou(point, torch.tensor([0.0, 0.0, 9.0, 9.0])) == 0


def test_encode_and_decode_are_detectron2s():
    """The transforms agree with `Box2BoxTransform` and undo each other."""
    anchors, boxes = random_boxes(30), random_boxes(30)
    transform = Box2BoxTransform(CODING.weights)
    deltas = matching.encode_boxes(boxes, anchors, CODING.weights)
    torch.testing.assert_close(deltas, transform.get_deltas(anchors, boxes))
    wild = torch.randn(30, 4) * 30  # beyond the clamp too
    torch.testing.assert_close(
        matching.decode_boxes(wild, anchors, CODING), transform.apply_deltas(wild, anchors)
    )
    torch.testing.assert_close(
        matching.decode_boxes(deltas, anchors, CODING), boxes, atol=1e-4, rtol=1e-5
    )


def test_encode_of_a_box_without_area_is_finite():
    """Trap 13: log(0) must not reach the loss."""
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert matching.encode_boxes(point, random_boxes(1), CODING.weights).isfinite().all()


def test_bag_is_the_papers():
    """The bag equals a plain sort by (IoU, distance of the centres, index)."""
    anchors, boxes = random_boxes(200), random_boxes(20)
    bags = ops.iou_topk([anchors.double()], boxes.double(), 50)
    expected = [paper.bag(anchors.tolist(), box) for box in boxes.tolist()]
    assert bags.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bag_with_ties(data):
    """Trap 12: on integer boxes most IoUs are tied; the order is still the documented one."""
    coordinate = st.integers(0, 6)

    def boxes(count):
        corners = data.draw(st.lists(st.tuples(*[coordinate] * 4), min_size=count, max_size=count))
        return [(x, y, x + 1 + w, y + 1 + h) for x, y, w, h in corners]

    anchors = boxes(data.draw(st.integers(1, 40)))
    objects = boxes(data.draw(st.integers(1, 4)))
    k = data.draw(st.integers(1, 50))
    bags = ops.iou_topk(
        [torch.tensor(anchors, dtype=torch.float64)], torch.tensor(objects, dtype=torch.float64), k
    )
    assert bags.tolist() == [paper.bag(anchors, box, k) for box in objects]


def test_tied_bag_lies_around_a_small_object():
    """Trap 12: of the many anchors that contain a small object, the nearest are taken.

    torch.topk alone takes an arbitrary part of them, here one far from the object.
    """
    generator = DefaultAnchorGenerator(sizes=[[32]], aspect_ratios=[[1.0]], strides=[4], offset=0.0)
    anchors = generator([torch.zeros(1, 1, 64, 64)])[0].tensor
    distance = ((anchors[:, :2] + anchors[:, 2:]) / 2 - 131).norm(dim=1)
    box = torch.tensor([[130.0, 130.0, 132.0, 132.0]])
    iou = matching.box_iou(box, anchors)
    assert (iou == iou.max()).sum() > 5, "the case has no tie at the fifth place"
    assert distance[iou.topk(5).indices].max() > distance.sort().values[4]
    (bag,) = ops.iou_topk([anchors], box, 5)
    torch.testing.assert_close(distance[bag], distance.sort().values[:5])


@pytest.mark.parametrize("num_objects", [0, 1, 7])
@pytest.mark.parametrize("num_anchors", [0, 1, 20])
def test_fewer_anchors_than_the_bag(num_objects, num_anchors):
    """Trap 5: a bag uses what there is."""
    bags = ops.iou_topk([random_boxes(num_anchors)], random_boxes(num_objects), 50)
    assert bags.shape == (num_objects, num_anchors)
    assert bags.sort(dim=1).values.tolist() == [list(range(num_anchors))] * num_objects


def test_blocks_do_not_change_the_result(monkeypatch):
    """Many objects are searched in blocks; where the blocks end must not matter."""
    anchors, boxes, classes = random_boxes(60), random_boxes(300), torch.arange(300) % 5
    whole = (
        matching.iou_topk([anchors], boxes, 9),
        *box_prob(anchors, boxes, classes, 5, 0.3, matching),
    )
    monkeypatch.setattr(matching, "_BLOCK_ELEMENTS", 420)  # 7 objects
    parts = (
        matching.iou_topk([anchors], boxes, 9),
        *box_prob(anchors, boxes, classes, 5, 0.3, matching),
    )
    assert len(whole[1]) > 50
    assert all(map(torch.equal, whole, parts))


def test_memory_does_not_grow_with_the_objects(monkeypatch):
    """No block of objects against anchors has more than two million elements, here of ten."""
    sizes = []

    def recording_iou(boxes1, boxes2):
        result = box_iou(boxes1, boxes2)
        sizes.append(result.numel())
        return result

    box_iou = matching.box_iou
    monkeypatch.setattr(matching, "box_iou", recording_iou)
    anchors, boxes = random_boxes(5000), random_boxes(2000)
    matching.iou_topk([anchors], boxes, 3)
    box_prob(anchors, boxes, torch.zeros(2000, dtype=torch.int64), 1, 0.9, matching)
    assert sum(sizes) == 2 * 5000 * 2000
    assert max(sizes) <= 1 << 21


def test_matched_log_probability_is_the_papers():
    """log(P^cls P^loc) in float64 equals the formulas."""
    logits, deltas, targets = torch.randn(3, 4), torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    result = matching.matched_log_probability(
        logits.double(), deltas.double(), targets.double(), 0.75, 0.11
    )
    for i in range(3):
        for j in range(4):
            pairs = zip(deltas[i, j].tolist(), targets[i, j].tolist())
            distance = sum(paper.smooth_l1(d - t) for d, t in pairs)
            expected = math.log(paper.sigmoid(logits[i, j].item())) - 0.75 * distance
            assert result[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_matched_log_probability_keeps_its_gradient_where_probability_underflows():
    """An anchor far from a slender object has P = 0 in float32, but not a zero gradient."""
    logits = torch.zeros(1, 1, requires_grad=True)
    deltas = torch.full((1, 1, 4), 100.0, requires_grad=True)
    log_prob = matching.matched_log_probability(logits, deltas, torch.zeros(1, 1, 4), 0.75, 0.11)
    assert log_prob.exp() == 0
    log_prob.sum().backward()
    torch.testing.assert_close(deltas.grad, torch.full((1, 1, 4), -0.75))


# P{a in A+}


def dense(result, num_anchors, num_classes):
    """The sparse result of `box_prob` as a (R, C) matrix."""
    cells, prob, _ = result
    matrix = torch.zeros(num_anchors * num_classes, dtype=prob.dtype)
    matrix[cells] = prob
    return matrix.view(num_anchors, num_classes)


def test_box_prob_is_the_papers():
    """Every P{a in A+} equals the ramp, written with loops."""
    boxes = random_boxes(12).double()
    predicted = boxes[torch.arange(300) % 12] + torch.randn(300, 4)
    predicted[:, 2:] = torch.maximum(predicted[:, :2], predicted[:, 2:])
    classes = torch.arange(12) % 3
    result = box_prob(predicted, boxes, classes, 3, 0.6)
    expected = [[0.0] * 3 for _ in range(300)]
    for box, cls in zip(boxes.tolist(), classes.tolist()):
        overlaps = [paper.iou(p, box) for p in predicted.tolist()]
        for j, overlap in enumerate(overlaps):
            ramp = (overlap - 0.6) / max(max(overlaps) - 0.6, 1e-12)
            expected[j][cls] = max(expected[j][cls], min(1.0, max(0.0, ramp)))
    assert len(result[0]) > 100
    torch.testing.assert_close(
        dense(result, 300, 3), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert (result[0].diff() > 0).all(), "cells are not in increasing order"


def test_box_prob_with_a_maximum_at_the_threshold():
    """Trap 1: a maximum IoU of exactly float32(0.6) gives no positive, and no NaN."""
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    predicted = torch.tensor([[0.0, 0.0, 10.0, 6.0], [30.0, 30.0, 40.0, 40.0]])
    iou = matching.box_iou(box[:, None], predicted)
    naive_top = iou.max(dim=1, keepdim=True).values.clamp(min=0.6 + 1e-12)
    naive = ((iou - 0.6) / (naive_top - 0.6)).clamp(0, 1)
    assert naive.isnan().any(), "the case does not break the naive formula"
    cells, prob, max_iou = box_prob(predicted, box, torch.tensor([0]), 1, 0.6)
    assert len(cells) == len(prob) == 0
    assert max_iou == 0, "no box is above the threshold"


def test_box_prob_of_same_class_objects_that_share_an_anchor():
    """Trap 4: the maximum over the objects, whatever their order."""
    predicted = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]])
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 7.5]])
    classes = torch.tensor([1, 1])
    # Anchor 0 has P = 1 for the first object, and less than 1 for the second.
    for order in ([0, 1], [1, 0]):
        result = box_prob(predicted, objects[order], classes, 2, 0.6)
        matrix = dense(result, 2, 2)
        assert matrix[0, 1] == 1
        assert matrix[:, 0].eq(0).all()


def test_box_prob_keeps_classes_apart():
    """An anchor on two objects of different classes is positive for both."""
    predicted = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    objects = predicted.repeat(2, 1)
    matrix = dense(box_prob(predicted, objects, torch.tensor([0, 2]), 3, 0.6), 1, 3)
    assert matrix.tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(("num_anchors", "num_objects"), [(0, 0), (0, 3), (5, 0)])
def test_box_prob_of_nothing(num_anchors, num_objects):
    """Trap 5: no anchor or no object gives no cell."""
    cells, prob, max_iou = box_prob(
        random_boxes(num_anchors),
        random_boxes(num_objects),
        torch.zeros(num_objects, dtype=torch.int64),
        3,
        0.6,
    )
    assert len(cells) == len(prob) == 0
    assert max_iou.tolist() == [0] * num_objects


def test_box_prob_survives_broken_predictions():
    """A prediction that overflowed is no positive, and spoils no other."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(5, 1)
    deltas = torch.zeros(1, 5, 4)
    for i, value in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        deltas[0, i] = value
    zero = torch.tensor([0])
    target = Objects(anchors[:1], zero, zero)
    result = ops.box_prob([deltas], [anchors], target, 1, CODING, 0.6)
    assert dense(result, 5, 1).flatten().tolist() == [0, 0, 0, 0, 1]
