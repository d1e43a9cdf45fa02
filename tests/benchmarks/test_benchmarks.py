"""The benchmarks' own code: their figures that need no clock, their files, and the README that they write."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_transition

    return bench_transition


def test_the_log_ratio_is_exact_where_the_textbook_s_is_not(bench: ModuleType) -> None:
    errors = bench.exactness()
    assert errors["fused"] <= 2e-11
    assert errors["textbook"] > 1e-8
    assert errors["size of the log-ratio"] < 1e-4


def test_memory_of_forward_and_backward(bench: ModuleType) -> None:
    """64 bytes a sample at most are kept; the textbook keeps the size of the latents."""
    inputs = bench.textbook.make_inputs((4, 1024, 64), bench.torch.float32)
    latents_bytes = inputs.latents.nbytes
    kept = {name: bench.textbook.kept_bytes(bench.LOSSES[name], inputs) for name in ("fused", "textbook")}
    assert 0 < kept["fused"] <= 64 * 4
    assert kept["textbook"] >= latents_bytes
    peak = bench.peak_bytes(lambda: bench.both(bench.LOSSES["fused"], inputs), False)
    assert latents_bytes <= peak < 1.1 * latents_bytes  # the gradient, and next to nothing else


# --- the Flux blocks ------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_flux_block

    return bench_flux_block


def test_flux_kernels_move_hardly_more_than_they_must(blocks: ModuleType) -> None:
    """What a LoRA update runs moves the least possible; sums over tokens for full fine-tuning cost some per cent."""
    ratios = {name: row["moved"] / row["least"] for name, row in blocks.moved_bytes().items()}
    assert len(ratios) == 18
    for name, ratio in ratios.items():
        with_sums = "gradient" in name
        assert 1 - 1e-9 < ratio < (1.06 if with_sums else 1.001), name


def test_what_a_block_keeps_is_counted(blocks: ModuleType) -> None:
    kept = {}
    block, forms = blocks.contenders("double", blocks.SMALL, blocks.torch.float32, "cpu")
    inputs = blocks.block_inputs(blocks.SMALL, blocks.torch.float32, "cpu")
    for name in ("eager", "fused none", "fused pointwise", "fused mlp"):
        kept[name] = blocks.kept_bytes(partial(forms[name], *inputs.args), [*block.parameters(), *inputs.args[3]])
    unit = 80 * 64 * 4
    assert kept["fused pointwise"] - kept["fused mlp"] == 4 * unit  # the feed-forward layer before its activation
    assert kept["fused none"] - kept["fused pointwise"] >= 5 * unit  # LayerNorms' and GELU's results
    assert kept["eager"] > kept["fused none"]


# --- the training step of the whole model ---------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_train_step

    return bench_train_step


@pytest.fixture
def plans(steps: ModuleType) -> ModuleType:
    import train_step_plan

    return train_step_plan


def planned_row(steps: ModuleType, name: str, gib: float = 26.0) -> dict[str, Any]:
    """As `planned` gives it, with round numbers."""
    case = steps.CASES[name]
    return {
        **case.settings(dry=False),
        "peak_bytes": {"rollout": 24 * GIB, "update": int(gib * GIB)},
        "update_bytes": dict.fromkeys(("weights", "gradients", "optimizer", "activations", "trajectories"), GIB),
        "fits": gib < 74,
        "kept_bytes": 2 * GIB,
        "needed_tflop_per_transition": 100.0,
        "needed_tflop_per_rollout_step": 60.0,
        "executed_per_needed_flop": 1.45,
        "peak_goal_gib": case.peak_goal_gib,
        "mfu_goal": case.mfu_goal,
    }


def measured_row(steps: ModuleType, name: str, gib: float, s_per_transition: float = 0.2) -> dict[str, Any]:
    """As `measure` gives it for a case that ran."""
    settings = steps.CASES[name].settings(dry=False)
    whole = s_per_transition * settings["transitions_per_update"]
    times = {"p20_s": whole, "p50_s": whole, "p80_s": whole, "reserved_bytes": int(gib * GIB)}
    micro_us = {"graph": {"p50_us": 20.0}, "called_from_python": {"p50_us": 200.0}}
    return {
        **settings,
        "rollout": {**times, "s_per_image": 1.0, "s_per_step": 0.1, "peak_bytes": 24 * GIB},
        "update": {
            **times,
            "s_per_transition": s_per_transition,
            "first_s": 9.0,
            "peak_bytes": int(gib * GIB),
            "worst_log_ratio": 1e-7,
        },
        "kept_bytes": 2 * GIB,
        "loss": {"shape": (settings["micro_batch"], 1024, 64), **micro_us},
        "matmul_tflop_per_s": 800.0,
    }


def test_utilisation_the_share_of_the_loss_and_the_goals_follow_from_a_measurement(steps, plans) -> None:
    case = steps.CASES["lora-1024-none"]
    row = plans.concluded(case, measured_row(steps, case.name, 48.0), planned_row(steps, case.name, 45.0), 989.0)
    assert row["update"]["tflop_per_s"] == pytest.approx(500.0)
    assert row["update"]["mfu"] == pytest.approx(500 / 989)
    assert row["rollout"]["mfu"] == pytest.approx(600 / 989)
    assert row["loss"]["share"] == pytest.approx(10 * 20e-6 / 2.0)  # ten micro-batches of one in an update of 2 s
    assert row["planner_error"] == {"rollout": 0.0, "update": pytest.approx(-0.0625)}
    assert [goal["reached"] for goal in row["goals"]] == [True, True, False]  # MFU 50.6%; the planner is 6% off
    text = plans.describe(case.name, row)
    assert "goal MFU >= 45%: 50.6%: reached" in text
    assert "goal planner within 5%: rollout +0.0%, update -6.2%: MISSED" in text

    unknown = plans.concluded(case, measured_row(steps, case.name, 45.0), planned_row(steps, case.name, 45.0), None)
    assert unknown["update"]["mfu"] is None
    assert [goal["reached"] for goal in unknown["goals"]] == [None, True, True]

    row = measured_row(steps, case.name, 45.0)
    row["update"]["worst_log_ratio"] = 1e-5
    row = plans.concluded(case, row, planned_row(steps, case.name, 45.0), 989.0)
    assert [goal["what"] for goal in row["goals"] if goal["reached"] is False] == ["first log-ratio <= 5e-07"]
    compiled = plans.concluded(
        steps.CASES["lora-1024-none-compiled"],
        measured_row(steps, case.name, 30.0),
        planned_row(steps, case.name),
        989.0,
    )
    assert not compiled["goals"]  # the planner knows nothing of what a compiler keeps


def test_a_peak_over_the_goal_is_missed(steps, plans) -> None:
    case = steps.CASES["lora-512-block"]
    for gib, reached in ((29.9, True), (30.1, False)):
        row = plans.concluded(case, measured_row(steps, case.name, gib), planned_row(steps, case.name), 989.0)
        assert row["goals"][0]["reached"] is reached


def test_a_case_out_of_memory_keeps_what_came_before_it(steps, plans, monkeypatch) -> None:
    def out_of_memory(case: Any, dry: bool, row: dict[str, Any]) -> None:
        row["rollout"], row["phase"] = {"s_per_step": 0.1}, "update"
        raise steps.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(steps, "measure_training", out_of_memory)
    case = steps.CASES["full-512-block"]
    row = plans.concluded(case, steps.measure(case, dry=True), planned_row(steps, case.name), 989.0)
    assert row["error"] == "out of memory"
    assert row["message"] == "in update: CUDA out of memory. Tried to allocate 9 GiB."
    assert row["goals"] == [{"what": "peak <= 78 GiB", "measured": "out of memory", "reached": False}]
    text = plans.describe(case.name, row)
    assert "0.100 s a step" in text
    assert "(planner: fits in 80 GB)" in text


def test_a_case_that_breaks_or_hangs_is_a_row_too(steps, plans, tmp_path: Path, monkeypatch) -> None:
    case = steps.CASES["lora-512-block"]
    script = tmp_path / "script.py"
    monkeypatch.setattr(steps, "__file__", str(script))
    script.write_text("import sys; sys.stdin.readline(); sys.exit('the driver is gone')")
    with steps.Child(case, dry=True) as child:
        broken = child.measure()
    assert broken["error"] == "failed"
    assert broken["message"] == "exit status 1: the driver is gone"
    row = plans.concluded(case, broken, planned_row(steps, case.name), 989.0)
    assert [goal["reached"] for goal in row["goals"]] == [None]
    assert "failed: exit status 1" in plans.describe(case.name, row)
    script.write_text("import time; time.sleep(60)")
    with steps.Child(case, dry=True) as child:
        assert child.measure(limit_s=0.5)["error"] == "timed out"


def test_a_case_whose_turn_never_comes_does_nothing(steps, tmp_path: Path) -> None:
    """Its parent has died."""
    to = tmp_path / "row.json"
    command = [sys.executable, steps.__file__, "--child", "full-512-block", "--dry-run", "--to", str(to)]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    assert not to.exists()


def test_cases_wait_for_their_turn(steps, tmp_path: Path, monkeypatch) -> None:
    """The next process starts up while one measures, and does nothing before it is told; all end in the end."""
    script, started = tmp_path / "script.py", tmp_path / "started"
    started.mkdir()
    script.write_text(
        "import json, pathlib, sys\n"
        f"name, folder = sys.argv[2], pathlib.Path({str(started)!r})\n"
        "(folder / name).touch()\n"
        "sys.stdin.readline()\n"
        "seen = sorted(path.name for path in folder.iterdir())\n"
        "pathlib.Path(sys.argv[4]).write_text(json.dumps({'name': name, 'seen': seen}))\n"
    )
    monkeypatch.setattr(steps, "__file__", str(script))
    names = ["lora-512-block", "lora-512-mlp", "full-512-block"]
    with steps.Children([steps.CASES[name] for name in names], dry=True) as children:
        assert children.measure(steps.CASES[names[0]])["name"] == names[0]
        assert children.measure(steps.CASES[names[2]])["name"] == names[2]  # another than the one that waits
        assert children.measure(steps.CASES[names[1]])["name"] == names[1]
        waiting = children._next
    assert waiting is not None
    assert waiting._process.poll() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a CUDA device"),
        (["--dry-run", "--save"], "--dry-run saves nothing"),
        (["--plan", "--cases", "lora-768-*"], "matches none of 'lora-1024-none', 'lora-1024-unfused-none'"),
        (["--plan", "--dry-run", "--save"], "--dry-run saves nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(steps: ModuleType, monkeypatch, capsys, options, message) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", *options])
    monkeypatch.setattr(steps.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        steps.arguments()
    assert message in capsys.readouterr().err


def test_the_plan_is_saved_as_predictions(steps: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    rows = {name: planned_row(steps, name) for name in steps.CASES}
    monkeypatch.setattr(steps, "planned", lambda case, dry: rows[case.name])
    monkeypatch.setattr(steps, "planning_pool", lambda dry: ThreadPoolExecutor(1))
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", "--plan", "--save", "--out", str(tmp_path)])
    steps.main()
    assert "peak <= 30 GiB: predicted to be reached" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/*.json")
    (run,) = json.loads(path.read_text())["plan_train_step"]
    assert run["rows"].keys() == steps.CASES.keys()


def test_a_tiny_plan_has_every_field_that_is_shown(steps, plans) -> None:
    names = ["lora-512-block", "lora-1024-unfused-none"]
    rows = {name: plans.planned(steps.CASES[name], dry=True) for name in names}
    for name in names:
        assert rows[name].keys() == planned_row(steps, name).keys()
        assert sum(rows[name]["update_bytes"].values()) == rows[name]["peak_bytes"]["update"]
    assert plans.plan_table(rows)
