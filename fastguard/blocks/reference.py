"""What the fused Flux kernels compute, once, in plain torch and any dtype: run it in float64 and it is their truth.

Axes: B sample, S token, T text token (first in the joined sequence), H head, D head channel, C channel of a token.
Everything is differentiable by autograd; nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`LayerNorm(x) (1 + scale) + shift`, no affine: x (B, S, C); scale, shift (B, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate y`: x, y (B, S, C); gate (B, C)."""
    return x + gate[:, None] * y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`w x / sqrt(mean(x^2) + eps)` over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (2i, 2i + 1) by its angle: x (B, S, H, D); cos, sin (S, D), equal within a pair."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: tuple[Tensor, Tensor, Tensor] | None,
    norms: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized and rotated query and key, and value, joined to (B, T + S, H, D), text first.

    query, key, value: (B, S, H D) of the image; text: the same of the text stream, (B, T, H D), or None. norms: (D,)
    weights of the RMSNorm of query, key and, with a text stream, of its query and key. cos, sin: (T + S, D).
    """
    size = len(norms[0])
    joined = []
    for i, image in enumerate((query, key, value)):
        parts = [image] if text is None else [text[i], image]
        heads = [part.unflatten(-1, (-1, size)) for part in parts]
        if i < 2:
            weights = [norms[i]] if text is None else [norms[2 + i], norms[i]]
            heads = [rms_norm(head, weight, eps) for head, weight in zip(heads, weights, strict=True)]
        joined.append(torch.cat(heads, dim=1))
    return rope(joined[0], cos, sin), rope(joined[1], cos, sin), joined[2]


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """`GELU(x + bias)` in its tanh form, `z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2`: x (..., C), bias (C,)."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")
