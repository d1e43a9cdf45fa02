"""From measurements to README: runs that stop and go on, numbers to reach, tables, pictures and notes."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import ROOT

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def arguments(folder: Path, **changed: Any) -> argparse.Namespace:
    given = {"save": True, "out": folder, "resume": False, "minutes": math.inf, "dry_run": False, **changed}
    return argparse.Namespace(**given)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_rows_are_saved_one_by_one_and_the_rest_is_measured_after_a_failure(tmp_path: Path, capsys) -> None:
    import results

    run = results.Run("things", arguments(tmp_path), size=3)

    def row_of(name: str) -> dict[str, Any]:
        if name == "two":
            saved = json.loads(run.path.read_text())["things"][0]  # type: ignore[union-attr]
            assert saved["rows"] == {"one": {"us": 1.0}}
            assert saved["size"] == 3
            raise ValueError("a driver error")
        if name == "three":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return {"us": 1.0}

    run.measure(["one", "two", "three", "four"], row_of)
    assert run.rows["two"] == {"error": "failed", "message": "ValueError: a driver error"}
    assert run.rows["three"]["error"] == "out of memory"
    assert run.rows["four"] == {"us": 1.0}
    assert run.finish() == "failed: two"
    assert "a driver error" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    import results

    def row_of(name: str) -> dict[str, Any]:
        done.append(name)
        return {"error": "failed", "message": ""} if name == "broken" and broken else {"us": 1.0}

    done: list[str] = []
    broken = True
    first = results.Run("things", arguments(tmp_path))
    first.measure(["a", "broken"], row_of)
    late = results.Run("things", arguments(tmp_path, resume=True, minutes=-1.0))
    late.measure(["a", "broken", "c"], row_of)
    assert late.left == ["broken", "c"]
    assert "no time left for broken, c; --resume goes on" in str(late.finish())
    assert done == ["a", "broken"]

    broken = False
    second = results.Run("things", arguments(tmp_path, resume=True))
    second.measure(["a", "broken", "c"], row_of)
    assert done == ["a", "broken", "broken", "c"]  # what failed is measured again, what went through is not
    assert second.finish() is None
    (path,) = tmp_path.rglob("*.json")
    (stored,) = json.loads(path.read_text())["things"]  # one run, not two
    assert list(stored["rows"]) == ["a", "broken", "c"]


def test_a_run_goes_on_on_another_machine_with_such_a_gpu(tmp_path, monkeypatch, capsys) -> None:
    """Also with what was not installed on the first one."""
    import results

    rows = {"a": {"us": 1.0}, "tool": {"skipped": "it is not installed"}}
    first = results.Run("things", arguments(tmp_path))
    first.measure(rows, lambda name: rows[name])
    assert first.finish() is None
    env = {**results.environment(), "driver": "580.2", "threads": 99}
    monkeypatch.setattr(results, "environment", lambda: env)
    assert results.Run("things", arguments(tmp_path, resume=True)).missing(["a", "tool", "b"]) == ["tool", "b"]
    assert re.search(r"things: going on from \S+, 1 rows done", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("changed", "fixed"), [({"commit": "0123456789"}, {}), ({"torch": "9"}, {}), ({}, {"size": 4})]
)
def test_a_run_of_another_commit_version_or_setting_is_not_taken_up(
    tmp_path, monkeypatch, capsys, changed, fixed
) -> None:
    import results

    results.Run("things", arguments(tmp_path), size=3).measure(["a"], lambda name: {"us": 1.0})
    env = results.environment()
    monkeypatch.setattr(results, "environment", lambda: {**env, **changed})
    assert not results.Run("things", arguments(tmp_path, resume=True), **{"size": 3, **fixed}).rows
    (different,) = {**changed, **fixed}
    said = capsys.readouterr().out
    assert said == f"things: nothing to go on from: the last run differs in {different}\n"
    assert not results.Run("others", arguments(tmp_path, resume=True)).rows
    assert "others: nothing to go on from: no run of this device" in capsys.readouterr().out


def test_nothing_is_saved_unless_asked_for(tmp_path: Path, capsys) -> None:
    import results

    for dry in (False, True):
        run = results.Run("things", arguments(tmp_path, save=False, dry_run=dry))
        run.measure(["a"], lambda name: {"us": 1.0})
        assert run.finish() is None
        assert ("not saved: --save adds the numbers" in capsys.readouterr().out) is not dry
    assert not list(tmp_path.iterdir())


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch, tmp_path: Path) -> None:
    import results

    monkeypatch.setattr(results, "ROOT", tmp_path)  # no repository
    env = results.environment()
    assert (env["commit"], env["dirty"]) == ("unknown", None)
    monkeypatch.setenv("FASTGUARD_COMMIT", "0123456789abcdef")
    assert results.environment()["commit"] == "0123456789"
    monkeypatch.setenv("FASTGUARD_COMMIT", "feature/x")
    with pytest.raises(ValueError, match="FASTGUARD_COMMIT is 'feature/x', expected at least 10"):
        results.commit()


def test_only_changed_code_counts_as_a_change(monkeypatch, tmp_path: Path) -> None:
    """The pages and pictures that plot.py writes between two runs do not keep the second from going on."""
    import results

    def git(*args: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    for name in ("README.md", "benchmarks/plot.py", "benchmarks/results/plots/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name, dirty in (("README.md", False), ("benchmarks/results/plots/a.png", False), ("benchmarks/plot.py", True)):
        (tmp_path / name).write_text("after")
        assert results.environment()["dirty"] is dirty, name


# --- programs -------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    import program

    parser = program.parser("words")
    program.add_arguments(parser)
    with pytest.raises(SystemExit) as status:
        program.check_arguments(parser, parser.parse_args(given))
    assert status.value.code == 2
    return capsys.readouterr().err


def test_what_makes_no_sense_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refusal(capsys)
    assert "toy sizes are no numbers" in refusal(capsys, "--dry-run", "--save")
    for minutes in ("0", "-1", "nan"):
        assert f"{minutes}, expected more than 0" in refusal(capsys, "--dry-run", f"--minutes={minutes}")


def test_a_place_for_the_results_is_looked_for_beforehand(monkeypatch, capsys, tmp_path: Path) -> None:
    import program
    import results

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    occupied = tmp_path / "file"
    occupied.touch()
    assert f"--out {occupied}: File exists; expected a folder" in refusal(capsys, "--save", "--out", str(occupied))
    broken = tmp_path / "gpu" / "2026-01-01_0123456789.json"
    broken.parent.mkdir()
    for content in ("", "{", "[1, 2]", '{"loss": 3}'):
        broken.write_text(content)
        said = refusal(capsys, "--save", "--out", str(tmp_path))
        assert f"{broken} is not a result file: " in said.replace("\n", " ")
        assert "mend or remove it" in said
    broken.write_text('{"of another time": [{"environment": {}}]}')
    parser = program.parser("words")
    program.add_arguments(parser)
    program.check_arguments(parser, parser.parse_args(["--save", "--out", str(tmp_path)]))
    program.check_arguments(parser, parser.parse_args(["--save", "--out", str(tmp_path / "a" / "new")]))
    assert results.load(tmp_path / "a" / "new") == []


def test_names_are_chosen_by_patterns_that_all_match() -> None:
    import program

    assert program.chosen(["a one", "a two", "b"], ["a *", "b"], "--only") == ["a one", "a two", "b"]
    with pytest.raises(ValueError, match=r"--only 'c' matches none of 'a one', 'b'"):
        program.chosen(["a one", "b"], ["b", "c"], "--only")


PARENT = """
import sys, program
def main():
    with program.child([sys.executable, "-c", CHILD]) as process:
        print(process.pid, flush=True)
        process.wait()
program.run(main)
"""
CHILD = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_nothing_outlives_a_program(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"CHILD = {CHILD!r}\n{PARENT}")
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    deadline = time.monotonic() + 60
    while not child.children():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = [child, *child.children()]
    process.send_signal(number)
    process.wait(timeout=60)
    if number == signal.SIGKILL:  # ends the child as roughly: what that one has started is not ours to end
        for process_of_child in family[1:]:
            process_of_child.kill()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert len(gone) == len(family), alive
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert process.stderr is not None
        assert process.stderr.read() == "\nscript.py was stopped; --resume goes on with what it has saved\n"


def test_a_stopped_plan_leaves_no_process(tmp_path: Path) -> None:
    """In the middle of planning, by a signal that the planner's processes do not get."""
    command = [sys.executable, "benchmarks/bench_train_step.py", "--plan"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    plans = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while not any(worker.cpu_times().user > 1 for worker in plans.children()):
        assert time.monotonic() < deadline, "no process plans"
        time.sleep(0.1)
    workers = plans.children()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "bench_train_step.py was stopped" in errors
    assert not psutil.wait_procs(workers, timeout=30)[1]


# --- the suite ------------------------------------------------------------------------------------------------------


SUITE = [sys.executable, "benchmarks/gpu_suite.py"]


def test_the_gpu_suite_refuses_without_a_gpu() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(SUITE, cwd=ROOT, capture_output=True, text=True, check=False, env=hidden)
    assert refused.returncode == 2
    assert "needs a CUDA device" in refused.stderr


@pytest.mark.slow
def test_the_gpu_suite_walks_its_path() -> None:
    dry = subprocess.run([*SUITE, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    assert re.findall(r"^== (\w+): ", dry.stdout, re.MULTILINE) == [
        "tests", "sanitizer", "kernels", "flux", "train_step", "tuning"
    ]  # fmt: skip
    assert re.search(r"^tests of the loss: \{'passed': \d+", dry.stdout, re.MULTILINE)
    for row in ("copy", "loss forward", "loss backward", "sde_step", "textbook"):
        assert f"\n  {row} " in dry.stdout
    assert dry.stdout.count("fused pointwise, compiled") == 2  # of both kinds of block
    assert "\nfull-512-block, micro-batch" in dry.stdout  # in a process of its own
    assert dry.stdout.count("of a plain matmul's") == 1
    assert dry.stdout.count("  best: ") == 6


def test_nothing_is_timed_while_a_test_is_red(monkeypatch, capsys) -> None:
    import gpu_suite

    begun: list[str] = []

    def run_stage(name: str, *_: Any) -> bool:
        begun.append(name)
        return name != failing

    monkeypatch.setattr(gpu_suite, "run_stage", run_stage)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry-run"])
    failing = "tests"
    assert "the tests failed or were not finished; nothing is timed" in str(gpu_suite.main())
    assert begun == ["tests"]
    begun.clear()
    failing = "flux"
    assert gpu_suite.main() == "gpu_suite: not finished: flux"
    assert begun == list(gpu_suite.STAGES)  # the others are measured all the same
    begun.clear()
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry-run", "--minutes", "1e-6", "--stages", "flux", "kernels"])
    assert gpu_suite.main() == "gpu_suite: not finished: kernels, flux"
    assert not begun


def test_what_pytest_counted_is_told() -> None:
    import validate

    script = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"

    def outcome(text: str, status: int) -> dict[str, Any]:
        return validate.outcome([sys.executable, "-c", script, text, str(status)], {}, 60)

    assert outcome("3 passed, 2 skipped in 1s", 0)["counted"] == {"passed": 3, "skipped": 2}
    assert "error" not in outcome("3 passed in 1s", 0)
    assert outcome("1 failed, 2 passed in 1s", 1)["error"] == "failed"
    assert outcome("3 passed in 1s", 9)["error"] == "failed"  # what compute-sanitizer found
    assert outcome("5 skipped in 1s", 0)["error"] == "failed"  # nothing ran
    late = validate.outcome([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], {}, 0.5)
    assert late["error"] == "timed out"
    assert "here" in late["output"]


def test_the_sanitizer_watches_every_operator(tmp_path: Path, monkeypatch) -> None:
    """With a stand-in for the tool: what it is called with, and what it reports."""
    import validate

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "========= Invalid __global__ read of size 2 bytes"\necho "$@"\necho "1 passed"\nexit 9\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    row = validate.run_sanitizer("memcheck", dry_run=False, limit_s=60)
    assert row["error"] == "failed"
    assert row["reports"] == ["========= Invalid __global__ read of size 2 bytes"]
    assert row["command"].startswith("compute-sanitizer --tool memcheck --error-exitcode 9")
    selected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *validate.SANITIZED],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "float64[cuda-torch.bfloat16-odd]" in selected.stdout
    assert selected.stdout.count("::") == 1
    monkeypatch.setenv("PATH", "")
    assert validate.run_sanitizer("memcheck", dry_run=False, limit_s=60) == {
        "skipped": "compute-sanitizer is not installed"
    }


# --- a GPU's results, made up ---------------------------------------------------------------------------------------


def times(us: float) -> dict[str, float]:
    return {"p20_us": 0.95 * us, "p50_us": us, "p80_us": 1.1 * us}


def streamed(us: float, of_copy: float) -> dict[str, Any]:
    return {**times(us), "gb_per_s": 3000 * of_copy, "moved_bytes": 1, "of_copy": of_copy}


def kernels_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    import bench_kernels

    for i, (label, shape) in enumerate(bench_kernels.SHAPES.items()):
        us = 4.0 + math.prod(shape) / 4e5
        row: dict[str, Any] = {"shape": shape, "dtype": "torch.bfloat16", "copy": {**times(us), "gb_per_s": 3000.0}}
        for kernel in bench_kernels.KERNELS:
            row[kernel] = streamed(us, min(0.95, 0.3 + 0.05 * i))
        for factor, name in ((1, "fused"), (2.5, "compiled"), (31, "textbook")):
            both: Any = "out of memory" if name == "textbook" and label.startswith("1 GB") else times(3 * factor * us)
            row[f"{name} loss"] = {
                "forward": times(factor * us), "both": both, "both_from_python": times(300.0),
                "peak_new_bytes": int(factor * 2**20), "kept_bytes": 12,
            }  # fmt: skip
            row[f"{name} step"] = {"graph": times(factor * us), "from_python": times(60.0)}
        yield label, row
    yield "broken", {"error": "failed", "message": "RuntimeError: a | b\nc"}


def flux_kernels_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    import bench_flux_block

    calls = bench_flux_block.kernel_calls(bench_flux_block.SMALL, torch.float32, "cpu", "torch")
    for i, (name, call) in enumerate(calls.items()):
        row = {**streamed(20.0 + i, 0.95 - 0.015 * i), "copy": {**times(18.0), "gb_per_s": 3000.0}}
        yield name, {**row, "eager": times(70.0)} if call.eager else row


def flux_blocks_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("double", "single"):
        row = {}
        for name, speed in (("eager", 1.0), ("compiled", 1.2), ("fused none", 1.3), ("fused pointwise", 1.27)):
            row[name] = {"inference": times(3e3 / speed), "training": times(9e3 / speed), "kept_bytes": 2**29}
            row[name] |= {"inference_times_eager": speed, "training_times_eager": speed}
        yield kind, row


def train_step_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    import train_step_plan
    from test_benchmarks import measured_row, planned_row
    from train_step_cases import CASES

    steps: Any = argparse.Namespace(CASES=CASES)
    for i, (name, case) in enumerate(CASES.items()):
        plan = planned_row(steps, name, 20.0 + 2 * i)
        row = measured_row(steps, name, 20.5 + 2 * i, 0.2 + 0.01 * i)
        row["trained_parameters"] = 11_900_000_000
        if name == "full-1024-unfused-block":
            row = {**case.settings(False), "error": "out of memory", "message": "in update: CUDA out of memory"}
        yield name, train_step_plan.concluded(case, row, plan, 989.0)


def tuning_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    import tune

    for name, experiment in tune.EXPERIMENTS.items():
        for case in experiment.cases:
            row: dict[str, Any] = {
                choice: {**streamed(10.0 - i, 0.9), **({"from_python": times(50.0)} if experiment.from_python else {})}
                for i, choice in enumerate(experiment.choices)
            }
            row["best"] = tune.best(row, next(iter(experiment.choices)))
            yield f"{name}: {case}", row


def measured_files() -> list[dict[str, Any]]:
    """As a whole run of the suite leaves them, read back from JSON."""
    import validate

    env = {
        "device": GPU, "driver": "580.1", "threads": 16, "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3",
        "commit": "0123456789", "dirty": False, "time": "2026-12-01T10:00:00",
    }  # fmt: skip
    sections: dict[str, Any] = {
        "validation": {name: {"counted": {"passed": 200, "skipped": 3}} for name in (*validate.TESTS, *validate.TOOLS)},
        "kernels": dict(kernels_rows()),
        "flux_kernels": dict(flux_kernels_rows()),
        "flux_blocks": dict(flux_blocks_rows()),
        "train_step": dict(train_step_rows()),
        "tuning": dict(tuning_rows()),
    }
    file = {
        section: [{"environment": env, "memory_gb": 80.0, "dtype": "torch.bfloat16", "rows": rows}]
        for section, rows in sections.items()
    }
    return [json.loads(json.dumps(file))]


# --- numbers to reach -----------------------------------------------------------------------------------------------


def verdicts(files: list[dict[str, Any]]) -> dict[str, str]:
    """The table's last column by its first."""
    import goals

    rows = goals.table(goals.measured(files)).splitlines()[2:]
    return {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[-1].removesuffix(" |") for row in rows}


def test_every_number_to_reach_is_judged_from_the_results() -> None:
    found = verdicts(measured_files())
    assert len(found) == 16
    assert not [what for what, text in found.items() if "not yet measured" in text]
    assert found["kernels' tests on the GPU"] == "600 passed: reached"
    assert (
        found["compute-sanitizer on every operator"] == "memcheck: clean, racecheck: clean, synccheck: clean: reached"
    )
    assert found["loss, Flux 1024^2, batch 8, bf16: faster than textbook"].startswith("31.0x (")
    assert found["the same: faster than torch.compile of it"].endswith("**missed**")
    assert found["loss and step, 256 MB and more: of the copy bandwidth"].endswith("6 of 6 reach it: reached")
    assert found["each Flux kernel forward: of the copy bandwidth"].endswith("reach it: **missed**")
    assert found["a fused block, forward + backward: faster than eager"] == "double 1.27x, single 1.27x: reached"
    assert found["the same: against torch.compile"] == "double 1.06x, single 1.06x: reached"
    assert found["update at 1024^2, LoRA, no recomputation: MFU"] == "50.6%: reached"
    assert found["all parameters trained within 80 GB"].startswith("11.9 billion parameters trained, peak 28.5 GB")
    assert found["first log-ratio after a rollout, of the clip range"].endswith("cases: reached")


def test_a_red_test_a_race_and_a_case_that_does_not_fit_are_missed() -> None:
    files = measured_files()
    rows = {section: runs[0]["rows"] for section, runs in files[0].items()}
    rows["validation"]["tests of the loss"] = {"error": "failed", "counted": {"passed": 9, "failed": 1}}
    rows["validation"]["all other tests"] = {"error": "timed out", "message": "not done after 9 s"}
    rows["validation"]["racecheck"] = {"error": "failed", "counted": {}}
    rows["train_step"]["full-512-block"] |= {"error": "out of memory"}
    rows["train_step"]["lora-512-block"]["planner_error"]["update"] = -0.2
    found = verdicts(files)
    assert found["kernels' tests on the GPU"] == "209 passed, 1 failed, timed out: **missed**"
    assert found["compute-sanitizer on every operator"].endswith("racecheck: failed, synccheck: clean: **missed**")
    assert found["all parameters trained within 80 GB"] == "out of memory: **missed**"
    assert found["planner against the measured peaks"].startswith("-20.0% (lora-512-block, update) at worst")


def test_what_was_not_measured_is_not_judged() -> None:
    assert set(verdicts([]).values()) == {"not yet measured"}
    skipped = {"environment": {"device": GPU, "time": "2026"}, "rows": {"memcheck": {"skipped": "not installed"}}}
    assert set(verdicts([{"validation": [skipped]}]).values()) == {"not yet measured"}
    files = measured_files()
    del files[0]["validation"][0]["rows"]["all other tests"]
    assert verdicts(files)["kernels' tests on the GPU"] == "not yet measured"


# --- README, notes and pictures -------------------------------------------------------------------------------------


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README.md and docs/hopper.md as they are, in a folder of their own."""
    import plot
    import results

    for path in ("README.md", "docs/hopper.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "README", tmp_path / "README.md")
    monkeypatch.setattr(plot, "NOTES", tmp_path / "docs" / "hopper.md")
    monkeypatch.setattr(plot, "PLOTS", tmp_path / "plots")
    return tmp_path


def test_the_pages_are_made_from_a_gpu_s_results(pages: Path, monkeypatch) -> None:
    import plot
    import results
    import tune

    monkeypatch.setattr(sys, "argv", ["plot.py"])
    monkeypatch.setattr(results, "load", lambda folder: measured_files())
    plot.main()
    text, notes = (pages / "README.md").read_text(), (pages / "docs" / "hopper.md").read_text()
    assert len(list((pages / "plots").glob("*.png"))) == 3
    assert "Predicted, not measured" not in text
    assert "not yet measured" not in text.split(plot.BEGIN)[1].split(plot.END)[0]
    assert "| broken | failed: RuntimeError: a \\| b c |" in text
    assert "| 1 GB a tensor | out of memory |" in text
    assert "driver 580.1, torch 2.11.0, triton 3.6.0, 2026-12-01, commit 0123456789" in text
    assert "out of memory (planner:" in text
    assert re.search(r"fused loss, forward and backward, is 0\.\d+% .* to 0\.\d+% .* of an update", text)
    assert "Not yet measured." not in notes
    assert notes.count(f"{GPU}, driver") == len(tune.EXPERIMENTS)
    assert "**6.0 (0.60)**" in notes
    for page in (text, notes):  # every row of a table has as many cells as its heading
        for table in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table

    plot.main()  # made again from the same results, nothing changes
    assert (pages / "README.md").read_text() == text
    assert (pages / "docs" / "hopper.md").read_text() == notes


def test_the_pages_in_git_are_those_of_the_results_in_git(pages: Path, monkeypatch) -> None:
    import plot

    monkeypatch.setattr(sys, "argv", ["plot.py"])
    plot.main()
    for path in ("README.md", "docs/hopper.md"):
        shown = (pages / path).read_text().replace("](plots/", "](benchmarks/results/plots/")
        assert shown == (ROOT / path).read_text(), f"run python benchmarks/plot.py: {path} is not what the results say"


def test_the_newest_row_of_each_name_counts_and_devices_stay_apart() -> None:
    import results

    def run(device: str, time: str, **rows: float) -> dict[str, Any]:
        return {
            "environment": {"device": device, "time": time}, "memory_gb": 80.0,
            "rows": {name: {"us": us} for name, us in rows.items()},
        }  # fmt: skip

    files = [
        {"things": [run("A", "2026-01-02", b=2.0), run("B", "2026-01-03", a=9.0)]},
        {"things": [run("A", "2026-01-01", a=1.0, b=1.0)], "other": [run("A", "2026-01-05", a=7.0)]},
    ]
    found = results.newest_rows(files, "things")
    assert {name: row["us"] for name, row in found["A"].items()} == {"a": 1.0, "b": 2.0}
    assert found["A"]["b"]["environment"]["time"] == "2026-01-02"
    assert found["B"]["a"]["memory_gb"] == 80.0
    anywhere = results.newest_rows(files, "things", by_device=False)
    assert {name: row["us"] for name, row in anywhere["any"].items()} == {"a": 9.0, "b": 2.0}


def test_every_experiment_has_its_prediction() -> None:
    import tune

    notes = (ROOT / "docs" / "hopper.md").read_text()
    sections = notes.split("\n### ")[1:]
    assert [section.splitlines()[0].lower() for section in sections] == [name.lower() for name in tune.EXPERIMENTS]
    for section, name in zip(sections, tune.EXPERIMENTS, strict=True):
        assert section.index("*Prediction.*") < section.index(f"<!-- {name} -->")


def test_a_choice_must_be_clearly_faster_to_be_the_best() -> None:
    import tune

    def chosen(ours: float, theirs: float) -> str:
        return tune.best({"ours": times(ours), "theirs": times(theirs), "broken": "OutOfResources"}, "ours")

    assert chosen(10.0, 8.0) == "theirs"
    assert chosen(10.0, 9.9) == "ours"  # by less than 2%
    assert chosen(10.0, 9.0) == "ours"  # within the spread of both
    assert chosen(10.0, 12.0) == "ours"


def test_results_are_appended_and_the_readme_is_made_from_them(pages: Path, monkeypatch) -> None:
    import plot
    import results

    row = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "times_fused": 4.0, "bytes_kept_for_backward": 5}
    numbers = {
        "dtype": "torch.float32",
        "forward_backward": {"2x3": {name: row for name in ("textbook", "compiled", "fused")}},
        "log_ratio_error": {"fused": 1e-12, "textbook": 1e-7, "size of the log-ratio": 1e-6},
    }
    env = results.environment()
    path = results.save("loss", {**env, "time": "2026-01-01T00:00:00"}, {"older": True}, pages / "results")
    assert env["commit"] in path.name
    later = {**env, "time": "2026-01-01T00:00:01"}
    for _ in range(2):  # a run saved twice stays one run
        assert results.save("loss", later, numbers, pages / "results") == path
    content = json.loads(path.read_text())
    assert [run["environment"]["time"][-1] for run in content["loss"]] == ["0", "1"]
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    monkeypatch.setattr(results, "load", lambda folder: [content])
    before, after = (
        (ROOT / "README.md").read_text().split(plot.BEGIN)[0],
        (ROOT / "README.md").read_text().split(plot.END)[1],
    )
    plot.main()
    text = (pages / "README.md").read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "| 2x3 | 2.00 ms | 2.00 ms | 2.00 ms | 4.0, 4.0 | 5 B to 5 B |" in text
    assert "not yet measured" in text
    assert len(list((pages / "plots").glob("*.png"))) == 1
