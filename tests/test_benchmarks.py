"""The benchmarks' own code: their figures that need no clock, their files, and the README that they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


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


def test_the_gpu_suite_walks_its_path_and_refuses_without_a_gpu() -> None:
    suite = [sys.executable, "benchmarks/gpu_suite.py"]
    dry = subprocess.run([*suite, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    for row in ("copy", "loss forward", "loss backward", "sde_step", "fused forward + backward", "textbook forward"):
        assert row in dry.stdout
    assert dry.stdout.count("fused pointwise, compiled") == 2  # of both kinds of block
    for case in ("lora-512-mlp", "lora-1024-unfused-none", "full-512-block"):  # each in a process of its own
        assert f"\n{case}, micro-batch" in dry.stdout
    assert dry.stdout.count("a transition") >= 3
    assert dry.stdout.count("of a plain matmul's") == 3
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(suite, cwd=ROOT, capture_output=True, text=True, check=False, env=hidden)
    assert refused.returncode == 1
    assert "needs a CUDA device" in refused.stderr


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
        kept[name] = blocks.kept_bytes(forms[name], inputs, [*block.parameters(), *inputs.args[3]])
    unit = 80 * 64 * 4
    assert kept["fused pointwise"] - kept["fused mlp"] == 4 * unit  # the feed-forward layer before its activation
    assert kept["fused none"] - kept["fused pointwise"] >= 5 * unit  # LayerNorms' and GELU's results
    assert kept["eager"] > kept["fused none"]


def test_the_readme_shows_flux_blocks_measured_or_not(blocks: ModuleType) -> None:
    import plot

    env = {"device": "GPU", "driver": "1", "torch": "2", "triton": "3", "time": "2026-01-02T00", "commit": "abc"}
    times = {"p20_us": 9.0, "p50_us": 10.0, "p80_us": 12.0}
    kernels = {
        "copy": {**times, "gb_per_s": 4000.0},
        "adaln forward": {**times, "gb_per_s": 3600.0, "of_copy": 0.9, "eager": times},
    }
    form = {"inference": times, "training": times, "inference_times_eager": 1.0, "training_times_eager": 1.5}
    section = {
        "environment": env,
        "kernels": kernels,
        "blocks": {"double": {"fused mlp": {**form, "kept_bytes": 2**21}}},
    }
    counted = {"environment": env, "kernels": {"adaln forward": {"moved": 2_000_000, "least": 1_000_000}}}
    unmeasured, of_bytes = plot.flux_parts([{"flux_bytes": [counted]}])
    assert "not yet measured" in unmeasured
    assert "| adaln forward | 2.0 MB | 1.0 MB | 2.000 |" in of_bytes
    (measured,) = plot.flux_parts([{"flux_blocks": [section]}])
    assert "| adaln forward | 10.0 (9.0 to 12.0) | 90% | 10.0 |" in measured
    assert "| double, fused mlp | 0.01 | 1.00 | 0.01 | 1.50 | 2 |" in measured


# --- the training step of the whole model ---------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_train_step

    return bench_train_step


def planned_row(steps: ModuleType, name: str, gib: float = 26.0) -> dict[str, Any]:
    """As `planned` gives it, with round numbers."""
    case = steps.CASES[name]
    return {
        **case.settings(dry=False),
        "peak_bytes": {"rollout": 24 * GIB, "update": int(gib * GIB)},
        "update_bytes": dict.fromkeys(("weights", "gradients", "optimizer", "activations", "trajectories"), GIB),
        "fits": gib < 74,
        "needed_tflop_per_transition": 100.0,
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
        "rollout": {**times, "s_per_image": 1.0, "peak_bytes": 24 * GIB},
        "update": {**times, "s_per_transition": s_per_transition, "first_s": 9.0, "peak_bytes": int(gib * GIB)},
        "loss": {"shape": (settings["micro_batch"], 1024, 64), **micro_us},
        "matmul_tflop_per_s": 800.0,
    }


def test_utilisation_the_share_of_the_loss_and_the_goals_follow_from_a_measurement(steps: ModuleType) -> None:
    case = steps.CASES["lora-1024-none"]
    row = steps.concluded(case, measured_row(steps, case.name, 48.0), planned_row(steps, case.name, 45.0), 989.0)
    assert row["update"]["tflop_per_s"] == pytest.approx(500.0)
    assert row["update"]["mfu"] == pytest.approx(500 / 989)
    assert row["loss"]["share"] == pytest.approx(10 * 20e-6 / 2.0)  # ten micro-batches of one in an update of 2 s
    assert row["planner_error"] == {"rollout": 0.0, "update": pytest.approx(-0.0625)}
    assert [goal["reached"] for goal in row["goals"]] == [True, False]  # MFU 50.6%; the planner is 6% off
    text = steps.describe(case.name, row)
    assert "goal MFU >= 45%: 50.6%: reached" in text
    assert "goal planner within 5%: rollout +0.0%, update -6.2%: MISSED" in text

    unknown = steps.concluded(case, measured_row(steps, case.name, 45.0), planned_row(steps, case.name, 45.0), None)
    assert unknown["update"]["mfu"] is None
    assert [goal["reached"] for goal in unknown["goals"]] == [None, True]


def test_a_peak_over_the_goal_is_missed(steps: ModuleType) -> None:
    case = steps.CASES["lora-512-block"]
    for gib, reached in ((29.9, True), (30.1, False)):
        row = steps.concluded(case, measured_row(steps, case.name, gib), planned_row(steps, case.name), 989.0)
        assert row["goals"][0]["reached"] is reached


def test_a_case_out_of_memory_keeps_what_came_before_it(steps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(case: Any, dry: bool, row: dict[str, Any]) -> None:
        row["rollout"], row["phase"] = {"s_per_image": 1.0}, "update"
        raise steps.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(steps, "measure_training", out_of_memory)
    case = steps.CASES["full-512-block"]
    row = steps.concluded(case, steps.measure(case, dry=True), planned_row(steps, case.name), 989.0)
    assert row["error"] == "out of memory"
    assert row["message"] == "in update: CUDA out of memory. Tried to allocate 9 GiB."
    assert row["goals"] == [{"what": "peak <= 78 GiB", "measured": "out of memory", "reached": False}]
    text = steps.describe(case.name, row)
    assert "1.000 s an image" in text
    assert "(planner: fits in 80 GB)" in text


def test_a_case_that_breaks_or_hangs_is_a_row_too(steps: ModuleType, tmp_path: Path, monkeypatch) -> None:
    case = steps.CASES["lora-512-block"]
    script = tmp_path / "script.py"
    monkeypatch.setattr(steps, "__file__", str(script))
    script.write_text("import sys; sys.exit('the driver is gone')")
    broken = steps.run_case(case, dry=True)
    assert broken["error"] == "failed"
    assert broken["message"] == "exit status 1: the driver is gone"
    row = steps.concluded(case, broken, planned_row(steps, case.name), 989.0)
    assert [goal["reached"] for goal in row["goals"]] == [None]
    assert "failed: exit status 1" in steps.describe(case.name, row)
    script.write_text("import time; time.sleep(60)")
    assert steps.run_case(case, dry=True, limit_s=0.5)["error"] == "timed out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a CUDA device"),
        (["--dry-run", "--save"], "--dry-run saves nothing"),
        (["--plan", "--cases", "lora-768-*"], "matches none of lora-512-unfused-none"),
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
    monkeypatch.setattr(steps, "planned_at_once", lambda cases, dry: {case.name: rows[case.name] for case in cases})
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", "--plan", "--save", "--out", str(tmp_path)])
    steps.main()
    assert "peak <= 30 GiB: predicted to be reached" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/*.json")
    (run,) = json.loads(path.read_text())["plan_train_step"]
    assert run["cases"].keys() == steps.CASES.keys()


def test_a_tiny_plan_has_every_field_that_is_shown(steps: ModuleType) -> None:
    names = ["lora-512-block", "lora-1024-unfused-none"]
    rows = steps.planned_at_once([steps.CASES[name] for name in names], dry=True)
    for name in names:
        assert rows[name].keys() == planned_row(steps, name).keys()
        assert sum(rows[name]["update_bytes"].values()) == rows[name]["peak_bytes"]["update"]
    assert steps.plan_table(rows)


def test_the_readme_tells_measured_from_predicted(steps: ModuleType, tmp_path: Path, monkeypatch) -> None:
    import plot
    import results

    monkeypatch.setattr(plot, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    env = {**results.environment(), "commit": "abc", "time": "2026-01-01T00:00:00"}
    names = ["lora-512-block", "full-1024-unfused-block"]
    plans = {name: planned_row(steps, name, gib) for name, gib in zip(names, (26.0, 95.0), strict=True)}
    files: list[dict[str, Any]] = [
        {"plan_train_step": [{"environment": env, "memory_gb": 80.0, "cases": plans}]},
    ]
    unmeasured = plot.train_step_parts(files)
    assert "not yet measured" in unmeasured[0]
    assert unmeasured[1].startswith("Predicted, not measured")
    lora = "lora, 512^2, fused, recompute block, micro-batch 3"
    assert f"| {lora} | 24.0 | 26.0 | fits | 1.45 | <= 30 GiB |" in unmeasured[1]
    full = "full, 1024^2, unfused, recompute block, micro-batch 1"
    assert f"| {full} | 24.0 | 95.0 | too large | 1.45 |  |" in unmeasured[1]
    assert len(plot.train_step_parts([])) == 1

    # Measured case by case: the newest row of each counts, and a device has one table.
    memory_error = {**steps.CASES[names[1]].settings(dry=False), "error": "out of memory", "message": "in update: ..."}
    for second, (name, row) in enumerate(
        [
            (names[0], measured_row(steps, names[0], 31.0)),
            (names[1], memory_error),
            (names[0], measured_row(steps, names[0], 27.0)),
        ]
    ):
        rows = {name: steps.concluded(steps.CASES[name], row, plans[name], 989.0)}
        run_env = {**env, "device": "NVIDIA H200", "driver": "1", "time": f"2026-01-01T00:00:0{second}"}
        files.append({"train_step": [{"environment": run_env, "memory_gb": 80.0, "cases": rows}]})
    (part,) = plot.train_step_parts(json.loads(json.dumps(files)))
    assert "**NVIDIA H200**" in part
    assert "not yet measured" not in part
    assert "Predicted" not in part
    assert "0.200 (0.200 to 0.200), 27.0 (26.0)" in part
    assert "peak <= 30 GiB: 27.0 GiB, reached" in part
    assert "31.0" not in part
    assert "out of memory (planner: 95.0, does not fit)" in part
    assert len(list((tmp_path / "plots").glob("*.png"))) == 1


def test_results_are_appended_and_the_readme_is_made_from_them(bench, tmp_path, monkeypatch) -> None:
    import plot
    import results

    row = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "times_fused": 4.0, "bytes_kept_for_backward": 5}
    numbers = {
        "dtype": "torch.float32",
        "forward_backward": {"2x3": {name: row for name in ("textbook", "compiled", "fused")}},
        "log_ratio_error": {"fused": 1e-12, "textbook": 1e-7, "size of the log-ratio": 1e-6},
    }
    env = results.environment()
    path = results.save("loss", {**env, "time": "2026-01-01T00:00:00"}, {"older": True}, tmp_path / "results")
    assert env["commit"] in path.name
    later = {**env, "time": "2026-01-01T00:00:01"}
    for _ in range(2):  # a run saved twice stays one run
        assert results.save("loss", later, numbers, tmp_path / "results") == path
    content = json.loads(path.read_text())
    assert [run["environment"]["time"][-1] for run in content["loss"]] == ["0", "1"]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    monkeypatch.setattr(plot, "README", readme)
    monkeypatch.setattr(plot, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "load", lambda: [content])
    plot.main()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 2x3 | 2.00 ms | 2.00 ms | 2.00 ms | 4.0, 4.0 | 5 B to 5 B |" in text
    assert "not yet measured" in text
    assert len(list((tmp_path / "plots").glob("*.png"))) == 1
