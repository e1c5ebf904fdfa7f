"""Launching: checks once, then the processes, and errors that end in one sentence."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from detectron2.engine import launch as launch_processes
from torch.multiprocessing.spawn import ProcessRaisedException

from .. import errors
from ..command_line import one_sentence
from .defaults import check

__all__ = ["launch"]

_ERRORS = "|".join(
    x.__name__ for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)
)


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Check the command line, then run `main` in as many processes as it asks for.

    Args:
        main: what each process runs, with `args`.
        args: what :func:`freeanchor.engine.argument_parser` gives.

    Raises:
        SystemExit: something that the user gave cannot be used; its message says what.
    """
    with one_sentence(os.path.basename(sys.argv[0])):
        check(args)
        try:
            launch_processes(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
        except (errors.FreeAnchorError, ProcessRaisedException) as e:
            # Processes and data loader workers pass errors on as text, which ends in the message.
            *_, message = re.split(rf"freeanchor\.errors\.(?:{_ERRORS}): ", str(e))
            if isinstance(e, ProcessRaisedException) and message == str(e):
                raise
            raise errors.FreeAnchorError(message.strip()) from e
