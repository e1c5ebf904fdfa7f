"""Detectron2's trainer, on checked data, with FreeAnchor's evaluation and checkpoints."""

import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import Checkpointer, checksum
from ..data import (
    ImageReader,
    Mapper,
    check_alike,
    check_overlap,
    load_training_set,
    report_findings,
    resolve_classes,
)
from ..errors import DatasetError, FreeAnchorError, LoaderError
from ..modeling import BagDetector, MultiScaleTest, has_bags, without_ddp
from ..values import building
from .checkpoints import BestCheckpointer, Checkpoints, check_best_metric, has_best
from .defaults import check_config, keep_config, report_changes, scale_schedule
from .evaluators import best_metrics, build_evaluator, looking_into
from .hooks import MatchingPictures, PreciseBN
from .learning import LearningCheck
from .loader import TrainLoader
from .metrics import MetricsWriter, TolerantWriter
from .optimizer import build_optimizer, load_momentum
from .precision import inference_autocast, optimize
from .random_state import random_state, set_random_state
from .results import add_augmented, keep_figures, keep_thresholds, verify
from .step import Request, TrainStep

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

# Just before the end of a schedule, which is 1.
_END = 1 - 1e-5


class Trainer(DefaultTrainer):
    """Detectron2's trainer, on checked data and with COCO evaluation.

    What it builds and the hooks that it runs are Detectron2's; the loop, the step and what a
    checkpoint holds are its own, the same with Detectron2 0.6 and its main branch.

    Scripts use it without `train_net.py`: data sets that are registered in any way of Detectron2's
    are read by our reader and brought to the classes of the model by their names. What it leaves to
    them is to look at all images first (:func:`freeanchor.data.check_images`) and to set a seed.
    """

    checkpointer: Any

    def __init__(self, cfg: CfgNode) -> None:
        """Build model, optimiser, data loader and hooks.

        Args:
            cfg: config of the run, for `SOLVER.REFERENCE_WORLD_SIZE` processes.

        Raises:
            FreeAnchorError: a data set or the config cannot be used, or the batch cannot be divided
                as the config wants it.
        """
        TrainerBase.__init__(self)
        names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        cfg = _resolve_classes(cfg, names)
        if comm.is_main_process():
            report_findings(names)
        check_config(cfg, training=True)
        check_alike(names)
        check_overlap(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
        self._unscaled = cfg
        self.cfg = cfg = scale_schedule(cfg)
        _check_batch(cfg)
        model = self.build_model(cfg)
        with building("The optimiser", cfg, "SOLVER"):
            optimizer = self.build_optimizer(cfg, model)
        with building("The loader of the training set", cfg, "INPUT", "DATALOADER"):
            data_loader = self.build_train_loader(cfg)
        devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
        ddp_model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        with building("The training step", cfg, "SOLVER", "DATALOADER"):
            self._trainer = TrainStep(cfg, ddp_model, data_loader, optimizer)
        with building("The schedule of the learning rate", cfg, "SOLVER"):
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        average = {} if self._trainer.ema is None else {"ema": self._trainer.ema}
        self.checkpointer = Checkpointer(
            model, cfg, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **average
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose results count: with `SOLVER.EMA_DECAY` the average."""
        ema = self._trainer.ema
        return without_ddp(self.model) if ema is None else ema.module

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on exactly where the last checkpoint stopped, or load weights to start from.

        Raises:
            FileError: see :class:`freeanchor.checkpoint.Checkpointer`.
            FreeAnchorError: processes have loaded different files.
        """
        self._lacking: list[str] = []
        self._resumed = False
        content = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self._check_weights()
        ema = self._trainer.ema
        is_new_average = ema is not None and ema.n_averaged == 0
        if ema is not None and is_new_average:
            # Else that of a run without a step left would be what the model was built with.
            ema.module.load_state_dict(without_ddp(self.model).state_dict())
        if not self._resumed:
            return
        if is_new_average:
            self._lacking.append("the average of the weights")
        states = content.get("random_states")
        if states is None:
            self._lacking.append("the random numbers")
        elif len(states) == comm.get_world_size():
            set_random_state(states[comm.get_rank()])
        else:
            logger.warning(
                f"Resuming with {comm.get_world_size()} processes instead of {len(states)}: the "
                "images go on where they stopped, but the run is not identical to an "
                "uninterrupted one"
            )
        if self._lacking:
            logger.warning(
                f"{self.checkpointer.path} does not hold {', '.join(self._lacking)}, which start "
                "anew: the run is not identical to an uninterrupted one"
            )

    def _check_weights(self) -> None:
        """Compare what the processes have loaded, which nothing would make equal later."""
        if comm.get_world_size() == 1:
            return
        weights = checksum(without_ddp(self.model).state_dict())
        if len(set(comm.all_gather((self.start_iter, weights)))) > 1:
            raise FreeAnchorError(
                "The processes have loaded different weights: OUTPUT_DIR and the file of "
                "MODEL.WEIGHTS must be the same on all machines"
            )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = TrainerBase.state_dict(self)
        state["optimizer"] = self.optimizer.state_dict()
        state["grad_scaler"] = self._trainer.grad_scaler.state_dict()
        if hasattr(self.data_loader, "state_dict"):
            state["data"] = self.data_loader.state_dict()
        state["skipped"] = self._trainer.skipped
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken.

        The learning rate and its schedule are those of the config, not of the state: who resumes
        with others means them.
        """
        self._resumed = True
        hooks = {k: v for k, v in state.get("hooks", {}).items() if k != "LRScheduler"}
        TrainerBase.load_state_dict(self, {"iteration": state["iteration"], "hooks": hooks})
        state = {**state.get("_trainer", {}), **state}  # where Detectron2's main branch has it
        done = state["iteration"] + 1
        self._lacking += load_momentum(self.optimizer, state.get("optimizer"))
        if state.get("grad_scaler"):
            self._trainer.grad_scaler.load_state_dict(state["grad_scaler"])
        self._trainer.skipped = state.get("skipped", 0)
        if "data" in state and hasattr(self.data_loader, "load_state_dict"):
            done = self._load_position(state["data"], done)
        else:
            self._lacking.append("the order of the images")
        self.start_iter = done
        self.iter = self.scheduler.last_epoch = done
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate

    def _load_position(self, data: dict[str, Any], done: int) -> int:
        """The iterations that are done, counted in those of this run."""
        before: int = data["seen"][-1][0]
        now: int = self.cfg.SOLVER.IMS_PER_BATCH
        self.data_loader.load_state_dict(data)
        if before == now or not self.cfg.SOLVER.REFERENCE_WORLD_SIZE:
            return done
        scaled = round(done * before / now)
        logger.warning(
            f"SOLVER.IMS_PER_BATCH is {now} instead of {before}: {done} iterations are {scaled} now"
        )
        return scaled

    def train(self) -> dict[str, Any]:
        """Train from `start_iter` until `max_iter`, which a hook may lower.

        The config is written to `config.yaml` only now, when it is known to fit the checkpoint that
        a run goes on from.

        Returns:
            The results of the last evaluation, on the main process.

        Raises:
            FreeAnchorError: training cannot go on, or the last checkpoint could not be written.
        """
        if self.start_iter:
            report_changes(self._unscaled)
        keep_config(self._unscaled)
        logger.info(f"Starting training from iteration {self.start_iter}")
        if self.start_iter >= self.max_iter:
            logger.warning(
                f"Nothing is left to train: SOLVER.MAX_ITER {self.max_iter} is of the whole run, "
                f"of which {self.start_iter} iterations are done. A larger one goes on"
            )
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, self._checkpoints.answering_signals():
            try:
                self.before_train()
                if 0 < self.start_iter < self.max_iter:
                    self._evaluate_anew()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    if self._trainer.agreed == Request.FINISH:  # before the hooks look at it
                        self.max_iter = self.iter + 1
                    self.after_step()
                    self.iter += 1
            except BaseException:
                # The hooks would evaluate after the last iteration, also if that has failed.
                self.max_iter = self.iter + 2
                raise
            finally:
                self.after_train()
        results: dict[str, Any] = getattr(self, "_last_eval_results", {})
        if comm.is_main_process():
            verify(self.cfg, results)
        if self._checkpoints.problem:
            raise FreeAnchorError(
                f"The run ended without its checkpoint: {self._checkpoints.problem}"
            )
        return results

    def _evaluate_anew(self) -> None:
        """Evaluate what a run goes on from, where that is due: it was saved before its evaluation.

        Else a run that was interrupted in an evaluation would never know how good its model was.
        """
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            if isinstance(hook, hooks.EvalHook | BestCheckpointer):
                hook.after_step()
        self.iter = self.start_iter

    def run_step(self) -> None:
        try:
            super().run_step()
        except (DatasetError, LoaderError):
            # Saving takes all processes, and the others do not know of the error.
            if self.iter > self.start_iter and comm.get_world_size() == 1:
                self.iter -= 1
                self._checkpoints.save()
            raise

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with building("The model", cfg, "MODEL", "TEST"):
            model: nn.Module = super().build_model(cfg)
        optimize(cfg, model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        scheduler = super().build_lr_scheduler(cfg, optimizer)
        schedule = scheduler._multiplier
        # After the last iteration it is asked for a rate too, where fvcore's steps have none.
        scheduler._multiplier = lambda x: schedule(x if x < 1 else _END)
        return scheduler

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        records = load_training_set(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        # Enough to take the place of as many images as may break.
        spares = records[:: max(1, len(records) // (2 * cfg.DATALOADER.MAX_BROKEN_IMAGES + 1))]
        mapper = Mapper(cfg, is_train=True, spares=spares)
        return TrainLoader(cfg, records, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=Mapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Build what evaluates the detections in a data set; others are an override, as usual."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate as the config says: at one scale, and with TEST.AUG.ENABLED at several.

        The recommended thresholds, of the first of `DATASETS.TEST` that has objects, go into
        `OUTPUT_DIR`, and the figures into its `inference/results.json`, beside the detections.
        """
        if cfg.DATASETS.TEST and cfg.MODEL.FREEANCHOR.CLASS_NAMES:  # else its training has
            _resolve_classes(cfg, cfg.DATASETS.TEST)
        check_alike(cfg.DATASETS.TEST)
        with inference_autocast(cfg, model):
            evaluators = [
                DatasetEvaluators([cls.build_evaluator(cfg, name), *looking_into(model, cfg, name)])
                for name in cfg.DATASETS.TEST
            ]
            results: dict[str, Any] = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            keep_thresholds(cfg, model, results)
        if cfg.TEST.AUG.ENABLED:
            logger.info("Evaluating with test-time augmentation")
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            with inference_autocast(cfg, model):
                augmented = super().test(
                    cfg,
                    MultiScaleTest(cfg, model, ImageReader.from_config(cfg).read),
                    [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST],
                )
            add_augmented(cfg, results, augmented)
        if comm.is_main_process():
            keep_figures(cfg, results)
        return results

    metrics = staticmethod(best_metrics)  # what TEST.BEST_METRIC may be

    def build_hooks(self) -> list[Any]:
        cfg, step = self.cfg, self._trainer
        if has_best(cfg):
            check_best_metric(cfg, self.metrics(cfg))
        self._checkpoints = Checkpoints(cfg, self.checkpointer, step)

        def evaluate() -> dict[str, Any]:
            # Its loaders draw random numbers, which a resumed run does not.
            state = random_state()
            with self._checkpoints.interruptible():
                self._share_buffers()
                self._last_eval_results = self.test(cfg, self.evaluated_model)
            set_random_state(state)
            return self._last_eval_results

        model = without_ddp(self.model)
        result: list[Any] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if isinstance(model, BagDetector):
            result.append(LearningCheck(cfg, getattr(self.data_loader, "records", ())))
        if cfg.VIS_PERIOD > 0 and has_bags(cfg):
            # First, so that the writers among the others find its pictures.
            result.insert(0, MatchingPictures(model, cfg.VIS_PERIOD))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(model):
            loader = self.build_train_loader(cfg)  # another one than that of the training
            number, period = cfg.TEST.PRECISE_BN.NUM_ITER, cfg.TEST.EVAL_PERIOD
            result.append(PreciseBN(period, self.evaluated_model, loader, number))
        # Before the evaluation, so that nothing is lost if that fails or is interrupted.
        result += [self._checkpoints, hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate)]
        if comm.is_main_process():
            if has_best(cfg):
                result.append(BestCheckpointer(cfg, self.checkpointer, step))
            result.append(hooks.PeriodicWriter(self.build_writers()))
        return result

    def _share_buffers(self) -> None:
        """Give all processes the statistics of batch norm that a checkpoint holds: the first's.

        Each has trained its own. Evaluated so, the images of each would be those of another model.
        """
        if comm.get_world_size() > 1:
            for buffer in self.evaluated_model.buffers():
                dist.broadcast(buffer, 0)

    def build_writers(self) -> list[Any]:
        path = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
        writers: list[Any] = []
        for writer in super().build_writers():
            if isinstance(writer, JSONWriter):
                writer.close()
                writer = MetricsWriter(path)
            writers.append(TolerantWriter(writer))
        return writers


def _resolve_classes(cfg: CfgNode, names: Sequence[str]) -> CfgNode:
    """A copy of the config with the classes, to which the data sets are brought."""
    cfg = cfg.clone()
    cfg.defrost()
    resolve_classes(cfg, names)
    cfg.freeze()
    return cfg


def _check_batch(cfg: CfgNode) -> None:
    size, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    processes = comm.get_world_size()
    if size % (processes * parts):
        raise FreeAnchorError(
            f"SOLVER.IMS_PER_BATCH {size} is no multiple of {processes} processes x "
            f"SOLVER.ACCUMULATION_STEPS {parts}: change one of them"
        )
