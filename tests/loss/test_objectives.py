"""The table of objectives, what each answers, and objectives that the fused kernel does not know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import ROOT
from torch import Tensor

import fastguard as fg
from fastguard.loss.objectives import OBJECTIVES, OPTIONS, Objective, Terms, build_objective
from fastguard.loss.objectives.base import Ratio
from fastguard.loss.objectives.flow_grpo import FlowGrpo
from fastguard.loss.objectives.grpo_guard import GrpoGuard


@dataclass(frozen=True)
class Unfused(Objective):
    """Another objective by way of its terms alone."""

    limit_name: ClassVar[str] = "limit"

    twin: Objective
    limit: float = 1.0  # type: ignore[misc]

    @property
    def ratio(self) -> Ratio:  # type: ignore[override]
        return self.twin.ratio

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        return self.twin.terms(log_ratio, drift, advantages, n_elements=n_elements)


@dataclass(frozen=True)
class Penalized(Objective):
    """`-a r` and a penalty that is quadratic in the drift, so that the drift has a derivative of its own."""

    title: ClassVar[str] = "penalized"
    moves_drift: ClassVar[bool] = True

    ratio: Ratio = "gaussian"  # type: ignore[misc]
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
    assert objective.limit_name in OPTIONS[name]
    assert objective.limit > 0
    assert objective.moved(torch.tensor([-0.5]), torch.tensor([0.5])).item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_are_the_derivatives_of_the_loss(name: str, dtype: torch.dtype) -> None:
    """Against central differences, on both sides of each limit."""
    limits: dict[str, Any] = {"clip_range": (0.1, 0.3), "kl_threshold": 0.1}
    options = {option: value for option, value in limits.items() if option in OPTIONS[name]}
    objective = build_objective(name, **options)
    moves, scores = torch.tensor([-0.5, -0.05, 0.05, 0.5]), torch.tensor([-7.0, -1.0, 0.0, 2.0])
    log_ratio, advantages = (x.flatten() for x in torch.meshgrid(moves, scores, indexing="ij"))
    drift = torch.tensor([0.01, 0.5]).repeat_interleave(len(log_ratio))
    log_ratio, advantages = log_ratio.repeat(2), advantages.repeat(2)
    terms = objective.terms(log_ratio.to(dtype), drift.to(dtype), advantages.to(dtype), n_elements=9)
    assert {t.dtype for t in terms} == {dtype, torch.bool}
    if options:
        assert 0 < terms.clipped.sum() < len(drift)

    def loss(move_ratio: float, move_drift: float) -> Tensor:
        moved = log_ratio.double() + move_ratio, drift.double() + move_drift
        return objective.terms(*moved, advantages.double(), n_elements=9).loss

    h = 1e-6
    for got, plus, minus in (
        (terms.by_log_ratio, loss(h, 0), loss(-h, 0)),
        (terms.by_drift, loss(0, h), loss(0, -h)),
    ):
        torch.testing.assert_close(got.double(), (plus - minus) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reweight", ["inverse_dt", "none"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_alone_give_what_the_fused_epilogue_gives(name: str, reweight: Any) -> None:
    fused = build_objective(name)
    batch = make_batch(torch.float32)
    ref = batch[1] + 0.1
    options: Any = {"reweight": reweight, "ref_velocity": ref, "kl_weight": 0.1}
    alone, together = (outcome(batch, objective, **options) for objective in (Unfused(fused), fused))
    for got, want in zip(alone, together, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", OBJECTIVES)
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
        ratio: ClassVar[Ratio] = "normalized"

    batch, plain = make_batch(), build_objective("grpo_guard")
    for name, objective in OBJECTIVES.items():
        assert objective().fused() is not None, name
    twice, once = outcome(batch, Doubled()), outcome(batch, plain)
    assert torch.equal(twice[0], 2 * once[0])
    torch.testing.assert_close(twice[-1], 2 * once[-1])
    for got, want in zip(outcome(batch, Normalized()), outcome(batch, plain), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(TypeError, match="ratio must be one of normalized, gaussian; got 'normalised'"):
        type("Misspelt", (FlowGrpo,), {"ratio": "normalised"})


def test_a_list_is_a_pair() -> None:
    of_list, of_tuple = (build_objective("grpo_guard", clip_range=kind((1e-3, 2e-3))) for kind in (list, tuple))
    assert of_list == of_tuple
    assert hash(of_list) == hash(of_tuple)


@pytest.mark.parametrize("reweight", ["inverse_dt", "none"])
@pytest.mark.parametrize("ratio", ["gaussian", "normalized"])
def test_gradcheck_of_an_objective_that_moves_the_drift(ratio: Ratio, reweight: Any) -> None:
    velocity, *rest = make_batch()
    objective = Penalized(ratio)

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


def test_no_other_file_names_an_objective() -> None:
    """A name that occurs elsewhere in the package is a missing question to the objective.

    An integration has to say which objective is another trainer's.
    """
    own = {ROOT / "fastguard" / "loss" / "objectives", ROOT / "fastguard" / "integrations"}
    files = [*ROOT.glob("fastguard/**/*.py"), *ROOT.glob("kernels/*.py")]
    assert len(files) > 100
    names = re.compile("|".join(OBJECTIVES))
    assert [str(file) for file in files if not own & {*file.parents} and names.search(file.read_text())] == []
