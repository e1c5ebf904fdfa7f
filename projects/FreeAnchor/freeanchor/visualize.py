"""Pictures of a finished run: `python -m freeanchor.visualize OUTPUT_DIR`.

Detections beside ground truth, and curves of the losses and the matching. It reads what
`train_net.py` wrote; no model is run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from .data import DatasetError, add_dataset_argument, register_datasets
from .files import FileError, read_config

_MIN_SIZE = 512  # shorter side of a picture, so that labels do not hide small images
_CURVES = (
    ("Losses", ("total_loss", "loss_positive", "loss_negative")),
    ("Likelihood of a bag", ("freeanchor/bag_likelihood", "freeanchor/localized_objects")),
    ("Anchors that carry a bag", ("freeanchor/anchors_per_bag",)),
)


def draw_detections(
    record: dict[str, Any], detections: list[dict[str, Any]], metadata: Any, score_thresh: float
) -> NDArray[Any]:
    """Draw the ground truth of an image and, to its right, its detections.

    Args:
        record: the image in Detectron2's standard format.
        detections: its detections in COCO's result format.
        metadata: classes of the data set, and its `thing_dataset_id_to_contiguous_id`.
        score_thresh: detections with a lower score are left out.

    Returns:
        (H, 2 * W, 3) uint8 RGB image, where small images are enlarged.
    """
    image = read_image(record["file_name"], "RGB")
    contiguous = metadata.thing_dataset_id_to_contiguous_id
    truth = [
        (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], "")
        for a in record["annotations"]
    ]
    found = [
        (
            BoxMode.convert(d["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
            contiguous[d["category_id"]],
            f" {d['score']:.0%}",
        )
        for d in detections
        if d["score"] >= score_thresh
    ]
    return np.concatenate([_draw_boxes(image, x, metadata) for x in (truth, found)], axis=1)


def _draw_boxes(
    image: NDArray[Any], objects: list[tuple[list[float], int, str]], metadata: Any
) -> NDArray[Any]:
    """Draw (box, class, what to say after the class) on an image, a colour for each class."""
    colors = colormap(rgb=True, maximum=1)
    drawn: NDArray[Any] = (
        Visualizer(image, metadata, scale=max(1.0, _MIN_SIZE / min(image.shape[:2])))
        .overlay_instances(
            boxes=np.array([box for box, _, _ in objects]).reshape(-1, 4),
            labels=[metadata.thing_classes[c] + suffix for _, c, suffix in objects],
            assigned_colors=[colors[c % len(colors)] for _, c, _ in objects],
        )
        .get_image()
    )
    return drawn


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


def draw_curves(records: list[dict[str, float]]) -> Figure:
    """Plot the losses and what FreeAnchor logs of its matching, over the iterations.

    Args:
        records: see :func:`read_metrics`.

    Returns:
        A figure, to be saved.
    """
    figure = Figure(figsize=(6, 9), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(len(_CURVES), sharex=True), _CURVES):
        for key in keys:
            logged = [r for r in records if key in r]
            axes.plot(
                [r["iteration"] for r in logged],
                [r[key] for r in logged],
                label=key.split("/")[-1],
            )
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_xlabel("iteration")
    return figure


def write_pictures(cfg: CfgNode, num_images: int, score_thresh: float) -> Path:
    """Write the pictures of the run in `cfg.OUTPUT_DIR`.

    Args:
        cfg: config of the run.
        num_images: images per data set of `cfg.DATASETS.TEST`, spread evenly over it.
        score_thresh: see :func:`draw_detections`.

    Returns:
        The folder with the pictures.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    pictures = output_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    for picture in pictures.glob("*.png"):  # of another model, or other images
        picture.unlink()
    draw_curves(read_metrics(output_dir / "metrics.json")).savefig(pictures / "curves.png", dpi=120)
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        detections: dict[int, list[dict[str, Any]]] = {r["image_id"]: [] for r in records}
        for detection in json.loads(_results_file(cfg, name).read_text()):
            detections[detection["image_id"]].append(detection)
        chosen = np.linspace(0, len(records) - 1, min(num_images, len(records)), dtype=int)
        for record in (records[i] for i in chosen):
            drawn = draw_detections(
                record, detections[record["image_id"]], MetadataCatalog.get(name), score_thresh
            )
            Image.fromarray(drawn).save(pictures / f"{name}_{record['image_id']}.png")
    return pictures


def _results_file(cfg: CfgNode, name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "inference" / name / "coco_instances_results.json"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m freeanchor.visualize", description="Pictures of a finished run."
    )
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of train_net.py")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--score-thresh", type=float, default=0.7)
    add_dataset_argument(parser)
    args = parser.parse_args()
    for name in ("config.yaml", "metrics.json"):
        if not (args.output_dir / name).is_file():
            parser.error(f"{args.output_dir} has no {name}: it is not the output of a training")
    try:
        cfg = read_config(args.output_dir / "config.yaml")
        register_datasets(args.dataset)
    except (DatasetError, FileError) as e:
        parser.error(str(e))
    cfg.OUTPUT_DIR = str(args.output_dir)
    for name in cfg.DATASETS.TEST:
        if name not in DatasetCatalog.list():
            parser.error(f"give data set {name} as --dataset {name} ANNOTATIONS.json IMAGE_DIR")
        if not _results_file(cfg, name).is_file():
            parser.error(f"there is no {_results_file(cfg, name)}: the run was not evaluated")
    pictures = write_pictures(cfg, args.num_images, args.score_thresh)
    print(f"Detections beside ground truth and the curves of the training are in {pictures}")


if __name__ == "__main__":
    main()
