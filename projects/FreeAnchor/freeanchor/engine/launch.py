"""Launching: checks once, then the processes, and errors that end in one sentence."""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessRaisedException

from .. import errors
from ..command_line import one_sentence
from .defaults import build_config, check, check_run
from .failures import explained_silence
from .processes import adopt_slurm, is_placed, join_others, spawn, was_restarted

__all__ = ["launch"]

_ERRORS = "|".join(
    x.__name__ for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)
)


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Check the command line, then run `main` in as many processes as it asks for.

    A process of torchrun or of Slurm's srun joins the others of its kind; otherwise `--num-gpus`
    and `--num-machines` say how many there are, and those of this machine are started.

    Args:
        main: what each process runs, with `args`.
        args: what :func:`freeanchor.engine.argument_parser` gives.

    Raises:
        SystemExit: something that the user gave cannot be used; its message says what. Or a signal
            ended the run.
    """
    with one_sentence(os.path.basename(sys.argv[0])):
        try:
            adopt_slurm(os.environ)
            if is_placed():
                _run_placed(main, args)
                return
            check(args)
            if args.num_gpus * args.num_machines > 1:
                spawn(functools.partial(_run, main), args)
            else:
                main(args)
        except (errors.FreeAnchorError, ProcessRaisedException) as e:
            # Processes and data loader workers pass errors on as text, which ends in the message.
            *_, message = re.split(rf"freeanchor\.errors\.(?:{_ERRORS}): ", str(e))
            if isinstance(e, ProcessRaisedException) and message == str(e):
                raise
            raise errors.FreeAnchorError(message.strip()) from e


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, url: str) -> None:
    """Run in a process that :func:`spawn` started, after its parent has checked."""
    join_others(args.timeout, url)
    with explained_silence():
        main(args)
    dist.destroy_process_group()


def _run_placed(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run in a process that torchrun or Slurm started, whose main process checks for all."""
    if args.num_gpus > 1 or args.num_machines > 1:
        raise errors.FreeAnchorError(
            "torchrun and Slurm say how many processes there are: leave out --num-gpus and "
            "--num-machines"
        )
    join_others(args.timeout)
    with explained_silence():
        # An evaluation is of the weights that it names, however often it begins.
        goes_on = was_restarted() and not (args.resume or args.eval_only)
        args.resume = args.resume or goes_on
        problem = None
        if comm.is_main_process():
            try:
                check(args)
                if goes_on:
                    check_run(build_config(args))
            except errors.FreeAnchorError as e:
                problem = e
        if any(comm.all_gather(problem is not None)):
            raise problem or SystemExit(1)
        main(args)
    dist.destroy_process_group()
