"""The functions of the Flux kernels in plain torch, for any device and dtype, float64 included.

Same signatures and results as `fastguard.kernels`: the plain path where Triton does not run. Axes as in
`fastguard.blocks.reference`; narrow dtypes are computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastguard.blocks import reference
from fastguard.torch_backend import compute_dtype

GELU_SLOPE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of the arithmetic; per-sample rows (B, C) become (B, 1, C)."""
    dtype = compute_dtype(tensors[0].dtype)
    return [(t if t.ndim > 2 else t[:, None]).to(dtype) for t in tensors]


# --- LayerNorm + modulate -------------------------------------------------------------------------------------------


def adaln_fwd(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x.new_empty(0)
    if residual is not None and gate is not None:
        x = summed = gated_residual_fwd(x, residual, gate)
    wide, scale, shift = _wide(x, scale, shift)
    normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    normed = normed.mul_(1 + scale).add_(shift)
    return normed.to(x.dtype).contiguous(), summed, mean.squeeze(-1), rstd.squeeze(-1)


def adaln_apply(x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wide, scale, shift = _wide(x, scale, shift)
    return (wide - mean[..., None]).mul_(rstd[..., None]).mul_(1 + scale).add_(shift).to(x.dtype).contiguous()


def adaln_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    grad_summed: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, wide_grad, wide_scale = _wide(x, grad, scale)
    x_hat = (wide - mean[..., None]).mul_(rstd[..., None])
    grad_scale, grad_shift, grad_gate = (wide.new_empty(0) for _ in range(3))
    grad_residual = x.new_empty(0)
    if need_modulation:
        grad_scale, grad_shift = (wide_grad * x_hat).sum(1), wide_grad.sum(1)
    w = wide_grad * (1 + wide_scale)
    inner = (w * x_hat).mean(-1, keepdim=True)
    total = (w - w.mean(-1, keepdim=True)).sub_(x_hat * inner).mul_(rstd[..., None])
    if grad_summed is not None:
        total += grad_summed
    if gate is not None:
        grad_residual = (gate[:, None] * total).to(x.dtype).contiguous()
        if residual is not None:
            grad_gate = (total * residual).sum(1)
    return total.to(x.dtype).contiguous(), grad_residual, grad_scale, grad_shift, grad_gate


# --- gated residual -------------------------------------------------------------------------------------------------


def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    wide, y, gate = _wide(x, y, gate)
    return (wide + gate * y).to(x.dtype).contiguous()


def gated_residual_bwd(grad: Tensor, y: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide, gate = _wide(grad, gate)
    grad_gate = wide.new_empty(0) if y is None else (wide * y).sum(1)
    return (gate * wide).to(grad.dtype).contiguous(), grad_gate


# --- RMSNorm of query and key + rotary embedding --------------------------------------------------------------------


def qk_norm_rope_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, size = compute_dtype(query.dtype), len(norms[0])
    outputs, rstds = [], []
    for i, (image, text) in enumerate(((query, text_query), (key, text_key))):
        parts = [(image, norms[i])] if text is None else [(text, norms[2 + i]), (image, norms[i])]
        normed, rstd = [], []
        for part, weight in parts:
            heads = part.unflatten(-1, (-1, size)).to(dtype)
            rstd.append(torch.rsqrt(heads.square().mean(-1, keepdim=True).add_(eps)))
            normed.append(heads * rstd[-1] * weight)
        rstds.append(torch.cat(rstd, dim=1).squeeze(-1))
        outputs.append(reference.rope(torch.cat(normed, dim=1), cos, sin).to(query.dtype))
    joined = value.new_empty(0)
    if text_value is not None:
        joined = torch.cat([text_value, value], dim=1).unflatten(-1, (-1, size))
    return outputs[0], outputs[1], joined, torch.stack(rstds)


def qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    rstd: Tensor,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    rotated: bool,
    need_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    grads = [query.new_empty(0) for _ in range(6)]
    grad_norms = [rstd.new_empty(0)] * len(norms)
    n_text = 0 if text_query is None else text_query.shape[1]
    streams = [(0, slice(n_text, None), (query, key))]
    if text_query is not None and text_key is not None:
        streams.append((2, slice(n_text), (text_query, text_key)))
    for first, tokens, sources in streams:
        cosine, sine = cos[tokens], sin[tokens]
        for i, (grad, source) in enumerate(zip((grad_q, grad_k), sources, strict=True)):
            weight, inverse = norms[first + i].to(dtype), rstd[i, :, tokens, :, None]
            turned_back = reference.rope(grad[:, tokens].to(dtype), cosine, -sine)
            if rotated:
                x_hat = reference.rope(source.to(dtype), cosine, -sine) / weight
            else:
                x_hat = source.to(dtype) * inverse
            if need_norms:
                grad_norms[first + i] = (turned_back * x_hat).sum((0, 1, 2))
            g = turned_back * weight
            result = (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * inverse
            grads[3 * (first // 2) + i] = result.to(query.dtype).flatten(2)
        if grad_v is not None:
            part = grad_v[:, tokens].flatten(2).to(query.dtype)
            grads[3 * (first // 2) + 2] = part.clone(memory_format=torch.contiguous_format)
    return (*grads, torch.stack(grad_norms) if need_norms else grad_norms[0])  # type: ignore[return-value]


# --- bias + tanh-GELU -----------------------------------------------------------------------------------------------


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, prefix: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    out = F.gelu(x.to(dtype) if bias is None else x.to(dtype) + bias, approximate="tanh").to(x.dtype)
    return out.contiguous() if prefix is None else torch.cat([prefix, out], dim=-1).contiguous()


def bias_gelu_bwd_(grad: Tensor, x: Tensor, bias: Tensor | None, need_output: bool) -> Tensor:
    dtype = compute_dtype(x.dtype)
    z = x.to(dtype) if bias is None else x.to(dtype) + bias
    # z sigmoid(2 u) with u = slope (z + cubic z^3); its derivative is s + z s (1 - s) 2 u'.
    s = torch.sigmoid(2 * GELU_SLOPE * (z + GELU_CUBIC * z**3))
    slope = 2 * GELU_SLOPE * (1 + 3 * GELU_CUBIC * z * z)
    grad.copy_(grad.to(dtype) * (s + z * s * (1 - s) * slope))
    return (z * s).to(x.dtype).contiguous() if need_output else x.new_empty(0)
