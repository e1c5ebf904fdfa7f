"""Mixed precision, memory layout and compilation: what is chosen, and what it may not change."""

import copy
import itertools
import logging

import pytest
import torch
from conftest import instances, make_it_detect, quick_cfg
from detectron2.config import defaults
from detectron2.structures import Boxes
from freeanchor.engine import Trainer, precision
from freeanchor.engine.step import TrainStep
from freeanchor.errors import FreeAnchorError
from freeanchor.modeling import precision as choice
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

KEYS = "SOLVER.AMP.ENABLED", "SOLVER.AMP.PRECISION", "MODEL.DEVICE"
BF16 = "AVX512-BF16"
MIXED = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"]


def configure(cfg, *options):
    cfg.merge_from_list(options)
    return cfg


@pytest.mark.parametrize("value", [None, "", "highest", "high", "medium"])
@pytest.mark.parametrize("gpu", [True, False])
def test_float32_of_gpus(cfg, monkeypatch, value, gpu):
    """Detectron2's key, where it has one, is PyTorch's setting, and of GPUs alone."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    before = torch.backends.cudnn.allow_tf32
    if value is not None:
        cfg["FLOAT32_PRECISION"] = value
    precision.set_float32_precision(cfg)
    assert chosen == ([value] if value and gpu else [])
    expected = value != "highest" if value and gpu else before
    assert torch.backends.cudnn.allow_tf32 == expected


def test_float32_of_a_run(tiny, monkeypatch):
    """The command line knows the key where Detectron2 does, and refuses what PyTorch would."""
    monkeypatch.setitem(defaults._C, "FLOAT32_PRECISION", "")
    chosen = []
    monkeypatch.setattr(
        "freeanchor.engine.defaults.set_float32_precision",
        lambda cfg: chosen.append(cfg.FLOAT32_PRECISION),
    )
    tiny("SOLVER.MAX_ITER", "1", "FLOAT32_PRECISION", "high")
    assert chosen == ["high"]
    with pytest.raises(SystemExit) as error:
        tiny("FLOAT32_PRECISION", "fast", output="other")
    assert "FLOAT32_PRECISION must be highest, high, medium or empty, got fast" in str(error.value)


def batch(count=2, size=96):
    """Images with two objects each, and one without."""
    boxes = [[8.0, 8.0, 60.0, 40.0], [30.0, 20.0, 50.0, 90.0]]
    targets = [instances(boxes, [0, 2], (size, size)) for _ in range(count - 1)]
    return [
        {"image": torch.randint(256, (3, size, size), dtype=torch.uint8), "instances": x}
        for x in (*targets, instances([], [], (size, size)))
    ]


def build_step(cfg, data):
    torch.manual_seed(1)
    model = Trainer.build_model(cfg)
    return TrainStep(cfg, model, itertools.repeat(data), Trainer.build_optimizer(cfg, model))


@pytest.mark.parametrize(
    ("enabled", "wanted", "device", "cpu", "dtype"),
    [
        (False, "auto", "cpu", BF16, torch.float32),
        (False, "bfloat16", "cpu", BF16, torch.float32),
        (True, "auto", "cpu", BF16, torch.bfloat16),
        (True, "auto", "cpu", "", torch.float32),
        (True, "bfloat16", "cpu", "", torch.bfloat16),
        (True, "float16", "cpu", BF16, torch.float32),  # a run that was on a GPU before
        (False, "auto", "cuda", BF16, torch.float32),
        (True, "auto", "cuda", BF16, torch.float16),  # what Detectron2 means by ENABLED
        (True, "float16", "cuda", "", torch.float16),
        (True, "bfloat16", "cuda", "", torch.bfloat16),
    ],
)
def test_choice(cfg, monkeypatch, enabled, wanted, device, cpu, dtype):
    """By the keys and what the device can do; the context of the forward pass follows."""
    monkeypatch.setattr(choice, "bfloat16_instructions", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    configure(cfg, *itertools.chain(*zip(KEYS, (enabled, wanted, device))))
    chosen = choice.choose_precision(cfg, enabled)
    assert chosen.dtype == dtype
    if device == "cpu":
        x = torch.ones(2, 2)
        with precision.autocast(cfg):
            assert (x @ x).dtype == dtype
        if enabled and wanted != "float16":
            assert (cpu or "neither AMX nor AVX512-BF16") in chosen.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.AMP.PRECISION", "half"], "must be auto, bfloat16 or float16, got 'half'"),
        (["MODEL.DEVICE", "cuda", *MIXED], "this GPU cannot compute in it"),
        (["MODEL.MEMORY_FORMAT", "nhwc"], "auto, contiguous or channels_last, got 'nhwc'"),
    ],
)
def test_refused(cfg, monkeypatch, options, message):
    """What a device cannot do, and unknown values, are errors that say what to set."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(FreeAnchorError, match=message):
        precision.optimize(configure(cfg, *options), torch.nn.Identity())


def test_instructions(monkeypatch):
    """AMX first, and none on a PyTorch that cannot tell."""
    questions = "_is_amx_tile_supported", "_is_avx512_bf16_supported"
    for answers, expected in (
        ((True, True), "AMX"),
        ((False, True), BF16),
        ((False, False), ""),
        ((None, None), ""),
    ):
        for question, answer in zip(questions, answers):
            if answer is None:
                monkeypatch.delattr(torch.cpu, question)
            else:
                monkeypatch.setattr(torch.cpu, question, lambda a=answer: a, raising=False)
        assert choice.bfloat16_instructions() == expected


@pytest.mark.parametrize("enabled", [False, True])
def test_layout_and_log(cfg, monkeypatch, caplog, enabled):
    """By default channels-last where bfloat16 is computed, and nothing changes elsewhere."""
    monkeypatch.setattr(choice, "bfloat16_instructions", lambda: BF16)
    with caplog.at_level(logging.INFO, logger="freeanchor"):
        model = Trainer.build_model(configure(cfg, "SOLVER.AMP.ENABLED", enabled))
    expected = torch.channels_last if enabled else torch.contiguous_format
    weights = [x for x in model.parameters() if x.dim() == 4]
    assert all(x.is_contiguous(memory_format=expected) for x in weights)
    chosen = ("bfloat16", "channels_last") if enabled else ("float32", "contiguous")
    assert f"Convolutions in {chosen[0]}, as" in caplog.text
    assert f"memory format {chosen[1]};" in caplog.text


def test_off_changes_no_bit(cfg):
    """With the keys at their defaults, a step gives the bits of plain PyTorch in float32."""
    data = batch()
    step = build_step(cfg, data)
    model = copy.deepcopy(step.model)
    optimizer = Trainer.build_optimizer(cfg, model)
    for _ in range(2):
        step.run_step()
        optimizer.zero_grad()
        sum(model(data).values()).backward()
        optimizer.step()
    for (name, one), other in zip(step.model.state_dict().items(), model.state_dict().values()):
        assert torch.equal(one, other), name


def round_to_bfloat16(model):
    """The convolutions' weights, which is one of the roundings of mixed precision."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 4:
                weight.copy_(weight.bfloat16())


@pytest.mark.parametrize("depth", [18, 50])
def test_gradients_differ_by_rounding(cfg, depth):
    """Of the whole model: not more than some times as much as for rounded weights in float32.

    How much that is depends on the depth, as each ReLU near 0 may open or close: from 1 % at the
    end of the head to 40 % in the first layers of a random ResNet-18.
    """
    if depth == 50:  # frozen batch norm, and no norm in FPN and head
        configure(cfg, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
        configure(cfg, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")
        configure(cfg, "MODEL.RETINANET.NORM", "")
    data = batch()
    exact, rounded = build_step(cfg.clone(), data), build_step(cfg.clone(), data)
    mixed = build_step(configure(cfg, *MIXED), data)
    round_to_bfloat16(rounded.model)
    losses = [step.forward_backward(data) for step in (exact, mixed, rounded)]
    for name, loss in losses[1].items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, losses[0][name], rtol=0.02, atol=1e-4)
    for part in ("head.cls_score", "head.bbox_pred", "head.", "backbone.fpn", "backbone."):
        gradients = []
        for step in (exact, rounded, mixed):
            named = [(k, x.grad) for k, x in step.model.named_parameters() if x.grad is not None]
            assert all(x.dtype == torch.float32 for _, x in named)
            gradients.append(torch.cat([x.flatten() for k, x in named if k.startswith(part)]))
        bound = 4 * (gradients[1] - gradients[0]).norm()
        assert (gradients[2] - gradients[0]).norm() < bound, part


def test_gradients_of_the_losses(cfg):
    """Those of bfloat16 predictions are those of the same numbers in float32, rounded."""
    model = Trainer.build_model(cfg)
    data = batch(3, 128)
    images = model.preprocess_image(data)
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    outputs = [[x.detach().bfloat16() for x in levels] for levels in model.head(features)]
    targets = [x["instances"] for x in data]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        levels = [[x.to(dtype).requires_grad_() for x in kind] for kind in outputs]
        losses = model.forward_training(images, features, levels, targets)
        sum(losses.values()).backward()
        found.append((losses, [x.grad for kind in levels for x in kind]))
    (exact, expected), (losses, gradients) = found
    for name, loss in losses.items():
        torch.testing.assert_close(loss, exact[name], rtol=1e-6, atol=0)
    for one, other in zip(expected, gradients):
        assert other.dtype == torch.bfloat16
        # Two roundings, where the gradient of a bag is added to that of the background.
        torch.testing.assert_close(other.float(), one, rtol=2**-7, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_gradients_on_small_maps(cfg, size, layout):
    """All of a weight's gradient is written, also where the kernel reaches past the map."""
    layers = [nn.Conv2d(8, 64, k, stride=2, padding=k // 2) for k in (1, 3, 7)]
    model = nn.ModuleDict({"backbone": nn.ModuleList(layers)})
    exact = copy.deepcopy(layers)
    precision.optimize(configure(cfg, *MIXED, "MODEL.MEMORY_FORMAT", layout), model)
    x = torch.randn(2, 8, *size).bfloat16()
    for layer, other in zip(layers, exact):
        with precision.autocast(cfg):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        grad = torch.randn_like(y)
        for _ in range(3):  # what is freed here is what is not written there
            torch.full((layer.weight.numel(),), torch.nan, dtype=torch.bfloat16)
            layer.weight.grad = None
            y.backward(grad, retain_graph=True)
            expected = torch.autograd.grad(other(x.float()), other.weight, grad.float())[0]
            torch.testing.assert_close(layer.weight.grad, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    ("layer", "size", "exact"),
    [
        (nn.Conv2d(8, 8, 1, stride=2), 9, True),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), 2, True),
        (nn.Conv2d(16, 8, 1, stride=2), 9, False),
        (nn.Conv2d(8, 8, 1), 9, False),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), 3, False),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), 9, True),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), 9, True),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 9, False),
        (nn.Conv2d(16, 16, 5, padding=2, groups=4), 9, False),
    ],
)
def test_float32_where_bfloat16_is_unsafe_or_slow(cfg, layer, size, exact):
    """There the weights are not rounded, and elsewhere they are."""
    layer = copy.deepcopy(layer)
    x = torch.randn(2, layer.in_channels, size, size).bfloat16()
    expected = layer(x.float())
    precision.optimize(configure(cfg, *MIXED), layer)

    def is_exact():  # but for the last rounding; sums near zero tell rounded weights
        error = (layer(x).float() - expected).abs()
        return bool((error <= 2**-8 * expected.abs() + 1e-5).all())

    with precision.autocast(cfg):
        assert is_exact() == exact
        if layer.groups > 1:  # which is slow in the backward pass alone
            with torch.no_grad():
                assert not is_exact()


@pytest.mark.parametrize("channels", [64, 512])
def test_group_norm(cfg, channels):
    """In channels-last, values, gradients and the layout of the output are those of PyTorch's."""
    layer = nn.GroupNorm(32, channels)
    nn.init.normal_(layer.weight)
    other = copy.deepcopy(layer)
    precision.optimize(configure(cfg, "MODEL.MEMORY_FORMAT", "channels_last"), layer)
    x = torch.randn(2, channels, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    y, expected = layer(x), other(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for one, two in zip(
        torch.autograd.grad(y, (x, *layer.parameters()), grad),
        torch.autograd.grad(expected, (x, *other.parameters()), grad),
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


class _LargeFloats(TorchDispatchMode):
    """Notes operators that give float32 tensors of a size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= self.size:
                self.found.append(str(func))
        return result


def test_no_copy_of_the_logits(cfg):
    """The losses and their gradients read and write bfloat16: nothing as large is in float32."""
    model = Trainer.build_model(cfg)
    images = model.preprocess_image(batch(size=128))
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    levels = [[x.detach().bfloat16().requires_grad_() for x in p] for p in model.head(features)]
    targets = [x["instances"] for x in batch(size=128)]
    with _LargeFloats(levels[0][0].numel()) as floats:
        sum(model.forward_training(images, features, levels, targets).values()).backward()
    assert levels[0][0].grad.dtype == torch.bfloat16
    assert floats.found == []


def test_inference_in_float32_or_mixed(cfg):
    """TEST.AMP: boxes and scores are float32, near those of float32; without it they are those."""
    configure(cfg, *MIXED, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.2)
    model = Trainer.build_model(cfg)
    make_it_detect(model)
    data = batch(1, 128)
    with torch.no_grad():
        expected = model(data)[0]["instances"]
        found = {}
        for enabled in (False, True):
            configure(cfg, "TEST.AMP.ENABLED", enabled)
            with precision.inference_autocast(cfg, model):
                found[enabled] = model(data)[0]["instances"]
    assert torch.equal(found[False].scores, expected.scores)
    mixed = found[True]
    assert mixed.scores.dtype == mixed.pred_boxes.tensor.dtype == torch.float32
    assert not torch.equal(mixed.scores, mixed.scores.bfloat16().float())
    assert not torch.equal(mixed.scores, expected.scores)
    torch.testing.assert_close(mixed.scores[:10], expected.scores[:10], rtol=0.05, atol=0.02)
    assert not model.head._forward_hooks


def test_second_stage_at_positions_in_float32():
    """Pooled features, and masks that are found, lie where the boxes do: no step of bfloat16."""
    cfg = configure(quick_cfg("quick/mask_rcnn_free_anchor_R_18_FPN.yaml"), *MIXED)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 3, 0.0
    configure(cfg, "TEST.AMP.ENABLED", True)
    model = Trainer.build_model(cfg).eval()
    features = [torch.randn(1, 2, 1024 // s, 1024 // s).bfloat16() for s in (4, 8, 16, 32)]
    corners = torch.rand(50, 2) * 900
    boxes = Boxes(torch.cat([corners, corners + 10 + torch.rand(50, 2) * 100], dim=1))
    for name in ("box_pooler", "mask_pooler"):
        pooler = getattr(model.roi_heads, name)
        expected = pooler([x.float() for x in features], [boxes])
        with precision.autocast(cfg):
            pooled = pooler(features, [boxes])
        assert pooled.dtype == torch.bfloat16
        assert torch.equal(pooled, expected.bfloat16())
    with torch.no_grad(), precision.inference_autocast(cfg, model):
        (found,) = model.inference(batch(1), do_postprocess=False)
    assert len(found) > 0
    assert found.pred_masks.dtype == torch.float32


def test_compile_keeps_names_and_values(cfg):
    """Checkpoints, averages and losses are those of the model that is not compiled."""
    data = batch()
    plain, compiled = (
        build_step(configure(cfg.clone(), "MODEL.COMPILE", x), data) for x in (False, True)
    )
    assert compiled.model.backbone._compiled_call_impl is not None
    assert compiled.model.head._compiled_call_impl is not None
    with torch.compiler.set_stance("force_eager"):  # the compiler takes minutes
        losses = [step.forward_backward(data) for step in (plain, compiled)]
    assert losses[0] == losses[1]
    average = copy.deepcopy(compiled.model)  # of SOLVER.EMA_DECAY
    for model in (compiled.model, average):
        assert model.state_dict().keys() == plain.model.state_dict().keys()
