"""Append-only result files: benchmarks/results/<device>/<date>_<commit>.json, per benchmark a list of runs.

Where the tree is a copy without its history, FASTGUARD_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
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
        "commit": os.environ.get("FASTGUARD_COMMIT", "")[:10]
        or _output("git", "rev-parse", "--short=10", "HEAD")
        or "unknown",
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
    whole = path.with_suffix(".tmp")  # a run that is killed while it saves keeps what it had
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(path)
    return path


class Run:
    """A benchmark's run as a table of rows: saved after each, so that nothing is lost, and taken up again on demand.

    A row that fails or runs out of memory is kept with its `error`.
    """

    def __init__(self, section: str, args: argparse.Namespace, **fixed: Any) -> None:
        """`args` as `add_arguments` makes them; `fixed`: what all rows share, saved beside them."""
        self.rows: dict[str, Any] = {}
        self.left: list[str] = []
        """rows for which no time was left"""
        self.path: Path | None = None
        self._section, self._fixed, self._save, self._folder = section, fixed, args.save, args.out
        self._environment = environment()
        self._deadline = time.monotonic() + 60 * args.minutes
        if args.resume:
            self._take_up()

    def _take_up(self) -> None:
        """Go on with the newest run of the same device, versions, commit and settings."""
        elsewhere = ("time", "driver", "threads")  # of another machine with such a GPU
        same = {key: value for key, value in self._environment.items() if key not in elsewhere}
        for file in load(self._folder):
            for run in file.get(self._section, []):
                env = run["environment"]
                if {key: env.get(key) for key in same} == same and _plain(self._fixed).items() <= run.items():
                    self._environment, self.rows = env, run["rows"]

    def missing(self, names: Iterable[str]) -> list[str]:
        """The rows that were not measured yet, or failed."""
        return [name for name in names if name not in self.rows or _failed(self.rows[name])]

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
        broken = [name for name, row in self.rows.items() if _failed(row)]
        missing = [f"failed: {', '.join(broken)}"] if broken else []
        if self.left:
            missing.append(f"no time left for {', '.join(self.left)}; --resume goes on with them")
        return "; ".join(missing) or None


def _failed(row: dict[str, Any]) -> bool:
    """Not so if it ran out of memory, which is a result."""
    return row.get("error") not in (None, "out of memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark on a GPU takes."""
    parser.add_argument("--save", action="store_true", help="add the numbers to the result files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the last run of this commit and device measured"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after about so many")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, nothing saved")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what makes no sense: nothing of a dry run is a number, and the rest needs a GPU."""
    if args.dry_run and args.save:
        parser.error("--dry-run saves nothing: toy sizes are no numbers")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("needs a CUDA device, and torch sees none; --dry-run walks the path on the CPU")


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"), key=lambda path: path.name)]


def newest_rows(files: list[dict[str, Any]], section: str) -> dict[str, dict[str, dict[str, Any]]]:
    """For each device the newest row of each name, with its `environment` and what its run shared.

    Rows may come from several runs: a part of a benchmark can be measured again on its own.
    """
    runs = [run for file in files for run in file.get(section, []) if "rows" in run]
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: str(run["environment"]["time"])):
        shared = {key: value for key, value in run.items() if key != "rows"}
        rows = devices.setdefault(run["environment"]["device"], {})
        rows |= {name: {**shared, **row} for name, row in run["rows"].items()}
    return devices


def _cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1).strip() if found else platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
