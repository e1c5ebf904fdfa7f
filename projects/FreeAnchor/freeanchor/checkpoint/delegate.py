"""Detectron2's own checkpointer on a FreeAnchor, as in `DefaultPredictor` and `DefaultTrainer`.

It only logs what does not fit, so that weights of another project, or of another config, would
leave a model that detects something else without a word. For a FreeAnchor, also as a first stage,
it hands over to :class:`freeanchor.checkpoint.Checkpointer`; other models and checkpointers are
left alone.
"""

import logging
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from ..config import trainer_options
from ..modeling import BagDetector
from .checkpointer import Checkpointer

__all__ = ["hand_over"]

logger = logging.getLogger(__name__)


def hand_over() -> None:
    """Make `DetectionCheckpointer.load` use ours for models of FreeAnchor. Twice is fine."""
    theirs = DetectionCheckpointer.load
    if getattr(theirs, "hands_over", False):
        return

    def load(
        self: DetectionCheckpointer, path: str, checkpointables: list[str] | None = None
    ) -> Any:
        first_stage = getattr(self.model, "proposal_generator", None)
        detector = getattr(first_stage, "detector", self.model)
        if type(self) is not DetectionCheckpointer or not isinstance(detector, BagDetector):
            return theirs(self, path, checkpointables)
        ours = Checkpointer(
            self.model,
            detector.config,
            self.save_dir,
            save_to_disk=self.save_to_disk,
            **self.checkpointables,
        )
        # A predictor needs the whole model; who loads weights to train may lack the predictors.
        load = ours.load_start if self.model.training else ours.load
        trainer = self.checkpointables.get("trainer")
        if hasattr(trainer, "cfg") and (unread := trainer_options(trainer.cfg)):
            logger.warning(
                f"Detectron2's DefaultTrainer does not read {', '.join(unread)}: take "
                "freeanchor.engine.Trainer in its place, which does"
            )
        return load(path, checkpointables)

    load.__doc__ = theirs.__doc__
    load.hands_over = True  # type: ignore[attr-defined]
    DetectionCheckpointer.load = load
