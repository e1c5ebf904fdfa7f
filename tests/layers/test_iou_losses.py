"""IoU losses: values, gradients, and boxes that have no usual ones."""

import paper
import pytest
import torch
from freeanchor.layers.iou_losses import IOU_LOSSES, iou_loss
from torchvision.ops import generalized_box_iou_loss


def boxes(*corners, dtype=torch.float64):
    return torch.tensor(corners, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kind", IOU_LOSSES)
def test_values_and_gradients(kind):
    """Those of the transcription, and of torchvision; apart, nested, equal and crossing."""
    predicted = boxes(
        (0, 0, 4, 4), (1, 1, 2, 3), (8, 8, 9, 10), (0.1, 0.2, 2.9, 3.1), (-1, 1, 5, 2)
    )
    targets = boxes(*[(0, 0, 3, 3)] * 5).detach()
    loss = iou_loss(predicted, targets, kind)
    expected = [paper.iou_loss(a, b, kind) for a, b in zip(predicted.tolist(), targets.tolist())]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    # Not of an edge on an edge, where there is none.
    assert torch.autograd.gradcheck(lambda x: iou_loss(x, targets[1:], kind), predicted[1:])
    if kind == "giou":
        torch.testing.assert_close(loss, generalized_box_iou_loss(predicted, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", IOU_LOSSES)
@pytest.mark.parametrize(
    ("predicted", "target"),
    [
        ((2, 2, 2, 2), (0, 0, 4, 4)),
        ((2, 2, 2, 2), (2, 2, 2, 2)),
        ((2, 0, 2, 9), (2, 0, 2, 4)),
        ((9, 9, 9, 9), (0, 0, 4, 4)),
        ((-1e25, -1e25, 1e25, 1e25), (0, 0, 4, 4)),
        ((1e30, 0, 1e30, 1), (0, 0, 4, 4)),
    ],
)
def test_degenerate_boxes(predicted, target, kind, dtype):
    """Without area or with one that overflows: finite, and in range."""
    x = boxes(predicted, dtype=dtype)
    loss = iou_loss(x, boxes(target, dtype=dtype).detach(), kind)
    assert 0 <= loss.item() <= (2 if kind == "giou" else 1)
    loss.sum().backward()
    assert x.grad.isfinite().all()


def test_gradient_of_boxes_apart():
    """IoU has none; GIoU draws the predicted box to the object."""
    for kind in IOU_LOSSES:
        x = boxes((6, 0, 8, 2))
        iou_loss(x, boxes((0, 0, 4, 2)).detach(), kind).backward()
        if kind == "iou":
            assert x.grad.tolist() == [[0, 0, 0, 0]]
        else:
            assert x.grad[0, 0] > 0
