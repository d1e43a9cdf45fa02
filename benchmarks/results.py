"""Append-only result files: benchmarks/results/<device>/<date>_<commit>.json, per benchmark a list of runs."""

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
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def slug(device: str) -> str:
    """A device's name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def save(section: str, env: dict[str, Any], numbers: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Add a run to its device's file of the day and commit; saving again under the same `env` updates that run."""
    path = folder / slug(env["device"]) / f"{env['time'][:10]}_{env['commit']}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    runs = [run for run in content.get(section, []) if run["environment"] != env]
    content[section] = [*runs, {"environment": env, **numbers}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
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
