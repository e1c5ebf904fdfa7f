"""A run on one page: `freeanchor report OUTPUT_DIR` writes OUTPUT_DIR/report.html.

The page holds its pictures, needs no network and can be sent as it is. It reads what `train_net.py`
wrote; for the matching, the model is run on a few images.
"""

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ..evaluation import ASPECT_RATIOS, CROWDING
from .drawing import class_index, draw_curves, draw_detections, draw_matching, to_image
from .pictures import choose, match_images
from .runs import read_detections, read_metrics

__all__ = ["image_f1", "write_report"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; border-radius: 4px; background: #fff; }
figure { margin: 0 0 1rem; } figcaption { font-size: .85rem; opacity: .75; }
.grid { display: grid; gap: 1rem; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.figures b { display: block; font-size: 1.6rem; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); border-radius: 4px; }
"""
_F1_SCORE = 0.5
_F1_IOU = 0.5


def image_f1(record: dict[str, Any], detections: list[dict[str, Any]], metadata: Any) -> float:
    """F1 of the detections of an image: score at least 0.5, IoU at least 0.5, of the right class.

    Args:
        record: the image in Detectron2's standard format.
        detections: its detections in COCO's result format.
        metadata: of the data set, with its `thing_dataset_id_to_contiguous_id`.

    Returns:
        2 TP / (2 TP + FP + FN) in [0, 1]; 1 where there is neither object nor detection.
    """
    objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd")]
    found = sorted(
        (d for d in detections if d["score"] >= _F1_SCORE), key=lambda d: d["score"], reverse=True
    )
    truth = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    boxes = [BoxMode.convert(d["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for d in found]
    iou = pairwise_iou(Boxes(boxes), Boxes(truth)).numpy() if boxes and truth else np.zeros((0, 0))
    free = np.ones(len(objects), dtype=bool)
    hits = 0
    for detection, row in zip(found, iou):
        label = class_index(metadata, detection["category_id"])
        fits = free & (row >= _F1_IOU) & np.array([a["category_id"] == label for a in objects])
        if fits.any():
            free[np.where(fits, row, -1).argmax()] = False
            hits += 1
    total = len(found) + len(objects)
    return 2 * hits / total if total else 1.0


def _figure(image: NDArray[Any] | Figure, caption: str = "") -> str:
    pixels = Image.fromarray(to_image(image) if isinstance(image, Figure) else image)
    content = io.BytesIO()
    if isinstance(image, Figure):
        pixels.save(content, "PNG", optimize=True)
    else:
        pixels.save(content, "JPEG", quality=85)
    kind = "png" if isinstance(image, Figure) else "jpeg"
    data = base64.b64encode(content.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(x)}</th>" for x in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def _draw_ap(evaluated: list[dict[str, float]], prefix: str) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in ("AP", "AP50", "AP75"):
        values = [(r["iteration"], r[f"{prefix}/{name}"]) for r in evaluated]
        axes.plot(*zip(*values), marker="o", label=name)
    axes.set(title="AP", xlabel="iteration", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _scores(metrics: list[dict[str, float]], name: str, num_datasets: int) -> list[str]:
    """The figures of one data set, from the last evaluation, and AP over time."""
    # Detectron2 puts the name of the data set in front where there are several.
    prefix = f"{name}/" if num_datasets > 1 else ""
    evaluated = [r for r in metrics if f"{prefix}bbox/AP" in r]
    if not evaluated:
        if not _has_truth(DatasetCatalog.get(name)):
            return ["<p>The data set has no ground truth, so there are no figures.</p>"]
        return ["<p>The run was not evaluated while it trained.</p>"]
    last = {k.removeprefix(prefix): v for k, v in evaluated[-1].items() if k.startswith(prefix)}
    big = [
        (label, last.get(key))
        for label, key in (
            ("AP", "bbox/AP"),
            ("AP50", "bbox/AP50"),
            ("AP75", "bbox/AP75"),
            ("NMS recall", "nms_recall/NR"),
            ("AP, several scales", "bbox_TTA/AP"),
        )
        if key in last
    ]
    parts = ['<div class="figures">']
    parts += [f"<div>{label}<b>{_number(value)}</b></div>" for label, value in big]
    parts.append('</div><div class="grid">')
    if len(evaluated) > 1:
        parts.append(_figure(_draw_ap(evaluated, f"{prefix}bbox"), "AP over time"))
    for title, task, ranges in (
        ("Longer over shorter side", "aspect_ratio", ASPECT_RATIOS),
        ("Crowding", "crowding", CROWDING),
    ):
        rows = [
            [label, *(_number(last[f"{task}/{metric}{label}"]) for metric in ("AP", "AR"))]
            for label, _ in ranges
            if f"{task}/AP{label}" in last
        ]
        if rows:  # evaluated by an evaluator that has them
            parts.append(_table([title, "AP", "AR"], rows))
    classes = sorted(
        ((k.removeprefix("bbox/AP-"), v) for k, v in last.items() if k.startswith("bbox/AP-")),
        key=lambda x: (math.isnan(x[1]), -x[1]),
    )
    if classes:
        parts.append(_table(["class", "AP"], [[k, _number(v)] for k, v in classes]))
    return [*parts, "</div>"]


def _has_truth(records: list[dict[str, Any]]) -> bool:
    return any(not a.get("iscrowd") for r in records for a in r.get("annotations", ()))


def _images(cfg: CfgNode, name: str, num_images: int, score_thresh: float) -> list[str]:
    """Detections beside ground truth, the best and the worst images, and the matching."""
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    detections = read_detections(cfg, name, records)
    groups = [("Some images", choose(records, num_images))]
    score: dict[Any, float] = {}
    if _has_truth(records):
        score = {r["image_id"]: image_f1(r, detections[r["image_id"]], metadata) for r in records}
        by_score = sorted(records, key=lambda r: -score[r["image_id"]])
        groups.append(("Best images", by_score[:num_images]))
        groups.append(("Worst images", by_score[::-1][:num_images]))
    parts = []
    for title, chosen in groups:
        parts.append(
            f"<h2>{title}</h2><p>{'Ground truth' if score else 'The image'} left or above, "
            'detections right or below.</p><div class="grid">'
        )
        for record in chosen:
            drawn = draw_detections(record, detections[record["image_id"]], metadata, score_thresh)
            caption = Path(record["file_name"]).name
            if score:
                caption += f": F1 {score[record['image_id']]:.2f}"
            parts.append(_figure(drawn, caption))
        parts.append("</div>")
    model = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    with_objects = [r for r in records if r.get("annotations")]
    if with_objects and model.is_file() and cfg.MODEL.META_ARCHITECTURE == "FreeAnchor":
        parts.append(
            "<h2>Matching</h2><p>The bags of objects (red), coloured by the matched probability of "
            "their anchors, beside what RetinaNet would assign by IoU.</p><div class='grid'>"
        )
        chosen = choose(with_objects, num_images)
        for record, (image, matchings) in zip(chosen, match_images(cfg, [str(model)], chosen)):
            if matchings:
                figure = draw_matching(image, matchings, max_objects=3)
                parts.append(_figure(figure, Path(record["file_name"]).name))
        parts.append("</div>")
    return parts


def write_report(cfg: CfgNode, num_images: int, score_thresh: float) -> Path:
    """Write the report of the run in `cfg.OUTPUT_DIR`.

    Args:
        cfg: config of the run; its data sets are registered.
        num_images: images of each kind, for each data set of `cfg.DATASETS.TEST`.
        score_thresh: detections below it are not drawn.

    Returns:
        The page.

    Raises:
        FileError: the checkpoint of the run cannot be read.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    metrics = read_metrics(output_dir / "metrics.json")
    title = f"{cfg.MODEL.META_ARCHITECTURE}, {output_dir.resolve().name}"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p>{len(metrics) and int(metrics[-1]['iteration'])} iterations of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images.</p>",
    ]
    for name in cfg.DATASETS.TEST:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += _scores(metrics, name, len(cfg.DATASETS.TEST))
    parts.append(f"<h2>Training</h2>{_figure(draw_curves(metrics), 'Losses and likelihood')}")
    for name in cfg.DATASETS.TEST:
        parts += _images(cfg, name, num_images, score_thresh)
    parts.append(
        f"<h2>Config</h2><details><summary>All keys</summary><pre>{html.escape(cfg.dump())}"
    )
    parts.append("</pre></details></html>")
    path = output_dir / "report.html"
    path.write_text("\n".join(parts), encoding="utf-8", errors="xmlcharrefreplace")
    return path
