"""How tests are collected, and what they inherit from the shell that starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TESTS
from helpers.deadline import DEADLINE_S

INSIDE = """
import signal, subprocess, sys
import pytest

def test_a_child_is_interrupted():
    code = "print('ready', flush=True); import time; time.sleep(20)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"ready\\n"
    child.send_signal(signal.SIGINT)
    assert child.wait() == -signal.SIGINT

def test_a_kernel(kernel_device):
    assert kernel_device == "cpu"

@pytest.mark.gpu
def test_on_a_gpu():
    pass
"""


def ignoring() -> None:
    """As a script's `nohup make test &`."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is collected without a CUDA device")
@pytest.mark.parametrize("processes", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_in_the_background_signals_arrive_and_without_cuda_each_test_is_collected_once(
    tmp_path: Path, processes: str
) -> None:
    (tmp_path / "test_inside.py").write_text(INSIDE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu long xdist_group\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", processes, "-rA", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(TESTS)}, preexec_fn=ignoring,
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "PASSED test_inside.py::test_a_child_is_interrupted" in done.stdout
    assert "PASSED test_inside.py::test_a_kernel[interpreter]" in done.stdout
    assert "2 passed" in done.stdout
    assert "skipped" not in done.stdout
    assert "there is no CUDA device" in done.stdout
    assert processes != "0" or "deselected 1 tests that only a CUDA device can run" in done.stdout
