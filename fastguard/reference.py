"""Every formula once, in plain torch and any dtype: run it in float64 and it is the truth the kernels answer to.

Axes: B sample; all further axes are elements, D of them per sample. Nothing here is fast, and all of it is
differentiable by autograd. Two forms of each log-ratio stand side by side:

- the textbook form: two means, two log-densities, their difference;
- the moment form: with `eps` the rollout's noise and `w = (mu_new - mu_old) / s` the whitened drift,
  `cross = <eps, w> / D` and `drift = <w, w> / D` carry everything (docs/math.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastguard.sde import Transition


def per_sample(coef: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) -> (B, 1, ..., 1), to multiply a tensor of `like`'s rank."""
    return coef.reshape(-1, *([1] * (like.ndim - 1)))


def mean_over_elements(value: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return value.flatten(1).mean(1)


# --- the step -----------------------------------------------------------------------------------------------------


def transition_mean(latents: Tensor, velocity: Tensor, step: Transition) -> Tensor:
    """`mu = A x + B v`, (B, ...)."""
    return per_sample(step.latents_coef, latents) * latents + per_sample(step.velocity_coef, latents) * velocity


def sde_step(latents: Tensor, velocity: Tensor, noise: Tensor, step: Transition) -> Tensor:
    """`x' = mu + s eps`, (B, ...)."""
    return transition_mean(latents, velocity, step) + per_sample(step.std, latents) * noise


def log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density averaged over the elements, (B,)."""
    whitened = (sample - mean) / per_sample(std, sample)
    return mean_over_elements(-0.5 * whitened**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)


# --- the log-ratio, textbook form ---------------------------------------------------------------------------------


def log_ratio_by_subtraction(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """`log p_new - log p_old`, what public trainers clip, (B,)."""
    return log_prob(sample, mean, std) - log_prob(sample, old_mean, std)


def ratio_norm_by_subtraction(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """RatioNorm as published: `s (log r + |mu_new - mu_old|^2 / (2 s^2 D))` (arXiv 2510.22319, Eq. 8), (B,)."""
    bias = mean_over_elements((mean - old_mean) ** 2) / (2 * std**2)
    return std * (log_ratio_by_subtraction(sample, mean, old_mean, std) + bias)


# --- the log-ratio, moment form -----------------------------------------------------------------------------------


def moments_from_means(
    prev_sample: Tensor, prev_sample_mean: Tensor, old_prev_sample_mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """(cross, drift), each (B,), from the rolled-out sample and the two means."""
    scale = per_sample(std, prev_sample)
    noise = (prev_sample - old_prev_sample_mean) / scale
    whitened = (prev_sample_mean - old_prev_sample_mean) / scale
    return mean_over_elements(noise * whitened), mean_over_elements(whitened**2)


def transition_moments(
    velocity: Tensor, old_velocity: Tensor, noise: Tensor, step: Transition
) -> tuple[Tensor, Tensor]:
    """(cross, drift), each (B,), from the velocities and the rollout's noise: `w = B (v_new - v_old) / s`."""
    whitened = per_sample(step.velocity_coef / step.std, velocity) * (velocity - old_velocity)
    return mean_over_elements(noise * whitened), mean_over_elements(whitened**2)


def log_ratio(cross: Tensor, drift: Tensor) -> Tensor:
    """`log p_new - log p_old = cross - drift / 2`, averaged over the elements."""
    return cross - drift / 2


def ratio_norm(cross: Tensor, std: Tensor) -> Tensor:
    """RatioNorm: `s (log r + drift / 2) = s cross`."""
    return std * cross


# --- objectives: per-sample losses, functions of a few numbers per sample ------------------------------------------


def clip_advantages(advantages: Tensor, adv_clip: float | None) -> Tensor:
    return advantages if adv_clip is None else advantages.clamp(-adv_clip, adv_clip)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's loss, `max(-a r, -a clip(r, 1 - low, 1 + high))`, (B,)."""
    ratio = torch.exp(log_ratio)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def divergence_masked(log_ratio: Tensor, kl_old: Tensor, advantages: Tensor, kl_threshold: float) -> Tensor:
    """Flow-DPPO's loss: `-a r`, dropped where KL(new || old) has reached the threshold and the step moves away.

    It asks for the sign of the log-ratio, since a float32 ratio rounds to 1 below 6e-8. Advantages are not clipped.
    """
    moves_away = ((log_ratio > 0) & (advantages > 0)) | ((log_ratio < 0) & (advantages < 0))
    dropped = (kl_old >= kl_threshold) & moves_away
    return torch.where(dropped, 0.0, -advantages * torch.exp(log_ratio))


def gaussian_kl(drift: Tensor) -> Tensor:
    """KL between two Gaussians of one std, per element: `drift / 2`. With the reference's drift, KL to it."""
    return drift / 2


def velocity_kl(velocity: Tensor, ref_velocity: Tensor) -> Tensor:
    """Mean squared velocity difference, (B,): the Gaussian KL without its step-dependent factor B^2 / (2 s^2)."""
    return mean_over_elements((velocity - ref_velocity) ** 2)
