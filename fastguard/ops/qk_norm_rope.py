"""RMSNorm of query and key, rotary embedding where a model has one, and the joining of two streams.

Two streams are called text and image, after Flux. In the joined sequence the text is first.

Axes: B sample, S token, T text token, H head, D head channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastguard.ops.registry import backward_of_blocks, compute_dtype, operator


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
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized and rotated query and key, and value, joined to (B, T + S, H, D), text first.

    query, key, value: (B, S, H D) of the image; text: the same of the text stream, (B, T, H D), or None. norms: (D,)
    weights of the RMSNorm of query, key and, with a text stream, of its query and key. cos, sin: (T + S, D), or None
    without a rotary embedding.
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
    if cos is None or sin is None:
        return joined[0], joined[1], joined[2]
    return rope(joined[0], cos, sin), rope(joined[1], cos, sin), joined[2]


@operator(triton="qk_norm_rope")
def qk_norm_rope_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value as attention reads them, (B, T + S, H, D), and 1 / rms: (2, B, T + S, H) in float32.

    Without a text stream value is empty: attention can read the projection itself. Without cos and sin query and key
    are normalized only.
    """
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
        joined = torch.cat(normed, dim=1)
        outputs.append((joined if cos is None or sin is None else rope(joined, cos, sin)).to(query.dtype))
    values = value.new_empty(0)
    if text_value is not None:
        values = torch.cat([text_value, value], dim=1).unflatten(-1, (-1, size))
    return outputs[0], outputs[1], values, torch.stack(rstds)


@operator(triton="qk_norm_rope")
def qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    rstd: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    rotated: bool,
    need_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six projections (B, S or T, H D), and of the norms' weights: (2 or 4, D) in float32.

    query, key (B, S or T, H, D) are the projections or, `rotated`, the forward's results.
    """
    dtype = compute_dtype(query.dtype)
    grads = [query.new_empty(0) for _ in range(6)]
    grad_norms = [rstd.new_empty(0)] * len(norms)
    n_text = 0 if text_query is None else text_query.shape[1]
    streams = [(0, slice(n_text, None), (query, key))]
    if text_query is not None and text_key is not None:
        streams.append((2, slice(n_text), (text_query, text_key)))
    for first, tokens, sources in streams:

        def turn_back(x: Tensor, tokens: slice = tokens) -> Tensor:
            return x if cos is None or sin is None else rope(x, cos[tokens], -sin[tokens])

        for i, (grad, source) in enumerate(zip((grad_q, grad_k), sources, strict=True)):
            weight, inverse = norms[first + i].to(dtype), rstd[i, :, tokens, :, None]
            turned_back = turn_back(grad[:, tokens].to(dtype))
            if rotated:
                x_hat = turn_back(source.to(dtype)) / weight
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


class QKNormRopeFunction(torch.autograd.Function):
    """Normalize query and key, rotate them where there are cos and sin, and join the streams.

    Keeps 1 / rms and, with `rotated`, its own results, which attention keeps anyway: their gradients need the
    normalized value, which is the result turned back over the norm's weight. Without, it keeps the projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text_query: Tensor | None,
        text_key: Tensor | None,
        text_value: Tensor | None,
        norm_query: Tensor,
        norm_key: Tensor,
        norm_text_query: Tensor | None,
        norm_text_key: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        rotated: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        norms = [norm for norm in (norm_query, norm_key, norm_text_query, norm_text_key) if norm is not None]
        q, k, v, rstd = qk_norm_rope_fwd(
            query, key, value, text_query, text_key, text_value, norms, cos, sin, eps, backend
        )
        if text_value is None:
            ctx.mark_non_differentiable(v)
        sources = (q, k, None, None) if rotated else (query, key, text_query, text_key)
        ctx.save_for_backward(*sources, rstd, cos, sin, *norms)
        ctx.n_text = None if text_query is None else text_query.shape[1]
        ctx.rotated, ctx.backend = rotated, backend
        return q, k, v

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        query, key, text_query, text_key, rstd, cos, sin, *norms = ctx.saved_tensors
        if ctx.rotated and ctx.n_text is not None:
            text_query, text_key = query[:, : ctx.n_text], key[:, : ctx.n_text]
            query, key = query[:, ctx.n_text :], key[:, ctx.n_text :]
        elif not ctx.rotated:
            heads = (-1, norms[0].shape[0])
            query, key = query.unflatten(-1, heads), key.unflatten(-1, heads)
            if text_query is not None:
                text_query, text_key = text_query.unflatten(-1, heads), text_key.unflatten(-1, heads)
        need_norms = ctx.needs_input_grad[6:10]
        *grads, grad_norms = qk_norm_rope_bwd(
            grad_q,
            grad_k,
            None if ctx.n_text is None else grad_v,
            query,
            key,
            text_query,
            text_key,
            rstd,
            norms,
            cos,
            sin,
            ctx.rotated,
            any(need_norms),
            ctx.backend,
        )
        results = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:6], strict=True)]
        if ctx.n_text is None:
            results[2:] = [None] * 4
        of_norms: list[Tensor | None] = [None] * 4
        for i, norm in enumerate(norms):
            if need_norms[i]:
                of_norms[i] = grad_norms[i].to(norm.dtype)
        return (*results, *of_norms, None, None, None, None, None)
