"""The fused loss against the textbook float32 formula, eager and under torch.compile.

    pytest benchmarks/bench_transition.py            forward, backward and both, by pytest-benchmark
    python benchmarks/bench_transition.py [--save]   the summary: exactness, memory, and time ratios of one run

Runs on the CPU, or on a GPU where there is one. Correctness is asserted before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import results
import textbook
import torch
from textbook import SHAPES, Inputs
from timing import peak_bytes
from torch import Tensor

import fastguard as fg

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "textbook": textbook.guard_loss,
    "compiled": torch.compile(textbook.guard_loss, dynamic=False),
    "fused": textbook.fused_guard_loss,
}


def exact_log_ratio(inputs: Inputs) -> Tensor:
    """RatioNorm in float64, from the same velocities and noise."""
    step = inputs.step
    velocity, old, noise = (t.detach().double() for t in (inputs.velocity, inputs.old_velocity, inputs.noise))
    exact = fg.Transition(step.kind, step.latents_coef, step.velocity_coef.double(), step.std.double(), step.dt)
    return exact.std * fg.transition_moments(velocity, old, noise, exact, backend="torch").cross


def assert_correct(inputs: Inputs, losses: dict[str, Callable[[Inputs], Tensor]]) -> None:
    """The loss and gradient of each contender agree with float64 before anything is timed.

    Samples this near the edge of the clip are left out: the textbook's log-ratio is too inexact to decide them.
    """
    velocity, old, noise = (t.detach().double() for t in (inputs.velocity, inputs.old_velocity, inputs.noise))
    velocity.requires_grad_()
    advantages = inputs.advantages.double()
    exact = fg.guard_loss(
        velocity, old, noise, advantages, inputs.step, clip_range=textbook.CLIP_RANGE, backend="torch"
    )
    (exact_grad,) = torch.autograd.grad(exact.loss, velocity)
    sure = (exact.log_ratio.abs() - textbook.CLIP_RANGE).abs() > 5e-7
    # Gradients are rounded to the storage dtype; the textbook's also carries the rounding of its float32 means.
    rtol = max(torch.finfo(inputs.velocity.dtype).eps, 1e-4)
    for name, loss in losses.items():
        value = loss(inputs)
        (grad,) = torch.autograd.grad(value, inputs.velocity)
        torch.testing.assert_close(value.double(), exact.loss.detach(), rtol=1e-5, atol=0, msg=f"{name}: loss")
        off = (grad.double() - exact_grad).abs().flatten(1).amax(1)[sure]
        worst = float(off.max() / exact_grad.abs().max())
        assert worst < rtol, f"{name}: gradient off by {worst:.1e}"


def forward(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """As in training: a graph is built."""
    return loss(inputs)


def both(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    torch.autograd.grad(loss(inputs), inputs.velocity)


def synchronized(run: Callable[..., Any]) -> Callable[..., None]:
    def wrapped(*args: Any) -> None:
        run(*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return wrapped


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
def test_loss(benchmark: Any, shape: tuple[int, ...], name: str, phase: str) -> None:
    inputs, loss = textbook.make_inputs(shape, DTYPE, DEVICE), LOSSES[name]
    assert_correct(inputs, LOSSES)
    benchmark.group = f"{phase} {shape} {DTYPE} {DEVICE}"
    benchmark.extra_info["bytes_kept_for_backward"] = textbook.kept_bytes(loss, inputs)
    if phase == "backward":
        # Every round differentiates a graph of its own, built outside the clock.
        run = synchronized(lambda value: torch.autograd.grad(value, inputs.velocity))
        benchmark.pedantic(run, setup=lambda: ((loss(inputs),), {}), rounds=30, warmup_rounds=5)
        return
    work = {"forward": forward, "both": both}[phase]
    benchmark.extra_info["peak_new_bytes"] = peak_bytes(lambda: work(loss, inputs), DEVICE == "cuda")
    benchmark.pedantic(synchronized(work), args=(loss, inputs), rounds=30, warmup_rounds=5)


# --- the summary ----------------------------------------------------------------------------------------------------


def exactness() -> dict[str, float]:
    """Largest error of the log-ratio at D = 65,536 and a velocity change of 1e-3, float32, over 8 x 4 samples."""
    errors: dict[str, list[float]] = {"fused": [], "textbook": [], "size of the log-ratio": []}
    for seed in range(8):
        inputs = textbook.make_inputs((4, 1024, 64), torch.float32, DEVICE, change=1e-3, seed=seed)
        truth = exact_log_ratio(inputs)
        result = fg.guard_loss(
            inputs.velocity, inputs.old_velocity, inputs.noise, inputs.advantages, inputs.step, reduction="none"
        )
        errors["fused"].append(float((result.log_ratio.double() - truth).abs().max()))
        errors["textbook"].append(float((textbook.log_ratio(inputs).detach().double() - truth).abs().max()))
        errors["size of the log-ratio"].append(float(truth.abs().max()))
    return {name: max(values) for name, values in errors.items()}


def interleaved_ms(shape: tuple[int, ...], rounds: int = 12, block: int = 10) -> dict[str, dict[str, float]]:
    """Forward + backward of each loss in blocks by turns, so that a drift of the machine meets all alike."""
    inputs = textbook.make_inputs(shape, DTYPE, DEVICE)
    assert_correct(inputs, LOSSES)
    run = synchronized(both)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            time.sleep(0.05)  # until the threads of the block before have stopped spinning
            for index in range(-5, block):
                start = time.perf_counter()
                run(loss, inputs)
                if index >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    table = {}
    for name, values in times.items():
        quantiles = statistics.quantiles(values, n=10)
        table[name] = {
            "p20_ms": quantiles[1],
            "p50_ms": quantiles[4],
            "p80_ms": quantiles[7],
            "times_fused": quantiles[4] / statistics.median(times["fused"]),
            "peak_new_bytes": peak_bytes(partial(both, LOSSES[name], inputs), DEVICE == "cuda"),
            "bytes_kept_for_backward": textbook.kept_bytes(LOSSES[name], inputs),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="append the numbers to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(f"{results.environment()['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {DTYPE}")

    errors = exactness()
    print("\nerror of the log-ratio against float64, D = 65,536, velocity change 1e-3, float32 (largest of 32)")
    for name, error in errors.items():
        print(f"  {name:24} {error:.1e}")

    timings = {}
    print(f"\nforward + backward\n{'':27} p20 ms  p50 ms  p80 ms  x fused   peak new bytes   kept for backward")
    for shape in SHAPES:
        label = "x".join(map(str, shape))
        timings[label] = interleaved_ms(shape)
        for name, row in timings[label].items():
            times = "  ".join(f"{row[f'p{p}_ms']:6.2f}" for p in (20, 50, 80))
            memory = f"{row['peak_new_bytes']:15,}  {row['bytes_kept_for_backward']:18,}"
            print(f"{label:16} {name:10} {times}  {row['times_fused']:7.1f}  {memory}")
    if args.save:
        numbers = {"log_ratio_error": errors, "forward_backward": timings, "dtype": str(DTYPE)}
        path = results.save("loss", results.environment(), numbers)
        print(f"\nsaved {path}")


if __name__ == "__main__":
    main()
