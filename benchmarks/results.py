"""Append-only result files: benchmarks/results/<device>/<date>_<commit>.json, per benchmark a list of runs.

Where the tree is a copy without its history, FASTGUARD_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("fastguard", "kernels", "recipes", "benchmarks", "tests", "setup.py", "pyproject.toml")


def environment() -> dict[str, Any]:
    """What a number needs beside it: device, versions, commit, and whether code was changed since (None: unknown)."""
    gpu = torch.cuda.is_available()
    # Pages and results are written by the benchmarks themselves; they change no number.
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *CODE, ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {_cpu_name()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dirty": None if changed is None else bool(changed),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Ten digits of it. Raises ValueError for a FASTGUARD_COMMIT that is none."""
    given = os.environ.get("FASTGUARD_COMMIT")
    if given is None:
        return _output("git", "rev-parse", "--short=10", "HEAD") or "unknown"
    if not re.fullmatch("[0-9a-f]{10,40}", given):
        raise ValueError(f"FASTGUARD_COMMIT is {given!r}, expected at least 10 hexadecimal digits of a commit")
    return given[:10]


def slug(device: str) -> str:
    """A device's name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def save(section: str, env: dict[str, Any], numbers: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Add a run to its device's file of the day and commit; saving again under the same `env` updates that run."""
    path = folder / slug(env["device"]) / f"{env['time'][:10]}_{env['commit']}.json"
    content = read(path) if path.exists() else {}
    runs = [run for run in content.get(section, []) if run["environment"] != env]
    content[section] = [*runs, {"environment": env, **numbers}]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")  # a run that is killed while it saves keeps what it had
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(path)
    return path


class Run:
    """A benchmark's run as a table of rows: saved after each, so that nothing is lost, and taken up again on demand.

    A row that fails or runs out of memory is kept with its `error`.
    """

    def __init__(self, section: str, args: argparse.Namespace, **fixed: Any) -> None:
        """`args` as `program.add_arguments` makes them; `fixed`: what all rows share, saved beside them."""
        self.rows: dict[str, Any] = {}
        self.left: list[str] = []
        """rows for which no time was left"""
        self.path: Path | None = None
        self._section, self._fixed, self._folder = section, fixed, args.out
        self._save, self._dry_run = args.save, args.dry_run
        self._environment = environment()
        self._deadline = time.monotonic() + 60 * args.minutes
        if args.resume:
            self._take_up()

    def _take_up(self) -> None:
        """Go on with the newest run of the same device, versions, commit and settings, and say so."""
        elsewhere = ("time", "driver", "threads")  # of another machine with such a GPU
        here = {**self._environment, **_plain(self._fixed)}
        differ: list[str] | None = None
        for file in load(self._folder):
            for run in file.get(self._section, []):
                there = {**run["environment"], **run}
                if there["device"] != here["device"]:
                    continue
                differ = [key for key in here if key not in elsewhere and there.get(key) != here[key]]
                if not differ:
                    self._environment, self.rows = run["environment"], run["rows"]
        if self.rows:
            done = len(self.rows) - len(self.missing(self.rows))
            print(f"{self._section}: going on from {self._environment['time']}, {done} rows done", flush=True)
        else:
            why = "no run of this device" if differ is None else f"the last run differs in {', '.join(differ)}"
            print(f"{self._section}: nothing to go on from: {why}", flush=True)

    def missing(self, names: Iterable[str]) -> list[str]:
        """The rows that were not measured yet, or failed, or for which something was not installed."""
        return [
            name for name in names if name not in self.rows or _failed(self.rows[name]) or "skipped" in self.rows[name]
        ]

    @property
    def seconds_left(self) -> float:
        """Until the end that --minutes sets."""
        return max(0.0, self._deadline - time.monotonic())

    def measure(self, names: Iterable[str], row_of: Callable[[str], dict[str, Any]]) -> None:
        """Fill in the rows that are missing, as long as there is time, and print what goes wrong."""
        for name in self.missing(names):
            if self.seconds_left == 0:
                self.left.append(name)
                continue
            try:
                row = row_of(name)
            except Exception as error:  # the rows after it may still be measured
                row = {"error": "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"}
                row["message"] = f"{type(error).__name__}: {str(error)[:500]}"
                traceback.print_exc()
            self.rows[name] = row
            if self._save:
                numbers = {**self._fixed, "rows": self.rows}
                self.path = save(self._section, self._environment, numbers, self._folder)

    def finish(self) -> str | None:
        """Say where the numbers are; what is missing, as `sys.exit` takes it."""
        if self.path is not None:
            print(f"\nsaved {self.path}")
        elif not (self._save or self._dry_run):
            print("\nnot saved: --save adds the numbers to the result files")
        broken = [name for name, row in self.rows.items() if _failed(row)]
        missing = [f"failed: {', '.join(broken)}"] if broken else []
        if self.left:
            missing.append(f"no time left for {', '.join(self.left)}; --resume goes on with them")
        return "; ".join(missing) or None


def _failed(row: dict[str, Any]) -> bool:
    """Not so if it ran out of memory, which is a result."""
    return row.get("error") not in (None, "out of memory")


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files, oldest first."""
    return [read(path) for path in sorted(folder.glob("*/*.json"), key=lambda path: path.name)]


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError, with its name, if it is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a result file: {error}; mend or remove it") from None
    if not (isinstance(content, dict) and all(isinstance(runs, list) for runs in content.values())):
        raise ValueError(f"{path} is not a result file: expected lists of runs by section; mend or remove it")
    return content


def newest_rows(
    files: list[dict[str, Any]], section: str, by_device: bool = True
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each device the newest row of each name, with its `environment` and what its run shared.

    Rows may come from several runs: a part of a benchmark can be measured again on its own. `by_device`: no for what is
    the same on every machine.
    """
    runs = [run for file in files for run in file.get(section, []) if "rows" in run]
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: str(run["environment"]["time"])):
        shared = {key: value for key, value in run.items() if key != "rows"}
        rows = devices.setdefault(run["environment"]["device"] if by_device else "any", {})
        rows |= {name: {**shared, **row} for name, row in run["rows"].items()}
    return devices


def _cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1).strip() if found else platform.machine()


def _output(*command: str) -> str | None:
    """What it prints; None if it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
