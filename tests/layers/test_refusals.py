"""Bad input of the operators: every implementation refuses the same, with the same sentence."""

import contextlib
import math

import pytest
import torch
from freeanchor.layers import ops
from freeanchor.layers.matching import BoxCoding, Objects
from layer_inputs import CODING, DEVICES, EMULATED, fuzzes_the_kernels, grid_anchors, needs_cuda, to

BOXES = torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 5.0, 8.0]])
GRID = BOXES.view(1, 2, 1, 4)
LEVELS = [torch.zeros(2, 3, 4)]
INDEX = torch.zeros(2, dtype=torch.int64)
MATCHING = {
    "deltas": [torch.zeros(1, 2, 4)],
    "anchors": [BOXES],
    "objects": Objects(BOXES, torch.tensor([0, 2]), INDEX),
    "coding": CODING,
    "threshold": 0.6,
}
BAD_BOXES = "must have finite coordinates with x1 <= x2 and y1 <= y2"


@contextlib.contextmanager
def refused(match, device):
    """On a GPU, the next operator after the device has met the value says so."""
    with pytest.raises(ValueError, match=match):  # noqa: PT012
        yield
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            ops.take(to(device, LEVELS), INDEX.to(device))


def with_value(tensor, position, value):
    changed = tensor.clone()
    changed[position] = value
    return changed


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("anchors", ([], BOXES, 5)),
        ("anchors", ([torch.zeros(3, 5)], BOXES, 5)),
        ("anchors", ([torch.zeros(3, 1, 4)], BOXES, 5)),
        ("anchors", ([BOXES.double()], BOXES, 5)),
        ("anchors", ([BOXES.to("meta")], BOXES, 5)),
        ("gt_boxes", ([BOXES], torch.zeros(3, 5), 5)),
        ("gt_boxes", ([BOXES], torch.zeros(4), 5)),
        ("gt_boxes", ([BOXES], BOXES.half(), 5)),
        ("gt_boxes", ([BOXES], BOXES.long(), 5)),
        ("k", ([BOXES], BOXES, 0)),
        ("k", ([BOXES], BOXES, -1)),
    ],
)
def test_iou_topk_refuses(name, arguments):
    """Wrong shapes, dtypes and devices are refused with the name of the argument."""
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ops.iou_topk(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -100.0, 100.0, 2e38])
@pytest.mark.parametrize("position", [(0, 0), (1, 3), (1, 0)])
@pytest.mark.parametrize("objects", [BOXES, BOXES[:0]])
def test_boxes_are_refused(value, position, objects, device):
    """Coordinates that are not finite or not in order, of boxes and of anchors, in both operators.

    Also if there is no object for which anchors would be read; and what is in order is not refused.
    """
    bad = with_value(BOXES, position, value)
    size = bad[:, 2:] - bad[:, :2]
    is_bad = not bool(((size >= 0) & (size < math.inf)).all())
    gt = Objects(objects, INDEX[: len(objects)], INDEX[: len(objects)])
    calls = {
        "anchors": [
            lambda: ops.iou_topk(to(device, [bad]), objects.to(device), 2),
            lambda: negative_bag_loss(device, anchors=[bad], objects=gt),
        ],
        "gt_boxes": [
            lambda: ops.iou_topk(to(device, [BOXES]), bad.to(device), 2),
            lambda: negative_bag_loss(device, objects=Objects(bad, INDEX, INDEX)),
        ],
    }
    for name, both in calls.items():
        for call in both:
            with refused(f"^{name} {BAD_BOXES}$", device) if is_bad else contextlib.nullcontext():
                call()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "grid",
    [
        GRID * math.nan,
        with_value(GRID, (0, 0, 0, 2), math.inf),
        with_value(GRID, (0, 1, 0, 0), -math.inf),
        with_value(GRID, (0, 0, 0, 2), -1.0),  # inverted
        GRID.flip(1),
        grid_anchors()[0].flip(0),
        grid_anchors()[0].transpose(0, 1),
        grid_anchors()[0].transpose(0, 1).contiguous(),
        with_value(grid_anchors()[0], (-1, -1, -1, 1), 3.0),
    ],
)
def test_grids_that_are_none_are_refused(grid, device):
    """A level that has the shape of a grid only is not searched as one, nor beside others."""
    for levels in ([grid], [grid_anchors()[0], grid], [BOXES, grid]):
        with refused("^anchors of the form .* must be grids: ", device):
            ops.iou_topk(to(device, levels), BOXES.to(device), 3)


@fuzzes_the_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, 3.0])
def test_inner_anchors_of_a_grid(value, device):
    """The search on CUDA reads all anchors, so it refuses any that is not where its grid has it."""
    grid = with_value(grid_anchors()[0], (1, 1, 0, 0), value)
    reads_all = EMULATED or device.startswith("cuda")
    with refused("^anchors of the form", device) if reads_all else contextlib.nullcontext():
        ops.iou_topk(to(device, [grid]), BOXES.to(device), 3)


def negative_bag_loss(device="cpu", **changes):
    arguments = {"logits": [torch.zeros(1, 2, 3)], "bag": INDEX, **MATCHING, **changes}
    return ops.negative_bag_loss(**to(device, arguments))


def box_prob(device="cpu", **changes):
    return ops.box_prob(**to(device, {**MATCHING, **changes}), num_classes=3)


@pytest.mark.parametrize("operator", [negative_bag_loss, box_prob])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deltas", {"deltas": []}),
        ("deltas", {"deltas": [torch.zeros(1, 2, 5)]}),
        ("deltas", {"deltas": [torch.zeros(2, 4)]}),
        ("deltas", {"deltas": [torch.zeros(1, 2, 4, dtype=torch.int64)]}),
        ("deltas", {"deltas": [torch.zeros(1, 3, 4)]}),
        ("anchors", {"anchors": [BOXES.double()]}),
        ("anchors", {"anchors": [BOXES.to("meta")]}),
        ("gt_boxes", {"objects": Objects(BOXES.half(), INDEX, INDEX)}),
        (r"anchors\[0\]", {"objects": MATCHING["objects"]._replace(boxes=BOXES.double())}),
        ("gt_classes", {"objects": Objects(BOXES, INDEX.float(), INDEX)}),
        ("gt_classes", {"objects": Objects(BOXES, INDEX[:1], INDEX)}),
        ("gt_images", {"objects": Objects(BOXES, INDEX, INDEX[:1])}),
        ("gt_images", {"objects": Objects(BOXES, INDEX, INDEX.int())}),
        ("weights", {"coding": BoxCoding((1.0, 1.0), 4.0)}),
        ("weights", {"coding": BoxCoding((1.0, 1.0, 0.0, 1.0), 4.0)}),
        ("threshold", {"threshold": 1.0}),
        ("threshold", {"threshold": math.nan}),
    ],
)
def test_matching_refuses(operator, name, changes):
    """Bad input is refused with the name of the argument, by both that match predictions."""
    operator()
    with pytest.raises(ValueError, match=rf"^{name}"):
        operator(**changes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("message", "classes", "images"),
    [
        (r"gt_classes must be in \[0, 3\)", [0, 3], [0, 0]),
        (r"gt_classes must be in \[0, 3\)", [-1, 0], [0, 0]),
        (r"gt_images must be in \[0, 1\) and never decrease", [0, 0], [0, 1]),
        (r"gt_images must be in \[0, 1\) and never decrease", [0, 0], [-1, 0]),
        (r"gt_images must be in \[0, 2\) and never decrease", [0, 0], [1, 0]),
    ],
)
def test_classes_and_images_are_refused(message, classes, images, device):
    """What would be written beside the logits is not."""
    gt = Objects(BOXES, torch.tensor(classes), torch.tensor(images))
    num_images = 2 if "2" in message else 1
    changes = {
        "objects": gt,
        "deltas": [torch.zeros(num_images, 2, 4)],
    }
    with refused(f"^{message}$", device):
        negative_bag_loss(device, logits=[torch.zeros(num_images, 2, 3)], **changes)
    with pytest.raises(ValueError, match=f"^{message}$"):
        box_prob(device, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits", {"logits": []}),
        ("logits", {"logits": [torch.zeros(2, 3)]}),
        ("logits", {"logits": [torch.zeros(1, 2, 3), torch.zeros(1, 2, 5)]}),
        ("logits", {"logits": [torch.zeros(1, 2, 3), torch.zeros(2, 2, 3)]}),
        ("logits", {"logits": [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).half()]}),
        ("logits", {"logits": [torch.zeros(1, 2, 3, dtype=torch.int32)]}),
        ("logits", {"logits": [torch.zeros(1, 3, 3)]}),
        ("logits", {"logits": [torch.zeros(1, 2, 3).half()]}),
        ("bag", {"bag": INDEX.to("meta")}),
        ("bag", {"bag": INDEX.int()}),
        ("index", {"bag": INDEX + 6}),
        ("index", {"bag": INDEX - 1}),
        ("gamma", {"gamma": 0.5}),
        ("gamma", {"gamma": math.nan}),
        ("scale", {"scale": torch.tensor(1.0).double()}),
    ],
)
def test_negative_bag_loss_refuses(name, changes):
    """Bad input is refused with the name of the argument."""
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        negative_bag_loss(**changes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "levels", "index"),
    [
        ("levels", [], INDEX),
        ("levels", [torch.zeros(4)], INDEX),
        (r"index must be in \[0, 24\)", LEVELS, INDEX + 24),
        (r"index must be in \[0, 24\)", LEVELS, INDEX - 1),
        ("index", LEVELS, INDEX.int()),
    ],
)
def test_take_refuses(name, levels, index, device):
    """Bad input is refused with the name of the argument."""
    with refused(rf"^{name}", device):
        ops.take(to(device, levels), index.to(device))


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
        ("put_", (LEVELS, INDEX + 24, torch.zeros(2))),
        ("put_", (LEVELS, INDEX, torch.zeros(3))),
    ],
)
def test_unchecked_kernels_are_memory_safe(op, arguments):
    """Whoever calls a kernel without the checks of `ops` gets an error, not a crash."""
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        getattr(torch.ops.freeanchor, op)(*arguments)


@fuzzes_the_kernels
@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, [torch.zeros(1, 3, 3)]),
        (0, [torch.zeros(1, 4, 3)[:, ::2]]),
        (0, [torch.zeros(1, 2, 3).double()]),
        (1, [torch.zeros(1, 2, 5)]),
        (1, [torch.zeros(1, 2, 4)] * 2),
        (2, [BOXES.double()]),
        (3, torch.zeros(4)),
        (4, INDEX + 3),
        (4, INDEX[:1]),
        (5, INDEX + 1),
        (6, [1.0]),
        (9, torch.zeros(2)),
        (9, torch.tensor(1.0).double()),
        (10, [torch.zeros(1, 2, 4)]),
        (10, [torch.zeros(1, 2, 3)] * 2),
    ],
)
def test_unchecked_negative_bag_loss_is_memory_safe(position, value):
    """The same, argument by argument."""
    objects = MATCHING["objects"]
    arguments = [[torch.zeros(1, 2, 3)], *list(MATCHING.values())[:2], *objects, [1.0] * 5, 0.6]
    arguments += [2.0, torch.tensor(1.0), []]
    torch.ops.freeanchor.negative_bag_loss(*arguments)
    arguments[position] = value
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        torch.ops.freeanchor.negative_bag_loss(*arguments)


@needs_cuda
def test_cuda_survives_bad_values():
    """The context is alive after an error, and the next call that is right gives what it should."""
    index = torch.tensor([0, 99], device="cuda")
    with refused("^index", "cuda"):
        ops.take(to("cuda", LEVELS), index)
    assert torch.equal(ops.take(to("cuda", LEVELS), index[:1]).cpu(), torch.zeros(1))
