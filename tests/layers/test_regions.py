"""Ignore regions: which anchors they take out of the negative loss, and what they leave alone."""

import paper
import pytest
import torch
from conftest import instances
from detectron2.structures import Boxes
from freeanchor.layers.matching import BoxCoding
from freeanchor.layers.regions import ignored_anchors

CODING = BoxCoding((10.0, 10.0, 5.0, 5.0), 4.0)
ANCHORS = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 100, 100.0]])


def test_by_hand():
    """The predicted box counts, not the anchor; more than half of it must be in one region."""
    deltas = torch.zeros(2, 4, 4)
    deltas[:, 1, 0] = 20  # the second anchor predicts a box 20 to the right, out of all regions
    regions = [torch.tensor([[0.0, 0, 10, 6], [30, 20, 60, 60]]), None]
    (mask,) = ignored_anchors([deltas], [ANCHORS], regions, CODING)
    # 60 % of the first box is inside; of the third exactly half, which is not most of it.
    assert mask.tolist() == [[True, False, False, False], [False] * 4]
    regions = [torch.tensor([[0.0, 0, 10, 5], [0, 5, 10, 10]]), torch.zeros(0, 4)]
    (mask,) = ignored_anchors([deltas], [ANCHORS], regions, CODING)
    assert not mask.any()  # half in each of two


def test_levels_of_any_layout():
    """Grids and flat levels give the same, box by box; what overflows is inside nothing."""
    torch.manual_seed(0)
    deltas = torch.randn(2, 3, 5, 2, 4)
    corner = torch.rand(3, 5, 2, 2) * 40
    anchors = torch.cat([corner, corner + 4 + torch.rand(3, 5, 2, 2) * 30], dim=-1)
    regions = [torch.tensor([[5.0, 5, 60, 40]]), torch.tensor([[0.0, 0, 20, 70], [30, 0, 80, 80]])]
    (grid,) = ignored_anchors([deltas], [anchors], regions, CODING)
    (flat,) = ignored_anchors([deltas.flatten(1, 3)], [anchors.view(-1, 4)], regions, CODING)
    assert grid.any()
    assert not grid.all()
    assert torch.equal(grid.flatten(1), flat)
    deltas[..., :2] = torch.inf
    (none,) = ignored_anchors([deltas], [anchors], regions, CODING)
    assert not none.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_with_regions(model, dtype):
    """Ignored anchors lose their negative loss and its gradient; bags keep what they had."""
    features = [torch.zeros(1, 1, 8 >> i or 1, 8 >> i or 1) for i in range(5)]
    anchors = model.anchor_generator(features)
    logits = [torch.randn(2, len(a), 3, dtype=dtype).requires_grad_() for a in anchors]
    deltas = [torch.randn(2, len(a), 4, dtype=dtype).requires_grad_() for a in anchors]
    targets = [instances([[8, 8, 40, 30]], [1]), instances([], [])]
    regions = [torch.tensor([[0.0, 0, 30, 64]]), None]
    coding = BoxCoding(tuple(model.box2box_transform.weights), model.box2box_transform.scale_clamp)
    masks = ignored_anchors(deltas, [a.tensor.to(dtype) for a in anchors], regions, coding)
    assert 0 < sum(m.sum() for m in masks) < sum(m[0].numel() for m in masks)

    plain = model.losses(anchors, logits, deltas, targets)
    found = model.losses(anchors, logits, deltas, targets, regions)
    assert found["loss_positive"].item() == pytest.approx(plain["loss_positive"].item(), rel=1e-6)
    ignored = torch.cat(masks, dim=1)
    _, expected = paper.losses(
        Boxes.cat(anchors).tensor.tolist(),
        torch.cat(logits, 1).masked_fill(ignored[..., None], -50).tolist(),  # of no probability
        torch.cat(deltas, 1).tolist(),
        [t.gt_boxes.tensor.tolist() for t in targets],
        [t.gt_classes.tolist() for t in targets],
    )
    assert found["loss_negative"].item() == pytest.approx(expected, rel=1e-5)
    assert found["loss_negative"].item() < 0.95 * plain["loss_negative"].item()

    (slope,) = torch.autograd.grad(found["loss_negative"], logits[0], retain_graph=True)
    (positive,) = torch.autograd.grad(found["loss_positive"], logits[0])
    (before,) = torch.autograd.grad(plain["loss_positive"], logits[0], retain_graph=True)
    assert not slope[masks[0]].any()
    assert slope[~masks[0]].all()
    torch.testing.assert_close(positive, before)
