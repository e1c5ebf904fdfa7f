"""LTM's functions: check values, edge cases and orders, by themselves."""

import pytest
import torch
from freeanchor.layers import ltm
from freeanchor.layers.losses import positive_bag_loss
from paper_ltm import points_bag


def grids(size, strides=(8, 16, 32)):
    """Points as levels of squares, and as `points_bag` takes them."""
    levels, plain = [], []
    for stride in strides:
        y, x = ((torch.arange(-(-n // stride)) + 0.5) * stride for n in size)
        x, y = torch.meshgrid(x, y, indexing="xy")
        centre, half = torch.stack([x, y], -1), stride / 2
        levels.append(torch.cat([centre - half, centre + half], -1)[:, :, None].double())
        plain.append((stride, centre.reshape(-1, 2).tolist()))
    return levels, plain


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("size", [(96, 160), (40, 300), (8, 8)])
def test_nearest_points(size, k):
    """Those of an exhaustive search, ties too: objects of any shape, between and on the points."""
    levels, plain = grids(size)
    corner = torch.rand(30, 2) * torch.tensor([size[1], size[0]])
    boxes = torch.cat([corner, corner + 2 ** (torch.rand(30, 2) * 8)], dim=1)
    boxes[::2] = (boxes[::2] / 4).round() * 4  # symmetric ones have many ties
    boxes[0] = torch.tensor([0.0, 20.0, 160.0, 20.0])  # of no height
    found = ltm.nearest_points(levels, boxes.double(), k)
    assert found.tolist() == [points_bag(plain, box, k) for box in boxes.double().tolist()]


@pytest.mark.parametrize(
    ("side", "counts"),
    [((16, 16), [39, 1, 0, 0, 0]), ((256, 256), [9, 9, 9, 9, 4]), ((400, 30), [15, 15, 10, 0, 0])],
)
def test_points_of_each_level(side, counts):
    """About as many of each level until one runs out, somewhere on the grid exactly these."""
    levels, _ = grids((1024, 1024), (8, 16, 32, 64, 128))
    ends = torch.tensor([level.numel() // 4 for level in levels]).cumsum(0)
    centre = torch.cartesian_prod(*[torch.arange(448.0, 576.0, 4)] * 2)
    half = torch.tensor(side) / 2
    bags = ltm.nearest_points(levels, torch.cat([centre - half, centre + half], 1).double(), 40)
    of_level = torch.bucketize(bags, ends, right=True)[..., None] == torch.arange(5)
    assert counts in of_level.sum(1).tolist()


def test_no_points_and_no_objects():
    """Empty, not an error."""
    levels, _ = grids((64, 64))
    assert ltm.nearest_points(levels, torch.zeros(0, 4).double(), 40).shape == (0, 40)
    nothing = [level[:0] for level in levels]
    assert ltm.nearest_points(nothing, torch.rand(2, 4).double(), 40).shape == (2, 0)


def logit(p):
    return torch.tensor(p, dtype=torch.float64).logit()


def test_check_values():
    """All r = .01; all q = .01; and P spread evenly for sigmoid(x) = .01, .5 and .9."""
    q = torch.full((1, 40), 0.01, dtype=torch.float64)
    none = torch.zeros_like(q)
    assert ltm.precision_bag_loss(q.logit(), none).item() == pytest.approx(0.01005, abs=1e-5)
    assert positive_bag_loss(q.log()).item() == pytest.approx(4.61, abs=0.005)
    spread = torch.linspace(0, 1, 40, dtype=torch.float64)[None]
    for p, value in ((0.01, 0.0068), (0.5, 0.47), (0.9, 1.64)):
        loss = ltm.precision_bag_loss(logit(p).expand(1, 40), spread)
        assert loss.item() == pytest.approx(value, rel=0.01)


def test_precision_is_the_contraharmonic_mean():
    """Of the odds of q, and its gradient is right and does not depend on the order of a bag."""
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    prob = torch.rand(3, 7, dtype=torch.float64)
    prob[0, :3] = torch.tensor([0.0, 1.0, 0.0])
    q = x.sigmoid() * (1 - prob)
    odds = q / (1 - q)
    loss = ltm.precision_bag_loss(x, prob)
    torch.testing.assert_close(loss, (1 + odds.square().sum(1) / odds.sum(1)).log())
    assert torch.autograd.gradcheck(lambda x: ltm.precision_bag_loss(x, prob), x)
    order = torch.randperm(7)
    torch.testing.assert_close(ltm.precision_bag_loss(x[:, order], prob[:, order]), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_extremes(dtype):
    """Nothing overflows, and where all is matched there is neither loss nor gradient."""
    x = torch.tensor([[90.0, 90.0], [-90.0, -90.0], [500.0, -500.0], [3.0, 2.0]], dtype=dtype)
    prob = torch.tensor([[1.0, 0.0], [1.0, 1e-7], [0.5, 0.0], [1.0, 1.0]], dtype=dtype)
    x.requires_grad_()
    loss = ltm.precision_bag_loss(x, prob)
    loss.sum().backward()
    expected = torch.tensor([90.0, 0.0, 0.5, 0.0], dtype=dtype)
    expected[2] = torch.tensor(2.0).log()
    torch.testing.assert_close(loss, expected)
    assert x.grad.isfinite().all()
    assert x.grad[3].tolist() == [0, 0]


def test_matched_in_bag():
    """Relative to the best of the bag; the larger of two bags with a pair; 0 without overlap."""
    iou = torch.tensor([[0.2, 0.4, 0.0], [0.1, 0.3, 0.6], [0.0, 0.0, 0.0]])
    pairs = torch.tensor([[5, 9, 1], [9, 5, 2], [1, 7, 8]])
    prob, is_first = ltm.matched_in_bag(iou, pairs)
    expected = torch.tensor([[0.5, 1.0, 0.0], [1.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(prob, expected)
    assert sorted(pairs[is_first].tolist()) == [1, 2, 5, 7, 8, 9]
    prob, is_first = ltm.matched_in_bag(iou[:0], pairs[:0])
    assert prob.shape == is_first.shape == (0, 3)
