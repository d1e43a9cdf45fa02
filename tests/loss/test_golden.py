"""All golden cases, through the reference and through the public losses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import cases, own_options

import fastguard as fg
from fastguard.ops import transition as naive
from fastguard.ops.sde_step import naive_sde_step

DTYPES = ("float64", "float32")


def build_step(case: cases.Case, device: str = "cpu") -> fg.Transition:
    """The transition of a case in the dtype of its latents."""
    dtype = torch.from_numpy(case["x"]).dtype
    sigma, sigma_next = (torch.tensor(case[key], dtype=torch.float64) for key in ("t", "t_next"))
    kind = getattr(fg, case["kind"])
    extra = {"sigma_max": case["sigma_max"]} if case["kind"] == "flow_sde" else {}
    step = kind(sigma.to(dtype), sigma_next.to(dtype), noise_level=case["noise_level"], **extra)
    return step.to(device)


def tensors(case: cases.Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(case[key]).to(device) for key in cases.INPUTS}


def has_density(case: cases.Case) -> bool:
    return not (case["kind"] == "cps" and bool(np.any(case["t_next"] == 0)))


def test_there_are_270_cases_and_the_checker_can_fail() -> None:
    assert sum(1 for _ in cases.iter_cases()) == 270
    with pytest.raises(AssertionError, match="beyond"):
        cases.check(lambda case: {"A": build_step(case).latents_coef.numpy() + 1e-6}, "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_means_and_samples(dtype: str) -> None:
    def outputs(case: cases.Case) -> dict[str, Any]:
        step, t = build_step(case), tensors(case)
        old_mean = naive.transition_mean(t["x"], t["v_old"], step)
        mean = naive.transition_mean(t["x"], t["v_new"], step)
        sample = naive_sde_step(t["x"], t["v_old"], t["eps"], step)
        got = {"A": step.latents_coef, "B": step.velocity_coef, "s": step.std, "w_flow": 1 / step.dt.abs()}
        return {**got, "mu_old": old_mean, "mu_new": mean, "x_next": sample}

    assert cases.check(outputs, dtype) == 270 * 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_in_the_moment_form(dtype: str) -> None:
    def outputs(case: cases.Case) -> dict[str, Any]:
        step, t = build_step(case), tensors(case)
        advantages = torch.tensor(case["adv"], dtype=t["x"].dtype)
        cross, drift = naive.moments(t["v_new"], t["v_old"], t["eps"], step)
        _, ref_drift = naive.moments(t["v_new"], t["v_ref"], t["eps"], step)
        log_ratio = naive.log_ratio(cross, drift)
        normalized = naive.ratio_norm(cross, step.std)
        clipped = naive.clip_advantages(advantages, case["adv_max"])
        surrogate = naive.clipped_surrogate(normalized, clipped, case["clip"], case["clip"])
        dropped = naive.divergence_masked(log_ratio, drift / 2, advantages, case["kl_thr"])
        return {
            "rn_logratio": normalized,
            "guard_ratio": normalized.exp(),
            "guard_surr": surrogate,
            "guard_loss_flow": (surrogate / step.dt.abs()).mean(),
            "fgrpo_logratio_gauss": log_ratio,
            "fgrpo_loss_gauss": naive.clipped_surrogate(log_ratio, clipped, case["clip"], case["clip"]).mean(),
            "kl_old": naive.gaussian_kl(drift),
            "kl_ref": naive.gaussian_kl(ref_drift),
            "dppo_loss_gauss": dropped.mean(),
        }

    assert cases.check(outputs, dtype, has_density) > 2000


def test_reference_in_the_textbook_form() -> None:
    def outputs(case: cases.Case) -> dict[str, Any]:
        step, t = build_step(case), tensors(case)
        old_mean = naive.transition_mean(t["x"], t["v_old"], step)
        mean = naive.transition_mean(t["x"], t["v_new"], step)
        sample = naive_sde_step(t["x"], t["v_old"], t["eps"], step)
        return {
            "logp_old_gauss": naive.log_prob(sample, old_mean, step.std),
            "logp_new_gauss": naive.log_prob(sample, mean, step.std),
            "fgrpo_logratio_gauss": naive.log_ratio_by_subtraction(sample, mean, old_mean, step.std),
            "rn_logratio_sub": naive.ratio_norm_by_subtraction(sample, mean, old_mean, step.std),
        }

    assert cases.check(outputs, "float64", has_density) > 900


def loss_outputs(case: cases.Case, device: str, backend: str) -> dict[str, Any]:
    """Every golden loss and gradient, from guard_loss and transition_moments."""
    step, t = build_step(case, device), tensors(case, device)
    advantages = torch.tensor(case["adv"], dtype=t["x"].dtype, device=device)
    t_now, dt, level = case["t"], case["t"] - case["t_next"], case["noise_level"]
    w_dance = torch.from_numpy((1 + level**2 * (1 - t_now) / (2 * t_now)) / dt).to(device, t["x"].dtype)
    got: dict[str, Any] = {}

    def run(suffix: str, objective: str, reweight: Any, adv_clip: float | None, name: str) -> fg.GuardLoss:
        velocity = t["v_new"].clone().requires_grad_()
        result = fg.guard_loss(
            velocity, t["v_old"], t["eps"], advantages, step, reweight=reweight, backend=backend,
            **own_options(objective, clip_range=case["clip"], adv_clip=adv_clip, kl_threshold=case["kl_thr"]),
        )  # fmt: skip
        result.loss.backward()
        got[f"{name}_loss_{suffix}"], got[f"{name}_grad_{suffix}"] = result.loss.detach(), velocity.grad
        return result

    guard = run("flow", "grpo_guard", "inverse_dt", case["adv_max"], "guard")
    run("dance", "grpo_guard", w_dance, case["adv_max"], "guard")
    flow = run("gauss", "flow_grpo", "none", case["adv_max"], "fgrpo")
    run("gauss", "flow_dppo", "none", None, "dppo")
    got |= {"rn_logratio": guard.log_ratio, "guard_ratio": guard.ratio, "fgrpo_logratio_gauss": flow.log_ratio}
    got["kl_old"] = flow.drift / 2
    velocity = t["v_new"].clone().requires_grad_()
    moments = fg.transition_moments(velocity, t["v_old"], t["eps"], step, t["v_ref"], backend=backend)
    assert moments.ref_drift is not None
    (moments.ref_drift / 2).mean().backward()
    got |= {"kl_ref": moments.ref_drift.detach() / 2, "kl_grad": velocity.grad}
    got["kl_loss"] = got["kl_ref"].mean()
    return {key: value.cpu() for key, value in got.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_on_the_torch_backend(dtype: str) -> None:
    assert cases.check(lambda case: loss_outputs(case, "cpu", "torch"), dtype, has_density) > 3000


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_losses_on_the_kernels(kernel_device: str, every: int) -> None:
    number = itertools.count()

    # The interpreter is slow: every fifth case, and none of the large groups, where nothing is new to a kernel.
    def chosen(case: cases.Case) -> bool:
        on_gpu = kernel_device == "cuda"
        return (on_gpu or (next(number) % every == 0 and case["x"].size < 10_000)) and has_density(case)

    assert cases.check(lambda case: loss_outputs(case, kernel_device, "triton"), "float32", chosen) > 2500 // every


def loss_and_gradient(
    case: cases.Case, inputs: dict[str, torch.Tensor], objective: str, backend: str
) -> tuple[fg.GuardLoss, torch.Tensor]:
    """Every output in float64 on the host, and the gradient for an upstream one of its own for each sample."""
    velocity, old, noise, ref = (inputs[key] for key in ("v_new", "v_old", "eps", "v_ref"))
    velocity.requires_grad_()
    result = fg.guard_loss(
        velocity, old, noise, torch.tensor(case["adv"], device=old.device), build_step(case, str(old.device)),
        ref_velocity=ref, kl_weight=0.01, reduction="none", backend=backend,
        **own_options(objective, clip_range=case["clip"], adv_clip=case["adv_max"], kl_threshold=case["kl_thr"]),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(result.loss, velocity, torch.linspace(0.5, -1.5, len(old)).to(result.loss))
    return fg.GuardLoss(*(value.detach().double().cpu() for value in result if value is not None)), grad.double().cpu()


def far_from_a_decision(case: cases.Case, objective: str, exact: fg.GuardLoss) -> torch.Tensor:
    """Distance of each sample from where the clip or the mask sets in; nearer than rounding, either is right."""
    if objective == "flow_dppo":
        return torch.minimum((exact.drift / 2 - case["kl_thr"]).abs(), exact.log_ratio.abs())
    edges = torch.tensor([-case["clip"], case["clip"]], dtype=torch.float64).log1p()
    return (exact.log_ratio[:, None] - edges).abs().amin(1)


@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo", "flow_dppo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_on_the_kernels_in_low_precision(dtype: torch.dtype, objective: str, kernel_device: str) -> None:
    """The cases' inputs, rounded to the storage dtype, through the kernels, against float64 of the same numbers."""
    total = compared = 0
    for number, (name, case, _) in enumerate(cases.iter_cases()):
        # The interpreter is slow: every fourth case, and none of the large groups, where nothing is new to a kernel.
        if not has_density(case) or (kernel_device == "cpu" and (number % 4 or case["x"].size > 10_000)):
            continue
        rounded = {key: value.to(kernel_device, dtype) for key, value in tensors(case).items()}
        exact, exact_grad = loss_and_gradient(
            case, {key: value.cpu().double() for key, value in rounded.items()}, objective, "torch"
        )
        got, grad = loss_and_gradient(case, rounded, objective, "triton")

        # float32 sums; cross is one of both signs, whose rounding goes with sqrt(drift) instead of its size.
        of_cross = 4e-6 * exact.drift.sqrt() + 1e-12
        assert ((got.cross - exact.cross).abs() <= of_cross).all(), name
        assert ((got.log_ratio - exact.log_ratio).abs() <= of_cross + 4e-6 * exact.drift).all(), name
        torch.testing.assert_close(got.drift, exact.drift, rtol=4e-6, atol=1e-12)
        torch.testing.assert_close(got.kl, exact.kl, rtol=4e-6, atol=1e-12)
        rounding = 1e-5 * (exact.log_ratio.abs() + exact.drift) + of_cross
        sure = far_from_a_decision(case, objective, exact) > rounding
        assert torch.equal(got.clipped[sure], exact.clipped[sure]), name
        torch.testing.assert_close(got.loss[sure], exact.loss[sure], rtol=2e-5, atol=2e-5)
        # One rounding to the storage dtype, by a whole ulp in the interpreter; float16 is subnormal below 6e-5.
        atol = 6e-8 if dtype == torch.float16 else 1e-5 * float(exact_grad.abs().max())
        torch.testing.assert_close(grad[sure], exact_grad[sure], rtol=torch.finfo(dtype).eps + 1e-5, atol=atol)
        total += len(sure)
        compared += int(sure.sum())
    assert compared > 0.8 * total > 100


def test_losses_from_means() -> None:
    """Means in float64; a std of sqrt(1/2) reproduces the bare -(x - mu)^2 that public trainers use for cps."""

    def outputs(case: cases.Case) -> dict[str, Any]:
        step, t = build_step(case), tensors(case)
        peer = case["kind"] == "cps"
        suffix = "peer" if peer else "gauss"
        std = torch.full_like(step.std, 0.5**0.5) if peer else step.std
        got: dict[str, Any] = {}
        objectives = [("fgrpo", "flow_grpo", "none")]
        if not peer:
            objectives += [("dppo", "flow_dppo", "none"), ("guard", "grpo_guard", "inverse_dt")]
        for name, objective, reweight in objectives:
            velocity = t["v_new"].clone().requires_grad_()
            result = fg.guard_loss_from_means(
                naive_sde_step(t["x"], t["v_old"], t["eps"], step),
                naive.transition_mean(t["x"], velocity, step),
                naive.transition_mean(t["x"], t["v_old"], step),
                torch.tensor(case["adv"], dtype=torch.float64), fg.gaussian_step(std, step.dt), reweight=reweight,
                **own_options(
                    objective, clip_range=case["clip"], adv_clip=case["adv_max"], kl_threshold=case["kl_thr"]
                ),
            )  # fmt: skip
            result.loss.backward()
            key = "flow" if name == "guard" else suffix
            got[f"{name}_loss_{key}"], got[f"{name}_grad_{key}"] = result.loss.detach(), velocity.grad
            if name == "fgrpo":
                got[f"fgrpo_logratio_{suffix}"] = result.log_ratio
        return got

    # The bare form has no use for std, so the last cps step counts here.
    assert cases.check(outputs, "float64") > 1400


def test_the_last_cps_step_is_refused() -> None:
    refused = 0
    for _, case, _ in cases.iter_cases():
        if has_density(case):
            continue
        step, t = build_step(case), tensors(case)
        with pytest.raises(ValueError, match="std == 0"):
            fg.guard_loss(t["v_new"], t["v_old"], t["eps"], torch.tensor(case["adv"]).to(t["x"].dtype), step)
        refused += 1
    assert refused > 10
