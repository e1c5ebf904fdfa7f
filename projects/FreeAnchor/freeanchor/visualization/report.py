"""Runs on one page: `freeanchor report OUTPUT_DIR [OUTPUT_DIR]` writes OUTPUT_DIR/report.html.

The page holds its pictures, needs no network and can be sent as it is. It reads what `train_net.py`
wrote; for the bags, the model is run on the images that are shown.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode

from ..data.catalog import take_over
from ..errors import FileError
from ..evaluation import ASPECT_RATIOS, CROWDING, FALSE_POSITIVES, confusion, precision_recall
from .charts import COLORS, Line, confusion_table, line_chart, number, table
from .drawing import curves
from .gallery import gallery
from .page import VIEWER, make_page, read_asset
from .runs import (
    MIN_IOU,
    NOT_LEARNING,
    Dataset,
    Run,
    read_dataset,
    read_metrics,
    recommended_scores,
)

__all__ = ["write_report"]

_PICTURE_BYTES = 3_300_000  # of all pictures together: the page has 5 MB at most for 50 of them
_LEAST_PICTURE_BYTES = 25_000
_FIGURES = (
    ("AP", "bbox/AP"),
    ("AP50", "bbox/AP50"),
    ("AP75", "bbox/AP75"),
    ("AP of masks", "segm/AP"),
    ("NMS recall", "nms_recall/NR"),
    ("AP, several scales", "bbox_TTA/AP"),
    ("calibration error", "calibration/ECE"),
    ("false of those above 0.5", "calibration/FP>0.5"),
)
_CURVE_CLASSES = 8  # as many get a line of their own


def _scores(runs: Sequence[Run], data: Dataset) -> list[str]:
    """The figures of the last evaluations, and AP over time."""
    evaluated = [run.evaluated(data.name) for run in runs]
    if not data.has_truth:
        return ["<p>The data set has no ground truth, so there are no figures.</p>"]
    last = [run.last_evaluated(data.name) for run in runs]
    if not any(last):
        return ["<p>The run was not evaluated while it trained.</p>"]
    names = [run.name for run in runs] if len(runs) > 1 else [""]
    columns = [("run", names)] if len(runs) > 1 else []
    columns += [
        (label, [number(r.get(key)) for r in last])
        for label, key in _FIGURES
        if any(key in r for r in last)
    ]
    parts = ['<div class="figures">']
    for label, (first, *others) in columns:
        seconds = "".join(f'<b class="second">{html.escape(x)}</b>' for x in others)
        parts.append(f"<div>{label}<b>{html.escape(first)}</b>{seconds}</div>")
    parts.append('</div><div class="grid">')

    def add(title: str, keys: Sequence[tuple[str, Sequence[str]]], metrics: Sequence[str]) -> None:
        """A table with a row for each (label, keys of its metrics) and columns for each run."""
        rows = [
            [label, *(number(r.get(k)) for k in row_keys for r in last)]
            for label, row_keys in keys
            if any(k in r for k in row_keys for r in last)
        ]
        if rows:
            columns = [f"{metric} {name}".strip() for metric in metrics for name in names]
            parts.append(table([title, *columns], rows))

    for title, task, ranges in (
        ("Longer over shorter side", "aspect_ratio", ASPECT_RATIOS),
        ("Crowding", "crowding", CROWDING),
    ):
        limits = [(label, [f"{task}/{m}{label}" for m in ("AP", "AR")]) for label, _ in ranges]
        add(title, limits, ("AP", "AR"))
    classes = {k: v for r in reversed(last) for k, v in r.items() if k.startswith("bbox/AP-")}
    by_ap = sorted(classes, key=lambda k: (np.isnan(classes[k]), -classes[k]))
    add("class", [(k.removeprefix("bbox/AP-"), [k]) for k in by_ap], ("AP",))
    kinds = [(kind, [f"calibration/{kind}>0.5"]) for kind in FALSE_POSITIVES]
    add("false, above a score of 0.5", kinds, ("%",))
    scores = [recommended_scores(run, data.name, data.classes).classes for run in runs]
    if any("threshold/score" in r for r in last):
        rows = [[x, *(f"{s[c]:.2f}" for s in scores)] for c, x in enumerate(data.classes)]
        parts.append(
            table(["class", *(f"score with the best F1 {x}".strip() for x in names)], rows)
        )
    lines = [
        Line(
            f"{metric} {name}".strip(),
            [r["iteration"] for r in mine],
            [r[f"bbox/{metric}"] for r in mine],
            COLORS[i],
            is_dashed=run > 0,
        )
        for run, (name, mine) in enumerate(zip(names, evaluated))
        for i, metric in enumerate(("AP", "AP50", "AP75"))
        if len(mine) > 1
    ]
    if lines:
        parts.append(line_chart("AP over time", lines, "iteration", (0, 100)))
    return [*parts, "</div>"]


def _errors(runs: Sequence[Run], data: Dataset, score_thresh: float) -> list[str]:
    """Precision-recall by class and confusion, of all images."""
    parts = ['<h3>Precision and recall</h3><div class="grid">']
    recalls = np.linspace(0, 1, 101)
    for i, run in enumerate(runs):
        curves = precision_recall(data.judged(i, 0), len(data.classes))
        has_objects = [c for c in range(len(data.classes)) if not np.isnan(curves[c]).any()]
        are_many = len(has_objects) > _CURVE_CLASSES
        lines = [
            Line(
                "" if are_many else data.classes[c],
                recalls,
                curves[c],
                "#8886" if are_many else COLORS[c % len(COLORS)],
                width=1 if are_many else 2,
                note=f"AP50 {number(100 * curves[c].mean())}",
            )
            for c in has_objects
        ]
        if are_many:
            mean = np.mean([curves[c] for c in has_objects], axis=0)
            note = f"AP50 {number(100 * mean.mean())}"
            lines.append(Line("mean of the classes", recalls, mean, COLORS[0], width=3, note=note))
        title = f"IoU {MIN_IOU}{f', {run.name}' if len(runs) > 1 else ''}"
        if lines:
            parts.append(line_chart(f"Precision over recall, {title}", lines, "recall", (0, 1)))
        if are_many:
            by_ap = sorted(has_objects, key=(-curves.mean(axis=1)).__getitem__)
            rows = [[data.classes[c], number(100 * curves[c].mean())] for c in by_ap]
            parts.append(table([f"class, {title}", "AP50"], rows))
    parts.append('</div><h3>Confusion</h3><div class="grid">')
    for i, run in enumerate(runs):
        counts = confusion(data.judged(i, score_thresh), len(data.classes))
        caption = f"{run.name}: objects, and what they were detected as with a score of "
        caption += f"{score_thresh:g} and an IoU of {MIN_IOU}."
        parts.append(confusion_table(counts, data.classes, caption))
    return [*parts, "</div>"]


def _training(runs: Sequence[Run]) -> list[str]:
    """The losses and what FreeAnchor logs of its matching, over the iterations."""
    parts = ['<h2>Training</h2><div class="grid">']
    for title, keys in curves([r for run in runs for r in run.metrics]):
        lines = []
        for i, run in enumerate(runs):
            for color, key in zip(COLORS, keys):
                logged = [r for r in run.metrics if key in r]
                name = key.split("/")[-1] + (f", {run.name}" if len(runs) > 1 else "")
                x, y = [r["iteration"] for r in logged], [r[key] for r in logged]
                lines += [Line(name, x, y, color, is_dashed=i > 0)] if logged else []
        if lines:
            parts.append(line_chart(title, lines, "iteration"))
    return [*parts, "</div>"]


def _configs(runs: Sequence[Run]) -> list[str]:
    parts = ["<h2>Config</h2>"]
    if len(runs) > 1:
        dumps = [run.cfg.dump().splitlines() for run in runs]
        for run, mine, others in zip(runs, dumps, dumps[::-1]):
            text = html.escape("\n".join(line for line in mine if line not in others))
            parts.append(f"<p>Only in {html.escape(run.name)}:</p><pre>{text}</pre>")
    for run in runs:
        name = f" of {html.escape(run.name)}" if len(runs) > 1 else ""
        text = html.escape(run.cfg.dump())
        parts.append(f"<details><summary>All keys{name}</summary><pre>{text}</pre></details>")
    return parts


def write_report(cfgs: Sequence[CfgNode], num_images: int, score_thresh: float | None) -> Path:
    """Write the report of a run, or of two side by side, into the folder of the first.

    Args:
        cfgs: config of each run, one or two; their data sets are registered.
        num_images: images on the page. With up to 50 it has at most 5 MB.
        score_thresh: where the slider of the score begins, and the score of the confusion table;
            None for what the last evaluation of the first run recommends.

    Returns:
        The page.

    Raises:
        FileError: the checkpoint of a run cannot be read, or two runs were evaluated on different
            data sets or have other classes.
    """
    folders = [Path(cfg.OUTPUT_DIR).resolve() for cfg in cfgs]
    are_alike = len({folder.name for folder in folders}) < len(folders)
    runs = [
        Run(str(folder) if are_alike else folder.name, cfg, read_metrics(folder / "metrics.json"))
        for folder, cfg in zip(folders, cfgs)
    ]
    first = runs[0].cfg
    for run in runs[1:]:
        if run.cfg.DATASETS.TEST != first.DATASETS.TEST:
            raise FileError(
                f"{run.name} was evaluated on {', '.join(run.cfg.DATASETS.TEST)} and "
                f"{runs[0].name} on {', '.join(first.DATASETS.TEST)}: evaluate both on the same"
            )
        if run.cfg.MODEL.FREEANCHOR.CLASS_NAMES != first.MODEL.FREEANCHOR.CLASS_NAMES:
            raise FileError(
                f"{run.name} and {runs[0].name} do not have the same classes in the same order "
                "(MODEL.FREEANCHOR.CLASS_NAMES): write a report for each"
            )
    title = " and ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for run in runs:
        if run.metrics:
            what = f"{int(run.metrics[-1]['iteration'])} iterations of "
            what += f"{run.cfg.SOLVER.IMS_PER_BATCH} images"
        else:
            what = f"an evaluation of {html.escape(run.cfg.MODEL.WEIGHTS)}"
        parts.append(f"<p>{html.escape(run.name)}: {run.cfg.MODEL.META_ARCHITECTURE}, {what}.</p>")
        warning = Path(run.cfg.OUTPUT_DIR) / NOT_LEARNING
        if warning.is_file():
            text = warning.read_text(encoding="utf-8", errors="replace")
            parts.append(f"<p><strong>{html.escape(text.strip())}</strong></p>")
    names = first.DATASETS.TEST
    count = -(-num_images // max(1, len(names)))
    max_bytes = max(_PICTURE_BYTES, _LEAST_PICTURE_BYTES * num_images) // max(1, len(names))
    for name in names:
        if len({run.cfg.MODEL.MASK_ON for run in runs}) > 1:
            take_over(name).use_masks(True)  # whichever was read last
        data = read_dataset(runs, name)
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += _scores(runs, data)
        score = score_thresh
        if score is None:
            score = recommended_scores(runs[0], name, data.classes).score
        if data.has_truth:
            parts += _errors(runs, data, score)
        parts += gallery(runs, data, count, max_bytes, score)
    parts += [*_training(runs), *_configs(runs)]
    styles = [read_asset("viewer.css"), read_asset("report.css")]
    scripts = [read_asset(name) for name in (*VIEWER, "report.js")]
    path = folders[0] / "report.html"
    text = make_page(title, "\n".join(parts), styles, scripts)
    # Names may hold what is no character.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
