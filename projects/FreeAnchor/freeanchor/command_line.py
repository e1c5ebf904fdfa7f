"""What the commands and `train_net.py` share. It imports nothing heavy, for a quick --help."""

import argparse
import errno
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import FreeAnchorError

__all__ = ["Command", "add_dataset_argument", "add_options_argument", "number", "one_sentence"]

# Of the disk: it is full, or what is on it is somebody else's.
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

# What it is for, what adds its arguments, and what runs it.
Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]
]


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add the repeatable option `--dataset NAME ANNOTATIONS IMAGE_DIR`."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS.json", "IMAGE_DIR"),
        help="register a data set in COCO format, to be named in DATASETS.TRAIN or DATASETS.TEST; "
        "may be given several times",
    )


def add_options_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option `--opts KEY VALUE ...`, which comes last as in Detectron2's demo."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help=f"change {what}; the last option",
    )


def number(
    kind: Callable[[str], float], least: float = 0, most: float = math.inf
) -> Callable[[str], float]:
    """What reads the number of an option: int or float, in a range, and never nan or infinite."""

    def read(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            limits = f"at least {least}" if math.isinf(most) else f"in {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a number, {limits}, got {text}")
        return value

    read.__name__ = kind.__name__  # for argparse's own words: invalid int value
    return read


@contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """End the program with the message of an error that is the user's to mend, and status 1.

    Ctrl-C ends it with the status that shells have for it.
    """
    try:
        yield
    except KeyboardInterrupt as e:
        raise SystemExit(128 + signal.SIGINT) from e
    except FreeAnchorError as e:
        raise SystemExit(f"{program}: {e}") from e
    except OSError as e:
        if e.errno not in _OF_DISK:
            raise
        raise SystemExit(f"{program}: a file cannot be read or written: {e}") from e
