"""The kernels against their readable reference, on any input, on every device that there is."""

import math

import pytest
import torch
from freeanchor.layers import levels as pyramid
from freeanchor.layers import losses, matching, ops
from freeanchor.layers.matching import Objects
from hypothesis import given
from hypothesis import strategies as st
from layer_inputs import (
    CODING,
    DEVICES,
    EMULATED,
    FUZZ,
    boxes_among,
    fuzzes_the_kernels,
    grids,
    negative_case,
    to,
)

pytestmark = [fuzzes_the_kernels, pytest.mark.parametrize("device", DEVICES)]


@FUZZ
@given(data=st.data())
def test_bags_of_any_grid(data, device):
    """The search on grids, the exhaustive kernel and the reference give the same bags."""
    levels = grids(data)
    flat = torch.cat([level.view(-1, 4) for level in levels])
    boxes = boxes_among(data, flat)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    levels, flat, boxes = [x.to(dtype) for x in levels], flat.to(dtype), boxes.to(dtype)
    # Of the larger ones, the candidates do not fit into a GPU's shared memory.
    k = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([800, 2000])))
    expected = matching.iou_topk([flat], boxes, k)
    assert torch.equal(matching.iou_topk(levels, boxes, k), expected)
    assert torch.equal(ops.iou_topk(to(device, levels), boxes.to(device), k).cpu(), expected)
    assert torch.equal(ops.iou_topk([flat.to(device)], boxes.to(device), k).cpu(), expected)


@FUZZ
@given(data=st.data())
def test_bags_of_any_anchors(data, device):
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
    bags = ops.iou_topk(to(device, levels), boxes.to(device), k)
    assert torch.equal(bags.cpu(), matching.iou_topk(levels, boxes, k))


@pytest.mark.parametrize("order", ["better and better", "worse and worse"])
def test_bags_of_more_candidates_than_there_is_room_for(order, device):
    """All anchors overlap the object, and each is better than all before it, or worse."""
    size = torch.linspace(20, 60, 4000)
    anchors = torch.stack((-size, -size, size, size), dim=1)
    anchors = anchors if order == "worse and worse" else anchors.flip(0)
    boxes = torch.tensor([[-20.0, -20.0, 20.0, 20.0]])
    bags = ops.iou_topk([anchors.to(device)], boxes.to(device), 50)
    assert torch.equal(bags.cpu(), matching.iou_topk([anchors], boxes, 50))


def any_levels(data, shape, random, dtype):
    """A level (N, H, W, A, D) as a head may leave it: layout, offset of its memory, flattened."""
    images, height, width, per_cell, depth = shape
    size = images * height * width * per_cell * depth
    scale = data.draw(st.sampled_from([1.0, 5.0, 40.0]))
    offset = data.draw(st.integers(0, 3))  # in memory, where vectors of 16 bytes may not begin
    x = (torch.randn(size + offset, generator=random) * scale).to(dtype)[offset:]
    if data.draw(st.booleans()):
        x = x.view(images, per_cell * depth, height, width)
    else:  # channels last
        x = x.view(images, height, width, per_cell * depth).permute(0, 3, 1, 2)
    x = x.unflatten(1, (per_cell, depth)).permute(0, 3, 4, 1, 2)
    return x.flatten(1, 3) if data.draw(st.booleans()) else x


@FUZZ
@given(data=st.data())
def test_negative_bag_loss_of_any_input(data, device):
    """Loss, gradient and highest IoUs, for any layout, dtype, objects, gamma and scale."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    )
    compute = torch.promote_types(dtype, torch.float32)
    anchors = [x.to(compute) for x in grids(data)]
    flat = torch.cat([level.view(-1, 4) for level in anchors])
    if data.draw(st.booleans()):
        anchors = [level[:0] for level in anchors[:1]] + [flat]  # no grid, and an empty level
    boxes, images = [], []
    for n in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            few = boxes_among(data, flat.float())
            many = few.repeat(data.draw(st.sampled_from([1, 70])), 1)  # more than a block of a GPU
            boxes.append(many + torch.rand(many.shape, generator=random).sort().values)
            images += [n] * len(many)
    num_images, classes = n + 1, data.draw(st.integers(1, 5))
    boxes = torch.cat(boxes).to(compute) if boxes else flat[:0]
    gt_classes = torch.randint(0, classes, (len(boxes),), generator=random)
    gt = Objects(boxes, gt_classes, torch.tensor(images, dtype=torch.int64))
    shapes = [x.shape[:3] if x.dim() == 4 else (1, len(x), 1) for x in anchors]
    logits = [any_levels(data, (num_images, *s, classes), random, dtype) for s in shapes]
    moved = data.draw(st.sampled_from([0.0, 0.02, 0.1, 1.0]))
    deltas = [any_levels(data, (num_images, *s, 4), random, dtype) * moved for s in shapes]
    # Values on both sides of a threshold may round differently, so none is where IoUs are likely.
    threshold = data.draw(st.sampled_from([0.0, 0.1234567, 0.6012345, 0.9]))
    gamma = data.draw(st.sampled_from([1.0, 1.5, 2.0]))
    scale = torch.tensor(data.draw(st.floats(1e-4, 1.0)), dtype=compute)
    arguments = deltas, anchors, *gt, [*CODING[0], CODING[1]], threshold, gamma, scale
    expected_grads = [torch.full_like(x, math.nan) for x in logits]
    expected, expected_iou = losses.negative_bag_loss(logits, *arguments, expected_grads)
    grads = [torch.full_like(x, math.nan, device=device) for x in logits]
    operator = torch.ops.freeanchor.negative_bag_loss
    loss, iou = to("cpu", operator(*to(device, (logits, *arguments)), grads))
    without, _ = to("cpu", operator(*to(device, (logits, *arguments)), []))
    assert torch.equal(loss, without)
    iou_error = 1e-12 if compute == torch.float64 else 1e-5
    torch.testing.assert_close(iou, expected_iou, rtol=iou_error, atol=iou_error)
    # P is a quotient of small differences where the highest IoU is just above the threshold.
    ramp = float((expected_iou[expected_iou > 0] - threshold).amin()) if iou.any() else 1.0
    error = min(1.0, iou_error / ramp)
    cells = len(matching.box_prob(deltas, anchors, gt, classes, CODING, threshold)[0])
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-30 + 40 * error * cells)
    rtol = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-11}.get(dtype, 5e-6)
    smallest = max(float(scale) * 1e-7, 6e-8) if dtype == torch.float16 else 1e-30
    different = 0
    for grad, reference in zip(to("cpu", grads), expected_grads):
        assert grad.isfinite().all()
        close = torch.isclose(grad, reference, rtol=rtol, atol=smallest)
        different += int((~close).sum())
        torch.testing.assert_close(
            grad.double(), reference.double(), rtol=rtol, atol=smallest + 80 * float(scale) * error
        )
    assert different <= cells, "a gradient differs where P{a in A+} is 0"


@FUZZ
@given(data=st.data())
def test_take_and_put_of_any_levels(data, device):
    """Elements and their gradient, for indices with and without repetitions."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    )
    compute = torch.promote_types(dtype, torch.float32)
    images, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    levels = [
        torch.randn(images, s, depth + 1, generator=random).to(dtype)[..., 1:]  # gaps in memory
        if data.draw(st.booleans())
        else torch.randn(images, s, depth, generator=random).to(dtype)
        for s in sizes
    ]
    total = images * sum(sizes) * depth
    # Few different ones, so that many are repeated.
    high = max(1, min(total, data.draw(st.sampled_from([3, 1 << 20]))))
    index = torch.randint(0, high, (data.draw(st.integers(0, 40)),), generator=random)
    index = index if total else index[:0]
    together = torch.cat(levels, dim=1).flatten()
    taken = ops.take(to(device, levels), index.to(device)).cpu()
    assert torch.equal(taken, together[index].to(compute))
    source = torch.randn(index.shape, generator=random, dtype=compute)
    changed = to(device, [level.clone() for level in levels])
    torch.ops.freeanchor.put_(changed, *to(device, (index, source)))
    pyramid.put_(levels, index, source)
    for level, expected in zip(to("cpu", changed), levels):
        torch.testing.assert_close(level, expected, rtol=1e-6 if compute == dtype else 0, atol=0)


@pytest.mark.skipif(EMULATED, reason="one thread")
def test_threads_do_not_change_the_result(device):
    """Sums are in the same order with one thread and with several."""
    case = negative_case(device=device, counts=(30, 20))
    many = [torch.randn(2, 30_000, 5, device=device)]
    anchors = torch.rand(30_000, 2, device=device).repeat(1, 2)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        large = case._replace(deltas=[many[0][..., :4] / 9], anchors=[anchors])
        results.append(
            (
                ops.iou_topk(case.anchors, case.objects.boxes, 9),
                *large.loss(many),
                *case.loss(),
            )
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
