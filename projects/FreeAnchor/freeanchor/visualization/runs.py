"""What a finished run left in its output folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..config import merge_options, read_config
from ..data import register_datasets
from ..errors import FileError
from ..paths import file_stem

__all__ = ["read_detections", "read_metrics", "read_run"]


def read_run(
    output_dir: Path, datasets: Sequence[Sequence[str]] = (), options: Sequence[str] = ()
) -> CfgNode:
    """Read the config of a finished run, and register its data sets.

    Args:
        output_dir: `OUTPUT_DIR` of the training.
        datasets: see :func:`freeanchor.data.register_datasets`.
        options: keys and values, one after another, that change the config.

    Raises:
        FreeAnchorError: something that the run should have is not there.
    """
    for name in ("config.yaml", "metrics.json"):
        if not (output_dir / name).is_file():
            raise FileError(f"{output_dir} has no {name}: it is not the output of a training")
    cfg = read_config(output_dir / "config.yaml")
    merge_options(cfg, options)
    register_datasets(datasets)
    cfg.OUTPUT_DIR = str(output_dir)
    for name in cfg.DATASETS.TEST:
        if name not in DatasetCatalog.list():
            raise FileError(f"give data set {name} as --dataset {name} ANNOTATIONS.json IMAGE_DIR")
        if not _results_file(cfg, name).is_file():
            raise FileError(f"there is no {_results_file(cfg, name)}: the run was not evaluated")
    return cfg


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read `metrics.json`, without what a later run into the same folder has overtaken.

    Args:
        path: the file that Detectron2's `JSONWriter` appends to. A last line that was cut off
            with its run is left out.

    Returns:
        One record per iteration, in increasing order of `iteration`.
    """
    records: dict[int, dict[str, float]] = {}
    newest = -1  # iteration of the training step that was written last
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        record = json.loads(line)
        iteration = record["iteration"]
        if "total_loss" in record:
            if iteration <= newest:  # a new run, or one that was resumed from before
                records = {i: r for i, r in records.items() if i < iteration}
            newest = iteration
        # The writer gives values of one iteration in several lines, and not in their order.
        records.setdefault(iteration, {}).update(record)
    return [records[i] for i in sorted(records)]


def read_detections(
    cfg: CfgNode, name: str, records: list[dict[str, Any]]
) -> dict[Any, list[dict[str, Any]]]:
    """Read the detections of a run, in COCO's result format, by `image_id` of the records."""
    detections: dict[Any, list[dict[str, Any]]] = {r["image_id"]: [] for r in records}
    path = _results_file(cfg, name)
    for detection in json.loads(path.read_text()):
        if detection["image_id"] not in detections:
            raise FileError(
                f"{path} has detections in image {detection['image_id']!r}, which data set {name} "
                "does not have: give the data set that the run was evaluated on"
            )
        detections[detection["image_id"]].append(detection)
    return detections


def _results_file(cfg: CfgNode, name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "inference" / file_stem(name) / "coco_instances_results.json"
