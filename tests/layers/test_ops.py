"""The operators: kernels against their readable reference, gradients, layouts and bad input.

With `-p reference` the reference itself runs, as where the extension is not built.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from freeanchor.layers import losses, matching, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CLAMP = math.log(1000 / 16)
ON_REFERENCE = sys.modules.get("freeanchor.layers._C", ...) is None
DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))][:3]
# The same examples in every run: a rounding next to a threshold must not fail one run of many.
FUZZ = settings(max_examples=2000, deadline=None, derandomize=True)

fuzzes_the_kernels = pytest.mark.skipif(ON_REFERENCE, reason="there is nothing to compare")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.skipif(ON_REFERENCE, reason="the extension is hidden")
@pytest.mark.parametrize("device", ["CPU", pytest.param("CUDA", marks=needs_cuda)])
@pytest.mark.parametrize("op", ["iou_topk", "box_prob", "negative_bag_loss", "take", "put_"])
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


# Inputs


def raw(levels):
    """Levels (N, A * D, H, W) as a head computes them, as views (N, H, W, A, D)."""
    return [x.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2) for x in levels]


def random_levels(depth, dtype=torch.float32, images=2, requires_grad=False, device="cpu"):
    """Two levels of raw head outputs, of a grid that is not square."""
    shapes = [(images, 3 * depth, 5, 4), (images, 3 * depth, 2, 3)]
    return [
        (torch.randn(shape, device=device) * 3).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


def grid_anchors(dtype=torch.float32, device="cpu"):
    """The anchors of the same grid."""
    generator = DefaultAnchorGenerator(
        sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16, 32], offset=0.5
    )
    features = [torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 2, 3)]
    return [
        boxes.tensor.view(*x.shape[-2:], 3, 4).to(device, dtype)
        for boxes, x in zip(generator(features), features)
    ]


def objects(count, dtype=torch.float32, device="cpu"):
    corner = torch.rand(count, 2) * 50
    boxes = torch.cat((corner, corner + 8 + torch.rand(count, 2) * 50), dim=1)
    return boxes.to(device, dtype), (torch.arange(count) % 5).to(device)


def negative_case(dtype=torch.float32, device="cpu"):
    """Arguments of the negative loss: some cells with P{a in A+}, and a bag with repetitions."""
    leaves = random_levels(5, dtype, requires_grad=True, device=device)
    size = sum(x.numel() for x in leaves)
    cells = torch.randperm(size, device=device)[:40].sort().values
    prob = torch.rand(40, device=device, dtype=torch.promote_types(dtype, torch.float32))
    bag = torch.randint(0, size, (3, 6), device=device)
    bag[1] = bag[0]
    return leaves, cells, prob, bag


# Gradients and registration


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    """Schema, fake kernels, autograd and tracing are registered as PyTorch wants them."""
    leaves, cells, prob, bag = negative_case(device=device)
    boxes, classes = objects(4, device=device)
    anchors, index = grid_anchors(device=device), cells.view(4, 10)
    deltas = raw(random_levels(4, device=device))
    logits = [x.detach() for x in raw(leaves)]
    library = torch.ops.freeanchor
    opcheck(library.iou_topk, (anchors, boxes, 7))
    opcheck(library.iou_topk, ([a.view(-1, 4) for a in anchors], boxes, 7))
    opcheck(library.box_prob, (deltas, anchors, boxes, classes, [3, 1], 5, WEIGHTS, CLAMP, 0.1))
    opcheck(library.take, ([x.clone().requires_grad_() for x in logits], index))
    grads = [torch.empty_like(x) for x in logits]
    opcheck(library.negative_bag_loss, (logits, cells, prob, bag, 2.0, 0.5, 0.5, grads))
    opcheck(library.negative_bag_loss, (logits, cells, prob, bag, 2.0, 0.5, 0.0, []))
    factor = torch.tensor(0.5, device=device)
    opcheck(library.put_, (logits, cells, prob, factor))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device):
    """Analytic and numerical gradients agree, also where bags share anchors."""
    leaves, cells, prob, bag = negative_case(torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda *x: ops.negative_bag_loss(raw(x), cells, prob, bag, 2.0, 0.3), leaves
    )
    assert torch.autograd.gradcheck(lambda *x: ops.take(raw(x), bag), leaves)


def test_gradients_of_repeated_backward_passes():
    """Each loss alone, both, twice: the gradients are added as autograd promises."""
    leaves, cells, prob, bag = negative_case(torch.float64)
    loss, logits = ops.negative_bag_loss(raw(leaves), cells, prob, bag, 2.0, 0.3)
    of_loss = torch.autograd.grad(loss, leaves, retain_graph=True)
    of_logits = torch.autograd.grad(logits.square().sum(), leaves, retain_graph=True)
    both = loss * 3 + logits.square().sum()
    for _ in range(2):
        of_both = torch.autograd.grad(both, leaves, retain_graph=True)
        for a, b, c in zip(of_loss, of_logits, of_both):
            torch.testing.assert_close(a * 3 + b, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_of_zero(dtype):
    """FOCAL_LOSS_ALPHA 1 leaves nothing of the negative loss, but no NaN either."""
    leaves, cells, prob, bag = negative_case(dtype)
    loss, _ = ops.negative_bag_loss(raw(leaves), cells, prob, bag, 2.0, 0.0)
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in leaves)


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    """Evaluating the loss takes no memory for gradients."""
    leaves, cells, prob, bag = negative_case()
    expected, _ = ops.negative_bag_loss(raw(leaves), cells, prob, bag)
    monkeypatch.setattr(ops, "_with_grads", None)
    with torch.no_grad():
        loss, _ = ops.negative_bag_loss(raw(leaves), cells, prob, bag)
    assert not loss.requires_grad
    assert loss == expected


# Memory layouts


@pytest.mark.parametrize("layout", ["channels last", "flattened", "gaps", "expanded"])
def test_memory_layout_does_not_matter(layout):
    """Raw, channels-last, flattened and non-dense predictions give the same, and no copies."""
    leaves, cells, prob, bag = negative_case(torch.float64)
    if layout == "expanded":
        leaves = [x.detach()[:1].expand(2, -1, -1, -1).requires_grad_() for x in leaves]
    expected = ops.negative_bag_loss(raw(leaves), cells, prob, bag)
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
    loss, logits = ops.negative_bag_loss(levels, cells, prob, bag)
    (loss + logits.sum()).backward()
    torch.testing.assert_close(loss, expected[0], rtol=1e-13, atol=0)
    assert torch.equal(logits, expected[1])
    assert torch.equal(ops.take(levels, bag), expected[1])
    for a, b in zip(others, leaves):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_layout_of_the_predictions(memory_format):
    """Channels-last predictions get channels-last gradients, so that nothing is transposed."""
    leaves, cells, prob, bag = negative_case()
    leaves = [x.to(memory_format=memory_format) for x in leaves]
    loss, logits = ops.negative_bag_loss(raw(leaves), cells, prob, bag)
    for grad, x in zip(torch.autograd.grad(loss + logits.sum(), leaves), leaves):
        assert grad.stride() == x.stride()


# Kernels against the reference


def grids(data):
    """Anchors of a `DefaultAnchorGenerator` with any parameters, as grids and flattened."""
    num_levels = data.draw(st.integers(1, 3))
    sizes = st.lists(st.sampled_from([8, 20, 32, 45.25, 64, 100]), min_size=1, max_size=3)
    ratios = st.lists(st.sampled_from([0.2, 0.5, 1.0, 2.0, 3.7]), min_size=1, max_size=3)
    shared = data.draw(st.booleans())
    strides = [data.draw(st.sampled_from([4, 7, 8, 16, 32])) for _ in range(num_levels)]
    generator = DefaultAnchorGenerator(
        sizes=[data.draw(sizes) for _ in range(1 if shared else num_levels)],
        aspect_ratios=[data.draw(ratios) for _ in range(1 if shared else num_levels)],
        strides=strides,
        offset=data.draw(st.sampled_from([0.0, 0.5, 0.3])),
    )
    height, width = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
    features = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
    levels = []
    for boxes, feature in zip(generator(features), features):
        levels.append(boxes.tensor.view(*feature.shape[-2:], -1, 4))
    return levels


def boxes_among(data, anchors):
    """Objects on, between, in, around and outside of the anchors, with and without area."""
    kind = st.sampled_from(["anchor", "near", "tiny", "large", "slender", "outside", "empty"])
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    result = []
    for what in data.draw(st.lists(kind, min_size=1, max_size=6)):
        box = anchors[torch.randint(len(anchors), (), generator=random)].clone()
        noise = torch.rand(4, generator=random)
        if what == "near":
            box += noise * torch.tensor([-9.0, -9.0, 9.0, 9.0])
        elif what == "tiny":
            box = box[:2].round().repeat(2) + torch.cat((noise[:2], noise[:2] + noise[2:] * 3))
        elif what == "large":
            box = torch.tensor([-20.0, -20.0, 90.0, 90.0]) * (1 + noise)
        elif what == "slender":
            box = torch.stack((noise[0], box[1], 150 + noise[1], box[1] + 3))
        elif what == "outside":
            box += 1000 * noise[0]
        elif what == "empty":
            box[2:] = box[:2]
        result.append(box)
    return torch.stack(result)


@fuzzes_the_kernels
@FUZZ
@given(st.data())
def test_bags_of_any_grid(data):
    """The search on grids, the exhaustive kernel and the reference give the same bags."""
    levels = grids(data)
    flat = torch.cat([level.view(-1, 4) for level in levels])
    boxes = boxes_among(data, flat)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    levels, flat, boxes = [x.to(dtype) for x in levels], flat.to(dtype), boxes.to(dtype)
    k = data.draw(st.integers(1, 70))
    expected = matching.iou_topk([flat], boxes, k)
    assert torch.equal(ops.iou_topk(levels, boxes, k), expected)
    assert torch.equal(ops.iou_topk([flat], boxes, k), expected)


@fuzzes_the_kernels
@FUZZ
@given(st.data())
def test_bags_of_any_anchors(data):
    """Anchors that are no grid, with many ties, in levels of which some may be empty."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    levels = []
    for size in data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=3)):
        corner = torch.randint(0, 12, (size, 2), generator=random).float()
        levels.append(torch.cat((corner, corner + torch.randint(0, 9, (size, 2))), dim=1))
    count = data.draw(st.integers(0, 12))
    corner = torch.randint(-3, 15, (count, 2), generator=random).float()
    boxes = torch.cat((corner, corner + torch.randint(0, 9, (count, 2))), dim=1)
    k = data.draw(st.integers(1, 200))
    assert torch.equal(ops.iou_topk(levels, boxes, k), matching.iou_topk(levels, boxes, k))


@fuzzes_the_kernels
@FUZZ
@given(st.data())
def test_box_prob_of_any_predictions(data):
    """The same cells, probabilities and highest IoUs, up to the rounding of exp."""
    anchors = grids(data)
    flat = torch.cat([level.view(-1, 4) for level in anchors])
    counts, boxes = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        boxes.append(boxes_among(data, flat) if data.draw(st.booleans()) else flat[:0])
        counts.append(len(boxes[-1]))
    boxes = torch.cat(boxes)
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    classes = torch.randint(0, 3, (len(boxes),), generator=random)
    scale = data.draw(st.sampled_from([0.0, 0.5, 2.0, 100.0]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    deltas = [
        (torch.randn(len(counts), *level.shape[:-1], 4, generator=random) * scale).to(dtype)
        for level in anchors
    ]
    # Values on both sides of a threshold may round differently, so none is where IoUs are likely.
    threshold = data.draw(st.sampled_from([0.0, 0.1234567, 0.6012345, 0.9]))
    arguments = deltas, anchors, boxes, classes, counts, 3, WEIGHTS, CLAMP, threshold
    cells, prob, max_iou = ops.box_prob(*arguments)
    expected_cells, expected_prob, expected_max_iou = matching.box_prob(*arguments)
    torch.testing.assert_close(max_iou, expected_max_iou, rtol=1e-5, atol=1e-5)
    assert (cells.diff() > 0).all()
    size = len(counts) * len(flat) * 3
    near = [torch.zeros(size), torch.zeros(size)]
    near[0][cells], near[1][expected_cells] = prob, expected_prob
    # P is a quotient of small differences where the highest IoU is just above the threshold.
    ramp = (expected_max_iou[expected_max_iou > 0] - threshold).amin() if len(prob) else 1.0
    torch.testing.assert_close(near[0], near[1], rtol=1e-4, atol=min(1.0, 1e-5 / float(ramp)))


@fuzzes_the_kernels
@FUZZ
@given(st.data())
def test_negative_bag_loss_of_any_logits(data):
    """Value, gradient and logits of the bag, for any shape, layout, dtype, gamma and scale."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    images, classes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    )
    levels = []
    for _ in range(data.draw(st.integers(1, 3))):
        height, width, per_cell = (data.draw(st.integers(low, 9)) for low in (0, 1, 1))
        x = torch.randn(images, per_cell * classes, height, width, generator=random)
        x = (x * data.draw(st.sampled_from([1.0, 5.0, 40.0]))).to(dtype)
        if data.draw(st.booleans()):
            x = x.to(memory_format=torch.channels_last)
        x = x.unflatten(1, (per_cell, -1)).permute(0, 3, 4, 1, 2)
        levels.append(x.flatten(1, 3) if data.draw(st.booleans()) else x)
    size = sum(x.numel() for x in levels)
    count = data.draw(st.integers(0, min(size, 30)))
    cells = torch.randperm(size, generator=random)[:count]
    compute = torch.promote_types(dtype, torch.float32)
    prob = torch.rand(count, generator=random).to(compute)
    bag = torch.randint(0, max(1, size), (count, 3), generator=random)
    gamma, scale = data.draw(st.sampled_from([1.0, 1.5, 2.0])), data.draw(st.floats(1e-4, 1.0))
    arguments = levels, cells, prob, bag, gamma, scale, scale
    grads, expected_grads = ([torch.full_like(x, math.nan) for x in levels] for _ in range(2))
    loss, logits = torch.ops.freeanchor.negative_bag_loss(*arguments, grads)
    expected_loss, expected_logits = losses.negative_bag_loss(*arguments, expected_grads)
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=1e-30)
    assert torch.equal(logits, expected_logits)
    rtol = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-11}.get(dtype, 5e-6)
    atol = scale * (1e-7 if dtype == torch.float16 else 1e-30)
    for grad, expected in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected, rtol=rtol, atol=max(atol, 6e-8 * (rtol == 2e-3)))


@fuzzes_the_kernels
@FUZZ
@given(st.data())
def test_take_and_put_of_any_levels(data):
    """Elements and their gradient, for indices with and without repetitions."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16]))
    images, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    levels = [torch.randn(images, s, depth, generator=random).to(dtype) for s in sizes]
    total = images * sum(sizes) * depth
    index = torch.randint(0, max(1, total), (data.draw(st.integers(0, 40)),), generator=random)
    index = index if total else index[:0]
    together = torch.cat(levels, dim=1)
    assert torch.equal(
        ops.take(levels, index), together.flatten()[index].to(ops.take(levels, index).dtype)
    )
    source = torch.randint(-8, 9, index.shape, generator=random)  # sums are exact
    source = source.to(torch.promote_types(dtype, torch.float32))
    factor = data.draw(st.sampled_from([None, torch.tensor(1.0), torch.tensor(0.25)]))
    expected = torch.zeros(total, dtype=dtype).index_put_((index,), source.to(dtype), True)
    zeros = [torch.zeros_like(level) for level in levels]
    torch.ops.freeanchor.put_(zeros, index, source, factor)
    assert torch.equal(torch.cat(zeros, dim=1).flatten(), expected)
    torch.ops.freeanchor.put_(levels, index[:0], source[:0], factor)
    assert torch.equal(
        torch.cat(levels, dim=1), together * (1 if factor is None else factor.item())
    )


# Accuracy, determinism, instruction sets


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 3.0, 15.0])
def test_accuracy(scale, dtype, device):
    """Against float64, errors are at most twice those of the plain PyTorch formula."""
    x = (torch.randn(1, 40_000, 5, device=device) * scale - 3).to(dtype)
    none = torch.zeros(0, dtype=torch.int64, device=device)

    def plain(x, compute):
        x = x.detach().requires_grad_()
        logits = x.to(compute)
        loss = (logits.sigmoid() ** 2 * F.softplus(logits)).sum()
        return loss.detach(), *torch.autograd.grad(loss, x)

    exact_loss, exact_grad = plain(x.double(), torch.float64)
    plain_loss, plain_grad = plain(x, torch.float32)
    leaf = x.clone().requires_grad_()
    loss, _ = ops.negative_bag_loss([leaf], none, torch.zeros(0, device=device), none)
    loss.backward()
    loss_bound = max(2 * (plain_loss - exact_loss).abs(), exact_loss * 2**-23)
    assert (loss.detach() - exact_loss).abs() <= loss_bound
    # Relative to the gradient, and to the smallest normal number of the dtype.
    unit = exact_grad.abs().clamp(min=torch.finfo(dtype).tiny)
    error = ((leaf.grad - exact_grad).abs() / unit).max()
    assert error <= 2 * ((plain_grad - exact_grad).abs() / unit).max()


@fuzzes_the_kernels
def test_threads_do_not_change_the_result():
    """Sums are in the same order with one thread and with several."""
    _, cells, prob, bag = negative_case()
    x = torch.randn(2, 30_000, 5)
    anchors, (boxes, classes) = grid_anchors(), objects(50)
    deltas = raw(random_levels(4))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            (
                ops.negative_bag_loss([x], cells, prob, bag)[0],
                ops.iou_topk(anchors, boxes, 9),
                *ops.box_prob(deltas, anchors, boxes, classes, [30, 20], 5, WEIGHTS, CLAMP, 0.1),
            )
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@fuzzes_the_kernels
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
    anchors, (boxes, classes) = grid_anchors(device=device), objects(30, device=device)
    deltas = [x / 9 for x in raw(random_levels(4, device=device))]
    flat = [torch.cat([level.reshape(-1, 4) for level in anchors])]
    expected = matching.iou_topk(flat, boxes, 9)
    assert torch.equal(ops.iou_topk(anchors, boxes, 9), expected)
    assert torch.equal(ops.iou_topk(flat, boxes, 9), expected)
    arguments = deltas, anchors, boxes, classes, [30, 0], 5, WEIGHTS, CLAMP, 0.3
    cells, prob, max_iou = ops.box_prob(*arguments)
    expected_cells, expected_prob, expected_max_iou = matching.box_prob(*arguments)
    assert len(cells) > 5
    assert torch.equal(cells, expected_cells)
    torch.testing.assert_close(prob, expected_prob, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(max_iou, expected_max_iou)


# CUDA


@needs_cuda
def test_cuda_on_another_stream():
    """Kernels run on the current stream: results are right without waiting for another."""
    leaves, cells, prob, bag = negative_case(device="cuda")
    expected = ops.negative_bag_loss(raw(leaves), cells, prob, bag)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = [x.detach() * 2 / 2 for x in leaves]
        result = ops.negative_bag_loss(raw(doubled), cells, prob, bag)
    stream.synchronize()
    for a, b in zip(result, expected):
        torch.testing.assert_close(a, b)


@needs_cuda
def test_cuda_negative_bag_loss_does_not_wait():
    """Forward and backward, of the logits and of the bags, without waiting for the device."""
    leaves, cells, prob, bag = negative_case(device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, logits = ops.negative_bag_loss(raw(leaves), cells, prob, bag)
        taken = ops.take(raw(leaves), bag)
        (loss + logits.sum() + taken.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad.isfinite().all() for x in leaves)


@needs_cuda
def test_cuda_is_deterministic():
    """The same input gives the same bits."""
    torch.manual_seed(0)
    x = torch.randn(2, 100_000, 20, device="cuda", requires_grad=True)
    bag = torch.randint(0, 1000, (50_000,), device="cuda")
    none = bag[:0]
    results = []
    for _ in range(3):
        loss, logits = ops.negative_bag_loss([x], none, none.float(), bag)
        results.append((loss, *torch.autograd.grad(loss + logits.sum(), x)))
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
    none = bag[:0]
    loss, logits = ops.negative_bag_loss([x.requires_grad_()], none, none.float(), bag)
    (loss + logits.sum()).backward()
    assert logits.tolist() == [3.0, -20.0]
    expected = torch.tensor(3.0).sigmoid() ** 2 * F.softplus(torch.tensor(3.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert x.grad[0, -1, -1] > 1
    assert x.grad[0, 0, 0] == 1


# Bad input


BOXES = torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 5.0, 8.0]])
LEVELS = [torch.zeros(2, 3, 4)]
INDEX = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("anchors", ([], BOXES, 5)),
        ("anchors", ([torch.zeros(3, 5)], BOXES, 5)),
        ("anchors", ([torch.zeros(3, 1, 4)], BOXES, 5)),
        ("anchors", ([BOXES.double()], BOXES, 5)),
        ("anchors", ([BOXES.to("meta")], BOXES, 5)),
        ("anchors", ([BOXES * math.nan], BOXES, 5)),
        ("anchors", ([BOXES.view(1, 2, 1, 4) * math.nan], BOXES, 5)),
        ("anchors", ([-BOXES], BOXES, 5)),
        ("gt_boxes", ([BOXES], torch.zeros(3, 5), 5)),
        ("gt_boxes", ([BOXES], torch.zeros(4), 5)),
        ("gt_boxes", ([BOXES], BOXES.half(), 5)),
        ("gt_boxes", ([BOXES], BOXES.long(), 5)),
        ("gt_boxes", ([BOXES], BOXES * math.nan, 5)),
        ("gt_boxes", ([BOXES], BOXES * math.inf, 5)),
        ("gt_boxes", ([BOXES], -BOXES, 5)),
        ("k", ([BOXES], BOXES, 0)),
        ("k", ([BOXES], BOXES, -1)),
    ],
)
def test_iou_topk_refuses(name, arguments):
    """Bad input is refused with the name of the argument."""
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ops.iou_topk(*arguments)


@fuzzes_the_kernels
def test_iou_topk_refuses_grids_that_are_none():
    """A level that has the shape of a grid only is not searched as one."""
    shuffled = grid_anchors()[0].flip(0)
    with pytest.raises(ValueError, match=r"anchors.*grids"):
        ops.iou_topk([shuffled], BOXES, 3)
    rotated = grid_anchors()[0].transpose(0, 1)
    with pytest.raises(ValueError, match=r"anchors.*grids"):
        ops.iou_topk([rotated], BOXES, 3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deltas", {"deltas": []}),
        ("deltas", {"deltas": [torch.zeros(1, 2, 5)]}),
        ("deltas", {"deltas": [torch.zeros(2, 4)]}),
        ("deltas", {"deltas": [torch.zeros(1, 2, 4, dtype=torch.int64)]}),
        ("deltas", {"deltas": [torch.zeros(1, 2, 4, device="meta")]}),
        ("deltas", {"deltas": [torch.zeros(1, 3, 4)]}),
        ("anchors", {"anchors": [BOXES.double()]}),
        ("anchors", {"anchors": [BOXES * math.nan]}),
        ("gt_boxes", {"gt_boxes": BOXES.half()}),
        ("gt_boxes", {"gt_boxes": BOXES * math.nan}),
        ("gt_boxes", {"gt_boxes": -BOXES}),
        ("gt_classes", {"gt_classes": torch.tensor([0, 3])}),
        ("gt_classes", {"gt_classes": torch.tensor([0, -1])}),
        ("gt_classes", {"gt_classes": torch.tensor([0.0, 1.0])}),
        ("gt_classes", {"gt_classes": torch.tensor([0])}),
        ("counts", {"counts": [1, 1]}),
        ("counts", {"counts": [-2]}),
        ("gt_classes and counts", {"counts": [3]}),
        ("weights", {"weights": (1.0, 1.0)}),
        ("weights", {"weights": (1.0, 1.0, 0.0, 1.0)}),
        ("threshold", {"threshold": 1.0}),
        ("threshold", {"threshold": math.nan}),
    ],
)
def test_box_prob_refuses(name, changes):
    """Bad input is refused with the name of the argument."""
    arguments = {
        "deltas": [torch.zeros(1, 2, 4)],
        "anchors": [BOXES],
        "gt_boxes": BOXES,
        "gt_classes": torch.tensor([0, 2]),
        "counts": [2],
        "num_classes": 3,
        "weights": WEIGHTS,
        "scale_clamp": CLAMP,
        "threshold": 0.6,
    }
    ops.box_prob(**arguments)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ops.box_prob(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits", {"logits": []}),
        ("logits", {"logits": [torch.zeros(3, 4)]}),
        ("logits", {"logits": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)]}),
        ("logits", {"logits": [torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)]}),
        ("logits", {"logits": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()]}),
        ("logits", {"logits": [torch.zeros(2, 3, 4, dtype=torch.int32)]}),
        ("cells", {"cells": torch.tensor([0, 24])}),
        ("cells", {"cells": torch.tensor([0, -1])}),
        ("cells", {"cells": torch.tensor([0.0, 1.0])}),
        ("cells", {"cells": INDEX.to("meta")}),
        ("prob", {"prob": torch.zeros(2).double()}),
        ("cells and prob", {"prob": torch.zeros(3)}),
        ("bag", {"bag": torch.tensor([[24]])}),
        ("bag", {"bag": torch.tensor([[0]], dtype=torch.int32)}),
        ("gamma", {"gamma": 0.5}),
        ("gamma", {"gamma": math.nan}),
    ],
)
def test_negative_bag_loss_refuses(name, changes):
    """Bad input is refused with the name of the argument."""
    arguments = {
        "logits": LEVELS,
        "cells": torch.tensor([1, 5]),
        "prob": torch.rand(2),
        "bag": torch.tensor([[1], [3]]),
        "gamma": 2.0,
    }
    ops.negative_bag_loss(**arguments)
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ops.negative_bag_loss(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("name", "levels", "index"),
    [
        ("levels", [], INDEX),
        ("levels", [torch.zeros(4)], INDEX),
        ("index", LEVELS, INDEX + 24),
        ("index", LEVELS, INDEX - 1),
        ("index", LEVELS, INDEX.int()),
    ],
)
def test_take_refuses(name, levels, index):
    """Bad input is refused with the name of the argument."""
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ops.take(levels, index)


@fuzzes_the_kernels
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("iou_topk", ([BOXES.double()], BOXES, 5)),
        ("iou_topk", ([torch.zeros(2, 3)], BOXES, 5)),
        ("iou_topk", ([BOXES], torch.zeros(4), 5)),
        ("iou_topk", ([BOXES * math.nan], BOXES, 5)),
        ("iou_topk", ([BOXES], BOXES, 0)),
        ("take", (LEVELS, INDEX + 24)),
        ("take", ([], INDEX)),
        ("take", ([*LEVELS, torch.zeros(2, 3, 5)], INDEX)),
        ("take", ([*LEVELS, torch.zeros(2, 3, 4).half()], INDEX)),
        ("take", (LEVELS * 17, INDEX)),
        ("put_", (LEVELS, INDEX + 24, torch.zeros(2), None)),
        ("put_", (LEVELS, INDEX, torch.zeros(3), None)),
        ("negative_bag_loss", (LEVELS, INDEX + 24, torch.zeros(2), INDEX, 2.0, 1.0, 1.0, [])),
        ("negative_bag_loss", (LEVELS, INDEX, torch.zeros(2), INDEX - 1, 2.0, 1.0, 1.0, [])),
        ("negative_bag_loss", (LEVELS, INDEX, torch.zeros(3), INDEX, 2.0, 1.0, 1.0, [])),
        ("negative_bag_loss", (LEVELS, INDEX, torch.zeros(2), INDEX, 2.0, 1.0, 1.0, LEVELS * 2)),
        (
            "negative_bag_loss",
            ([LEVELS[0][:, ::2]], INDEX, torch.zeros(2), INDEX, 2.0, 1.0, 1.0, []),
        ),
        (
            "box_prob",
            ([torch.zeros(1, 3, 4)], [BOXES], BOXES, INDEX, [2], 3, WEIGHTS, CLAMP, 0.6),
        ),
        (
            "box_prob",
            ([torch.zeros(1, 2, 4)], [BOXES], BOXES, INDEX, [3], 3, WEIGHTS, CLAMP, 0.6),
        ),
    ],
)
def test_unchecked_kernels_are_memory_safe(op, arguments):
    """Whoever calls a kernel without the checks of `ops` gets an error, not a crash."""
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        getattr(torch.ops.freeanchor, op)(*arguments)
