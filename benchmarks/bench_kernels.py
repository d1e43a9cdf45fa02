"""The kernels of the loss and of the rollout's step on a GPU, beside textbook code, torch.compile of it, and copying.

    python benchmarks/bench_kernels.py [--save] [--resume] [--minutes N]

Kernels are timed as CUDA graphs of many launches, each with inputs and outputs of its own, which together are larger
than the L2 cache; the copy bandwidth of the device is measured in the same run, with tensors of the same size. The
loss and its gradient are checked against float64 before a shape is timed. `--dry-run` walks the path on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import program
import results
import textbook
import torch
from bench_transition import assert_correct
from textbook import Inputs
from timing import call_times, copy_times, graph_times, peak_bytes, rotations, with_bandwidth

import fastguard as fg
from fastguard import ops
from fastguard.loss.checks import build_options

SECTION = "kernels"
TOKENS_512, TOKENS_1024 = (1024, 64), (4096, 64)
BATCHES = (1, 2, 4, 8, 16, 32)
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"Flux 512^2, batch {count}": (count, *TOKENS_512) for count in BATCHES},
    **{f"Flux 1024^2, batch {count}": (count, *TOKENS_1024) for count in BATCHES},
    "video latent": (1, 16, 21, 90, 160),
    "256 MB a tensor": (8, 2**24),
    "1 GB a tensor": (8, 2**26),
}
KERNELS = ("loss forward", "loss backward", "sde_step")
CONTENDERS = ("fused", "compiled", "textbook")


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

    def forward() -> Any:
        return ops.guard_loss(*arguments, *per_sample, *options)

    def backward() -> Any:
        return ops.transition_bwd(
            one, coefs, inputs.noise, None, None, None, velocity.dtype, False, False, options.backend
        )

    def sde_step() -> Any:
        return fg.sde_step(inputs.latents, velocity, step, seeds=inputs.seeds)

    return dict(zip(KERNELS, ((forward, 3 * size), (backward, 2 * size), (sde_step, 4 * size)), strict=True))


def both(loss: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(loss(inputs), inputs.velocity)


def fused_step(inputs: Inputs) -> Any:
    return fg.sde_step(inputs.latents, inputs.velocity, inputs.step, seeds=inputs.seeds)


def measured(measure: Callable[..., Any], work: Any, *rest: Any) -> Any:
    """A number, or that there was no room for it."""
    try:
        return measure(work, *rest)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"


def measure_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Kernels, losses and steps of a shape; what does not fit is recorded as such."""
    cuda = device == "cuda"
    torch._dynamo.reset()  # each shape compiles anew; past 8 of one function, torch.compile would fall back to eager
    backend = "inductor" if cuda else "eager"
    elements = torch.Size(shape).numel()
    tensor_bytes = elements * dtype.itemsize
    sets = [textbook.make_inputs(shape, dtype, device, seed=seed) for seed in range(rotations(tensor_bytes, cuda))]
    losses = loss_forms(backend)
    assert_correct(sets[0], losses)
    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype), "rotated_sets": len(sets)}
    row["copy"] = copy_times([inputs.noise for inputs in sets], cuda)
    kernels = [kernel_runs(inputs) for inputs in sets]
    for name, (_, bytes_per_element) in kernels[0].items():
        runs = [of_set[name][0] for of_set in kernels]
        row[name] = with_bandwidth(graph_times(runs, cuda), bytes_per_element * elements)
        row[name]["of_copy"] = row[name]["gb_per_s"] / row["copy"]["gb_per_s"]
    del kernels, runs
    fewer = sets[: rotations(3 * tensor_bytes, cuda)]  # a loss reads three such tensors at least
    steps: dict[str, Callable[[Inputs], Any]] = {"fused": fused_step, "textbook": textbook.sde_step}
    steps["compiled"] = torch.compile(textbook.sde_step, dynamic=False, backend=backend)
    for name in CONTENDERS:
        loss, step = losses[name], steps[name]
        row[f"{name} loss"] = {
            "forward": measured(graph_times, [partial(loss, i) for i in fewer], cuda),
            "both": measured(graph_times, [both(loss, i) for i in fewer], cuda),
            "both_from_python": measured(call_times, both(loss, sets[0]), cuda),
            "peak_new_bytes": measured(peak_bytes, both(loss, sets[0]), cuda),
            "kept_bytes": measured(textbook.kept_bytes, loss, sets[0]),
        }
        row[f"{name} step"] = {
            "graph": measured(graph_times, [partial(step, i) for i in fewer], cuda),
            "from_python": measured(call_times, partial(step, sets[0]), cuda),
        }
    return row


def loss_forms(backend: str) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    compiled = torch.compile(textbook.guard_loss, dynamic=False, backend=backend)
    return {"fused": textbook.fused_guard_loss, "compiled": compiled, "textbook": textbook.guard_loss}


def us(times: dict[str, float] | str) -> str:
    return f"{times:>12}" if isinstance(times, str) else f"{times['p50_us']:12.2f}"


def describe(label: str, row: dict[str, Any]) -> str:
    """A shape's numbers as text."""
    lines = [f"\n{label} {tuple(row['shape'])} {row['dtype']}", f"  {'copy':20} {us(row['copy'])} us"]
    lines[-1] += f" {row['copy']['gb_per_s']:8.0f} GB/s"
    for name in KERNELS:
        lines.append(f"  {name:20} {us(row[name])} us {row[name]['gb_per_s']:8.0f} GB/s {row[name]['of_copy']:5.0%}")
    lines.append(f"  {'us':20} {'forward':>12} {'both':>12} {'from Python':>12} {'step':>12} {'from Python':>12}")
    for name in CONTENDERS:
        loss, step = row[f"{name} loss"], row[f"{name} step"]
        cells = (loss["forward"], loss["both"], loss["both_from_python"], step["graph"], step["from_python"])
        lines.append(f"  {name:20} {' '.join(us(cell) for cell in cells)}")
    return "\n".join(lines)


def main() -> str | None:
    parser = program.parser(__doc__)
    program.add_arguments(parser)
    args = parser.parse_args()
    if args.dry_run:
        program.interpret_kernels()
    program.check_arguments(parser, args)
    device, dtype = ("cpu", torch.float32) if args.dry_run else ("cuda", torch.bfloat16)
    shapes = {"toy": (2, 16, 64)} if args.dry_run else SHAPES
    run = results.Run(SECTION, args)

    def row_of(label: str) -> dict[str, Any]:
        if not args.dry_run:
            torch.cuda.empty_cache()
        row = measure_shape(shapes[label], dtype, device)
        print(describe(label, row), flush=True)
        return row

    run.measure(shapes, row_of)
    return run.finish()


if __name__ == "__main__":
    program.run(main)
