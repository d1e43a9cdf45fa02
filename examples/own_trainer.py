"""A trainer of one's own: rollout, advantages and update of a tiny random Flux, in one file.

    python examples/own_trainer.py

The reward is the negative mean of the final latents. An epoch draws one group of samples, and makes one update per
denoising step.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import fastguard as fg

EPOCHS, SAMPLES, STEPS = 12, 16, 5
SIDE, CHANNELS, TEXT = 4, 16, 16  # latents are (SAMPLES, SIDE * SIDE, CHANNELS)
ROWS, COLUMNS = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
POSITIONS = torch.stack([0 * ROWS, ROWS, COLUMNS], dim=-1).reshape(-1, 3)


def make_flux() -> Any:  # diffusers hides its models' types
    return FluxTransformer2DModel(
        in_channels=CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def velocity_of(flux: Any, latents: Tensor, sigma: Tensor) -> Tensor:
    """What the model predicts. There is one prompt, and its embedding is zero."""
    return flux(
        hidden_states=latents, timestep=sigma.expand(len(latents)), img_ids=POSITIONS, txt_ids=torch.zeros(1, 3),
        encoder_hidden_states=torch.zeros(len(latents), 1, TEXT), pooled_projections=torch.zeros(len(latents), TEXT),
    ).sample  # fmt: skip


def main() -> list[float]:
    """Train; returns the mean reward of each epoch."""
    torch.manual_seed(0)
    flux = make_flux()
    optimizer = torch.optim.AdamW(flux.parameters(), lr=1e-3)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    steps = [fg.flow_sde(sigmas[i], sigmas[i + 1], noise_level=0.7, sigma_max=sigmas[1]) for i in range(STEPS)]
    history = []
    for epoch in range(EPOCHS):
        latents = torch.randn(SAMPLES, SIDE * SIDE, CHANNELS)
        rollout: list[Any] = []
        for i, step in enumerate(steps):
            seeds = torch.arange(SAMPLES) + SAMPLES * (STEPS * epoch + i)  # each draw has a seed of its own
            with torch.no_grad():
                old_velocity = velocity_of(flux, latents, sigmas[i])
            drawn = fg.sde_step(latents, old_velocity, step, seeds=seeds)
            rollout.append((latents, old_velocity, drawn.noise))
            latents = drawn.latents

        rewards = -latents.mean(dim=(1, 2))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)

        for i, (latents, old_velocity, noise) in enumerate(rollout):
            velocity = velocity_of(flux, latents, sigmas[i])
            result = fg.guard_loss(velocity, old_velocity, noise, advantages, steps[i], clip_range=1e-3)
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
        history.append(rewards.mean().item())
        print(f"epoch {epoch + 1}: reward {history[-1]:.3f}")
    return history


if __name__ == "__main__":
    main()
