"""Everything that needs a GPU, in one command: tests, all kernels with their baselines, Flux blocks, a training step.

    python benchmarks/gpu_suite.py [--out DIR] [--skip-tests] [--skip-train-step]

Refuses to time anything while a test is red. Kernels are timed as CUDA graphs of many launches, each with inputs and
outputs of its own, which together are larger than the L2 cache; the copy bandwidth of the device, the textbook formula
and torch.compile of it are measured in the same run. Saved after every shape, in
benchmarks/results/<gpu>/<date>_<commit>.json. Needs the `bench` extra.

Then bench_flux_block.py times the Flux kernels and blocks, and bench_train_step.py trains the whole of Flux with random
weights, each in a process of its own; the latter needs 80 GB and the `lowbit` extra, and each of its cases has 5
minutes at most. `--dry-run` walks the whole path on a CPU at toy sizes and saves nothing.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import results
import textbook
import torch
from textbook import Inputs
from timing import ROTATED_BYTES, call_times, graph_times, with_bandwidth

import fastguard as fg
from fastguard import ops
from fastguard.checks import build_options

LOSS_TESTS = ("golden", "transition", "step", "loss")
FLUX_TESTS = ("adaln", "gated_residual", "qk_norm_rope", "gelu", "fuse_flux")
KERNEL_TESTS = [f"tests/test_{name}.py" for name in (*LOSS_TESTS, *FLUX_TESTS)]
TOKENS_512, TOKENS_1024 = (1024, 64), (4096, 64)
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"Flux 512^2, batch {count}": (count, *TOKENS_512) for count in (1, 8, 32)},
    **{f"Flux 1024^2, batch {count}": (count, *TOKENS_1024) for count in (1, 8, 32)},
    "video latent": (1, 16, 21, 90, 160),
    "256 MB a tensor": (8, 2**24),
    "1 GB a tensor": (8, 2**26),
}
MAX_LOSS_SETS = 64  # for whole losses, whose textbook form makes a graph of some 60 nodes of each set


def kernel_runs(inputs: Inputs) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each kernel alone, with the bytes of latents that it moves per element (counted, as in h100_code.py)."""
    size = inputs.noise.element_size()
    step, velocity = inputs.step, inputs.velocity.detach()
    options = build_options(
        velocity, "grpo_guard", textbook.CLIP_RANGE, 5.0, 1e-5, False, 0.0, "gaussian", True, "mean", "auto",
        ref_name="ref_velocity",
    )  # fmt: skip
    arguments = (velocity, inputs.old_velocity, inputs.noise, None, inputs.advantages)
    per_sample = (step.velocity_coef, step.std, step.dt)
    _, _, coefs, _ = ops.guard_loss(*arguments, *per_sample, *options)
    one = torch.ones((), device=velocity.device)
    seeds = torch.arange(len(velocity), device=velocity.device)

    def forward() -> Any:
        return ops.guard_loss(*arguments, *per_sample, *options)

    def backward() -> Any:
        return ops.transition_bwd(
            one, coefs, inputs.noise, None, None, None, velocity.dtype, False, False, options.backend
        )

    def sde_step() -> Any:
        return fg.sde_step(inputs.latents, velocity, step, seeds=seeds)

    return {
        "loss forward": (forward, 3 * size),
        "loss backward": (backward, 2 * size),
        "sde_step": (sde_step, 4 * size),
    }


def both(loss: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(inputs), inputs.velocity)


def measure_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """One row per kernel and per loss of a shape; a loss that does not fit is recorded as such."""
    cuda = device == "cuda"
    torch._dynamo.reset()  # each shape compiles anew; past 8 of one function, torch.compile would fall back to eager
    elements = torch.Size(shape).numel()
    count = max(1, math.ceil(ROTATED_BYTES / (elements * dtype.itemsize))) if cuda else 2
    sets = [textbook.make_inputs(shape, dtype, device, seed=seed) for seed in range(count)]
    rows: dict[str, Any] = {"shape": shape, "dtype": str(dtype), "rotated_sets": count}
    source = sets[0].noise
    target = [torch.empty_like(source) for _ in sets]
    copies = [partial(out.copy_, inputs.noise) for inputs, out in zip(sets, target, strict=True)]
    rows["copy"] = with_bandwidth(graph_times(copies, cuda), 2 * elements * dtype.itemsize)
    kernels = [kernel_runs(inputs) for inputs in sets]
    for name, (_, bytes_per_element) in kernels[0].items():
        runs = [of_set[name][0] for of_set in kernels]
        rows[name] = with_bandwidth(graph_times(runs, cuda), bytes_per_element * elements)
        rows[name]["of_copy"] = rows[name]["gb_per_s"] / rows["copy"]["gb_per_s"]
    compiled = torch.compile(textbook.guard_loss, dynamic=False, backend="inductor" if cuda else "eager")
    losses = {"fused": textbook.fused_guard_loss, "compiled": compiled, "textbook": textbook.guard_loss}
    for name, loss in losses.items():
        for label, measure in (
            ("forward + backward", lambda loss=loss: graph_times([both(loss, i) for i in sets[:MAX_LOSS_SETS]], cuda)),
            ("forward + backward, called from Python", lambda loss=loss: call_times(both(loss, sets[0]), cuda)),
        ):
            try:
                rows[f"{name} {label}"] = measure()
            except torch.OutOfMemoryError:
                rows[f"{name} {label}"] = "out of memory"
    return rows


def run_tests() -> None:
    """All kernel tests on the device; nothing is reported while one is red."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *KERNEL_TESTS]
    if subprocess.run(command, cwd=results.ROOT, check=False).returncode:
        sys.exit("gpu_suite: the kernel tests failed; no timings are reported")


def run_benchmark(name: str, out: Path, dry_run: bool) -> bool:
    """Another benchmark in a process that finds the GPU empty; whether it went through."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    mode = ["--dry-run"] if dry_run else ["--save", "--out", str(out)]
    command = [sys.executable, str(Path(__file__).with_name(name)), *mode]
    print(f"\n{' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=results.ROOT, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result files")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing; for work on the suite itself")
    parser.add_argument("--skip-train-step", action="store_true", help="kernels only; any GPU will do")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, nothing saved")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit("gpu_suite needs a CUDA device, and torch sees none; --dry-run walks the path on the CPU")
    if not (args.skip_tests or args.dry_run):
        run_tests()

    device, dtype = ("cpu", torch.float32) if args.dry_run else ("cuda", torch.bfloat16)
    shapes = {"toy": (2, 16, 64)} if args.dry_run else SHAPES
    env, table = results.environment(), {}
    for label, shape in shapes.items():
        table[label] = measure_shape(shape, dtype, device)
        print(f"\n{label} {shape} {dtype}")
        for name, row in table[label].items():
            if isinstance(row, dict):
                speed = f"{row['gb_per_s']:8.0f} GB/s" if "gb_per_s" in row else ""
                print(f"  {name:46} {row['p50_us']:12.2f} us  {speed}")
            elif isinstance(row, str) and row == "out of memory":
                print(f"  {name:46} {row}")
        if not args.dry_run:
            torch.cuda.empty_cache()
            path = results.save("kernels", env, {"shapes": table}, args.out)
    if not args.dry_run:
        print(f"\nsaved {path}")
    if not run_benchmark("bench_flux_block.py", args.out.resolve(), args.dry_run):
        sys.exit("gpu_suite: the Flux blocks failed, as said above")
    if not args.skip_train_step and not run_benchmark("bench_train_step.py", args.out.resolve(), args.dry_run):
        sys.exit("gpu_suite: the training step failed, as said above; --skip-train-step leaves it out")


if __name__ == "__main__":
    main()
