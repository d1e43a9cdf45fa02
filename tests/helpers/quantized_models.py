"""Tiny Flux transformers whose frozen weights are quantized: by ours, or in layers and tensors of the libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastguard.backbones.flux import Flux
from fastguard.backbones.lora import add_lora
from fastguard.backbones.pipeline.backbone import blocks_of
from fastguard.backbones.quantize import _linear_layers, _put, quantize_linears
from fastguard.blocks.linear import QuantizedLinear
from fastguard.config import LoraConfig

FORMATS = ["int8", "float8", "nf4"]


def quantized(model: Any, how: Any) -> Any:
    """The linear layers of the blocks, as model.quantize has them; in place."""
    for block in blocks_of(Flux().spec, model).values():
        quantize_linears(block, torch.device("cpu"), how)
    return model


def by_library(model: Any, how: str) -> Any:
    """The same layers as bitsandbytes' ("nf4") or with torchao's tensors ("int8", "float8"); in place."""
    import bitsandbytes
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    names = set(_layers(model, how))
    if how != "nf4":
        config = (Int8WeightOnlyConfig if how == "int8" else Float8WeightOnlyConfig)(set_inductor_config=False)
        quantize_(model, config, filter_fn=lambda _, name: name in names)
        return model
    for name in names:
        layer: Any = model.get_submodule(name)
        four_bit = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
        weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        four_bit.weight, four_bit.bias = weight._quantize("cpu"), layer.bias
        _put(model, name, four_bit)
    return model


def dequantized(model: Any, like: Any) -> Any:
    """A model in float64 with the values that the quantized layers of another hold; in place."""
    model.double()
    for name, layer in like.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain: Any = model.get_submodule(name)
            plain.weight.data = layer.quantized.dequantize(torch.float64, "torch")
    return model


def with_adapters(model: Any) -> Any:
    """Adapters of random values on the targets of Flux, in place."""
    add_lora(model, LoraConfig(rank=4, alpha=6), Flux.lora_targets)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved_bytes(model: Any, inputs: Any) -> tuple[int, list[tuple[int, ...]]]:
    """What a forward pass saves for backward beside the parameters: bytes, and the shapes."""
    scales = [tensor for layer in model.modules() for tensor in _scales(layer)]
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *scales)}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A library's tensor has no storage of its own, and is saved by reference.
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.untyped_storage()._cdata not in held:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**inputs)[0]
    del out
    return sum(t.untyped_storage().nbytes() for t in saved.values()), [tuple(t.shape) for t in saved.values()]


def _scales(layer: nn.Module) -> list[torch.Tensor]:
    """What bitsandbytes holds beside a weight's codes."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def _layers(model: Any, how: Any) -> list[str]:
    return [
        name for prefix, block in blocks_of(Flux().spec, model).items() for name in _linear_layers(prefix, block, how)
    ]
