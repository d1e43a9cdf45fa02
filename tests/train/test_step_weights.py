"""Weights of the denoising steps against their formulas, and in the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.toys import RECIPE, MemoryRecorder, ToyBackbone, pool
from torch import Tensor

import fastguard as fg
from fastguard.config import SamplerConfig, objective_config
from fastguard.schedule import shifted_sigmas
from fastguard.train import collect
from fastguard.train.metrics import Clock
from fastguard.train.minibatches import minibatches
from fastguard.train.policy_loss import policy_loss
from fastguard.train.rollout import training_schedule
from fastguard.train.state import TrainState, build_state
from fastguard.train.step_weights import step_weights
from fastguard.train.update import update_weights

NAMES = ("tempflow", "noise_level")


def diffusion(kind: str, t: float, t_next: float, first: float, eta: float) -> float:
    """Noise of the sampler per square root of time, by hand."""
    if kind == "flow_sde":
        return eta * math.sqrt(t / (1 - (first if t == 1 else t)))
    if kind == "dance_sde":
        return eta
    return t_next * math.sin(eta * math.pi / 2) / math.sqrt(t - t_next)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_weights_are_their_formula_wherever_the_window_lies(kind: Any, epoch: int) -> None:
    config = SamplerConfig(
        kind=kind, num_steps=6, shift=2.0, noise_level=0.7, sde_steps=3, window="sliding", window_epochs=1
    )
    schedule = training_schedule(config, partial(shifted_sigmas, shift=1.0), 0, epoch)
    assert schedule.window.start == epoch
    sigmas = schedule.sigmas
    by_hand = np.array([diffusion(kind, sigmas[i], sigmas[i + 1], sigmas[1], 0.7) for i in schedule.window])
    std = by_hand * np.sqrt([sigmas[i] - sigmas[i + 1] for i in schedule.window])
    for name, expected in (("noise_level", by_hand), ("tempflow", std / std.mean())):
        weights = step_weights(name, schedule)
        assert weights is not None
        assert weights.dtype == torch.float32
        np.testing.assert_allclose(weights[list(schedule.window)], expected, rtol=1e-6)
        outside = [i for i in range(6) if i not in schedule.window]
        assert (weights[outside] == 0).all()


@pytest.mark.parametrize("name", ["inverse_dt", "equalized", "none"])
def test_the_loss_has_the_other_weights(name: Any) -> None:
    assert step_weights(name, training_schedule(RECIPE.sampler, partial(shifted_sigmas, shift=3.0), 0, 0)) is None


def sampled(name: str, micro_batch: int) -> tuple[TrainState, collect.SampledEpoch]:
    objective = objective_config("flow_grpo", clip_range=0.5, reweight=name)
    recipe = replace(RECIPE, objective=objective, update=replace(RECIPE.update, micro_batch=micro_batch))
    backbone = ToyBackbone()
    accelerator = Accelerator(cpu=True)
    state = build_state(backbone, recipe, accelerator, None)
    with pool(recipe, backbone) as rewards:
        rolled = collect.sample_epoch(state, rewards, MemoryRecorder(), Clock(accelerator.device))
    assert rolled is not None
    return state, rolled


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batch", [0, 5])
def test_an_update_multiplies_the_loss_of_each_step(
    name: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where micro-batches hold some of the steps, the mean of the weights is that of the whole schedule."""
    state, rolled = sampled(name, micro_batch)
    gradients: list[Tensor] = []
    clip = state.accelerator.clip_grad_norm_

    def seen(parameters: Any, norm: float) -> Any:
        gradients.append(state.backbone.policy.image.grad.clone())
        return clip(parameters, norm)

    monkeypatch.setattr(state.accelerator, "clip_grad_norm_", seen)
    advantages = rolled.advantages.values
    minibatch = next(minibatches(state, advantages))
    weights = step_weights(
        state.recipe.objective.reweight,
        training_schedule(state.recipe.sampler, partial(shifted_sigmas, shift=3.0), 0, 0),
    )
    assert weights is not None
    (batch,) = rolled.transitions
    one = batch[minibatch.index]
    policy = state.backbone.policy
    velocity = policy(one.latents, one.sigma, one.prompt_indices)
    log_ratio = fg.transition_moments(velocity, one.velocity, one.noise, one.step).cross
    loss = -(weights[one.denoising_step] * advantages[one.sample] * log_ratio).mean()
    (expected,) = torch.autograd.grad(loss, policy.image)
    update_weights(state, rolled.transitions, minibatch, advantages, MemoryRecorder(), False)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    plain = policy_loss(policy, one, advantages[one.sample], replace(state.recipe.objective, reweight="none"))
    assert not torch.allclose(torch.autograd.grad(plain.loss, policy.image)[0], expected, rtol=0.05)
