"""LoRA adapters (peft) on a diffusers transformer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from fastguard.blocks.linear import LowPrecisionLinear
from fastguard.config import LoraConfig
from fastguard.errors import UserError

ADAPTER = "default"


def add_lora(transformer: Any, config: LoraConfig, family_targets: Sequence[str], unused: Collection[str] = ()) -> None:
    """Freeze the transformer and add adapters in float32 that compute in the activations' dtype.

    Args:
        family_targets: what lora.targets = "auto" means.
        unused: names of layers that get none.

    Raises UserError for a target that names no linear layer.
    """
    targets = family_targets if config.targets == "auto" else config.targets
    found = {target: _called(target, transformer, unused) for target in targets}
    missing = [target for target, layers in found.items() if True not in layers.values()]
    if missing:
        raise UserError(f"lora.targets: no linear layer of the transformer is called {missing}")
    # peft takes every module that is called so, and fails at one that is no layer: FLUX.2's `attn.to_out` is a layer in
    # a single block, and a list in a double one. It gets the whole names of layers of which some get no adapter.
    precise = [
        name
        for target, layers in found.items()
        for name in ([target] if all(layers.values()) else [name for name, linear in layers.items() if linear])
    ]
    transformer.requires_grad_(False)
    adapters = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, init_lora_weights="gaussian", target_modules=precise
    )
    transformer.add_adapter(adapters, adapter_name=ADAPTER)
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for part in (layer.lora_A, layer.lora_B):
                linear = part[ADAPTER]
                assert isinstance(linear, nn.Linear)
                part[ADAPTER] = _low_precision(linear)


def _called(target: str, transformer: Any, unused: Collection[str]) -> dict[str, bool]:
    """Names of the modules that end like the target, and whether each is a linear layer that gets an adapter."""
    modules = {name: module for name, module in transformer.named_modules() if f".{name}".endswith(f".{target}")}
    return {name: isinstance(module, nn.Linear) and name not in unused for name, module in modules.items()}


def _low_precision(linear: nn.Linear) -> LowPrecisionLinear:
    replacement = LowPrecisionLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    replacement.weight = nn.Parameter(linear.weight.detach().float())
    return replacement
