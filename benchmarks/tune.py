"""Launch tables and candidate kernels against what the product does; docs/hopper.md has a prediction for each question.

    python benchmarks/tune.py [--only PATTERN ...]

An experiment asks one question: which setting of some constants, or which form of a kernel, is fastest, at some sizes
and dtypes. The first choice is the product's; every other one must give its results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import candidates
import naive
import rows
import torch
from bench_blocks import TOY
from bench_loss import LARGE, TOY_SHAPE, VIDEO, label
from operator_calls import BF16, FLUX_512, FLUX_1024, FP16, FP32, Call, Size, timed_block_calls, timed_loss_calls
from rows import Numbers
from timing import call_time, graph_times, rotations, with_bandwidth
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastguard.kernels import adaln, common, gated_residual, gelu, qk_norm_rope, sde_step, transition
from fastguard.kernels.common import Launch

Runs = list[Callable[[], Any]]
Case = Callable[[str], tuple[dict[str, Runs], int]]
"""of a device: its runs, by form, and the bytes that one of them moves"""


@dataclass(frozen=True)
class Choice:
    """Constants of modules in place of the product's, or another form of the call."""

    constants: tuple[tuple[ModuleType, str, Any], ...] = ()
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    form: str = ""
    """which of a case's runs; the only one if there is one"""
    gpu_only: bool = False
    """the interpreter knows nothing of it"""

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = [(module, name, getattr(module, name)) for module, name, _ in self.constants]
        try:
            for module, name, value in self.constants:
                setattr(module, name, value)
            with self.within():
                yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


@dataclass(frozen=True)
class Experiment:
    """One question."""

    choices: dict[str, Choice]
    cases: dict[str, Case]
    from_python: bool = False
    """also time single calls, launches included"""


def as_launched(call: Call, device: str) -> tuple[dict[str, Runs], int]:
    """A kernel as the product launches it, over as many sets of tensors as it takes to find each cold."""
    largest = max(t.nbytes for t in call.args if isinstance(t, Tensor))
    return {"": [call.copied().run for _ in range(rotations(largest, device == "cuda"))]}, call.least_bytes()


# --- the loss and the step ------------------------------------------------------------------------------------------

LOSS_KERNELS = ("guard_loss", "transition_bwd", "sde_step")
BATCH_8, HALF_GB = (8, 4096, 64), LARGE[0]
IMAGES = [(count, tokens, 64) for tokens in (1024, 4096) for count in (1, 8, 32)]


def loss_case(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[dict[str, Runs], int]:
    shape = shape if device == "cuda" else TOY_SHAPE
    return as_launched(timed_loss_calls(shape, dtype, device)[kernel], device)


def forward_case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[dict[str, Runs], int]:
    """The forward pass of the loss in two launches and in one."""
    shape = shape if device == "cuda" else TOY_SHAPE
    count = rotations(math.prod(shape) * dtype.itemsize, device == "cuda")
    options: dict[str, Any] = {
        "invert_weight": True, "objective": "grpo_guard", "log_clip": (-2e-6, 2e-6), "adv_clip": 5.0,
        "kl_threshold": 0.0, "kl_weight": 0.0, "velocity_kl": False, "reduction": "mean",
    }  # fmt: skip
    forms: dict[str, Runs] = {"two": [], "one, zeroed": [], "one": []}
    for seed in range(count):
        inputs = naive.make_inputs(shape, dtype, device, seed=seed)
        latents = (inputs.velocity.detach(), inputs.old_velocity, inputs.noise, None)
        per_sample = (inputs.advantages, inputs.step.velocity_coef, inputs.step.std, inputs.step.dt)
        ticket = torch.zeros((), dtype=torch.int32, device=device)
        one = partial(candidates.guard_forward_one_launch, *latents, *per_sample, **options)
        forms["two"].append(partial(candidates.two_launches, latents, per_sample, options))
        forms["one, zeroed"].append(one)
        forms["one"].append(partial(one, ticket=ticket))
    return forms, 3 * inputs.noise.nbytes


def loss_cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], kernels: Sequence[str]) -> Any:
    return {
        f"{kernel}, {label(shape, dtype)}": partial(loss_case, kernel, shape, dtype)
        for kernel in kernels
        for dtype in dtypes
        for shape in shapes
    }


def _loss_launch(block: int, num_warps: int) -> Choice:
    launch = Launch(block, num_warps)
    return Choice(((transition, "LAUNCH", launch), (sde_step, "LAUNCH", launch)))


LOSS_EXPERIMENTS = {
    "one launch or two": Experiment(
        {
            "two launches": Choice(form="two"),
            "one, counter filled each time": Choice(form="one, zeroed"),
            "one, counter kept at 0": Choice(form="one"),
            "two, the second early": Choice(form="two", within=candidates.early_epilogue, gpu_only=True),
        },
        {
            label(shape, dtype): partial(forward_case, shape, dtype)
            for dtype, shapes in ((BF16, [*IMAGES, HALF_GB]), (FP32, [BATCH_8, HALF_GB]))
            for shape in shapes
        },
        from_python=True,
    ),
    "tile of the loss and the step": Experiment(
        {
            f"{block} x {num_warps} warps": _loss_launch(block, num_warps)
            for block, num_warps in ((4096, 8), (1024, 4), (2048, 4), (2048, 8), (8192, 8), (8192, 16))
        },
        {
            **loss_cases([(1, 1024, 64), (8, 1024, 64), BATCH_8, HALF_GB], [BF16], LOSS_KERNELS),
            **loss_cases([BATCH_8, HALF_GB], [FP32, FP16], LOSS_KERNELS),
        },
    ),
    "partial sums of a sample, at most": Experiment(
        {str(most): Choice(((transition, "MAX_PARTIALS", most),)) for most in (1024, 256, 512, 2048)},
        loss_cases([VIDEO, *LARGE], [BF16], ["guard_loss"]),
    ),
}


# --- the kernels of a Flux block ------------------------------------------------------------------------------------


def block_case(kernel: str, size: Size, device: str) -> tuple[dict[str, Runs], int]:
    dtype, size = (BF16, size) if device == "cuda" else (FP32, TOY)
    return as_launched(timed_block_calls(size, dtype, device)[kernel], device)


def block_cases(*kernels: str) -> dict[str, Case]:
    sizes = {"1024^2": FLUX_1024, "512^2": FLUX_512}
    return {
        f"{kernel}, {name}": partial(block_case, kernel, size) for name, size in sizes.items() for kernel in kernels
    }


def _rows(programs: int = 512, sum_programs: int = 128, ahead: int = 2) -> Choice:
    return Choice(((adaln, "PROGRAMS", programs), (adaln, "SUM_PROGRAMS", sum_programs), (adaln, "ROWS_AHEAD", ahead)))


def _tokens(short: int, long: int, channels: int = 256) -> Choice:
    tile = [(module, name, value) for module in (gated_residual, gelu)
            for name, value in (("BLOCK_C", channels), ("BLOCK_S", 4096 // channels))]  # fmt: skip
    return Choice(((common, "TOKENS_PER_PROGRAM", (short, long)), *tile))


def _heads(block: int, num_warps: int, per_tile: int, per_program: int) -> Choice:
    launch = ((qk_norm_rope, "LAUNCH", Launch(block, num_warps)), (qk_norm_rope, "HEADS_PER_TILE", per_tile))
    return Choice((*launch, (qk_norm_rope, "HEADS_PER_PROGRAM", per_program)))


BLOCK_EXPERIMENTS = {
    "programs and rows ahead of adaLN": Experiment(
        {
            "512, sums 128, 2 ahead": _rows(),
            "none ahead": _rows(ahead=0),
            "1 ahead": _rows(ahead=1),
            "3 ahead": _rows(ahead=3),
            "256 programs": _rows(programs=256),
            "1024 programs": _rows(programs=1024),
            "sums 256": _rows(sum_programs=256),
        },
        block_cases("adaln_fwd", "adaln_fwd residual", "adaln_bwd residual", "adaln_bwd modulation"),
    ),
    "tokens and channels of gated residual and GELU": Experiment(
        {
            "32 or 64, 256 channels": _tokens(32, 64),
            "16 or 32": _tokens(16, 32),
            "64 or 128": _tokens(64, 128),
            "128 channels": _tokens(32, 64, 128),
            "512 channels": _tokens(32, 64, 512),
        },
        block_cases("gated_residual_fwd", "gated_residual_bwd gate", "bias_gelu_fwd", "bias_gelu_bwd_ output"),
    ),
    "tile of query/key norm + rope": Experiment(
        {
            "1024 x 4 warps, 2 of 8 heads": _heads(1024, 4, 2, 8),
            "512 x 4 warps, 1 of 8": _heads(512, 4, 1, 8),
            "2048 x 8 warps, 2 of 8": _heads(2048, 8, 2, 8),
            "2048 x 8 warps, 4 of 8": _heads(2048, 8, 4, 8),
            "2 of 4 heads": _heads(1024, 4, 2, 4),
            "2 of 24 heads": _heads(1024, 4, 2, 24),
        },
        block_cases(
            *(f"qk_norm_rope_{way} {form}" for form in ("two streams", "one stream") for way in ("fwd", "bwd"))
        ),
    ),
}
EXPERIMENTS = {**LOSS_EXPERIMENTS, **BLOCK_EXPERIMENTS}


# --- measuring ------------------------------------------------------------------------------------------------------


def measure_case(experiment: Experiment, case: Case, device: str) -> Iterator[tuple[str, str, Numbers]]:
    """Every choice of a case; one that cannot be launched (too much shared memory, too many registers) says why."""
    cuda = device == "cuda"
    forms, moved = case(device)
    want: list[Tensor] = []
    for name, choice in experiment.choices.items():
        if choice.gpu_only and not cuda:
            continue
        runs = forms[choice.form]
        try:
            with choice.applied():
                got = results_of(runs[0])
                want = want or got
                for result, expected in zip(got, want, strict=True):
                    # Sums in another order may round to the neighbouring number of the storage dtype.
                    rtol, atol = max(1e-3, 2 * torch.finfo(result.dtype).eps), 1e-3 * float(expected.abs().max())
                    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)
                yield name, "launch", with_bandwidth(graph_times(runs, cuda), moved)
                if experiment.from_python:
                    yield name, "from Python", call_time(runs[0], cuda)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if name == next(iter(experiment.choices)):
                raise
            yield name, "launch", {"not launched": f"{type(error).__name__}: {str(error)[:200]}"}


def results_of(run: Callable[[], Any]) -> list[Tensor]:
    """The numbers that a call gives back."""
    leaves = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]


def suite(args: argparse.Namespace) -> tuple[str, rows.Cases]:
    device, most = ("cpu", 1) if args.toy else ("cuda", None)
    return "tuning", {
        f"{name}: {case}": partial(measure_case, experiment, experiment.cases[case], device)
        for name, experiment in EXPERIMENTS.items()
        for case in [*experiment.cases][:most]
    }


if __name__ == "__main__":
    rows.main(__doc__, suite)
