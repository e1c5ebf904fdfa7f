"""The meta-architecture: its losses as a whole, and what it inherits from RetinaNet."""

import inspect
import math
import pickle
from datetime import timedelta

import freeanchor
import numpy as np
import paper
import pytest
import torch
from conftest import GOLDEN, instances, make_it_detect, quick_cfg
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from freeanchor import FreeAnchor
from freeanchor.layers import losses as losses_module
from freeanchor.layers import matching
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GOLDEN_FILES = [
    GOLDEN / f"{name}.npz"
    for name in ("one_empty_image", "same_class_overlap", "two_images_crowded")
]
FEATURES = [torch.zeros(1, 1, 8 >> i or 1, 8 >> i or 1) for i in range(5)]  # of 64 x 64 pixels


def predictions(model, num_images=2, dtype=torch.float32):
    """Anchors, random logits and random deltas for images of 64 x 64 pixels."""
    anchors = model.anchor_generator(FEATURES)
    logits = [torch.randn(num_images, len(a), 3, dtype=dtype).requires_grad_() for a in anchors]
    deltas = [torch.randn(num_images, len(a), 4, dtype=dtype).requires_grad_() for a in anchors]
    return anchors, logits, deltas


def gradients(losses, *tensors):
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses.values()), tensors)])


def test_is_registered():
    """Importing the package is enough for META_ARCHITECTURE "FreeAnchor"."""
    assert META_ARCH_REGISTRY.get("FreeAnchor") is FreeAnchor
    assert issubclass(FreeAnchor, RetinaNet)
    assert sorted(freeanchor.__all__) == ["FreeAnchor", "add_freeanchor_config"]
    assert all(hasattr(freeanchor, name) for name in freeanchor.__all__)


def test_signature_of_losses():
    """The entry point that others call is stable."""
    names = ["self", "anchors", "pred_logits", "pred_anchor_deltas", "gt_instances"]
    parameters = list(inspect.signature(FreeAnchor.losses).parameters.values())
    assert [p.name for p in parameters[:5]] == names
    assert all(p.default is not inspect.Parameter.empty for p in parameters[5:])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.FREEANCHOR.PRE_ANCHOR_TOPK", 0),
        ("MODEL.FREEANCHOR.BBOX_THRESHOLD", 1.0),
        ("MODEL.FREEANCHOR.BBOX_THRESHOLD", -0.1),
        ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 0.5),
        ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "diou"),
        ("TEST.DETECTIONS_PER_IMAGE", -1),
    ],
)
def test_bad_values_are_refused_by_name(cfg, key, value):
    """A value out of range stops at once, with the name of its key."""
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=key.split(".")[-1]):
        build_model(cfg)


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda p: p.stem)
def test_losses_of_an_independent_implementation(cfg, path):
    """Losses and gradients equal MMDetection's in float64, see tests/data/README.md."""
    golden = np.load(path)
    cfg.MODEL.RETINANET.NUM_CLASSES = int(golden["num_classes"])
    model = build_model(cfg)
    logits = torch.tensor(golden["logits"], requires_grad=True)
    deltas = torch.tensor(golden["deltas"], requires_grad=True)
    sizes = golden["level_sizes"].tolist()
    losses = model.losses(
        [Boxes(a) for a in torch.tensor(golden["anchors"]).split(sizes)],
        list(logits.split(sizes, dim=1)),
        list(deltas.split(sizes, dim=1)),
        [instances(golden[f"boxes_{i}"], golden[f"classes_{i}"]) for i in range(len(logits))],
    )
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(float(golden[name]), rel=1e-7)
    sum(losses.values()).backward()
    for tensor, name in ((logits, "grad_logits"), (deltas, "grad_deltas")):
        expected = torch.tensor(golden[name])
        torch.testing.assert_close(
            tensor.grad, expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item()
        )


@pytest.mark.parametrize("num_objects", [(4, 3), (5, 0), (0, 0)])
def test_losses_are_the_papers(model, num_objects):
    """Both losses equal the slow transcription, with full, partly empty and empty batches."""
    anchors, logits, deltas = predictions(model, dtype=torch.float64)
    targets = []
    for count in num_objects:
        corner = torch.rand(count, 2) * 40
        boxes = torch.cat((corner, corner + 4 + torch.rand(count, 2) * 30), dim=1)
        targets.append(instances(boxes, torch.arange(count) % 3))
    losses = model.losses(anchors, logits, deltas, targets)
    expected = paper.losses(
        Boxes.cat(anchors).tensor.tolist(),
        torch.cat(logits, 1).tolist(),
        torch.cat(deltas, 1).tolist(),
        [t.gt_boxes.tensor.tolist() for t in targets],
        [t.gt_classes.tolist() for t in targets],
    )
    assert losses["loss_positive"].item() == pytest.approx(expected[0], rel=1e-9)
    assert losses["loss_negative"].item() == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "iou", "giou"])
def test_every_value_of_the_config_is_used(cfg, box_loss):
    """With other constants than the paper's, the losses are still those of the transcription."""
    hyper = paper.Hyper(7, 0.3, 0.4, 0.5, 0.3, 1.5, (3.0, 4.0, 2.0, 1.0), box_loss=box_loss)
    cfg.merge_from_list(
        [
            *("MODEL.FREEANCHOR.PRE_ANCHOR_TOPK", hyper.k),
            *("MODEL.FREEANCHOR.BBOX_THRESHOLD", hyper.threshold),
            *("MODEL.FREEANCHOR.BBOX_REG_WEIGHT", hyper.weight),
            *("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", hyper.beta),
            *("MODEL.RETINANET.FOCAL_LOSS_ALPHA", hyper.alpha),
            *("MODEL.RETINANET.FOCAL_LOSS_GAMMA", hyper.gamma),
            *("MODEL.RETINANET.BBOX_REG_WEIGHTS", hyper.box_weights),
            *("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss),
        ]
    )
    model = build_model(cfg)
    hyper.scale_clamp = model.box2box_transform.scale_clamp = 0.2
    anchors, logits, deltas = predictions(model, 1, dtype=torch.float64)
    target = instances([[8.0, 8.0, 40.0, 30.0], [20.0, 10.0, 50.0, 60.0]], [1, 0])
    losses = model.losses(anchors, logits, deltas, [target])
    expected = paper.losses(
        Boxes.cat(anchors).tensor.tolist(),
        torch.cat(logits, 1).tolist(),
        torch.cat(deltas, 1).tolist(),
        [target.gt_boxes.tensor.tolist()],
        [target.gt_classes.tolist()],
        hyper,
    )
    assert losses["loss_positive"].item() == pytest.approx(expected[0], rel=1e-9)
    assert losses["loss_negative"].item() == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("box_loss", ["iou", "giou"])
def test_gradient_of_iou_in_the_likelihood(cfg, box_loss):
    """Of deltas and logits, by differences; and in half precision within its rounding."""
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = box_loss
    cfg.MODEL.FREEANCHOR.BBOX_REG_WEIGHT = 5.5
    model = build_model(cfg)
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 20.0, 16.0], [8.0, 5.0, 30.0, 33.0]]))]
    logits = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    deltas = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    targets = [instances([[3.0, 2.0, 25.0, 30.0]], [1])]

    def positive(logits, deltas):
        return model.losses(anchors, [logits], [deltas], targets)["loss_positive"]

    assert torch.autograd.gradcheck(positive, (logits, deltas))
    expected = torch.autograd.grad(positive(logits, deltas), (logits, deltas))
    half = [x.detach().bfloat16().requires_grad_() for x in (logits, deltas)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(positive(*half), half)
    for mine, their in zip(grads, expected):
        torch.testing.assert_close(mine.double(), their, rtol=0.1, atol=0.02)


def test_normaliser_of_an_empty_batch(model):
    """Trap 11: a batch without objects weighs as much as one with a single object."""
    anchors, logits, deltas = predictions(model)
    empty = model.losses(anchors, logits, deltas, [instances([], [])] * 2)
    far = instances([[900.0, 900.0, 910.0, 910.0]], [0])
    one = model.losses(anchors, logits, deltas, [instances([], []), far])
    assert empty["loss_positive"] == 0
    torch.testing.assert_close(empty["loss_negative"], one["loss_negative"])


@pytest.mark.parametrize("boxes", [[], [[8.0, 8.0, 40.0, 30.0]]])
def test_every_parameter_gets_a_gradient(model, boxes):
    """Trap 5: also without objects, in one image or in all, so that DDP does not wait for one."""
    model.train()
    batch = [
        {"image": torch.rand(3, 64, 64), "instances": instances(b, [1] * len(b))}
        for b in (boxes, [])
    ]
    losses = model(batch)
    assert set(losses) == {"loss_positive", "loss_negative"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_empty_batch_with_an_overflowed_prediction(model):
    """Trap 5: `pred.sum() * 0` would turn one infinite delta into a NaN loss."""
    anchors, logits, deltas = predictions(model)
    with torch.no_grad():
        deltas[0][0, 0] = torch.inf
    losses = model.losses(anchors, logits, deltas, [instances([], [])] * 2)
    assert all(loss.isfinite() for loss in losses.values())
    assert gradients(losses, *logits, *deltas).isfinite().all()


def test_maximum_iou_at_the_threshold(model):
    """Trap 1, end to end: an object whose best box has IoU float32(0.6) gives a finite loss."""
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 6.0], [40.0, 40.0, 60.0, 60.0]]))]
    logits = [torch.zeros(1, 2, 3, requires_grad=True)]
    deltas = [torch.zeros(1, 2, 4, requires_grad=True)]
    target = instances([[0.0, 0.0, 10.0, 10.0]], [2])
    assert matching.box_iou(anchors[0].tensor, target.gt_boxes.tensor)[0] == torch.tensor(0.6)
    losses = model.losses(anchors, logits, deltas, [target])
    assert all(loss.isfinite() for loss in losses.values())
    assert gradients(losses, *logits, *deltas).isfinite().all()


def test_object_without_width(model):
    """Trap 13: such an object is dropped before training; if one arrives, the loss is finite."""
    anchors, logits, deltas = predictions(model, 1)
    target = instances([[20.0, 20.0, 20.0, 40.0], [5.0, 5.0, 5.0, 5.0]], [0, 1])
    losses = model.losses(anchors, logits, deltas, [target])
    assert all(loss.isfinite() for loss in losses.values())
    assert gradients(losses, *logits, *deltas).isfinite().all()


def test_fewer_anchors_than_the_bag(model):
    """Trap 5: a tiny image has fewer anchors than a bag, and still trains."""
    anchors, logits, deltas = predictions(model, 1)
    anchors, logits, deltas = anchors[-1:], logits[-1:], deltas[-1:]
    assert len(anchors[0]) < model.pre_anchor_topk
    target = instances([[5.0, 5.0, 60.0, 60.0]], [0])
    losses = model.losses(anchors, logits, deltas, [target])
    expected = paper.losses(
        anchors[0].tensor.tolist(),
        logits[0].tolist(),
        deltas[0].tolist(),
        [target.gt_boxes.tensor.tolist()],
        [[0]],
    )
    assert losses["loss_positive"].item() == pytest.approx(expected[0], rel=1e-4)
    assert losses["loss_negative"].item() == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_inside_autocast(model, dtype):
    """Trap 3: half precision predictions are treated in float32, whatever autocast would do."""
    anchors, logits, deltas = predictions(model)
    half_logits = [x.detach().to(dtype) * 4 for x in logits]  # up to 12: sigmoid(9) is 1 in fp16
    half_deltas = [x.detach().to(dtype) for x in deltas]
    targets = [instances([[8.0, 8.0, 40.0, 30.0]], [1]), instances([], [])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(anchors, half_logits, half_deltas, targets)
    expected = model.losses(
        anchors, [x.float() for x in half_logits], [x.float() for x in half_deltas], targets
    )
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0)


def test_many_objects(model):
    """A thousand objects in an image are only more of the same."""
    anchors, logits, deltas = predictions(model, 1)
    corner = torch.rand(1000, 2) * 50
    target = instances(torch.cat((corner, corner + 10), dim=1), torch.arange(1000) % 3)
    losses = model.losses(anchors, logits, deltas, [target])
    assert all(loss.isfinite() for loss in losses.values())
    positives = [
        model.losses(anchors, logits, deltas, [target[i : i + 250]])["loss_positive"]
        for i in range(0, 1000, 250)
    ]
    torch.testing.assert_close(losses["loss_positive"], torch.stack(positives).mean())


class _NewTensors(TorchDispatchMode):
    """Notes the sizes of tensors with memory of their own that operators give."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in _with_memory((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in _with_memory(result):
            if x.untyped_storage().data_ptr() not in known:
                self.sizes.append(x.numel())
        return result


def _with_memory(tree):
    return [x for x in tree_leaves(tree) if is_tensor(x) and x.device.type != "meta"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_class_logits_are_not_copied(cfg, memory_format, monkeypatch):
    """Of the size of a level's logits there is one new tensor in a training step: its gradient."""
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    model = build_model(cfg)
    features = [torch.zeros(2, 1, 40 >> i or 1, 40 >> i or 1) for i in range(5)]
    logits, deltas = (
        [torch.randn(2, 9 * depth, *x.shape[2:]).to(memory_format=memory_format) for x in features]
        for depth in (80, 4)
    )
    leaves = [x.requires_grad_() for x in logits + deltas]
    targets = [instances([[8.0, 8.0, 40.0, 30.0]], [1]), instances([], [])]
    monkeypatch.setattr(losses_module, "_CHUNK_CPU", 1 << 12)  # of the reference
    with _NewTensors() as new:
        losses = model.forward_training(None, features, [logits, deltas], targets)
        grads = torch.autograd.grad(sum(losses.values()), leaves)
    assert [x.stride() for x in grads] == [x.stride() for x in leaves]
    assert [size for size in new.sizes if size >= logits[0].numel() // 2] == [logits[0].numel()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_raw_and_flattened_predictions_give_the_same(model, memory_format):
    """What the head computed, as it is, and as `_transpose_dense_predictions` flattens it."""
    raw = [
        [
            torch.randn(2, 9 * depth, *x.shape[2:]).to(memory_format=memory_format).requires_grad_()
            for x in FEATURES
        ]
        for depth in (3, 4)
    ]
    targets = [instances([[8.0, 8.0, 40.0, 30.0]] * 2, [1, 1]), instances([], [])]
    losses = model.forward_training(None, FEATURES, raw, targets)
    flat = model._transpose_dense_predictions(raw, [3, 4])
    expected = model.losses(model.anchor_generator(FEATURES), *flat, targets)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradients(losses, *raw[0], *raw[1]), gradients(expected, *raw[0], *raw[1])
    )


def test_other_anchor_generators_are_searched_exhaustively(model):
    """A generator that is not Detectron2's may make anchors that are no grid."""

    class Shuffled(DefaultAnchorGenerator):
        def forward(self, features):
            return [boxes[torch.randperm(len(boxes))] for boxes in super().forward(features)]

    model.anchor_generator = Shuffled(
        sizes=[[32], [64], [128], [256], [512]],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[8, 16, 32, 64, 128],
    )
    raw = [
        [torch.randn(1, 3 * depth, *x.shape[2:]).requires_grad_() for x in FEATURES]
        for depth in (3, 4)
    ]
    losses = model.forward_training(None, FEATURES, raw, [instances([[8.0, 8.0, 40.0, 30.0]], [1])])
    assert all(loss.isfinite() for loss in losses.values())


def test_what_is_logged(model, storage):
    """The four figures that tell whether matching works, from a case where they are known."""
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]]))]
    logits = [torch.tensor([[[0.0, -2.0], [1.0, -2.0]]])]
    target = instances([[0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 40.0, 40.0]], [0, 1])
    deltas = [torch.zeros(1, 2, 4)]  # the first anchor is on the first object, nothing on the other
    model.num_classes = 2
    model.losses(anchors, logits, deltas, [target])
    logged = {k: v for k, (v, _) in storage.latest().items()}

    likelihoods, numbers = [], []
    for box, cls in zip(target.gt_boxes.tensor.tolist(), (0, 1)):
        matched = []
        for anchor, row in zip(anchors[0].tensor.tolist(), logits[0][0].tolist()):
            deltas_to = paper.encode(box, anchor, (10, 10, 5, 5))
            distance = sum(paper.smooth_l1(d) for d in deltas_to)
            matched.append(paper.sigmoid(row[cls]) * math.exp(-0.75 * distance))
        odds = [p / (1 - p) for p in matched]
        likelihoods.append(paper.mean_max(matched))
        numbers.append(sum(odds) ** 2 / sum(o * o for o in odds))
    assert 1 < numbers[0] < 1.99
    assert likelihoods[0] > 10 * likelihoods[1]
    assert logged == {
        "freeanchor/objects_per_image": 2.0,
        "freeanchor/bag_likelihood": pytest.approx(sum(likelihoods) / 2, rel=1e-4),
        "freeanchor/anchors_per_bag": pytest.approx(sum(numbers) / 2, rel=1e-4),
        "freeanchor/localized_objects": 0.5,
    }


def test_a_validation_loss_is_not_logged(model, storage):
    """Neither in a hook after the step, nor without gradients, nor in evaluation mode."""
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.5)
    train, val = (
        [{"image": torch.rand(3, 64, 64), "instances": instances([[8.0, 8.0, 40.0, side]], [1])}]
        * 2
        for side in (16.0, 60.0)
    )
    for step, loss_is_first in enumerate((False, True)):
        storage.iter = step
        if loss_is_first:
            with torch.no_grad():
                model(val)
        model(train)
        expected = {k: v for k, v in storage.latest().items() if k.startswith("freeanchor/")}
        assert {i for _, i in expected.values()} == {step}
        model(val)  # a hook that validates in training mode, with gradients
        model.eval()
        model.losses(*predictions(model), [x["instances"] for x in val])
        model.train()
        assert {k: storage.latest()[k] for k in expected} == expected
    assert len(storage.history("freeanchor/bag_likelihood").values()) == 2


def test_a_loss_without_a_storage(model, monkeypatch):
    """A script of the user's own computes losses without one."""

    def none():
        raise AssertionError("get_event_storage() has to be called inside a context")

    monkeypatch.setattr("freeanchor.modeling.bag_detector.get_event_storage", none)
    losses = model.losses(*predictions(model), [instances([[8.0, 8.0, 40.0, 30.0]], [1])] * 2)
    assert all(x.isfinite() for x in losses.values())


def detections(model, image):
    with torch.no_grad():
        (result,) = model.eval()([{"image": image}])
    return result["instances"]


def retinanet_of_the_zoo():
    """Detectron2's own RetinaNet config, as shallow as it goes."""
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model = build_model(cfg)
    make_it_detect(model)
    return model


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_retinanet_checkpoint_gives_retinanets_detections(tmp_path, suffix):
    """Weights of Detectron2's model zoo load by MODEL.WEIGHTS and detect as in RetinaNet.

    With its own scale of the deltas: the zoo's is 1, FreeAnchor's (10, 10, 5, 5).
    """
    retinanet = retinanet_of_the_zoo()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        DetectionCheckpointer(retinanet, str(tmp_path)).save("model")
    else:
        weights = {k: v.numpy() for k, v in retinanet.state_dict().items()}
        path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    cfg = quick_cfg("COCO-Detection/free_anchor_R_50_FPN_1x.yaml")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(path))
    # Of small contrast: random layers without batch norm would make all scores 1, and so ties.
    image = retinanet.pixel_mean + torch.randn(3, 96, 128)
    expected, found = detections(retinanet, image), detections(model, image)
    assert isinstance(found, Instances)
    assert len(expected) > 10
    assert len(expected.scores.unique()) == len(expected)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_losses_on_the_last_gpu(model):
    """On a GPU other than the current one, losses and gradients are those of the CPU."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    anchors, logits, deltas = predictions(model)
    targets = [instances([[8.0, 8.0, 40.0, 30.0]], [1]), instances([], [])]
    expected = model.losses(anchors, logits, deltas, targets)
    losses = model.losses(
        [a.to(device) for a in anchors],
        [x.to(device) for x in logits],
        [x.to(device) for x in deltas],
        [t.to(device) for t in targets],
    )
    for name, loss in losses.items():
        assert loss.device == device
        torch.testing.assert_close(loss.cpu(), expected[name])
    torch.testing.assert_close(
        gradients(losses, *logits, *deltas), gradients(expected, *logits, *deltas)
    )


def _train_step_of_one_process(rank, init_file):
    """A step under DDP, in which the second process has an image without objects."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(build_model(quick_cfg()).train())
    target = instances([[8.0, 8.0, 40.0, 30.0]], [1]) if rank == 0 else instances([], [])
    with EventStorage():
        for _ in range(2):  # the second forward pass fails if a gradient was missing in the first
            losses = model([{"image": torch.rand(3, 160, 160), "instances": target}])
            sum(losses.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    everywhere = [torch.empty_like(gradient) for _ in range(2)]
    torch.distributed.all_gather(everywhere, gradient)
    assert gradient.isfinite().all()
    assert torch.equal(*everywhere)
    torch.distributed.destroy_process_group()


def test_distributed_training_with_an_image_without_objects(tmp_path):
    """Trap 5: no process waits for a gradient that another one does not have."""
    context = torch.multiprocessing.spawn(
        _train_step_of_one_process, args=(tmp_path / "rendezvous",), nprocs=2, join=False
    )
    while not context.join():  # raises what a process raised
        pass
    assert [p.exitcode for p in context.processes] == [0, 0]


def test_matching_is_that_of_the_losses(model, cfg):
    """The probabilities give the positive loss, and the assignment is Detectron2's RetinaNet's."""
    anchors, logits, deltas = predictions(model, dtype=torch.float64)
    targets = [
        instances([[3, 5, 30, 40], [10, 10, 20, 60], [2, 2, 9, 8]], [0, 2, 1]),
        instances([[20, 20, 50, 40]], [1]),
    ]
    matchings = model.match(anchors, logits, deltas, targets)
    prob = torch.cat([x.prob for x in matchings])
    weights = 1 / (1 - prob)
    mean_max = (weights / weights.sum(dim=1, keepdim=True) * prob).sum(dim=1)
    loss = model.losses(anchors, logits, deltas, targets)["loss_positive"]
    torch.testing.assert_close(-mean_max.log().mean() * 0.5, loss)

    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    labels, boxes = build_model(cfg).label_anchors(anchors, targets)
    for found, target, label, box in zip(matchings, targets, labels, boxes):
        assert torch.equal(found.boxes, target.gt_boxes.tensor)
        for i, object_box in enumerate(target.gt_boxes.tensor):
            is_its = (label == target.gt_classes[i]) & (box == object_box).all(dim=1)
            expected = Boxes.cat(anchors).tensor[is_its]
            assert torch.equal(found.assigned[i], expected)
            iou = matching.box_iou(expected, object_box)
            torch.testing.assert_close(found.assigned_iou[i], iou)
        iou = matching.box_iou(found.anchors, target.gt_boxes.tensor[:, None])
        assert (iou.diff(dim=1) <= 1e-6).all()  # bags come from the highest IoU on


def test_matching_of_an_image_without_objects(model):
    """Empty, not an error."""
    anchors, logits, deltas = predictions(model, num_images=1)
    (empty,) = model.match(anchors, logits, deltas, [instances([], [])])
    assert empty.prob.shape == (0, 50)
    assert empty.assigned == []
