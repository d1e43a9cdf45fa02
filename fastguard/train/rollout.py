"""Rollouts: sample images with SDE steps and keep what the policy gradient needs.

Axes: N transition, B image, S token, C channel. A transition is one denoising step of one image; its latents may have
other axes than (S, C). `predict_velocity` is the only place that evaluates the policy: the rollout samples with it and
the update re-scores with it, so that the first ratio after a rollout is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.config import Recipe, SamplerConfig
from fastguard.errors import UserError
from fastguard.schedule import shifted_sigmas
from fastguard.sde import Transition, cps, dance_sde, flow_sde, ode
from fastguard.step import sde_step


class Policy(Protocol):
    """`policy(latents (B, S, C), sigma (B,) float32, prompt_indices (B,) int64) -> velocity (B, S, C)`."""

    def __call__(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RolloutBatch:
    """N transitions exactly as the rollout used them; `step` stays on the host, the rest on one device."""

    latents: Tensor
    """(N, S, C): the latents before the step"""
    velocity: Tensor
    """(N, S, C): the rollout policy's velocity"""
    noise: Tensor
    """(N, S, C): the unit Gaussian noise that the step added; of noised final latents, the target of their velocity"""
    sigma: Tensor
    """(N,) float32: flow time before the step"""
    prompt_indices: Tensor
    """(N,) int64"""
    sample: Tensor
    """(N,) int64: position of the image in its process's rollout"""
    denoising_step: Tensor
    """(N,) int64: 0 is the step that starts from pure noise; of noised final latents, the draw of the pass"""
    step: Transition
    """coefficients of the steps, (N,) each"""
    ref_velocity: Tensor | None = None
    """(N, S, C): velocity of the model before training, where a KL is asked for"""
    step_weight: Tensor | None = None
    """(N,) float32: factor on the policy loss, where `step_weights` has one"""

    def __len__(self) -> int:
        return len(self.sigma)

    def _map(self, fn: Callable[[Tensor], Tensor], step: Transition) -> RolloutBatch:
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        mapped: dict[str, Any] = {name: None if x is None else fn(x) for name, x in tensors.items()}
        return RolloutBatch(**mapped, step=step)

    def __getitem__(self, index: Tensor) -> RolloutBatch:
        """Select transitions by a 1-d int64 host tensor."""
        on_device = index.to(self.sigma.device)
        return self._map(lambda x: x[on_device], self.step[index])

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same transitions on another device; the host's memory is pinned where there is a GPU to copy from."""
        if torch.device(device).type != "cpu":
            return self._map(lambda x: x.to(device, non_blocking=True), self.step)
        pin = self.sigma.is_cuda
        return self._map(lambda x: torch.empty_like(x, device="cpu", pin_memory=pin).copy_(x), self.step)

    @staticmethod
    def cat(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """Join several into one, in order."""
        names = [f.name for f in fields(RolloutBatch) if f.name != "step"]
        columns = {name: [getattr(part, name) for part in parts] for name in names}
        tensors: dict[str, Any] = {n: None if column[0] is None else torch.cat(column) for n, column in columns.items()}
        return RolloutBatch(**tensors, step=Transition.cat([part.step for part in parts]))

    @staticmethod
    def select(parts: Sequence[RolloutBatch], index: Tensor) -> RolloutBatch:
        """Those at `index` (1-d int64, host) of the parts laid end to end, grouped by part; no part is copied whole."""
        picked, start = [], 0
        for part in parts:
            inside = index[(index >= start) & (index < start + len(part))]
            if len(inside):
                picked.append(part[inside - start])
            start += len(part)
        return RolloutBatch.cat(picked)


@dataclass(frozen=True)
class Schedule:
    """The flow times of a rollout and its stochastic steps."""

    sigmas: tuple[float, ...]
    """(steps + 1,) from 1 (noise) to 0"""
    window: range
    """stochastic, trained steps; all others are deterministic"""
    kind: str = "flow_sde"
    noise_level: float = 0.0

    def step(self, i: int) -> Transition:
        """The coefficients of step i, of length 1 on the host."""
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        if i not in self.window:
            return ode(sigma, sigma_next)
        if self.kind == "flow_sde":
            return flow_sde(sigma, sigma_next, self.noise_level, sigma_max=self.sigmas[1])
        return {"dance_sde": dance_sde, "cps": cps}[self.kind](sigma, sigma_next, self.noise_level)

    def __len__(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Rollout:
    """The images of one rollout batch and their trained transitions."""

    latents: Tensor
    """(B, S, C): the final latents"""
    transitions: tuple[RolloutBatch, ...]
    """one entry of B transitions per stochastic step, first step first"""
    one_step: tuple[Tensor, ...] = ()
    """if asked for, latents (B, S, C) of the image after each stochastic step"""


Sigmas = Callable[[int], tuple[float, ...]]
"""A model's own schedule: num_steps -> (num_steps + 1,) flow times from 1 to 0; `Backbone.sigmas`."""


def flow_times(config: SamplerConfig, own: Sigmas, num_steps: int) -> tuple[float, ...]:
    """The flow times (num_steps + 1,) by sampler.shift.

    Raises UserError for a schedule of the model's own whose steps vanish: its shift grows with the exponential of the
    image's area.
    """
    if config.shift != "auto":
        return shifted_sigmas(num_steps, config.shift)
    times = own(num_steps)
    if not all(earlier > later for earlier, later in pairwise(times)):
        raise UserError(
            f'sampler.shift = "auto" takes the model\'s own schedule, which for {num_steps} steps at this size of '
            f"images is {times}, and does not fall from step to step: set sampler.shift to a number in [0.001, 1000], "
            "take more steps, or lower model.height and model.width"
        )
    return times


def training_schedule(config: SamplerConfig, own: Sigmas, seed: int, epoch: int) -> Schedule:
    """The schedule of one epoch, with its window of stochastic steps (the same on every process)."""
    last_start = config.last_window_end - config.sde_steps
    places = last_start - config.window_start + 1
    if config.window == "fixed":
        start = config.window_start
    elif config.window == "random":
        start = config.window_start + int(np.random.default_rng([seed, epoch]).integers(places))
    else:
        start = config.window_start + epoch // config.window_epochs % places
    window = range(start, start + config.sde_steps)
    return Schedule(flow_times(config, own, config.num_steps), window, config.kind, config.noise_level)


def epoch_schedule(recipe: Recipe, own: Sigmas, epoch: int) -> Schedule:
    """The schedule of one epoch of a recipe: an objective of the forward process samples without noise."""
    if recipe.objective.process == "forward":
        return ode_schedule(recipe.sampler, own, recipe.sampler.num_steps)
    return training_schedule(recipe.sampler, own, recipe.run.seed, epoch)


def ode_schedule(config: SamplerConfig, own: Sigmas, num_steps: int) -> Schedule:
    """Deterministic sampling, for evaluation."""
    return Schedule(flow_times(config, own, num_steps), range(0))


def epoch_prompts(num_prompts: int, per_epoch: int, seed: int, epoch: int) -> list[int]:
    """The prompts of an epoch, sorted: seeded permutations of all prompts, one after the other, cut into epochs.

    No prompt comes twice in an epoch: where an epoch takes the rest of one permutation and the beginning of the next,
    the next one starts with prompts that the rest does not hold.
    """
    first, last = epoch * per_epoch, (epoch + 1) * per_epoch
    order: list[int] = []
    start = cycle = 0  # `order` holds permutation `cycle`, which begins at position `start` of the sequence
    chosen: list[int] = []
    while start < last:
        rest = set(order[len(order) - start % per_epoch :]) if start % per_epoch else set()
        shuffled = np.random.default_rng([seed, cycle]).permutation(num_prompts).tolist()
        order = [p for p in shuffled if p not in rest] + [p for p in shuffled if p in rest]
        chosen += order[max(first - start, 0) : max(last - start, 0)]
        start, cycle = start + num_prompts, cycle + 1
    return sorted(chosen)


EVALUATION_EPOCH = 1_000_000
"""Seeds of an evaluation's noise; no training run counts this far."""


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


def initial_latents(
    seeds: Tensor, latent_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal latents (B, *latent_shape), drawn in float32 on the host from one seed (B,) per image."""
    draws = [
        torch.randn(latent_shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu")
        for seed in seeds.tolist()
    ]
    return torch.stack(draws).to(device, dtype)


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
    schedule: Schedule,
    dtype: torch.dtype = torch.float32,
    one_step: bool = False,
) -> Rollout:
    """Sample one image per prompt index.

    Args:
        prompt_indices: (B,) int64 on the device to sample on; one prompt may appear many times.
        seeds: (B, steps + 1) int64 on the host, from `sample_seeds`.
        latent_shape: shape (S, C) of one image's latents.
        dtype: of the latents and the noise; the policy's own, so that what is stored is what was used.
        one_step: also return the image after each stochastic step, `x - sigma v` of the latents x after it. The
            velocity is that of the step which follows, so the policy is not evaluated for it. After the last stochastic
            step it is the final image, which is then determined.
    """
    if seeds.shape != (len(prompt_indices), len(schedule) + 1):
        expected = (len(prompt_indices), len(schedule) + 1)
        raise ValueError(f"seeds must have the shape {expected}, one per image and draw, got {tuple(seeds.shape)}")
    device = prompt_indices.device
    sample = torch.arange(len(prompt_indices), device=device)
    latents = initial_latents(seeds[:, 0], latent_shape, device, dtype)
    transitions, images = [], []
    for i in range(len(schedule)):
        sigma, step = schedule.sigmas[i], schedule.step(i)
        velocity = predict_velocity(policy, latents, sigma, prompt_indices)
        if one_step and i in schedule.window[1:]:  # the step before is stochastic, and not the last one
            images.append(sde_step(latents, velocity, ode(sigma, 0.0).to(device)).latents)
        if i not in schedule.window:
            latents = sde_step(latents, velocity, step.to(device)).latents
            continue
        out = sde_step(latents, velocity, step.to(device), seeds=seeds[:, i + 1].to(device))
        assert out.noise is not None  # a stochastic step always returns it
        transitions.append(
            RolloutBatch(
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
    return Rollout(latents, tuple(transitions), (*images, latents) if one_step else ())


def evaluation_images(prompts: int, per_prompt: int, num_steps: int) -> tuple[Tensor, Tensor]:
    """Prompt indices (B,) and seeds (B, num_steps + 1) of an evaluation: always the same, and used by no training."""
    prompt_indices = torch.arange(prompts, device="cpu").repeat_interleave(per_prompt)
    members = torch.arange(per_prompt, device="cpu").repeat(prompts)
    return prompt_indices, sample_seeds(0, EVALUATION_EPOCH, prompt_indices, members, num_steps)
