"""What cures false positives with high scores: thresholds, NMS or a temperature.

    python tests/benchmarks/study_scores.py OUTPUT_DIR --dataset NAME ANNOTATIONS.json IMAGE_DIR

reads the detections of a run that was evaluated on the data set. What is fitted (thresholds and
temperature) is fitted on every second image and measured on the others, and the other way round;
means of both. NMS is applied to the detections that the run's own NMS left.
"""

import argparse
from pathlib import Path

import freeanchor  # noqa: F401  # isort: skip  # makes Detectron2 importable
import numpy as np
import torch
from freeanchor.command_line import add_dataset_argument
from freeanchor.evaluation import calibration, outcomes, precision_recall, score_thresholds
from freeanchor.visualization import Run, read_metrics, read_run
from freeanchor.visualization.runs import read_dataset
from torchvision.ops import batched_nms

TEMPERATURES = np.exp(np.linspace(-1.5, 1.5, 121))


def f1(images, thresholds):
    """F1 in percent of the detections above the threshold of their class."""
    hits = found = objects = 0
    for rows, truth, result in images:
        kinds = np.array(result.found, dtype="<U16")
        kept = kinds[rows[:, 5] > np.asarray(thresholds)[rows[:, 4].astype(int)]]
        hits += (kept == "hit").sum()
        found += (kept != "ignored").sum()
        objects += (truth[:, 5] == 0).sum()
    return 200 * hits / (found + objects)


def after_nms(images, threshold):
    for rows, truth, _ in images:
        boxes, labels, scores = (torch.tensor(rows[:, x]) for x in (slice(4), 4, 5))
        kept = rows[batched_nms(boxes, scores, labels, threshold).sort().values.numpy()]
        yield kept, truth, outcomes(kept, truth)


def scaled(images, temperature):
    """Scores of which the logits are divided by a temperature."""
    for rows, truth, result in images:
        rows, scores = rows.copy(), rows[:, 5].clip(1e-6, 1 - 1e-6)
        rows[:, 5] = 1 / (1 + ((1 - scores) / scores) ** (1 / temperature))
        yield rows, truth, result


def likelihood(images):
    """Mean log-likelihood of hits and misses, if scores are probabilities."""
    scores = np.concatenate([rows[:, 5] for rows, _, _ in images])
    kinds = np.array([kind for _, _, result in images for kind in result.found])
    is_hit, counts = kinds == "hit", kinds != "ignored"
    return np.log(np.where(is_hit, scores, 1 - scores)[counts]).mean()


def study(images, classes):
    """Lines of figures."""

    def show(label, figures):
        return f"{label}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items())

    yield show("as it is", calibration(images))
    for threshold in (0.4, 0.3):
        judged = list(after_nms(images, threshold))
        ap = 100 * np.nanmean(precision_recall(judged, len(classes)))
        yield show(f"NMS {threshold}", {"AP50": ap, **calibration(judged)})
    halves = images[::2], images[1::2]
    scores, temperatures = [], []
    for fitted, held_out in (halves, halves[::-1]):
        found = score_thresholds(fitted, classes)
        several = ([0.5], [found["score"]], [found[f"score-{x}"] for x in classes])
        scores.append([f1(held_out, np.broadcast_to(x, len(classes))) for x in several])
        best = max(TEMPERATURES, key=lambda t, images=fitted: likelihood(list(scaled(images, t))))
        temperatures.append([best, calibration(list(scaled(held_out, best)))["ECE"]])
    yield show("F1 at", dict(zip(("0.5", "the best score", "each class's"), np.mean(scores, 0))))
    yield "temperature {:.2f}: ECE {:.1f}".format(*np.mean(temperatures, 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    add_dataset_argument(parser)
    args = parser.parse_args()
    cfg = read_run(args.output_dir, args.dataset)
    run = Run("", cfg, read_metrics(args.output_dir / "metrics.json"))
    for name in cfg.DATASETS.TEST:
        data = read_dataset([run], name)
        print(f"{name}, {cfg.SOLVER.MAX_ITER} iterations", flush=True)
        for line in study(data.judged(0, 0), data.classes):
            print(f"    {line}", flush=True)


if __name__ == "__main__":
    main()
