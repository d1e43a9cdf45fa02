"""Launch tables and candidate kernels against what the product does; docs/hopper.md has a prediction for each question.

    python benchmarks/tune.py [--only PATTERN ...] [--save] [--resume] [--minutes N]

An experiment asks one question: which setting of some constants, or which form of a kernel, is fastest, at some sizes
and dtypes. The first choice is the product's; every other one must give its results. plot.py puts the times under the
predictions. `--dry-run` walks the path on a CPU, in Triton's interpreter: a case of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import bench_flux_block
import candidates
import program
import results
import textbook
import torch
from bench_flux_block import FLUX, SMALL, Call, Size
from bench_kernels import SHAPES, kernel_runs
from timing import call_times, graph_times, rotations, with_bandwidth
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastguard.kernels import adaln, common, gated_residual, gelu, qk_norm_rope, sde_step, transition
from fastguard.kernels.common import Launch

SECTION = "tuning"
# A choice is better if it is faster by more than this, and by more than the spread (p20 to p80) of both.
MARGIN = 0.02
Runs = list[Callable[[], Any]]
FLUX_512 = Size(image=1024, text=512, heads=24, head_dim=128, rank=64)


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
    """One question. A case makes its runs, by form, and counts the bytes that one of them moves."""

    choices: dict[str, Choice]
    cases: dict[str, Callable[[str], tuple[dict[str, Runs], int]]]
    from_python: bool = False
    """also time single calls, launches included"""


# --- the loss and the step ------------------------------------------------------------------------------------------


def loss_inputs(label: str, dtype: torch.dtype, device: str) -> list[textbook.Inputs]:
    """As many sets as it takes to find each cold. A toy size on the CPU."""
    cuda = device == "cuda"
    shape = SHAPES[label] if cuda else (2, 16, 64)
    count = rotations(math.prod(shape) * dtype.itemsize, cuda)
    return [textbook.make_inputs(shape, dtype, device, seed=seed) for seed in range(count)]


def loss_case(label: str, dtype: torch.dtype, kernel: str, device: str) -> tuple[dict[str, Runs], int]:
    """One kernel as the product launches it."""
    sets = loss_inputs(label, dtype, device)
    kernels = [kernel_runs(inputs)[kernel] for inputs in sets]
    return {"": [run for run, _ in kernels]}, kernels[0][1] * sets[0].noise.numel()


def forward_case(label: str, dtype: torch.dtype, device: str) -> tuple[dict[str, Runs], int]:
    """The forward pass of the loss in two launches and in one."""
    sets = loss_inputs(label, dtype, device)
    options: dict[str, Any] = {
        "invert_weight": True, "objective": "grpo_guard", "log_clip": (-2e-6, 2e-6), "adv_clip": 5.0,
        "kl_threshold": 0.0, "kl_weight": 0.0, "velocity_kl": False, "reduction": "mean",
    }  # fmt: skip
    forms: dict[str, Runs] = {"two": [], "one, zeroed": [], "one": []}
    for inputs in sets:
        step = inputs.step
        latents = (inputs.velocity.detach(), inputs.old_velocity, inputs.noise, None)
        per_sample = (inputs.advantages, step.velocity_coef, step.std, step.dt)
        ticket = torch.zeros((), dtype=torch.int32, device=device)
        one = partial(candidates.guard_forward_one_launch, *latents, *per_sample, **options)
        forms["two"].append(partial(_two_launches, latents, per_sample, options))
        forms["one, zeroed"].append(one)
        forms["one"].append(partial(one, ticket=ticket))
    return forms, 3 * sets[0].noise.nbytes


def _two_launches(latents: Any, per_sample: Any, options: dict[str, Any]) -> Any:
    partials = transition.transition_partials(*latents, from_means=False)
    return transition.guard_epilogue(partials, *per_sample, latents[0][0].numel(), **options)


def _loss_launch(block: int, num_warps: int) -> Choice:
    launch = Launch(block, num_warps)
    return Choice(((transition, "LAUNCH", launch), (sde_step, "LAUNCH", launch)))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IMAGES = [f"Flux {size}^2, batch {count}" for size in (512, 1024) for count in (1, 8, 32)]
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def _loss_cases(labels: Sequence[str], dtypes: Sequence[torch.dtype], kernels: Sequence[str]) -> dict[str, Any]:
    return {
        f"{kernel}, {label}, {NAMES[dtype]}": partial(loss_case, label, dtype, kernel)
        for kernel in kernels
        for dtype in dtypes
        for label in labels
    }


ALL_KERNELS = ("loss forward", "loss backward", "sde_step")
WIDER = ["Flux 1024^2, batch 8", "256 MB a tensor"]
LOSS_EXPERIMENTS = {
    "one launch or two": Experiment(
        {
            "two launches": Choice(form="two"),
            "one, counter filled each time": Choice(form="one, zeroed"),
            "one, counter kept at 0": Choice(form="one"),
            "two, the second early": Choice(form="two", within=candidates.early_epilogue, gpu_only=True),
        },
        {
            f"{label}, {NAMES[dtype]}": partial(forward_case, label, dtype)
            for dtype, labels in ((BF16, [*IMAGES, "256 MB a tensor"]), (FP32, WIDER))
            for label in labels
        },
        from_python=True,
    ),
    "tile of the loss and the step": Experiment(
        {
            "4096 x 8 warps": _loss_launch(4096, 8),
            "1024 x 4 warps": _loss_launch(1024, 4),
            "2048 x 4 warps": _loss_launch(2048, 4),
            "2048 x 8 warps": _loss_launch(2048, 8),
            "8192 x 8 warps": _loss_launch(8192, 8),
            "8192 x 16 warps": _loss_launch(8192, 16),
        },
        {
            **_loss_cases(["Flux 512^2, batch 1", "Flux 512^2, batch 8", *WIDER], [BF16], ALL_KERNELS),
            **_loss_cases(WIDER, [FP32, FP16], ALL_KERNELS),
        },
    ),
    "partial sums of a sample, at most": Experiment(
        {str(most): Choice(((transition, "MAX_PARTIALS", most),)) for most in (1024, 256, 512, 2048)},
        _loss_cases(["video latent", "256 MB a tensor", "1 GB a tensor"], [BF16], ["loss forward"]),
    ),
}


# --- the blocks of Flux ---------------------------------------------------------------------------------------------


def flux_case(size: Size, kernel: str, device: str) -> tuple[dict[str, Runs], int]:
    """One kernel of a Flux block, as the product launches it."""
    dtype, size = (BF16, size) if device == "cuda" else (FP32, SMALL)
    token_bytes = (size.image + size.text) * size.width * dtype.itemsize
    sets: list[Call] = [
        bench_flux_block.kernel_calls(size, dtype, device)[kernel]
        for _ in range(rotations(token_bytes, device == "cuda"))
    ]
    return {"": [call.run for call in sets]}, sets[0].least


def _flux_cases(kernels: Sequence[str]) -> dict[str, Any]:
    sizes = {"1024^2": FLUX, "512^2": FLUX_512}
    return {f"{kernel}, {label}": partial(flux_case, sizes[label], kernel) for label in sizes for kernel in kernels}


def _rows(programs: int = 512, sum_programs: int = 128, ahead: int = 2) -> Choice:
    return Choice(((adaln, "PROGRAMS", programs), (adaln, "SUM_PROGRAMS", sum_programs), (adaln, "ROWS_AHEAD", ahead)))


def _tokens(short: int, long: int, channels: int = 256) -> Choice:
    tile = [(module, name, value) for module in (gated_residual, gelu)
            for name, value in (("BLOCK_C", channels), ("BLOCK_S", 4096 // channels))]  # fmt: skip
    return Choice(((common, "TOKENS_PER_PROGRAM", (short, long)), *tile))


def _heads(block: int, num_warps: int, per_tile: int, per_program: int) -> Choice:
    launch = ((qk_norm_rope, "LAUNCH", Launch(block, num_warps)), (qk_norm_rope, "HEADS_PER_TILE", per_tile))
    return Choice((*launch, (qk_norm_rope, "HEADS_PER_PROGRAM", per_program)))


FLUX_EXPERIMENTS = {
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
        _flux_cases(
            [
                "adaln forward",
                "gated residual + adaln forward",
                "gated residual + adaln backward",
                "the same with gradients of the modulation",
            ]
        ),
    ),
    "tokens and channels of gated residual and GELU": Experiment(
        {
            "32 or 64, 256 channels": _tokens(32, 64),
            "16 or 32": _tokens(16, 32),
            "64 or 128": _tokens(64, 128),
            "128 channels": _tokens(32, 64, 128),
            "512 channels": _tokens(32, 64, 512),
        },
        _flux_cases(
            [
                "gated residual forward",
                "the same with the gradient of the gate",
                "bias + GELU forward",
                "bias + GELU backward and recompute",
            ]
        ),
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
        _flux_cases(
            [
                "norm + rope, two streams, forward",
                "norm + rope, two streams, backward",
                "norm + rope, one stream, forward",
                "norm + rope, one stream, backward",
            ]
        ),
    ),
}
EXPERIMENTS = {**LOSS_EXPERIMENTS, **FLUX_EXPERIMENTS}


# --- measuring ------------------------------------------------------------------------------------------------------


def measure_case(experiment: Experiment, case: str, device: str) -> dict[str, Any]:
    """Every choice of a case; one that cannot be launched (too much shared memory, too many registers) says why."""
    cuda = device == "cuda"
    forms, moved = experiment.cases[case](device)
    row: dict[str, Any] = {}
    want = None
    for name, choice in experiment.choices.items():
        if choice.gpu_only and not cuda:
            row[name] = "needs a GPU"
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
                row[name] = with_bandwidth(graph_times(runs, cuda), moved)
                if experiment.from_python:
                    row[name]["from_python"] = call_times(runs[0], cuda)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if name == next(iter(experiment.choices)):
                raise
            row[name] = f"{type(error).__name__}: {str(error)[:200]}"
    row["best"] = best(row, next(iter(experiment.choices)))
    return row


def results_of(run: Callable[[], Any]) -> list[Tensor]:
    """The numbers that a call gives back."""
    leaves = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]


def best(row: dict[str, Any], incumbent: str) -> str:
    """The fastest choice, if it beats the incumbent by more than noise and `MARGIN`; else the incumbent."""
    measured = {name: times for name, times in row.items() if isinstance(times, dict)}
    fastest = min(measured, key=lambda name: measured[name]["p50_us"])
    ours, theirs = measured[incumbent], measured[fastest]
    clear = theirs["p80_us"] < ours["p20_us"] and theirs["p50_us"] < (1 - MARGIN) * ours["p50_us"]
    return fastest if clear else incumbent


def describe(name: str, row: dict[str, Any]) -> str:
    lines = [f"\n{name}"]
    for choice, times in row.items():
        if isinstance(times, dict):
            python = f"   from Python {times['from_python']['p50_us']:8.1f} us" if "from_python" in times else ""
            lines.append(f"  {choice:32} {times['p50_us']:10.2f} us {times['gb_per_s']:7.0f} GB/s{python}")
        elif choice != "best":
            lines.append(f"  {choice:32} {times}")
    return "\n".join([*lines, f"  best: {row['best']}"])


def main() -> str | None:
    parser = program.parser(__doc__)
    names = "; ".join(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help=f"some of the experiments: {names}")
    program.add_arguments(parser)
    args = parser.parse_args()
    if args.dry_run:
        program.interpret_kernels()
    try:
        chosen = program.chosen(EXPERIMENTS, args.only, "--only")
    except ValueError as error:
        parser.error(str(error))
    program.check_arguments(parser, args)
    run = results.Run(SECTION, args)
    most = 1 if args.dry_run else None
    cases = {
        f"{name}: {case}": (EXPERIMENTS[name], case) for name in chosen for case in [*EXPERIMENTS[name].cases][:most]
    }

    def row_of(name: str) -> dict[str, Any]:
        if not args.dry_run:
            torch.cuda.empty_cache()
        row = measure_case(*cases[name], "cpu" if args.dry_run else "cuda")
        print(describe(name, row), flush=True)
        return row

    run.measure(cases, row_of)
    return run.finish()


if __name__ == "__main__":
    program.run(main)
