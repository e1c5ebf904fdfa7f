"""What a finished run left in its output folder."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from numpy.typing import NDArray

from ..config import merge_options, read_config
from ..data import register_datasets, resolve_classes
from ..errors import FileError
from ..evaluation import found_rows, outcomes, truth_rows
from ..paths import file_stem

__all__ = [
    "MIN_IOU",
    "NOT_LEARNING",
    "Dataset",
    "Run",
    "read_dataset",
    "read_detections",
    "read_metrics",
    "read_run",
    "recommended_scores",
]

MIN_IOU = 0.5  # of a hit
_SCORE = 0.5  # where none is recommended
NOT_LEARNING = "not_learning.txt"  # in the output folder: what is wrong, and what to try

logger = logging.getLogger(__name__)


def read_run(
    output_dir: Path, datasets: Sequence[Sequence[str]] = (), options: Sequence[str] = ()
) -> CfgNode:
    """Read the config of a finished run, and register its data sets.

    Args:
        output_dir: `OUTPUT_DIR` of the training, or of an evaluation alone.
        datasets: see :func:`freeanchor.data.register_datasets`.
        options: keys and values, one after another, that change the config.

    Raises:
        FreeAnchorError: something that the run should have is not there.
    """
    for names in (("config.yaml",), ("metrics.json", "inference/results.json")):
        if not any((output_dir / name).is_file() for name in names):
            raise FileError(
                f"{output_dir} has no {' or '.join(names)}: it is not the output of a training or "
                "an evaluation"
            )
    cfg = read_config(output_dir / "config.yaml")
    merge_options(cfg, options)
    register_datasets(datasets, cfg.MODEL.MASK_ON)
    cfg.OUTPUT_DIR = str(output_dir)
    for name in cfg.DATASETS.TEST:
        if name not in DatasetCatalog.list():
            raise FileError(f"give data set {name} as --dataset {name} ANNOTATIONS.json IMAGE_DIR")
        if not _results_file(cfg, name).is_file():
            raise FileError(f"there is no {_results_file(cfg, name)}: the run was not evaluated")
    if not cfg.MODEL.FREEANCHOR.CLASS_NAMES:
        logger.warning(
            f"{output_dir}/config.yaml does not name the classes: they are taken to be those of "
            "the data set, in its order"
        )
    if cfg.DATASETS.TEST:
        resolve_classes(cfg, cfg.DATASETS.TEST)
    return cfg


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read `metrics.json`, without what a later run into the same folder has overtaken.

    Args:
        path: the file that Detectron2's `JSONWriter` appends to. A last line that was cut off
            with its run is left out.

    Returns:
        One record per iteration, in increasing order of `iteration`; none of an evaluation alone,
        which has no such file.
    """
    if not path.is_file():
        return []
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
        # JSON has no NaN: such a value is written as null.
        values = {k: math.nan if value is None else value for k, value in record.items()}
        records.setdefault(iteration, {}).update(values)
    return [records[i] for i in sorted(records)]


def read_detections(
    cfg: CfgNode, name: str, records: list[dict[str, Any]]
) -> dict[Any, list[dict[str, Any]]]:
    """Read the detections of a run, in COCO's result format, by `image_id` of the records.

    Their classes have the ids of the data set as it is now, which need not be those that it had
    when the run was evaluated.

    Raises:
        FileError: they are of other images or classes than those of the data set.
    """
    detections: dict[Any, list[dict[str, Any]]] = {r["image_id"]: [] for r in records}
    path = _results_file(cfg, name)
    ids = _category_ids(path.with_name("categories.json"), name)
    for detection in json.loads(path.read_text()):
        if str(detection["category_id"]) not in ids:
            raise FileError(
                f"{path} has detections of the category {detection['category_id']!r}, which data "
                f"set {name} does not have: give the data set that the run was evaluated on"
            )
        detection["category_id"] = ids[str(detection["category_id"])]
        if detection["image_id"] not in detections:
            raise FileError(
                f"{path} has detections in image {detection['image_id']!r}, which data set {name} "
                "does not have: give the data set that the run was evaluated on"
            )
        detections[detection["image_id"]].append(detection)
    return detections


def _category_ids(path: Path, name: str) -> dict[str, Any]:
    """From the ids of classes in a run's results to those of a data set, by name."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", [])
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    contiguous = contiguous or {i: i for i in range(len(names))}
    own = {names[i]: user_id for user_id, i in contiguous.items()}
    if not path.is_file():  # of an evaluation before there was this file
        return {str(x): x for x in own.values()}
    written = json.loads(path.read_text())
    return {str(x["id"]): own[x["name"]] for x in written if x["name"] in own}


def _results_file(cfg: CfgNode, name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "inference" / file_stem(name) / "coco_instances_results.json"


class Run(NamedTuple):
    """A run of a report: what it is called there, its config, and what it logged."""

    name: str
    cfg: CfgNode
    metrics: list[dict[str, float]]

    def evaluated(self, dataset: str) -> list[dict[str, float]]:
        """The evaluations on a data set, with the names that its figures have alone."""
        # Detectron2 puts the name of the data set in front where there are several.
        prefix = f"{dataset}/" if len(self.cfg.DATASETS.TEST) > 1 else ""
        return [
            {k.removeprefix(prefix): v for k, v in r.items() if k.startswith(prefix)}
            | {"iteration": r["iteration"]}
            for r in self.metrics
            if f"{prefix}bbox/AP" in r
        ]

    def last_evaluated(self, dataset: str) -> dict[str, float]:
        """The figures of the detections that there are; none without an evaluation.

        They need not be of the training: `train_net.py --eval-only` into its folder replaces both.
        """
        path = Path(self.cfg.OUTPUT_DIR) / "inference" / "results.json"
        if path.is_file():
            found: dict[str, float | None] = json.loads(path.read_text()).get(dataset, {})
            if found:
                return {k: math.nan if v is None else v for k, v in found.items()}
        return (self.evaluated(dataset) or [{}])[-1]


class Scores(NamedTuple):
    """Thresholds: of all classes together and of each, and why, see `describe_scores`."""

    score: float
    classes: list[float]
    reason: str


def recommended_scores(run: Run, dataset: str, classes: Sequence[str]) -> Scores:
    """The thresholds of the last evaluation, else 0.5."""
    last = run.last_evaluated(dataset)

    def known(key: str, otherwise: float) -> float:
        score = last.get(f"threshold/{key}", math.nan)
        return otherwise if math.isnan(score) else score

    score, reason = known("score", math.nan), f"with the best F1 on {dataset} (last evaluation)"
    if math.isnan(score):
        score, reason = _SCORE, "the default, as no evaluation of the run recommends others"
    return Scores(score, [known(f"score-{name}", score) for name in classes], reason)


class Dataset(NamedTuple):
    """A data set, and the detections of each run: lists have an entry for each image."""

    name: str
    classes: list[str]
    records: list[dict[str, Any]]
    truth: list[NDArray[Any] | None]
    found: list[list[NDArray[Any]]]  # of each run
    masks: list[list[list[Any]]]  # of each run, of the detections in that order; None without

    @property
    def has_truth(self) -> bool:
        """Whether there is anything to be found."""
        return all(truth is not None for truth in self.truth)

    def judged(self, run: int, min_score: float) -> list[Any]:
        """Detections, objects and outcomes of the images, none where there is no truth."""
        result = []
        for found, truth in zip(self.found[run], self.truth):
            if truth is not None:
                found = found[found[:, 5] >= min_score]
                result.append((found, truth, outcomes(found, truth, MIN_IOU)))
        return result


def read_dataset(runs: Sequence[Run], name: str) -> Dataset:
    """Read a data set, and what each run detected in it."""
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    found, masks = [], []
    for run in runs:
        detections = read_detections(run.cfg, name, records)
        found.append([found_rows(detections[r["image_id"]], metadata) for r in records])
        key = "segmentation" if run.cfg.MODEL.MASK_ON else ""
        masks.append(
            [
                [d.get(key) for d in sorted(detections[r["image_id"]], key=lambda d: -d["score"])]
                for r in records
            ]
        )
    truth = [truth_rows(record) for record in records]  # of all images, or of none
    if not any(rows is not None and (rows[:, 5] == 0).any() for rows in truth):
        truth = [None] * len(records)  # crowds alone are no ground truth
    return Dataset(name, list(metadata.thing_classes), records, truth, found, masks)
