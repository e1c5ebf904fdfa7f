"""One iteration of a training: forward, backward and update, on one process or on many."""

import contextlib
import math
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..modeling import BagDetector, without_ddp
from ..modeling.precision import choose_precision
from .failures import NonFiniteReport, explained
from .precision import autocast

__all__ = ["Request", "TrainStep"]

# Below, float16 has no room for gradients: it is not the scale that is wrong.
_SMALLEST_SCALE = 1.0


class Request(IntEnum):
    """What a process asks all of them to do after an iteration; the largest is done."""

    NOTHING = 0
    SAVE = 1
    FINISH = 2
    STOP = 128  # plus the number of a signal


class TrainStep:
    """What Detectron2's `SimpleTrainer` and `AMPTrainer` do between two iterations' hooks.

    It waits for the device once, after the backward pass, and judges the step before the weights
    change. It draws no batch before the first iteration, so that a run can be resumed first.

    Attributes:
        iter: the iteration, which the trainer sets.
        ema: the moving average of the weights, with `SOLVER.EMA_DECAY`.
        skipped: the steps that were not finite and left out.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Build the step.

        Args:
            cfg: config of the run.
            model: gives a dict of losses, possibly in DistributedDataParallel. It is set to
                training mode.
            data_loader: gives batches for it.
            optimizer: of its parameters.
        """
        model.train()
        self.cfg = cfg
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self.iter = 0
        self.skipped = 0
        self.device = next(model.parameters()).device
        # bfloat16 has the range of float32 and needs none.
        is_float16 = choose_precision(cfg, cfg.SOLVER.AMP.ENABLED).dtype == torch.float16
        self.grad_scaler = GradScaler(self.device.type, enabled=is_float16)
        self.ema: AveragedModel | None = None
        if cfg.SOLVER.EMA_DECAY > 0:
            average = get_ema_multi_avg_fn(cfg.SOLVER.EMA_DECAY)
            self.ema = AveragedModel(without_ddp(model), multi_avg_fn=average)
        # What a step changes before it is judged: the running statistics of batch norm.
        self._buffers = [x for x in model.buffers() if cfg.SOLVER.SKIP_NON_FINITE > 0]
        self._batches: Iterator[list[dict[str, Any]]] | None = None
        self._request = self._agreed = int(Request.NOTHING)

    def ask(self, request: int) -> None:
        """Ask all processes to do something after an iteration, this one or the next."""
        self._request = max(self._request, request)

    def is_asked_to_stop(self) -> bool:
        """Whether this process was."""
        return self._request > Request.STOP

    @property
    def agreed(self) -> int:
        """What to do after this iteration, the same on all processes."""
        return self._request if comm.get_world_size() == 1 else self._agreed

    def agreed_request(self) -> int:
        """The same, which is then done."""
        agreed = self.agreed
        if agreed >= self._request:
            self._request = Request.NOTHING
        return agreed

    def run_step(self) -> None:
        """Run one iteration, and log its losses.

        Raises:
            FreeAnchorError: a loss or gradient is not finite, memory is short, a loader worker
                died, or another process does not answer.
        """
        if self._batches is None:
            self._batches = iter(self.data_loader)
        start = time.perf_counter()
        with explained(self, self.data_loader):
            batch = next(self._batches)
        data_time = time.perf_counter() - start

        buffers = [x.clone() for x in self._buffers]
        with explained(self, batch):
            self.optimizer.zero_grad()
            losses = self.forward_backward(batch)
            norm = self._clip_gradients()
            rows = self._gather([*losses.values(), norm], data_time, self._request)
        *values, norm_of_all, _, _ = rows.mean(dim=0).tolist()
        self._agreed = int(rows[:, -1].max())
        if self._is_finite(values, norm_of_all):
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(without_ddp(self.model))
            self._log(dict(zip(losses, values)), norm_of_all, rows[:, -2].max().item())
            return
        self.skipped += 1
        self.grad_scaler.update()  # which has unscaled, and would not do so again
        for buffer, before in zip(self._buffers, buffers):
            buffer.copy_(before)
        report = NonFiniteReport(self, batch, dict(zip(losses, values)), norm_of_all)
        # A process whose own losses are finite has no part in it, unless all have.
        is_mine = not all(map(math.isfinite, rows[comm.get_rank(), : len(losses)].tolist()))
        report.finish(is_mine or all(map(math.isfinite, values)))

    def forward_backward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Add the gradient of a batch to that of the parameters, a part after another.

        Returns:
            The losses, without their graphs.
        """
        steps = self.cfg.SOLVER.ACCUMULATION_STEPS
        size = len(batch) // steps
        model = without_ddp(self.model)
        totals: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            weight = 1 / steps
            if isinstance(model, BagDetector) and steps > 1:
                objects = [x["instances"] for x in batch]
                stack.enter_context(model.normalizer.over(objects, self.device))
                weight = 1.0  # each loss is divided by the objects of all parts
            for i in range(steps):
                with contextlib.ExitStack() as part:
                    if i < steps - 1 and isinstance(self.model, DistributedDataParallel):
                        part.enter_context(self.model.no_sync())
                    with autocast(self.cfg):
                        losses: dict[str, Tensor] = self.model(batch[i * size : (i + 1) * size])
                    if weight != 1:
                        losses = {name: loss * weight for name, loss in losses.items()}
                    total = torch.stack(list(losses.values())).sum()
                    self.grad_scaler.scale(total).backward()
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0) + loss.detach()
        return totals

    def _clip_gradients(self) -> Tensor:
        """Clip by the norm of all gradients, if the config says so, and give it as it was."""
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        norm = get_total_norm(gradients, clip.NORM_TYPE)
        if clip.ENABLED and clip.CLIP_TYPE == "full_model":
            clip_grads_with_norm_(parameters, clip.CLIP_VALUE, norm)
        return norm

    def _gather(self, on_device: list[Tensor], *on_host: float) -> Tensor:
        """A row of numbers from each process, on the CPU: the one synchronisation of the step."""
        row = torch.stack([x.double() for x in on_device])
        if comm.get_world_size() == 1:
            return torch.cat([row.cpu(), torch.tensor(on_host, dtype=row.dtype)])[None]
        row = torch.cat([row, row.new_tensor(on_host)])
        rows = [torch.empty_like(row) for _ in range(comm.get_world_size())]
        dist.all_gather(rows, row)
        return torch.stack(rows).cpu()

    def _is_finite(self, losses: list[float], norm: float) -> bool:
        """Whether to step. float16's scaler finds its scale by gradients that are not finite."""
        if all(map(math.isfinite, [*losses, norm])):
            return True
        is_searching = (
            self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > _SMALLEST_SCALE
        )
        return is_searching and all(map(math.isfinite, losses))

    def _log(self, losses: dict[str, float], norm: float, data_time: float) -> None:
        if comm.is_main_process():
            get_event_storage().put_scalars(
                **losses, total_loss=sum(losses.values()), grad_norm=norm, data_time=data_time
            )
