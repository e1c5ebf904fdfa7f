"""The number of objects that the bag losses are divided by."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor

__all__ = ["Normalizer"]


class Normalizer:
    """Counts the objects of a batch, on the device and without waiting for it."""

    def __init__(self, kind: str) -> None:
        """Choose whose objects count.

        Args:
            kind: "local", those of this process, as the paper's results were obtained; "global",
                those of all processes, whose mean gradient is then that of one large batch.

        Raises:
            ValueError: another kind.
        """
        if kind not in ("local", "global"):
            raise ValueError(f'MODEL.FREEANCHOR.NORMALIZER must be "local" or "global", got {kind}')
        self.kind = kind
        self._of_larger_batch: Tensor | None = None

    def __call__(self, gt_instances: Sequence[Instances], device: torch.device) -> Tensor:
        """Count objects, together with the other processes if the kind is "global".

        Args:
            gt_instances: the ground truth of a batch, possibly without any object.
            device: of the losses.

        Returns:
            Scalar in float64, what to divide the losses by. At least 1, which the others divide the
            loss of a batch without objects by: some 350 times too much, as they divide the negative
            loss by the size of a bag with objects alone. With "global" it is over the number of
            processes, as DistributedDataParallel takes the mean of their gradients.
        """
        if self._of_larger_batch is not None:
            return self._of_larger_batch
        count = torch.full((), sum(map(len, gt_instances)), dtype=torch.float64, device=device)
        if self.kind == "local" or comm.get_world_size() == 1:
            return count.clamp(min=1)
        dist.all_reduce(count)
        processes: int = comm.get_world_size()
        return count.clamp(min=1) / processes

    @contextmanager
    def over(self, gt_instances: Sequence[Instances], device: torch.device) -> Iterator[None]:
        """Divide by the objects of a larger batch within, whose parts come one after another."""
        self._of_larger_batch = self(gt_instances, device)
        try:
            yield
        finally:
            self._of_larger_batch = None
