"""Launch tables and candidate kernels against what the product does; docs/hopper.md has a prediction for each question.

    python benchmarks/tune.py [--only PATTERN ...]

An experiment asks one question: which setting of some constants, or which form of a kernel, is fastest, at some sizes
and dtypes. The first choice is the product's; every other one must give its results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch

import candidates
import naive
import rows
import torch
from bench_blocks import TOY
from bench_loss import LARGE, TOY_SHAPE, VIDEO, cold_calls, label
from operator_calls import BF16, FLUX_512, FLUX_1024, FP16, FP32, Size, timed_block_calls, timed_loss_calls
from rows import Measured
from timing import call_time, graph_times, rotations, with_bandwidth
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastguard.kernels import adaln, common, gated_residual, gelu, qk_norm_rope, sde_step, transition
from fastguard.kernels.common import Launch

Shape = tuple[int, ...]
Runs = list[Callable[[], Any]]
Forms = tuple[dict[str, Runs], int]
"""the runs of a case, by form, and the bytes that one of them moves"""


@dataclass(frozen=True)
class Choice:
    """Constants of modules in place of the product's, or another form of the call."""

    constants: tuple[tuple[ModuleType, str, Any], ...] = ()
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    form: str = ""
    """which of a case's runs; the only one if there is one"""
    gpu_only: bool = False
    """the interpreter knows nothing of it"""

    def applied(self) -> ExitStack:
        stack = ExitStack()
        for module, name, value in self.constants:
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(self.within())
        return stack


@dataclass(frozen=True)
class Experiment:
    """One question. Each case makes its runs on a device."""

    choices: dict[str, Choice]
    cases: Mapping[str, Callable[[str], Forms]]
    from_python: bool = False
    """also time single calls, launches included"""


def loss_case(kernel: str, shape: Shape, dtype: torch.dtype, device: str) -> Forms:
    call = timed_loss_calls(shape if device == "cuda" else TOY_SHAPE, dtype, device)[kernel]
    return {"": [each.run for each in cold_calls(call, device == "cuda")]}, call.least_bytes()


def block_case(kernel: str, size: Size, device: str) -> Forms:
    dtype, size = (BF16, size) if device == "cuda" else (FP32, TOY)
    call = timed_block_calls(size, dtype, device)[kernel]
    return {"": [each.run for each in cold_calls(call, device == "cuda")]}, call.least_bytes()


def forward_case(shape: Shape, dtype: torch.dtype, device: str) -> Forms:
    """The forward pass of the loss in two launches and in one."""
    shape = shape if device == "cuda" else TOY_SHAPE
    forms: dict[str, Runs] = {"two": [], "one, zeroed": [], "one": []}
    for seed in range(rotations(math.prod(shape) * dtype.itemsize, device == "cuda")):
        inputs = naive.make_inputs(shape, dtype, device, seed=seed)
        latents = (inputs.velocity.detach(), inputs.old_velocity, inputs.noise, None)
        args = (*latents, inputs.advantages, inputs.step.velocity_coef, inputs.step.std, inputs.step.dt)
        ticket = torch.zeros((), dtype=torch.int32, device=device)
        one = partial(candidates.guard_forward_one_launch, *args, **candidates.OPTIONS)
        forms["two"].append(partial(candidates.two_launches, *args, **candidates.OPTIONS))
        forms["one, zeroed"].append(one)
        forms["one"].append(partial(one, ticket=ticket))
    return forms, 3 * inputs.noise.nbytes


LOSS_KERNELS = ("guard_loss", "transition_bwd", "sde_step")
BATCH_8, HALF_GB = (8, 4096, 64), LARGE[0]
IMAGES = [(count, tokens, 64) for tokens in (1024, 4096) for count in (1, 8, 32)]
Places = Sequence[tuple[ModuleType, str]]


def _choices(places: Places, values: dict[str, tuple[Any, ...]]) -> dict[str, Choice]:
    """Values of the constants at these places."""
    return {
        name: Choice(tuple((*place, value) for place, value in zip(places, of_choice, strict=True)))
        for name, of_choice in values.items()
    }


def _of_loss(shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], kernels: Sequence[str]) -> dict[str, Any]:
    found = product(kernels, dtypes, shapes)
    return {f"{name}, {label(shape, dtype)}": partial(loss_case, name, shape, dtype) for name, dtype, shape in found}


def _of_blocks(*kernels: str) -> dict[str, Any]:
    sizes = (("1024^2", FLUX_1024), ("512^2", FLUX_512))
    return {f"{kernel}, {name}": partial(block_case, kernel, size) for name, size in sizes for kernel in kernels}


ADALN = [(adaln, "PROGRAMS"), (adaln, "SUM_PROGRAMS"), (adaln, "ROWS_AHEAD")]
_TILE = [(module, name) for name in ("BLOCK_C", "BLOCK_S") for module in (gated_residual, gelu)]
TOKENS = [(common, "TOKENS_PER_PROGRAM"), *_TILE]
HEADS = [(qk_norm_rope, name) for name in ("LAUNCH", "HEADS_PER_TILE", "HEADS_PER_PROGRAM")]
EXPERIMENTS = {
    "one launch or two": Experiment(
        {
            "two launches": Choice(form="two"),
            "one, counter filled each time": Choice(form="one, zeroed"),
            "one, counter kept at 0": Choice(form="one"),
            "two, the second early": Choice(form="two", within=candidates.early_epilogue, gpu_only=True),
        },
        {label(shape, BF16): partial(forward_case, shape, BF16) for shape in (*IMAGES, HALF_GB)}
        | {label(shape, FP32): partial(forward_case, shape, FP32) for shape in (BATCH_8, HALF_GB)},
        from_python=True,
    ),
    "tile of the loss and the step": Experiment(
        _choices(
            [(transition, "LAUNCH"), (sde_step, "LAUNCH")],
            {f"{block} x {warps} warps": 2 * (Launch(block, warps),)
             for block, warps in ((4096, 8), (1024, 4), (2048, 4), (2048, 8), (8192, 8), (8192, 16))},
        ),
        _of_loss([(1, 1024, 64), (8, 1024, 64), BATCH_8, HALF_GB], [BF16], LOSS_KERNELS)
        | _of_loss([BATCH_8, HALF_GB], [FP32, FP16], LOSS_KERNELS),
    ),
    "partial sums of a sample, at most": Experiment(
        _choices([(transition, "MAX_PARTIALS")], {str(most): (most,) for most in (1024, 256, 512, 2048)}),
        _of_loss([VIDEO, *LARGE], [BF16], ["guard_loss"]),
    ),
    "programs and rows ahead of adaLN": Experiment(
        _choices(ADALN, {
            "512, sums 128, 2 ahead": (512, 128, 2), "none ahead": (512, 128, 0), "1 ahead": (512, 128, 1),
            "3 ahead": (512, 128, 3), "256 programs": (256, 128, 2), "1024 programs": (1024, 128, 2),
            "sums 256": (512, 256, 2),
        }),
        _of_blocks("adaln_fwd", "adaln_fwd residual", "adaln_bwd residual", "adaln_bwd modulation"),
    ),
    "tokens and channels of gated residual and GELU": Experiment(
        _choices(TOKENS, {
            "32 or 64, 256 channels": ((32, 64), 256, 256, 16, 16), "16 or 32": ((16, 32), 256, 256, 16, 16),
            "64 or 128": ((64, 128), 256, 256, 16, 16), "128 channels": ((32, 64), 128, 128, 32, 32),
            "512 channels": ((32, 64), 512, 512, 8, 8),
        }),
        _of_blocks("gated_residual_fwd", "gated_residual_bwd gate", "bias_gelu_fwd", "bias_gelu_bwd_ output"),
    ),
    "tile of query/key norm + rope": Experiment(
        _choices(HEADS, {
            "1024 x 4 warps, 2 of 8 heads": (Launch(1024, 4), 2, 8), "512 x 4 warps, 1 of 8": (Launch(512, 4), 1, 8),
            "2048 x 8 warps, 2 of 8": (Launch(2048, 8), 2, 8), "2048 x 8 warps, 4 of 8": (Launch(2048, 8), 4, 8),
            "2 of 4 heads": (Launch(1024, 4), 2, 4), "2 of 24 heads": (Launch(1024, 4), 2, 24),
        }),
        _of_blocks("qk_norm_rope_fwd two streams", "qk_norm_rope_bwd two streams", "qk_norm_rope_fwd one stream",
                   "qk_norm_rope_bwd one stream"),
    ),
}  # fmt: skip


def measure_case(experiment: Experiment, case: Callable[[str], Forms], device: str) -> Measured:
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
                leaves = [leaf for leaf in tree_leaves(runs[0]()) if isinstance(leaf, Tensor)]
                got = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]
                for result, expected in zip(got, want or got, strict=True):
                    # Sums in another order may round to the neighbouring number of the storage dtype.
                    rtol, atol = max(1e-3, 2 * torch.finfo(result.dtype).eps), 1e-3 * float(expected.abs().max())
                    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)
                yield name, "launch", with_bandwidth(graph_times(runs, cuda), moved)
                if experiment.from_python:
                    yield name, "from Python", call_time(runs[0], cuda)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not want:
                raise
            yield name, "launch", {"not launched": f"{type(error).__name__}: {str(error)[:200]}"}
        want = want or got


def suite(args: argparse.Namespace) -> tuple[str, rows.Cases]:
    device, most = ("cpu", 1) if args.toy else ("cuda", None)
    return "tuning", {
        f"{name}: {case}": partial(measure_case, experiment, experiment.cases[case], device)
        for name, experiment in EXPERIMENTS.items()
        for case in [*experiment.cases][:most]
    }


if __name__ == "__main__":
    rows.main(__doc__, suite)
