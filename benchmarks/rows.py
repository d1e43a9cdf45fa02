"""Results as flat rows, benchmarks/results/<device>.jsonl, and how the programs of this folder fill them.

A case is measured as a whole, and its rows share a date: the newest date of a case is what counts. A note says what a
number cannot. Where the tree is a copy without its history, FASTGUARD_COMMIT names the commit, by at least 10 digits.
A digest of the code says what --resume may go on with: a commit that adds results or pages does not change it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import triton

from fastguard.cli import terminations_as_interrupts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("fastguard", "kernels", "recipes", "benchmarks", "tests", "setup.py", "pyproject.toml")
UNITS = {"_tflop_per_s": "TFLOP/s", "_gb_per_s": "GB/s", "_tflop": "TFLOP", "_bytes": "bytes", "_us": "us", "_s": "s"}
SAME = ("device", "torch", "triton", "python", "code")
"""what --resume asks of a row; another machine with such a device may go on"""
FAILED, OUT_OF_MEMORY, SKIPPED = "failed", "out of memory", "skipped"
GRACE_S = 10.0
"""in which a process may end by itself"""
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Row = dict[str, Any]
Numbers = Mapping[str, float | str]
"""by metric, whose name ends with its unit (`p50_us`); or why there are none: {"out of memory": "its message"}"""
Measured = Iterable[tuple[str, str, Numbers]]
"""contender, phase, numbers"""
Cases = dict[str, Callable[[], Measured]]


def environment() -> Row:
    """What a number needs beside it. dirty: whether code differs from the commit; None if that is unknown."""
    gpu = torch.cuda.is_available()
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *CODE, ":!benchmarks/results")
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {cpu.group(1) if cpu else platform.machine()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dirty": None if changed is None else bool(changed),
        "code": digest(),
    }


def digest() -> str:
    """Of the code's files, but for those that programs write: ten digits, with or without a history of the tree."""
    found = hashlib.sha256()
    for path in sorted(path for name in CODE for path in (ROOT / name, *(ROOT / name).rglob("*")) if path.is_file()):
        if RESULTS not in path.parents and "__pycache__" not in path.parts:
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:10]


def commit() -> str:
    """Ten digits of it. Raises ValueError for a FASTGUARD_COMMIT that is none."""
    given = os.environ.get("FASTGUARD_COMMIT")
    if given is None:
        return _output("git", "rev-parse", "--short=10", "HEAD") or "unknown"
    if not re.fullmatch("[0-9a-f]{10,40}", given):
        raise ValueError(f"FASTGUARD_COMMIT is {given!r}, expected at least 10 hexadecimal digits of a commit")
    return given[:10]


def _output(*command: str) -> str | None:
    """What it prints; None if it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(device: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def flat(suite: str, case: str, measured: Measured, env: Row) -> list[Row]:
    """A case's rows, of this moment."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    found = []
    for contender, phase, numbers in measured:
        for name, value in numbers.items():
            ending = next((ending for ending in UNITS if name.endswith(ending)), "")
            what: Row = {"suite": suite, "case": case, "contender": contender, "phase": phase}
            said: Row = {"value": 1.0, "note": value} if isinstance(value, str) else {"value": float(value)}
            unit = {"metric": name.removesuffix(ending), "unit": UNITS.get(ending, "1")}
            found.append({**what, **unit, **said, **env, "date": date})
    return found


def load(folder: Path = RESULTS) -> list[Row]:
    """All rows. Raises ValueError, with file and line, for what is none."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                found.append(row | {"key": (row["device"], row["suite"], row["case"])})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}, is not a result; remove the line") from None
    return found


def newest(found: list[Row]) -> list[Row]:
    """The last measurement of each case on each device."""
    dates = {row["key"]: row["date"] for row in sorted(found, key=lambda row: row["date"])}
    return [row for row in found if row["date"] == dates[row["key"]]]


def finished(suite: str, env: Row, folder: Path) -> set[str]:
    """Cases whose last measurement, of the same code, versions and kind of device, went through.

    What ran out of memory did: that is a result. What was not installed did not.
    """
    same = [row for row in load(folder) if row["suite"] == suite and all(row.get(key) == env[key] for key in SAME)]
    last = newest(same)
    return {row["case"] for row in last} - {row["case"] for row in last if row["metric"] in (FAILED, SKIPPED)}


def text_of(found: list[Row]) -> str:
    """A line for each contender and phase."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in found:
        value = row.get("note") or f"{row['value']:,.5g} {row['unit'].removeprefix('1')}".strip()
        lines.setdefault((row["contender"], row["phase"]), []).append(f"{row['metric']} {value}")
    return "\n".join(f"  {who:12} {phase:28} {', '.join(values)}" for (who, phase), values in lines.items())


def parser(doc: str | None, patterns: str = "cases") -> argparse.ArgumentParser:
    """With a module's docstring for --help, and the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help=f"some of the {patterns}")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    made.add_argument("--resume", action="store_true", help="measure only what this code has not measured here")
    made.add_argument("--minutes", type=_minutes, default=math.inf, help="stop after about so many minutes")
    made.add_argument("--dry-run", action="store_true", help="list what would be measured")
    made.add_argument("--toy", action="store_true", help="run everything at toy sizes on the CPU; nothing is saved")
    return made


def _minutes(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}, expected more than 0")
    return float(text)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, needs_gpu: bool) -> None:
    """Refuse what cannot work before anything is measured, and set `args.end`, the moment to stop at."""
    args.end = time.monotonic() + 60 * args.minutes
    if needs_gpu and not (args.dry_run or args.toy or torch.cuda.is_available()):
        parser.error("needs a CUDA device, and torch sees none; --toy runs the same code on the CPU")
    try:
        commit()
        if not (args.dry_run or args.toy):
            args.out.mkdir(parents=True, exist_ok=True)
        load(args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; expected a folder to write to")
    except ValueError as error:
        parser.error(str(error))


def measure(suite: str, cases: Cases, args: argparse.Namespace) -> str | None:
    """Measure each case, and save its rows at once. Returns what failed or is left, as `sys.exit` takes it."""
    env = environment()
    chosen = [name for name in cases if any(fnmatch(name, pattern) for pattern in args.only)]
    if not chosen:
        return f"--only matches none of {', '.join(map(repr, cases))}"
    done = finished(suite, env, args.out) if args.resume and not args.toy else set()
    print(f"{suite}: {len(chosen)} cases, {len(done & set(chosen))} measured before", flush=True)
    failed, left = [], []
    for name in [name for name in chosen if name not in done]:
        if args.dry_run or time.monotonic() >= args.end:
            print(f"{suite}: {name}", flush=True)
            left.append(name)
            continue
        found = flat(suite, name, _measured(cases[name]), env)
        print(f"\n{suite}: {name}\n{text_of(found)}", flush=True)
        failed += [name] * any(row["metric"] == FAILED for row in found)
        if not args.toy:
            with (args.out / f"{slug(env['device'])}.jsonl").open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
    problems = [f"failed: {', '.join(failed)}"] if failed else []
    if left and not args.dry_run:
        problems.append(f"no time left for {', '.join(left)}; --resume measures them")
    return "; ".join(problems) or None


def _measured(case: Callable[[], Measured]) -> Measured:
    """The cases after one that fails may still be measured."""
    try:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return list(case())
    except Exception as error:
        traceback.print_exc()
        return [("", "", problem(error))]


def problem(error: Exception) -> Numbers:
    """Why there are no numbers."""
    kind = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else FAILED
    return {kind: f"{type(error).__name__}: {str(error)[:300]}"}


def main(
    doc: str | None,
    suite: Callable[[argparse.Namespace], tuple[str, Cases]],
    needs_gpu: bool = True,
    **without_gpu: str,
) -> None:
    """A program that measures the cases of a suite, by its name. without_gpu: options with which it needs none."""
    made = parser(doc)
    for option, text in without_gpu.items():
        made.add_argument(f"--{option}", action="store_true", help=text)
    args = made.parse_args()
    if args.toy and os.environ.get("TRITON_INTERPRET") != "1":
        # Kernels then run on a CPU. That has to be known before triton is imported: the program restarts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    check_arguments(made, args, needs_gpu and not any(getattr(args, option) for option in without_gpu))
    run(lambda: measure(*suite(args), args))


def run(main: Callable[[], str | None]) -> None:
    """Run a program to its exit status: None is success. SIGTERM and SIGHUP stop it as Ctrl-C does."""
    try:
        with terminations_as_interrupts():
            sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name} was stopped; --resume goes on with what it has saved", file=sys.stderr)
        sys.exit(130)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A process that does not outlive this one, even if this one is killed.

    It has a session of its own, so that Ctrl-C reaches it, and what it has started, by way of this process alone.
    """
    return subprocess.Popen(command, text=True, start_new_session=True, preexec_fn=_end_with_parent, **options)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that outlives neither the block nor this process."""
    with start(command, **options) as process:
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that `start` gave, and all that runs in its session, even if the process itself has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
