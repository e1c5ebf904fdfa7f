"""How OpenMP's threads wait: set in time, and never against the user."""

import subprocess
import sys

import pytest
from freeanchor.openmp import share_cores


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_users_come_first(monkeypatch, users, expected):
    """What the environment says about waiting stays."""
    environment = dict(users)
    monkeypatch.setattr("os.environ", environment)
    share_cores()
    assert environment == expected


@pytest.mark.parametrize("module", ["freeanchor", "freeanchor.__main__"])
def test_before_pytorch(module):
    """OpenMP reads the environment when PyTorch is imported: it is set by then."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            sys.exit(os.environ.get('GOMP_SPINCOUNT', 'too late'))\n"
        "for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):\n"
        "    os.environ.pop(name, None)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "1000"
