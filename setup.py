"""The extension module. All else is in setup.cfg.

Without PyTorch in the build environment (`pip install` isolates builds unless it is told not to),
or with a compiler that does not understand GCC's flags, there is no extension, and FreeAnchor runs
on the PyTorch reference of its operators. The CUDA kernels are built where there are nvcc and a
GPU; FORCE_CUDA=1 or 0 decides otherwise.
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

CSRC = Path("projects/FreeAnchor/freeanchor/layers/csrc")

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    print("freeanchor: PyTorch is not in the build environment, so no extension is built")
    setup()
else:
    cuda = torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    cuda = {"0": False, "1": True}.get(os.environ.get("FORCE_CUDA", ""), cuda)
    extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    sources = [
        CSRC / "module.cpp",
        *CSRC.glob("cpu/*.cpp"),
        *(CSRC.glob("cuda/*.cu") if cuda else ()),
    ]
    # Contraction of a * b + c would change the last bit of IoUs, and with it the order of ties.
    flags = {
        "cxx": ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
        "nvcc": ["-O3", "--fmad=false"],
    }
    if sys.platform == "linux":
        flags["cxx"].append("-fopenmp")  # PyTorch's own threads, at::parallel_for

    class BuildExtension(cpp_extension.BuildExtension):
        """Does without the extension where the compiler cannot make it."""

        def build_extensions(self):
            if self.extensions and not self.understands_flags():
                print(
                    "freeanchor: the C++ compiler does not understand the flags of GCC, so no "
                    "extension is built, and the PyTorch reference of the operators will run"
                )
                self.extensions = []
            if self.extensions:
                super().build_extensions()

        def understands_flags(self):
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "probe.cpp"
                source.write_text("float f(float a) { return __builtin_fmaf(a, a, a); }\n")
                try:
                    self.compiler.compile([str(source)], folder, extra_postargs=flags["cxx"])
                except (CompileError, OSError):
                    return False
            return True

    setup(
        ext_modules=[
            extension(
                "freeanchor.layers._C",
                sorted(map(str, sources)),
                py_limited_api=True,
                extra_compile_args=flags,
                depends=sorted(map(str, [*CSRC.glob("**/*.h"), *CSRC.glob("**/*.cuh")])),
            )
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
