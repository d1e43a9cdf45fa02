"""The loss of the forward process, and its objectives against the formulas as they were published.

Axes: g group, n image of a group, D element.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers import matching_formulas
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastguard as fg
from fastguard.loss.objectives import OBJECTIVES, Given, MatchingObjective, Noised, build_objective

STORED = json.loads(matching_formulas.PATH.read_text())
CASES = STORED["cases"]
NAMES = [name for name, kind in OBJECTIVES.items() if issubclass(kind, MatchingObjective)]
ONE_IMAGE = [case for case in CASES if OBJECTIVES[case["objective"]].scope == "transition"]
GROUPS = [case for case in CASES if OBJECTIVES[case["objective"]].scope == "group"]


def label(case: dict[str, Any]) -> str:
    return f"{case['objective']} {case['options']}"


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in case["options"].items()}


def arguments(given: dict[str, Tensor], dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    """Of `matching_loss`: velocity, old_velocity, target, advantages, sigma, one row per image."""
    made = given["velocity"], given["old_velocity"], given["noise"] - given["final"]
    velocity, old, target = (x.flatten(0, 1).to(device, dtype) for x in made)
    advantages, sigma = (given[name].flatten().to(device, dtype) for name in ("advantages", "sigma"))
    return velocity.requires_grad_(), old, target, advantages, sigma


def known(n: int, **options: Any) -> Given:
    zero = torch.zeros(n)
    return Given(by_log_ratio=zero, by_drift=zero, clipped=zero.bool(), **options)


def test_the_golden_cases_are_those_of_the_formulas() -> None:
    assert {case["objective"] for case in CASES} == set(NAMES)
    for name, tensor in matching_formulas.inputs().items():
        torch.testing.assert_close(torch.tensor(STORED["inputs"][name], dtype=torch.float64), tensor)
    for made, stored in zip(json.loads(json.dumps(matching_formulas.cases())), CASES, strict=True):
        assert made["options"] == stored["options"]
        for key in ("loss", "gradient"):
            torch.testing.assert_close(torch.tensor(made[key]), torch.tensor(stored[key]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ONE_IMAGE, ids=label)
def test_loss_and_gradient_of_golden_cases(case: dict[str, Any], dtype: torch.dtype) -> None:
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in STORED["inputs"].items()}
    velocity, *rest = arguments(given, dtype)
    result = fg.matching_loss(velocity, *rest, objective=case["objective"], reduction="none", **options_of(case))
    (gradient,) = torch.autograd.grad(result.loss.sum(), velocity)
    tolerance = 1e-9 if dtype == torch.float64 else 5e-5
    want = torch.tensor(case["gradient"], dtype=torch.float64).flatten(0, 1)
    torch.testing.assert_close(gradient.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    want = torch.tensor(case["loss"], dtype=torch.float64).flatten()
    torch.testing.assert_close(result.loss.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", GROUPS, ids=label)
def test_two_passes_over_groups_give_the_golden_gradient(case: dict[str, Any]) -> None:
    """As docs/objectives.md has it: the log-ratios of a group without gradients, then its images one by one."""
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in STORED["inputs"].items()}
    velocity, old, target, advantages, sigma = arguments(given)
    objective = build_objective(case["objective"], **options_of(case))
    first = fg.matching_loss(velocity.detach(), old, target, advantages, sigma, objective="awm")
    rows = (x.view(3, 4) for x in (first.log_ratio, first.drift, advantages, sigma))
    log_ratio, drift, of_groups, times = rows
    assert isinstance(objective, MatchingObjective)
    terms = objective.terms(log_ratio, drift, of_groups, n_elements=5, noised=Noised(times))
    torch.testing.assert_close(terms.loss, torch.tensor(case["loss"], dtype=torch.float64))
    for i in range(12):
        known = Given(
            by_log_ratio=terms.by_log_ratio.flatten()[i : i + 1], by_drift=terms.by_drift.flatten()[i : i + 1],
            clipped=terms.clipped.flatten()[i : i + 1],
        )  # fmt: skip
        one = (x[i : i + 1] for x in (velocity, old, target, advantages, sigma))
        fg.matching_loss(*one, objective=known).loss.backward()
    assert velocity.grad is not None
    want = torch.tensor(case["gradient"], dtype=torch.float64).flatten(0, 1)
    torch.testing.assert_close(velocity.grad, want, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="needs all images of a group at once"):
        fg.matching_loss(velocity, old, target, advantages, sigma, objective=case["objective"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ONE_IMAGE, ids=label)
@pytest.mark.parametrize("n_elements", [5, 5000])
def test_kernels_with_all_options(
    case: dict[str, Any], dtype: torch.dtype, n_elements: int, kernel_device: str
) -> None:
    """Against float64, on the inputs as they were rounded; with a KL, weights, and any upstream gradient."""
    given = matching_formulas.inputs(n_elements=n_elements)
    velocity, old, target, advantages, sigma = arguments(given, dtype, kernel_device)
    generator = torch.Generator().manual_seed(1)
    ref = (old.cpu().double() + 0.2 * torch.randn(old.shape, generator=generator).double()).to(kernel_device, dtype)
    weight, kl_weight, upstream = torch.rand(3, 12, generator=generator, dtype=torch.float32).to(kernel_device)
    options = {"objective": case["objective"], "reduction": "none", "sample_weight": weight, "kl_weight": kl_weight}
    options |= options_of(case)
    result = fg.matching_loss(velocity, old, target, advantages, sigma, ref_velocity=ref, backend="triton", **options)
    (got,) = torch.autograd.grad(result.loss, velocity, upstream)

    wide = velocity.detach().double().cpu().requires_grad_()
    rows = [x.double().cpu() for x in (old, target, advantages, sigma, ref, weight, kl_weight, upstream)]
    old, target, advantages, sigma, ref, weight, kl_weight, upstream = rows
    formula = matching_formulas.FORMULAS[case["objective"]]
    loss = formula(wide, old, torch.zeros_like(target), target, sigma, advantages, **options_of(case))
    kl = ((wide - ref) ** 2).mean(1)
    loss = loss * weight + kl_weight * kl
    (want,) = torch.autograd.grad(loss, wide, upstream)
    torch.testing.assert_close(result.loss.double().cpu(), loss, rtol=1e-5, atol=1e-5)
    assert result.kl is not None
    torch.testing.assert_close(result.kl.double().cpu(), kl, rtol=1e-5, atol=0)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double().cpu(), want, rtol=ulp + 1e-5, atol=1e-5 * float(want.abs().max()))


def test_the_numbers_that_it_reports() -> None:
    given = matching_formulas.inputs()
    result = fg.matching_loss(*arguments(given))
    new, old = (
        matching_formulas.error(given[key], given["final"], given["noise"]) for key in ("velocity", "old_velocity")
    )
    torch.testing.assert_close(result.log_ratio, (old - new).flatten())
    torch.testing.assert_close(result.drift, 2 * ((given["velocity"] - given["old_velocity"]) ** 2).mean(-1).flatten())
    torch.testing.assert_close(result.cross - result.drift / 2, result.log_ratio)
    assert result.kl is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_has_no_loss(reduction: Any, backend: Any) -> None:
    velocity, *rest = (x[:0] for x in arguments(matching_formulas.inputs(), torch.float32))
    result = fg.matching_loss(
        velocity, *rest, ref_velocity=rest[0], kl_weight=0.1, reduction=reduction, backend=backend
    )
    assert result.loss.shape == ((0,) if reduction == "none" else ())
    assert result.loss.requires_grad
    assert result.kl is not None
    assert result.log_ratio.shape == result.kl.shape == (0,)


@pytest.mark.parametrize("weight", ["sigma", "sigma_squared"])
def test_awm_reports_the_ratio_that_it_clips(weight: str) -> None:
    velocity, *rest = arguments(matching_formulas.inputs())
    plain = fg.matching_loss(velocity, *rest, objective="awm", clip_range=0.02)
    weighted = fg.matching_loss(velocity, *rest, objective="awm", clip_range=0.02, time_weight=weight)
    factor = rest[-1] ** (1 if weight == "sigma" else 2)
    torch.testing.assert_close(weighted.log_ratio, factor * plain.log_ratio)
    torch.testing.assert_close(weighted.ratio, weighted.log_ratio.exp())
    beyond = (weighted.log_ratio.expm1() * rest[2].sign() > 0.02) & (rest[2] != 0)
    assert torch.equal(weighted.clipped, beyond)
    assert beyond.any()
    torch.testing.assert_close(weighted.drift, plain.drift)


def test_the_first_update_of_awm_is_weighted_flow_matching() -> None:
    given = matching_formulas.inputs(change=0.0)
    velocity, old, target, advantages, sigma = arguments(given)
    fg.matching_loss(velocity, old, target, advantages, sigma, objective="awm", adv_clip=None).loss.backward()
    twin = velocity.detach().requires_grad_()
    (advantages * ((twin - target) ** 2).mean(1)).mean().backward()
    torch.testing.assert_close(velocity.grad, twin.grad)


def test_nft_needs_no_reward_to_stay_where_it_is() -> None:
    """Without an advantage, what moves the velocity off v_old costs."""
    given = matching_formulas.inputs()
    velocity, old, target, _, sigma = arguments(given)
    still = torch.zeros(12, dtype=torch.float64)
    moved, kept = (fg.matching_loss(v, old, target, still, sigma).loss for v in (velocity, old))
    assert moved > kept
    nft = build_objective("diffusion_nft")
    assert isinstance(nft, MatchingObjective)
    assert [nft.decay_of_average(epoch) for epoch in (0, 100, 10_000)] == [0.0, 0.1, 0.5]


def test_it_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    velocity, *rest = arguments(matching_formulas.inputs(), torch.float32)

    def loss(moved: Tensor, weight: float) -> Tensor:
        return fg.matching_loss(moved, *rest, ref_velocity=rest[0], kl_weight=0.1, sample_weight=weight).loss

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for i in range(4):
        gradients = [torch.autograd.grad(run(velocity, 1 + 0.1 * i), velocity)[0] for run in (compiled, loss)]
        torch.testing.assert_close(*gradients)
    assert graphs.frame_count <= 2  # the second is that for all further weights


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"objective": "flow_grpo"}, ValueError, "call guard_loss. .* are diffusion_nft, awm, dgpo, dpo"),
        ({"objective": "nft"}, ValueError, "objective must be one of grpo_guard"),
        ({"clip_range": 0.1}, ValueError, "diffusion_nft has no option 'clip_range'"),
        ({"beta": 0.0}, ValueError, "beta must be positive"),
        ({"objective": "awm", "time_weight": "t"}, ValueError, "time_weight must be one of none, sigma"),
        ({"objective": "dpo", "pairs": "best"}, ValueError, "pairs must be one of extremes, all; got 'best'"),
        ({"largest_decay": 1.0}, ValueError, r"largest_decay must lie in \[0, 1\); got 1.0"),
        ({"sigma": 0.5}, TypeError, "sigma must be a floating point tensor of flow times; got float"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma must have shape \(12,\) or \(12, 1\)"),
        ({"target": torch.ones(12, 4)}, ValueError, r"target has shape \(12, 4\), velocity \(12, 5\)"),
        ({"kl_weight": 0.1}, ValueError, "kl_weight = 0.1 needs a reference; pass ref_velocity"),
        ({"advantages": torch.full((12,), math.nan), "check_values": True}, ValueError, "advantages holds NaN or Inf"),
        ({"sigma": torch.full((12,), -1.0), "check_values": True}, ValueError, r"sigma holds flow times in \(0, 1\]"),
        ({"objective": "awm", "clip_range": 0.0}, ValueError, "clip_range must be a positive, finite number"),
        ({"objective": known(12, log_ratio="normalized")}, ValueError, "by the plain log-ratio without a bandwidth"),
        ({"objective": known(12, bandwidth=5.0)}, ValueError, "by the plain log-ratio without a bandwidth"),
        ({"objective": known(5)}, ValueError, r"by_log_ratio must have shape \(12,\), one per sample; got \(5,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    names = ("velocity", "old_velocity", "target", "advantages", "sigma")
    given = dict(zip(names, arguments(matching_formulas.inputs(), torch.float32), strict=True))
    with pytest.raises(kind, match=message):
        fg.matching_loss(**(given | changes))


def test_the_loss_of_steps_refuses_objectives_of_the_forward_process() -> None:
    velocity, old, noise, advantages, _ = arguments(matching_formulas.inputs())
    step = fg.dance_sde(0.5, 0.4)
    with pytest.raises(ValueError, match="AWM trains on final latents with fresh noise.*call matching_loss"):
        fg.guard_loss(velocity, old, noise, advantages, step, objective="awm")
