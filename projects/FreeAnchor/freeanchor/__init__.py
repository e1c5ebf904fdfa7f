"""FreeAnchor for Detectron2. Importing it registers what the configs name."""

import sys
from pathlib import Path

from .openmp import share_cores


def _is_command_line() -> bool:
    """Whether this process is `freeanchor COMMAND`, which answers --help before heavy imports."""
    if sys.argv[0] == "-m":  # while Python looks for the module to run, named before its arguments
        name = sys.orig_argv[-len(sys.argv)]
        return __name__ == (name.partition("m")[2] if name.startswith("-") else name)  # or -mNAME
    # A process that a command has started was given the command's arguments, but not started by.
    return Path(sys.argv[0]).stem == __name__ and sys.argv[0] in sys.orig_argv


share_cores()  # before PyTorch is imported
if not _is_command_line():
    from . import compat  # noqa: F401  # isort: skip  # before anything that imports Detectron2
    from . import checkpoint  # noqa: F401  # MODEL.WEIGHTS understands mmdet://
    from .config import add_freeanchor_config
    from .modeling import FreeAnchor

__all__ = ["FreeAnchor", "add_freeanchor_config"]
