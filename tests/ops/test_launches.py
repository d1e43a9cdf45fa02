"""Launches that take a compiled kernel from the last one alike: the same as Triton's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard.kernels import common

TESTS = Path(__file__).parent.parent
SCRIPT = TESTS / "helpers" / "remembered_launches.py"


@pytest.mark.skipif(not common.REMEMBERS_LAUNCHES, reason="this Triton's launches are not remembered")
def test_a_remembered_launch_is_the_one_that_triton_would_make() -> None:
    """Kernel, grid and arguments, of every operator, also where only the address, a stride or a size has changed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(TESTS.parent / "benchmarks"), *sys.path])
    found = subprocess.run(
        [sys.executable, str(SCRIPT)], env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 50
