"""Models for inference detect what they did before."""

import copy

import pytest
import torch
from conftest import assert_same, make_it_detect, quick_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from freeanchor.modeling import fold_batch_norm, optimize_inference


@pytest.fixture(scope="module", params=["BN", "FrozenBN"])
def model(request):
    cfg = quick_cfg()
    cfg.MODEL.RESNETS.NORM = request.param
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for norm in model.modules():  # as trained ones are
            is_norm = isinstance(norm, (FrozenBatchNorm2d, torch.nn.BatchNorm2d))
            if is_norm and norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.2, 0.2)
                norm.running_var.uniform_(0.5, 1.5)
    make_it_detect(model)
    return model


@torch.no_grad()
def outputs(model):
    """Raw outputs and detections of an image."""
    torch.manual_seed(0)
    inputs = [{"image": torch.rand(3, 96, 128) * 255}]
    features = model.backbone(model.preprocess_image(inputs).tensor)
    logits, deltas = model.head([features[x] for x in model.head_in_features])
    return [*logits, *deltas], model(inputs)[0]["instances"]


def test_fold_batch_norm(model):
    """Nothing changes but rounding, and no norm is left in backbone and pyramid."""
    folded = copy.deepcopy(model)
    fold_batch_norm(folded)
    for a, b in zip(outputs(folded)[0], outputs(model)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not any("Norm" in type(x).__name__ for x in folded.backbone.modules())


@pytest.mark.parametrize("channels_last", [False, True])
def test_float32(model, channels_last):
    """In both memory layouts, the detections are the same."""
    fast = copy.deepcopy(model)
    optimize_inference(fast, channels_last=channels_last)
    found, expected = outputs(fast)[1], outputs(model)[1]
    assert len(expected) > 10
    assert_same(found, expected)


def test_bfloat16(model):
    """Raw outputs are near, scores and boxes come in float32."""
    fast = copy.deepcopy(model)
    optimize_inference(fast, torch.bfloat16, channels_last=True)
    raw, found = outputs(fast)
    for a, b in zip(raw, outputs(model)[0], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().mean() < 0.05 * b.abs().mean()
    assert len(found) > 10
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
