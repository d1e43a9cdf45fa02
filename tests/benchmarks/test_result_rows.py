"""Rows of results: saved at once, resumed, and what a program refuses and leaves behind."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import rows
import torch
from helpers import ROOT
from helpers.deadline import DEADLINE_S

ENV = rows.environment() | {"device": "NVIDIA H100 80GB HBM3", "commit": "0123456789", "dirty": False}


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "environment", lambda: dict(ENV))


def measure(folder: Path, cases: rows.Cases, **changed: Any) -> str | None:
    given = {"only": ["*"], "out": folder, "resume": True, "dry_run": False, "toy": False, "end": math.inf, **changed}
    return rows.measure("things", cases, argparse.Namespace(**given))


def raises(error: Exception) -> Any:
    def case() -> Any:
        yield "ours", "forward", {"p50_us": 3.0}
        raise error

    return case


def fine() -> Any:
    yield "ours", "forward", {"p50_us": 2.0, "bandwidth_gb_per_s": 5.0, "of_copy": 0.5, "peak_bytes": 7}
    yield "theirs", "forward", {rows.OUT_OF_MEMORY: "tried 9 GiB"}


def test_rows_are_flat_and_saved_one_case_after_the_other(tmp_path: Path, capsys) -> None:
    """What fails has a row that says why, and the cases after it are measured."""
    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    def last() -> Any:
        assert {row["case"] for row in rows.load(tmp_path)} == {"fine", "broken", "large"}
        return fine()

    cases = {"fine": fine, "broken": raises(ValueError("a driver error")), "large": raises(oom), "last": last}
    assert measure(tmp_path, cases) == "failed: broken"
    found = rows.load(tmp_path)
    assert (tmp_path / "nvidia-h100-80gb-hbm3.jsonl").exists()
    of_fine = [row for row in found if row["case"] == "fine"]
    assert [(r["metric"], r["unit"], r["value"]) for r in of_fine] == [
        ("p50", "us", 2.0), ("bandwidth", "GB/s", 5.0), ("of_copy", "1", 0.5), ("peak", "bytes", 7.0),
        ("out of memory", "1", 1.0),
    ]  # fmt: skip
    assert of_fine[-1]["note"] == "tried 9 GiB"
    assert all(row[key] == value for row in of_fine for key, value in ENV.items())
    (broken,) = (row for row in found if row["case"] == "broken")  # what came before the error is no result
    assert (broken["metric"], broken["note"]) == ("failed", "ValueError: a driver error")
    assert "a driver error" in capsys.readouterr().err


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch, capsys) -> None:
    done: list[str] = []

    def case(name: str) -> Any:
        def run() -> Any:
            done.append(name)
            yield "ours", "forward", {"failed": "x"} if name == broken else {"p50_us": 1.0}

        return run

    names = ["a", "b", "c"]
    cases = {name: case(name) for name in names}
    broken = "b"
    assert measure(tmp_path, cases, only=["a", "b"]) == "failed: b"
    assert measure(tmp_path, cases, end=-math.inf) == "no time left for b, c; --resume measures them"
    assert measure(tmp_path, cases, dry_run=True) is None
    assert "things: 3 cases, 1 measured before\nthings: b\nthings: c\n" in capsys.readouterr().out
    assert done == ["a", "b"]
    broken = ""
    monkeypatch.setattr(rows, "environment", lambda: ENV | {"driver": "581", "threads": 2})  # another such machine
    assert measure(tmp_path, cases) is None
    assert done == ["a", "b", "b", "c"]
    for changed in ({"code": "1123456789"}, {"torch": "9"}):
        monkeypatch.setattr(rows, "environment", lambda changed=changed: ENV | changed)
        measure(tmp_path, cases, dry_run=True)
        assert "3 cases, 0 measured before" in capsys.readouterr().out
    assert measure(tmp_path, cases, resume=False, toy=True) is None  # nothing is saved
    assert {row["commit"] for row in rows.load(tmp_path)} == {"0123456789"}
    assert "matches none of 'a', 'b', 'c'" in str(measure(tmp_path, cases, only=["d"]))
    (b,) = (row for row in rows.newest(rows.load(tmp_path)) if row["case"] == "b")
    assert b["metric"] == "p50"  # the failure before it does not count any more


def test_what_the_machine_lacked_is_measured_on_the_next_one(tmp_path: Path) -> None:
    skipped: rows.Cases = {"tool": lambda: [("kernel", "watched", {rows.SKIPPED: "it is not installed"})]}
    assert measure(tmp_path, skipped) is None
    assert rows.finished("things", ENV, tmp_path) == set()


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(rows, "ROOT", tmp_path)  # no repository
    env = rows.environment()
    assert (env["commit"], env["dirty"]) == ("unknown", None)
    monkeypatch.setenv("FASTGUARD_COMMIT", "0123456789abcdef")
    assert rows.environment()["commit"] == "0123456789"
    monkeypatch.setenv("FASTGUARD_COMMIT", "feature/x")
    with pytest.raises(ValueError, match="FASTGUARD_COMMIT is 'feature/x', expected at least 10"):
        rows.commit()


def test_only_changed_code_counts_as_a_change(monkeypatch, tmp_path: Path) -> None:
    """Pages and results that are written or committed between two runs do not keep the second from going on."""
    monkeypatch.undo()

    def git(*args: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    files = (
        ("README.md", False), ("benchmarks/results/a.jsonl", False),
        ("benchmarks/rows.py", True), ("kernels/a/b.py", True), ("setup.py", True),
    )  # fmt: skip
    for name, _ in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "benchmarks" / "results")
    before = rows.environment()
    for name, is_code in files:
        (tmp_path / name).write_text("after")
        changed = rows.environment()
        assert changed["dirty"] is is_code, name
        git("commit", "--all", "-m", "one")
        after = rows.environment()
        assert after["code"] == changed["code"]  # of the files, with or without a commit
        assert (after["code"] != before["code"]) is is_code, name
        before = after
    cache = tmp_path / "benchmarks" / "__pycache__" / "rows.pyc"
    cache.parent.mkdir()
    cache.write_text("compiled")
    assert rows.digest() == before["code"]


def refusal(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    parser = rows.parser("words")
    with pytest.raises(SystemExit) as status:
        rows.check_arguments(parser, parser.parse_args(given), needs_gpu=True)
    assert status.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_work_is_refused(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refusal(capsys)
    for minutes in ("0", "-1", "nan"):
        assert f"{minutes}, expected more than 0" in refusal(capsys, f"--minutes={minutes}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    occupied, broken = tmp_path / "file", tmp_path / "gpu.jsonl"
    occupied.touch()
    assert f"--out {occupied}: File exists; expected a folder" in refusal(capsys, "--out", str(occupied))
    for content in ("{\n", "[1, 2]\n", '{"loss": 3}\n'):
        broken.write_text(json.dumps(ENV | {"suite": "a", "case": "b", "date": "c"}) + "\n" + content)
        said = refusal(capsys, "--out", str(tmp_path)).replace("\n", " ")
        assert f"{broken}, line 2, is not a result; remove the line" in said


PARENT = """
import sys, rows
def main():
    with rows.child([sys.executable, "-c", CHILD]) as process:
        print(process.pid, flush=True)
        process.wait()
rows.run(main)
"""
CHILD = "import subprocess, sys, time; subprocess.Popen(['sleep', '3600']); time.sleep(3600)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_nothing_outlives_a_program(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"CHILD = {CHILD!r}\n{PARENT}")
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, str(script)], env=environ, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    deadline = time.monotonic() + DEADLINE_S
    while not child.children():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = [child, *child.children()]
    process.send_signal(number)
    process.wait(timeout=DEADLINE_S)
    if number == signal.SIGKILL:  # ends the child as roughly: what that one has started is not ours to end
        family[1].kill()
    else:
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert errors.endswith("\nscript.py was stopped; --resume goes on with what it has saved\n")
    gone, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
    assert len(gone) == len(family), alive
