"""The policy of a pipeline: its transformer, with classifier-free guidance where the model has it.

Axes: B image, P prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.backbones.pipeline.spec import Grid, PipelineSpec, Text
from fastguard.config import ModelConfig


class PipelinePolicy(nn.Module):
    """velocity = policy(latents (B, *latent_shape), sigma (B,), prompt_indices (B,)).

    With guidance, the negative prompt's branch and the prompt's are one batch of twice the size, and the gradient goes
    through both. With model.guidance_gradient = "conditional" they are two calls, and the gradient goes through the
    prompt's alone: the rollout calls the same way, so that the first ratio is 1.

    Prompt embeddings are plain attributes, not buffers: DDP would send buffers from rank 0 to all at every forward.
    """

    def __init__(self, spec: PipelineSpec, transformer: Any, grid: Grid, model: ModelConfig, guided: bool) -> None:
        super().__init__()
        self.transformer: Any = transformer  # diffusers' mixins hide from mypy that it is a Module
        self._no_split_modules = transformer._no_split_modules  # classes of the blocks, which FSDP2 shards one by one
        self.guided = guided
        self._spec, self._model, self._positions = spec, model, spec.positions(grid)
        self.row_of = torch.empty(0)
        self.text: Text = {}
        """(P, ...) each; with guidance the last row is the negative prompt's"""

    def set_prompts(self, indices: Sequence[int], text: Text) -> None:
        """Keep the embeddings of these prompts, (P, ...) each, on the policy's device; with guidance those of the
        negative prompt come last, and have no index."""
        row_of = torch.zeros(max(indices) + 1, dtype=torch.int64, device="cpu")
        row_of[torch.tensor(indices, device="cpu")] = torch.arange(len(indices), device="cpu")
        # A table on the device: looking prompts up on the host would wait for the GPU at every step.
        self.row_of, self.text = row_of.to(next(iter(text.values())).device), text

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        rows = self.row_of[prompt_indices]
        if not self.guided:
            return self._velocity(latents, sigma, rows)
        negative = torch.full_like(rows, len(next(iter(self.text.values()))) - 1)
        if self._model.guidance_gradient == "conditional":
            with torch.no_grad():
                unconditional = self._velocity(latents, sigma, negative)
            conditional = self._velocity(latents, sigma, rows)
        else:
            both = torch.cat([latents, latents]), torch.cat([sigma, sigma]), torch.cat([negative, rows])
            unconditional, conditional = self._velocity(*both).chunk(2)
        return self._spec.guide(conditional, unconditional, self._model.guidance)

    def _velocity(self, latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        text = {name: values[rows] for name, values in self.text.items()}
        return self._spec.velocity(self.transformer, latents, sigma, text, self._model.guidance, self._positions)
