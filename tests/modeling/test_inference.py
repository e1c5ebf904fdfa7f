"""Detections are those of Detectron2's RetinaNet."""

import pytest
import torch
from conftest import make_it_detect, quick_cfg
from detectron2.modeling import RetinaNet, build_model
from freeanchor.modeling import candidates, detect
from freeanchor.modeling.inference import top_indices
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def model():
    """Its weights do not matter, only its anchors and limits."""
    return build_model(quick_cfg()).eval()


SIZE = (128, 160)


def head_outputs(scores, seed, num_images=2, channels_last=False, dtype=torch.float32):
    """Features and raw predictions of three classes, with logits of a distribution.

    No two scores of an image are equal, except those of "tied".
    """
    generator = torch.Generator().manual_seed(seed)
    grids = [(-(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in (8, 16, 32, 64, 128)]
    noise = torch.randn(num_images, sum(27 * h * w for h, w in grids), generator=generator)
    logits = {
        "trained": torch.where(noise > 2.5, 3 * noise - 9, noise - 9),  # few above the threshold
        "noisy": noise,
        "saturated": noise.clamp(0, 2),
        "none": noise - 30,
        "tied": noise.clamp(-1, 1) * 40,
    }[scores]
    if scores != "tied":
        logits = logits + logits.argsort(1).argsort(1) * 2e-4  # its rank, up to 2.4
    splits = [27 * h * w for h, w in grids]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [torch.zeros(num_images, 1, *grid) for grid in grids]
    outputs = [
        [x.view(num_images, 27, *grid) for x, grid in zip(logits.split(splits, 1), grids)],
        [0.5 * torch.randn(num_images, 36, *grid, generator=generator) for grid in grids],
    ]
    return features, [[x.to(dtype, memory_format=layout) for x in levels] for levels in outputs]


def assert_equal_detections(ours, theirs):
    """All fields in their order; a sigmoid may round otherwise elsewhere in a vector."""
    assert ours.image_size == theirs.image_size
    assert ours.pred_classes.tolist() == theirs.pred_classes.tolist()
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=3e-7, atol=0)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scores", ["trained", "noisy", "saturated", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_retinanet(model, scores, channels_last, seed, monkeypatch):
    """For any scores and memory layout, where blocks decide and where they do not."""
    monkeypatch.setattr("freeanchor.modeling.inference._BLOCK", (2, 7, 128)[seed % 3])
    monkeypatch.setattr(model, "test_topk_candidates", (1000, 40, 300)[seed % 3])
    monkeypatch.setattr(model, "test_score_thresh", (0.05, 0.3)[seed % 2])
    features, predictions = head_outputs(scores, seed, channels_last=channels_last)
    copies = [[x.clone() for x in levels] for levels in predictions]
    sizes = [SIZE, (100, 90)]
    found = detect(model, features, predictions, sizes)
    for a, b in zip(predictions, copies, strict=True):  # they were only read
        assert all(map(torch.equal, a, b))

    class Images:
        image_sizes = sizes

    theirs = RetinaNet.forward_inference(model, Images, features, copies)
    assert (sum(map(len, found)) > 0) == (scores != "none")
    for ours, expected in zip(found, theirs, strict=True):
        assert_equal_detections(ours, expected)


def test_ties(model):
    """Of equal scores as many are kept as Detectron2 keeps, not always the same."""
    features, predictions = head_outputs("tied", 0)
    for i, found in enumerate(candidates(model, features, predictions, [SIZE] * 2, 0.05, 1000)):
        logits, deltas = model._transpose_dense_predictions(predictions, [3, 4])
        theirs = model._decode_multi_level_predictions(
            model.anchor_generator(features),
            [x[i].sigmoid() for x in logits],
            [x[i] for x in deltas],
            0.05,
            1000,
            SIZE,
        )
        torch.testing.assert_close(found.scores.sort().values, theirs.scores.sort().values)


def test_whole_model():
    """`FreeAnchor` detects what a RetinaNet with its weights does, in a padded batch."""
    cfg = quick_cfg()
    ours = build_model(cfg)
    make_it_detect(ours)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    theirs = build_model(cfg).eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = [{"image": torch.rand(3, 64, 96) * 255}, {"image": torch.rand(3, 80, 50) * 255}]
    with torch.no_grad():
        for a, b in zip(ours(inputs), theirs(inputs), strict=True):
            assert len(a["instances"]) > 10
            assert_equal_detections(a["instances"], b["instances"])


def test_bfloat16(model):
    """Scores and boxes come in float32, of the logits as they are."""
    features, predictions = head_outputs("noisy", 0, dtype=torch.bfloat16)
    exact = [[x.float() for x in levels] for levels in predictions]
    for a, b in zip(
        candidates(model, features, predictions, [SIZE] * 2, 0.05),
        candidates(model, features, exact, [SIZE] * 2, 0.05),
        strict=True,
    ):
        assert a.scores.dtype == torch.float32
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


@settings(deadline=None)
@given(n=st.integers(0, 700), k=st.integers(1, 40), block=st.integers(1, 9), data=st.data())
def test_top_indices(n, k, block, data):
    """The k largest values, ties included, without one of them twice."""
    values = data.draw(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 3.0]), max_size=8))
    x = torch.randn(2, n)
    for i, value in enumerate(values):
        x[:, i::11] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freeanchor.modeling.inference._BLOCK", block)
        index = top_indices(x, k)
    assert index.shape == (2, min(k, n))
    expected = x.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(x.gather(1, index).sort(dim=1, descending=True).values, expected)
    assert all(len(set(row)) == len(row) for row in index.tolist())
