"""Detectron2's trainer, on checked data, with FreeAnchor's evaluation and checkpoints."""

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluators
from torch import nn

from ..checkpoint import Checkpointer
from ..data import ImageReader, Mapper, load_training_set
from ..evaluation import BoxEvaluator, NMSRecallEvaluator
from ..modeling import FreeAnchor, MultiScaleTest
from ..paths import file_stem
from .hooks import MatchingPictures

__all__ = ["Trainer", "build_evaluator"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's trainer, on checked data and with COCO evaluation."""

    checkpointer: Any

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        records = load_training_set(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        # Enough to take the place of as many images as may break.
        spares = records[:: max(1, len(records) // (2 * cfg.DATALOADER.MAX_BROKEN_IMAGES + 1))]
        mapper = Mapper(cfg, is_train=True, spares=spares)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=Mapper(cfg, is_train=False))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate as the config says: at one scale, and with TEST.AUG.ENABLED at several."""
        results: dict[str, Any] = super().test(
            cfg, model, [build_evaluator(cfg, name, model) for name in cfg.DATASETS.TEST]
        )
        if cfg.TEST.AUG.ENABLED:
            logger.info("Evaluating with test-time augmentation")
            augmented = super().test(
                cfg,
                MultiScaleTest(cfg, model, ImageReader.from_config(cfg).read),
                [_box_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST],
            )
            several = len(cfg.DATASETS.TEST) > 1  # then the tasks are under the data sets
            for name in cfg.DATASETS.TEST if several else ("",):
                tasks, more = (results[name], augmented[name]) if several else (results, augmented)
                tasks.update({f"{task}_TTA": result for task, result in more.items()})
        return results

    def build_hooks(self) -> list[Any]:
        # Before the hooks take the checkpointer that Detectron2 has built.
        self.checkpointer = Checkpointer(
            self.checkpointer.model,
            self.cfg,
            self.cfg.OUTPUT_DIR,
            **self.checkpointer.checkpointables,
        )
        hooks: list[Any] = super().build_hooks()
        model = self.checkpointer.model  # without DistributedDataParallel
        if self.cfg.VIS_PERIOD > 0 and isinstance(model, FreeAnchor):
            # First, so that the writers among the others find its pictures.
            hooks.insert(0, MatchingPictures(model, self.cfg.VIS_PERIOD))
        return hooks


def _box_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> BoxEvaluator:
    return BoxEvaluator(
        dataset_name,
        output_dir=os.path.join(cfg.OUTPUT_DIR, folder, file_stem(dataset_name)),
        max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
    )


def build_evaluator(cfg: CfgNode, dataset_name: str, model: nn.Module) -> DatasetEvaluators:
    """Build the evaluators of a data set that the config asks for.

    Args:
        cfg: config of the run.
        dataset_name: a registered data set.
        model: what is to be evaluated.
    """
    wanted: list[Any] = [_box_evaluator(cfg, dataset_name, "inference")]
    if cfg.TEST.NMS_RECALL:
        wanted.append(NMSRecallEvaluator(dataset_name, model))
    return DatasetEvaluators(wanted)
