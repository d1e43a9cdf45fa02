"""A block architecture of one file: a small adaLN transformer of its own, and how its blocks run fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastguard.blocks import parts
from fastguard.blocks.architecture import Architecture, BlockSpec, FusedBlock, qk_norms, runs_fused

WIDTH, HEAD_DIM = 32, 8

# --- the transformer, as its authors wrote it -----------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (2i, 2i + 1) of x (B, S, H, D) by its angle; cos, sin: (S, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos[:, None] + torch.stack([-odd, even], dim=-1).flatten(-2) * sin[:, None]


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_query, self.norm_key = (nn.RMSNorm(HEAD_DIM, eps=1e-6) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, S, C), temb (B, C), cos and sin (S, D) of the rotary embedding."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(temb)[:, None].chunk(6, dim=-1)
        n = self.norm1(x) * (1 + scale) + shift
        q, k, v = (layer(n).unflatten(-1, (-1, HEAD_DIM)) for layer in (self.query, self.key, self.value))
        x = x + gate * self.out(attention(rotate(self.norm_query(q), *rope), rotate(self.norm_key(k), *rope), v))
        n = self.norm2(x) * (1 + ff_scale) + ff_shift
        return x + ff_gate * self.down(self.gelu(self.up(n)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H D) from (B, S, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyTransformer(nn.Module):
    def __init__(self, n_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(n_blocks))

    def forward(self, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x, temb, rope)
        return x


# --- its fused blocks: in fastguard this part is blocks/toy.py -------------------------------------------------------


class FusedToyBlock(FusedBlock):
    spec = BlockSpec(
        block=ToyBlock,
        parts={"gelu": nn.GELU},
        layer_norms=("norm1", "norm2"),
        qk_norms=("norm_query", "norm_key"),
        linears=("query", "key", "value", "out", "up", "down"),
        unfit=lambda block: parts.unfit_gelu(block.gelu),
    )

    def forward(self: Any, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if not runs_fused(self, x, temb) or not parts.fits_rope(rope, x.shape[1], HEAD_DIM):
            return super().forward(x, temb, rope)
        fusion = self.fusion
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation(temb).chunk(6, dim=-1)
        n, _ = parts.modulate(x, self.norm1, scale, shift, fusion)
        qkv = parts.project(n, [self.query, self.key, self.value], fusion)
        q, k, v = parts.qk_norm_rope(qkv, None, qk_norms(self, self.spec), rope, fusion)
        y = parts.linear(attention(q, k, v), self.out, fusion)
        n, x = parts.modulate(x, self.norm2, ff_scale, ff_shift, fusion, residual=(y, gate))
        _, hidden = parts.project_with_hidden(n, [], self.up, fusion)
        return parts.gated_residual(x, parts.activate(hidden, self.down, fusion), ff_gate, fusion)


TOY = Architecture(models=(ToyTransformer,), kinds=(FusedToyBlock,))
