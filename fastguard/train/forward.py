"""Final latents with fresh noise: what objectives of the forward process train on.

Axes: B image, S token, C channel; a draw is one flow time and one noise of an image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastguard.loss.matching import STD
from fastguard.sde import gaussian_step
from fastguard.train.rollout import Policy, RolloutBatch, initial_latents, predict_velocity


def draw_times(seed: int, epoch: int, prompt_indices: Tensor, passes: int, draws: int, shift: float) -> Tensor:
    """Flow times (B, passes * draws) float32 on the host: those of a pass cover (0, 1), from small to large.

    Each lies in a stretch of its own, of equal width before the schedule's shift. They depend on the run's seed, the
    epoch and the prompt: the images of a group have the same ones.
    """
    starts = {
        prompt: np.random.default_rng([seed, epoch, prompt, 0, 1]).uniform(size=(passes, 1))  # not a member's words
        for prompt in set(prompt_indices.tolist())
    }
    places = np.stack([starts[prompt] for prompt in prompt_indices.tolist()])
    uniform = ((np.arange(draws) + places) / draws).reshape(len(places), -1)
    return torch.from_numpy(shift * uniform / (1 + (shift - 1) * uniform)).float()


@torch.no_grad()
def noised(
    policy: Policy, prompt_indices: Tensor, final: Tensor, seeds: Tensor, times: Tensor, draws: int
) -> RolloutBatch:
    """The final latents (B, S, C) with noise, a transition for each draw, one draw of all images after the other.

    A transition's latents are `x0 + t target`, its velocity is the policy's there, and its noise is the target `n - x0`
    as the latents' dtype holds it. So the target is that of its latents, whatever was rounded.

    Args:
        prompt_indices: (B,) int64, on the device of the latents.
        seeds: (B, passes * draws) int64 on the host, of the noises.
        times: (B, passes * draws) float32 on the host, flow times.
        draws: those of one pass; `denoising_step` counts them.
    """
    sample = torch.arange(len(final), device=final.device)
    made = []
    for i, (seed, t) in enumerate(zip(seeds.unbind(1), times.unbind(1), strict=True)):
        noise = initial_latents(seed, tuple(final.shape[1:]), final.device, final.dtype)
        target = (noise.float() - final.float()).to(final.dtype)
        sigma = t.to(final.device)
        latents = (final.float() + sigma[:, None, None] * target.float()).to(final.dtype)
        made.append(
            RolloutBatch(
                latents=latents,
                velocity=predict_velocity(policy, latents, sigma, prompt_indices),
                noise=target,
                sigma=sigma,
                prompt_indices=prompt_indices,
                sample=sample,
                denoising_step=torch.full_like(sample, i % draws),
                step=gaussian_step(STD, -1.0).expand(len(sample)),
            )
        )
    return RolloutBatch.cat(made)
