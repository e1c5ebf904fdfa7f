"""When checkpoints are written: by iterations, by minutes, on signals, and of the best model."""

import contextlib
import logging
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..checkpoint import Checkpointer, read_checkpoint
from ..checkpoint.files import is_whole
from ..checkpoint.run_folder import BEST, keep_newest
from ..errors import FileError, FreeAnchorError
from .processes import answering
from .random_state import random_state
from .step import Request, TrainStep

__all__ = ["BestCheckpointer", "Checkpoints", "check_best_metric", "has_best"]

logger = logging.getLogger(__name__)

_SECONDS_PER_MINUTE = 60
_SECONDS_OF_ONE_SIGNAL = 1


class Checkpoints(HookBase):
    """Saves the run so that it can go on exactly, and ends it on a signal.

    SIGTERM, SIGINT and SIGUSR1 are answered after the running iteration: the run is saved, and
    every process ends with status 128 + the signal's number, as shells have it. A second one, a
    second later, ends at once.

    Attributes:
        problem: why the last checkpoint could not be written, empty if it was.
    """

    def __init__(self, cfg: CfgNode, checkpointer: Checkpointer, step: TrainStep) -> None:
        """Build the hook, on all processes.

        Args:
            cfg: config of the run.
            checkpointer: what writes the files.
            step: where the processes agree on what to do.
        """
        self.problem = ""
        self._checkpointer, self._step = checkpointer, step
        self._period = cfg.SOLVER.CHECKPOINT_PERIOD
        self._seconds = cfg.SOLVER.CHECKPOINT_MINUTES * _SECONDS_PER_MINUTE
        self._kept = cfg.SOLVER.CHECKPOINTS_KEPT
        self._eval_period = cfg.TEST.EVAL_PERIOD
        self._is_evaluating = False
        self._signalled_at = 0.0

    def before_train(self) -> None:
        self._saved_at = monotonic()

    def before_step(self) -> None:
        is_due = 0 < self._seconds <= monotonic() - self._saved_at
        if is_due and comm.is_main_process():  # whose clock is everybody's
            self._step.ask(Request.SAVE)

    def after_step(self) -> None:
        request = self._step.agreed_request()
        done = self.trainer.iter + 1
        is_last = done >= self.trainer.max_iter
        # An evaluation may be long, and is not interrupted to save.
        periods = (self._period, self._eval_period)
        if is_last:
            self.save("model_final")
        elif request or any(period > 0 and done % period == 0 for period in periods):
            self.save()
        if request > Request.STOP:
            self._exit(request - Request.STOP)

    def answering_signals(self) -> contextlib.AbstractContextManager[None]:
        """Answer signals within: the whole training, with its last evaluation."""
        return answering(self._on_signal)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Answer a signal at once: for what comes between two iterations, with the run saved."""
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False

    def save(self, name: str = "") -> None:
        """Save, on all processes, and if that is impossible, say so and go on.

        Args:
            name: of the file, by default with the iteration in it.
        """
        name = name or f"model_{self.trainer.iter:07d}"
        states = comm.gather(random_state())
        self._saved_at = monotonic()
        if not comm.is_main_process():
            return
        try:
            self._checkpointer.save(name, iteration=self.trainer.iter, random_states=states)
            if self._kept > 0:
                keep_newest(self._checkpointer.save_dir, self._kept)
        except (FileError, OSError) as e:
            self.problem = str(e)
            logger.error(f"{e}. The run goes on, and the next checkpoint will be tried as usual")
        else:
            self.problem = ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        # torchrun passes a signal on that its processes got themselves from the terminal.
        if self._step.is_asked_to_stop() and now - self._signalled_at > _SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled_at = now
        self._step.ask(Request.STOP + number)
        if self._is_evaluating:
            self._exit(number)

    def _exit(self, number: int) -> None:
        name = signal.Signals(number).name
        last = min(self.trainer.iter, self.trainer.max_iter - 1)
        if self.problem:
            logger.error(f"{name}: ending after iteration {last}. {self.problem}")
        else:
            logger.warning(
                f"{name}: ending after iteration {last}, which is saved. --resume goes on from "
                "there"
            )
        raise SystemExit(128 + number)


def has_best(cfg: CfgNode) -> bool:
    """Whether a training writes `model_best.pth`."""
    return bool(cfg.TEST.EVAL_PERIOD > 0 and cfg.TEST.BEST_METRIC and cfg.DATASETS.TEST)


def check_best_metric(cfg: CfgNode, metrics: Sequence[str]) -> None:
    """Refuse a `TEST.BEST_METRIC` that is not evaluated, before the training.

    Args:
        cfg: config of the run.
        metrics: those of a data set.

    Raises:
        FreeAnchorError: it is none of them.
    """
    names = cfg.DATASETS.TEST if len(cfg.DATASETS.TEST) > 1 else ("",)
    if _best_metric(cfg) not in {f"{name}/{x}".lstrip("/") for name in names for x in metrics}:
        raise FreeAnchorError(
            f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC} is not evaluated: it may be "
            f"{', '.join(metrics)}"
        )


def _best_metric(cfg: CfgNode) -> str:
    """The metric of `model_best.pth`: of several data sets it begins with the name of one."""
    metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if len(names) > 1 and not metric.startswith(tuple(f"{name}/" for name in names)):
        return f"{names[0]}/{metric}"
    return str(metric)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, which also remembers the best when a run is resumed, and can end the run."""

    best_metric: float | None
    best_iter: int | None

    def __init__(self, cfg: CfgNode, checkpointer: Checkpointer, step: TrainStep) -> None:
        """Build the hook, on the main process.

        Args:
            cfg: config of the run.
            checkpointer: what writes `model_best.pth`.
            step: where the processes agree to stop early.
        """
        super().__init__(cfg.TEST.EVAL_PERIOD, checkpointer, _best_metric(cfg))
        self._step = step
        self._judged_by = [_best_metric(cfg), *cfg.DATASETS.TEST]
        self._patience = cfg.TEST.EARLY_STOPPING
        self._evaluations_since = 0

    def _best_checking(self) -> None:
        nothing = math.nan, self.trainer.iter
        value, iteration = self.trainer.storage.latest().get(self._val_metric, nothing)
        # After the last iteration it is the number of them.
        iteration = min(iteration, self.trainer.max_iter - 1)
        if math.isfinite(value) and (self.best_metric is None or value > self.best_metric):
            self._save_best(value, iteration)
            return
        if iteration == self.best_iter:  # evaluated once more, as the run was resumed from there
            return
        if self.best_metric is None:
            self._logger.warning(f"{self._val_metric} is no number: no {BEST}.pth is written")
            return
        self._evaluations_since += 1
        self._logger.info(
            f"{self._val_metric} is {value:.5f}, not better than best score {self.best_metric:.5f} "
            f"of iteration {self.best_iter}"
        )
        is_last = self.trainer.iter >= self.trainer.max_iter - 1
        if 0 < self._patience <= self._evaluations_since and not is_last:
            self._logger.info(
                f"{self._val_metric} has not become better for {self._patience} evaluations, since "
                f"iteration {self.best_iter}: the training ends with the next iteration"
            )
            self._step.ask(Request.FINISH)

    def _save_best(self, value: float, iteration: int) -> None:
        before = self.best_metric, self.best_iter
        # First, as the file says by this how good it is.
        self.best_metric, self.best_iter, self._evaluations_since = value, iteration, 0
        try:
            self._checkpointer.save(BEST, iteration=iteration)
        except FileError as e:
            self.best_metric, self.best_iter = before  # which is what the disk has
            self._logger.error(f"{e}. The run goes on")
        else:
            self._logger.info(f"{BEST}.pth is that of {self._val_metric} {value:.5f}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "judged_by": self._judged_by,
            "best_metric": self.best_metric,
            "best_iter": self.best_iter,
            "evaluations_since": self._evaluations_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the best that is on the disk, by the same metric on the same data sets.

        Args:
            state: of a checkpoint, which is written before its evaluation, and may know less.
        """
        path = Path(self._checkpointer.save_dir) / f"{BEST}.pth"
        if not is_whole(path):
            if state["best_metric"] is not None:
                self._logger.warning(f"{path} is gone or damaged: the next evaluation begins anew")
            return
        hooks_state = read_checkpoint(str(path)).get("trainer", {}).get("hooks", {})
        best = hooks_state.get(type(self).__qualname__, state)
        if best.get("judged_by", self._judged_by) != self._judged_by:
            self._logger.warning(
                f"What was the best was so by {best['judged_by']}, which is not comparable with "
                f"{self._judged_by}: the next evaluation begins anew"
            )
            return
        self.best_metric, self.best_iter = best["best_metric"], best["best_iter"]
        if self.best_iter == state["best_iter"]:
            self._evaluations_since = state["evaluations_since"]
