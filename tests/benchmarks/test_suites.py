"""What the benchmarks measure without a clock, the processes of the training step, and the suite for a GPU."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_blocks
import bench_host
import bench_loss
import bench_train_step
import gpu_suite
import naive
import processes
import pytest
import rows
import torch
import validate
from helpers import ROOT
from operator_calls import FP32, timed_block_calls

from fastguard.blocks.linear import QuantizedLinear


def numbers(measured: rows.Measured) -> dict[str, float]:
    return {f"{who} {phase} {name}": n for who, phase, found in measured for name, n in found.items()}  # type: ignore


def test_the_log_ratio_is_exact_where_the_naive_one_is_not() -> None:
    found = numbers(bench_loss.exactness())
    assert found["fused log-ratio error"] <= 2e-11
    assert found["naive log-ratio error"] > 1e-8
    assert found["fused log-ratio largest"] < 1e-4


def test_memory_of_forward_and_backward() -> None:
    """64 bytes a sample at most are kept; the naive formula keeps the size of the latents."""
    inputs = naive.make_inputs((4, 1024, 64), FP32)
    fused = bench_loss.memory(naive.fused_guard_loss, inputs, False)
    assert 0 < fused["kept_bytes"] <= 64 * 4
    assert bench_loss.memory(naive.guard_loss, inputs, False)["kept_bytes"] >= inputs.latents.nbytes
    # The gradient, and next to nothing beside it.
    assert inputs.latents.nbytes <= fused["peak_new_bytes"] < 1.1 * inputs.latents.nbytes


def test_a_wrong_contender_is_not_timed() -> None:
    inputs = naive.make_inputs((2, 16, 64), FP32)
    with pytest.raises(AssertionError, match="wrong: loss"):
        bench_loss.assert_correct(inputs, {"wrong": lambda given: 1.001 * naive.guard_loss(given)})
    blocks = bench_blocks.Blocks("single", bench_blocks.TOY, FP32, "cpu")
    blocks.forms["wrong"] = lambda *args: [1.001 * output for output in blocks.forms["eager"](*args)]
    with pytest.raises(AssertionError, match="wrong: gradient off by 1.0e-03"):
        blocks.assert_correct("wrong")


def test_what_a_call_costs_the_host_is_measured_for_every_contender() -> None:
    (case,) = bench_host.cases(toy=True).values()
    found = {(who, phase): times["p50_us"] for who, phase, times in case()}
    on_cpu = itertools.product(("naive", "compiled", "fused"), ("forward from Python", "both from Python"))
    # Interpreted kernels have no launches of Triton's to measure.
    assert found.keys() == {*on_cpu, ("python", "forward on the host"), ("python", "both on the host")}
    assert all(time > 0 for time in found.values())


@pytest.mark.slow  # `make sass` counts the bytes of each kernel, too
def test_flux_kernels_move_hardly_more_than_they_must() -> None:
    """What a LoRA update runs moves the least possible; sums over tokens for full fine-tuning cost some per cent."""
    names = list(timed_block_calls(bench_blocks.TOY, FP32, "cpu"))
    assert len(names) == 27
    for name in names:
        ((_, _, found),) = bench_blocks.measure_bytes(name)
        with_sums = name.endswith(("modulation", "gate", "norms"))
        assert 1 - 1e-9 < found["moved_bytes"] / found["least_bytes"] < (1.06 if with_sums else 1.001), name


@pytest.mark.parametrize(
    ("kind", "hidden", "results"),
    [
        ("double", 4, 6),
        ("single", 4, 4),
        ("flux2 double", 6, 5),
        ("flux2 single", 6, 3),
        ("sd3.5", 4, 6),
        ("sd3.5 dual", 4, 6.8),
        ("qwen_image", 4, 6),
    ],
)
def test_what_a_block_keeps_is_counted(kind: str, hidden: int, results: float) -> None:
    blocks = bench_blocks.Blocks(kind, bench_blocks.TOY, FP32, "cpu")
    forms = ("fused none", "fused pointwise", "fused mlp")
    blocks.assert_correct(*forms)
    kept = {form: blocks.kept_bytes(form) for form in ("eager", *forms)}
    unit = 80 * 64 * 4
    assert kept["fused pointwise"] - kept["fused mlp"] == hidden * unit  # a feed-forward layer before its activation
    # What LayerNorms and the activation give, less attention's output, which lies beside the activation.
    assert kept["fused none"] - kept["fused pointwise"] >= results * unit - 2 * 80 * 4 * 4
    assert kept["eager"] > kept["fused none"]


def test_a_plan_adds_up_and_cases_are_what_their_names_say() -> None:
    found = numbers(bench_train_step.planned("lora-1024-unfused-none", toy=True))
    parts = ("weights", "gradients", "optimizer", "activations", "trajectories")
    assert sum(found[f"planner update {part}_bytes"] for part in parts) == found["planner update peak_bytes"]
    assert found["planner both fits"] == 1
    assert found["planner update executed_per_needed"] == 1
    assert len(bench_train_step.CASES) == 95
    recipe = bench_train_step.recipe_of("full-512-unfused-block-compiled", toy=False)
    model, update = recipe.model, recipe.update
    assert (model.train, model.height, model.fuse, model.recompute) == ("full", 512, False, "block")
    assert model.compile == "blocks"
    assert (update.micro_batch, update.optimizer) == (2, "adamw8bit")
    small = bench_train_step.recipe_of("lora-512-nf4-x1-mlp", toy=False)
    assert (small.model.quantize, small.model.recompute, small.micro_batch) == ("nf4", "mlp", 1)


@pytest.mark.parametrize("how", ["int8", "float8", "nf4"])
def test_a_case_with_quantized_weights_updates_with_ratios_of_1(how: str) -> None:
    state = bench_train_step.build(f"lora-512-{how}-x3-pointwise", toy=True)
    layers = [layer for layer in state.policy.modules() if isinstance(layer, QuantizedLinear)]
    assert layers
    for layer in layers:  # as large as those of a dense layer: gradients would overflow on the way through 57 blocks
        weight = layer.quantized.dequantize(FP32, "torch")
        assert abs(weight.mean()) < 0.1 * 0.02
        torch.testing.assert_close(weight.std(), torch.tensor(0.02))
    state.backbone.load_prompts([0])
    assert bench_train_step.update(state, bench_train_step.sample(state))["worst_log_ratio"] == 0


@pytest.mark.slow
def test_a_compiled_case_updates_with_ratios_of_1() -> None:
    """The rollout batch is the micro-batch, so that the log-ratios are exactly 0 before any weight has changed."""
    state = bench_train_step.build("lora-512-pointwise-compiled", toy=True)
    assert state.backbone.policy.transformer.transformer_blocks[0]._compiled_call_impl is not None
    state.backbone.load_prompts([0])
    assert bench_train_step.update(state, bench_train_step.sample(state))["worst_log_ratio"] == 0


# Stands in for a program that measures, and does what its case's name says.
PROGRAM = """
import os, subprocess, sys, time
from argparse import Namespace
import torch
from processes import CHILD, serve

def measure(case, toy):
    print("noise")
    os.write(1, b"[W1128 noise of a library\\n")
    yield case, "rollout", {"toy": float(toy)}
    os.write(1, b"50%")
    if case == "broken":
        raise RuntimeError("CUDA error: an illegal memory access\\nFor debugging, do this.")
    if case == "orphan":
        subprocess.Popen(["sleep", "60"])
    if case in ("orphan", "silent"):
        os._exit(3)
    if case == "early":
        os._exit(0)
    if case == "hanging":
        time.sleep(60)
    if case == "large":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\\nmore")

assert sys.argv[1:] == [CHILD, "--toy"]
serve(measure)
"""


def test_cases_wait_for_their_turn_and_may_break_hang_or_not_fit(tmp_path: Path) -> None:
    """The next process starts while one measures, and does nothing before it is told which case is its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    args = argparse.Namespace(toy=True, only=["*"], end=math.inf)
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    chain = processes.Processes(str(tmp_path / "program.py"), args, environ)
    for name in ("lora-512-block", "full-512-block"):
        assert list(chain.measure(name)) == [[name, "rollout", {"toy": 1}]]
    before, lost = chain.measure("large")
    assert before == ["large", "rollout", {"toy": 1}]
    assert lost == ["", "", {"out of memory": "after rollout: CUDA out of memory. Tried to allocate 9 GiB."}]
    for case, why in {
        "broken": "exit status 1: RuntimeError: CUDA error: an illegal memory access",
        "silent": "exit status 3: 50%",
        "early": "it ended before it was done: 50%",
    }.items():
        before, lost = chain.measure(case)
        assert before == [case, "rollout", {"toy": 1}]
        assert lost[2]["failed"].startswith(why)
    assert chain._waiting is not None
    for case in ("hanging", "orphan"):  # whose own child holds the pipe
        args.end = time.monotonic() + 0.5
        *_, (*_, late) = chain.measure(case)
        assert late == {"failed": "not done after 1 s"}
    chain._waiting.communicate("")  # as when its parent has ended


@pytest.mark.slow
def test_the_gpu_suite_runs_at_toy_sizes(tmp_path: Path) -> None:
    stages = [name for name in gpu_suite.STAGES if name != "plan"]
    command = [sys.executable, "benchmarks/gpu_suite.py", "--toy", "--out", str(tmp_path), "--only", *stages]
    toy = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert toy.returncode == 0, toy.stderr
    assert re.findall(r"^== (\w+): ", toy.stdout, re.MULTILINE) == stages
    assert re.search(r"kernel +pytest +passed tests \d+", toy.stdout)
    for phase in ("guard_loss", "transition_bwd", "sde_step", "qk_norm_rope_bwd one stream", "double block"):
        assert phase in toy.stdout
    assert re.search(r"trainer +update +p20 ", toy.stdout)  # in a process of its own
    assert toy.stdout.count("\ntuning: ") == 7
    assert not list(tmp_path.iterdir())


def test_nothing_is_timed_while_a_test_is_red_nor_without_a_gpu(monkeypatch) -> None:
    begun: list[str] = []

    def run_stage(name: str, *_: Any) -> bool:
        begun.append(name)
        return name != failing

    monkeypatch.setattr(gpu_suite, "run_stage", run_stage)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main()
    assert not begun
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--toy"])
    failing = "tests"
    assert "the tests failed or were not finished; nothing is timed" in str(gpu_suite.main())
    assert begun == ["tests"]
    begun.clear()
    failing = "blocks"
    assert gpu_suite.main() == "gpu_suite: not finished: blocks"
    assert begun == list(gpu_suite.STAGES)  # the others are measured all the same
    begun.clear()
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--toy", "--minutes", "1e-6", "--only", "blocks", "loss"])
    assert gpu_suite.main() == "gpu_suite: not finished: loss, blocks"
    assert not begun


def test_what_pytest_counted_is_told() -> None:
    script = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"

    def outcome(text: str, status: int) -> rows.Numbers:
        return validate.outcome([sys.executable, "-c", script, text, str(status)], {}, math.inf)

    assert outcome("3 passed, 2 skipped in 1s", 0) == {"passed tests": 3, "skipped tests": 2}
    assert outcome("1 failed, 2 passed in 1s", 1)["failed"] == "exit status 1"
    assert "failed" in outcome("5 skipped in 1s", 0)  # nothing ran
    late = validate.outcome([sys.executable, "-c", "import time; time.sleep(60)"], {}, time.monotonic() + 0.5)
    assert late["failed"] == "not done after 1 s"


def test_the_sanitizer_watches_every_operator(tmp_path: Path, monkeypatch) -> None:
    """With a stand-in for the tool: what it is called with, and what it reports."""
    tool, args = tmp_path / "compute-sanitizer", argparse.Namespace(toy=False, end=math.inf)
    reports = 'echo "========= Invalid read"\necho "1 passed"\nexit 9'
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n{reports}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = numbers(validate.run_sanitizer("memcheck", args))
    assert found["kernel compute-sanitizer failed"] == "exit status 9. Invalid read"
    called = (tmp_path / "called").read_text().split()
    assert called[:4] == ["--tool", "memcheck", "--error-exitcode", "9"]
    assert called[-2:] == [sys.executable, "benchmarks/operator_calls.py"]
    monkeypatch.setenv("PATH", "")
    skipped = {"kernel compute-sanitizer skipped": "compute-sanitizer is not installed"}
    assert numbers(validate.run_sanitizer("memcheck", args)) == skipped
