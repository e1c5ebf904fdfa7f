"""Says, after a third of a run behind its warm-up, that it does not learn, and what to try.

Anchors that fit few of the objects are said before it.

FreeAnchor asks of an object's anchors for class and place at once. Where the learning rate or the
schedule is wrong for the images, both losses still fall a little, as everything becomes background,
and only the evaluation at the end shows that nothing was learned.
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..data import best_anchor_iou, training_boxes
from ..data.anchors import GOOD_IOU
from ..errors import DatasetError
from ..visualization import NOT_LEARNING

__all__ = ["LearningCheck"]

logger = logging.getLogger(__name__)

_LIKELIHOOD = "freeanchor/bag_likelihood"
_LOCALIZED = "freeanchor/localized_objects"
_FEWEST = 5  # values that a mean is of: a shorter run is not judged
_GROWTH = 1.5
# P_cls and P_loc are both above it then, while P_cls starts at the prior.
_LEARNED = 0.3
_WINDOW = 0.1  # of the iterations until the check
_FEW_EPOCHS = 5
_MANY_UNFITTED = 0.2
_MOST_UNFITTED = 0.5
_IMAGES_LOOKED_AT = 500


class _Progress(NamedTuple):
    """What a run logs of its matching: means over some iterations.

    Attributes:
        likelihood: of a bag, the geometric mean.
        localized: the share of the objects that a predicted box overlaps.
    """

    likelihood: float
    localized: float


class _AnchorFit(NamedTuple):
    """How the anchors fit the objects of a training set.

    Attributes:
        unfitted: the share of the objects that no anchor overlaps by 0.5.
        size: the median of the square root of their areas, in pixels of the training.
    """

    unfitted: float
    size: float

    def __str__(self) -> str:
        return (
            f"{self.unfitted:.0%} of the objects overlap no anchor by {GOOD_IOU} (half of them "
            f"are smaller than {self.size:.0f} pixels in training)"
        )


def _find_problem(start: _Progress, now: _Progress, prior: float) -> str:
    """Say what is where it was at the start.

    The likelihood of a bag has to be 1.5 times what it was, or high: a long run has a start that
    has learned, and a detector that is trained further has no more to gain. It also has to be above
    the prior, which exact boxes would have before any class is learned. Fewer than half of the
    objects that a box overlaps, and no more than before, is a problem too.

    Returns:
        The problem, or nothing.
    """
    if not now.likelihood > min(_GROWTH * start.likelihood, _LEARNED):  # NaN is a problem
        return (
            f"the likelihood of a bag is {now.likelihood:.2g}, and was {start.likelihood:.2g} at "
            "the start"
        )
    if now.likelihood <= prior:
        return (
            f"the likelihood of a bag is {now.likelihood:.2g}, not above the {prior:g} of exact "
            "boxes without any class learned (MODEL.RETINANET.PRIOR_PROB)"
        )
    if now.localized < min(0.5, start.localized + 0.05):
        return (
            f"predicted boxes overlap {now.localized:.0%} of the objects, at the start "
            f"{start.localized:.0%}"
        )
    return ""


class LearningCheck(HookBase):
    """Compares the matching after a third of the run behind its warm-up with that at its start.

    What is wrong is logged, and written into the output folder, where the report finds it.
    """

    def __init__(self, cfg: CfgNode, records: Any) -> None:
        """Build the hook.

        Args:
            cfg: config of the run.
            records: its images in Detectron2's standard format.
        """
        self.cfg, self.records = cfg, records
        warmup = cfg.SOLVER.WARMUP_ITERS
        self.at = warmup + (cfg.SOLVER.MAX_ITER - warmup) // 3
        self.window = int(self.at * _WINDOW)
        self._start: _Progress | None = None

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 or not comm.is_main_process():
            return
        fit = self._anchor_fit()
        if fit is not None and fit.unfitted > _MOST_UNFITTED:
            logger.warning(
                f"{fit}. A larger {self._size_key} may help, or anchors that fit: "
                "`freeanchor anchors` proposes some"
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.window < _FEWEST or done not in (self.window, self.at):
            return
        now = self._progress(done - self.window)
        if done == self.window:
            self._start = now
        elif self._start is not None and now is not None:
            problem = _find_problem(self._start, now, self.cfg.MODEL.RETINANET.PRIOR_PROB)
            self._report(self._sentence(problem) if problem else "")

    def state_dict(self) -> dict[str, Any]:
        return {} if self._start is None else {"start": tuple(self._start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "start" in state:
            self._start = _Progress(*state["start"])

    def _progress(self, first: int) -> _Progress | None:
        """The means of what was logged since an iteration, if that is enough."""
        histories = self.trainer.storage.histories()
        means = []
        for name in (_LIKELIHOOD, _LOCALIZED):
            logged = histories[name].values() if name in histories else []
            values = np.array([x for x, i in logged if i >= first])
            if len(values) < _FEWEST:
                return None
            if name == _LIKELIHOOD:
                values = np.log(np.maximum(values, 1e-12))
            means.append(float(values.mean()))
        return _Progress(math.exp(means[0]), means[1])

    def _report(self, sentence: str) -> None:
        if not comm.is_main_process():
            return
        path = Path(self.cfg.OUTPUT_DIR) / NOT_LEARNING
        if not sentence:
            path.unlink(missing_ok=True)  # of an earlier run
            return
        logger.warning(sentence)
        try:
            path.write_text(sentence + "\n", encoding="utf-8")
        except OSError as e:
            logger.error(f"{path} cannot be written: {e}. The run goes on")

    def _sentence(self, problem: str) -> str:
        cfg = self.cfg
        solver = cfg.SOLVER
        parts = [f"SOLVER.BASE_LR {solver.BASE_LR / 4:.2g} instead of {solver.BASE_LR:g}"]
        if not cfg.MODEL.WEIGHTS:
            parts.append(
                "pretrained weights, as configs/finetune has, because MODEL.WEIGHTS is empty"
            )
        epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / max(1, len(self.records))
        if epochs < _FEW_EPOCHS:
            parts.append(
                f"a larger SOLVER.MAX_ITER, because {solver.MAX_ITER} iterations see each image "
                f"{epochs:.1f} times"
            )
        parts += self._size_advice()
        return (
            f"This run does not learn: after {self.at} of {solver.MAX_ITER} iterations {problem}. "
            f"Try {'; '.join(parts)}"
        )

    @property
    def _size_key(self) -> str:
        """What says how large images are trained."""
        return "INPUT.MAX_SIZE_TRAIN" if self.cfg.INPUT.SCALE_JITTER else "INPUT.MIN_SIZE_TRAIN"

    def _size_advice(self) -> list[str]:
        """What there is to say of the images' size, if many objects fit no anchor."""
        fit = self._anchor_fit()
        if fit is None or fit.unfitted < _MANY_UNFITTED:
            return []
        return [f"a larger {self._size_key} or the anchors of `freeanchor anchors`, as {fit}"]

    def _anchor_fit(self) -> _AnchorFit | None:
        """How the config's anchors fit, None where it has none or images have no size."""
        step = max(1, len(self.records) // _IMAGES_LOOKED_AT)
        records = [self.records[i] for i in range(0, len(self.records), step)]  # each is unpacked
        try:
            images = training_boxes(records, self.cfg)
            unfitted = float((best_anchor_iou(images, self.cfg) < GOOD_IOU).mean())
        except (DatasetError, KeyError, ValueError):  # no sizes, or anchors of another kind
            return None
        sizes = np.concatenate([np.sqrt((b[:, 2:] - b[:, :2]).prod(axis=1)) for _, b in images])
        return _AnchorFit(unfitted, float(np.median(sizes)))
