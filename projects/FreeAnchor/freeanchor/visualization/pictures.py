"""Pictures of a finished run: `freeanchor visualize OUTPUT_DIR`.

Detections beside ground truth, curves of the losses and the matching, and the matching itself: the
bag of each object at one or several checkpoints, beside what RetinaNet would have assigned.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation, convert_image_to_rgb
from detectron2.modeling import build_model
from numpy.typing import NDArray
from PIL import Image

from ..checkpoint import Checkpointer, describe_scores
from ..config import is_two_stage
from ..data import Mapper
from ..errors import FileError
from ..modeling import Matching, has_bags, match_inputs
from ..paths import file_stem
from .drawing import draw_curves, draw_detections, draw_matching
from .runs import Run, read_detections, read_metrics, recommended_scores

__all__ = ["choose", "match_images", "write_pictures"]

_T = TypeVar("_T")


def choose(records: list[_T], count: int) -> list[_T]:
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
        each checkpoint the matching; none for an image without objects. The name is the path where
        two have the same.

    Raises:
        FileError: see :class:`freeanchor.checkpoint.Checkpointer`; or it has no bags.
    """
    if not has_bags(cfg):
        name = cfg.MODEL.META_ARCHITECTURE
        name += f" with {cfg.MODEL.PROPOSAL_GENERATOR.NAME}" if is_two_stage(cfg) else ""
        raise FileError(f"{name} has no bags: give a run of FreeAnchor, LTM or FreeAnchorRPN")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
    # Images as in a test, but with their objects.
    options = Mapper.from_config(cfg, is_train=True)
    options["augmentations"] = build_augmentation(cfg, is_train=False)
    mapper, model = Mapper(**{**options, "recompute_boxes": False}), build_model(cfg).eval()
    images = [mapper(record) for record in records]
    found: list[dict[str, Matching]] = [{} for _ in images]
    names = [Path(checkpoint).stem for checkpoint in checkpoints]
    for name, checkpoint in zip(names if len({*names}) == len(names) else checkpoints, checkpoints):
        Checkpointer(model, cfg).load(checkpoint, checkpointables=[])
        for image, matchings in zip(images, found):
            if len(image.get("instances", ())):
                (matchings[name],) = match_inputs(model, [image])
    pixels = [convert_image_to_rgb(x["image"].permute(1, 2, 0), cfg.INPUT.FORMAT) for x in images]
    return list(zip(pixels, found))


def write_pictures(
    cfg: CfgNode, num_images: int, score_thresh: float | None, checkpoints: Sequence[str]
) -> Path:
    """Write the pictures of the run in `cfg.OUTPUT_DIR`.

    Args:
        cfg: config of the run.
        num_images: images per data set of `cfg.DATASETS.TEST`, spread evenly over it.
        score_thresh: of the detections; None for what the last evaluation recommends.
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
    metrics = read_metrics(output_dir / "metrics.json")
    if metrics:
        draw_curves(metrics).savefig(pictures / "curves.png", dpi=120)
    for name in cfg.DATASETS.TEST:
        records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        detections = read_detections(cfg, name, records)
        classes = metadata.thing_classes
        thresholds: list[float] | float
        if score_thresh is None:
            score, thresholds, reason = recommended_scores(Run("", cfg, metrics), name, classes)
            is_one = set(thresholds) <= {score}
            shown = describe_scores(score if is_one else dict(zip(classes, thresholds)), reason)
        else:
            thresholds, shown = score_thresh, describe_scores(score_thresh, "as given")
        print(f"Pictures of {name} show detections with scores of at least {shown}")
        chosen = choose(records, num_images)
        stems = [file_stem(f"{name}_{record['image_id']}") for record in chosen]
        for record, stem in zip(chosen, stems):
            drawn = draw_detections(
                record, detections[record["image_id"]], metadata, thresholds, cfg
            )
            Image.fromarray(drawn).save(pictures / f"{stem}.png")
        if checkpoints:
            for stem, (image, matchings) in zip(stems, match_images(cfg, checkpoints, chosen)):
                if matchings:
                    path = pictures / f"{stem}_matching.png"
                    draw_matching(image, matchings).savefig(path, dpi=100)
    return pictures
