"""LoRA adapters (peft) on a diffusers transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from fastguard.blocks.linear import LowPrecisionLinear
from fastguard.config import LoraConfig
from fastguard.errors import UserError

ADAPTER = "default"


def add_lora(transformer: Any, config: LoraConfig, family_targets: Sequence[str]) -> None:
    """Freeze the transformer and add adapters in float32 that compute in the activations' dtype.

    Args:
        family_targets: what lora.targets = "auto" means.

    Raises UserError for a target that names no linear layer.
    """
    targets = family_targets if config.targets == "auto" else config.targets
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        raise UserError(f"lora.targets: no linear layer of the transformer is called {missing}")
    transformer.requires_grad_(False)
    adapters = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, init_lora_weights="gaussian", target_modules=list(targets)
    )
    transformer.add_adapter(adapters, adapter_name=ADAPTER)
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for part in (layer.lora_A, layer.lora_B):
                linear = part[ADAPTER]
                assert isinstance(linear, nn.Linear)
                part[ADAPTER] = _low_precision(linear)


def _low_precision(linear: nn.Linear) -> LowPrecisionLinear:
    replacement = LowPrecisionLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    replacement.weight = nn.Parameter(linear.weight.detach().float())
    return replacement
