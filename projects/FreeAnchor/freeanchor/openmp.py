"""How the threads of PyTorch wait for each other on a CPU that other programs use too.

GNU's OpenMP lets them spin, for a fraction of a second: beside other busy programs each of the
hundreds of parallel regions of a step then waits until the system takes the core away, and a step
takes ten times as long. `GOMP_SPINCOUNT` makes them sleep sooner. OpenMP reads it once, when
PyTorch is imported.
"""

import os

__all__ = ["share_cores"]

# Turns of the waiting loop, see docs/precision.md: with 100 a quiet machine is slower, with 100000
# a machine whose busy programs stay on their cores takes 20 times as long.
_SPINCOUNT = "1000"


def share_cores() -> None:
    """Set `GOMP_SPINCOUNT`, unless the user has said how threads are to wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINCOUNT)
