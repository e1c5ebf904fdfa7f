"""`pytest -p emulated`: the tests on the kernels of CUDA, on the emulated GPU of `emulator/`.

They take the place of those of the CPU, for tensors of the CPU. The folder of this file must be in
PYTHONPATH.
"""

import os
import sys
from pathlib import Path

import torch

sys.modules["freeanchor.layers._C"] = None  # type: ignore[assignment]  # it cannot be found
sys.path.insert(0, str(Path(__file__).parent / "emulator"))

from build import build  # noqa: E402

LIBRARY, BARRIERS = build(os.environ.get("EMULATOR_MODE", "races"))
torch.ops.load_library(LIBRARY)
