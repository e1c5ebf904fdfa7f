"""A training step never waits for the device, can be traced, and checks objects on the host."""

import contextlib
import math
import pickle

import pytest
import torch
from conftest import instances, quick_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from freeanchor.modeling.host_and_device import DelayedScalars, to_device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

FEATURES = [torch.zeros(1, 1, 8 >> i or 1, 8 >> i or 1) for i in range(5)]  # of 64 x 64 pixels
BOXES = [[[8.0, 8.0, 40.0, 30.0], [0.0, 0.0, 9.0, 9.0]], []]


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a CUDA device, which a fake or meta one stands for.

    Copies between the two that are not said to be non-blocking wait. Operators whose results the
    host must know, or whose shapes depend on values, are refused by such tensors themselves.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs, result))[0] if torch.is_tensor(x)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            asynchronous = kwargs.get("non_blocking") or any(x is True for x in args)
            if len({x.device.type for x in tensors}) > 1 and not asynchronous:
                raise AssertionError(f"{func} waits")
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{func} waits")
        return result


class Arrival:
    """A CUDA event that has not happened yet."""

    def record(self):
        pass

    def query(self):
        return False


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.cpu(),
        lambda x: x.unique(),
    ],
)
def test_what_waits_is_noticed(wait):
    """The test below can fail."""
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with pytest.raises(Exception), NoWaiting():  # noqa: B017, PT011 # of several kinds
            wait(x)


@pytest.mark.parametrize("boxes", [BOXES, [[], []]])
def test_losses_do_not_wait_on_a_fake_gpu(model, monkeypatch, boxes):
    """From the images to the losses, and what is logged."""
    monkeypatch.setattr(torch.cuda, "Event", Arrival)
    with FakeTensorMode():
        _to_fake_device(model)
        _step(model, boxes, "cuda")


@pytest.mark.parametrize("boxes", [BOXES, [[], []]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_do_not_wait_on_the_meta_device(model, monkeypatch, boxes, dtype):
    """From the images to the gradients. Autograd would need a GPU for tensors of a fake one."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(model, "_log_matching", lambda *_: None)
    losses = _step(model.to("meta", dtype), boxes, "meta", dtype)
    with NoWaiting():
        (sum(losses.values()) * 1024).backward()
    assert all(x.grad is not None for x in model.parameters())


def _step(model, boxes, device, dtype=torch.float32):
    images = torch.zeros(2, 3, 64, 64, dtype=dtype, device=device)
    # Padding is computed on the host, from sizes that a fake tensor does not have.
    model.preprocess_image = lambda batch: ImageList(images, [(64, 64)] * 2)
    batch = [{"image": x, "instances": _instances(b, device)} for x, b in zip(images, boxes)]
    with NoWaiting():
        losses = model.train()(batch)
    assert all(x.device.type == device for x in losses.values())
    return losses


def _to_fake_device(model):
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    is_parameter = isinstance(x, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(fake) if is_parameter else fake


def _instances(boxes, device):
    """On the device: those of the host are checked there."""
    result = Instances((64, 64))
    result.gt_boxes = Boxes(torch.zeros(len(boxes), 4, device=device))
    result.gt_classes = torch.zeros(len(boxes), dtype=torch.int64, device=device)
    return result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_step_does_not_wait_on_a_device():
    """The same on a real one, from images on the host, with an optimizer."""
    cfg = quick_cfg()
    cfg.MODEL.DEVICE = "cuda"
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    batch = [
        {"image": torch.zeros(3, 64, 64), "instances": instances(b, [0] * len(b))} for b in BOXES
    ]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sum(model(batch).values()).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_loss_in_a_cuda_graph(cfg):
    """Captured once and replayed, with other predictions each time."""
    cfg.MODEL.DEVICE = "cuda"
    model = build_model(cfg)
    anchors, logits, deltas, targets = (x for x in _loss_arguments(model, "cuda"))
    leaves = [*logits, *deltas]

    def step():
        model.losses(anchors, logits, deltas, targets)
        losses = model.losses(anchors, logits, deltas, targets)
        return [sum(losses.values()), *torch.autograd.grad(sum(losses.values()), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for result, expected in zip(captured, step()):
        torch.testing.assert_close(result, expected)


def _loss_arguments(model, device="cpu"):
    anchors = model.anchor_generator([x.to(device) for x in FEATURES])
    logits, deltas = (
        [torch.randn(2, len(a), depth, device=device).requires_grad_() for a in anchors]
        for depth in (3, 4)
    )
    targets = [instances(b, [1] * len(b)).to(device) for b in BOXES]
    return anchors, logits, deltas, targets


# PyTorch's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_loss_compiles_as_a_whole(model):
    """`torch.compile(fullgraph=True)` traces it, with its gradient."""
    anchors, logits, deltas, targets = _loss_arguments(model)

    def loss(logits, deltas):
        return sum(model.losses(anchors, logits, deltas, targets).values())

    expected = loss(logits, deltas)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, deltas)
    torch.testing.assert_close(found, expected)
    leaves = [*logits, *deltas]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


def test_loss_exports(model):
    """`torch.export` traces it, and the program computes the same."""
    anchors, logits, deltas, targets = _loss_arguments(model)

    class Loss(torch.nn.Module):
        def forward(self, logits, deltas):
            return sum(model.losses(anchors, logits, deltas, targets).values())

    predictions = [x.detach() for x in logits], [x.detach() for x in deltas]
    program = torch.export.export(Loss(), predictions).module()
    torch.testing.assert_close(program(*predictions), Loss()(*predictions))


@pytest.mark.parametrize(
    ("boxes", "classes", "message"),
    [
        ([[0.0, 0.0, math.nan, 9.0]], [0], "gt_boxes of 7.png must have finite coordinates"),
        ([[0.0, 9.0, 9.0, 0.0]], [0], "gt_boxes of 7.png must have finite coordinates"),
        ([[0.0, 0.0, 9.0, 9.0]], [3], r"gt_classes of 7.png must be in \[0, 3\)"),
        ([[0.0, 0.0, 9.0, 9.0]], [-1], r"gt_classes of 7.png must be in \[0, 3\)"),
    ],
)
def test_bad_objects_are_refused_on_the_host(model, boxes, classes, message):
    """With the name of the image, before anything is computed from them."""
    image = {"file_name": "7.png", "image": None, "instances": instances(boxes, classes)}
    with pytest.raises(ValueError, match=message):
        model.train()([image])


def test_batch_is_copied_to_the_device():
    """Images, boxes and classes; all else stays, and the batch of the loader is as it was."""
    batch = [
        {"image": torch.zeros(3, 8, 8), "instances": instances([[0, 0, 2, 2]], [0]), "height": 9}
    ]
    (image,) = to_device(batch, torch.device("meta"), 3)
    assert image["image"].is_meta
    assert image["instances"].gt_boxes.tensor.is_meta
    assert image["instances"].gt_classes.is_meta
    assert image["instances"].image_size == (64, 64)
    assert image["height"] == 9
    assert batch[0]["image"].is_cpu


def test_delayed_scalars(storage, monkeypatch):
    """Those of a device wait until they are there, in order, and do not make anyone else wait."""

    class Event(Arrival):
        def query(self):
            return arrived

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    scalars, arrived = DelayedScalars(), False
    scalars.put(["a", "b"], torch.tensor([1.0, 2.0]))
    assert storage.latest() == {}
    assert pickle.loads(pickle.dumps(scalars))._pending is not scalars._pending
    arrived = True
    scalars.put(["a"], torch.tensor([3.0]))
    with contextlib.suppress(KeyError):
        assert storage.history("a").values() == [(1.0, 0), (3.0, 0)]
    assert {name: value for name, (value, _) in storage.latest().items()} == {"a": 3.0, "b": 2.0}
