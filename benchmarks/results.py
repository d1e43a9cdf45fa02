"""Append-only result files: benchmarks/results/<device>/<date>_<commit>.json, one section per benchmark."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """What a number needs beside it: device, versions, commit, and whether the tree was clean."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {_cpu_name()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short=10", "HEAD") or "unknown",
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def slug(device: str) -> str:
    """A device's name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def save(section: str, numbers: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a section into today's file of this device and commit, beside sections that are there already."""
    env = environment()
    path = folder / slug(env["device"]) / f"{env['date']}_{env['commit']}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, section: {"environment": env, **numbers}}, indent=1) + "\n")
    return path


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"), key=lambda path: path.name)]


def _cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1).strip() if found else platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
