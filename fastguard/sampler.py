"""Rollouts: sample images with SDE steps and keep what the policy gradient needs.

Axes: N transition, B image, S token, C channel. A transition is one denoising step of one image.
`predict_velocity` is the only place that evaluates the policy: the rollout samples with it and the
update re-scores with it, so that the first ratio after a rollout is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.config import SamplerConfig
from fastguard.sde import Transition, flow_sde, ode
from fastguard.step import sde_step


class Policy(Protocol):
    """`policy(latents (B, S, C), sigma (B,) float32, prompt_indices (B,) int64) -> velocity (B, S, C)`."""

    def __call__(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Transitions:
    """N transitions exactly as the rollout used them; `step` stays on the host, the rest on the device."""

    latents: Tensor
    """(N, S, C): the latents before the step"""
    velocity: Tensor
    """(N, S, C): the rollout policy's velocity"""
    noise: Tensor
    """(N, S, C): the unit Gaussian noise that the step added"""
    sigma: Tensor
    """(N,) float32: flow time before the step"""
    prompt_indices: Tensor
    """(N,) int64"""
    sample: Tensor
    """(N,) int64: position of the image in its rollout"""
    denoising_step: Tensor
    """(N,) int64: 0 is the step that starts from pure noise"""
    step: Transition
    """coefficients of the steps, (N,) each"""

    def __len__(self) -> int:
        return len(self.sigma)

    def __getitem__(self, index: Tensor) -> Transitions:
        """Select transitions by a 1-d int64 host tensor."""
        on_device = index.to(self.sigma.device)
        tensors = {f.name: getattr(self, f.name)[on_device] for f in fields(self) if f.name != "step"}
        return Transitions(**tensors, step=self.step[index])

    @staticmethod
    def cat(parts: Sequence[Transitions]) -> Transitions:
        """Join several into one, in order."""
        names = [f.name for f in fields(Transitions) if f.name != "step"]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return Transitions(**tensors, step=Transition.cat([part.step for part in parts]))


@dataclass(frozen=True)
class Rollout:
    """The images of one rollout and their trained transitions."""

    latents: Tensor
    """(B, S, C): the final latents"""
    prompt_indices: Tensor
    """(B,) int64"""
    transitions: tuple[Transitions, ...]
    """one entry of B transitions per stochastic step, first step first"""


def shifted_sigmas(num_steps: int, shift: float) -> list[float]:
    """`num_steps + 1` flow times from 1 (noise) to 0, shifted as in SD3 and Flux: s t / (1 + (s - 1) t)."""
    uniform = [1 - i / num_steps for i in range(num_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in uniform]


def sample_seeds(run_seed: int, epoch: int, prompt_indices: Tensor, members: Tensor, num_steps: int) -> Tensor:
    """Seeds (B, num_steps + 1) int64 on the host: column 0 for the initial latents, i + 1 for step i.

    They depend on the run seed, the epoch, the prompt and the member of its group: not on the batch, nor on
    the number of processes.
    """
    keys = zip(prompt_indices.tolist(), members.tolist(), strict=True)
    words = [
        np.random.SeedSequence([run_seed, epoch, prompt, member]).generate_state(num_steps + 1, np.uint64)
        for prompt, member in keys
    ]
    return torch.from_numpy((np.stack(words) >> np.uint64(1)).astype(np.int64))


def initial_latents(seeds: Tensor, latent_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal latents (B, *latent_shape) float32, drawn on the host from one seed (B,) per image."""
    draws = [torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(draws).to(device)


def predict_velocity(policy: Policy, latents: Tensor, sigma: float | Tensor, prompt_indices: Tensor) -> Tensor:
    """Evaluate the policy: latents (B, S, C), sigma a float or (B,), prompt_indices (B,) -> velocity (B, S, C).

    Raises ValueError if the policy's output does not have the shape of the latents.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
    velocity = policy(latents, sigma, prompt_indices)
    if velocity.shape != latents.shape:
        raise ValueError(f"the policy returned {tuple(velocity.shape)} for latents {tuple(latents.shape)}")
    return velocity


@torch.no_grad()
def rollout(
    policy: Policy,
    prompt_indices: Tensor,
    seeds: Tensor,
    latent_shape: tuple[int, ...],
    config: SamplerConfig,
) -> Rollout:
    """Sample one image per prompt index.

    Args:
        prompt_indices: (B,) int64 on the device to sample on; one prompt may appear many times.
        seeds: (B, config.num_steps + 1) int64 on the host, from `sample_seeds`.
        latent_shape: shape (S, C) of one image's latents.
        config: schedule and noise; `sde_steps=0` gives plain ODE sampling without transitions.
    """
    if seeds.shape != (len(prompt_indices), config.num_steps + 1):
        expected = (len(prompt_indices), config.num_steps + 1)
        raise ValueError(f"seeds must have the shape {expected}, one per image and draw, got {tuple(seeds.shape)}")
    device = prompt_indices.device
    sample = torch.arange(len(prompt_indices), device=device)
    sigmas = shifted_sigmas(config.num_steps, config.shift)
    latents = initial_latents(seeds[:, 0], latent_shape, device)
    transitions = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = predict_velocity(policy, latents, sigma, prompt_indices)
        if i >= config.sde_steps:
            latents = sde_step(latents, velocity, ode(sigma, sigma_next).to(device)).latents
            continue
        step = flow_sde(sigma, sigma_next, noise_level=config.noise_level, sigma_max=sigmas[1])
        out = sde_step(latents, velocity, step.to(device), seeds=seeds[:, i + 1].to(device))
        assert out.noise is not None  # a stochastic step always returns it
        transitions.append(
            Transitions(
                latents=latents,
                velocity=velocity,
                noise=out.noise,
                sigma=torch.full_like(sample, sigma, dtype=torch.float32),
                prompt_indices=prompt_indices,
                sample=sample,
                denoising_step=torch.full_like(sample, i),
                step=step.expand(len(sample)),
            )
        )
        latents = out.latents
    return Rollout(latents, prompt_indices, tuple(transitions))
