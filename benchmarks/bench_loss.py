"""The loss and the rollout's step against the naive formula, eager and under torch.compile, and against copying.

    python benchmarks/bench_loss.py      on the GPU, or on the CPU where there is none
    pytest benchmarks/bench_loss.py      forward, backward and both, by pytest-benchmark

On a GPU, times are of CUDA graphs of many launches, each with inputs and outputs of its own, which together are larger
than the L2 cache. "from Python" is a plain call, launches included. Loss and gradient are checked against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import naive
import pytest
import rows
import torch
from naive import Inputs
from operator_calls import BF16, FP32, NAMES, Call, assert_agrees, timed_loss_calls
from rows import Measured, Numbers
from timing import attempt, call_time, call_times, copy_times, graph_times, peak_bytes, rotations, with_bandwidth
from torch import Tensor

import fastguard as fg

# (B, tokens, channels) of Flux latents at 512^2 and 1024^2, a video latent, and 256 MB and 1 GB a tensor in bf16.
VIDEO, LARGE = (1, 16, 21, 90, 160), ((8, 2**24), (8, 2**26))
BATCHES = (1, 2, 4, 8, 16, 32)
GPU_SHAPES = [*((count, tokens, 64) for tokens in (1024, 4096) for count in BATCHES), VIDEO, *LARGE]
CPU_SHAPES = [(4, 1024, 64), (4, 4096, 64), (8, 4096, 64), VIDEO]
TOY_SHAPE = (2, 16, 64)
EXACTNESS = "log-ratio at D = 65,536"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", BF16) if CUDA else ("cpu", FP32)


def label(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))} {NAMES[dtype]}"


def loss_forms(backend: str = "inductor") -> dict[str, Callable[[Inputs], Tensor]]:
    torch._dynamo.reset()  # each shape compiles anew; past 8 of one function, torch.compile would fall back to eager
    compiled = torch.compile(naive.guard_loss, dynamic=False, backend=backend)
    return {"naive": naive.guard_loss, "compiled": compiled, "fused": naive.fused_guard_loss}


def fused_step(inputs: Inputs) -> Any:
    return fg.sde_step(inputs.latents, inputs.velocity, inputs.step, seeds=inputs.seeds)


def both(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Any:
    """Forward and backward."""
    return torch.autograd.grad(loss(inputs), inputs.velocity)


def assert_correct(inputs: Inputs, losses: dict[str, Callable[[Inputs], Tensor]]) -> None:
    """The loss and gradient of each contender agree with float64.

    Samples this near the edge of the clip are left out: the naive log-ratio is too inexact to decide them.
    """
    velocity, old, noise = (t.detach().double() for t in (inputs.velocity, inputs.old_velocity, inputs.noise))
    velocity.requires_grad_()
    exact = fg.guard_loss(
        velocity, old, noise, inputs.advantages.double(), inputs.step, clip_range=naive.CLIP_RANGE, backend="torch"
    )
    (exact_grad,) = torch.autograd.grad(exact.loss, velocity)
    sure = (exact.log_ratio.abs() - naive.CLIP_RANGE).abs() > 5e-7
    # Gradients are rounded to the storage dtype; the naive one also carries the rounding of its float32 means.
    rtol = max(torch.finfo(inputs.velocity.dtype).eps, 1e-4)
    for name, loss in losses.items():
        value = loss(inputs)
        (grad,) = torch.autograd.grad(value, inputs.velocity)
        torch.testing.assert_close(value.double(), exact.loss.detach(), rtol=1e-5, atol=0, msg=f"{name}: loss")
        off = (grad.double() - exact_grad).abs().flatten(1).amax(1)[sure]
        worst = float(off.max() / exact_grad.abs().max())
        assert worst < rtol, f"{name}: gradient off by {worst:.1e}"


def exactness(device: str = "cpu") -> Measured:
    """Largest error of the log-ratio against float64 at a velocity change of 1e-3, float32, over 8 x 4 samples."""
    errors: dict[str, list[float]] = {"fused": [], "naive": [], "size": []}
    for seed in range(8):
        inputs = naive.make_inputs((4, 1024, 64), FP32, device, seed=seed)
        step, (velocity, old, noise) = inputs.step, (inputs.velocity.detach(), inputs.old_velocity, inputs.noise)
        exact = fg.gaussian_step(*(coef.double() for coef in (step.std, step.dt, *step.mean_coefs)))
        wide = (velocity.double(), old.double(), noise.double())
        truth = exact.std * fg.transition_moments(*wide, exact, backend="torch").cross
        result = fg.guard_loss(velocity, old, noise, inputs.advantages, step, reduction="none")
        errors["fused"].append(float((result.log_ratio.double() - truth).abs().max()))
        errors["naive"].append(float((naive.log_ratio(inputs).detach().double() - truth).abs().max()))
        errors["size"].append(float(truth.abs().max()))
    for name in ("fused", "naive"):
        yield name, "log-ratio", {"error": max(errors[name]), "largest": max(errors["size"])}


def cold_calls(call: Call, cuda: bool) -> list[Call]:
    """The call with as many sets of tensors as it takes to find each outside L2."""
    largest = max(t.nbytes for t in call.args if isinstance(t, Tensor))
    return [call.copied() for _ in range(rotations(largest, cuda))]


def time_kernel(call: Call, cuda: bool, copy_gb_per_s: float) -> Numbers:
    """One kernel, and its share of the copy bandwidth."""
    assert_agrees(call)
    times = with_bandwidth(graph_times([each.run for each in cold_calls(call, cuda)], cuda), call.least_bytes())
    return {**times, "of_copy": times["bandwidth_gb_per_s"] / copy_gb_per_s}


def memory(loss: Callable[[Inputs], Tensor], inputs: Inputs, cuda: bool) -> Numbers:
    peak = peak_bytes(partial(both, loss, inputs), cuda)
    return {"peak_new_bytes": peak, "kept_bytes": naive.kept_bytes(loss, inputs)}


def measure_on_gpu(shape: tuple[int, ...], dtype: torch.dtype = BF16, device: str = "cuda") -> Measured:
    """Kernels alone, then losses and steps; what does not fit is said to be so."""
    cuda = device == "cuda"
    backend, tensor_bytes = "inductor" if cuda else "eager", math.prod(shape) * dtype.itemsize
    copied = copy_times(shape, dtype, device)
    yield "copy", "copy", copied
    for name, call in timed_loss_calls(shape, dtype, device).items():
        yield "kernel", name, attempt(time_kernel, call, cuda, copied["bandwidth_gb_per_s"])
    # A loss reads three such tensors at least.
    sets = [naive.make_inputs(shape, dtype, device, seed=seed) for seed in range(rotations(3 * tensor_bytes, cuda))]
    losses = loss_forms(backend)
    assert_correct(sets[0], losses)
    steps: dict[str, Callable[[Inputs], Any]] = {"naive": naive.sde_step, "fused": fused_step}
    steps["compiled"] = torch.compile(naive.sde_step, dynamic=False, backend=backend)
    for name, loss in losses.items():
        for phase, work in (("forward", loss), ("both", partial(both, loss)), ("step", steps[name])):
            yield name, phase, attempt(graph_times, [partial(work, inputs) for inputs in sets], cuda)
            if phase != "forward":
                yield name, f"{phase} from Python", attempt(call_time, partial(work, sets[0]), cuda)
        yield name, "both", attempt(memory, loss, sets[0], cuda)


def measure_on_cpu(shape: tuple[int, ...]) -> Measured:
    inputs, losses = naive.make_inputs(shape, FP32), loss_forms()
    assert_correct(inputs, losses)
    times = call_times({name: partial(both, loss, inputs) for name, loss in losses.items()}, False)
    for name, loss in losses.items():
        yield name, "both from Python", times[name]
        yield name, "both", memory(loss, inputs, False)


def cases(toy: bool) -> rows.Cases:
    if toy:
        shapes: rows.Cases = {label(TOY_SHAPE, FP32): partial(measure_on_gpu, TOY_SHAPE, FP32, "cpu")}
    elif CUDA:
        shapes = {label(shape, BF16): partial(measure_on_gpu, shape) for shape in GPU_SHAPES}
    else:
        shapes = {label(shape, FP32): partial(measure_on_cpu, shape) for shape in CPU_SHAPES}
    return {**shapes, EXACTNESS: partial(exactness, "cpu" if toy else DEVICE)}


@pytest.mark.parametrize("shape", CPU_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", ["naive", "compiled", "fused"])
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
def test_loss(benchmark: Any, shape: tuple[int, ...], name: str, phase: str) -> None:
    inputs, loss = naive.make_inputs(shape, DTYPE, DEVICE), loss_forms()[name]
    assert_correct(inputs, {name: loss})
    benchmark.group = f"{phase} {label(shape, DTYPE)} {DEVICE}"
    benchmark.extra_info.update(memory(loss, inputs, CUDA))
    works: dict[str, Any] = {"forward": loss, "backward": torch.autograd.grad, "both": partial(both, loss)}

    def run(*args: Any) -> None:
        works[phase](*args)
        if CUDA:
            torch.cuda.synchronize()

    def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every round of the backward pass differentiates a graph of its own, built outside the clock."""
        return ((loss(inputs), inputs.velocity) if phase == "backward" else (inputs,)), {}

    benchmark.pedantic(run, setup=arguments, rounds=30, warmup_rounds=5)


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows.main(__doc__, lambda args: ("loss", cases(args.toy)), needs_gpu=False)
