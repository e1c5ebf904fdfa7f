"""The operators: registration, gradients, memory layouts, accuracy.

With `-p reference` the reference itself runs, as where the extension is not built, and with
`-p emulated` the kernels of CUDA on an emulated GPU.
"""

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
    needs_cuda,
    negative_case,
    raw,
    to,
)
from torch.library import opcheck


@pytest.mark.skipif(ON_REFERENCE, reason="the extension is hidden")
@pytest.mark.parametrize("device", ["CPU", pytest.param("CUDA", marks=needs_cuda)])
@pytest.mark.parametrize("op", ["iou_topk", "negative_bag_loss", "take", "put_"])
def test_kernels_are_built(op, device):
    """`make` builds all kernels, so that the other tests do test them."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"freeanchor::{op}", device)


@pytest.mark.skipif(not ON_REFERENCE, reason="the extension is there")
def test_reference_says_so_once(caplog):
    """Without the extension one line says that the reference runs, and how to build."""
    ops._log_reference.cache_clear()
    for _ in range(2):
        ops.take([torch.zeros(1, 2, 3)], torch.zeros(2, dtype=torch.int64))
        ops.iou_topk([torch.rand(3, 2).repeat(1, 2)], torch.zeros(1, 4), 2)
    (record,) = caplog.records
    assert "are not built" in record.getMessage()
    assert "pip install" in record.getMessage()


def test_extension_for_another_pytorch_is_no_failure(monkeypatch):
    """One that cannot be loaded is said to be so; the reference runs."""

    def fail(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    monkeypatch.setattr(
        ops.importlib.util, "find_spec", lambda name: torch.__spec__ if "_C" in name else None
    )
    assert "undefined symbol" in ops._load_kernels()


# Gradients and registration


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    """Schema, fake kernels, autograd and tracing are registered as PyTorch wants them."""
    case = negative_case(device=device)
    library = torch.ops.freeanchor
    opcheck(library.iou_topk, (case.anchors, case.objects.boxes, 7))
    opcheck(library.iou_topk, ([a.view(-1, 4) for a in case.anchors], case.objects.boxes, 7))
    logits = [x.detach() for x in raw(case.leaves)]
    opcheck(library.take, ([x.clone().requires_grad_() for x in logits], case.bag))
    half = torch.tensor(0.5, device=device)
    arguments = case.deltas, case.anchors, *case.objects, [*CODING[0], CODING[1]], 0.3, 2.0
    grads = [torch.empty_like(x) for x in logits]
    opcheck(library.negative_bag_loss, (logits, *arguments, half, grads))
    opcheck(library.negative_bag_loss, (logits, *arguments, half, []))
    opcheck(library.put_, (logits, case.bag, torch.rand(3, 6, device=device)))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device):
    """Analytic and numerical gradients agree, also where bags share anchors."""
    case = negative_case(torch.float64, device=device)
    assert len(ops.box_prob(*case[1:4], 5, CODING, 0.3)[0]) > 5, "no P{a in A+}"
    fast = {"fast_mode": EMULATED}
    assert torch.autograd.gradcheck(lambda *x: case.loss(raw(x))[:2], case.leaves, **fast)
    assert torch.autograd.gradcheck(lambda *x: ops.take(raw(x), case.bag), case.leaves, **fast)


def test_gradients_of_repeated_backward_passes():
    """Each loss alone, both, twice: the gradients are added as autograd promises."""
    case = negative_case(torch.float64)
    loss, logits, _ = case.loss()
    of_loss = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    of_logits = torch.autograd.grad(logits.square().sum(), case.leaves, retain_graph=True)
    both = loss * 3 + logits.square().sum()
    for _ in range(2):
        of_both = torch.autograd.grad(both, case.leaves, retain_graph=True)
        for a, b, c in zip(of_loss, of_logits, of_both):
            torch.testing.assert_close(a * 3 + b, c)


def test_second_derivative_of_take():
    """It is linear, and the derivative of its gradient is right."""
    case = negative_case(torch.float64)

    def square(*x):
        return ops.take(raw(x), case.bag).square()

    assert torch.autograd.gradgradcheck(square, case.leaves, fast_mode=EMULATED)


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("output", [0, 1])
def test_second_derivative_of_the_loss_is_refused(output, incoming):
    """With a sentence, instead of zero: also where the incoming gradient is a constant."""
    case = negative_case(torch.float64)
    result = case.loss()[output].sum()
    result = result.square() if incoming else result
    grads = torch.autograd.grad(result, case.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="negative_bag_loss has no second derivative"):
        sum(x.square().sum() for x in grads).backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_of_zero(dtype):
    """FOCAL_LOSS_ALPHA 1 leaves nothing of the negative loss, but no NaN either."""
    case = negative_case(dtype)
    loss, *_ = case.loss(scale=0.0)
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in case.leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_on_the_device(dtype):
    """A scale that only the device knows, as a sum over processes is, does the same as a number."""
    case = negative_case(dtype)
    results = []
    for scale in (0.25, torch.tensor(0.25)):
        loss, *_ = case.loss(scale=scale)
        results.append((loss, *torch.autograd.grad(loss, case.leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    """Evaluating the loss takes no memory for gradients."""
    case = negative_case()
    expected, *_ = case.loss()
    monkeypatch.setattr(ops, "_with_grads", None)
    with torch.no_grad():
        loss, *_ = case.loss()
    assert not loss.requires_grad
    assert loss == expected


# Memory layouts


@pytest.mark.parametrize("layout", ["channels last", "flattened", "gaps", "expanded"])
def test_memory_layout_does_not_matter(layout):
    """Raw, channels-last, flattened and non-dense predictions give the same, and no copies."""
    case = negative_case(torch.float64)
    leaves = case.leaves
    if layout == "expanded":
        leaves = [x.detach()[:1].expand(2, -1, -1, -1).requires_grad_() for x in leaves]
    expected = case.loss(raw(leaves))
    (expected[0] + expected[1].sum()).backward()
    others = [x.detach().clone() for x in leaves]
    if layout == "channels last":
        others = [x.to(memory_format=torch.channels_last) for x in others]
    elif layout == "gaps":
        others = [F.pad(x, (1, 2))[..., 1:-2] for x in others]
    elif layout == "expanded":
        others = [x[:1].expand(2, -1, -1, -1) for x in others]
    others = [x.requires_grad_() for x in others]
    levels = [x.flatten(1, 3) for x in raw(others)] if layout == "flattened" else raw(others)
    loss, logits, _ = case.loss(levels)
    (loss + logits.sum()).backward()
    torch.testing.assert_close(loss, expected[0], rtol=1e-13, atol=0)
    assert torch.equal(logits, expected[1])
    assert torch.equal(ops.take(levels, case.bag), expected[1])
    for a, b in zip(others, leaves):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_layout_of_the_predictions(memory_format):
    """Channels-last predictions get channels-last gradients, so that nothing is transposed."""
    case = negative_case()
    leaves = [x.to(memory_format=memory_format) for x in case.leaves]
    loss, logits, _ = case.loss(raw(leaves))
    for grad, x in zip(torch.autograd.grad(loss + logits.sum(), leaves), leaves):
        assert grad.stride() == x.stride()


# Accuracy and instruction sets


def no_objects(dtype=torch.float32, device="cpu"):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Objects(torch.zeros(0, 4, dtype=dtype, device=device), none, none)


def background_loss(x, scale=1.0):
    """The negative loss of an image without objects, of logits (N, R, C)."""
    gt = no_objects(torch.promote_types(x.dtype, torch.float32), x.device)
    anchors = gt.boxes.new_zeros(1, 4).expand(x.shape[1], 4)
    deltas = x.detach()[..., :1].expand(*x.shape[:2], 4)
    loss, *_ = ops.negative_bag_loss(
        [x], [deltas], [anchors], gt, gt.classes, CODING, 0.6, scale=scale
    )
    return loss


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
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__),
            *("-k", "accuracy or memory_layout or small_example"),
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_small_example(device):
    """All operators against the reference, on one grid that both have in hand."""
    case = negative_case(device=device, counts=(30, 0))
    boxes = case.objects.boxes
    flat = [torch.cat([level.reshape(-1, 4) for level in case.anchors])]
    expected = matching.iou_topk(flat, boxes, 9)
    assert torch.equal(ops.iou_topk(case.anchors, boxes, 9), expected)
    assert torch.equal(ops.iou_topk(flat, boxes, 9), expected)
    loss, logits, max_iou = case.loss()
    cells, prob, expected_iou = matching.box_prob(*case[1:4], 5, CODING, 0.3)
    assert len(cells) > 5
    torch.testing.assert_close(max_iou, expected_iou)
    x = torch.cat([x.reshape(2, -1, 5) for x in raw(case.leaves)], dim=1).flatten()
    assert torch.equal(logits, x[case.bag])
    q = x.double().sigmoid()
    q[cells] = q[cells] * (1 - prob)
    expected_loss = 0.3 * (q.square() * -torch.log1p(-q)).sum()
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=0)


# CUDA


@needs_cuda
def test_cuda_on_another_stream():
    """Kernels run on the current stream: results are right without waiting for another."""
    case = negative_case(device="cuda")
    expected = case.loss()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        result = case.loss([x.detach() * 2 / 2 for x in raw(case.leaves)])
    stream.synchronize()
    for a, b in zip(result, expected):
        torch.testing.assert_close(a, b)


@needs_cuda
def test_cuda_is_deterministic():
    """The same input gives the same bits."""
    torch.manual_seed(0)
    x = torch.randn(2, 100_000, 20, device="cuda", requires_grad=True)
    bag = torch.randint(0, 1000, (50_000,), device="cuda")
    results = []
    for _ in range(3):
        value = background_loss(x) + ops.take([x], bag).sum()
        results.append((value, *torch.autograd.grad(value, x)))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r))


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
