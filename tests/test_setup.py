"""setup.py, where the extension cannot be built."""

import os
import subprocess
import sys

from conftest import REPOSITORY


def test_compiler_that_does_not_understand_the_flags(tmp_path):
    """Installation goes on without the extension, and says so, for example with MSVC."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-ffp-contract*) echo "unrecognized option" >&2; exit 1;; esac\n'
        'exec /usr/bin/env c++ "$@"\n'
    )
    compiler.chmod(0o755)
    build = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}"]
    run = subprocess.run(
        [*build, f"--build-temp={tmp_path}"],
        env={**os.environ, "CC": str(compiler), "CXX": str(compiler), "FORCE_CUDA": "0"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "the C++ compiler does not understand the flags of GCC" in run.stdout
    assert not list(tmp_path.glob("**/_C*"))
