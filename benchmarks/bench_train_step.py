"""Rollout and update of the real 11.9-billion-parameter Flux with random weights: seconds, peak memory, utilisation.

    python benchmarks/bench_train_step.py          on a GPU of 80 GB or more
    python benchmarks/bench_train_step.py --plan   the planner's predictions; needs no GPU

A case is `lora` (rank 64, AdamW) or `full` (8-bit AdamW), at 512^2 or 1024^2, with fused or `unfused` blocks, at one
level of model.recompute, as far as it could fit, frozen weights in `int8`, `float8` or `nf4` or not, at a micro-batch
of its own (`x1`, `x2`, `x3`) or the usual one, `compiled` (model.compile = "blocks") or not; no KL, no EMA.
Each runs in a process of its own, held to 80 GB (1e9 bytes; the planner's unit) on larger cards too. Nothing is
downloaded: weights and prompt embeddings are random, made on the device; all else is the trainer's own code, with the
VAE in memory. But unfused blocks give attention contiguous gradients, as fused ones do: with cuDNN, which the trainer
then leaves out, theirs would be wrong. The allocator is given expandable segments, so that fragmentation does not
decide what fits.

The learning rate is 0, so that every repetition is a first update, whose ratios should be 1: how far they are from it
is recorded. The clip range is wide, so that a ratio that is not 1 clips nothing: matmuls on gradients of zeros are
faster than those on real ones.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import naive
import rows
import torch
from accelerate import Accelerator
from bench_blocks import give_attention_contiguous_gradients
from bench_loss import both
from diffusers import FlowMatchEulerDiscreteScheduler
from processes import CHILD, Processes, serve
from rows import Measured
from timing import call_time, graph_times, percentiles, rotations
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from fastguard.backbones.flux import Flux
from fastguard.backbones.pipeline.backbone import PipelineBackbone, blocks_of, prepare_transformer
from fastguard.backbones.pipeline.skeleton import meta_transformer, meta_vae, pipeline_configs
from fastguard.backbones.quantize import Format, quantize_layers
from fastguard.blocks.compiled import compile_blocks
from fastguard.blocks.linear import QuantizedLinear
from fastguard.blocks.quantized import BlockScaled, RowScaled, dense
from fastguard.config import Recipe, Recompute, recompute_levels
from fastguard.memory import executed_flops, kept_activations, rollout_flops, update_flops
from fastguard.memory.phases import limit_bytes, planned_phases
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.recipe import parse_recipe
from fastguard.train.collect import images_to_sample
from fastguard.train.minibatches import minibatches
from fastguard.train.policy_loss import policy_loss
from fastguard.train.rollout import RolloutBatch, rollout, training_schedule
from fastguard.train.state import TrainState, build_state
from fastguard.train.update import update_weights

MEMORY_GB = 80.0
CLIP_RANGE = {"512": 2e-6, "1024": 1e-6}
"""of the recipes; the first log-ratio has to be within `update.parity` of it"""
MATMUL = 8192
REPEATS, ENOUGH_S = range(3, 11), 8.0
"""repetitions: at least 3, at most 10, none begun after so many seconds"""
# What is trained, pixels (squared), blocks, recompute, compiled. First what a goal or a comparison hangs on.
CASES = list(dict.fromkeys([
    "lora-1024-none", "lora-1024-x2-none", "lora-1024-unfused-none", "lora-512-nf4-x3-block", "full-512-block",
    "lora-1024-pointwise", "lora-512-block", "lora-1024-block", "lora-1024-mlp", "lora-1024-unfused-block",
    "lora-512-unfused-none", "lora-512-none", "lora-512-pointwise", "lora-512-mlp", "lora-512-unfused-block",
    "full-512-unfused-block", "full-512-pointwise", "full-512-mlp", "full-1024-block", "full-1024-unfused-block",
    "lora-1024-unfused-none-compiled", "lora-1024-none-compiled", "lora-512-unfused-none-compiled",
    "lora-512-none-compiled", "full-512-unfused-block-compiled", "full-512-block-compiled", "full-1024-block-compiled",
    "lora-1024-pointwise-compiled", "lora-1024-mlp-compiled", "lora-1024-nf4-x1-pointwise-compiled",
    "lora-1024-int8-x1-pointwise-compiled", "lora-1024-offload", "lora-512-offload", "full-512-offload",
    "lora-1024-unfused-offload", "lora-1024-offload-compiled",
    # Frozen weights in 8 and 4 bits, at micro-batches of 1 and 3, as docs/formats.py plans them.
    *(f"lora-{pixels}-{how}-x{micro_batch}-{level}" for pixels in (512, 1024) for how in get_args(Format)
      for micro_batch in (1, 3) for level in recompute_levels(fuse=True)),
]))  # fmt: skip
WEIGHTS_STD = 0.02
TOY_CASE = "full-512-block"
"""the one with most branches; --only runs any other"""


def recipe_of(case: str, toy: bool) -> Recipe:
    """One update of 5 trained steps of the 6 of each of 2 or 3 images. `toy`: the tiny pipeline, an eighth wide.

    The rollout batch equals the micro-batch, as parity asks for.
    """
    train, pixels, *others, recompute = case.removesuffix("-compiled").split("-")
    how = next((part for part in others if part in get_args(Format)), "none")
    chosen = next((int(part[1:]) for part in others if part.startswith("x")), None)
    size = int(pixels) // 8 if toy else int(pixels)
    usual = 1 if pixels == "1024" or case == "full-512-pointwise" else 3 if train == "lora" else 2
    of_each = chosen or usual
    fields: dict[str, Any] = {
        "model": {"path": "tiny", "dtype": "float32"} if toy else {"dtype": "bfloat16"},
        "prompts": {"per_epoch": 1, "max_tokens": 32 if toy else 128},
        "sampler": {"num_steps": 6, "noise_level": 0.9, "sde_steps": 5, "decode_batch": 1, "store": "cpu"},
        "objective": {"clip_range": 0.5},  # of ratios that should be 1
        "rewards": [{"use": "jpeg_compressibility"}],  # a recipe needs one; nothing is scored here
        "update": {"minibatches": 1, "micro_batch": of_each, "learning_rate": 0.0},
        "hardware": {"memory_gb": MEMORY_GB},
    }
    fields["model"] |= {"train": train, "quantize": how, "height": size, "width": size, "recompute": recompute}
    fields["model"] |= {"fuse": "unfused" not in case, "compile": "blocks" if case.endswith("compiled") else "none"}
    fields["sampler"] |= {"group_size": max(2, of_each), "batch_size": of_each}
    fields["update"]["optimizer"] = "adamw" if train == "lora" else "adamw8bit"
    return parse_recipe(fields, case)


def level_of(recipe: Recipe) -> Recompute:
    assert recipe.model.recompute != "auto"
    return recipe.model.recompute


@dataclass(frozen=True)
class RandomPrompts(EncodedPrompts):
    """Embeddings of random numbers, made when they are asked for."""

    tokens: int
    channels: int
    pooled: int

    def load(self, indices: Sequence[int]) -> dict[str, Tensor]:
        n = len(indices)
        return {"embeds": torch.randn(n, self.tokens, self.channels), "pooled": torch.randn(n, self.pooled)}


class NoRecorder:
    """Leaves no traces; the trainer asks only this method of it here."""

    def skipped(self, epoch: int, message: str) -> None:
        raise FloatingPointError(message)


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Give a meta module memory on the device and random matrices; biases are 0, scales of norms 1."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.ndim >= 2:
            parameter.normal_(0.0, WEIGHTS_STD)
        elif parameter.is_floating_point():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            _fill_codes(layer.quantized)


def _fill_codes(weight: RowScaled | BlockScaled) -> None:
    """Random codes on both sides of 0, with scales that give the weights of a dense layer their size."""
    weight.codes.random_(*((-127, 128) if weight.codes.dtype == torch.int8 else (0, 256)))
    if isinstance(weight, BlockScaled):
        weight.table.copy_(torch.linspace(-1, 1, len(weight.table)))
        if weight.absmax_codes is not None and weight.absmax_offset is not None:
            weight.absmax_codes.random_(0, 256)
            weight.absmax_offset.zero_()
    elif weight.codes.dtype == torch.uint8:
        weight.codes[weight.codes & 0x7F == 0x7F] = 0  # NaN of float8
    outer = weight.scale if isinstance(weight, RowScaled) else weight.absmax
    outer *= WEIGHTS_STD / dense(weight, torch.float32, "auto").std()


def build(case: str, toy: bool) -> TrainState:
    """The trainer's state, as `load_pipeline` and `train` build it, but for the values of the weights."""
    torch.manual_seed(0)
    recipe, accelerator = recipe_of(case, toy), Accelerator(cpu=toy)
    spec, dtype = Flux().spec, getattr(torch, recipe.model.dtype)
    configs = pipeline_configs(spec, recipe.model.path)
    vae, transformer = meta_vae(spec, configs, dtype), meta_transformer(spec, configs, dtype)
    if recipe.model.quantize != "none":
        with torch.device("meta"):
            quantize_layers(transformer, blocks_of(spec, transformer), recipe.model.quantize)
    for module in (vae, transformer):
        fill(module, accelerator.device)
        module.eval()
    prepare_transformer(spec, transformer, recipe.model, recipe.lora, level_of(recipe))
    give_attention_contiguous_gradients()
    if toy and recipe.model.compile == "blocks":  # inductor would spend minutes on compiling for the CPU
        compile_blocks(transformer, blocks_of(spec, transformer).values(), backend="aot_eager")
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:  # as after some training: they begin at zero, and with them the gradients of lora_A
            nn.init.normal_(parameter, std=1e-3)
    channels, pooled = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    prompts = RandomPrompts([Prompt("random")], [], recipe.prompts.max_tokens, channels, pooled)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)  # Flux.1-dev's
    backbone = PipelineBackbone(
        spec, transformer, vae, scheduler, {}, prompts, len(prompts.prompts), recipe, accelerator.device
    )
    return build_state(backbone, recipe, accelerator, None)


def sample(state: TrainState) -> tuple[RolloutBatch, ...]:
    """The images of an epoch, as `sample_epoch` samples them, without decoding and rewards."""
    recipe, backbone, device = state.recipe, state.backbone, state.accelerator.device
    schedule = training_schedule(recipe.sampler, backbone.sigmas, recipe.run.seed, 0)
    prompt_indices, seeds = images_to_sample(state)
    transitions = []
    for first in range(0, len(prompt_indices), recipe.sampler.batch_size):
        part = slice(first, first + recipe.sampler.batch_size)
        on_device = prompt_indices[part].to(device)
        rolled = rollout(state.policy, on_device, seeds[part], backbone.latent_shape, schedule, backbone.dtype)
        batch = RolloutBatch.cat(rolled.transitions)
        transitions.append(replace(batch, sample=batch.sample + first).to(recipe.sampler.store))
    return tuple(transitions)


def update(state: TrainState, transitions: Sequence[RolloutBatch]) -> dict[str, float]:
    """One optimizer update on all transitions. Raises AssertionError unless it has a gradient and clips nothing."""
    recipe = state.recipe
    advantages = 1.0 - 2.0 * (torch.arange(recipe.images_per_epoch) % 2)
    minibatch = next(minibatches(state, advantages))
    done = update_weights(state, transitions, minibatch, advantages, NoRecorder(), False)  # type: ignore[arg-type]
    worst, norm = float(done.log_ratio.abs().max()), float(done.grad_norm)
    assert not done.clipped.any(), f"a log-ratio of {worst:.2e} before any weight has changed"
    assert 0 < norm < math.inf, f"gradient norm {norm}"
    return {"worst_log_ratio": worst, "grad_norm": norm}


def kept_bytes(state: TrainState, transitions: Sequence[RolloutBatch]) -> int:
    """What the forward pass of one micro-batch leaves on the device for its backward pass."""
    none = torch.zeros(state.recipe.images_per_process)
    index = next(minibatches(state, none)).index[: state.recipe.micro_batch]
    batch = RolloutBatch.select(transitions, index).to(state.accelerator.device)
    advantages = torch.ones(len(batch), device=state.accelerator.device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = policy_loss(state.policy, batch, advantages, state.recipe.objective)
    kept = torch.cuda.memory_allocated() - before
    del result
    return kept


def measured_once(run: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """Seconds, and the most that PyTorch's allocator has handed out and held meanwhile."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if not cuda:
        return {"took_s": time.perf_counter() - start}
    torch.cuda.synchronize()
    peaks = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return {"took_s": time.perf_counter() - start, **peaks}


def repeated(run: Callable[[], Any], cuda: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Percentiles of a warm call in seconds, and its largest peaks."""
    found: list[dict[str, float]] = []
    while len(found) < REPEATS.start or (len(found) < REPEATS.stop - 1 and sum(n["took_s"] for n in found) < ENOUGH_S):
        found.append(measured_once(run, cuda))
    peaks = {name: max(numbers[name] for numbers in found) for name in found[0]}
    took = percentiles([numbers["took_s"] for numbers in found])
    del peaks["took_s"]
    return {name.replace("_us", "_s"): value for name, value in took.items()}, peaks


def measure_training(case: str, toy: bool) -> Measured:
    """Baselines, rollout and update. The peak of a rollout is taken once the optimizer's state is there."""
    cuda, device = not toy, "cpu" if toy else "cuda"
    state = build(case, toy)
    recipe, backbone = state.recipe, state.backbone
    yield "trainer", "build", {"trained_parameters": sum(p.numel() for p in state.parameters.values())}
    # The loss of one micro-batch alone, and what this card gives at best, while there is room for them.
    shape = (recipe.micro_batch, *backbone.latent_shape)
    count = rotations(3 * math.prod(shape) * backbone.dtype.itemsize, cuda)
    sets = [naive.make_inputs(shape, backbone.dtype, device, seed=seed) for seed in range(count)]
    runs = [partial(both, naive.fused_guard_loss, inputs) for inputs in sets]
    losses = {"loss": graph_times(runs, cuda), "loss from Python": call_time(runs[0], cuda)}
    square = torch.randn(2 * [MATMUL if cuda else 128], dtype=backbone.dtype, device=device)
    matmul_us = call_time(partial(torch.mm, square, square), cuda)["p50_us"]
    yield "trainer", "matmul", {"rate_tflop_per_s": 2 * len(square) ** 3 / matmul_us / 1e6}
    query = torch.empty(1, 24, 4608, 128, dtype=backbone.dtype, device=device, requires_grad=True)
    yield "trainer", "attention", {"kernel": SDPBackend(torch._fused_sdp_choice(query, query, query)).name}
    del sets, runs, square, query
    if cuda:
        torch.cuda.empty_cache()
    backbone.load_prompts([0])
    transitions = sample(state)
    assert all(bool(torch.isfinite(part.velocity).all()) for part in transitions), "a velocity is not finite"
    # A rollout recomputes nothing: it is timed once for all levels.
    if level_of(recipe) == ("none" if recipe.model.train == "lora" else "block"):
        times, _ = repeated(partial(sample, state), cuda)
        steps = recipe.images_per_epoch // recipe.sampler.batch_size * recipe.sampler.num_steps
        of_each = {"per_step_s": times["p50_s"] / steps, "per_image_s": times["p50_s"] / recipe.images_per_epoch}
        yield "trainer", "rollout", {**times, **of_each}
    if cuda:
        yield "trainer", "update", {"kept_bytes": kept_bytes(state, transitions)}
    done: dict[str, float] = {}
    # The first one makes the optimizer's state, and compiles.
    first = measured_once(lambda: done.update(update(state, transitions)), cuda)
    times, peaks = repeated(partial(update, state, transitions), cuda)
    # What decides whether it fits is the larger of the two.
    most = {name: max(first[name], n_bytes) for name, n_bytes in peaks.items()}
    of_each = {f"{name[:3]}_per_transition_s": s / recipe.transitions_per_update for name, s in times.items()}
    of_each["per_image_s"] = times["p50_s"] / recipe.images_per_epoch
    yield "trainer", "update", {**times, **of_each, "first_s": first["took_s"], **most}
    worst = done["worst_log_ratio"] / CLIP_RANGE[case.split("-")[1]]
    yield "trainer", "update", {**done, "worst_log_ratio_of_clip_range": worst}
    passes = recipe.transitions_per_update / recipe.micro_batch
    for phase, of_loss in losses.items():
        yield "trainer", phase, {**of_loss, "of_update": passes * of_loss["p50_us"] / 1e6 / times["p50_s"]}
    yield "trainer", "rollout beside the optimizer", measured_once(partial(sample, state), cuda)


def measure_in_child(case: str, toy: bool) -> Measured:
    if not toy:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(int(MEMORY_GB * 1e9), total) / total)
    return measure_training(case, toy)


def child_environ(args: argparse.Namespace) -> dict[str, str]:
    """Of the processes that measure a case each."""
    environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if args.toy:
        environ["CUDA_VISIBLE_DEVICES"] = ""
        if not any("compiled" in pattern for pattern in args.only):
            environ["TORCHDYNAMO_DISABLE"] = "1"  # the 8-bit optimizer would spend minutes on compiling for the CPU
    return environ


def planned(case: str, toy: bool) -> Measured:
    """The planner's prediction: bytes, and FLOPs that a transition's update and a rollout's step need."""
    recipe = recipe_of(case, toy)
    phases = {phase.name: phase for phase in planned_phases(recipe, level_of(recipe))}
    parts = ("weights", "gradients", "optimizer", "activations", "trajectories", "peak")
    bytes_of = {f"{part}_bytes": getattr(phases["update"], part) for part in parts}
    needed = update_flops(recipe)
    flops = {"needed_tflop": needed / recipe.micro_batch / 1e12, "executed_per_needed": executed_flops(recipe) / needed}
    yield "planner", "update", {**bytes_of, "kept_bytes": kept_activations(recipe).total, **flops}
    rolling = phases["rollout"].peak
    yield "planner", "rollout", {"peak_bytes": rolling, "needed_tflop": rollout_flops(recipe) / 1e12}
    yield "planner", "both", {"fits": max(rolling, phases["update"].peak) <= limit_bytes(recipe)}


def suite(args: argparse.Namespace) -> tuple[str, rows.Cases]:
    names = [TOY_CASE] if args.toy and args.only == ["*"] else CASES
    if args.plan:  # the planner counts compiled blocks as others
        return "plan", {name: partial(planned, name, args.toy) for name in names if not name.endswith("compiled")}
    processes = Processes(__file__, args, child_environ(args))
    return "train_step", {name: partial(processes.measure, name) for name in names}


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        serve(measure_in_child)
    else:
        rows.main(__doc__, suite, plan="only the planner's predictions")
