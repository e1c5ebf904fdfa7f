"""Backbones of timm: features, what is frozen, training from the configs, wrong names."""

import pytest
import torch
from conftest import instances, quick_cfg
from detectron2.modeling import build_model
from freeanchor.modeling import TimmBackbone

timm = pytest.importorskip("timm")

CONFIGS = {
    "finetune/free_anchor_Lite0_FPN.yaml": (40, 112, 320),
    "timm/free_anchor_ConvNeXt_T_FPN_1x.yaml": (192, 384, 768),
    "timm/free_anchor_Swin_T_FPN_1x.yaml": (192, 384, 768),
    "timm/free_anchor_R_50_FPN_1x.yaml": (512, 1024, 2048),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_train_and_detect(name):
    """Each config of timm learns from images of odd sizes, and its strides are those of anchors."""
    cfg = quick_cfg(name)
    model = build_model(cfg)
    shapes = model.backbone.bottom_up.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == dict(
        zip(("res3", "res4", "res5"), zip(CONFIGS[name], (8, 16, 32)))
    )
    batch = [
        {"image": torch.rand(3, h, w) * 255, "instances": instances([[8, 8, 40, 30]], [1], (h, w))}
        for h, w in ((75, 101), (64, 50))
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-4)
    for _ in range(2):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in trained)
    features = model.eval().backbone(model.preprocess_image(batch[:1]).tensor)
    assert [96 // x.shape[2] for x in features.values()][:3] == [8, 16, 32]
    assert "instances" in model(batch)[0]


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "dla34"])
def test_features_are_those_of_timm(name):
    """The model is timm's own, in its order, at any number of channels of the images."""
    backbone = TimmBackbone(name, in_channels=1).eval()
    other = timm.create_model(name, features_only=True, in_chans=1).eval()
    full = timm.create_model(name, in_chans=1)
    missing, _ = full.load_state_dict(backbone.model.model.state_dict(), strict=False)
    assert len(missing) < 10  # the classifier
    image = torch.randn(1, 1, 64, 96)
    strides = other.feature_info.reduction()
    found = backbone(image)
    with torch.no_grad():
        expected = full.eval().forward_intermediates(image, intermediates_only=True)
    for key, feature in found.items():
        stride = 2 ** int(key.removeprefix("res"))
        assert stride in strides
        assert any(x.shape == feature.shape and torch.allclose(x, feature) for x in expected)


@pytest.mark.filterwarnings("ignore")
def test_padding_is_constant():
    """TensorFlow's padding asks for no size, whose terms hold torch.export up for minutes."""
    backbone = TimmBackbone("tf_efficientnet_lite0").eval()
    assert backbone.size_divisibility == 32  # for sizes that Detectron2 pads to multiples of this
    image = torch.rand(1, 3, 64, 96)
    traced = torch.jit.trace(backbone, image, strict=False, check_trace=False)
    assert "aten::size" not in str(traced.inlined_graph)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto"])
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_frozen_layers(name, freeze_at):
    """Up to the chosen feature nothing changes in a training step; behind it all does."""
    if freeze_at == 5 and name == "convnext_atto":
        freeze_at = 4
    backbone = TimmBackbone(name, freeze_at=freeze_at).train()
    frozen = timm.create_model(name, features_only=True).feature_info.module_name()[:freeze_at]
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    out = backbone(torch.randn(2, 3, 64, 64))
    loss = sum(x.square().mean() for x in out.values())
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    changed = {k.removeprefix("model.model.").replace(".", "_") for k in changed}
    last = frozen[-1].replace(".", "_") if frozen else ""
    assert not any(k.startswith(("conv_stem", "conv1", "stem")) for k in changed) or not freeze_at
    assert not last or not any(k.startswith(f"{last}_") for k in changed)
    assert bool(changed) == (freeze_at < 4)
    if 0 < freeze_at < 4:  # what comes next is trained, with its statistics
        following = timm.create_model(name, features_only=True).feature_info.module_name()
        assert any(k.startswith(following[freeze_at].replace(".", "_")) for k in changed)


def test_frozen_batch_norm():
    """In training it computes as in evaluation; EfficientNets' have an activation, which stays."""
    trained = TimmBackbone("tf_efficientnet_lite0").eval()
    frozen = TimmBackbone("tf_efficientnet_lite0", norm="FrozenBN").train()
    frozen.load_state_dict(trained.state_dict(), strict=False)
    assert not any("num_batches_tracked" in key for key in frozen.state_dict())
    assert not any(x.requires_grad for k, x in frozen.named_parameters() if ".bn" in k)
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(trained(image).values(), frozen(image).values()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no_such_model"}, "no_such_model"),
        ({"name": "mixer_b16_224"}, "strides"),
        ({"name": "inception_v3"}, "not of 288 channels and stride 8"),
        ({"name": "efficientformer_l1"}, "takes no images of any size"),
        ({"name": "resnet18", "out_indices": (9,)}, "9"),
        ({"name": "resnet18", "freeze_at": 7}, "FREEZE_AT must be 0 to 5"),
        ({"name": "resnet18", "norm": "GN"}, "NORM must be FrozenBN or empty"),
        ({"name": "vgg11", "drop_path": 0.1}, "drop_path"),
    ],
)
def test_what_cannot_be_a_backbone(options, message):
    """The message says why."""
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**options)


def test_without_timm(monkeypatch):
    """The message says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        TimmBackbone("resnet18")
