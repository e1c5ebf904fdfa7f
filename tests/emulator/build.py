"""Builds the kernels of CUDA for the emulator: `python tests/emulator/build.py [address]`."""

import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension
from translate import translate

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "projects/FreeAnchor/freeanchor/layers/csrc"
# As setup.py has them. The accesses of the kernels are seen by what the compiler calls at each, for
# cuda_emulator.cpp or for AddressSanitizer.
FLAGS = ["-std=c++20", "-fPIC", "-O1", "-g0", "-ffp-contract=off", "-fopenmp", "-Wno-psabi"]
MODES = {"races": ["-fsanitize=thread", "-Wno-tsan"], "address": ["-fsanitize=address"]}


def build(mode: str = "races") -> tuple[Path, list[str]]:
    """Build what has changed.

    Args:
        mode: "races" to look for races, or "address" for AddressSanitizer.

    Returns:
        The shared library, and where each barrier is, see `translate`.
    """
    out = ROOT / "build" / "emulator" / mode
    out.mkdir(parents=True, exist_ok=True)
    sources, barriers = translate([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cuh")], out)
    emulator = Path(__file__).with_name("cuda_emulator.cpp")
    headers = [*out.glob("*.cuh"), *CSRC.glob("*.h"), emulator.with_suffix(".h"), Path(__file__)]
    changed = max(header.stat().st_mtime for header in headers)
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    include += [f"-I{emulator.parent}", f"-I{CSRC / 'cuda'}"]
    objects, running = [], []
    for source in (*sources, emulator):
        target = out / f"{source.stem}.o"
        objects.append(target)
        if target.exists() and target.stat().st_mtime > max(changed, source.stat().st_mtime):
            continue
        flags = MODES[mode] if source != emulator or mode == "address" else []
        command = ["c++", *FLAGS, *flags, *include, "-c", str(source), "-o", str(target)]
        running.append(subprocess.Popen(command))
    failed = [process for process in running if process.wait() != 0]
    if failed:
        sys.exit("the emulator could not be compiled")
    library = out / "emulator.so"
    if running or not library.exists():
        link = ["-fsanitize=address"] if mode == "address" else []
        torch_lib = Path(torch.__file__).parent / "lib"
        command = ["c++", "-shared", *link, *map(str, objects), f"-L{torch_lib}", "-fopenmp"]
        subprocess.run(
            [*command, "-ltorch_cpu", "-lc10", "-Wl,-z,defs", "-o", str(library)], check=True
        )
    return library, barriers


if __name__ == "__main__":
    print(build(*sys.argv[1:])[0])
