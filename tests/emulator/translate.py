"""CUDA sources to C++ for `cuda_emulator.h`: launches, shared memory, and barriers by number."""

import re
from pathlib import Path

# C++ has no words for these.
_INCLUDES = re.compile(r"#include <(c10/cuda|cuda_runtime)[^>]*>")
_DYNAMIC = re.compile(r"extern __shared__ __align__\(16\) unsigned char (\w+)\[\];")
_SHARED = re.compile(r"__shared__ ([\w<>]+) (\w+)((?:\[\w+\])?);")
_BARRIER = re.compile(r"__syncthreads\(\)")
_LAUNCH = re.compile(r"((?:\w|<[\w, ]+>)+)\s*<<<(.*?)>>>\(", re.DOTALL)


def translate(sources: list[Path], out: Path) -> tuple[list[Path], list[str]]:
    """Translate CUDA sources and headers.

    Args:
        sources: all .cu and .cuh files, from one folder.
        out: the folder to write to, a sibling of which is what the sources include from `../`.

    Returns:
        Tuple of the C++ files to compile, and where each barrier is, "FILE:LINE".
    """
    files, barriers = [], []
    for source in sorted(sources):
        text = _INCLUDES.sub("", source.read_text())
        while barrier := _BARRIER.search(text):
            call = f"emulator::barrier({len(barriers)})"
            barriers.append(f"{source.name}:{text.count(chr(10), 0, barrier.start()) + 1}")
            text = text[: barrier.start()] + call + text[barrier.end() :]
        text = _DYNAMIC.sub(r"unsigned char* \1 = emulator::dynamic_shared();", text)
        text = _SHARED.sub(r"static \1 \2\3; emulator::poison(&\2, sizeof(\2));", text)
        text = text.replace("(freeanchor, CUDA, m)", "(freeanchor, CPU, m)")
        text = _launches(text)
        target = out / (source.stem + (".cpp" if source.suffix == ".cu" else source.suffix))
        text = f'#include "cuda_emulator.h"\n#line 1 "{source.name}"\n{text}'
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
        if source.suffix == ".cu":
            files.append(target)
    return files, barriers


def _launches(text: str) -> str:
    """`kernel<<<config>>>(arguments)` becomes `emulator::launch(config, [&] { kernel(...); })`."""
    while match := _LAUNCH.search(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        arguments = text[match.end() : end - 1]
        call = f"emulator::launch({match[2]}, [&] {{ {match[1]}({arguments}); }})"
        text = text[: match.start()] + call + text[end:]
    return text
