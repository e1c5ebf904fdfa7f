"""Thresholds and calibration."""

import numpy as np
import pytest
from conftest import random_image
from freeanchor.evaluation import calibration, outcomes, score_thresholds


def judged(found, truth):
    """An image, of rows as in `outcomes`."""
    found, truth = (np.array(x, dtype=float).reshape(-1, 6) for x in (found, truth))
    return found, truth, outcomes(found, truth)


def f1(images, threshold, label=None):
    """F1 of the detections above a threshold, of a class or all, counted one by one."""
    hits = wrong = objects = 0
    for found, truth, _ in images:
        kept = found[found[:, 5] > threshold]
        kinds = outcomes(kept, truth).found
        mine = [k for k, c in zip(kinds, kept[:, 4]) if label in (None, c)]
        hits += mine.count("hit")
        wrong += len(mine) - mine.count("hit") - mine.count("ignored")
        objects += sum(1 for x in truth if not x[5] and label in (None, x[4]))
    return 2 * hits / (hits + wrong + objects)


def test_thresholds_have_the_highest_f1():
    """No other threshold is better, of all classes and of each."""
    rng = np.random.default_rng(0)
    images = [judged(*random_image(rng)) for _ in range(40)]
    thresholds = score_thresholds(images, ["a", "b", "c"])
    assert len(set(thresholds.values())) == 4
    candidates = [0, *np.concatenate([found[:, 5] for found, _, _ in images])]
    for label, threshold in zip((None, 0, 1, 2), thresholds.values(), strict=True):
        best = max(f1(images, x, label) for x in candidates)
        assert f1(images, threshold, label) == pytest.approx(best, abs=1e-12)


def objects(count, label, start=0):
    """Objects in a row, and detections that are exactly they."""
    boxes = [(20 * i + start, 0, 20 * i + start + 10, 10, label) for i in range(count)]
    return [(*x, 0) for x in boxes], boxes


def test_classes_with_few_objects():
    """They have the threshold of all: 9 objects are few, and so is no hit."""
    many, boxes = objects(10, 0)
    few, few_boxes = objects(9, 1, start=1000)
    never, _ = objects(12, 2, start=3000)
    found = [(*x, 0.9) for x in boxes] + [(*x, 0.4) for x in few_boxes] + [(*few_boxes[0], 0.2)]
    thresholds = score_thresholds([judged(found, many + few + never)], ["many", "few", "never"])
    assert thresholds["score"] == pytest.approx(0.3)
    assert thresholds["score-few"] == thresholds["score-never"] == thresholds["score"]
    assert 0.8 < thresholds["score-many"] < 0.9
    assert np.isnan(list(score_thresholds([judged([], many)], ["many"]).values())).all()


def test_equal_scores():
    """A threshold cannot part detections of one score, though F1 would be higher in their midst."""
    truth, boxes = objects(10, 0)
    found = [(*x, 0.5) for x in boxes] + [(500, 500, 510, 510, 0, 0.5)] * 10
    threshold = score_thresholds([judged(found, truth)], ["a"])["score"]
    assert 0.49 < threshold < 0.5


def test_calibration_by_hand():
    """Two bins, a false positive of each kind, and a crowd that counts as nothing."""
    truth, boxes = objects(3, 0)
    truth.append((0, 100, 50, 150, 0, 1))
    found = [
        (*boxes[0], 0.8),  # hit
        (*boxes[0], 0.8),  # duplicate
        (*boxes[1][:4], 1, 0.8),  # wrong class
        (40, 0, 50, 4, 0, 0.8),  # poor box
        (700, 0, 710, 10, 0, 0.8),  # background
        (10, 110, 20, 120, 0, 0.8),  # in the crowd
        (*boxes[2], 0.3),  # hit
    ]
    result = calibration([judged(found, truth)])
    assert result.pop("ECE") == pytest.approx(100 * (abs(1 - 5 * 0.8) + abs(1 - 0.3)) / 6)
    assert result.pop("FP>0.5") == pytest.approx(80)
    assert len(result) == 4
    assert list(result.values()) == pytest.approx([20] * 4)


def test_calibrated_scores():
    """Scores that are the share of hits have no error."""
    truth, boxes = objects(10, 0)
    far = [(x0, 900, x1, 910, c) for x0, _, x1, _, c in boxes]
    found = [(*x, 0.7) for x in boxes[:7] + far[:3]]
    assert calibration([judged(found, truth)])["ECE"] == pytest.approx(0, abs=1e-9)
