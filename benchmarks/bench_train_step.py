"""Rollout and update of the real 11.9-billion-parameter Flux with random weights: seconds, peak memory, utilisation.

    python benchmarks/bench_train_step.py [--cases 'lora-*' ...] [--save]    on a CUDA device of 80 GB or more
    python benchmarks/bench_train_step.py --plan [--save]                    the planner's predictions; needs no GPU
    python benchmarks/bench_train_step.py --dry-run                          every step with a tiny model on the CPU

A case is `lora` (rank 64, AdamW) or `full` (8-bit AdamW), at 512^2 or 1024^2, with fused or `unfused` blocks, at one
level of model.recompute, as far as it could fit; no KL, no EMA. Each runs in a process of its own, held to 80 GB (1e9
bytes; the planner's unit) on larger cards too: one that runs out of memory is recorded as such. Nothing is downloaded:
weights and prompt embeddings are random, made on the device; all else is the trainer's own code (`rollout`,
`check_parity`, `update_weights`), with the VAE in memory.

The learning rate is 0, so that every repetition is a first update: its log-ratios must pass the parity check. With
another, samples would be clipped, and matmuls on gradients of zeros are faster than those on real ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import results
import textbook
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from gpu_suite import MAX_LOSS_SETS, both
from timing import ROTATED_BYTES, call_times, graph_times
from torch import Tensor, nn

from fastguard.backbones.flux import FluxBackbone, prepare_transformer
from fastguard.config import (
    HardwareConfig,
    ModelConfig,
    PromptsConfig,
    Recipe,
    Recompute,
    RewardConfig,
    SamplerConfig,
    UpdateConfig,
)
from fastguard.memory import executed_flops, update_flops
from fastguard.memory.models import meta_transformer, meta_vae, pipeline_configs
from fastguard.memory.phases import GIB, limit_bytes, planned_phases
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.rollouts import images_to_sample
from fastguard.sampler import Transitions, rollout, training_schedule
from fastguard.state import TrainState, build_state
from fastguard.update import check_parity, minibatches, update_weights

SECTION, PLAN_SECTION = "train_step", "plan_train_step"
MEMORY_GB = 80.0
PLANNER_GOAL = 0.05
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}
"""dense bf16 of the SXM cards, from the data sheets"""
MATMUL = 8192
REPEATS, ENOUGH_S = range(3, 11), 12.0
"""repetitions: at least 3, at most 10, none begun after so many seconds"""
CASE_LIMIT_S = 300


@dataclass(frozen=True)
class Case:
    """One setting. The rollout batch equals the micro-batch, as parity asks for."""

    train: Literal["lora", "full"]
    size: int
    """pixels, squared"""
    fuse: bool
    recompute: Recompute
    micro_batch: int
    peak_goal_gib: float | None = None
    mfu_goal: float | None = None

    @property
    def name(self) -> str:
        return f"{self.train}-{self.size}-{'' if self.fuse else 'unfused-'}{self.recompute}"

    def recipe(self, dry: bool) -> Recipe:
        """One update of 5 trained steps of the 6 of each of 2 or 3 images. `dry`: the tiny pipeline, an eighth wide."""
        size = self.size // 8 if dry else self.size
        model = ModelConfig(
            path="tiny" if dry else ModelConfig.path,
            dtype="float32" if dry else "bfloat16",
            height=size,
            width=size,
            train=self.train,
            fuse=self.fuse,
            recompute=self.recompute,
        )
        return Recipe(
            model=model,
            prompts=PromptsConfig(per_epoch=1, max_tokens=32 if dry else 128),
            sampler=SamplerConfig(
                num_steps=6,
                noise_level=0.9,
                sde_steps=5,
                group_size=max(2, self.micro_batch),
                batch_size=self.micro_batch,
                decode_batch=1,
                store="cpu",
            ),
            rewards=(RewardConfig("jpeg_compressibility"),),  # a recipe needs one; nothing is scored here
            update=UpdateConfig(
                minibatches=1,
                micro_batch=self.micro_batch,
                optimizer="adamw" if self.train == "lora" else "adamw8bit",
                learning_rate=0.0,
            ),
            hardware=HardwareConfig(memory_gb=MEMORY_GB),
        )

    def settings(self, dry: bool) -> dict[str, Any]:
        """What a number of this case needs beside it."""
        recipe = self.recipe(dry)
        return {
            "train": self.train,
            "size": recipe.model.height,
            "fuse": self.fuse,
            "recompute": self.recompute,
            "micro_batch": self.micro_batch,
            "optimizer": recipe.update.optimizer,
            "dtype": recipe.model.dtype,
            "images": recipe.images_per_epoch,
            "sampling_steps": recipe.sampler.num_steps,
            "transitions_per_update": recipe.transitions_per_update,
            "text_tokens": recipe.prompts.max_tokens,
        }


CASES = {
    case.name: case
    for case in (
        Case("lora", 512, False, "none", 3),
        Case("lora", 512, False, "block", 3),
        Case("lora", 512, True, "none", 3),
        Case("lora", 512, True, "pointwise", 3),
        Case("lora", 512, True, "mlp", 3),
        Case("lora", 512, True, "block", 3, peak_goal_gib=30.0),
        Case("lora", 1024, False, "none", 1),
        Case("lora", 1024, False, "block", 1),
        Case("lora", 1024, True, "none", 1, mfu_goal=0.45),
        Case("lora", 1024, True, "pointwise", 1),
        Case("lora", 1024, True, "mlp", 1),
        Case("lora", 1024, True, "block", 1, peak_goal_gib=30.0),
        Case("full", 512, False, "block", 2),
        Case("full", 512, True, "pointwise", 1),
        Case("full", 512, True, "mlp", 2),
        Case("full", 512, True, "block", 2, peak_goal_gib=78.0),
        Case("full", 1024, False, "block", 1),
        Case("full", 1024, True, "block", 1),
    )
}
DRY_CASES = ("lora-512-mlp", "lora-1024-unfused-none", "full-512-block")
"""every branch once; --cases walks any other"""


# --- the product on random weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomPrompts(EncodedPrompts):
    """Embeddings of random numbers, made when they are asked for."""

    tokens: int
    channels: int
    pooled: int

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return torch.randn(len(indices), self.tokens, self.channels), torch.randn(len(indices), self.pooled)


class NoRun:
    """A run that leaves no traces; the trainer asks only this method of it here."""

    def skipped(self, epoch: int, message: str) -> None:
        raise FloatingPointError(message)


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Give a meta module memory on the device and random matrices; biases are 0, scales 1."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def build(case: Case, dry: bool) -> TrainState:
    """The trainer's state, as `FluxBackbone.load` and `train` build it, but for the values of the weights."""
    torch.manual_seed(0)
    recipe, accelerator = case.recipe(dry), Accelerator(cpu=dry)
    configs, dtype = pipeline_configs(recipe.model.path), getattr(torch, recipe.model.dtype)
    vae, transformer = meta_vae(configs, dtype), meta_transformer(configs, dtype)
    for module in (vae, transformer):
        fill(module, accelerator.device)
        module.eval()
    prepare_transformer(transformer, recipe.model, recipe.lora, case.recompute)
    if case.train == "lora":
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:  # as after some training: they begin at zero, and with them the gradients of lora_A
                nn.init.normal_(parameter, std=1e-3)
    prompts = RandomPrompts(
        [Prompt("random")],
        [],
        tokens=recipe.prompts.max_tokens,
        channels=transformer.config.joint_attention_dim,
        pooled=transformer.config.pooled_projection_dim,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)  # Flux.1-dev's
    backbone = FluxBackbone(transformer, vae, scheduler, prompts, len(prompts.prompts), recipe, accelerator.device)
    return build_state(backbone, recipe, accelerator, None)


def sample(state: TrainState) -> tuple[Transitions, ...]:
    """The images of an epoch, as `sample_epoch` samples them, without decoding and rewards."""
    recipe, backbone, device = state.recipe, state.backbone, state.accelerator.device
    schedule = training_schedule(recipe.sampler, backbone.shift, recipe.run.seed, 0)
    prompt_indices, seeds = images_to_sample(state)
    transitions = []
    for first in range(0, len(prompt_indices), recipe.sampler.batch_size):
        part = slice(first, first + recipe.sampler.batch_size)
        on_device = prompt_indices[part].to(device)
        rolled = rollout(state.policy, on_device, seeds[part], backbone.latent_shape, schedule, backbone.dtype)
        batch = Transitions.cat(rolled.transitions)
        transitions.append(replace(batch, sample=batch.sample + first).to(recipe.sampler.store))
    return tuple(transitions)


def update(state: TrainState, transitions: Sequence[Transitions]) -> dict[str, float]:
    """One optimizer update on all transitions. Raises AssertionError unless it is a correct first update."""
    recipe, index = state.recipe, next(minibatches(state))
    advantages = 1.0 - 2.0 * (torch.arange(recipe.images_per_epoch) % 2)
    done = update_weights(state, transitions, index, advantages, NoRun())  # type: ignore[arg-type]
    worst, norm = float(done.log_ratio.abs().max()), float(done.grad_norm)
    limit = recipe.update.parity * recipe.objective.clip_range
    assert worst <= limit, f"log-ratio {worst:.2e} before any weight has changed, more than {limit:.2e}"
    assert 0 < norm < math.inf, f"gradient norm {norm}"
    return {"worst_log_ratio": worst, "grad_norm": norm}


# --- measuring ------------------------------------------------------------------------------------------------------


class Peak:
    """Largest numbers of bytes that PyTorch's allocator has handed out and held since this was made; None on a CPU."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int | None]:
        if not self._cuda:
            return {"peak_bytes": None, "reserved_bytes": None}
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def seconds(run: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeated(run: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """Percentiles of a warm call."""
    times: list[float] = []
    while len(times) < REPEATS.start or (len(times) < REPEATS.stop - 1 and sum(times) < ENOUGH_S):
        times.append(seconds(run, cuda))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_s": deciles[1], "p50_s": deciles[4], "p80_s": deciles[7], "repetitions": len(times)}


def measure_training(case: Case, dry: bool, row: dict[str, Any]) -> tuple[int, ...]:
    """Fill the row with rollout and update; returns the shape of a micro-batch's latents.

    `row["phase"]` says what was going on, should it end early. Times of a rollout do not depend on what waits on the
    device, its peak does: that is taken once the optimizer's state is there.
    """
    cuda = not dry
    row["phase"] = "build"
    state = build(case, dry)
    recipe, backbone = state.recipe, state.backbone
    row["parameters"] = sum(p.numel() for p in state.policy.parameters())
    row["trained_parameters"] = sum(p.numel() for p in state.parameters.values())
    backbone.hold([0])
    row["phase"] = "rollout"
    transitions = sample(state)
    assert all(bool(torch.isfinite(part.velocity).all()) for part in transitions), "a velocity is not finite"
    row["rollout"] = repeated(lambda: sample(state), cuda)
    row["rollout"]["s_per_image"] = row["rollout"]["p50_s"] / recipe.images_per_epoch
    row["phase"] = "update"
    check_parity(transitions, state)
    first = Peak(cuda)
    first_s = seconds(lambda: row.update(update(state, transitions)), cuda)  # makes the optimizer's state; compiles
    first_peak = first.read()
    steady = Peak(cuda)
    row["update"] = repeated(lambda: update(state, transitions), cuda)
    row["update"] |= {"first_s": first_s, "first_peak_bytes": first_peak["peak_bytes"]}
    row["update"]["s_per_transition"] = row["update"]["p50_s"] / recipe.transitions_per_update
    # What decides whether it fits is the larger of the two.
    row["update"] |= {name: n if n is None else max(n, first_peak[name] or 0) for name, n in steady.read().items()}
    row["phase"] = "rollout beside the optimizer's state"
    sampling = Peak(cuda)
    sample(state)
    row["rollout"] |= sampling.read()
    return (recipe.micro_batch, *backbone.latent_shape)


def measure_loss(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """`guard_loss`, forward and backward, of one micro-batch alone: as a CUDA graph past L2, and called from Python."""
    cuda = device == "cuda"
    tensor_bytes = math.prod(shape) * dtype.itemsize
    count = min(MAX_LOSS_SETS, math.ceil(ROTATED_BYTES / tensor_bytes)) if cuda else 2
    sets = [textbook.make_inputs(shape, dtype, device, seed=seed) for seed in range(count)]
    runs = [both(textbook.fused_guard_loss, inputs) for inputs in sets]
    return {"shape": shape, "graph": graph_times(runs, cuda), "called_from_python": call_times(runs[0], cuda)}


def measure_matmul(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square matmul of random numbers: what this card gives at best, in the same run."""
    n = MATMUL if device == "cuda" else 128
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / call_times(lambda: a @ b, device == "cuda")["p50_us"] / 1e6


def measure(case: Case, dry: bool) -> dict[str, Any]:
    """Everything about a case, in this process; a case that does not fit has an `error`, and what came before it."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    row: dict[str, Any] = {**case.settings(dry), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
    if not dry:
        total = torch.cuda.get_device_properties(0).total_memory
        row["cap_bytes"] = min(int(MEMORY_GB * 1e9), total)
        torch.cuda.set_per_process_memory_fraction(row["cap_bytes"] / total)
    try:
        shape = measure_training(case, dry, row)
        gc.collect()  # the model: the baselines are measured without it
        if not dry:
            torch.cuda.empty_cache()
        row["phase"] = "baselines"
        row["loss"] = measure_loss(shape, dtype, device)
        row["matmul_tflop_per_s"] = measure_matmul(dtype, device)
        del row["phase"]
    except torch.OutOfMemoryError as error:
        row |= {"error": "out of memory", "message": f"in {row['phase']}: {str(error).splitlines()[0]}"}
    return row


def run_case(case: Case, dry: bool, limit_s: float = CASE_LIMIT_S) -> dict[str, Any]:
    """`measure` in a process of its own; whatever happens to it, a row."""
    environ = dict(os.environ)
    if dry:  # the 8-bit optimizer would spend minutes on compiling for the CPU
        environ |= {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--child", case.name, "--to", str(to), *(["--dry-run"] if dry else [])]
        try:
            done = subprocess.run(
                command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=limit_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**case.settings(dry), "error": "timed out", "message": f"not done after {limit_s:g} s"}
        if to.exists():
            return json.loads(to.read_text())
    last = "\n".join(done.stderr.strip().splitlines()[-4:])
    return {**case.settings(dry), "error": "failed", "message": f"exit status {done.returncode}: {last}"}


# --- what was planned, and what follows -----------------------------------------------------------------------------


def planned(cases: Sequence[Case], dry: bool) -> dict[str, dict[str, Any]]:
    """The planner's prediction for each case: bytes, FLOPs, and whether it fits."""
    rows = {}
    for case in cases:
        recipe = case.recipe(dry)
        phases = {phase.name: phase for phase in planned_phases(recipe, case.recompute)}
        peaks = {name: phases[name].peak for name in ("rollout", "update")}
        update = phases["update"]
        rows[case.name] = {
            **case.settings(dry),
            "peak_bytes": peaks,
            "update_bytes": {
                part: getattr(update, part)
                for part in ("weights", "gradients", "optimizer", "activations", "trajectories")
            },
            "fits": max(peaks.values()) <= limit_bytes(recipe),
            "needed_tflop_per_transition": update_flops(recipe) / recipe.micro_batch / 1e12,
            "executed_per_needed_flop": executed_flops(recipe) / update_flops(recipe),
            "peak_goal_gib": case.peak_goal_gib,
            "mfu_goal": case.mfu_goal,
        }
    return rows


def planned_at_once(cases: Sequence[Case], dry: bool) -> dict[str, dict[str, Any]]:
    """`planned`, by the cores at hand: cases of one size share their passes, and so a process."""
    groups = [[c for c in cases if (c.train, c.size) == key] for key in dict.fromkeys((c.train, c.size) for c in cases)]
    if dry or len(groups) == 1:
        return planned(cases, dry)
    workers = min(len(groups), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(planned, groups, [dry] * len(groups)))
    return {name: row for rows in found for name, row in rows.items()}


def concluded(case: Case, row: dict[str, Any], plan: dict[str, Any], peak_tflops: float | None) -> dict[str, Any]:
    """The row with what follows from it: utilisation, the share of the loss, the planner's error, the goals."""
    row = {**row, "planned": {"peak_bytes": plan["peak_bytes"], "fits": plan["fits"]}}
    row["needed_tflop_per_transition"] = plan["needed_tflop_per_transition"]
    if "error" not in row:
        done = row["update"]
        rate = plan["needed_tflop_per_transition"] / done["s_per_transition"]
        done["tflop_per_s"], done["mfu"] = rate, None if peak_tflops is None else rate / peak_tflops
        done["of_matmul"] = rate / row["matmul_tflop_per_s"]
        passes = row["transitions_per_update"] / row["micro_batch"]
        row["loss"]["share"] = passes * row["loss"]["graph"]["p50_us"] / 1e6 / done["p50_s"]
        row["loss"]["share_called_from_python"] = (
            passes * row["loss"]["called_from_python"]["p50_us"] / 1e6 / done["p50_s"]
        )
        if done["peak_bytes"] is not None:
            row["planner_error"] = {
                phase: plan["peak_bytes"][phase] / row[phase]["peak_bytes"] - 1 for phase in ("rollout", "update")
            }
    row["goals"] = list(goals(case, row))
    return row


def goals(case: Case, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """(what, measured, reached) of each number to reach; reached is None where it was not measured."""
    failed = row.get("error")

    def goal(what: str, measured: str | None, reached: bool) -> dict[str, Any]:
        if failed:
            return {"what": what, "measured": failed, "reached": False if failed == "out of memory" else None}
        return {"what": what, "measured": measured or "not measured", "reached": reached if measured else None}

    if case.peak_goal_gib is not None:
        peaks = [] if failed else [row[phase]["peak_bytes"] for phase in ("rollout", "update")]
        top = max((n / GIB for n in peaks if n is not None), default=None)
        text = None if top is None else f"{top:.1f} GiB"
        yield goal(f"peak <= {case.peak_goal_gib:g} GiB", text, top is not None and top <= case.peak_goal_gib)
    if case.mfu_goal is not None:
        mfu = None if failed else row["update"]["mfu"]
        text = None if mfu is None else f"{mfu:.1%}"
        yield goal(f"MFU >= {case.mfu_goal:.0%}", text, mfu is not None and mfu >= case.mfu_goal)
    if not failed:
        errors = row.get("planner_error", {})
        text = ", ".join(f"{name} {error:+.1%}" for name, error in errors.items()) or None
        within = all(abs(error) <= PLANNER_GOAL for error in errors.values())
        yield goal(f"planner within {PLANNER_GOAL:.0%}", text, within)


# --- the program ----------------------------------------------------------------------------------------------------


def gib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / GIB:.1f}"


def plan_table(rows: dict[str, dict[str, Any]]) -> str:
    """The predictions as text."""
    lines = [
        f"{'predicted, GiB':24}{'micro-batch':>12}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}"
        f"{'rollout':>9}{'update':>8}  {f'in {MEMORY_GB:g} GB':10}{'TFLOP':>7}{'executed':>10}  goal"
    ]
    for name, row in rows.items():
        parts, peaks = row["update_bytes"], row["peak_bytes"]
        goal = ""
        if row["peak_goal_gib"] is not None:
            kept = max(peaks.values()) / GIB <= row["peak_goal_gib"]
            goal = f"peak <= {row['peak_goal_gib']:g} GiB: predicted to be {'reached' if kept else 'missed'}"
        if row["mfu_goal"] is not None:
            limit = row["needed_tflop_per_transition"] / row["mfu_goal"] / PEAK_TFLOPS["NVIDIA H200"]
            goal = f"MFU >= {row['mfu_goal']:.0%}: needs <= {limit:.3f} s a transition (H100 SXM, H200)"
        lines.append(
            f"{name:24}{row['micro_batch']:>12}{gib(parts['weights']):>9}{gib(parts['gradients']):>11}"
            f"{gib(parts['optimizer']):>11}{gib(parts['activations']):>13}{gib(peaks['rollout']):>9}"
            f"{gib(peaks['update']):>8}  {'fits' if row['fits'] else 'too large':10}"
            f"{row['needed_tflop_per_transition']:>7.3g}{row['executed_per_needed_flop']:>10.2f}  {goal}".rstrip()
        )
    legend = "parts: of the update's peak; TFLOP: needed by the update of one transition; executed: as a multiple of it"
    return "\n".join([*lines, legend])


def describe(name: str, row: dict[str, Any]) -> str:
    """A measured case as text."""
    lines = [f"\n{name}, micro-batch {row['micro_batch']}"]
    if "rollout" in row:
        done = row["rollout"]
        lines.append(
            f"  rollout  {done['s_per_image']:8.3f} s an image       peak {gib(done.get('peak_bytes')):>6} GiB"
            f"   planned {gib(row['planned']['peak_bytes']['rollout'])}"
        )
    if "update" in row and "error" not in row:
        done, loss = row["update"], row["loss"]
        mfu = "no peak known for this device" if done["mfu"] is None else f"{done['mfu']:.1%}"
        lines += [
            f"  update   {done['s_per_transition']:8.3f} s a transition  peak {gib(done['peak_bytes']):>6} GiB"
            f"   planned {gib(row['planned']['peak_bytes']['update'])}"
            f"   (update of {row['transitions_per_update']}: p20 {done['p20_s']:.3f}, p50 {done['p50_s']:.3f}, "
            f"p80 {done['p80_s']:.3f} s; the first {done['first_s']:.1f} s)",
            f"  MFU {mfu}; {done['tflop_per_s']:.4g} TFLOP/s, {done['of_matmul']:.0%} of a plain matmul's "
            f"{row['matmul_tflop_per_s']:.4g}",
            f"  loss {loss['share']:.3%} of the update ({loss['share_called_from_python']:.3%} called from Python)",
        ]
    if "error" in row:
        planner = "fits" if row["planned"]["fits"] else "does not fit"
        lines.append(f"  {row['error']}: {row['message']} (planner: {planner} in {MEMORY_GB:g} GB)")
    words = {True: "reached", False: "MISSED", None: "not measured"}
    lines += [f"  goal {g['what']}: {g['measured']}: {words[g['reached']]}" for g in row["goals"]]
    return "\n".join(lines)


def chosen_cases(patterns: Sequence[str] | None, dry: bool) -> list[Case]:
    """Cases whose names match one of the patterns. Raises ValueError for a pattern that matches none."""
    if not patterns:
        return [CASES[name] for name in DRY_CASES] if dry else list(CASES.values())
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in CASES):
            raise ValueError(f"--cases {pattern} matches none of {', '.join(CASES)}")
    return [case for name, case in CASES.items() if any(fnmatch(name, pattern) for pattern in patterns)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help=f"of {', '.join(CASES)}")
    parser.add_argument("--plan", action="store_true", help="print the planner's predictions and the goals, no more")
    parser.add_argument("--dry-run", "--tiny", action="store_true", help="a tiny model on the CPU, nothing saved")
    parser.add_argument("--save", action="store_true", help="append the numbers to the result files")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run and args.save:
        parser.error("--dry-run saves nothing: a tiny model's numbers are none")
    if not (args.plan or args.dry_run or torch.cuda.is_available()):
        parser.error("needs a CUDA device, and torch sees none; --plan predicts, --dry-run walks the path on the CPU")
    try:
        args.chosen = chosen_cases(args.cases, args.dry_run)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = arguments()
    if args.child:
        args.to.write_text(json.dumps(measure(CASES[args.child], args.dry_run)))
        return
    plans = planned_at_once(args.chosen, args.dry_run)
    print(plan_table(plans), flush=True)
    env = results.environment()
    if args.plan:
        if args.save:
            print(f"\nsaved {results.save(PLAN_SECTION, env, {'memory_gb': MEMORY_GB, 'cases': plans}, args.out)}")
        return
    peak_tflops = PEAK_TFLOPS.get(env["device"])
    rows: dict[str, Any] = {}
    for case in args.chosen:
        rows[case.name] = concluded(case, run_case(case, args.dry_run), plans[case.name], peak_tflops)
        print(describe(case.name, rows[case.name]), flush=True)
        if args.save:
            numbers = {"memory_gb": MEMORY_GB, "peak_tflop_per_s": peak_tflops, "cases": rows}
            path = results.save(SECTION, env, numbers, args.out)
    if args.save:
        print(f"\nsaved {path}")
    broken = [name for name, row in rows.items() if row.get("error") not in (None, "out of memory")]
    if broken:
        sys.exit(f"bench_train_step: {', '.join(broken)} did not run to the end")


if __name__ == "__main__":
    main()
