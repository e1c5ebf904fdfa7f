"""The emulated GPU itself: it notices what is wrong. Runs with `pytest -p emulated` only."""

import sys

import pytest
import torch
from freeanchor.layers import matching, ops
from freeanchor.layers.matching import BoxCoding, Objects

if "emulated" not in sys.modules:
    pytest.skip("needs -p emulated", allow_module_level=True)

from emulated import BARRIERS


@pytest.fixture(autouse=True)
def find_races():
    torch.ops.freeanchor_emulator.find_races(True)
    yield
    torch.ops.freeanchor_emulator.find_races(False)
    torch.ops.freeanchor_emulator.skip(-1)


def run_all_kernels():
    """Every barrier of every kernel, with bags that are joined, shrunk, searched for again."""
    size = torch.linspace(20, 60, 2000)
    right = torch.linspace(-20, 0, 2000)  # nearer and nearer to the second box
    anchors = torch.stack((right - size, -size, right + size, size), dim=1)
    boxes = torch.tensor([[-20.0, -20.0, 20.0, 20.0], [100.0, 100.0, 101.0, 101.0]])
    assert torch.equal(ops.iou_topk([anchors], boxes, 30), matching.iou_topk([anchors], boxes, 30))

    some = anchors[:300]
    objects = Objects(some, torch.zeros(300).long(), torch.zeros(300).long())  # more than a block
    far = torch.tensor([[500.0, 500.0, 510.0, 510.0]])
    some = torch.cat((far, some[:255], far, some[255:]))  # the first thread of a block has none
    logits = torch.randn(1, 302, 1).requires_grad_()
    loss, *_ = ops.negative_bag_loss(
        [logits],
        [torch.zeros(1, 302, 4)],
        [some],
        objects,
        torch.arange(5),
        BoxCoding((1.0, 1.0, 1.0, 1.0), 4.0),
        0.6,
    )
    (grad,) = torch.autograd.grad(loss * 3, logits)
    # Every other anchor is an object, so nothing else is background.
    x = logits.detach()[:, ::256].double().requires_grad_()
    expected = (x.sigmoid().square() * torch.nn.functional.softplus(x)).sum()
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=0)
    expected_grad = torch.zeros_like(grad)
    expected_grad[:, ::256] = 3 * torch.autograd.grad(expected, x)[0]
    torch.testing.assert_close(grad, expected_grad)


def test_no_races():
    """The kernels have none, whatever the order of their threads."""
    run_all_kernels()


@pytest.mark.parametrize("barrier", range(len(BARRIERS)), ids=BARRIERS)
def test_every_barrier_is_needed(barrier):
    """Without any one of them, something is noticed."""
    torch.ops.freeanchor_emulator.skip(barrier)
    with pytest.raises((RuntimeError, AssertionError)):
        run_all_kernels()
