"""From rows to tables, pictures and numbers to reach, on made-up results of a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_train_step
import pytest
import rows
import tables
import tune
import validate
from bench_blocks import TOY
from bench_loss import BF16, GPU_SHAPES, label
from helpers import ROOT
from operator_calls import FP32, timed_block_calls

ENV = rows.environment() | {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1"}
GIB = 2**30
Suites = dict[str, dict[str, list[tuple[str, str, dict[str, Any]]]]]
# What the results made up below reach. 500 of 989 TFLOP/s are 51%.
VERDICTS = {
    "kernels' tests on the GPU: red parts": "0 (tests of operators; 3 of 3 reach it): reached",
    "compute-sanitizer: tools that found something": "0 (memcheck; 3 of 3 reach it): reached",
    "loss, Flux 1024^2, batch 8, bf16: faster than naive": "31.0x: reached",
    "the same: faster than torch.compile of it": "2.5x: **missed**",
    "loss and step, 256 MB and more: of the copy bandwidth": "95% (8x16777216 bf16; 6 of 6 reach it): reached",
    "each block kernel forward: of the copy bandwidth": "56% (dequantize_blocks; 5 of 14 reach it): **missed**",
    "each block kernel backward: of the copy bandwidth": "60% (swiglu_bwd_ output; 9 of 13 reach it): **missed**",
    "a fused block, forward + backward: faster than eager": "1.27x (double block; 2 of 2 reach it): reached",
    "the same: against torch.compile": "1.06x (double block; 2 of 2 reach it): reached",
    "update at 1024^2, LoRA, no recomputation: MFU": "51%: reached",
    "the same, two images at a time: MFU": "48%: reached",
    "planner against the measured peaks: error": "4.3% (lora-512-nf4-x3-block; 82 of 82 reach it): reached",
    "all parameters trained in 80 GB": "28.5 GiB: reached",
    "LoRA, 512^2, nf4, recompute block: peak": "11.5 GiB: reached",
    "LoRA, 512^2, recompute block: peak": "32.5 GiB: **missed**",
    "LoRA, 1024^2, recompute block: peak": "34.5 GiB: **missed**",
    "all weights, 512^2, recompute block: peak": "28.5 GiB: reached",
    "first log-ratio after a rollout, of the clip range": "10.00% (lora-1024-none; 82 of 82 reach it): reached",
}


def us(p50: float) -> dict[str, float]:
    return {"p20_us": 0.95 * p50, "p50_us": p50, "p80_us": 1.1 * p50}


def loss(i: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "copy", "copy", {**us(3.0), "bandwidth_gb_per_s": 3000}
    for name in ("guard_loss", "transition_bwd", "sde_step"):
        yield "kernel", name, {**us(4.0 + i), "of_copy": min(0.95, 0.3 + 0.05 * i)}
    for times, name in ((31, "naive"), (2.5, "compiled"), (1, "fused")):
        full = name == "naive" and i == len(GPU_SHAPES) - 1
        yield name, "both", {"out of memory": "a | b\nc"} if full else us(10.0 * times)


def planned_peak(name: str, i: int) -> float:
    return 11.0 if name == "lora-512-nf4-x3-block" else 20.0 + 2 * i


def step(name: str, i: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if name == "full-1024-unfused-block":
        yield "trainer", "", {"out of memory": "after rollout: CUDA out of memory"}
        return
    peak = planned_peak(name, i) + 0.5
    times = {"p50_per_transition_s": 0.2 + 0.01 * i, "per_image_s": 1.0 + 0.05 * i}
    yield "trainer", "update", {**times, "peak_bytes": peak * GIB}
    yield "trainer", "update", {"worst_log_ratio_of_clip_range": 0.1}
    yield "trainer", "loss", {**us(20), "of_update": 0.001}


def results() -> Suites:
    """As a whole run of the suite leaves them."""
    kernels = timed_block_calls(TOY, FP32, "cpu")
    forms = (("eager", 1.27), ("compiled", 1.06), ("fused pointwise", 1.0))
    cases = bench_train_step.CASES
    return {
        "validation": {
            **{name: [("kernel", "pytest", {"passed tests": 200})] for name in validate.TESTS},
            **{name: [("kernel", "compute-sanitizer", {"passed tests": 50})] for name in validate.TOOLS},
        },
        "loss": {label(shape, BF16): list(loss(i)) for i, shape in enumerate(GPU_SHAPES)},
        "blocks": {
            **{name: [("kernel", "launch", {**us(20.0), "of_copy": 0.95 - 0.015 * i})]
               for i, name in enumerate(kernels)},
            **{f"{kind} block": [(form, "training", us(9e3 * t)) for form, t in forms]
               for kind in ("double", "single")},
        },
        "train_step": {name: list(step(name, i)) for i, name in enumerate(cases)},
        "plan": {name: [("planner", "update", {"peak_bytes": planned_peak(name, i) * GIB, "needed_tflop": 100})]
                 for i, name in enumerate(cases)},
        "tuning": {f"{name}: {case}": [(choice, "launch", us(10.0 - i)) for i, choice in enumerate(experiment.choices)]
                   for name, experiment in tune.EXPERIMENTS.items() for case in experiment.cases},
    }  # fmt: skip


def load(suites: Suites, folder: Path) -> Any:
    with (folder / "gpu.jsonl").open("w") as file:
        for suite, cases in suites.items():
            for case, measured in cases.items():
                file.writelines(json.dumps(row) + "\n" for row in rows.flat(suite, case, measured, ENV))
    return tables.load(folder)


def verdicts(found: Any) -> dict[str, str | None]:
    return {goal.what: tables.verdict(goal, found) for goal in tables.GOALS}


def test_every_number_to_reach_is_judged_from_the_results(tmp_path: Path) -> None:
    assert verdicts(load(results(), tmp_path)) == VERDICTS


def test_a_red_test_a_race_and_a_case_that_does_not_fit_are_missed(tmp_path: Path) -> None:
    made = results()
    made["validation"]["tests of blocks"] = [("kernel", "pytest", {"passed tests": 9, "failed": "exit status 1"})]
    del made["validation"]["all other tests"]
    made["validation"]["memcheck"] = [("kernel", "compute-sanitizer", {"skipped": "not installed"})]
    made["validation"]["racecheck"] = [("kernel", "compute-sanitizer", {"failed": "exit status 9. a race"})]
    made["train_step"]["full-512-block"] = [("trainer", "", {"out of memory": "after rollout"})]
    found = verdicts(load(made, tmp_path))
    assert found["kernels' tests on the GPU: red parts"] == "1 (tests of blocks; 1 of 2 reach it): **missed**"
    assert found["compute-sanitizer: tools that found something"] == "1 (racecheck; 1 of 2 reach it): **missed**"
    assert found["all parameters trained in 80 GB"] == "out of memory: **missed**"


def test_what_was_not_measured_is_not_judged_and_not_shown(tmp_path: Path) -> None:
    made = results()
    del made["validation"]["all other tests"]
    part = load({"validation": made["validation"]}, tmp_path)
    assert verdicts(part)["kernels' tests on the GPU: red parts"] is None
    assert len([text for text in verdicts(part).values() if text]) == 1
    assert tables.goals_table(part).count("\n") == 2
    assert not list(tables.pages(load({}, tmp_path)))


def test_a_page_is_made_from_the_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    found = load(results(), tmp_path)
    tables.write(page, found, tmp_path / "plots")
    text = page.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert "old" not in text.split()
    assert len(list((tmp_path / "plots").glob("*.png"))) == text.count("](plots/") == 5
    assert "| 8x67108864 bf16 | both | a \\| b c | 25.0 us (23.8 to 27.5), 2.50x |" in text
    assert f"driver 580.1, torch {ENV['torch']}, triton {ENV['triton']}, " in text
    assert "0.210 s a transition, 0.952 images/s, 22.5 GiB, planned 22.0 GiB" in text
    assert "| train_step | full-1024-unfused-block | trainer | after rollout: CUDA out of memory |" in text
    for name in tune.EXPERIMENTS:
        assert f"*{name}*, launch:" in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):  # every row has as many cells as its heading
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    tables.write(page, found, tmp_path / "plots")
    assert page.read_text() == text  # made again from the same results, nothing changes
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no <!-- benchmarks: begin -->"):
        tables.write(page, found, tmp_path / "plots")


def test_a_choice_must_be_clearly_faster_to_be_the_best(tmp_path: Path) -> None:
    def chosen(ours: float, theirs: float) -> str:
        found = {"ours": us(ours), "theirs": us(theirs), "broken": {"failed": "no"}}
        choices = [(name, "launch", numbers) for name, numbers in found.items()]
        (text,) = tables.experiments(load({"tuning": {"tile: 1024^2": choices}}, tmp_path))
        ((before, _),) = re.findall(r"\| 1024\^2 \|(.*)\*\*([\d.]+) us.*\*\* \|", text)
        return "theirs" if "us" in before else "ours"

    assert chosen(10.0, 8.0) == "theirs"
    assert chosen(10.0, 9.9) == "ours"  # by less than 2%
    assert chosen(10.0, 9.0) == "ours"  # within the spread of both
    assert chosen(10.0, 12.0) == "ours"


def test_every_experiment_has_its_prediction() -> None:
    sections = (ROOT / "docs" / "hopper.md").read_text().split("\n### ")[1:]
    assert [section.splitlines()[0].lower() for section in sections] == [name.lower() for name in tune.EXPERIMENTS]
    assert all("*Prediction.*" in section for section in sections)
