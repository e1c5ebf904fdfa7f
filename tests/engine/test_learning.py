"""A run that does not learn says so, and one that learns does not."""

import types

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from freeanchor.engine import LearningCheck, Trainer
from freeanchor.visualization import NOT_LEARNING

LENGTH, WARMUP = 300, 100
NOISE = 0.3  # of the likelihood's logarithm, from batch to batch


@pytest.fixture
def curve(cfg, dataset, tmp_path, caplog):
    """Runs the check over synthetic curves of a run, and gives what it logs."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = LENGTH, WARMUP
    cfg.OUTPUT_DIR = str(tmp_path)
    records = DatasetCatalog.get(dataset[0])

    def run(likelihood, localized=lambda x: 0.9, stop=LENGTH, start=0, state=None):
        caplog.clear()
        rng = np.random.default_rng(0)
        hook = LearningCheck(cfg, records)
        hook.load_state_dict(state or {})
        with EventStorage(start) as storage:
            hook.trainer = types.SimpleNamespace(iter=start, storage=storage)
            for i in range(start, stop):
                hook.trainer.iter = i
                storage.put_scalars(
                    **{
                        "freeanchor/bag_likelihood": likelihood(i) * np.exp(rng.normal() * NOISE),
                        "freeanchor/localized_objects": localized(i),
                    }
                )
                hook.after_step()
                storage.step()
        return caplog.text, hook.state_dict()

    return run


@pytest.mark.parametrize(
    ("likelihood", "localized", "expected"),
    [
        (lambda i: 0.004 + 0.0 * i, lambda i: 0.9, "likelihood of a bag is 0.00"),
        (lambda i: 0.02 * 0.99**i, lambda i: 0.9, "likelihood of a bag is 0.00"),
        (lambda i: 0.02 * 1.02**i, lambda i: 0.2, "overlap 20% of the objects, at the start 20%"),
        (lambda i: 0.02 * 1.02**i, lambda i: 0.2 + 0.002 * i, ""),
        (lambda i: 0.02 * 1.02**i, lambda i: 1.0, ""),
        (lambda i: 0.4 + 0.0005 * i, lambda i: 1.0, ""),
        (lambda i: 0.2 + 0.0002 * i, lambda i: 1.0, "likelihood of a bag is 0.2"),
        (lambda i: float("nan"), lambda i: 1.0, "likelihood of a bag is nan"),
        (lambda i: 0.0007 * 1.015**i, lambda i: 0.9, "not above the 0.02 of exact boxes"),
        (lambda i: 0.01 * 1.03 ** max(0, i - WARMUP), lambda i: 0.9, ""),
    ],
    ids=[
        *("flat", "falling", "nowhere", "learns where", "learns", "learned", "slow", "NaN", "low"),
        "learns when the rate is there",
    ],
)
def test_curves(curve, tmp_path, likelihood, localized, expected):
    """Logged once and kept for the report; nothing is said of a run that learns."""
    text, _ = curve(likelihood, localized)
    assert text.count("does not learn") == bool(expected)
    assert expected in text
    path = tmp_path / NOT_LEARNING
    assert path.exists() == bool(expected)
    if expected:
        assert path.read_text().strip() in text
        assert "after 166 of 300 iterations" in text


@pytest.mark.parametrize(
    ("size", "start", "options", "expected"),
    [
        (160, 0, [], False),
        (8, 0, [], True),
        (8, 7, [], False),  # said when the run began
        (8, 0, ["MODEL.META_ARCHITECTURE", "LTM", "MODEL.LTM.CANDIDATES", "points"], False),
    ],
)
def test_anchors_that_do_not_fit(cfg, dataset, caplog, size, start, options, expected):
    """Said before a run, with the share of the objects and what proposes better ones."""
    cfg.merge_from_list(options)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (size,), size
    hook = LearningCheck(cfg, DatasetCatalog.get(dataset[0]))
    hook.trainer = types.SimpleNamespace(start_iter=start)
    hook.before_train()
    assert ("100% of the objects overlap no anchor by 0.5" in caplog.text) == expected
    assert ("`freeanchor anchors` proposes" in caplog.text) == expected


def test_large_data_sets_are_sampled(cfg, dataset):
    """Images that are not looked at are not unpacked, of which there may be 100,000."""
    (record, *_), asked = DatasetCatalog.get(dataset[0]), []

    class Records:
        def __len__(self):
            return 10_000

        def __getitem__(self, index):
            asked.append(range(10_000)[index])
            return record

    hook = LearningCheck(cfg, Records())
    hook.trainer = types.SimpleNamespace(start_iter=0)
    hook.before_train()
    assert asked == list(range(0, 10_000, 20))


def test_what_to_try(curve, cfg):
    """Only what fits the run: with weights, many epochs and fitting anchors, the learning rate."""
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 8, 0.02
    text, _ = curve(lambda i: 0.01)
    assert "SOLVER.BASE_LR 0.005 instead of 0.02" in text
    assert "MODEL.WEIGHTS is empty" in text
    assert "MAX_ITER," not in text
    cfg.MODEL.WEIGHTS, cfg.SOLVER.IMS_PER_BATCH = "some.pth", 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (8,), 8
    text, _ = curve(lambda i: 0.01)
    assert "MODEL.WEIGHTS" not in text
    assert "300 iterations see each image 0.0 times" in text
    assert "100% of the objects overlap no anchor by 0.5" in text


def test_a_run_that_learns_clears_what_another_left(curve, tmp_path):
    curve(lambda i: 0.01)
    curve(lambda i: 0.01 * 1.05**i)
    assert not (tmp_path / NOT_LEARNING).exists()


def test_resumed_before_the_check(curve):
    """A checkpoint holds what the start was like."""
    _, state = curve(lambda i: 0.01, stop=60)
    text, _ = curve(lambda i: 0.01, start=60, state=state)
    assert "does not learn" in text
    text, _ = curve(lambda i: 0.01, start=60)
    assert not text


def test_short_runs_and_other_losses_are_not_judged(curve, cfg):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 30, 10
    assert not curve(lambda i: 0.01)[0]
    hook = LearningCheck(cfg, [])
    hook.at, hook.window = 9, 5
    with EventStorage() as storage:
        hook.trainer = types.SimpleNamespace(iter=0, storage=storage)
        for hook.trainer.iter in range(20):
            hook.after_step()


@pytest.mark.parametrize(("architecture", "expected"), [("FreeAnchor", 1), ("RetinaNet", 0)])
def test_trainer_checks_a_freeanchor(cfg, dataset, tmp_path, architecture, expected):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = architecture, 2
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (dataset[0],), (), str(tmp_path)
    found = [x for x in Trainer(cfg)._hooks if isinstance(x, LearningCheck)]
    assert len(found) == expected
    assert all(len(hook.records) for hook in found)


def test_anchors_of_other_levels(tiny):
    """A pyramid with P2, for small objects, trains: the anchors that are looked at are its own."""
    levels = "['res2', 'res3', 'res4', 'res5']"
    keys = ["MODEL.RESNETS.OUT_FEATURES", levels, "MODEL.FPN.IN_FEATURES", levels]
    keys += ["MODEL.RETINANET.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6', 'p7']"]
    keys += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [128], [256]]"]
    assert (tiny(*keys, "SOLVER.MAX_ITER", "1") / "model_final.pth").is_file()
