"""What is kept of an evaluation, and whether it is what was expected."""

import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn

from ..checkpoint import Thresholds, replacing, write_thresholds
from ..errors import FileError

__all__ = ["add_augmented", "keep_figures", "keep_thresholds", "verify"]

logger = logging.getLogger(__name__)


def add_augmented(cfg: CfgNode, results: dict[str, Any], augmented: dict[str, Any]) -> None:
    """Add the tasks of an evaluation at several scales, as `TASK_TTA`.

    Args:
        cfg: config of the run.
        results: by task; with several of `DATASETS.TEST`, by data set and task. So below.
        augmented: at several scales.
    """
    more = _by_dataset(cfg, augmented)
    for name, tasks in _by_dataset(cfg, results).items():
        tasks.update({f"{task}_TTA": result for task, result in more[name].items()})


def keep_thresholds(cfg: CfgNode, model: nn.Module, results: dict[str, Any]) -> None:
    """Write the recommended thresholds beside the weights.

    Args:
        cfg: config of the run.
        model: what was evaluated.
        results: see :func:`add_augmented`.
    """
    for name, tasks in _by_dataset(cfg, results).items():
        found = dict(tasks.get("threshold", {}))
        score = found.pop("score", math.nan)
        if math.isnan(score):
            continue
        classes = {key.removeprefix("score-"): value for key, value in found.items()}
        try:
            write_thresholds(cfg.OUTPUT_DIR, model.state_dict(), Thresholds(name, score, classes))
        except FileError as e:
            logger.error(f"{e}. The evaluation goes on")
        return


def keep_figures(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Write the figures of each data set beside its detections.

    What metrics.json has last may be of others: it is of the training, and --eval-only is not.
    """
    content = {
        name: {
            key: value if math.isfinite(value) else None
            for key, value in flatten_results_dict(tasks).items()
        }
        for name, tasks in _by_dataset(cfg, results).items()
    }
    try:
        with replacing(Path(cfg.OUTPUT_DIR) / "inference" / "results.json") as f:
            f.write(json.dumps(content, indent=1).encode())
    except FileError as e:
        logger.error(f"{e}. The evaluation goes on")


def verify(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Compare with `TEST.EXPECTED_RESULTS`, as Detectron2's `verify_results`.

    A task that was not evaluated fails, instead of being a KeyError.
    """
    verify_results(cfg, defaultdict(dict, results))


def _by_dataset(cfg: CfgNode, results: dict[str, Any]) -> dict[str, Any]:
    names = cfg.DATASETS.TEST
    return {name: results[name] if len(names) > 1 else results for name in names}
