"""The baseline of every benchmark: the GRPO-Guard loss as it is commonly written, in float32, step by step.

It is given what such trainers store (the drawn sample, the old mean, the old log-probability) and computes mean,
log-probability, log-ratio by subtraction, RatioNorm, clip and reweighting with ordinary tensor operations. The step of
the rollout is written in the same way, and gives what they store.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import timing
import torch
from torch import Tensor

import fastguard as fg
from fastguard.ops.registry import Backend

CLIP_RANGE = 2e-6


@dataclass(frozen=True)
class Inputs:
    """One minibatch, for both forms of the loss. velocity is the leaf that wants a gradient."""

    latents: Tensor
    velocity: Tensor
    old_velocity: Tensor
    noise: Tensor
    prev_sample: Tensor
    old_mean: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    seeds: Tensor
    step: fg.Transition


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random latents of a mid-schedule flow_sde step; the velocity differs from the rollout's by 1e-3."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    latents, old_velocity, noise = normal().to(dtype), normal().to(dtype), normal().to(dtype)
    velocity = (old_velocity + 1e-3 * normal()).to(dtype).requires_grad_()
    sigma = torch.linspace(0.9, 0.5, shape[0], dtype=torch.float64)
    step = fg.flow_sde(sigma.float(), sigma.float() - 0.1, noise_level=0.9).to(device)
    old_mean, std = mean_of(latents, old_velocity, step), expand(step.std, latents)
    prev_sample = old_mean + std * noise.float()
    return Inputs(
        latents=latents, velocity=velocity, old_velocity=old_velocity, noise=noise, prev_sample=prev_sample,
        old_mean=old_mean, old_log_prob=log_prob(prev_sample, old_mean, std),
        advantages=torch.linspace(-1.0, 2.0, shape[0], device=device), seeds=torch.arange(shape[0], device=device),
        step=step,
    )  # fmt: skip


def expand(coef: Tensor, like: Tensor) -> Tensor:
    return coef.reshape(-1, *([1] * (like.ndim - 1)))


def mean_of(latents: Tensor, velocity: Tensor, step: fg.Transition) -> Tensor:
    latents_coef, velocity_coef = step.mean_coefs
    return expand(latents_coef, latents) * latents.float() + expand(velocity_coef, latents) * velocity.float()


def log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    log_density = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_density.mean(dim=tuple(range(1, log_density.ndim)))


def log_ratio(inputs: Inputs) -> Tensor:
    """RatioNorm by subtraction of log-probabilities, (B,) float32."""
    std = expand(inputs.step.std, inputs.latents)
    mean = mean_of(inputs.latents, inputs.velocity, inputs.step)
    new_log_prob = log_prob(inputs.prev_sample, mean, std)
    bias = ((mean - inputs.old_mean) ** 2).mean(dim=tuple(range(1, mean.ndim))) / (2 * inputs.step.std**2)
    return (new_log_prob - inputs.old_log_prob + bias) * inputs.step.std


def guard_loss(inputs: Inputs) -> Tensor:
    """The scalar loss."""
    ratio = torch.exp(log_ratio(inputs))
    advantages = inputs.advantages.clamp(-5, 5)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return (torch.maximum(unclipped, clipped) / inputs.step.dt.abs()).mean()


def sde_step(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Sample and mean, float32 of the latents' shape, and the sample's log-probability (B,)."""
    std = expand(inputs.step.std, inputs.latents)
    mean = mean_of(inputs.latents, inputs.velocity.detach(), inputs.step)
    sample = mean + std * torch.randn_like(mean)
    return sample, mean, log_prob(sample, mean, std)


def fused_guard_loss(inputs: Inputs, backend: Backend = "auto") -> Tensor:
    """The same loss through the package."""
    return fg.guard_loss(
        inputs.velocity, inputs.old_velocity, inputs.noise, inputs.advantages, inputs.step, clip_range=CLIP_RANGE,
        backend=backend,
    ).loss  # fmt: skip


def kept_bytes(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> int:
    """Bytes that the autograd graph keeps for backward beyond the tensors that the caller holds anyway."""
    held = (*vars(inputs).values(), *vars(inputs.step).values())
    return timing.kept_bytes(lambda: loss(inputs), [tensor for tensor in held if isinstance(tensor, Tensor)])
