"""The table of objectives, what each answers, and objectives that the fused kernel does not know."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import ROOT, objective_formulas
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastguard as fg
from fastguard.loss.objectives import OBJECTIVES, OPTIONS, Given, Objective, Terms, build_objective
from fastguard.loss.objectives.base import LogRatio
from fastguard.loss.objectives.flow_grpo import FlowGrpo
from fastguard.loss.objectives.grpo_guard import GrpoGuard
from fastguard.ops import transition as naive


@dataclass(frozen=True)
class Unfused(Objective):
    """Another objective by way of its terms alone."""

    limit_name: ClassVar[str] = "limit"

    twin: Objective
    limit: float = 1.0  # type: ignore[misc]

    @property
    def log_ratio(self) -> LogRatio:  # type: ignore[override]
        return self.twin.log_ratio

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        return self.twin.terms(log_ratio, drift, advantages, n_elements=n_elements)


@dataclass(frozen=True)
class Penalized(Objective):
    """`-a r` and a penalty that is quadratic in the drift, so that the drift has a derivative of its own."""

    title: ClassVar[str] = "penalized"
    moves_drift: ClassVar[bool] = True

    log_ratio: LogRatio = "plain"  # type: ignore[misc]
    strength: float = 3.0

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        policy = -advantages * torch.exp(log_ratio)
        loss = policy + self.strength * drift**2
        return Terms(loss, policy, 2 * self.strength * drift, torch.zeros_like(loss, dtype=torch.bool))


def make_batch(dtype: torch.dtype = torch.float64, change: float = 0.3) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    old, noise, new = (torch.randn(4, 24, dtype=torch.float64, generator=generator).to(dtype) for _ in range(3))
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.3])
    step = fg.dance_sde(sigma, sigma - 0.1, 0.7)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    return (old + change * new).requires_grad_(), old, noise, advantages, step


def outcome(batch: tuple[Any, ...], objective: Objective, **options: Any) -> tuple[Tensor, ...]:
    result = fg.guard_loss(*batch, objective=objective, reduction="none", **options)
    upstream = torch.linspace(0.5, -1.5, len(result.loss)).to(result.loss)
    return (*result[:6], *torch.autograd.grad(result.loss, batch[0], upstream))


def test_the_interface_as_it_is_documented() -> None:
    objective = build_objective("flow_dppo", kl_threshold=1e-5)
    assert objective.scope == "transition"
    log_ratio, drift, advantages = (torch.tensor(x) for x in ([1e-6, -1e-6], [1e-6, 4e-5], [1.0, -1.0]))
    terms = objective.terms(log_ratio, drift, advantages, n_elements=64)
    assert terms.clipped.tolist() == [False, True]
    assert terms.by_log_ratio.tolist() == [terms.loss[0].item(), 0.0]
    assert terms.by_drift.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row(name: str) -> None:
    objective = build_objective(name)
    assert objective.title
    assert objective.limit_name is None or objective.limit_name in OPTIONS[name]
    assert objective.limit > 0
    assert objective.moved(torch.tensor([-0.5]), torch.tensor([0.5]), n_elements=24).item() > 0


# --- formulas -------------------------------------------------------------------------------------------------------

CASES = json.loads(objective_formulas.PATH.read_text())
DETACHED = {"cispo"}  # a part of its loss takes no gradient
REVERSE = [name for name in OBJECTIVES if OBJECTIVES[name].process == "reverse"]
ONE_STEP = [name for name in REVERSE if OBJECTIVES[name].scope == "transition"]
TRAJECTORY = [name for name in REVERSE if OBJECTIVES[name].scope == "trajectory"]
LARGE_CASES = [case for case in CASES if case["n_elements"] == 24 and case["objective"] in ONE_STEP]


def label(case: dict[str, Any]) -> str:
    return f"{case['objective']} {case['options']} {case['n_elements']}"


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in case["options"].items()}


def test_the_golden_cases_are_those_of_the_formulas() -> None:
    assert {case["objective"] for case in CASES} == set(REVERSE)
    for made, stored in zip(json.loads(json.dumps(objective_formulas.cases())), CASES, strict=True):
        for key, value in stored.items():
            if key in Terms._fields:
                torch.testing.assert_close(torch.tensor(made[key]), torch.tensor(value), rtol=1e-12, atol=1e-14)
            else:
                assert made[key] == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=map(label, CASES))
def test_terms_of_golden_cases(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Loss and derivatives on both sides of each limit, at the scales of D = 65,536 and of D = 24."""
    objective = build_objective(case["objective"], **options_of(case))
    of = objective_formulas.trajectories if objective.scope == "trajectory" else objective_formulas.points
    log_ratio, drift, advantages = (x.to(dtype) for x in of(case["scale"], case["drift_scale"]))
    terms = objective.terms(log_ratio, drift, advantages, n_elements=case["n_elements"])
    assert {t.dtype for t in terms} == {dtype, torch.bool}
    tolerance = 1e-9 if dtype == torch.float64 else 5e-5
    for name in ("loss", "by_log_ratio", "by_drift"):
        want = torch.tensor(case[name], dtype=torch.float64)
        scale = max(1e-5 if dtype == torch.float32 else 1e-9, float(want.abs().max()))
        torch.testing.assert_close(getattr(terms, name).double(), want, rtol=tolerance, atol=tolerance * scale)
    scores = advantages[:, None] if objective.scope == "trajectory" else advantages
    stopped = (terms.by_log_ratio == 0) & (scores != 0)
    assert not (terms.clipped & (terms.by_log_ratio != 0)).any()
    assert torch.equal(terms.clipped, stopped) or case["objective"] in ("ppo_rpe", "spo", "dro", "power_mean", "sapo")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in ONE_STEP if name not in DETACHED])
def test_terms_are_the_derivatives_of_the_loss(name: str, dtype: torch.dtype) -> None:
    """Against central differences, on both sides of each limit."""
    limits: dict[str, Any] = {"clip_range": (0.1, 0.3), "kl_threshold": 0.1, "threshold": 0.1, "margin": 0.1}
    objective = build_objective(name, **{option: value for option, value in limits.items() if option in OPTIONS[name]})
    moves, scores = torch.tensor([-0.5, -0.05, 0.05, 0.5]), torch.tensor([-7.0, -1.0, 0.0, 2.0])
    log_ratio, advantages = (x.flatten() for x in torch.meshgrid(moves, scores, indexing="ij"))
    drift = torch.tensor([0.01, 0.5]).repeat_interleave(len(log_ratio))
    log_ratio, advantages = log_ratio.repeat(2), advantages.repeat(2)
    terms = objective.terms(log_ratio.to(dtype), drift.to(dtype), advantages.to(dtype), n_elements=9)

    def loss(move_ratio: float, move_drift: float) -> Tensor:
        moved = log_ratio.double() + move_ratio, drift.double() + move_drift
        return objective.terms(*moved, advantages.double(), n_elements=9).loss

    h = 1e-6
    for got, plus, minus in (
        (terms.by_log_ratio, loss(h, 0), loss(-h, 0)),
        (terms.by_drift, loss(0, h), loss(0, -h)),
    ):
        torch.testing.assert_close(got.double(), (plus - minus) / (2 * h), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("log_ratio", ["plain", "normalized"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=map(label, LARGE_CASES))
def test_gradient_through_the_velocities(case: dict[str, Any], log_ratio: LogRatio, dtype: torch.dtype) -> None:
    """Against float64 autograd of formula, moments and KL, with reweighting and weights of samples."""
    name, options = case["objective"], options_of(case)
    if "log_ratio" in OPTIONS[name]:
        options["log_ratio"] = log_ratio
    objective = build_objective(name, **options)
    if objective.log_ratio != log_ratio:
        pytest.skip(f"{name} takes the other log-ratio")
    velocity, old, noise, advantages, _ = make_batch(change=0.4)
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64)
    step = fg.dance_sde(sigma, sigma - 0.1, 0.7)
    ref, weight = old + 0.1 * noise, torch.tensor([0.5, 1.0, 2.0, 0.0])
    cross, drift = naive.moments(velocity, old, noise, step)
    own = {key: value for key, value in options.items() if key != "log_ratio"}
    moments = naive.ratio_norm(cross, step.std) if log_ratio == "normalized" else naive.log_ratio(cross, drift)
    loss = objective_formulas.FORMULAS[name](moments, drift, advantages.double(), 24, **own)
    _, ref_drift = naive.moments(velocity, ref, noise, step)
    loss = loss * weight / step.dt.abs() + 0.3 * naive.gaussian_kl(ref_drift)
    (want,) = torch.autograd.grad(loss.mean(), velocity)

    moved = velocity.detach().to(dtype).requires_grad_()
    result = fg.guard_loss(
        moved, old.to(dtype), noise.to(dtype), advantages.to(dtype), step, objective=objective, sample_weight=weight,
        ref_velocity=ref.to(dtype), kl_weight=0.3,
    )  # fmt: skip
    (got,) = torch.autograd.grad(result.loss, moved)
    tolerance = 1e-9 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    torch.testing.assert_close(result.loss.double(), loss.mean(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in ONE_STEP if "bandwidth" in OPTIONS[name] and name not in DETACHED])
@pytest.mark.parametrize("log_ratio", ["plain", "normalized"])
def test_a_bandwidth_smooths_the_policies(name: str, log_ratio: LogRatio) -> None:
    """Both Gaussians with the variance of the step and of the kernel, by their densities."""
    velocity, old, noise, advantages, step = make_batch()
    options = objective_formulas.LARGE[name][-1]
    latents = torch.randn(4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, old_mean = (naive.transition_mean(latents, v, step) for v in (velocity, old))
    drawn = old_mean + naive.per_sample(step.std, latents) * noise
    std = (step.std.double() ** 2 + 0.3**2).sqrt()
    wide = naive.per_sample(std, latents)
    new, before = (torch.distributions.Normal(m, wide).log_prob(drawn).mean(1) for m in (mean, old_mean))
    drift = (((mean - old_mean) / wide) ** 2).mean(1)
    ratio = new - before if log_ratio == "plain" else std * (new - before + drift / 2)
    loss = objective_formulas.FORMULAS[name](ratio, drift, advantages.double(), 24, **options)
    (want,) = torch.autograd.grad(loss.sum(), velocity)
    for backend in ("torch", "triton"):
        dtype = torch.float64 if backend == "torch" else torch.float32
        moved, *rest = (x.detach().to(dtype) for x in (velocity, old, noise, advantages))
        objective = build_objective(name, bandwidth=0.3, log_ratio=log_ratio, **options)
        result = fg.guard_loss(
            moved.requires_grad_(), *rest, step, objective=objective, reweight="none", reduction="none",
            backend=backend,
        )  # fmt: skip
        (got,) = torch.autograd.grad(result.loss.sum(), moved)
        tolerance = 1e-7 if backend == "torch" else 5e-5  # the step's coefficients are float32
        torch.testing.assert_close(result.log_ratio.double(), ratio, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("name", ONE_STEP)
def test_the_first_update_is_the_same_for_all(name: str) -> None:
    """At a ratio of 1 every gradient is the policy gradient, up to the factor 1/2 of the square root."""
    zero, advantages = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    terms = build_objective(name).terms(zero, zero, advantages, n_elements=24)
    torch.testing.assert_close(terms.by_log_ratio, -advantages)
    assert not terms.clipped.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ONE_STEP)
def test_ratios_that_overflow_and_numbers_that_are_none(name: str, dtype: torch.dtype) -> None:
    """A NaN stays, an idle sample is silent, and a ratio beyond the floats gives no NaN."""
    log_ratio = torch.tensor([800.0, -800.0, 800.0, -800.0, 800.0, math.nan, math.nan], dtype=dtype)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 0.0], dtype=dtype)
    drift = torch.full_like(log_ratio, 1e-9)
    terms = build_objective(name).terms(log_ratio, drift, advantages, n_elements=24)
    for part in (terms.loss, terms.by_log_ratio):
        assert part.isnan().tolist() == [False] * 5 + [True] * 2
    if name not in ("fr_ppo", "dro"):  # whose penalties are on every sample
        assert terms.loss[4] == terms.by_log_ratio[4] == 0


def test_objectives_that_are_one_and_the_same() -> None:
    log_ratio, drift, advantages = objective_formulas.points(0.3, 0.3)
    clip, a = 0.2, advantages.abs()

    def terms(name: str, **options: Any) -> Terms:
        return build_objective(name, **options).terms(log_ratio, drift, advantages, n_elements=24)

    ppo, hinge = terms("flow_grpo", clip_range=clip, adv_clip=None), terms("hinge", margin=clip)
    torch.testing.assert_close(hinge.loss - clip * a - advantages, ppo.loss)
    torch.testing.assert_close(hinge.by_log_ratio, ppo.by_log_ratio)
    log_hinge = terms("hinge", margin=math.log1p(clip), classifier="log")
    copg = terms("copg", clip_range=(1 - 1 / (1 + clip), clip))
    torch.testing.assert_close(log_hinge.by_log_ratio, copg.by_log_ratio)
    torch.testing.assert_close(terms("power_mean", lam=1.0).by_log_ratio, -advantages + 0 * log_ratio)
    torch.testing.assert_close(terms("power_mean", lam=0.0).by_log_ratio, terms("surrogate").by_log_ratio)
    torch.testing.assert_close(terms("power_mean", lam=1e-9).by_log_ratio, terms("surrogate").by_log_ratio)
    for name in ("flow_dppo", "dppo"):
        limit = {"kl_threshold": 0.1} if name == "flow_dppo" else {"divergence": "kl", "threshold": 0.1}
        assert torch.equal(terms(name, **limit).loss, terms("dppo", divergence="kl", threshold=0.1).loss)


def test_trajectories_of_one_step_and_without_clipping() -> None:
    log_ratio, drift, advantages = objective_formulas.points(0.3, 0.3)
    tic = build_objective("tic_grpo", clip_range=0.1, low=0.1)
    one = tic.terms(log_ratio[:, None], drift[:, None], advantages, n_elements=24)
    ppo = build_objective("flow_grpo", clip_range=0.1, adv_clip=None)
    torch.testing.assert_close(one.loss, ppo.terms(log_ratio, drift, advantages, n_elements=24).loss)
    many = objective_formulas.trajectories(0.3, 0.3)
    gmpo = build_objective("gmpo", clip_range=9.0).terms(*many, n_elements=24)
    for got, want in zip(gmpo, build_objective("tic_grpo", clip_range=1e9).terms(*many, n_elements=24), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", TRAJECTORY)
def test_bad_numbers_of_trajectories(name: str) -> None:
    """A NaN stays in its image, an idle image is silent."""
    log_ratio = torch.tensor([[800.0, 0.0], [-800.0, 0.0], [math.nan, 0.0], [800.0, 0.0], [0.0, 0.0]])
    advantages = torch.tensor([1.0, -1.0, 1.0, 0.0, -2.0])
    terms = build_objective(name).terms(log_ratio, torch.zeros_like(log_ratio), advantages, n_elements=24)
    assert terms.loss.isnan().tolist() == [False, False, True, False, False]
    assert terms.loss[3] == 0
    assert not terms.by_log_ratio[3].any()
    torch.testing.assert_close(terms.by_log_ratio[4], torch.full((2,), 1.0))  # -a / T at a ratio of 1


@pytest.mark.parametrize("log_ratio", ["plain", "normalized"])
@pytest.mark.parametrize("name", TRAJECTORY)
def test_two_passes_give_the_gradient_of_one_graph(name: str, log_ratio: LogRatio) -> None:
    """As docs/objectives.md has it for a trainer of one's own: moments of all steps, then one backward pass a step."""
    options = objective_formulas.LARGE[name][-1]
    objective = build_objective(name, log_ratio=log_ratio, **options)
    generator = torch.Generator().manual_seed(3)
    n_images, n_steps = 5, 3
    old, noise, new = torch.randn(3, n_steps, n_images, 24, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.7, 0.5], dtype=torch.float64)
    steps = [fg.dance_sde(s[None], s[None] - 0.1, 0.7) for s in sigma]
    advantages = torch.linspace(-2, 2, n_images, dtype=torch.float64)
    factor = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def velocity(t: int) -> Tensor:
        return old[t] + factor * new[t]

    def kinds(t: int) -> tuple[Tensor, Tensor]:
        cross, drift = naive.moments(velocity(t), old[t], noise[t], steps[t])
        kind = naive.ratio_norm(cross, steps[t].std) if log_ratio == "normalized" else naive.log_ratio(cross, drift)
        return kind, drift

    numbers = [torch.stack(each, 1) for each in zip(*map(kinds, range(n_steps)), strict=True)]
    loss = objective_formulas.FORMULAS[name](*numbers, advantages, 24, **options).mean()
    (want,) = torch.autograd.grad(loss, factor)

    with torch.no_grad():
        scored = [fg.transition_moments(velocity(t), old[t], noise[t], steps[t]) for t in range(n_steps)]
    cross, drift = (torch.stack(each, 1) for each in list(zip(*scored, strict=True))[:2])
    std = torch.cat([step.std for step in steps])
    ratios = std * cross if log_ratio == "normalized" else cross - drift / 2
    terms = objective.terms(ratios, drift, advantages, n_elements=24)
    for t in range(n_steps):
        given = Given(
            by_log_ratio=terms.by_log_ratio[:, t], by_drift=terms.by_drift[:, t], clipped=terms.clipped[:, t],
            log_ratio=objective.log_ratio,
        )  # fmt: skip
        result = fg.guard_loss(velocity(t), old[t], noise[t], advantages, steps[t], objective=given, reweight="none")
        result.loss.backward()
    torch.testing.assert_close(factor.grad, want, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="needs all steps of a trajectory at once"):
        fg.guard_loss(velocity(0), old[0], noise[0], advantages, steps[0], objective=name)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("dppo", {"divergence": "js"}, "divergence must be one of tv, kl; got 'js'"),
        ("dppo", {"threshold": -1.0}, "threshold must be >= 0"),
        ("copg", {"clip_range": 0.0}, "clip_range must be a positive, finite number"),
        ("hinge", {"margin": 0.0}, "margin must be positive and finite; got 0.0"),
        ("hinge", {"classifier": "sign"}, "classifier must be one of ratio, log, root; got 'sign'"),
        ("ppo_rpe", {"beta": 1.0}, r"beta must be a number in \[0, 1\); got 1.0"),
        (
            "ppo_rpe",
            {"threshold": 1.0},
            "threshold = 1.0 is out of reach: .* 1 / beta = 2",
        ),
        ("fr_ppo", {"tau": 0.0}, "tau must be positive"),
        ("power_mean", {"lam": 1.5}, r"lam must be a number in \[0, 1\]; got 1.5"),
        ("cispo", {"clip_range": (1e-5, -1e-5)}, "clip_range must be a positive, finite number"),
        ("sapo", {"tau_negative": math.inf}, "tau_negative must be positive and finite; got inf"),
        ("spo", {"epsilon": 0.0}, "epsilon must be positive"),
        ("dro", {"beta": 0.0}, "beta must be positive"),
        ("copg", {"bandwidth": -0.1}, "bandwidth must be >= 0; got -0.1"),
        ("copg", {"bandwidth": math.inf}, "bandwidth must be at most 1e\\+06; got inf"),
        ("surrogate", {"log_ratio": "gaussian"}, "log_ratio must be one of normalized, plain; got 'gaussian'"),
        ("grpo_guard", {"dual_clip": 1.0}, "dual_clip must be a number above 1, or None for no bound; got 1.0"),
    ],
)
def test_options_that_are_refused(name: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(name, **option)


# --- the fused epilogue and the objective's own terms ---------------------------------------------------------------

FUSED = [name for name in OBJECTIVES if build_objective(name).fused() is not None]


@pytest.mark.parametrize("reweight", ["inverse_dt", "none"])
@pytest.mark.parametrize("name", FUSED)
def test_terms_alone_give_what_the_fused_epilogue_gives(name: str, reweight: Any) -> None:
    fused = build_objective(name)
    batch = make_batch(torch.float32)
    ref = batch[1] + 0.1
    options: Any = {"reweight": reweight, "ref_velocity": ref, "kl_weight": 0.1}
    alone, together = (outcome(batch, objective, **options) for objective in (Unfused(fused), fused))
    for got, want in zip(alone, together, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ONE_STEP)
def test_terms_alone_between_the_kernels(name: str, kernel_device: str) -> None:
    batch = tuple(item.to(kernel_device) for item in make_batch(torch.float32))
    batch = (batch[0].detach().requires_grad_(), *batch[1:])
    got, want = (outcome(batch, Unfused(build_objective(name)), backend=backend) for backend in ("triton", "torch"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_a_class_that_changes_its_base_is_not_computed_as_its_base() -> None:
    @dataclass(frozen=True)
    class Doubled(GrpoGuard):
        def terms(self, *numbers: Tensor, n_elements: int) -> Terms:
            terms = super().terms(*numbers, n_elements=n_elements)
            return terms._replace(loss=2 * terms.loss, by_log_ratio=2 * terms.by_log_ratio)

    @dataclass(frozen=True)
    class Normalized(FlowGrpo):
        log_ratio: ClassVar[LogRatio] = "normalized"

    @dataclass(frozen=True)
    class Smoothed(FlowGrpo):
        bandwidth: ClassVar[float] = 5.0  # type: ignore[misc]

    assert outcome(make_batch(), Smoothed())[1].abs().max() < 0.1 * outcome(make_batch(), FlowGrpo())[1].abs().max()
    batch, plain = make_batch(), build_objective("grpo_guard")
    assert FUSED == ["grpo_guard", "flow_grpo", "flow_dppo", "op_grpo"]
    twice, once = outcome(batch, Doubled()), outcome(batch, plain)
    assert torch.equal(twice[0], 2 * once[0])
    torch.testing.assert_close(twice[-1], 2 * once[-1])
    for got, want in zip(outcome(batch, Normalized()), outcome(batch, plain), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="log_ratio must be one of normalized, plain; got 'normalised'"):
        type("Misspelt", (FlowGrpo,), {"log_ratio": "normalised"})


def test_a_list_is_a_pair() -> None:
    of_list, of_tuple = (build_objective("grpo_guard", clip_range=kind((1e-3, 2e-3))) for kind in (list, tuple))
    assert of_list == of_tuple
    assert hash(of_list) == hash(of_tuple)


@pytest.mark.parametrize("reweight", ["inverse_dt", "none"])
@pytest.mark.parametrize("log_ratio", ["plain", "normalized"])
def test_gradcheck_of_an_objective_that_moves_the_drift(log_ratio: LogRatio, reweight: Any) -> None:
    velocity, *rest = make_batch()
    objective = Penalized(log_ratio)

    def loss(moved: Tensor) -> Tensor:
        return fg.guard_loss(moved, *rest, objective=objective, reweight=reweight, reduction="none").loss

    assert torch.autograd.gradcheck(loss, velocity)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_instance_compiles_to_one_graph(reduction: Any) -> None:
    torch._dynamo.reset()
    velocity, *rest = make_batch(torch.float32)
    objective = Penalized()

    def loss(moved: Tensor) -> Tensor:
        return fg.guard_loss(moved, *rest, objective=objective, reduction=reduction).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        (grad,) = torch.autograd.grad(function(velocity), velocity)
        torch.testing.assert_close(function(velocity), loss(velocity))
        torch.testing.assert_close(grad, torch.autograd.grad(loss(velocity), velocity)[0])


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_number_that_changes_makes_two_graphs_at_most(name: str) -> None:
    """The second is that for all further values."""
    torch._dynamo.reset()
    velocity, *rest = make_batch(torch.float32)
    options = objective_formulas.LARGE.get(name, [{}])[-1]
    numbers = [option for option, value in options.items() if isinstance(value, float)]
    graphs = CompileCounter()

    def loss(moved: Tensor, options: dict[str, Any]) -> Tensor:
        return fg.guard_loss(moved, *rest, objective=name, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for i in range(4):
        changed = options | {option: options[option] * (1 - 0.01 * i) for option in numbers}
        (got,), (want,) = (torch.autograd.grad(run(velocity, changed), velocity) for run in (compiled, loss))
        torch.testing.assert_close(got, want)
    assert graphs.frame_count <= 2


def test_no_other_file_names_an_objective() -> None:
    """A name that occurs elsewhere in the package is a missing question to the objective.

    An integration has to say which objective is another trainer's.
    """
    own = {ROOT / "fastguard" / "loss" / "objectives", ROOT / "fastguard" / "integrations"}
    files = [*ROOT.glob("fastguard/**/*.py"), *ROOT.glob("kernels/*.py")]
    assert len(files) > 100
    names = re.compile(rf"""["'](?:{"|".join(OBJECTIVES)})["']""")
    assert [str(file) for file in files if not own & {*file.parents} and names.search(file.read_text())] == []
