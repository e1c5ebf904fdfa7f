"""Several processes of one training: started by torchrun, Slurm or `--num-gpus`, and then alike."""

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from ..errors import FreeAnchorError

__all__ = ["adopt_slurm", "answering", "is_placed", "join_others", "spawn", "was_restarted"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FIRST_PORT, _NUM_PORTS = 20000, 20000


@contextmanager
def answering(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Answer the signals that end a run, within; other threads than the main one get none."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {x: signal.signal(x, handler) for x in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def is_placed() -> bool:
    """Whether this process has its place among others from torchrun, Slurm or :func:`spawn`."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Give a task of `srun` the variables that torchrun gives its processes.

    Args:
        environment: changed in place, if it is that of a step with several tasks and not of
            torchrun.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    # "node[07-12,20],other" begins with node07.
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", environment["SLURM_STEP_NODELIST"])
    assert match is not None
    first = match[1] + (match[2] or "")
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS
    environment.setdefault("MASTER_ADDR", first)
    environment.setdefault("MASTER_PORT", str(port))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["GROUP_RANK"] = environment["SLURM_NODEID"]


def was_restarted() -> bool:
    """Whether torchrun (`--max-restarts`) or Slurm (`--requeue`) started a process again."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(comm.all_gather(any(int(os.environ.get(x, 0)) > 0 for x in counts)))


def join_others(timeout_minutes: float, init_method: str = "env://") -> None:
    """Join the process group, with NCCL where there are GPUs and gloo elsewhere.

    Args:
        timeout_minutes: how long a process waits for the others before it gives up.
        init_method: where they meet.

    Raises:
        FreeAnchorError: they do not meet, or this process has no GPU of its own.
    """
    rank, world_size, local_rank = (
        int(os.environ[x]) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    has_gpus = torch.cuda.is_available()
    if has_gpus and local_rank >= torch.cuda.device_count():
        raise FreeAnchorError(
            f"process {local_rank} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}, so start as many processes"
        )
    if has_gpus:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group(
            "nccl" if has_gpus else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except (RuntimeError, ValueError) as e:
        meeting = init_method
        if init_method == "env://":
            meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise FreeAnchorError(
            f"process {rank} of {world_size} did not meet the others at {meeting}: {e}"
        ) from e
    # Detectron2's functions want to know the processes of each machine.
    nodes: list[str] = [""] * world_size
    dist.all_gather_object(nodes, os.environ.get("GROUP_RANK", socket.gethostname()))
    for node in dict.fromkeys(nodes):
        group = dist.new_group([i for i, x in enumerate(nodes) if x == node])
        if node == nodes[rank]:
            comm._LOCAL_PROCESS_GROUP = group


def spawn(run: Callable[..., Any], args: Any) -> None:
    """Start the processes of `--num-gpus` on this machine, and pass signals on to them.

    Args:
        run: what each process runs, with the arguments `args` and where they meet.
        args: those of the command line.

    Raises:
        ProcessRaisedException: a process failed; the others were ended.
        SystemExit: a process ended itself, with its status.
    """
    dist_url = args.dist_url
    if dist_url == "auto":
        with socket.create_server(("127.0.0.1", 0)) as server:
            dist_url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    context = start_processes(
        _placed, (run, args, dist_url), nprocs=args.num_gpus, join=False, start_method="spawn"
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in context.pids():
            if pid is not None:
                os.kill(pid, number)

    try:
        with answering(pass_on):
            while not context.join():
                pass
    except ProcessExitedException as e:
        raise SystemExit(e.exit_code) from e


def _placed(local_rank: int, run: Callable[..., Any], args: Any, dist_url: str) -> None:
    rank = args.machine_rank * args.num_gpus + local_rank
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(args.num_machines * args.num_gpus)
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["GROUP_RANK"] = str(args.machine_rank)
    run(args, dist_url)
