"""How exact the operators are, for every dtype, scale, instruction set and size."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from freeanchor.layers import matching, ops
from freeanchor.layers.matching import Objects
from layer_inputs import (
    CODING,
    DEVICES,
    EMULATED,
    ON_REFERENCE,
    background_loss,
    needs_cuda,
    to,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 3.0, 15.0])
def test_accuracy(scale, dtype, device):
    """Against float64, errors are at most twice those of the plain PyTorch formula."""
    x = (torch.randn(1, 2_000 if EMULATED else 40_000, 5, device=device) * scale - 3).to(dtype)

    def plain(x, compute):
        x = x.detach().requires_grad_()
        logits = x.to(compute)
        loss = (logits.sigmoid() ** 2 * F.softplus(logits)).sum()
        return loss.detach(), *torch.autograd.grad(loss, x)

    exact_loss, exact_grad = plain(x.double(), torch.float64)
    plain_loss, plain_grad = plain(x, torch.float32)
    leaf = x.clone().requires_grad_()
    loss = background_loss(leaf)
    loss.backward()
    loss_bound = max(2 * (plain_loss - exact_loss).abs(), exact_loss * 2**-23)
    assert (loss.detach() - exact_loss).abs() <= loss_bound
    # Relative to the gradient, and to the smallest normal number of the dtype.
    unit = exact_grad.abs().clamp(min=torch.finfo(dtype).tiny)
    error = ((leaf.grad - exact_grad).abs() / unit).max()
    assert error <= 2 * ((plain_grad - exact_grad).abs() / unit).max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("num_objects", [1, 7, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accuracy_of_scaled_gradients(dtype, num_objects, factor, device):
    """With the scale of AMP and any number of objects: at most twice the error of rounding.

    A factor that is rounded to float16 is zero from 50 objects on, and infinite at 65536.
    """
    x = torch.linspace(-12, 12, 5000, device=device).to(dtype).view(1, -1, 5)
    scale = 0.5 / (50 * num_objects)
    leaf = x.clone().requires_grad_()
    (background_loss(leaf, scale) * factor).backward()
    exact = x.double().requires_grad_()
    (background_loss(exact, scale) * factor).backward()
    rounded = exact.grad.to(dtype).double()
    # Relative to the gradient, and to the smallest normal number of the dtype.
    unit = exact.grad.abs().clamp(min=torch.finfo(dtype).tiny)
    error, of_rounding = (((g - exact.grad).abs() / unit).max() for g in (leaf.grad, rounded))
    # float32 computes with rounding, too.
    assert error <= (2 * of_rounding if dtype != torch.float32 else 2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sources_of_one_element_are_rounded_once(dtype, device):
    """A hundred small gradients of one anchor add up, where each alone would be rounded away."""
    level = torch.ones(1, 2, 1, dtype=dtype, device=device)
    index = torch.zeros(100, dtype=torch.int64, device=device)
    source = torch.full((100,), 1e-4, device=device)
    torch.ops.freeanchor.put_([level], index, source)
    expected = torch.tensor([[[1.01], [1.0]]]).to(dtype)
    torch.testing.assert_close(level.cpu(), expected)


def match_one(predicted, box, threshold, device):
    """Loss and highest IoU of one object and predictions that are the anchors, against P."""
    gt = Objects(box, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    zeros = [torch.zeros(1, len(predicted), 1)]
    arguments = [torch.zeros(1, len(predicted), 4)], [predicted], gt
    loss, _, max_iou = ops.negative_bag_loss(
        *to(device, (zeros, *arguments, gt.classes[:0])), CODING, threshold
    )
    cells, prob, expected_iou = matching.box_prob(*arguments, 1, CODING, threshold)
    q = torch.full((len(predicted),), 0.5)
    q[cells] *= 1 - prob
    torch.testing.assert_close(loss.cpu(), (q.square() * -torch.log1p(-q)).sum())
    torch.testing.assert_close(max_iou.cpu(), expected_iou, rtol=1e-6, atol=0)
    return len(cells)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_boxes_as_large_as_float32(threshold, device):
    """Areas that overflow give no IoU, and spoil no other; nothing crashes."""
    boxes = torch.tensor(
        [
            [-1.5e38, -1.5e38, 1.5e38, 1.5e38],
            [0.0, 0.0, 1e19, 1e19],
            [0.0, 0.0, 9.0, 9.0],
            [3e38, 3e38, 3.2e38, 3.2e38],
            [-2e38, 0.0, -1.9e38, 5.0],
        ]
    )
    for box in boxes:
        match_one(boxes, box[None], threshold, device)
    assert match_one(boxes, boxes[2:3], 0.6, device) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_tiny_object_far_from_the_centre_of_a_huge_prediction(device):
    """At threshold 0 any overlap counts."""
    predicted = torch.tensor([[0.0, 0.0, 1e6, 1e6], [5.0, 5.0, 6.0, 6.0]])
    assert match_one(predicted, torch.tensor([[2.0, 2.0, 2.1, 2.1]]), 0.0, device) == 1


@pytest.mark.skipif(ON_REFERENCE or EMULATED, reason="the kernels of the CPU have them")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability):
    """Whatever instruction set PyTorch chooses, results agree with the reference."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("test_accuracy.py", "test_ops.py", "-k"),
            "(accuracy or memory_layout or small_example) and not instruction_sets",
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    assert run.returncode == 0, run.stdout


@needs_cuda
def test_cuda_beyond_two_to_the_31():
    """Indices do not overflow 32 bits."""
    size = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.full((1, size // 16, 16), -20.0, dtype=torch.float16, device="cuda")
    x[0, -1, -1] = 3.0
    bag = torch.tensor([size - 1, 0], device="cuda")
    loss = background_loss(x.requires_grad_())
    loss.backward()
    assert ops.take([x], bag).tolist() == [3.0, -20.0]
    expected = torch.tensor(3.0).sigmoid() ** 2 * F.softplus(torch.tensor(3.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert x.grad[0, -1, -1] > 1
    assert x.grad[0, 0, 0] < 1e-6
