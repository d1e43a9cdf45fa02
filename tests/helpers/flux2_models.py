"""Tiny FLUX.2 transformers with random weights, and their inputs; `flux_models` runs and compares them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from helpers.flux_models import Result, randomized, run

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}


def linears_of(model: nn.Module, *names: str) -> list[str]:
    """The linear layers of the blocks; with names, those whose name contains one."""
    found = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith(BLOCKS)]
    return [name for name in found if not names or any(part in name for part in names)]


def make_flux2(train: str = "full", **config: Any) -> Any:
    """A tiny transformer whose weights are all random; "lora" is on all linear layers of the blocks."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**{**CONFIG, **config})
    return randomized(model, train, linears_of(model))


def make_flux2_inputs(
    dtype: torch.dtype = torch.float32, batch: int = 2, device: str = "cpu", tokens: int = 9, text: int = 5
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": randn(batch, tokens, 16),
        "encoder_hidden_states": randn(batch, text, 32),
        "timestep": torch.rand(batch, generator=generator).to(device, dtype),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
        "img_ids": torch.randint(0, 3, (tokens, 4), generator=generator).float().to(device),
        "txt_ids": torch.randint(0, 3, (text, 4), generator=generator).float().to(device),
        "return_dict": False,
    }


def run_flux2(model: Any, **extra: Any) -> Result:
    """`run` with the inputs of this model, in its dtype and on its device."""
    parameter = next(model.parameters())
    return run(model, make_flux2_inputs(parameter.dtype, device=str(parameter.device)), **extra)
