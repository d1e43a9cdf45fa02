"""Frozen linear layers in 8 bits: torchao's, and their memory for the planner, which needs no torchao.

Axes: N row of a weight (a channel of the output), C column (a channel of the input).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastguard.extras import importing_torchao


def int8_weight_only() -> Callable[[nn.Module], None]:
    """What quantizes the weight of one linear layer in place, by rows. Raises UserError where torchao is missing."""
    with importing_torchao('prompts.encoders = "int8"', '"device" or "cpu"'):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    # Inductor's settings would change for the whole process.
    return partial(quantize_, config=Int8WeightOnlyConfig(set_inductor_config=False))


def quantize_linears(module: nn.Module, device: torch.device) -> None:
    """Move a module from the host to the device with the weights of its linear layers in 8 bits, in place.

    Each layer is quantized on the host and then moved: no wider copy of it is ever on the device, and all devices get
    the same bits. Gradients do not flow through it. Raises as `int8_weight_only`.
    """
    quantize = int8_weight_only()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            quantize(layer)
            layer.to(device)
    module.to(device)


class PlannedInt8Linear(nn.Linear):
    """A linear layer that has and allocates what one by `quantize_linears` does on CUDA; its values mean nothing."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As torchao's `Int8Tensor`: the matmul reads a copy (C, N) of the codes in the dtype of x, which then goes."""
        product = torch.mm(x.reshape(-1, self.in_features), self.weight.t().to(x.dtype))
        product = product * self.scale.to(x.dtype).flatten()
        if self.bias is not None:
            product += self.bias
        return product.reshape(*x.shape[:-1], self.out_features)


def plan_int8_linears(module: nn.Module) -> None:
    """Give the linear layers of a meta module the memory that `quantize_linears` would, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
            rows = layer.out_features
            layer.register_buffer("scale", torch.empty(rows, 1, dtype=torch.float32, device="meta"))
            layer.register_buffer("zero_point", torch.empty(rows, 1, dtype=torch.int8, device="meta"))
            layer.__class__ = PlannedInt8Linear
