"""Frozen weights in 8 or 4 bits: dequantized for each matmul, forward and backward, and dropped.

A weight of a linear layer is a tensor, or one of the named tuples below: the tensors that hold it, and `dequantize`.
Autograd Functions take the tensors (`tensors_of`) and put the weight together again (`weight_of`), since
`save_for_backward` and `torch.compile` know tensors only.

Axes: N output channel, C input channel, G block of weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastguard.ops.dequantize import dequantize_blocks, dequantize_rows

NESTED = 256
"""Blocks that share a scale of their scales."""


class RowScaled(NamedTuple):
    """8 bits a weight, and a scale per row, as torchao's weight-only int8 and float8."""

    scale: Tensor
    """(N,) float32"""
    codes: Tensor
    """(N, C) int8, or uint8 with the bits of float8 e4m3fn (neither DDP's backends nor older GPUs know that dtype)"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype, backend: str, again: bool = False) -> Tensor:
        """(N, C)"""
        return dequantize_rows(self.scale, self.codes, dtype, again, backend)


class BlockScaled(NamedTuple):
    """4 bits a weight, and a scale per block, as bitsandbytes' nf4 and fp4; see `dequantize_blocks`."""

    absmax: Tensor
    """(G,) float32, or (G / NESTED,) with scales in 8 bits"""
    codes: Tensor
    """(N, C / 2) uint8"""
    table: Tensor
    """(16,) float32"""
    absmax_codes: Tensor | None
    """(G,) uint8"""
    absmax_table: Tensor | None
    """(256,) float32"""
    absmax_offset: Tensor | None
    """() float32"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype, backend: str, again: bool = False) -> Tensor:
        """(N, C)"""
        n_blocks = len(self.absmax if self.absmax_codes is None else self.absmax_codes)
        return dequantize_blocks(*self, n_blocks, NESTED, dtype, again, backend)


Weight: TypeAlias = Tensor | RowScaled | BlockScaled
"""Of a linear layer, (N, C)."""
KINDS: dict[str, Any] = {"rows": RowScaled, "blocks": BlockScaled}


def dense(weight: Weight, dtype: torch.dtype, backend: str, again: bool = False) -> Tensor:
    """(N, C) in `dtype`: the weight itself, or its values dequantized; `again` in a backward pass."""
    if not isinstance(weight, Tensor):
        return weight.dequantize(dtype, backend, again)
    return weight.dequantize().to(dtype) if dequantizes(weight) else weight


def dequantizes(weight: Tensor) -> bool:
    """Whether this is a library's tensor that can dequantize itself, and rounds no activations besides."""
    own = type(weight).dequantize is not Tensor.dequantize
    return own and getattr(weight, "act_quant_kwargs", None) is None  # torchao's field


def detached(weight: Weight) -> Weight:
    return weight.detach() if isinstance(weight, Tensor) else weight  # frozen anyway


def kind_of(weight: Weight) -> str:
    """How `weight_of` puts the weight together again."""
    return next((name for name, kind in KINDS.items() if isinstance(weight, kind)), "tensor")


def size_of(kind: str) -> int:
    """Number of tensors of a weight."""
    return len(KINDS[kind]._fields) if kind in KINDS else 1


def tensors_of(weight: Weight) -> tuple[Tensor | None, ...]:
    return (weight,) if isinstance(weight, Tensor) else tuple(weight)


def weight_of(kind: str, tensors: Sequence[Tensor | None]) -> Any:
    return KINDS[kind](*tensors) if kind in KINDS else tensors[0]


def weights_of(kinds: Sequence[str], tensors: Sequence[Tensor | None]) -> list[Any]:
    """Several weights of tensors that lie end to end."""
    found, start = [], 0
    for kind in kinds:
        end = start + size_of(kind)
        found.append(weight_of(kind, tensors[start:end]))
        start = end
    return found


def four_bit_weight(layer: Any) -> BlockScaled | None:
    """The weight of bitsandbytes' `Linear4bit`, as it lies there; None for other layers, and where it does not fit."""
    kind = type(layer)
    if kind.__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4") or kind.__module__ != "bitsandbytes.nn.modules":
        return None  # importing it takes seconds
    state = layer.weight.quant_state
    if state is None:  # before the first move to a device
        return None
    return four_bit(layer.weight.data, state)


def four_bit(codes: Tensor, state: Any) -> BlockScaled | None:
    """bitsandbytes' codes and `QuantState`, without a copy; None where blocks do not divide the weight."""
    n, c = state.shape
    if c % 2 or n * c % state.blocksize or (state.nested and state.state2.blocksize != NESTED):
        return None
    outer = state.state2 if state.nested else state
    nested = (state.absmax, outer.code, state.offset) if state.nested else (None, None, None)
    # The codes may be stored as numbers of another dtype.
    return BlockScaled(outer.absmax, codes.reshape(-1).view(torch.uint8).view(n, c // 2), state.code, *nested)
