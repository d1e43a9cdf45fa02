"""The public losses: what they promise beside their numbers. Numbers are in test_golden and test_transition."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import own_options
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastguard as fg
from fastguard.loss import calls
from fastguard.loss.objectives import OBJECTIVES, Terms
from fastguard.loss.objectives.flow_dppo import FlowDppo
from fastguard.loss.objectives.grpo_guard import GrpoGuard
from fastguard.ops import registry
from fastguard.ops import transition as naive


def make_batch(count: int = 4, size: int = 24, dtype: torch.dtype = torch.float32, change: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(count + size)
    old, delta, noise = (torch.randn((count, size), generator=generator, dtype=torch.float64) for _ in range(3))
    velocity = (old + change * delta).to(dtype).requires_grad_()
    sigma = torch.linspace(0.9, 0.4, count, dtype=torch.float64)
    step = fg.flow_sde(sigma, sigma - 0.2)
    if dtype != torch.float64:
        step = fg.flow_sde(sigma.float(), sigma.float() - 0.2)
    advantages = torch.linspace(-2, 2, count, dtype=torch.float64).to(
        dtype if dtype == torch.float64 else torch.float32
    )
    return [velocity, old.to(dtype), noise.to(dtype), advantages, step]


def loss_and_grad(batch: Any, **options: Any) -> tuple[fg.GuardLoss, Tensor]:
    result = fg.guard_loss(*batch, **options)
    (grad,) = torch.autograd.grad(result.loss, batch[0], torch.ones_like(result.loss))
    return result, grad


# --- what comes out -------------------------------------------------------------------------------------------------


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    batch = make_batch(change=0.0)
    result, grad = loss_and_grad(batch, reduction="sum", reweight="none")
    assert (result.log_ratio == 0).all()
    assert (result.ratio == 1).all()
    assert not result.clipped.any()
    _, _, noise, advantages, step = batch
    expected = naive.per_sample(-advantages * step.velocity_coef / noise.shape[1], noise) * noise
    torch.testing.assert_close(grad, expected)


def test_shapes_dtypes_and_what_is_detached() -> None:
    batch = make_batch(dtype=torch.bfloat16)
    result = fg.guard_loss(*batch)
    assert result.loss.shape == ()
    assert result.loss.dtype == torch.float32
    assert result.loss.requires_grad
    for name in ("log_ratio", "ratio", "cross", "drift"):
        value = getattr(result, name)
        assert value.shape == (4,)
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert result.clipped.dtype == torch.bool
    assert result.kl is None
    assert fg.guard_loss(*make_batch(dtype=torch.float64)).log_ratio.dtype == torch.float64


def test_reductions() -> None:
    batch = make_batch()
    each, sum_, mean = (fg.guard_loss(*batch, reduction=name).loss for name in ("none", "sum", "mean"))
    assert each.shape == (4,)
    torch.testing.assert_close(each.sum(), sum_)
    torch.testing.assert_close(sum_ / 4, mean)


def test_gradients_flow_to_the_velocity_alone() -> None:
    batch = make_batch()
    others = [tensor.requires_grad_() for tensor in batch[1:4]]
    fg.guard_loss(*batch, objective="flow_grpo").loss.backward()
    assert batch[0].grad is not None
    assert all(tensor.grad is None for tensor in others)
    frozen = [batch[0].detach(), *batch[1:]]
    assert not fg.guard_loss(*frozen).loss.requires_grad
    with torch.no_grad():
        assert not fg.guard_loss(*batch).loss.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_clip_decision_keeps_its_digits(backend: str, side: int, kernel_device: str) -> None:
    """At 2e-6 a float32 ratio has 17 steps of 1.2e-7; it is decided on the log-ratio, to 1e-5 of it."""
    clip, size = 2e-6, 64
    step = fg.dance_sde(0.5, 0.4).expand(2).to(kernel_device)
    noise = torch.ones(2, size, device=kernel_device)
    old = torch.zeros(2, size, device=kernel_device)
    edge = math.log1p(side * clip) / step.velocity_coef[0].item()
    velocity = edge * torch.tensor([[1 - 1e-5], [1 + 1e-5]], device=kernel_device).expand(2, size)
    for advantage, expected in ((float(side), [False, True]), (-float(side), [False, False]), (0.0, [False, False])):
        advantages = torch.full((2,), advantage, device=kernel_device)
        result = fg.guard_loss(velocity, old, noise, advantages, step, clip_range=clip, backend=backend)
        assert result.clipped.tolist() == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_pair_of_clip_ranges(backend: str, kernel_device: str) -> None:
    size = 8
    step = fg.dance_sde(0.5, 0.4).expand(4).to(kernel_device)
    log_ratio = torch.tensor([[-0.15], [-0.05], [0.15], [0.35]], device=kernel_device)
    velocity = (log_ratio / step.velocity_coef[0]).expand(4, size)
    noise, old = torch.ones(4, size, device=kernel_device), torch.zeros(4, size, device=kernel_device)
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=kernel_device)
    options = {"clip_range": (0.1, 0.3), "reduction": "none", "reweight": "none", "backend": backend}
    result = fg.guard_loss(velocity, old, noise, advantages, step, **options)
    assert result.clipped.tolist() == [True, False, False, True]
    torch.testing.assert_close(result.loss[[0, 3]].cpu(), torch.tensor([0.9, -1.3]))


def test_equalized_reweighting_gives_every_step_the_same_gradient() -> None:
    """1 / |B| makes grpo_guard's gradient `-a eps / D` for every sampler; 1 / |dt| does so up to B / dt."""
    for kind in (fg.flow_sde, fg.dance_sde, fg.cps):
        step = kind(torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.7, 0.5, 0.1]), 0.8)
        old, noise = torch.randn(3, 50), torch.randn(3, 50)
        velocity = old.clone().requires_grad_()
        loss = fg.guard_loss(velocity, old, noise, torch.ones(3), step, reweight="equalized", reduction="sum").loss
        loss.backward()
        torch.testing.assert_close(velocity.grad, -torch.sign(step.velocity_coef)[:, None] * noise / 50)


def test_a_tensor_of_weights_and_a_reported_kl() -> None:
    batch = make_batch()
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0])
    plain = fg.guard_loss(*batch, reweight="none", reduction="none").loss
    torch.testing.assert_close(fg.guard_loss(*batch, reweight=weight, reduction="none").loss, weight * plain)
    ref = batch[1] + 0.1
    result, grad = loss_and_grad(batch, ref_velocity=ref, kl_type="velocity")
    torch.testing.assert_close(result.kl, naive.velocity_kl(batch[0].detach(), ref))
    torch.testing.assert_close(grad, loss_and_grad(batch)[1])  # reported, not weighted in


def test_advantages_are_clipped_except_for_flow_dppo() -> None:
    batch = make_batch(change=0.0)
    batch[3] = torch.tensor([-8.0, 8.0, 1.0, 0.0])
    losses = {
        (objective, adv_clip): fg.guard_loss(
            *batch, reweight="none", reduction="none", **own_options(objective, adv_clip=adv_clip)
        ).loss.tolist()
        for objective in ("grpo_guard", "flow_dppo")
        for adv_clip in (5.0, None)
    }
    assert losses["grpo_guard", 5.0] == [5, -5, -1, 0]
    assert losses["grpo_guard", None] == losses["flow_dppo", 5.0] == [8, -8, -1, 0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo", "flow_dppo"])
@pytest.mark.parametrize(
    ("where", "poison"),
    [
        *itertools.product(["velocity", "old_velocity", "noise"], [math.nan, math.inf]),
        ("advantages", math.nan),  # an infinite one is clipped to adv_clip, by definition
    ],
)
def test_a_bad_number_stays_visible_in_its_sample_alone(where, poison, objective, backend, kernel_device) -> None:
    batch = make_batch()
    tensors = {"velocity": batch[0].detach(), "old_velocity": batch[1], "noise": batch[2], "advantages": batch[3]}
    tensors[where] = tensors[where].clone()
    tensors[where][(1, 3) if where != "advantages" else 1] = poison
    tensors = {name: tensor.to(kernel_device) for name, tensor in tensors.items()}
    velocity = tensors["velocity"].requires_grad_()
    result = fg.guard_loss(
        velocity, *list(tensors.values())[1:], batch[4].to(kernel_device), reduction="none", backend=backend,
        **own_options(objective, clip_range=1e-4, kl_threshold=0.0),
    )  # fmt: skip
    others = [0, 2, 3]
    assert result.loss[1].isnan()
    assert result.loss[others].isfinite().all()
    result.loss.backward(torch.ones_like(result.loss))
    assert velocity.grad is not None
    assert not velocity.grad[1].isfinite().any()
    assert velocity.grad[others].isfinite().all()
    if where != "advantages":
        assert result.log_ratio[1].isnan()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_empty_batch_gives_a_zero_loss_with_a_zero_gradient(backend: str, kernel_device: str) -> None:
    empty = torch.empty(0, 4, 8, device=kernel_device, requires_grad=True)
    step = fg.dance_sde(torch.empty(0), torch.empty(0)).to(kernel_device)
    advantages = torch.empty(0, device=kernel_device)
    result = fg.guard_loss(empty, empty.detach(), empty.detach(), advantages, step, backend=backend)
    assert result.loss.item() == 0
    result.loss.backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 4, 8)
    assert fg.guard_loss(empty, empty, empty, advantages, step, reduction="none", backend=backend).loss.shape == (0,)
    moments = fg.transition_moments(empty, empty, empty, step, backend=backend)
    assert moments.cross.shape == (0,)
    moments.cross.sum().backward()
    means = fg.guard_loss_from_means(empty, empty, empty, advantages, step, backend=backend)
    assert means.loss.item() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo", "flow_dppo"])
def test_no_advantage_means_no_loss_even_where_the_ratio_overflows(backend, objective, kernel_device) -> None:
    """A group with equal rewards has advantages of exactly 0, and 0 * inf would be NaN."""
    step = fg.dance_sde(0.5, 0.4).expand(2).to(kernel_device)
    noise, old = torch.ones(2, 16, device=kernel_device), torch.zeros(2, 16, device=kernel_device)
    velocity = torch.full((2, 16), 3000 * math.copysign(1, step.velocity_coef[0].item()), device=kernel_device)
    velocity[0] = 0
    velocity.requires_grad_()
    result = fg.guard_loss(
        velocity, old, 100 * noise, torch.zeros(2, device=kernel_device), step, objective=objective, backend=backend,
        reduction="none",
    )  # fmt: skip
    assert objective != "grpo_guard" or result.ratio[1].isinf()
    assert result.loss.tolist() == [0, 0]
    (grad,) = torch.autograd.grad(result.loss.sum(), velocity)
    assert not grad.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_kl_that_is_only_reported_does_not_touch_the_loss(backend: str, kernel_device: str) -> None:
    batch = [item.to(kernel_device) for item in make_batch()]
    ref = torch.full_like(batch[1], math.nan)
    result = fg.guard_loss(*batch, ref_velocity=ref, backend=backend)
    assert result.kl is not None
    assert result.kl.isnan().all()
    assert result.loss.isfinite()


def test_changing_the_reported_numbers_in_place_does_not_change_the_gradient() -> None:
    batch = make_batch()
    _result, grad = loss_and_grad(batch)
    again = fg.guard_loss(*batch)
    again.log_ratio.zero_()
    assert torch.equal(torch.autograd.grad(again.loss, batch[0])[0], grad)


# --- autograd, compilation, operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo", "flow_dppo"])
def test_gradcheck_in_float64(objective: str) -> None:
    batch = make_batch(dtype=torch.float64)
    ref = batch[1] + 0.1

    def loss(velocity: Tensor) -> Tensor:
        return fg.guard_loss(
            velocity, *batch[1:], ref_velocity=ref, kl_weight=0.5, reduction="none",
            **own_options(objective, clip_range=10.0, kl_threshold=10.0),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, batch[0])
    moments = lambda v: fg.transition_moments(v, *batch[1:3], batch[4], ref)  # noqa: E731
    assert torch.autograd.gradcheck(moments, batch[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_new_objective_from_the_moments(backend: str, kernel_device: str) -> None:
    """transition_moments and a few lines of PyTorch rebuild flow_grpo, gradient included."""
    velocity, old, noise, advantages, step = (item.to(kernel_device) for item in make_batch())
    velocity = velocity.detach().requires_grad_()
    moments = fg.transition_moments(velocity, old, noise, step, backend=backend)
    ratio = torch.exp(moments.cross - moments.drift / 2)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.1)).mean()
    (grad,) = torch.autograd.grad(loss, velocity)
    options = {"objective": "flow_grpo", "clip_range": 0.1, "reweight": "none", "backend": backend}
    result, expected = loss_and_grad([velocity, old, noise, advantages, step], **options)
    torch.testing.assert_close(loss, result.loss)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo"])
def test_compiled_without_graph_breaks(objective: str) -> None:
    """The whole graph, model included; a batch of another size and another clip range follow without trouble."""
    torch._dynamo.reset()
    model = torch.nn.Linear(24, 24)

    def update(x: Tensor, old: Tensor, noise: Tensor, advantages: Tensor, step: fg.Transition, clip: float) -> Any:
        result = fg.guard_loss(model(x), old, noise, advantages, step, objective=objective, clip_range=clip)
        moments = fg.transition_moments(model(x), old, noise, step)
        return result.loss + moments.drift.mean(), result.log_ratio, result.clipped

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for count, clip in ((4, 1e-3), (6, 1e-2)):
        batch = make_batch(count)
        arguments = [batch[0].detach(), *batch[1:], clip]
        grads = []
        for function in (update, compiled):
            model.zero_grad()
            loss, log_ratio, clipped = function(*arguments)
            loss.backward()
            assert model.weight.grad is not None
            grads.append((loss.detach(), log_ratio, clipped, model.weight.grad.clone()))
        for eager, fused in zip(*grads, strict=True):
            torch.testing.assert_close(eager, fused)


EIGHT = [0.02 * i for i in range(1, 9)]
SIZES = range(2, 10)


def with_step(step: fg.Transition, count: int = 4) -> Any:
    return [*make_batch(count)[:4], step]


def means(std: float, dt: float, count: int = 4) -> Any:
    return with_step(fg.gaussian_step(std, dt), count)


def from_means(mean: Tensor, old: Tensor, sample: Tensor, advantages: Tensor, step: fg.Transition) -> fg.GuardLoss:
    return fg.guard_loss_from_means(sample, mean, old, advantages, step)


def moments(velocity: Tensor, old: Tensor, noise: Tensor, _: Tensor, step: fg.Transition) -> fg.Moments:
    return fg.transition_moments(velocity, old, noise, step)


COMPILED: dict[str, tuple[Callable[..., Any], Callable[[], list[Any]]]] = {
    "loss, batch size": (fg.guard_loss, lambda: [make_batch(count) for count in SIZES]),
    "loss, batch size of one step": (fg.guard_loss, lambda: [with_step(fg.dance_sde(0.5, 0.4), n) for n in SIZES]),
    "loss, step": (fg.guard_loss, lambda: [with_step(fg.dance_sde(0.5, 0.4, x)) for x in EIGHT]),
    "means, std": (from_means, lambda: [means(x, -0.1) for x in EIGHT]),
    "means, dt": (from_means, lambda: [means(0.1, -x) for x in EIGHT]),
    "means, batch size and std": (from_means, lambda: [means(0.1 * n, -0.1, n) for n in SIZES]),
    "moments, batch size": (moments, lambda: [with_step(fg.dance_sde(0.5, 0.4), n) for n in SIZES]),
    "moments, step": (moments, lambda: [with_step(fg.dance_sde(0.5, 0.4, x)) for x in EIGHT]),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_once_for_all_values(case: str, count_graphs) -> None:
    """Like the textbook formula: the first graph takes the first value, the second all others."""
    function, calls = COMPILED[case]
    assert count_graphs(function, calls()) <= 2


@pytest.mark.parametrize(
    ("option", "fixed"),
    [
        ("clip_range", {"objective": "grpo_guard"}),
        ("clip_range", {"objective": "flow_grpo"}),
        ("adv_clip", {"clip_range": (0.5, 1.5)}),
        ("kl_weight", {"objective": "grpo_guard"}),
        ("kl_threshold", {"objective": "flow_dppo"}),
    ],
)
def test_compiled_once_for_all_limits(option: str, fixed: dict[str, Any], count_graphs) -> None:
    """A limit may change in a run, as a weight of the KL that follows a target does."""
    batch = make_batch(change=0.3)
    ref = batch[1] + 0.1

    def loss(*arguments: Any) -> fg.GuardLoss:
        *inputs, limit = arguments
        return fg.guard_loss(*inputs, ref_velocity=ref, **{option: limit}, **fixed)

    assert count_graphs(loss, [(*batch, limit) for limit in EIGHT]) <= 2
    outcomes = [loss(*batch, limit) for limit in EIGHT]
    assert len({result.loss.item() for result in outcomes}) > 1
    if option in ("clip_range", "kl_threshold"):
        assert len({result.clipped.sum().item() for result in outcomes}) > 1


def test_a_second_derivative_is_refused() -> None:
    """The backward pass is not differentiable: its result must not enter a graph as if it were."""
    batch = make_batch()
    losses = (
        fg.guard_loss(*batch, objective="flow_grpo").loss,
        fg.transition_moments(*batch[:3], batch[4]).drift.sum(),
    )
    for loss in losses:
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss, batch[0], create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo"])
def test_compiled_and_in_a_cuda_graph(objective: str) -> None:
    """Both give the eager numbers: no host synchronization, no graph break. The interpreter can do neither."""
    torch._dynamo.reset()
    velocity, old, noise, advantages, step = (item.to("cuda") for item in make_batch(size=5000))
    velocity = velocity.detach().requires_grad_()

    def update() -> tuple[Tensor, Tensor]:
        result = fg.guard_loss(velocity, old, noise, advantages, step, objective=objective)
        (grad,) = torch.autograd.grad(result.loss, velocity)
        return result.loss.detach(), grad  # a graph that lives on would tie later captures to this stream

    loss, grad = update()
    compiled = torch.compile(
        lambda v: fg.guard_loss(v, old, noise, advantages, step, objective=objective).loss, fullgraph=True
    )
    compiled_loss = compiled(velocity)
    assert torch.equal(compiled_loss, loss)
    assert torch.equal(torch.autograd.grad(compiled_loss, velocity)[0], grad)
    del compiled_loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = update()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], loss)
    assert torch.equal(captured[1], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_defaults_of_torch_do_not_matter(dtype: torch.dtype, other_defaults) -> None:
    velocity, old, noise, advantages, step = make_batch(dtype=dtype)
    ref = old + 0.1

    def results() -> list[Tensor]:
        found = []
        for objective in ("grpo_guard", "flow_grpo", "flow_dppo"):
            options = own_options(objective, clip_range=(0.001, 0.002), kl_weight=0.1)
            found += fg.guard_loss(velocity, old, noise, advantages, step, ref_velocity=ref, **options)
            found += fg.guard_loss_from_means(
                noise, velocity, old, advantages, fg.gaussian_step(0.123, -0.045), ref_prev_sample_mean=ref, **options
            )
        found += fg.transition_moments(velocity, old, noise, step, ref)
        total = sum(value.double().sum() for value in found)
        return [*found, *torch.autograd.grad(total, velocity)]

    expected = results()
    with other_defaults():
        came = results()
    for a, b in zip(came, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_std_and_dt_of_float64_latents_keep_their_digits() -> None:
    velocity, old, noise, advantages, _ = make_batch(dtype=torch.float64)
    std, dt = (torch.tensor(value, dtype=torch.float64) for value in (0.123, -0.045))
    exact = fg.Transition("mine", None, None, std[None], dt[None])
    want = fg.guard_loss_from_means(noise, velocity, old, advantages, exact).loss
    for pair in ((std, dt), (0.123, dt), (std, np.float64(-0.045)), (std.expand(4, 1), dt[None, None])):
        assert torch.equal(
            fg.guard_loss_from_means(noise, velocity, old, advantages, fg.gaussian_step(*pair)).loss, want
        )
    vanishes = fg.gaussian_step(1e-60, -0.045)  # in float32
    with pytest.raises(ValueError, match="std == 0"):
        fg.guard_loss_from_means(noise.float(), velocity.float(), old.float(), advantages, vanishes)


def test_under_autocast_the_loss_stays_exact() -> None:
    batch = make_batch(size=300)
    plain, grad = loss_and_grad(batch, objective="flow_grpo")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grad = loss_and_grad(batch, objective="flow_grpo")
    assert torch.equal(plain.log_ratio, cast.log_ratio)
    assert torch.equal(grad, cast_grad)


def test_low_matmul_precision_does_not_touch_the_loss() -> None:
    batch = make_batch(size=4096)
    plain = fg.guard_loss(*batch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(fg.guard_loss(*batch).log_ratio, plain.log_ratio)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo"])
@pytest.mark.parametrize("entry", ["guard_loss", "guard_loss_from_means", "transition_moments"])
def test_a_rollout_under_inference_mode_trains_as_one_under_no_grad(entry: str, objective: str) -> None:
    """Autograd refuses to save such tensors; the loss saves ordinary tensors over the same memory instead."""

    def rolled_out(mode: Any) -> dict[str, Any]:
        with mode:
            velocity, old, _, advantages, step = make_batch(size=999)
            step = step[:1].to("cpu").expand(4)
            latents = torch.linspace(-1.0, 1.0, old.numel()).view_as(old)
            noise = fg.sde_step(latents, old, step, seeds=torch.arange(4)).noise
            strided = noise.t().contiguous().t()
            return {
                "start": velocity.detach(), "old": old[:, :], "noise": strided, "advantages": advantages,
                "step": step, "ref": old + 0.1, "reweight": torch.linspace(0.5, 2.0, 4),
            }  # fmt: skip

    def gradient(start: Tensor, old: Tensor, noise: Tensor, advantages: Tensor, step: Any, **more: Tensor) -> Tensor:
        velocity = start.clone().requires_grad_()
        options = own_options(objective, reweight=more["reweight"], kl_weight=0.1, clip_range=0.5)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if entry == "guard_loss":
                loss = fg.guard_loss(velocity, old, noise, advantages, step, ref_velocity=more["ref"], **options).loss
            elif entry == "guard_loss_from_means":
                loss = fg.guard_loss_from_means(
                    noise, velocity, old, advantages, step, ref_prev_sample_mean=more["ref"], **options
                ).loss
            else:
                moments = fg.transition_moments(velocity, old, noise, step, more["ref"])
                loss = (moments.cross.exp() + moments.drift + moments.ref_drift).sum()
        rollouts = {tensor.untyped_storage().data_ptr() for tensor in (velocity, old, noise, more["ref"])}
        assert all(t.untyped_storage().data_ptr() in rollouts for t in saved if t.numel() >= velocity.numel())
        (grad,) = torch.autograd.grad(loss, velocity)
        return grad

    stored = rolled_out(torch.inference_mode())
    assert stored["noise"].is_inference()
    assert torch.equal(gradient(**stored), gradient(**rolled_out(torch.no_grad())))


def test_a_loss_under_inference_mode_is_the_same_without_a_gradient() -> None:
    batch = make_batch()
    with torch.inference_mode():
        result = fg.guard_loss(*batch, objective="flow_grpo")
        moments = fg.transition_moments(*batch[:3], batch[4])
    assert torch.equal(result.loss, fg.guard_loss(*batch, objective="flow_grpo").loss)
    assert torch.equal(moments.drift, fg.transition_moments(*batch[:3], batch[4]).drift)
    assert not result.loss.requires_grad


def test_inside_gradient_checkpointing() -> None:
    batch = make_batch()
    model = torch.nn.Linear(24, 24)
    run = lambda x: fg.guard_loss(model(x), *batch[1:]).loss  # noqa: E731
    x = batch[0].detach()
    (plain,) = torch.autograd.grad(run(x), model.weight)
    (saved,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), model.weight)
    assert torch.equal(plain, saved)


def test_what_is_kept_for_backward() -> None:
    """At most 64 bytes a sample beyond the caller's tensors, and for grpo_guard not even a hold on the velocity."""
    for objective, holds_velocity in (("grpo_guard", False), ("flow_grpo", True)):
        batch = make_batch(size=4096, dtype=torch.bfloat16)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fg.guard_loss(*batch, objective=objective)
        callers = {tensor.untyped_storage().data_ptr() for tensor in batch[:4]}
        assert sum(size for pointer, size in saved.items() if pointer not in callers) <= 64 * 4
        assert (batch[0].untyped_storage().data_ptr() in saved) == holds_velocity


# --- random inputs --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 5),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    permuted=st.booleans(),
    scale=st.floats(0, 1e3),
    objective=st.sampled_from(["grpo_guard", "flow_grpo", "flow_dppo"]),
    kind=st.sampled_from([fg.flow_sde, fg.dance_sde, fg.cps]),
    clip=st.floats(1e-7, 3.0),
    seed=st.integers(0, 10_000),
)
def test_any_shape_stride_dtype_and_scale(count, shape, dtype, permuted, scale, objective, kind, clip, seed) -> None:
    """Backends agree, nothing crashes, no finite input gives a NaN, and strides do not matter."""
    generator = torch.Generator().manual_seed(seed)
    full = (count, *shape)

    def normal(factor: float = 1.0) -> Tensor:
        value = (factor * torch.randn(full, generator=generator)).clamp(-60_000, 60_000).to(dtype)
        if permuted and len(full) > 2:
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        return value

    velocity, old, noise = normal(scale).requires_grad_(), normal(scale), normal()
    sigma = torch.rand(count, generator=generator) * 0.8 + 0.15
    step = kind(sigma, sigma / 2)
    advantages = 3 * torch.randn(count, generator=generator)
    options = own_options(objective, clip_range=clip, reduction="none")
    result = fg.guard_loss(velocity, old, noise, advantages, step, **options)
    assert not result.loss.isnan().any()
    (grad,) = torch.autograd.grad(result.loss, velocity, torch.ones_like(result.loss))
    assert grad.shape == velocity.shape
    assert not grad[result.clipped].any()
    again = fg.guard_loss(
        *(tensor.detach().contiguous() for tensor in (velocity, old, noise)), advantages, step, **options
    )
    assert torch.equal(again.loss, result.loss)
    if count and dtype != torch.float64 and not torch.cuda.is_available():
        kernel = fg.guard_loss(velocity, old, noise, advantages, step, backend="triton", **options)
        torch.testing.assert_close(kernel.drift, result.drift, rtol=1e-5, atol=1e-30)
        cancelled = 1e-5 * float(result.drift.sqrt().max()) + 1e-30  # of terms of both signs; below, floats lose digits
        torch.testing.assert_close(kernel.cross, result.cross, rtol=1e-4, atol=cancelled)


# --- refusals -------------------------------------------------------------------------------------------------------


def arguments() -> dict[str, Any]:
    names = ("velocity", "old_velocity", "noise", "advantages", "step")
    return dict(zip(names, make_batch(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old_velocity": torch.zeros(4, 23)}, ValueError, r"old_velocity has shape \(4, 23\), velocity \(4, 24\)"),
        ({"noise": torch.zeros(3, 24)}, ValueError, r"noise has shape \(3, 24\)"),
        ({"noise": torch.zeros(4, 24, dtype=torch.int32)}, TypeError, "noise must be bfloat16, .* got torch.int32"),
        ({"old_velocity": torch.zeros(4, 24).bfloat16()}, TypeError, "old_velocity is torch.bfloat16, velocity"),
        ({"noise": None}, TypeError, "noise must be a tensor; got NoneType"),
        ({"velocity": None}, TypeError, "velocity must be a tensor; got NoneType"),
        ({"noise": torch.zeros(4, 24).to(torch.float8_e4m3fn)}, TypeError, "got torch.float8_e4m3fn"),
        ({"noise": torch.zeros(4, 24, device="meta")}, ValueError, "noise is on meta, velocity on cpu"),
        ({"advantages": torch.zeros(5)}, ValueError, r"shape \(4,\) or \(4, 1\), one per sample; got \(5,\)"),
        ({"advantages": torch.zeros(4, 2)}, ValueError, r"one per sample; got \(4, 2\)"),
        ({"advantages": torch.zeros(4).long()}, TypeError, "a floating point tensor; got torch.int64"),
        ({"advantages": [1.0] * 4}, TypeError, "got list"),
        ({"step": fg.ode(0.5, 0.3)}, ValueError, r"the ode step has std == 0 at samples \[0\]"),
        ({"step": fg.cps(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.5, 0.4, 0.0, 0.3]))}, ValueError,
         r"cps step has std == 0 at samples \[2\]"),
        ({"step": fg.flow_sde(torch.tensor([0.9, 0.8]), 0.3)}, ValueError, "has 2 entries, the batch 4 samples"),
        ({"step": 0.5}, TypeError, "step must be a Transition"),
        ({"clip_range": 0.0}, ValueError, "clip_range must be a positive, finite number"),
        ({"clip_range": (0.1, -0.1)}, ValueError, "clip_range must be a positive, finite number"),
        ({"clip_range": math.nan}, ValueError, "clip_range must be a positive, finite number"),
        ({"clip_range": None}, ValueError, "clip_range must be a positive, finite number"),
        ({"clip_range": (0.1,)}, ValueError, r"or a pair \(low, high\) of such; got \(0.1,\)"),
        ({"clip_range": True}, ValueError, "clip_range must be a positive, finite number"),
        ({"clip_range": "2e-6"}, ValueError, "got '2e-6'"),
        ({"adv_clip": "5"}, TypeError, "adv_clip must be a number; got '5'"),
        ({"kl_weight": "0.1"}, TypeError, "kl_weight must be a number, or a tensor .*; got '0.1'"),
        ({"reweight": [1.0] * 4}, TypeError, r"reweight must be a number or a floating point tensor; got \[1.0, 1.0"),
        ({"sample_weight": torch.ones(4).long()}, TypeError, "sample_weight must be a number .* got torch.int64"),
        ({"sample_weight": True}, TypeError, "sample_weight must be a number .* got True"),
        ({"kl_weight": torch.ones(4)}, ValueError, "kl_weight as a tensor needs a reference; pass ref_velocity"),
        ({"clip_range": (-0.1, 0.2)}, ValueError, r"distances of the ratio from 1.*; pass \(0.1, 0.2\)"),
        ({"adv_clip": 0.0}, ValueError, "adv_clip must be positive, or None"),
        ({"objective": "ppo"}, ValueError, "objective must be one of grpo_guard, flow_grpo, .*; got 'ppo'"),
        ({"reweight": "dt"}, ValueError, "reweight must be one of none, inverse_dt, equalized, or a factor"),
        ({"reweight": torch.ones(3)}, ValueError, r"one entry per sample, \(4,\) or \(4, 1, 1\); got shape \(3,\)"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch; got 'cuda'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"kl_weight": 0.1}, ValueError, "kl_weight = 0.1 needs a reference; pass ref_velocity"),
        ({"kl_weight": -0.1}, ValueError, "kl_weight must be finite and >= 0"),
        ({"kl_type": "l2", "ref_velocity": torch.zeros(4, 24)}, ValueError, "kl_type must be one of"),
        ({"objective": "flow_dppo", "kl_threshold": -1.0}, ValueError, "kl_threshold must be >= 0"),
        ({"kl_threshold": 1.0}, ValueError, "grpo_guard has no option 'kl_threshold'; it is an option of flow_dppo"),
        ({"clip": 1.0}, ValueError, "grpo_guard has no option 'clip'. Known: clip_range, adv_clip"),
        ({"objective": 3}, TypeError, "objective must be a name or an Objective; got int"),
        ({"objective": FlowDppo(), "kl_threshold": 1.0}, TypeError, "kl_threshold: options belong to a name"),
        ({"ref_velocity": torch.zeros(4, 24).half()}, TypeError, "ref_velocity is torch.float16"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(change, error, message) -> None:
    fg.guard_loss(**arguments())  # a good call of nearly the same kind, which is remembered
    with pytest.raises(error, match=message):
        fg.guard_loss(**{**arguments(), **change})


def test_shapes_without_samples_or_elements_are_refused() -> None:
    step, advantages = fg.dance_sde(0.5, 0.3), torch.zeros(4)
    flat, hollow = torch.zeros(4), torch.zeros(4, 0)
    with pytest.raises(ValueError, match=r"must have shape \(B, ...\), one sample per row; got \(4,\)"):
        fg.guard_loss(flat, flat, flat, advantages, step)
    with pytest.raises(ValueError, match=r"no elements per sample; got shape \(4, 0\)"):
        fg.guard_loss(hollow, hollow, hollow, advantages, step)


def test_triton_is_refused_where_it_cannot_run(monkeypatch) -> None:
    from fastguard.kernels import common

    double = make_batch(dtype=torch.float64)
    with pytest.raises(ValueError, match="bfloat16, float16 and float32; got torch.float64"):
        fg.guard_loss(*double, backend="triton")
    monkeypatch.setattr(common, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs CUDA tensors; got CPU tensors"):
        fg.guard_loss(*make_batch(), backend="triton")
    monkeypatch.setattr(registry, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="triton, which is not installed"):
        fg.guard_loss(*make_batch(), backend="triton")
    fg.guard_loss(*make_batch())  # auto goes on without it


@pytest.mark.parametrize("name", ["velocity", "old_velocity", "noise", "advantages", "ref_velocity"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_check_values_names_the_samples(name: str, poison: float) -> None:
    given = {**arguments(), "ref_velocity": torch.zeros(4, 24)}
    fg.guard_loss(**given, check_values=True)
    given[name] = given[name].detach().clone()
    given[name][2] = poison
    with pytest.raises(ValueError, match=rf"{name} holds NaN or Inf at samples \[2\]"):
        fg.guard_loss(**given, check_values=True)


def test_means_are_checked_as_well() -> None:
    x, advantages = torch.randn(3, 8), torch.ones(3)
    step = fg.gaussian_step(torch.tensor([0.2, 0.1, 0.3]), -0.1)
    loss = fg.guard_loss_from_means
    with pytest.raises(ValueError, match=r"gaussian step has std == 0 at samples \[1\]"):
        loss(x, x, x, advantages, fg.gaussian_step(torch.tensor([0.2, 0.0, 0.3]), -0.1))
    with pytest.raises(ValueError, match="the transition has 2 entries, the batch 3 samples"):
        loss(x, x, x, advantages, step[:2])
    with pytest.raises(TypeError, match="step must be a Transition .* gaussian_step with a std and dt .* got Tensor"):
        loss(x, x, x, advantages, torch.ones(3))
    with pytest.raises(TypeError, match="prev_sample_mean must be a tensor; got NoneType"):
        loss(x, None, x, advantages, step)
    with pytest.raises(ValueError, match="'equalized' is 1 / |velocity_coef|, which the gaussian step does not have"):
        loss(x, x, x, advantages, step, reweight="equalized")
    with pytest.raises(ValueError, match="kl_type='velocity' needs the velocity_coef"):
        loss(x, x, x, advantages, step, ref_prev_sample_mean=x, kl_type="velocity")
    with pytest.raises(ValueError, match="pass ref_prev_sample_mean"):
        loss(x, x, x, advantages, step, kl_weight=0.1)
    with pytest.raises(TypeError, match="old_prev_sample_mean is torch.bfloat16"):
        loss(x, x, x.bfloat16(), advantages, step)
    with pytest.raises(ValueError, match=r"prev_sample holds NaN or Inf at samples \[0\]"):
        loss(torch.full_like(x, math.nan)[:1], x[:1], x[:1], advantages[:1], step[:1], check_values=True)
    for function, args in ((fg.guard_loss, (x, x, x)), (fg.transition_moments, (x, x, x)), (fg.sde_step, (x, x))):
        more = (advantages,) if function is fg.guard_loss else ()
        with pytest.raises(ValueError, match="no latents_coef and velocity_coef, so it serves guard_loss_from_means"):
            function(*args, *more, step)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo"])
def test_factors_come_in_any_shape(backend: str, objective: str, kernel_device: str) -> None:
    batch = [value.to(kernel_device) for value in make_batch()]
    n = len(batch[0])
    options: dict[str, Any] = {"objective": objective, "clip_range": 0.5, "backend": backend}
    options |= {"ref_velocity": batch[1] + 0.1, "reduction": "none"}
    weight = torch.linspace(0.5, 2.0, n, device=kernel_device)
    dt = batch[4].dt.abs()
    kl = fg.guard_loss(*batch, **options).kl
    policy = fg.guard_loss(*batch, **options, reweight="none").loss
    want = policy * weight / dt + weight * kl
    for shape in ((n,), (n, 1), (n, 1, 1)):
        shaped = weight.view(shape)
        result = fg.guard_loss(*batch, **options, sample_weight=shaped, kl_weight=shaped)
        torch.testing.assert_close(result.loss, want)
        given = fg.guard_loss(*batch, **options, reweight=(1 / dt).view(shape), sample_weight=shaped, kl_weight=shaped)
        torch.testing.assert_close(given.loss, want)
    for factor in (3, 3.0, np.float32(3), torch.tensor(3.0, device=kernel_device)):
        torch.testing.assert_close(fg.guard_loss(*batch, **options, reweight=factor).loss, 3 * policy)
        torch.testing.assert_close(fg.guard_loss(*batch, **options, sample_weight=factor).loss, 3 * policy / dt)
    columns = [*batch[:3], batch[3][:, None], batch[4]]
    assert torch.equal(fg.guard_loss(*columns, **options).loss, fg.guard_loss(*batch, **options).loss)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("entry", ["velocities", "means"])
def test_a_kl_weight_per_sample_reaches_the_gradient(backend: str, entry: str, kernel_device: str) -> None:
    velocity, old, noise, advantages, step = (value.to(kernel_device) for value in make_batch(size=300))
    ref, weights = old + 0.1, torch.linspace(0.0, 2.0, len(old), device=kernel_device)

    def gradient(**options: Any) -> Tensor:
        v = velocity.detach().requires_grad_()
        options |= {"clip_range": 0.5, "reduction": "none", "backend": backend, "kl_type": "velocity"}
        if entry == "means":
            loss = fg.guard_loss_from_means(noise, v, old, advantages, step, ref_prev_sample_mean=ref, **options).loss
        else:
            loss = fg.guard_loss(v, old, noise, advantages, step, ref_velocity=ref, **options).loss
        return torch.autograd.grad(loss, v, torch.ones_like(loss))[0]

    plain, one = gradient(), gradient(kl_weight=1.0)
    want = plain + weights[:, None] * (one - plain)
    torch.testing.assert_close(gradient(kl_weight=weights), want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def test_the_velocity_kl_from_means_is_that_from_velocities() -> None:
    velocity, old, noise, advantages, step = make_batch(dtype=torch.float64, size=300)
    latents, ref = torch.randn_like(old), old + 0.3 * torch.randn_like(old)
    mean, old_mean, ref_mean = (naive.transition_mean(latents, v, step) for v in (velocity, old, ref))
    sample = old_mean + naive.per_sample(step.std, latents) * noise
    options: dict[str, Any] = {"kl_weight": 0.7, "kl_type": "velocity"}
    want = fg.guard_loss(velocity, old, noise, advantages, step, ref_velocity=ref, **options)
    came = fg.guard_loss_from_means(sample, mean, old_mean, advantages, step, ref_prev_sample_mean=ref_mean, **options)
    torch.testing.assert_close(came.kl, want.kl)
    torch.testing.assert_close(came.loss, want.loss)
    (grad,) = torch.autograd.grad(want.loss, velocity, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(came.loss, velocity)[0], grad)


def test_a_std_that_is_not_the_draw_s_is_found() -> None:
    old, drawn = torch.randn(2, 2, 1000, 4, generator=torch.Generator().manual_seed(0))
    step = fg.flow_sde(torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.4]))
    sample = old + naive.per_sample(step.std, old) * drawn

    def loss(std: Tensor, rows: int = 2) -> fg.GuardLoss:
        used = fg.gaussian_step(std[:rows], step.dt[:rows])
        return fg.guard_loss_from_means(
            sample[:rows], old[:rows], old[:rows], torch.ones(rows), used, check_values=True
        )

    assert loss(step.std).loss.item() == pytest.approx(float(-(1 / step.dt.abs()).mean()))
    root = step.dt.abs().sqrt()
    with pytest.raises(
        ValueError, match=r"mean square of (0.2|0.19)\d* at sample 0, and 1 was expected. It looks as if std lacks sqrt"
    ):
        loss(step.std / root)
    with pytest.raises(ValueError, match=r"at sample 1, .* std has sqrt\(\|dt\|\) twice. Divide std"):
        loss(torch.stack([step.std[0], step.std[1] * root[1]]))
    with pytest.raises(ValueError, match="mean square of [34][.0-9]* at sample 0, and 1 was expected$"):
        loss(step.std / 2)
    noise = (sample - old).requires_grad_(False)
    with pytest.raises(ValueError, match="noise has a mean square .* as if this is the noise times std"):
        fg.guard_loss(old, old, noise, torch.ones(2), step, check_values=True)
    small = old[:, :10]  # too few elements to tell
    fg.guard_loss(small, small, small * 3, torch.ones(2), step, check_values=True)


def test_transforms_of_torch_func_are_refused() -> None:
    velocity, old, noise = torch.randn(3, 2, 8)
    advantages, step = torch.ones(2), fg.flow_sde(0.7, 0.6)

    def loss(v: Tensor) -> Tensor:
        return fg.guard_loss(v, old, noise, advantages, step).loss

    def moments(v: Tensor) -> Tensor:
        return fg.transition_moments(v, old, noise, step).cross.sum()

    def from_means(v: Tensor) -> Tensor:
        return fg.guard_loss_from_means(noise, v, old, advantages, step).loss

    for function, name in ((loss, "the loss"), (moments, "transition_moments"), (from_means, "the loss")):
        with pytest.raises(RuntimeError, match=f"{name} cannot run inside a transform of torch.func"):
            torch.func.grad(function)(velocity)
        with pytest.raises(RuntimeError, match="differentiate it with loss.backward"):
            torch.func.jvp(function, (velocity,), (velocity,))
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=f"{name} cannot run inside a transform of torch.func"):
            torch.compile(torch.func.grad(function), backend="eager")(velocity)


@pytest.mark.parametrize("objective", ["grpo_guard", "flow_grpo", "flow_dppo"])
def test_a_rounded_sample_leaves_the_first_ratio_at_one(objective: str) -> None:
    mean = torch.randn(2, 4096)
    drawn = mean + 0.2 * torch.randn(2, 4096)
    options = own_options(objective, clip_range=2e-6)
    for sample in (drawn, drawn.bfloat16().float()):
        result = fg.guard_loss_from_means(
            sample, mean.clone(), mean, torch.ones(2), fg.gaussian_step(0.2, -0.1), **options
        )
        assert not result.log_ratio.any()


def test_objectives_of_equal_options_are_told_apart_by_type() -> None:
    """They are checked once for all calls with the same options, and True equals 1."""
    batch = make_batch()
    assert fg.guard_loss(*batch, clip_range=(1, 2.0)).loss.isfinite()
    for wrong in ((True, 2.0), (1, "2.0"), np.array([1.0, 2.0])):
        with pytest.raises(ValueError, match="clip_range must be a positive, finite number"):
            fg.guard_loss(*batch, clip_range=wrong)
    assert fg.guard_loss(*batch, adv_clip=1).loss.isfinite()
    with pytest.raises(TypeError, match="adv_clip must be a number; got True"):
        fg.guard_loss(*batch, adv_clip=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_call_like_an_earlier_one_gives_what_a_first_one_gives(backend, monkeypatch) -> None:
    """Checks are remembered by kind of call: each of these is of another kind, or has other values."""
    velocity, old, noise, advantages, step = make_batch()
    weight = torch.linspace(0.5, 2, 4)
    imaginary = torch.complex(weight, -weight).conj().imag  # memory holds the negative of its values
    changes: list[dict[str, Any]] = [
        {},
        {"advantages": 2 * advantages},
        {"advantages": advantages[:, None]},
        {"advantages": advantages.double()},
        {"advantages": advantages.clone().requires_grad_()},
        {"advantages": -imaginary},
        {"old_velocity": old.clone().requires_grad_()},
        {"velocity": torch.nn.Parameter(velocity.detach() + 0.1)},
        {"velocity": velocity.detach()},
        {"noise": noise.bfloat16()},
        {"noise": noise.t().contiguous().t()},
        {"step": step[:1]},
        {"step": fg.dance_sde(0.5, 0.4)},
        {"step": fg.dance_sde(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64))},
        {"ref_velocity": old + 1},
        {"ref_velocity": old + 1, "kl_weight": 0.5},
        {"ref_velocity": old + 1, "kl_weight": weight},
        {"ref_velocity": old + 1, "kl_weight": weight, "kl_type": "velocity"},
        *({"reweight": reweight} for reweight in ("none", "equalized", 2, 2.5, weight, 3 * weight, weight[:, None])),
        *({"sample_weight": factor} for factor in (2.0, weight, 3 * weight, imaginary)),
        {"sample_weight": weight, "reweight": "none"},
        {"objective": "flow_grpo"},
        {"objective": GrpoGuard(clip_range=1e-3)},
        {"objective": GrpoGuard(clip_range=2e-3)},
        {"clip_range": 1e-3},
        {"clip_range": [1e-3, 2e-3]},
        {"clip_range": (1e-3, 2e-3), "adv_clip": None},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"check_values": True},
    ]

    def run(change: dict[str, Any]) -> list[Tensor | None]:
        given = arguments() | {"velocity": velocity} | change
        result = fg.guard_loss(**given, backend=backend)
        (grad,) = torch.autograd.grad(result.loss.sum(), given["velocity"]) if result.loss.requires_grad else (None,)
        return [*result, grad]

    first = []
    for change in changes:
        monkeypatch.setattr(calls, "_CHECKED", {})
        first.append(run(change))
    for _ in range(2):
        for change, expected in zip(changes, first, strict=True):
            for got, want in zip(run(change), expected, strict=True):
                assert (got is None and want is None) or torch.equal(got, want), change
    assert len(calls._CHECKED) > 20


def test_names_of_another_class_than_str() -> None:
    batch = make_batch()
    for name in ("flow_dppo", "grpo_guard", "flow_grpo") * 3:
        got, want = (fg.guard_loss(*batch, objective=kind(name)) for kind in (np.str_, str))
        assert torch.equal(got.loss, want.loss)
    with pytest.raises(ValueError, match="objective must be one of"):
        fg.guard_loss(*batch, objective=np.str_("nonsense"))


def test_an_objective_that_is_changed_answers_otherwise() -> None:
    class Annealed(GrpoGuard):
        now = 10.0

        def fused(self) -> Any:
            return GrpoGuard(clip_range=self.now).fused()

    class Listed(GrpoGuard):
        def terms(self, *args: Any, **kwargs: Any) -> Terms:
            return GrpoGuard(clip_range=list(self.clip_range)).terms(*args, **kwargs)  # type: ignore[arg-type]

    batch, annealed = make_batch(), Annealed()
    assert not fg.guard_loss(*batch, objective=annealed).clipped.any()
    object.__setattr__(annealed, "now", 1e-6)
    assert fg.guard_loss(*batch, objective=annealed).clipped.any()
    objective = Listed(clip_range=(10.0, 10.0))
    assert not fg.guard_loss(*batch, objective=objective).clipped.any()
    object.__setattr__(objective, "clip_range", [1e-6, 1e-6])
    assert fg.guard_loss(*batch, objective=objective).clipped.any()


def test_objectives_are_not_kept_alive() -> None:
    batch = make_batch()
    objective = GrpoGuard()
    gone = weakref.ref(objective)
    fg.guard_loss(*batch, objective=objective)
    del objective
    assert gone() is None


@pytest.mark.parametrize(
    "factors",
    [{"reweight": 1e30, "sample_weight": 1e30}, {"sample_weight": torch.full((4,), 1e300, dtype=torch.float64)}],
)
def test_check_values_sees_a_product_that_overflows(factors: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sample_weight holds NaN or Inf at samples \[0"):
        fg.guard_loss(*make_batch(), **factors, check_values=True)


def test_limits_that_change_from_call_to_call_do_not_fill_the_memory() -> None:
    batch = make_batch()
    for i in range(2 * calls.MAX_KINDS + 5):
        fg.guard_loss(*batch, clip_range=1e-6 * (i + 1))
    assert len(calls._CHECKED) <= calls.MAX_KINDS


def test_a_name_that_is_given_to_another_objective_means_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    plain = fg.guard_loss(*batch, clip_range=10.0).loss

    class Doubled(GrpoGuard):
        def terms(self, *args: Any, **kwargs: Any) -> Terms:
            terms = super().terms(*args, **kwargs)
            return terms._replace(loss=2 * terms.loss)

    monkeypatch.setitem(OBJECTIVES, "grpo_guard", Doubled)
    torch.testing.assert_close(fg.guard_loss(*batch, clip_range=10.0).loss, 2 * plain)


def test_a_loss_may_be_changed_in_place() -> None:
    """As `loss += kl` does."""
    batch = make_batch()
    loss = fg.guard_loss(*batch).loss
    loss += batch[0].square().sum()
    (grad,) = torch.autograd.grad(loss, batch[0])
    torch.testing.assert_close(
        grad, torch.autograd.grad(fg.guard_loss(*batch).loss + batch[0].square().sum(), batch[0])[0]
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_negative_view_counts_with_its_sign(backend: str, kernel_device: str) -> None:
    velocity, old, noise, advantages, step = (value.to(kernel_device) for value in make_batch())
    plain = fg.guard_loss(velocity, old, noise, -advantages, step, backend=backend).loss
    view = fg.guard_loss(velocity, old, noise, torch._neg_view(advantages), step, backend=backend).loss
    assert torch.equal(view, plain)


def test_a_traced_loss_keeps_no_example() -> None:
    (velocity, old, noise, advantages, step), other = make_batch(), make_batch()
    other[1:4] = [value.flip(0) for value in other[1:4]]

    def loss(v: Tensor, o: Tensor, n: Tensor, a: Tensor) -> Tensor:
        return fg.guard_loss(v, o, n, a, step, clip_range=10.0).loss

    traced = torch.jit.trace(loss, (velocity, old, noise, advantages))
    (want,) = torch.autograd.grad(loss(*other[:4]), other[0])
    torch.testing.assert_close(torch.autograd.grad(traced(*other[:4]), other[0])[0], want)


def test_factors_of_small_dtypes_are_multiplied_in_float32() -> None:
    batch = make_batch()
    weight = torch.full((4,), 300.0)
    want = fg.guard_loss(*batch, reweight=weight, sample_weight=weight, reduction="none").loss
    half = weight.half()
    torch.testing.assert_close(fg.guard_loss(*batch, reweight=half, sample_weight=half, reduction="none").loss, want)


def test_a_sample_stored_in_bf16_passes_for_its_draw() -> None:
    """At a small std the rounding alone adds to the mean square of the noise."""
    sigmas = fg.sd3_sigmas(10)
    step = fg.flow_sde(sigmas[-2], sigmas[-1], noise_level=0.7)
    mean = torch.randn(2, 65536)
    sample = (mean + step.std * torch.randn_like(mean)).bfloat16()
    assert ((sample.double() - mean) / step.std).square().mean() > 1.05
    fg.guard_loss_from_means(sample, mean, mean, torch.ones(2), step, check_values=True)
