"""Pictures of a finished run: `python -m freeanchor.visualize OUTPUT_DIR`.

Detections beside ground truth, curves of the losses and the matching, and the matching itself: the
bag of each object at one or several checkpoints, beside what RetinaNet would have assigned.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import build_model
from numpy.typing import NDArray
from PIL import Image

from .checkpoint import Checkpointer
from .data import DatasetError, Mapper, add_dataset_argument, register_datasets
from .drawing import draw_curves, draw_detections, draw_matching
from .files import FileError, read_config
from .model import FreeAnchor, Matching

__all__ = [
    "choose",
    "match_images",
    "read_detections",
    "read_metrics",
    "read_run",
    "write_pictures",
]


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


def choose(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Pick `count` records, spread evenly."""
    chosen = np.linspace(0, len(records) - 1, min(count, len(records)), dtype=int)
    return [records[i] for i in chosen]


@torch.no_grad()
def match_images(
    cfg: CfgNode, checkpoints: Sequence[str], records: list[dict[str, Any]]
) -> list[tuple[NDArray[Any], dict[str, Matching]]]:
    """Match the objects of images with the models of some checkpoints.

    Args:
        cfg: config of the models.
        checkpoints: their files.
        records: images in Detectron2's standard format.

    Returns:
        Per image, its pixels as the network sees them, (H, W, 3) uint8 RGB, and by the name of
        each checkpoint the matching; none for an image without objects.

    Raises:
        FileError: see :class:`freeanchor.checkpoint.Checkpointer`; or it is not a FreeAnchor.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
    # Images as in a test, but with their objects.
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (
        (cfg.INPUT.MIN_SIZE_TEST,),
        cfg.INPUT.MAX_SIZE_TEST,
    )
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.ENABLED = "none", False
    mapper, model = Mapper(cfg, is_train=True), build_model(cfg).eval()
    if not isinstance(model, FreeAnchor):
        raise FileError(f"{cfg.MODEL.META_ARCHITECTURE} has no bags: give a run of FreeAnchor")
    images = [mapper(record) for record in records]
    found: list[dict[str, Matching]] = [{} for _ in images]
    for checkpoint in checkpoints:
        Checkpointer(model, cfg).load(checkpoint, checkpointables=[])
        for image, matchings in zip(images, found):
            if len(image["instances"]):
                inputs = model.preprocess_image([image]).tensor
                features = model.backbone(inputs)
                features = [features[name] for name in model.head_in_features]
                logits, deltas = model._transpose_dense_predictions(
                    model.head(features), [model.num_classes, 4]
                )
                objects = [image["instances"].to(model.device)]
                (matchings[Path(checkpoint).stem],) = model.match(
                    model.anchor_generator(features), logits, deltas, objects
                )
    pixels = [convert_image_to_rgb(x["image"].permute(1, 2, 0), cfg.INPUT.FORMAT) for x in images]
    return list(zip(pixels, found))


def write_pictures(
    cfg: CfgNode, num_images: int, score_thresh: float, checkpoints: Sequence[str]
) -> Path:
    """Write the pictures of the run in `cfg.OUTPUT_DIR`.

    Args:
        cfg: config of the run.
        num_images: images per data set of `cfg.DATASETS.TEST`, spread evenly over it.
        score_thresh: see :func:`freeanchor.drawing.draw_detections`.
        checkpoints: whose matching is drawn.

    Returns:
        The folder with the pictures.

    Raises:
        FileError: see :func:`match_images`.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    pictures = output_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    for picture in pictures.glob("*.png"):  # of another model, or other images
        picture.unlink()
    draw_curves(read_metrics(output_dir / "metrics.json")).savefig(pictures / "curves.png", dpi=120)
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        detections = read_detections(cfg, name, records)
        chosen = choose(records, num_images)
        for record in chosen:
            drawn = draw_detections(
                record, detections[record["image_id"]], MetadataCatalog.get(name), score_thresh
            )
            Image.fromarray(drawn).save(pictures / f"{name}_{record['image_id']}.png")
        if checkpoints:
            for record, (image, matchings) in zip(chosen, match_images(cfg, checkpoints, chosen)):
                if matchings:
                    path = pictures / f"{name}_{record['image_id']}_matching.png"
                    draw_matching(image, matchings).savefig(path, dpi=100)
    return pictures


def read_detections(
    cfg: CfgNode, name: str, records: list[dict[str, Any]]
) -> dict[Any, list[dict[str, Any]]]:
    """Read the detections of a run, in COCO's result format, by `image_id` of the records."""
    detections: dict[Any, list[dict[str, Any]]] = {r["image_id"]: [] for r in records}
    for detection in json.loads(_results_file(cfg, name).read_text()):
        detections[detection["image_id"]].append(detection)
    return detections


def _results_file(cfg: CfgNode, name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "inference" / name / "coco_instances_results.json"


def read_run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> CfgNode:
    """The config of the finished run in `args.output_dir`, whose data sets are then registered.

    Ends with the parser's error where something that the run should have is not there.
    """
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
    return cfg


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m freeanchor.visualize", description="Pictures of a finished run."
    )
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of train_net.py")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--score-thresh", type=float, default=0.7)
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        metavar="FILE",
        help="draw the matching of these, side by side; a name is of a file in OUTPUT_DIR "
        "(default: model_final.pth, if it is there and a FreeAnchor)",
    )
    add_dataset_argument(parser)
    args = parser.parse_args()
    cfg = read_run(parser, args)
    checkpoints = args.checkpoints
    if checkpoints is None:
        is_there = (args.output_dir / "model_final.pth").is_file()
        is_freeanchor = cfg.MODEL.META_ARCHITECTURE == "FreeAnchor"
        checkpoints = ["model_final.pth"] if is_there and is_freeanchor else []
    checkpoints = [
        str(args.output_dir / x) if (args.output_dir / x).is_file() else x for x in checkpoints
    ]
    try:
        pictures = write_pictures(cfg, args.num_images, args.score_thresh, checkpoints)
    except FileError as e:
        parser.error(str(e))
    print(f"Detections beside ground truth, matching and curves are in {pictures}")


if __name__ == "__main__":
    main()
