"""The variants of other implementations, each against Detectron2's and by itself."""

import copy
import math

import pytest
import torch
from conftest import instances, quick_cfg
from detectron2.data import DatasetMapper
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_model
from detectron2.structures import BoxMode
from freeanchor.data import Mapper
from freeanchor.errors import FreeAnchorError
from freeanchor.layers import ops
from freeanchor.modeling import match_inputs
from freeanchor.modeling.backbone import check_deformable
from PIL import Image
from torch.nn import functional as F


def build(*options, config="free_anchor"):
    # With batch norm, which one small image is too little for.
    cfg = quick_cfg(f"quick/{config}_R_18_FPN.yaml")
    for key in ("MODEL.FPN.NORM", "MODEL.RETINANET.NORM"):
        cfg.merge_from_list([key, ""])
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "FrozenBN", *options])
    return build_model(cfg).eval()


@torch.no_grad()
def features(model, seed=0):
    torch.manual_seed(seed)
    return model.backbone(torch.randn(1, 3, 64, 96))


def test_defaults_are_detectron2s():
    """With the default keys, the backbone computes what Detectron2's own computes."""
    ours = build()
    theirs = build("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone")
    theirs.load_state_dict(ours.state_dict())
    expected = features(theirs)
    assert all(torch.equal(x, expected[k]) for k, x in features(ours).items())


@pytest.mark.parametrize("p6_from", ["res5", "p5"])
@pytest.mark.parametrize("relu", [True, False])
def test_top_levels(p6_from, relu):
    """P6 and P7 are the convolutions of what the keys name."""
    model = build("MODEL.FREEANCHOR.P6_IN_FEATURE", p6_from, "MODEL.FREEANCHOR.P7_RELU", relu)
    found = features(model)
    torch.manual_seed(0)
    with torch.no_grad():
        bottom_up = model.backbone.bottom_up(torch.randn(1, 3, 64, 96))
        block = model.backbone.top_block
        source = found["p5"] if p6_from == "p5" else bottom_up["res5"]
        p6 = F.conv2d(source, block.p6.weight, block.p6.bias, stride=2, padding=1)
        p7 = F.conv2d(p6.relu() if relu else p6, block.p7.weight, block.p7.bias, 2, 1)
    torch.testing.assert_close(found["p6"], p6)
    torch.testing.assert_close(found["p7"], p7)
    assert model.backbone.output_shape()["p7"].stride == 128


def test_normalised_top_levels():
    """As P3 to P5: the convolutions of what the keys name, without a bias, and the norm."""
    model = build(
        *("MODEL.FREEANCHOR.P6P7_NORM", True, "MODEL.FREEANCHOR.P7_RELU", False),
        *("MODEL.FPN.NORM", "GN"),
    )
    block = model.backbone.top_block
    for conv, like in ((block.p6, model.backbone.fpn_output5), (block.p7, block.p6)):
        assert type(conv.norm) is type(like.norm) is torch.nn.GroupNorm
        assert conv.norm.num_groups == like.norm.num_groups
        assert conv.bias is None
        torch.nn.init.normal_(conv.norm.weight)
    found = features(model)
    torch.manual_seed(0)
    with torch.no_grad():
        source = model.backbone.bottom_up(torch.randn(1, 3, 64, 96))["res5"]
        for name, conv in (("p6", block.p6), ("p7", block.p7)):
            source = conv.norm(F.conv2d(source, conv.weight, None, 2, 1))
            torch.testing.assert_close(found[name], source)
    assert model.backbone.output_shape()["p7"].stride == 128


def test_unknown_source_of_p6():
    """The two that there are, are named."""
    with pytest.raises(ValueError, match="must be res5 or p5, got 'res4'"):
        build("MODEL.FREEANCHOR.P6_IN_FEATURE", "res4")


@pytest.mark.parametrize(
    ("key", "value"), [("P6_IN_FEATURE", "p5"), ("P7_RELU", False), ("P6P7_NORM", True)]
)
def test_backbone_that_ignores_the_keys(key, value):
    """Weights that need them would detect something else, without a word."""
    name = ("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone")
    with pytest.raises(ValueError, match="set it to build_freeanchor_resnet_fpn_backbone"):
        build(*name, f"MODEL.FREEANCHOR.{key}", value)


def rounded_generator():
    cfg = quick_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RoundedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    return build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in (8, 16, 32, 64, 128)])


def test_rounded_anchors():
    """Shapes that are known from Faster R-CNN: of 8 pixels, 11 x 6, 8 x 8 and 6 x 12, enlarged."""
    boxes = rounded_generator()([torch.zeros(1, 1, 2, 3)] * 5)[0].tensor.view(2, 3, 3, 3, 4)
    for size in range(3):
        for ratio, (width, height) in enumerate(((11, 6), (8, 8), (6, 12))):
            half = torch.tensor([width, height]) * 4 * 2 ** (size / 3) / 2
            for y in range(2):
                for x in range(3):
                    center = torch.tensor([8.0 * x + 4, 8.0 * y + 4])
                    expected = torch.cat([center - half, center + half])
                    torch.testing.assert_close(boxes[y, x, size, ratio], expected)


def test_rounded_anchors_are_searched_as_grids(monkeypatch):
    """They get the fast search, with the bags of the search through all anchors."""
    model = build(
        *("MODEL.ANCHOR_GENERATOR.NAME", "RoundedAnchorGenerator"),
        *("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
    ).train()
    shapes = []

    def search(levels, boxes, k):
        shapes.extend(x.dim() for x in levels)
        bag = ops.iou_topk(levels, boxes, k)
        assert torch.equal(bag, ops.iou_topk([x.reshape(-1, 4) for x in levels], boxes, k))
        return bag

    monkeypatch.setattr("freeanchor.modeling.bag_detector.iou_topk", search)
    target = instances([[5, 5, 40, 60], [70, 8, 90, 20]], [0, 2])
    model([{"image": torch.zeros(3, 96, 128), "instances": target}])
    assert shapes == [4] * 5


def inclusive(x, scale):
    """The paper's repository: from a box in Detectron2's convention, and back, through resizing."""
    x1, x2 = x[0] * scale, (x[0] + max(x[1] - x[0] - 1, 0)) * scale
    return x1, x2 + 1


@pytest.mark.parametrize("config", ["free_anchor", "ltm", "ltm_af"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.75])
def test_inclusive_corners_in_training(monkeypatch, scale, config):
    """Ground truth is what the repository's `resize` makes of it, and the input is left alone."""
    original, width, height = [10.0, 20.0, 30.0, 20.4], int(64 * scale), int(48 * scale)
    target = instances([[v * scale for v in original]], [1], (height, width))
    batch = [{"image": torch.zeros(3, height, width), "instances": target}]
    batch[0].update(width=64, height=48)
    before = copy.deepcopy(target.gt_boxes.tensor)
    model = build("MODEL.FREEANCHOR.INCLUSIVE_CORNERS", True, config=config).train()
    seen, losses = [], model.losses

    def spy(anchors, logits, deltas, gt_instances):
        seen.extend(x.gt_boxes.tensor for x in gt_instances)
        return losses(anchors, logits, deltas, gt_instances)

    monkeypatch.setattr(model, "losses", spy)
    assert all(x.isfinite() for x in model(batch).values())
    (x1, x2), (y1, y2) = inclusive((10, 30), scale), inclusive((20, 20.4), scale)
    # 0.4 pixels are less than one, which is as little as the repository has
    expected = torch.tensor([[x1, y1, x2, max(y2, y1 + 1)]])
    torch.testing.assert_close(seen[0], expected)
    assert torch.equal(target.gt_boxes.tensor, before)
    # Pictures show that matching.
    (matching,) = match_inputs(model.eval(), batch)
    torch.testing.assert_close(matching.boxes, expected)


def test_inclusive_corners_after_a_crop(monkeypatch, tmp_path):
    """The factor is that of the resizing, whatever was cut away before; without it, an error."""
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    box = {"bbox": [24, 20, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    record = {"file_name": str(tmp_path / "image.png"), "width": 64, "height": 48, "image_id": 1}
    record["annotations"] = [box]
    model = build("MODEL.FREEANCHOR.INCLUSIVE_CORNERS", True, "INPUT.CROP.ENABLED", True).train()
    model.config.INPUT.CROP.TYPE, model.config.INPUT.CROP.SIZE = "absolute", [40, 50]
    model.config.INPUT.MIN_SIZE_TRAIN, seen = (100,), []
    losses = model.losses

    def spy(anchors, logits, deltas, gt_instances):
        seen.extend(x.gt_boxes.tensor for x in gt_instances)
        return losses(anchors, logits, deltas, gt_instances)

    monkeypatch.setattr(model, "losses", spy)
    image = Mapper(model.config, is_train=True)(copy.deepcopy(record))
    assert image["image"].shape[1:] == (100, 125)
    model([image])
    (size,) = (seen[0][:, 2:] - seen[0][:, :2]).tolist()
    assert size == pytest.approx([(20 - 1) * 2.5 + 1, (10 - 1) * 2.5 + 1])
    image = DatasetMapper(model.config, is_train=True)(copy.deepcopy(record))
    with pytest.raises(ValueError, match=r"INCLUSIVE_CORNERS with INPUT\.CROP needs"):
        model([image])


@pytest.mark.parametrize(
    ("scale", "config"),
    [*((x, "free_anchor") for x in (0.5, 1.0, 1.75)), (0.5, "ltm"), (0.5, "ltm_af")],
)
def test_inclusive_corners_in_inference(scale, config):
    """Detections are those of the repository: they undo what training does."""
    options = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.NMS_THRESH_TEST", 0.3)
    plain = build(*options, config=config)
    ours = build(*options, "MODEL.FREEANCHOR.INCLUSIVE_CORNERS", True, config=config)
    ours.load_state_dict(plain.state_dict())
    height, width = int(480 * scale), int(640 * scale)
    image = torch.randint(0, 256, (3, height, width)).float()
    batch = [{"image": image, "height": 480, "width": 640}]
    with torch.no_grad():
        expected = plain([{"image": image}])[0]["instances"].pred_boxes.tensor  # network size
        found = ours(batch)[0]["instances"].pred_boxes.tensor
    x1, y1, x2, y2 = expected.unbind(1)
    expected = torch.stack(
        [x1 / scale, y1 / scale, (x2 - 1) / scale + 1, (y2 - 1) / scale + 1], dim=1
    )
    limit = torch.tensor([640.0, 480.0, 640.0, 480.0])
    torch.testing.assert_close(found, torch.minimum(expected, limit), rtol=1e-5, atol=1e-3)
    assert len(found) > 50
    assert not math.isclose(scale, 1) or torch.equal(found, expected)


def test_models_with_default_keys_have_no_hooks():
    """The variant costs nothing where it is not asked for."""
    model = build()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolutions(modulated, training):
    """They are refused on a CPU where Detectron2's cannot be computed, and only there."""
    cfg = quick_cfg()
    small = ["DEPTH", "50", "STEM_OUT_CHANNELS", "4", "RES2_OUT_CHANNELS", "8"]
    small += ["WIDTH_PER_GROUP", "4", "NORM", "FrozenBN"]
    small += ["DEFORM_ON_PER_STAGE", "[False, False, False, True]", "DEFORM_MODULATED", modulated]
    cfg.MODEL.RESNETS.merge_from_list(small)
    model = build_model(cfg).backbone.bottom_up
    try:
        x = model(torch.zeros(1, 3, 64, 64))["res5"]
        if training:
            x.sum().backward()
        is_computed = True
    except NotImplementedError:
        is_computed = False
    if is_computed:
        check_deformable(cfg, training)
    else:
        with pytest.raises(FreeAnchorError, match="deformable convolution needs a GPU"):
            check_deformable(cfg, training)
