"""The demo's policy: a tiny FluxTransformer2DModel that draws 64x64 digits, and its pretraining.

Axes: B sample, S token (16 patches of 16x16 pixels), C channel (256 pixels of a patch).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from fastguard.demo.config import PretrainConfig
from fastguard.demo.data import IMAGE_SIZE, NUM_CLASSES, Digits

PATCH = 16
GRID = IMAGE_SIZE // PATCH
LATENT_SHAPE = (GRID * GRID, PATCH * PATCH)
TEXT_DIM = 32


def patchify(images: Tensor) -> Tensor:
    """(B, 1, 64, 64) -> (B, 16, 256), patches in row-major order."""
    patches = images.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))  # B, 1, rows, y, columns, x
    return patches[:, 0].transpose(2, 3).reshape(-1, *LATENT_SHAPE)


def unpatchify(latents: Tensor) -> Tensor:
    """(B, 16, 256) -> (B, 1, 64, 64), the inverse of `patchify`."""
    patches = latents.reshape(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3)
    return patches.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


class DigitPolicy(nn.Module):
    """velocity = policy(latents (B, S, C), sigma (B,), classes (B,)); each class is a fixed random prompt embedding.

    The transformer is narrower (64) than a token (256 pixels), so the noise in a velocity could not pass through
    it. It predicts the clean image instead, and v = (x - x0) / sigma follows.
    """

    MIN_SIGMA = 0.05
    prompts: Tensor
    pooled: Tensor
    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.flux: Any = FluxTransformer2DModel(  # its mixins hide from mypy that it is a Module
                in_channels=LATENT_SHAPE[1],
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT_DIM,
                pooled_projection_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
            )
            self.register_buffer("prompts", torch.randn(NUM_CLASSES, 1, TEXT_DIM))
            self.register_buffer("pooled", torch.randn(NUM_CLASSES, TEXT_DIM))
        rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        self.register_buffer("image_ids", image_ids.float())
        self.register_buffer("text_ids", torch.zeros(1, 3))

    def predict_image(self, latents: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """The clean image's tokens (B, S, C)."""
        return self.flux(
            hidden_states=latents,
            encoder_hidden_states=self.prompts[classes],
            pooled_projections=self.pooled[classes],
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]

    def forward(self, latents: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        x0 = self.predict_image(latents, sigma, classes)
        return (latents - x0) / sigma.clamp(min=self.MIN_SIGMA)[:, None, None]


def pretrain(policy: DigitPolicy, digits: Digits, config: PretrainConfig) -> None:
    """Rectified-flow training in place; the policy ends with the averaged (EMA) weights.

    Flow times are logit-normal, shifted towards the noise by sqrt(D / 64) as larger images need, and uniform in
    every fourth step. The loss is on the clean image, weighted by 1 / t^2, which is the loss on the velocity.
    """
    tokens = patchify(digits.images)
    device = tokens.device
    shift = math.log(math.sqrt(tokens[0].numel() / 64))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, config))
    average = torch.optim.swa_utils.AveragedModel(
        policy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
    )
    # Draws on the host: the same batches and noise on every device.
    generator = torch.Generator().manual_seed(config.seed)
    progress = tqdm(range(config.steps), desc="pretraining", disable=None)
    for step in progress:
        index = torch.randint(len(tokens), (config.batch_size,), generator=generator).to(device)
        t = torch.rand(config.batch_size, generator=generator)
        if step % 4:
            t = torch.sigmoid(torch.randn(config.batch_size, generator=generator) + shift)
        t = t.to(device)
        noise = torch.randn((config.batch_size, *LATENT_SHAPE), generator=generator).to(device)
        x0, time = tokens[index], t[:, None, None]
        error = policy.predict_image((1 - time) * x0 + time * noise, t, digits.labels[index]) - x0
        loss = (error.square() / time.clamp(min=config.min_time) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(policy)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    policy.load_state_dict(average.module.state_dict())


def _learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine decay to 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))
