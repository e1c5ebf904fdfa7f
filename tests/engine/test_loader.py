"""The order of the images, which depends on nothing but the seed."""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import quick_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from freeanchor.engine import TrainLoader
from freeanchor.errors import FreeAnchorError

NUM_IMAGES = 10
RECORDS = [
    {
        "file_name": f"{i}.png",
        "image_id": i,
        "width": 64 if i % 3 else 48,
        "height": 56,
        "annotations": [{"category_id": int(i < 2)}],
    }
    for i in range(NUM_IMAGES)
]


def draw(record):
    """A mapper that shows its image and its random numbers."""
    numbers = random.random(), float(np.random.rand()), float(torch.rand(()))
    return {**record, "numbers": numbers}


def config(**keys):
    cfg = quick_cfg()
    cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.DATALOADER.NUM_WORKERS = False, 0
    for key, value in keys.items():
        node = {"IMS_PER_BATCH": "SOLVER.", "SEED": ""}.get(key, "DATALOADER.")
        cfg.merge_from_list([f"{node}{key}", value])
    return cfg


def batches(loader, count):
    """(image, random numbers) of the next batches."""
    return [
        [(x["image_id"], x["numbers"]) for x in b] for b in itertools.islice(iter(loader), count)
    ]


def images(found):
    return [[image for image, _ in batch] for batch in found]


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_goes_on_anywhere(grouping, num_workers):
    """With any number of workers, from any iteration, the same images are augmented alike."""
    cfg = config(ASPECT_RATIO_GROUPING=grouping)
    expected = batches(TrainLoader(cfg, RECORDS, draw), 12)
    assert len({numbers for batch in expected for _, numbers in batch}) == 12 * 4
    cfg = config(ASPECT_RATIO_GROUPING=grouping, NUM_WORKERS=num_workers)
    first = TrainLoader(cfg, RECORDS, draw)
    assert batches(first, 5) == expected[:5]
    second = TrainLoader(cfg, RECORDS, draw)
    second.load_state_dict(first.state_dict())
    assert batches(second, 7) == expected[5:]


def test_other_images_are_said(caplog):
    """A run that goes on with others, or in another order, is not the one that began."""
    first = TrainLoader(config(), RECORDS, draw)
    moved = [{**x, "file_name": f"elsewhere/{x['file_name']}"} for x in RECORDS]
    for records, said in (
        (RECORDS, ""),
        (moved, ""),
        (RECORDS[:-1], f"has {NUM_IMAGES - 1} images instead of {NUM_IMAGES}"),
        (RECORDS[::-1], "has other images, or in another order than before"),
    ):
        caplog.clear()
        TrainLoader(config(), records, draw).load_state_dict(first.state_dict())
        warnings = "".join(x.message for x in caplog.records if x.levelname == "WARNING")
        assert said in warnings
        assert bool(said) == bool(warnings)


def test_another_seed_is_said(caplog):
    """The images of a run stay in the order of its own seed, whatever `SEED` is now."""
    first = TrainLoader(config(SEED=3), RECORDS, draw)
    expected = batches(first, 4)
    for seed, said in ((3, False), (-1, False), (4, True)):
        caplog.clear()
        other = TrainLoader(config(SEED=seed), RECORDS, draw)
        other.load_state_dict({**first.state_dict(), "seen": [[4, 0]]})
        assert batches(other, 4) == expected
        assert ("is not that of the run" in caplog.text) == said


def test_leaves_the_random_numbers_alone():
    """Those of the model do not depend on who loads the images."""
    seed_all_rng(3)
    expected = draw({})
    seed_all_rng(3)
    batches(TrainLoader(config(), RECORDS, draw), 2)
    assert draw({}) == expected


@pytest.mark.parametrize("grouping", [False, True])
def test_processes_share_a_batch(monkeypatch, grouping):
    """Any number of them gets the same images in an iteration, and of one shape if grouped."""
    cfg = config(ASPECT_RATIO_GROUPING=grouping)
    expected = batches(TrainLoader(cfg, RECORDS, draw), 9)
    parts = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(batches(TrainLoader(cfg, RECORDS, draw), 9))
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(x) for x in expected]
    if grouping:
        assert all(len({RECORDS[i]["width"] for i in batch}) == 1 for batch in images(expected))


@pytest.mark.parametrize("grouping", [False, True])
def test_another_batch_size(grouping):
    """No image of the epoch is repeated or left out."""
    cfg = config(ASPECT_RATIO_GROUPING=grouping)
    first = TrainLoader(cfg, RECORDS, draw)
    drawn = images(batches(first, 3))
    cfg = config(ASPECT_RATIO_GROUPING=grouping, IMS_PER_BATCH=2)
    second = TrainLoader(cfg, RECORDS, draw)
    second.load_state_dict(first.state_dict())
    drawn += images(batches(second, 14))
    third = TrainLoader(cfg, RECORDS, draw)
    third.load_state_dict(second.state_dict())
    drawn = list(itertools.chain(*drawn, *images(batches(third, 10))))
    counts = np.bincount(drawn, minlength=NUM_IMAGES)
    # 60 images of 6 epochs; grouped, a few wait for others of their shape.
    assert len(drawn) == 60
    assert np.abs(counts - 6).max() <= (1 if grouping else 0)


@pytest.mark.parametrize("grouping", [False, True])
def test_order_of_detectron2(grouping):
    """For a given seed, in one process, the images come as the loader of its 0.6 gives them."""
    cfg = config(ASPECT_RATIO_GROUPING=grouping)
    seed_all_rng(cfg.SEED)
    loader = build_detection_train_loader(
        RECORDS,
        mapper=draw,
        sampler=TrainingSampler(NUM_IMAGES),  # where its main branch has a seed of its own
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=grouping,
    )
    theirs = [[x["image_id"] for x in batch] for batch in itertools.islice(loader, 8)]
    assert images(batches(TrainLoader(cfg, RECORDS, draw), 8)) == theirs


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [("RepeatFactorTrainingSampler", {0, 1}), ("RandomSubsetTrainingSampler", None)],
)
def test_samplers(sampler, expected):
    """Detectron2's others: a rare class is repeated, and a subset stays the same one."""
    cfg = config(SAMPLER_TRAIN=sampler, REPEAT_THRESHOLD=0.9, RANDOM_SUBSET_RATIO=0.4)
    first = TrainLoader(cfg, RECORDS, draw)
    drawn = images(batches(first, 20))
    second = TrainLoader(cfg, RECORDS, draw)
    second.load_state_dict(first.state_dict())
    later = images(batches(second, 20))
    counts = np.bincount(list(itertools.chain(*drawn, *later)), minlength=NUM_IMAGES)
    if expected:
        assert set(np.argsort(counts)[-2:]) == expected
    else:
        assert np.count_nonzero(counts) == 4


def test_repeating_by_the_square_root_or_not(monkeypatch):
    """The key that Detectron2's main branch has is handed on; 0.6 has none."""
    given = []

    def factors(records, threshold, **options):
        given.append(options)
        return torch.ones(len(records))

    name = "repeat_factors_from_category_frequency"
    monkeypatch.setattr(RepeatFactorTrainingSampler, name, staticmethod(factors))
    cfg = config(SAMPLER_TRAIN="RepeatFactorTrainingSampler", REPEAT_THRESHOLD=0.9)
    cfg.DATALOADER.pop("REPEAT_SQRT", None)
    TrainLoader(cfg, RECORDS, draw)
    for value in (True, False):
        cfg.DATALOADER.REPEAT_SQRT = value
        TrainLoader(cfg, RECORDS, draw)
    assert given == [{}, {"sqrt": True}, {"sqrt": False}]


def test_image_that_is_none():
    """Another one takes its place, the same one again when a run goes on."""

    def map_most(record):
        return draw(record) if record["image_id"] != 3 else None

    first, second = (batches(TrainLoader(config(), RECORDS, map_most), 10) for _ in range(2))
    assert first == second
    assert 3 not in itertools.chain(*images(first))


def test_unknown_sampler():
    """It is refused before the first iteration, with those that there are."""
    with pytest.raises(FreeAnchorError, match="there is no sampler Mine, use TrainingSampler"):
        TrainLoader(config(SAMPLER_TRAIN="Mine"), RECORDS, draw)


def test_grouping_needs_sizes():
    """An image without them is named."""
    record = {"file_name": "a.png", "annotations": []}
    with pytest.raises(FreeAnchorError, match=r"a\.png has no width and height"):
        TrainLoader(config(ASPECT_RATIO_GROUPING=True), [record], draw)
