"""The training images in an order that depends on nothing but the seed.

Neither the number of processes nor that of loader workers changes which images an iteration gets,
or how they are augmented: so a run can go on anywhere, and with other numbers.
"""

import itertools
import logging
import random
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..data import fingerprint
from ..errors import FreeAnchorError

__all__ = ["TrainLoader"]

logger = logging.getLogger(__name__)

# An image in the endless stream of a training: its place there, and its index in the data set.
_Place = tuple[int, int]


class TrainLoader:
    """Batches for this process, from any iteration on.

    Attributes:
        upcoming: the images of the batches that are being loaded, next batch first.
    """

    def __init__(
        self,
        cfg: CfgNode,
        records: list[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
    ) -> None:
        """Build the loader.

        Args:
            cfg: config of the run, as its processes share it.
            records: the data set in Detectron2's standard format.
            mapper: reads and augments an image, drawing from Python's, NumPy's or PyTorch's random
                numbers. Another image takes the place of one for which it gives None.

        Raises:
            FreeAnchorError: there is no such sampler, or images have no size to group them by.
        """
        self.cfg = cfg
        self.records = DatasetFromList(records, copy=False)  # in memory that workers share
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.upcoming: deque[list[_Place]] = deque()
        # Batch sizes and their iterations, in the order in which they were drawn.
        self._seen: list[list[int]] = [[cfg.SOLVER.IMS_PER_BATCH, 0]]
        self._mapper = mapper
        self._fingerprint = fingerprint(record["file_name"] for record in records)
        self._shape = [0] * len(records)
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self._shape = [_is_wide(record) for record in records]
        self._factors = None
        if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            # Detectron2's main branch has a key for it.
            options = {"sqrt": x} if (x := cfg.DATALOADER.get("REPEAT_SQRT")) is not None else {}
            self._factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                records, cfg.DATALOADER.REPEAT_THRESHOLD, **options
            )
        self._sampler()  # an unknown one is refused before the first iteration

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Draw endlessly, from where :meth:`load_state_dict` has put it."""
        self.upcoming.clear()
        loader = DataLoader(
            _Augmented(self.records, self._mapper, self.seed),
            batch_sampler=self._draw(),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
            # Its own: the default would draw from the random numbers of the model.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises an error of a dead worker in the middle of a step. Without
            # it, the next batch is what fails, a few seconds later.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in batches:
            self.upcoming.popleft()
            self._seen[-1][1] += 1
            yield batch

    def describe_upcoming(self) -> list[str]:
        """The files of the next batch, with their sizes, for messages."""
        places = self.upcoming[0] if self.upcoming else ()
        records = [self.records[index] for _, index in places]
        return [
            f"{x['file_name']} ({x.get('width', '?')} x {x.get('height', '?')})" for x in records
        ]

    def state_dict(self) -> dict[str, Any]:
        """The order of the images, and how far it was followed."""
        seen = [list(x) for x in self._seen]
        return {
            "seed": self.seed,
            "seen": seen,
            "images": len(self.records),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped, possibly with another batch size."""
        before, now = state.get("images", len(self.records)), len(self.records)
        if before != now or state.get("fingerprint", self._fingerprint) != self._fingerprint:
            images = f"{now} images instead of {before}" if before != now else "other images"
            logger.warning(
                f"The training set has {images}, or in another order than before, so that the run "
                "is not identical to an uninterrupted one"
            )
        if self.cfg.SEED >= 0 and state["seed"] != self.cfg.SEED:
            logger.warning(
                f"SEED {self.cfg.SEED} is not that of the run, whose images stay in the order of "
                f"its own, {state['seed']}"
            )
        self.seed = state["seed"]
        self._seen = [list(x) for x in state["seen"]]
        if self._seen[-1][0] != self.cfg.SOLVER.IMS_PER_BATCH:
            self._seen.append([self.cfg.SOLVER.IMS_PER_BATCH, 0])

    def _draw(self) -> Iterator[list[_Place]]:
        """This process's part of the batches, all of which have one shape in an iteration."""
        stream: Iterator[_Place] = enumerate(self._sampler()._infinite_indices())
        for size, iterations in self._seen:
            pending: dict[int, list[_Place]] = defaultdict(list)
            batches = self._group(stream, size, pending)
            deque(itertools.islice(batches, iterations), maxlen=0)
            stream = itertools.chain(sorted(itertools.chain(*pending.values())), stream)
        rank, world_size = comm.get_rank(), comm.get_world_size()
        for batch in self._group(stream, self.cfg.SOLVER.IMS_PER_BATCH, defaultdict(list)):
            self.upcoming.append(batch[rank::world_size])
            yield self.upcoming[-1]

    def _group(
        self, stream: Iterator[_Place], size: int, pending: dict[int, list[_Place]]
    ) -> Iterator[list[_Place]]:
        """Batches of images of one shape; `pending` has those that are in none yet."""
        for place in stream:
            shape = self._shape[place[1]]
            pending[shape].append(place)
            if len(pending[shape]) == size:
                yield pending.pop(shape)

    def _sampler(self) -> Any:
        """Detectron2's sampler, which for a given `SEED` draws as it does there."""
        cfg, size = self.cfg.DATALOADER, len(self.records)
        seeds = np.random.RandomState(self.seed % 2**32).randint(2**31, size=2)
        seed, other_seed = map(int, seeds)
        if cfg.SAMPLER_TRAIN == "TrainingSampler":
            return TrainingSampler(size, seed=seed)
        if cfg.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            return RepeatFactorTrainingSampler(self._factors, seed=seed)
        if cfg.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
            return RandomSubsetTrainingSampler(
                size, cfg.RANDOM_SUBSET_RATIO, seed_shuffle=seed, seed_subset=other_seed
            )
        raise FreeAnchorError(
            f"DATALOADER.SAMPLER_TRAIN: there is no sampler {cfg.SAMPLER_TRAIN}, use "
            "TrainingSampler, RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
        )


def _is_wide(record: dict[str, Any]) -> int:
    if "width" not in record or "height" not in record:
        raise FreeAnchorError(
            f"{record['file_name']} has no width and height in its annotation: add them, or set "
            "DATALOADER.ASPECT_RATIO_GROUPING False"
        )
    return int(record["width"] > record["height"])


class _Augmented(Dataset[dict[str, Any]]):
    """Images by their place in the stream, which seeds their augmentation."""

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        seed: int,
    ) -> None:
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, place: _Place) -> dict[str, Any]:
        position, index = place
        with _seeded(self._seed, position):
            mapped = self._mapper(self._records[index])
            while mapped is None:
                mapped = self._mapper(self._records[random.randrange(len(self._records))])
        return mapped


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seed all random numbers within, and give them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(seeds[0]))
    np.random.seed(seeds)
    torch.default_generator.manual_seed(int(seeds[1]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
