"""What a score means: recommended thresholds, calibration, and what false positives are.

Detections are matched to objects at an IoU of 0.5, see :func:`freeanchor.evaluation.outcomes`.
Those in crowds count as nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outcomes import FALSE_POSITIVES, JudgedImage

__all__ = ["calibration", "score_thresholds"]

_LEAST_OBJECTS = 10  # of a class with a threshold of its own
_NUM_BINS = 10
_SURE = 0.5  # users take detections above it for right ones
_SLIGHTLY_LOWER = 1 - 1e-6  # thresholds are exclusive


def _columns(
    images: Sequence[JudgedImage],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Scores, classes and kinds, (N,), of the detections of all images, and not in crowds."""
    found = np.concatenate([found for found, _, _ in images]).reshape(-1, 6)
    kinds = np.array([kind for _, _, result in images for kind in result.found], dtype="<U16")
    counts = kinds != "ignored"
    return found[counts, 5], found[counts, 4].astype(int), kinds[counts]


def score_thresholds(images: Sequence[JudgedImage], names: Sequence[str]) -> dict[str, float]:
    """The scores above which F1 = 2 TP / (2 TP + FP + FN) is highest.

    Args:
        images: detections, objects and outcomes of each image.
        names: of the classes.

    Returns:
        By "score" the threshold of all classes together, and by "score-NAME" that of each; classes
        with fewer than 10 objects or without a hit have that of all. Not numbers without a hit.
    """
    scores, labels, kinds = _columns(images)
    objects = np.concatenate([truth[truth[:, 5] == 0, 4] for _, truth, _ in images])
    is_hit = kinds == "hit"
    overall = _best_threshold(scores, is_hit, len(objects))
    thresholds = {"score": overall}
    for c, name in enumerate(names):
        mine, number = labels == c, int((objects == c).sum())
        own = _best_threshold(scores[mine], is_hit[mine], number)
        use_own = number >= _LEAST_OBJECTS and not np.isnan(own)
        thresholds[f"score-{name}"] = own if use_own else overall
    return thresholds


def _best_threshold(scores: NDArray[Any], is_hit: NDArray[Any], num_objects: int) -> float:
    """The threshold with the highest F1, halfway between two scores; the highest of equals."""
    if not is_hit.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], is_hit[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + num_objects)
    lower = np.append(scores[1:], scores[-1] * _SLIGHTLY_LOWER)
    f1[scores == lower] = 0  # no threshold parts equal scores
    best = f1.argmax()
    return float((scores[best] + lower[best]) / 2)


def calibration(images: Sequence[JudgedImage]) -> dict[str, float]:
    """Whether scores are the share of hits, and what is wrong above a score of 0.5; in percent.

    Args:
        images: detections, objects and outcomes of each image.

    Returns:
        "ECE", the expected calibration error: detections in 10 equal bins of their scores, sum over
        the bins of n_bin / N * |share of hits - mean score| (Guo et al., 2017, section 2).
        "FP>0.5": the false positives among the detections with a score above 0.5, and by
        "KIND>0.5" how much of it each kind is. Not numbers where there are no detections.
    """
    scores, _, kinds = _columns(images)
    is_hit = kinds == "hit"
    bins = np.minimum((scores * _NUM_BINS).astype(int), _NUM_BINS - 1)
    gaps = [abs((is_hit[bins == b] - scores[bins == b]).sum()) for b in range(_NUM_BINS)]
    sure = kinds[scores > _SURE]

    def share(part: float, number: int) -> float:
        return float(100 * part / number) if number else float("nan")

    return {
        "ECE": share(sum(gaps), len(scores)),
        "FP>0.5": share((sure != "hit").sum(), len(sure)),
        **{f"{kind}>0.5": share((sure == kind).sum(), len(sure)) for kind in FALSE_POSITIVES},
    }
