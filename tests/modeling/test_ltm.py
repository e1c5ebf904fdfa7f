"""LTM as a whole: losses, refusals, and what works for it as for FreeAnchor."""

import paper_ltm
import pytest
import torch
from conftest import instances, make_it_detect, quick_cfg
from detectron2.engine.defaults import DefaultPredictor
from detectron2.modeling import RetinaNet, build_model
from detectron2.structures import Boxes
from freeanchor.checkpoint import Checkpointer
from freeanchor.deploy.graph import Detector
from freeanchor.layers.ltm import matched_in_bag
from freeanchor.layers.matching import box_iou, decode_boxes
from freeanchor.modeling import LTM, BagDetector, FreeAnchor, box_coding, match_inputs

FEATURES = [torch.zeros(1, 1, 8 >> i or 1, 8 >> i or 1) for i in range(5)]  # of 64 x 64 pixels
KINDS = ["ltm", "ltm_af"]
OBJECTS = [
    # Two that share anchors and their class, one of another class on them, and a small one.
    ([[8, 8, 40, 30], [9, 8, 41, 32], [8, 8, 40, 31], [50, 50, 57, 60]], [1, 1, 0, 2]),
    ([[10, 4, 14, 60]], [2]),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def cfg(kind):
    return quick_cfg(f"quick/{kind}_R_18_FPN.yaml")


@pytest.fixture
def model(cfg):
    return build_model(cfg)


def predictions(model, dtype=torch.float64, features=FEATURES, num_images=2):
    """Anchors, logits and deltas (N, H, W, A, .); distances about as large as the objects."""
    anchors = model.anchor_generator(features)
    result = []
    for depth in (3, 4):
        shapes = [
            (num_images, *x.shape[2:], len(a) // x[0, 0].numel(), depth)
            for x, a in zip(features, anchors)
        ]
        levels = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        if depth == 4 and box_coding(model.box2box_transform) is None:
            levels = [level.abs() * 16 / 8 / 2**i + 0.05 for i, level in enumerate(levels)]
        result.append([level.to(dtype).requires_grad_() for level in levels])
    return anchors, *result


def targets(objects=OBJECTS):
    return [instances(*x) for x in objects]


def expected_losses(model, anchors, logits, deltas, objects):
    """The transcription's, of what the model has."""
    is_points = box_coding(model.box2box_transform) is None
    points = None
    if is_points:
        points = [
            (float(a.tensor[0, 2] - a.tensor[0, 0]), a.get_centers().tolist()) for a in anchors
        ]
    flat = [torch.cat([x.flatten(1, 3) for x in levels], 1) for levels in (logits, deltas)]
    return paper_ltm.losses(
        Boxes.cat(anchors).tensor.double().tolist(),
        *flat,
        [[[float(x) for x in box] for box in boxes] for boxes, _ in objects],
        [classes for _, classes in objects],
        weight=5.5 if is_points else 0.5,
        box_weights=None if is_points else (10, 10, 5, 5),
        points=points,
    )


def _number(value):
    return value.item() if torch.is_tensor(value) else value


NAMES = ("loss_positive", "loss_negative", "loss_background")


@pytest.mark.parametrize("objects", [OBJECTS, [OBJECTS[0], ([], [])], [([], []), ([], [])]])
def test_losses_are_the_papers(model, objects):
    """Values and both gradients are those of the transcription, in float64."""
    anchors, logits, deltas = predictions(model)
    losses = model.losses(anchors, logits, deltas, targets(objects))
    expected = expected_losses(model, anchors, logits, deltas, objects)
    assert tuple(losses) == NAMES
    for loss, value in zip(losses.values(), expected):
        assert loss.item() == pytest.approx(_number(value), rel=1e-9, abs=1e-15)
    leaves = [*logits, *deltas]
    ours = torch.autograd.grad(sum(losses.values()), leaves)
    theirs = torch.autograd.grad(sum(expected), leaves, allow_unused=True, materialize_grads=True)
    for mine, their in zip(ours, theirs):
        torch.testing.assert_close(mine, their, rtol=1e-8, atol=1e-12)


def test_fewer_candidates_than_a_bag_holds(model):
    """Of an image of one cell per level there are as many as there are."""
    features = [torch.zeros(1, 1, 1, 1)] * 5
    anchors, logits, deltas = predictions(model, features=features, num_images=1)
    objects = [([[0, 0, 30, 20]], [1])]
    k = min(40, sum(map(len, anchors)))
    assert model.match(anchors, logits, deltas, targets(objects))[0].prob.shape == (1, k)
    losses = model.losses(anchors, logits, deltas, targets(objects))
    expected = expected_losses(model, anchors, logits, deltas, objects)
    for loss, value in zip(losses.values(), expected):
        assert loss.item() == pytest.approx(_number(value), rel=1e-9)


def test_bag_of_one(cfg):
    """The best of its bag is matched: no precision loss, where the authors' code gives NaN."""
    cfg.MODEL.FREEANCHOR.PRE_ANCHOR_TOPK = 1
    model = build_model(cfg)
    anchors, logits, deltas = predictions(model)
    losses = model.losses(anchors, logits, deltas, targets([OBJECTS[1], ([], [])]))
    assert losses["loss_negative"].item() == 0
    assert not any(x.any() for x in torch.autograd.grad(losses["loss_negative"], logits))


def test_no_gradient_of_deltas_but_through_the_likelihood(model):
    """P{a in A+} has none."""
    anchors, logits, deltas = predictions(model)
    losses = model.losses(anchors, logits, deltas, targets())
    rest = losses["loss_negative"] + losses["loss_background"]
    grads = torch.autograd.grad(rest, deltas, allow_unused=True)
    assert all(x is None or not x.any() for x in grads)


@pytest.mark.parametrize("region", [None, [[0, 0, 12, 12]]])
def test_gradient_of_the_whole_loss(model, monkeypatch, region):
    """That of differences, of all three terms together, with P{a in A+} as it is.

    Of objects that share candidates and of an image without any, with and without a region.
    """
    features = [torch.zeros(1, 1, *size) for size in ((2, 1), (1, 1), (1, 1), (1, 1), (1, 1))]
    anchors, logits, deltas = predictions(model, features=features)
    objects = targets([([[2, 3, 14, 20], [1, 4, 14, 22], [3, 3, 12, 18]], [1, 1, 0]), ([], [])])
    regions = [None, None if region is None else torch.tensor(region, dtype=torch.float32)]
    bags = model._bags(anchors, logits, deltas, objects)
    predicted = decode_boxes(
        model._bag_deltas(bags, deltas), bags.anchors, box_coding(model.box2box_transform)
    )
    found = matched_in_bag(box_iou(bags.objects.boxes[:, None], predicted), model._pairs(bags))
    assert 0 < found[1].sum() < found[1].numel()  # some pairs are of two objects
    monkeypatch.setattr("freeanchor.modeling.ltm.matched_in_bag", lambda iou, pairs: found)

    def total(*leaves):
        return sum(model.losses(anchors, leaves[:5], leaves[5:], objects, regions).values())

    assert torch.autograd.gradcheck(total, (*logits, *deltas))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_inside_autocast(model, dtype):
    """Half precision predictions are treated in float32; saturated ones too."""
    anchors, logits, deltas = predictions(model, dtype)
    logits = [(x.detach() * 6).requires_grad_() for x in logits]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(anchors, logits, deltas, targets())
    full = [[x.detach().float().requires_grad_() for x in levels] for levels in (logits, deltas)]
    expected = model.losses(anchors, *full, targets())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-7)
    leaves, full_leaves = [*logits, *deltas], [*full[0], *full[1]]
    grads = torch.autograd.grad(sum(losses.values()), leaves)
    full_grads = torch.autograd.grad(sum(expected.values()), full_leaves)
    scale = max(x.abs().max() for x in full_grads)
    for mine, their in zip(grads, full_grads):
        assert (mine.float() - their).abs().max() < torch.finfo(dtype).eps * scale


def test_little_background_beside_bags(model):
    """A difference of sums in float32: not far from the one in float64."""
    anchors, logits, deltas = predictions(model)
    logits = [(x.detach() - 9).requires_grad_() for x in logits]
    index = model._bags(anchors, logits, deltas, targets())
    pairs = (index.row * 3 + index.objects.classes[:, None]).flatten()
    flat = torch.cat([x.detach().flatten(1, 3) for x in logits], 1)
    flat.view(-1)[pairs] += 14  # sigmoid of 5
    sizes = [len(a) for a in anchors]
    logits = [x.view_as(y) for x, y in zip(flat.split(sizes, 1), logits)]
    exact = model.losses(anchors, logits, deltas, targets())["loss_background"]
    logits, deltas = ([x.float() for x in levels] for levels in (logits, deltas))
    rounded = model.losses(anchors, logits, deltas, targets())["loss_background"]
    assert abs(rounded - exact).item() < 3e-6


def test_a_batch_without_objects_trains_all(model):
    """Every parameter has a gradient, so that no process waits; and finite ones."""
    image = {"image": torch.rand(3, 64, 64), "instances": instances([], [])}
    sum(model.train()([image] * 2).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_accumulated_losses(model):
    """Parts of a batch have the losses of the whole, up to the pairs per object of each."""
    anchors, logits, deltas = predictions(model)
    whole = model.losses(anchors, logits, deltas, targets())
    with model.normalizer.over(targets(), torch.device("cpu")):
        parts = [
            model.losses(
                anchors,
                [x[i : i + 1] for x in logits],
                [x[i : i + 1] for x in deltas],
                targets()[i : i + 1],
            )
            for i in range(2)
        ]
    for name in NAMES[:2]:
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])


def test_ignore_regions(model):
    """An anchor in a region is no background; objects there keep their bags and losses."""
    anchors, logits, deltas = predictions(model)
    everywhere = torch.tensor([[-1e4, -1e4, 1e4, 1e4]])
    expected = model.losses(anchors, logits, deltas, targets())
    losses = model.losses(anchors, logits, deltas, targets(), [everywhere, everywhere])
    for name in NAMES[:2]:
        torch.testing.assert_close(losses[name], expected[name])
    assert losses["loss_background"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("LTM.CANDIDATES", "lines", "CANDIDATES must be anchors or points"),
        ("RETINANET.BBOX_REG_LOSS_TYPE", "ciou", "BBOX_REG_LOSS_TYPE must be one of"),
    ],
)
def test_bad_values(cfg, key, value, message):
    """They are refused by name."""
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1", "must be one of iou, giou"),
        ("ANCHOR_GENERATOR.SIZES", [[8, 12]] * 5, "points needs one"),
        ("ANCHOR_GENERATOR.ASPECT_RATIOS", [[2.0]], "points needs one"),
    ],
)
def test_what_points_cannot_be(key, value, message):
    """With anchors, or deltas in their likelihood."""
    cfg = quick_cfg("quick/ltm_af_R_18_FPN.yaml")
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_points_of_no_grid():
    """Flattened predictions have no rows and columns: a sentence says what to give."""
    model = build_model(quick_cfg("quick/ltm_af_R_18_FPN.yaml"))
    anchors, logits, deltas = predictions(model)
    flat = [[x.flatten(1, 3) for x in levels] for levels in (logits, deltas)]
    with pytest.raises(ValueError, match="points are looked for in grids"):
        model.losses(anchors, *flat, targets())


def test_detections_are_retinanets(model):
    """The fast inference finds what Detectron2's own finds, from points too."""
    make_it_detect(model)
    image = {"image": torch.randint(0, 256, (3, 96, 128))}
    with torch.no_grad():
        (found,) = model([image])
        model.forward_inference = RetinaNet.forward_inference.__get__(model)
        (expected,) = model([image])
    found, expected = found["instances"], expected["instances"]
    assert len(expected) > 10
    order, theirs = found.scores.argsort(stable=True), expected.scores.argsort(stable=True)
    torch.testing.assert_close(found.scores[order], expected.scores[theirs])
    assert found.pred_boxes.tensor.sum().item() == pytest.approx(
        expected.pred_boxes.tensor.sum().item(), rel=1e-4
    )


def test_decoding_is_detectron2s(model):
    """In the likelihood as in inference."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [10, 20, 26, 36]])
    deltas = torch.randn(2, 4)
    expected = model.box2box_transform.apply_deltas(deltas, anchors)
    found = decode_boxes(deltas, anchors, box_coding(model.box2box_transform))
    torch.testing.assert_close(found, expected)


def test_matching_of_images(model):
    """What the pictures draw: the likelihood of the loss, and RetinaNet's anchors if any."""
    image = {"image": torch.rand(3, 64, 96), "instances": targets()[0]}
    (matching,) = match_inputs(model.eval(), [image])
    assert matching.prob.shape == (4, 40)
    assert ((matching.prob >= 0) & (matching.prob <= 1)).all()
    is_points = box_coding(model.box2box_transform) is None
    assert all((len(x) == 0) == is_points for x in matching.assigned)


def test_checkpoints(model, cfg, kind, tmp_path):
    """They load into the same model, by Detectron2's DefaultPredictor too, and into no other."""
    make_it_detect(model)
    Checkpointer(model, cfg, str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    predictor = DefaultPredictor(cfg)
    assert isinstance(predictor.model, LTM)
    assert isinstance(predictor.model, BagDetector)
    assert not isinstance(predictor.model, FreeAnchor)
    image = torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8).numpy()
    assert len(predictor(image)["instances"]) > 0
    for a, b in zip(model.state_dict().values(), predictor.model.state_dict().values()):
        assert torch.equal(a, b)


def test_exported_graph(model):
    """It detects what the model detects, from points too."""
    make_it_detect(model)
    pixels = torch.randint(0, 256, (1, 96, 128, 3), dtype=torch.uint8)
    with torch.no_grad():
        (expected,) = model([{"image": pixels[0].permute(2, 0, 1)}])
        boxes, scores, labels = Detector(model, False, True, False)(pixels)
    expected = expected["instances"]
    count = len(expected)
    assert count > 10
    torch.testing.assert_close(scores[0, :count], expected.scores)
    box_sums = (
        boxes[0, :count].sum(1).sort().values,
        expected.pred_boxes.tensor.sum(1).sort().values,
    )
    torch.testing.assert_close(*box_sums, rtol=1e-4, atol=1e-2)
    assert labels[0, :count].bincount().tolist() == expected.pred_classes.bincount().tolist()


def test_points_start_with_boxes():
    """All of them with an area: from others neither ReLU nor IoU would have a gradient."""
    model = build_model(quick_cfg("quick/ltm_af_R_18_FPN.yaml"))
    features = [torch.randn(1, 64, n, n) for n in (16, 8, 4, 2, 1)]
    _, distances = model.head(features)
    assert all((x > 0.5).all() for x in distances)
    sum(x.sum() for x in distances).backward()
    assert (model.head.scales.grad != 0).all()


def test_training(model, cfg):
    """The losses of a batch fall while it is trained on."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.002)
    image = {"image": torch.randint(0, 256, (3, 96, 96)), "instances": targets()[0]}
    totals = []
    for _ in range(6):
        total = sum(model([image] * 2).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        totals.append(total.item())
    assert min(totals[1:]) < 0.98 * totals[0]
