"""The operators: registration, gradients, memory layouts, streams.

With `-p reference` the reference itself runs, as where the extension is not built, and with
`-p emulated` the kernels of CUDA on an emulated GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from freeanchor.layers import matching, ops
from layer_inputs import (
    CODING,
    DEVICES,
    EMULATED,
    ON_REFERENCE,
    background_loss,
    needs_cuda,
    negative_case,
    raw,
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
