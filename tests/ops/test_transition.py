"""The kernels of the loss against the float64 reference: values, gradients, shapes, strides, determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import own_options
from torch import Tensor

import fastguard as fg
from fastguard.ops import transition as naive
from fastguard.ops.transition import transition_sums

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OBJECTIVES = ["grpo_guard", "flow_grpo", "flow_dppo"]
# One element, odd, one tile (4,096) and its neighbours, two tiles, and rows that are not 16-byte aligned.
SHAPES = [(1, 1), (2, 7), (3, 4095), (1, 4096), (2, 4097), (9, 5, 31), (2, 9000)]


def make_batch(shape: tuple[int, ...], dtype: torch.dtype, device: str, change: float = 0.05) -> dict[str, Any]:
    """Rollout and update of a batch with mixed times; velocities far enough apart for the clip to matter."""
    generator = torch.Generator().manual_seed(sum(shape))
    old, delta, noise, ref = (torch.randn(shape, generator=generator) for _ in range(4))
    count = shape[0]
    sigma = torch.linspace(1.0, 0.3, count) if count > 1 else torch.tensor([0.7])
    step = fg.flow_sde(sigma, sigma - 0.15, noise_level=0.8, sigma_max=0.9)
    advantages = torch.tensor([1.5, -0.7, 0.0, 9.0, -9.0]).repeat(count)[:count]
    return {
        "velocity": (old + change * delta).to(dtype).to(device),
        "old_velocity": old.to(dtype).to(device),
        "noise": noise.to(dtype).to(device),
        "ref_velocity": (old + 0.1 * ref).to(dtype).to(device),
        "advantages": advantages.to(device),
        "step": step.to(device),
    }


def reference_loss(batch: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs and the gradient by autograd of the plain formulas, in float64 on the host."""
    step: fg.Transition = batch["step"].to("cpu")
    velocity, old, noise, ref = (
        batch[key].detach().cpu().double() for key in ("velocity", "old_velocity", "noise", "ref_velocity")
    )
    velocity.requires_grad_()
    advantages = batch["advantages"].cpu().double()
    exact = fg.Transition(step.kind, *(c.double() for c in (step.latents_coef, step.velocity_coef, step.std, step.dt)))
    cross, drift = naive.moments(velocity, old, noise, exact)
    low, high = options["clip_range"]
    if options["objective"] == "flow_dppo":
        log_ratio = naive.log_ratio(cross, drift)
        policy = naive.divergence_masked(log_ratio, drift / 2, advantages, options["kl_threshold"])
    else:
        guard = options["objective"] == "grpo_guard"
        log_ratio = naive.ratio_norm(cross, exact.std) if guard else naive.log_ratio(cross, drift)
        policy = naive.clipped_surrogate(log_ratio, advantages.clamp(-5, 5), low, high)
    weight = {"none": 1.0, "inverse_dt": 1 / exact.dt.abs(), "equalized": 1 / exact.velocity_coef.abs()}
    loss = policy * weight[options["reweight"]]
    _, ref_drift = naive.moments(velocity, ref, noise, exact)
    gaussian = options.get("kl_type", "gaussian") == "gaussian"
    kl = naive.gaussian_kl(ref_drift) if gaussian else naive.velocity_kl(velocity, ref)
    loss = loss + options["kl_weight"] * kl
    upstream = torch.linspace(0.5, -1.5, len(loss), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, velocity, upstream)
    outputs = {"loss": loss, "log_ratio": log_ratio, "cross": cross, "drift": drift, "kl": kl}
    return {key: value.detach() for key, value in outputs.items()}, gradient


def assert_matches_reference(batch: dict[str, Any], backend: str, **options: Any) -> None:
    outputs, gradient = reference_loss(batch, **options)
    velocity = batch["velocity"].detach().requires_grad_()
    result = fg.guard_loss(
        velocity, batch["old_velocity"], batch["noise"], batch["advantages"], batch["step"],
        ref_velocity=batch["ref_velocity"], reduction="none", backend=backend, **own_options(**options),
    )  # fmt: skip
    upstream = torch.linspace(0.5, -1.5, len(result.loss), device=velocity.device)
    (got,) = torch.autograd.grad(result.loss, velocity, upstream)

    # float32 sums of D terms: rounding grows like sqrt(D) at most, on the scale of sqrt(drift / D) for cross.
    for key in ("drift", "kl"):
        torch.testing.assert_close(getattr(result, key).double().cpu(), outputs[key], rtol=2e-6, atol=1e-12)
    scale = outputs["drift"].sqrt() * 2e-6
    assert ((result.cross.double().cpu() - outputs["cross"]).abs() <= scale + 1e-12).all()
    assert ((result.log_ratio.double().cpu() - outputs["log_ratio"]).abs() <= scale + 2e-6 * outputs["drift"]).all()
    torch.testing.assert_close(result.loss.double().cpu(), outputs["loss"], rtol=1e-5, atol=1e-6)

    assert got.dtype == velocity.dtype
    assert got.shape == velocity.shape
    # One rounding to the storage dtype (the interpreter truncates: a whole ulp) after float32 arithmetic; float16
    # gradients of this size are partly subnormal, with a spacing of 6e-8.
    ulp = torch.finfo(velocity.dtype).eps
    atol = (6e-8 if velocity.dtype == torch.float16 else 0) + 3e-6 * gradient.abs().max().item()
    torch.testing.assert_close(got.double().cpu(), gradient, rtol=ulp + 3e-6, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_shape(shape, objective, backend, kernel_device, poisoned) -> None:
    batch = make_batch(shape, torch.float32, kernel_device)
    options = {"objective": objective, "clip_range": (1e-3, 2e-3), "kl_threshold": 1e-4, "reweight": "inverse_dt"}
    assert_matches_reference(batch, backend, kl_weight=0.3, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reweight", ["none", "inverse_dt", "equalized"])
@pytest.mark.parametrize(("kl_weight", "kl_type"), [(0.0, "gaussian"), (0.2, "gaussian"), (0.2, "velocity")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_option(dtype, objective, reweight, kl_weight, kl_type, backend, kernel_device, poisoned) -> None:
    batch = make_batch((9, 300), dtype, kernel_device)
    assert_matches_reference(
        batch, backend, objective=objective, clip_range=(1e-3, 2e-3), kl_threshold=1e-4, reweight=reweight,
        kl_weight=kl_weight, kl_type=kl_type,
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_means_agree_with_velocities(objective, backend, kernel_device, poisoned) -> None:
    batch = make_batch((3, 5000), torch.float32, kernel_device)
    step, latents = batch["step"], torch.randn(3, 5000, device=kernel_device)
    options = {**own_options(objective, clip_range=1e-3), "kl_weight": 0.1, "backend": backend}
    old_mean = naive.transition_mean(latents, batch["old_velocity"], step)
    mean = naive.transition_mean(latents, batch["velocity"], step).requires_grad_()
    ref_mean = naive.transition_mean(latents, batch["ref_velocity"], step)
    sample = old_mean + naive.per_sample(step.std, latents) * batch["noise"]
    means = fg.guard_loss_from_means(
        sample, mean, old_mean, batch["advantages"], step, ref_prev_sample_mean=ref_mean, **options
    )
    velocity = batch["velocity"].requires_grad_()
    velocities = fg.guard_loss(
        velocity, batch["old_velocity"], batch["noise"], batch["advantages"], step,
        ref_velocity=batch["ref_velocity"], **options,
    )  # fmt: skip
    # The means carry float32 roundings of values of size 1; against changes of 5e-2 that is some 1e-5.
    torch.testing.assert_close(means.drift, velocities.drift, rtol=1e-4, atol=0)
    torch.testing.assert_close(means.kl, velocities.kl, rtol=1e-4, atol=0)
    torch.testing.assert_close(means.log_ratio, velocities.log_ratio, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(means.loss, velocities.loss, rtol=1e-5, atol=1e-5)
    means.loss.backward()
    velocities.loss.backward()
    chained = mean.grad * naive.per_sample(step.velocity_coef, latents)
    torch.testing.assert_close(chained, velocity.grad, rtol=1e-3, atol=1e-4 * velocity.grad.abs().max().item())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_more_samples_and_partial_sums_than_one_tile(backend, kernel_device, poisoned) -> None:
    """The epilogue's loops: 21 samples (tile 8), and 300,000 elements in 74 partial sums (tile 64)."""
    for shape in ((21, 40), (1, 300_000)):
        batch = make_batch(shape, torch.float32, kernel_device)
        options = {"objective": "flow_grpo", "clip_range": (1e-3, 2e-3), "reweight": "none", "kl_weight": 0.1}
        assert_matches_reference(batch, backend, kl_threshold=0.0, **options)


def test_a_program_that_takes_several_tiles(kernel_device, monkeypatch) -> None:
    """With few partial sums each program loops; the sums stay the same up to their order."""
    from fastguard.kernels import transition

    batch = make_batch((2, 50_000), torch.float32, kernel_device)
    tensors = [batch[key] for key in ("velocity", "old_velocity", "noise", "ref_velocity")]
    many = transition_sums(*tensors, False, None, "triton")
    monkeypatch.setattr(transition, "MAX_PARTIALS", 3)
    few = transition_sums(*tensors, False, None, "triton")
    exact = transition_sums(*(t.double() for t in tensors), False, None, "torch")
    for sums in (few, many):
        torch.testing.assert_close(sums[1:].double(), exact[1:], rtol=1e-6, atol=0)
        torch.testing.assert_close(sums[0].double(), exact[0], rtol=0, atol=1e-6 * float(exact[1].max()) * 50)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_results_are_bitwise_repeatable_and_the_kernels_independent_of_the_batch(backend, kernel_device) -> None:
    batch = make_batch((4, 9000), torch.bfloat16, kernel_device)

    def run(index: slice) -> tuple[Tensor, ...]:
        velocity = batch["velocity"][index].detach().requires_grad_()
        result = fg.guard_loss(
            velocity, batch["old_velocity"][index], batch["noise"][index], batch["advantages"][index],
            batch["step"][index], objective="flow_grpo", reduction="sum", backend=backend,
        )  # fmt: skip
        result.loss.backward()
        return result.cross, result.drift, velocity.grad

    whole = run(slice(0, 4))
    for got, want in zip(run(slice(0, 4)), whole, strict=True):
        assert torch.equal(got, want)
    if backend == "torch":
        return  # its dot products depend on the alignment of a sample's first element
    for got, want in zip(run(slice(2, 3)), whole, strict=True):
        assert torch.equal(got, want[2:3])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strided_inputs(backend, kernel_device) -> None:
    """Transposed, sliced along elements, and repeated along the batch: same numbers as contiguous copies."""
    old = torch.randn(1, 12, 50, device=kernel_device).expand(3, 12, 50)
    velocity = (torch.randn(3, 50, 12, device=kernel_device) * 0.01).transpose(1, 2) + old
    velocity = velocity.transpose(1, 2).contiguous().transpose(1, 2)
    noise = torch.randn(3, 12, 100, device=kernel_device)[:, :, ::2]
    assert not (velocity.is_contiguous())
    assert not (noise.is_contiguous())
    assert not (old.is_contiguous())
    step = fg.dance_sde(0.5, 0.4).to(kernel_device)
    advantages = torch.tensor([1.0, -1.0, 0.5], device=kernel_device)

    def run(*tensors: Tensor) -> tuple[fg.GuardLoss, Tensor]:
        leaf = tensors[0].detach().requires_grad_()
        result = fg.guard_loss(leaf, *tensors[1:], advantages, step, objective="flow_grpo", backend=backend)
        result.loss.backward()
        assert leaf.grad is not None
        return result, leaf.grad

    strided, strided_grad = run(velocity, old, noise)
    plain, plain_grad = run(velocity.contiguous(), old.contiguous(), noise.contiguous())
    # Strides decide how wide a kernel reads, and so the order in which a thread's sums are added.
    torch.testing.assert_close(strided.cross, plain.cross, rtol=0, atol=2e-6 * float(plain.drift.max().sqrt()))
    torch.testing.assert_close(strided.drift, plain.drift, rtol=2e-6, atol=0)
    torch.testing.assert_close(strided_grad, plain_grad, rtol=1e-4, atol=1e-6 * float(plain_grad.abs().max()))


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_slices_that_are_not_aligned(offset, backend, kernel_device) -> None:
    """Storage offsets and row strides that are no multiples of 16 bytes: slower, and right."""
    size = 4501
    generator = torch.Generator().manual_seed(offset)
    whole = [torch.randn(4, size + 16, generator=generator).bfloat16().to(kernel_device) for _ in range(3)]
    velocity, old, noise = (tensor[1:, offset : offset + size] for tensor in whole)
    step, advantages = fg.dance_sde(0.5, 0.4).to(kernel_device), torch.ones(3, device=kernel_device)
    result = fg.guard_loss(velocity, old, noise, advantages, step, backend=backend)
    exact = fg.Transition(
        step.kind, *(c.cpu().double() for c in (step.latents_coef, step.velocity_coef, step.std, step.dt))
    )
    cross, drift = naive.moments(*(t.cpu().double() for t in (velocity, old, noise)), exact.expand(3))
    torch.testing.assert_close(result.drift.cpu().double(), drift, rtol=2e-6, atol=0)
    torch.testing.assert_close(result.cross.cpu().double(), cross, rtol=0, atol=2e-6 * float(drift.max().sqrt()))


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo"])
@pytest.mark.parametrize("shape", [(9, 2**28), (1, 2**31 + 5)], ids=["samples", "one sample"])
def test_more_than_2_31_elements_in_total(shape: tuple[int, int], objective: str) -> None:
    """Offsets beyond 32 bits, over samples and within one: the last 999 elements of the last sample are seen."""
    count, size = shape
    old, noise, velocity = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    velocity[-1, -999:], noise[-1, -999:] = 0.5, 2.0
    velocity.requires_grad_()
    step, advantages = fg.dance_sde(0.5, 0.4).to("cuda"), torch.ones(count, device="cuda")
    result = fg.guard_loss(
        velocity, old, noise, advantages, step, objective=objective, clip_range=1.0, ref_velocity=old, kl_weight=0.1,
        reweight="none", reduction="sum",
    )  # fmt: skip
    whiten = (step.velocity_coef / step.std).item()
    want = {"cross": 999 * whiten / size, "drift": 999 * 0.25 * whiten**2 / size, "kl": 999 * 0.125 * whiten**2 / size}
    for key, value in want.items():
        got = getattr(result, key)
        torch.testing.assert_close(got[-1].item(), value, rtol=1e-5, atol=0)
        assert not got[:-1].any()
    result.loss.backward()
    assert velocity.grad is not None
    assert velocity.grad[-1, -999:].unique().numel() == 1
    assert velocity.grad[-1, -1].item() != 0
    assert torch.count_nonzero(velocity.grad).item() == 999


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 1024, 64), (8, 4096, 64), (1, 16, 21, 90, 160)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_images_and_videos(dtype: torch.dtype, shape: tuple[int, ...], poisoned) -> None:
    options = {"objective": "flow_grpo", "clip_range": (1e-3, 2e-3), "reweight": "inverse_dt", "kl_weight": 0.1}
    assert_matches_reference(make_batch(shape, dtype, "cuda"), "triton", kl_threshold=0.0, **options)
