"""FreeAnchor as the first stage of Detectron2's GeneralizedRCNN."""

import pytest
import torch
from conftest import instances, quick_cfg
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.structures import PolygonMasks, pairwise_iou
from freeanchor.errors import FreeAnchorError
from freeanchor.modeling import match_inputs

FASTER = "quick/faster_rcnn_free_anchor_R_18_FPN.yaml"
MASK = "quick/mask_rcnn_free_anchor_R_18_FPN.yaml"
FINETUNE = "finetune/mask_rcnn_free_anchor_Lite0_FPN.yaml"
CASCADE = "TwoStage/cascade_mask_rcnn_free_anchor_R_50_FPN_1x.yaml"
SIZE = (96, 128)


def small(name=FASTER):
    cfg = quick_cfg(name)
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.OUT_CHANNELS = "FrozenBN", 32
    cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = ""
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32, 32
    cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = "", 0
    return cfg


def batch(boxes=((10, 20, 60, 70), (30, 5, 100, 40)), classes=(0, 2), masks=True):
    """Two images: one with objects, and one without."""
    result = []
    for count in (len(boxes), 0):
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
        objects = instances(boxes[:count], classes[:count], SIZE)
        if masks and count:
            corners = [[x, y, x2, y, x2, y2, x, y2] for x, y, x2, y2 in boxes]
            objects.gt_masks = PolygonMasks([[torch.tensor(c).double().numpy()] for c in corners])
        result.append({"image": image, "instances": objects, "height": SIZE[0], "width": SIZE[1]})
    return result


@pytest.fixture(scope="module")
def two_stage():
    torch.manual_seed(0)
    return build_model(small())


def first_stage(model, inputs):
    images = model.preprocess_image(inputs)
    objects = [x["instances"] for x in inputs]
    return model.proposal_generator(images, model.backbone(images.tensor), objects)


def test_losses_are_those_of_one_class(two_stage):
    """Whatever the classes, they are FreeAnchor's with one class, of the same weights."""
    cfg = small("quick/free_anchor_R_18_FPN.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    one_stage = build_model(cfg).train()
    stage = two_stage.train().proposal_generator
    one_stage.head.load_state_dict(stage.detector.head.state_dict())
    state = two_stage.backbone.state_dict()
    one_stage.backbone.load_state_dict(state, strict=False)
    inputs = batch()
    expected = one_stage([{**x, "instances": as_one_class(x["instances"])} for x in inputs])
    for classes in ((0, 2), (1, 1)):
        for x, labels in zip(inputs, (classes, ())):
            x["instances"].gt_classes = torch.tensor(labels, dtype=torch.int64)
        _, losses = first_stage(two_stage, inputs)
        for name in ("positive", "negative"):
            ours, theirs = losses[f"loss_rpn_{name}"], expected[f"loss_{name}"]
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
        assert losses.keys() == {"loss_rpn_positive", "loss_rpn_negative"}


def test_matching_is_that_of_one_class(two_stage):
    """Pictures show the bags of the first stage, whatever the classes: those that it trains."""
    cfg = small("quick/free_anchor_R_18_FPN.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    one_stage = build_model(cfg).eval()
    one_stage.head.load_state_dict(two_stage.proposal_generator.detector.head.state_dict())
    one_stage.backbone.load_state_dict(two_stage.backbone.state_dict(), strict=False)
    inputs = batch()
    expected = [{**x, "instances": as_one_class(x["instances"])} for x in inputs]
    for ours, theirs in zip(
        match_inputs(two_stage.eval(), inputs), match_inputs(one_stage, expected), strict=True
    ):
        torch.testing.assert_close(ours.prob, theirs.prob)
        assert torch.equal(ours.anchors, theirs.anchors)
        assert torch.equal(ours.boxes, theirs.boxes)


def as_one_class(objects):
    return instances(objects.gt_boxes.tensor, [0] * len(objects), objects.image_size)


@pytest.mark.parametrize("training", [True, False])
def test_proposals(two_stage, training):
    """As many as the config says, sorted, inside the image, apart from each other, and finite."""
    model = two_stage.train(training)
    stage = model.proposal_generator
    for topk in (stage.post_nms_topk[1 - training], 7):
        limits = stage.post_nms_topk
        stage.post_nms_topk = tuple(topk if i != training else 10**6 for i in (0, 1))
        proposals, losses = first_stage(model, batch())
        stage.post_nms_topk = limits
        assert bool(losses) == training
        for x in proposals:
            boxes, logits = x.proposal_boxes, x.objectness_logits
            assert 0 < len(x) <= topk
            assert topk > 7 or len(x) == 7
            assert logits.isfinite().all()
            assert torch.equal(logits, logits.sort(descending=True).values)
            assert not boxes.tensor.requires_grad
            assert boxes.tensor.min() >= 0
            assert (boxes.tensor[:, 2:] <= torch.tensor(SIZE).flip(0)).all()
            assert boxes.nonempty().all()
            iou = pairwise_iou(boxes, boxes).fill_diagonal_(0)
            assert iou.max() <= stage.detector.test_nms_thresh
    objects = [x["instances"] for x in batch()]
    with_objects = add_ground_truth_to_proposals(objects, proposals)
    assert [len(x) for x in with_objects] == [7 + 2, 7]


@pytest.mark.parametrize("name", [FASTER, MASK, FINETUNE, CASCADE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_detects(name, dtype):
    """Every parameter gets a finite gradient, also of a batch without objects, and it detects."""
    if name == FINETUNE:
        pytest.importorskip("timm")
    cfg = small(name)
    model = build_model(cfg)
    for inputs in (batch(), batch((), ())):
        model.train().zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            losses = model(inputs)
        assert all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.isfinite().all()
    model.roi_heads.test_score_thresh = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        (found, _) = model.eval()(inputs)
    found = found["instances"]
    assert len(found) > 0
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON
    if cfg.MODEL.MASK_ON:
        assert found.pred_masks.shape[1:] == SIZE


def test_no_proposals(two_stage):
    """With a threshold that none passes, objects train the second stage, and nothing is found."""
    stage = two_stage.proposal_generator.detector
    threshold, stage.test_score_thresh = stage.test_score_thresh, 0.99
    try:
        for inputs in (batch(), batch((), ())):
            proposals, _ = first_stage(two_stage.train(), inputs)
            assert [len(x) for x in proposals] == [0, 0]
            assert all(x.isfinite() for x in two_stage(inputs).values())
        assert [len(x["instances"]) for x in two_stage.eval()(inputs)] == [0, 0]
    finally:
        stage.test_score_thresh = threshold


def test_predictions_that_are_not_finite(two_stage):
    """They are not proposed; the losses tell that the training diverged."""
    stage = two_stage.train().proposal_generator
    bias = stage.detector.head.bbox_pred.bias
    with torch.no_grad():
        before = bias.clone()
        bias[0] = torch.nan
        proposals, losses = first_stage(two_stage, batch())
        bias.copy_(before)
    assert all(x.proposal_boxes.tensor.isfinite().all() for x in proposals)
    assert not all(x.isfinite() for x in losses.values())


@pytest.mark.parametrize("key", ["IGNORE_REGIONS", "INCLUSIVE_CORNERS"])
def test_what_two_stages_do_not_have(key):
    """It is refused by a sentence that names the key."""
    cfg = small()
    cfg.MODEL.FREEANCHOR[key] = True
    with pytest.raises(FreeAnchorError, match=rf"MODEL\.FREEANCHOR\.{key} is of one-stage models"):
        build_model(cfg)
