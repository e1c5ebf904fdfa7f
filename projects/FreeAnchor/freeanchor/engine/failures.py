"""What is said, and kept, when a training step goes wrong."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm

from ..checkpoint import replacing
from ..errors import FileError, FreeAnchorError, LoaderError, first_line, shorten
from ..modeling import without_ddp

__all__ = ["NonFiniteReport", "explained", "explained_silence"]

logger = logging.getLogger(__name__)

_GIB = 2**30
# What PyTorch's allocators for CPUs say.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory")
# What batch norm says of a single value.
_ONE_VALUE = "Expected more than 1 value per channel"
# What gloo and NCCL say when a process of the group is gone or waits for something else.
_SILENCE = re.compile(r"[Tt]imed? ?out|Connection (?:closed|reset)|NCCL|remote process")


def describe_images(batch: list[dict[str, Any]]) -> str:
    """The files of a batch, with the sizes that the network gets."""
    return shorten(
        [
            f"{x.get('file_name', 'an image')} ({x['image'].shape[-1]} x {x['image'].shape[-2]})"
            for x in batch
        ]
    )


@contextmanager
def explained(step: Any, work: Any) -> Iterator[None]:
    """Say in one sentence what was being done when memory was short or a loader worker died.

    Args:
        step: the :class:`freeanchor.engine.step.TrainStep`.
        work: the batch that is trained on, or the loader that loads one.

    Raises:
        FreeAnchorError: instead of PyTorch's errors.
    """
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as e:
        text = str(e)  # on a CPU, nothing else tells these errors from others
        where = f"Iteration {step.iter}"
        if _ONE_VALUE in text:
            raise FreeAnchorError(
                f"{where}: batch norm cannot be trained on one value, that of a map of 1 x 1 pixel "
                f"of a single image; trained on were {describe_images(work)}, "
                f"{len(work) // step.cfg.SOLVER.ACCUMULATION_STEPS} at a time. Raise "
                "SOLVER.IMS_PER_BATCH, lower SOLVER.ACCUMULATION_STEPS, or train larger images"
            ) from e
        if isinstance(e, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(text):
            raise FreeAnchorError(f"{where}: {_out_of_memory(step, work)}") from e
        if "DataLoader worker" not in text:
            raise
        images = "images"
        if hasattr(work, "describe_upcoming"):  # a loader of the user's own need not have it
            images = f"images such as {shorten(work.describe_upcoming())}"
        raise LoaderError(
            f"{where}: a data loader worker died while {images} were loaded "
            f"({first_line(e).rstrip('. ')}): if the memory of the machine was short, lower "
            "DATALOADER.NUM_WORKERS. --resume goes on from the last checkpoint"
        ) from e


@contextmanager
def explained_silence() -> Iterator[None]:
    """Say in one sentence that another process does not answer.

    Raises:
        FreeAnchorError: instead of PyTorch's errors.
    """
    try:
        yield
    except RuntimeError as e:
        if comm.get_world_size() == 1 or not _SILENCE.search(str(e)):
            raise
        raise FreeAnchorError(
            f"process {comm.get_rank()} of {comm.get_world_size()} got no "
            "answer from another one, which died or hangs; its own messages say why "
            f"({str(e).strip().splitlines()[-1]}). A training goes on from its last checkpoint "
            "with --resume"
        ) from e


def _out_of_memory(step: Any, batch: Any) -> str:
    if not isinstance(batch, list):
        return "the memory of the machine is full: lower DATALOADER.NUM_WORKERS"
    cfg = step.cfg
    steps = cfg.SOLVER.ACCUMULATION_STEPS
    size = len(batch) // steps
    used = ""
    if step.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        used = f", with {(total - free) / _GIB:.1f} of {total / _GIB:.1f} GiB in use"
    more = [x for x in range(steps + 1, len(batch) + 1) if len(batch) % x == 0]
    advice = []
    if more:
        advice.append(
            f"SOLVER.ACCUMULATION_STEPS {more[0]} computes {len(batch) // more[0]} instead of "
            f"{size} images at once, with the same result"
        )
    if cfg.INPUT.SCALE_JITTER:
        advice.append(f"INPUT.MAX_SIZE_TRAIN {cfg.INPUT.MAX_SIZE_TRAIN * 3 // 4} needs about half")
    elif max(cfg.INPUT.MIN_SIZE_TRAIN) > 1:
        advice.append(
            f"INPUT.MIN_SIZE_TRAIN ({max(cfg.INPUT.MIN_SIZE_TRAIN) * 3 // 4},) needs about half"
        )
    return (
        f"out of memory on {step.device}{used}, training on {describe_images(batch)}. "
        f"{'; '.join(advice)}. --resume goes on from the last checkpoint"
    )


class NonFiniteReport:
    """A step whose losses or gradient are not finite: what there is to say, and to replay."""

    def __init__(
        self, step: Any, batch: list[dict[str, Any]], losses: dict[str, float], norm: float
    ) -> None:
        """Note the step.

        Args:
            step: the :class:`freeanchor.engine.step.TrainStep`, before its weights change.
            batch: the images of this process.
            losses: means over all processes.
            norm: of the gradient of all processes.
        """
        self.step, self.batch = step, batch
        values = [f"{name} {value:.4g}" for name, value in losses.items()]
        rates = {group["lr"] for group in step.optimizer.param_groups}
        self.text = (
            f"Iteration {step.iter}: {', '.join(values)}, norm of the gradient {norm:.4g}, at the "
            f"learning rate {max(rates):.4g}, on {describe_images(batch)}"
        )

    def finish(self, is_mine: bool) -> None:
        """Keep what happened, if it did in this process, and skip it or end the run.

        Raises:
            FreeAnchorError: `SOLVER.SKIP_NON_FINITE` steps were skipped already.
        """
        step, most = self.step, self.step.cfg.SOLVER.SKIP_NON_FINITE
        message = f"{self.text}. " + (self._save() if is_mine else "")
        if step.skipped > most:
            raise FreeAnchorError(
                f"{message}Often a lower SOLVER.BASE_LR or SOLVER.CLIP_GRADIENTS helps; "
                "SOLVER.SKIP_NON_FINITE leaves out that many such steps"
            )
        logger.warning(f"{message}The step is left out, the {step.skipped}. of at most {most}")

    def _save(self) -> str:
        step = self.step
        name = f"non_finite_{step.iter:07d}_{comm.get_rank()}.pth"
        path = os.path.join(step.cfg.OUTPUT_DIR, name)
        content = {
            "model": without_ddp(step.model).state_dict(),
            "batch": [_to_plain(x) for x in self.batch],
            "config": step.cfg.dump(),
            "iteration": step.iter,
        }
        try:
            with replacing(path) as f:
                torch.save(content, f)
        except FileError as e:
            return f"It cannot be replayed: {e}. "
        return f"`freeanchor replay {path}` runs it again and says where it begins. "


def _to_plain(image: dict[str, Any]) -> dict[str, Any]:
    """An image of a batch, in containers that `freeanchor.checkpoint.read_checkpoint` reads."""
    kept = (torch.Tensor, str, int, float, tuple)  # tuples are of numbers
    plain: dict[str, Any] = {k: v for k, v in image.items() if isinstance(v, kept)}
    instances: Instances = image["instances"]
    plain["boxes"], plain["classes"] = instances.gt_boxes.tensor, instances.gt_classes
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        plain["masks"] = (
            masks.tensor
            if isinstance(masks, BitMasks)
            else [[torch.from_numpy(x) for x in polygons] for polygons in masks.polygons]
        )
    return plain
