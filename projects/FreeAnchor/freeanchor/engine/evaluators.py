"""The evaluators that a config asks for, and what they compute."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from ..evaluation import (
    BoxEvaluator,
    NMSRecallEvaluator,
    ProposalRecallEvaluator,
    box_metrics,
)
from ..paths import file_stem

__all__ = ["best_metrics", "build_evaluator", "looking_into"]

logger = logging.getLogger(__name__)


def best_metrics(cfg: CfgNode) -> list[str]:
    """What `TEST.BEST_METRIC` may be: of what a test computes, what is best if high."""
    found = box_metrics(cfg.MODEL.FREEANCHOR.CLASS_NAMES, cfg.MODEL.MASK_ON)
    if cfg.TEST.AUG.ENABLED:
        found += [x.replace("/", "_TTA/", 1) for x in found]
    if cfg.TEST.NMS_RECALL:
        limits = ("", *(round(100 * x) for x in NMSRecallEvaluator.IOU_THRESHS))
        found += [f"nms_recall/NR{x}" for x in limits]
    if cfg.TEST.PROPOSAL_RECALL:
        found += [f"proposal_recall/AR@{x}" for x in ProposalRecallEvaluator.LIMITS]
    return found


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> BoxEvaluator:
    """Build what evaluates the boxes and masks that are found in a data set.

    Args:
        cfg: config of the run.
        dataset_name: a registered data set.
        output_folder: where its files go, by default `inference` in `OUTPUT_DIR`.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if not kind.startswith("coco"):  # "coco_panoptic_seg" has the same figures of boxes
        logger.warning(
            f"{dataset_name}: AP is COCO's, and not that of its evaluator_type {kind}, which may "
            "leave other objects and classes out. For that, override build_evaluator of "
            "freeanchor.engine.Trainer"
        )
    if cfg.MODEL.KEYPOINT_ON:
        logger.warning(
            f"{dataset_name}: of what MODEL.KEYPOINT_ON finds, boxes and masks alone are "
            "evaluated. For keypoints, override build_evaluator of freeanchor.engine.Trainer"
        )
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    return BoxEvaluator(
        dataset_name,
        output_dir=os.path.join(folder, file_stem(dataset_name)),
        max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
    )


def looking_into(model: nn.Module, cfg: CfgNode, dataset_name: str) -> list[DatasetEvaluator]:
    """Build those that see more of a model than what it finds, as the config asks for."""
    found: list[DatasetEvaluator] = []
    if cfg.TEST.NMS_RECALL:
        found.append(NMSRecallEvaluator(dataset_name, model))
    if cfg.TEST.PROPOSAL_RECALL:
        found.append(ProposalRecallEvaluator(dataset_name, model))
    return found
