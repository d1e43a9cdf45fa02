"""RMSNorm of query and key, with or without a rotary embedding, with text and image joined, and the gradients.

Axes: B sample; S image token; T text token (first in the joined sequence); H head; D channel of a head.

One launch serves query, key and value of both streams. A program takes some tokens of one stream and a group of heads,
so that every choice between text and image is one between two scalars, and cos and sin are read for all its heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.column_sums import column_sums
from fastguard.kernels.common import Launch, cdiv, launch, next_power_of_2, unit_stride

# 4 warps x 32 threads x 8 elements of each tensor: at D = 128 a tile of 4 tokens x 2 heads, one 16-byte access of bf16
# each. A program keeps its tokens' cos and sin, and the norm weights, in registers over up to 8 heads.
LAUNCH = Launch(block=1024, num_warps=4)
HEADS_PER_TILE = 2
HEADS_PER_PROGRAM = 8


@triton.jit
def _of_stream(is_text, text, image, HAS_TEXT: tl.constexpr):
    """The text's or the image's pointer or size."""
    if HAS_TEXT:
        return tl.where(is_text, text, image)
    else:
        return image


@triton.jit
def _place(n_text, n_image, n_groups, HAS_TEXT: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of a program: its group of heads and its sample; whether it is on the text; its tokens within that stream and
    within the joined sequence, and which of them exist."""
    pid = tl.program_id(0)
    n_text_blocks = tl.cdiv(n_text, BLOCK_S)
    n_blocks = n_text_blocks + tl.cdiv(n_image, BLOCK_S)
    block = (pid // n_groups) % n_blocks
    is_text = block < n_text_blocks
    tokens = (block - _of_stream(is_text, 0, n_text_blocks, HAS_TEXT)) * BLOCK_S + tl.arange(0, BLOCK_S)
    exist = tokens < _of_stream(is_text, n_text, n_image, HAS_TEXT)
    positions = (tokens + _of_stream(is_text, 0, n_text, HAS_TEXT)).to(tl.int64)
    return pid % n_groups, (pid // n_groups // n_blocks).to(tl.int64), is_text, tokens.to(tl.int64), positions, exist


@triton.jit
def _rows_of_stream(
    is_text,
    sample,
    tokens,
    ptr,
    stride_sample,
    stride_token,
    text_ptr,
    stride_text_sample,
    stride_text_token,
    HAS_TEXT: tl.constexpr,
):
    """Pointers (S, 1, 1) to the program's tokens in the text's or the image's tensor."""
    ptr += sample * stride_sample
    stride_token = tl.cast(stride_token, tl.int64)
    if HAS_TEXT:
        ptr = tl.where(is_text, text_ptr + sample * stride_text_sample, ptr)
        stride_token = tl.where(is_text, stride_text_token, stride_token)
    return ptr + tokens[:, None, None] * stride_token


@triton.jit
def _pairs(tile):
    """A tile (S, H, D) as its even and odd channels (S, H, D / 2) in float32, which a thread holds side by side."""
    return tl.split(tl.reshape(tile.to(tl.float32), (tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2)))


@triton.jit
def _store_pairs(ptr, even, odd, mask):
    """Cast, and write what `_pairs` took apart."""
    tile = tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], 2 * even.shape[2]))
    tl.store(ptr, tile.to(ptr.dtype.element_ty), mask)


@triton.jit
def _load_angles(cos_ptr, sin_ptr, positions, in_head, mask, HAS_ROPE: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """cos and sin of each pair, repeated for each head of the tile: (S, H, D / 2). Numbers that nobody reads where
    nothing is turned."""
    if HAS_ROPE:
        # Loaded in the shape of a tile, they come in its layout; of one head, they would pass through shared memory.
        offsets = positions[:, None, None] * HEAD_SIZE + in_head
        cos, _cos = _pairs(tl.load(cos_ptr + offsets, mask, other=0.0))
        sin, _sin = _pairs(tl.load(sin_ptr + offsets, mask, other=0.0))
        return cos, sin
    else:
        return 1.0, 0.0


@triton.jit
def _turn(even, odd, cos, sin, HAS_ROPE: tl.constexpr):
    """Turn each pair of channels by its angle."""
    if HAS_ROPE:
        return even * cos - odd * sin, odd * cos + even * sin
    else:
        return even, odd


@triton.jit
def _turn_back(even, odd, cos, sin, HAS_ROPE: tl.constexpr):
    if HAS_ROPE:
        return even * cos + odd * sin, odd * cos - even * sin
    else:
        return even, odd


@triton.jit
def _load_norm(is_text, ptr, text_ptr, dims, HAS_TEXT: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """The stream's norm weights: (1, 1, D / 2) even, and odd."""
    return _pairs(tl.load(_of_stream(is_text, text_ptr, ptr, HAS_TEXT) + dims, dims < HEAD_SIZE, other=1.0))


@triton.jit
def _norm_rope(tile, weight, cos, sin, eps, HAS_ROPE: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Even and odd channels of `R (w x rstd)`, and `rstd = 1 / sqrt(mean(x^2) + eps)` of each token and head."""
    weight_even, weight_odd = weight
    even, odd = _pairs(tile)
    rstd = tl.rsqrt(tl.sum(even * even + odd * odd, axis=2) / HEAD_SIZE + eps)
    even *= rstd[:, :, None] * weight_even
    odd *= rstd[:, :, None] * weight_odd
    even, odd = _turn(even, odd, cos, sin, HAS_ROPE)
    return even, odd, rstd


@triton.jit
def _norm_rope_bwd(
    grad_ptr, tile_ptr, rstd_ptr, out_ptr, weight, cos, sin, mask, exist,
    HAS_ROPE: tl.constexpr, ROTATED: tl.constexpr, HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    """Write a tile's gradient; return the even and odd channels of `dz x_hat`, whose sum is the weights' gradient."""
    weight_even, weight_odd, inverse_even, inverse_odd = weight
    grad_even, grad_odd = _pairs(tl.load(grad_ptr, mask, other=0.0))
    even, odd = _pairs(tl.load(tile_ptr, mask, other=0.0))
    rstd = tl.load(rstd_ptr, exist[:, None], other=0.0)[:, :, None]
    dz_even, dz_odd = _turn_back(grad_even, grad_odd, cos, sin, HAS_ROPE)
    if ROTATED:
        even, odd = _turn_back(even, odd, cos, sin, HAS_ROPE)
        hat_even = even * inverse_even
        hat_odd = odd * inverse_odd
    else:
        hat_even = even * rstd
        hat_odd = odd * rstd
    share_even = dz_even * hat_even
    share_odd = dz_odd * hat_odd
    mean = (tl.sum(weight_even * share_even + weight_odd * share_odd, axis=2) / HEAD_SIZE)[:, :, None]
    grad_even = rstd * (weight_even * dz_even - hat_even * mean)
    grad_odd = rstd * (weight_odd * dz_odd - hat_odd * mean)
    _store_pairs(out_ptr, grad_even, grad_odd, mask)
    return share_even, share_odd


@triton.jit
def _store_sum(ptr, even, odd, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of a tile (S, H, D / 2) twice over its tokens and heads."""
    total = tl.join(tl.sum(tl.sum(even, axis=0), axis=0), tl.sum(tl.sum(odd, axis=0), axis=0))
    dims = tl.arange(0, BLOCK_D)
    tl.store(ptr + dims, tl.reshape(total, (BLOCK_D,)), dims < HEAD_SIZE)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    text_query_ptr,
    text_key_ptr,
    text_value_ptr,
    query_norm_ptr,
    key_norm_ptr,
    text_query_norm_ptr,
    text_key_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rstd_ptr,
    stride_query_sample,
    stride_query_token,
    stride_key_sample,
    stride_key_token,
    stride_value_sample,
    stride_value_token,
    stride_text_query_sample,
    stride_text_query_token,
    stride_text_key_sample,
    stride_text_key_token,
    stride_text_value_sample,
    stride_text_value_token,
    eps,
    n_samples,
    n_text,
    n_image,
    n_groups,
    heads_per_group,
    HAS_TEXT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`q = R (w x rstd)`, the same for k, with R the turn of each pair (2i, 2i + 1), or 1 without HAS_ROPE; with a text
    stream also v, copied.

    Bytes per element: each input read and each output written once (bf16: 4); per token 8 D for cos and sin and 4 for
    each rstd. Sums in float32. Inputs: (B, S, H D), text (B, T, H D). Norms: (D,). cos, sin: (T + S, D) float32.
    q, k, v: (B, T + S, H, D), contiguous, text first. rstd: (2, B, T + S, H) float32.
    """
    group, sample, is_text, tokens, positions, exist = _place(n_text, n_image, n_groups, HAS_TEXT, BLOCK_S)
    heads = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    mask = exist[:, None, None] & (dims < HEAD_SIZE)
    query_ptr = _rows_of_stream(
        is_text, sample, tokens, query_ptr, stride_query_sample, stride_query_token,
        text_query_ptr, stride_text_query_sample, stride_text_query_token, HAS_TEXT,
    )  # fmt: skip
    key_ptr = _rows_of_stream(
        is_text, sample, tokens, key_ptr, stride_key_sample, stride_key_token,
        text_key_ptr, stride_text_key_sample, stride_text_key_token, HAS_TEXT,
    )  # fmt: skip
    if HAS_TEXT:
        value_ptr = _rows_of_stream(
            is_text, sample, tokens, value_ptr, stride_value_sample, stride_value_token,
            text_value_ptr, stride_text_value_sample, stride_text_value_token, HAS_TEXT,
        )  # fmt: skip
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions, dims + 0 * heads[None, :, None], mask, HAS_ROPE, HEAD_SIZE)
    query_norm = _load_norm(is_text, query_norm_ptr, text_query_norm_ptr, dims, HAS_TEXT, HEAD_SIZE)
    key_norm = _load_norm(is_text, key_norm_ptr, text_key_norm_ptr, dims, HAS_TEXT, HEAD_SIZE)

    n_heads = n_groups * heads_per_group
    rows = sample * (n_text + n_image) + positions
    out = rows[:, None, None] * (n_heads * HEAD_SIZE)
    rstd_plane = tl.cast(n_samples, tl.int64) * (n_text + n_image) * n_heads
    for first in range(group * heads_per_group, (group + 1) * heads_per_group, BLOCK_H):
        in_token = (first + heads)[None, :, None] * HEAD_SIZE + dims
        rstd_offsets = rows[:, None] * n_heads + (first + heads)[None, :]
        query = tl.load(query_ptr + in_token, mask, other=0.0)
        key = tl.load(key_ptr + in_token, mask, other=0.0)
        if HAS_TEXT:
            value = tl.load(value_ptr + in_token, mask, other=0.0)
            tl.store(v_ptr + out + in_token, value.to(v_ptr.dtype.element_ty), mask)
        even, odd, rstd = _norm_rope(query, query_norm, cos, sin, eps, HAS_ROPE, HEAD_SIZE)
        _store_pairs(q_ptr + out + in_token, even, odd, mask)
        tl.store(rstd_ptr + rstd_offsets, rstd, exist[:, None])
        even, odd, rstd = _norm_rope(key, key_norm, cos, sin, eps, HAS_ROPE, HEAD_SIZE)
        _store_pairs(k_ptr + out + in_token, even, odd, mask)
        tl.store(rstd_ptr + rstd_plane + rstd_offsets, rstd, exist[:, None])


@triton.jit
def _qk_norm_rope_bwd_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    query_ptr,
    key_ptr,
    text_query_ptr,
    text_key_ptr,
    rstd_ptr,
    query_norm_ptr,
    key_norm_ptr,
    text_query_norm_ptr,
    text_key_norm_ptr,
    cos_ptr,
    sin_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_text_query_ptr,
    grad_text_key_ptr,
    grad_text_value_ptr,
    partials_ptr,
    stride_grad_q_sample,
    stride_grad_q_token,
    stride_grad_q_head,
    stride_grad_k_sample,
    stride_grad_k_token,
    stride_grad_k_head,
    stride_grad_v_sample,
    stride_grad_v_token,
    stride_grad_v_head,
    stride_query_sample,
    stride_query_token,
    stride_key_sample,
    stride_key_token,
    stride_text_query_sample,
    stride_text_query_token,
    stride_text_key_sample,
    stride_text_key_token,
    n_samples,
    n_text,
    n_image,
    n_groups,
    heads_per_group,
    HAS_TEXT: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    ROTATED: tl.constexpr,
    NEED_NORMS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With z = w x_hat the value that R turned, `dz = R^T grad` and `grad x = rstd (w dz - x_hat mean(w dz x_hat))`.

    ROTATED: query and key are the forward's outputs, and `x_hat = R^T q / w`; else its inputs, and `x_hat = x rstd`.
    With a text stream grad_v is copied. With NEED_NORMS each program's sums of `dz x_hat` over its tokens and heads are
    written: partials, (P, 2, D) float32, query and key. Bytes per element: each gradient and each input read once,
    each gradient written once (bf16: 6, and 4 for value); per token 8 D for cos and sin and 4 for each rstd.
    Computes in float32. Gradients of outputs: (B, T + S, H, D), any strides; the rest as in the forward.
    """
    group, sample, is_text, tokens, positions, exist = _place(n_text, n_image, n_groups, HAS_TEXT, BLOCK_S)
    heads = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    mask = exist[:, None, None] & (dims < HEAD_SIZE)
    query_ptr = _rows_of_stream(
        is_text, sample, tokens, query_ptr, stride_query_sample, stride_query_token,
        text_query_ptr, stride_text_query_sample, stride_text_query_token, HAS_TEXT,
    )  # fmt: skip
    key_ptr = _rows_of_stream(
        is_text, sample, tokens, key_ptr, stride_key_sample, stride_key_token,
        text_key_ptr, stride_text_key_sample, stride_text_key_token, HAS_TEXT,
    )  # fmt: skip
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions, dims + 0 * heads[None, :, None], mask, HAS_ROPE, HEAD_SIZE)
    even, odd = _load_norm(is_text, query_norm_ptr, text_query_norm_ptr, dims, HAS_TEXT, HEAD_SIZE)
    query_norm = (even, odd, 1.0 / even, 1.0 / odd)
    even, odd = _load_norm(is_text, key_norm_ptr, text_key_norm_ptr, dims, HAS_TEXT, HEAD_SIZE)
    key_norm = (even, odd, 1.0 / even, 1.0 / odd)

    at = positions[:, None, None]
    grad_q_ptr += sample * stride_grad_q_sample + at * stride_grad_q_token
    grad_k_ptr += sample * stride_grad_k_sample + at * stride_grad_k_token
    n_heads = n_groups * heads_per_group
    rows = sample * (n_text + n_image) + positions
    rstd_plane = tl.cast(n_samples, tl.int64) * (n_text + n_image) * n_heads
    out = (sample * _of_stream(is_text, n_text, n_image, HAS_TEXT) + tokens)[:, None, None] * (n_heads * HEAD_SIZE)
    grad_query_ptr = _of_stream(is_text, grad_text_query_ptr, grad_query_ptr, HAS_TEXT) + out
    grad_key_ptr = _of_stream(is_text, grad_text_key_ptr, grad_key_ptr, HAS_TEXT) + out
    if HAS_TEXT:
        grad_v_ptr += sample * stride_grad_v_sample + at * stride_grad_v_token
        grad_value_ptr = tl.where(is_text, grad_text_value_ptr, grad_value_ptr) + out
    query_even = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D // 2), tl.float32)
    query_odd = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D // 2), tl.float32)
    key_even = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D // 2), tl.float32)
    key_odd = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D // 2), tl.float32)
    # In two stages a tile's loads are copies to shared memory, all in flight together; as loads to registers they would
    # wait for each other's computation.
    for first in tl.range(group * heads_per_group, (group + 1) * heads_per_group, BLOCK_H, num_stages=2):
        head = (first + heads)[None, :, None].to(tl.int64)
        in_token = head * HEAD_SIZE + dims
        rstd_ptrs = rstd_ptr + rows[:, None] * n_heads + (first + heads)[None, :]
        if HAS_TEXT:
            grad_v = tl.load(grad_v_ptr + head * stride_grad_v_head + dims, mask, other=0.0)
            tl.store(grad_value_ptr + in_token, grad_v.to(grad_value_ptr.dtype.element_ty), mask)
        even_of_query, odd_of_query = _norm_rope_bwd(
            grad_q_ptr + head * stride_grad_q_head + dims, query_ptr + in_token, rstd_ptrs, grad_query_ptr + in_token,
            query_norm, cos, sin, mask, exist, HAS_ROPE, ROTATED, HEAD_SIZE,
        )  # fmt: skip
        even_of_key, odd_of_key = _norm_rope_bwd(
            grad_k_ptr + head * stride_grad_k_head + dims, key_ptr + in_token, rstd_ptrs + rstd_plane,
            grad_key_ptr + in_token, key_norm, cos, sin, mask, exist, HAS_ROPE, ROTATED, HEAD_SIZE,
        )  # fmt: skip
        if NEED_NORMS:
            query_even += even_of_query
            query_odd += odd_of_query
            key_even += even_of_key
            key_odd += odd_of_key
    if NEED_NORMS:
        partials_ptr += tl.program_id(0).to(tl.int64) * (2 * HEAD_SIZE)
        _store_sum(partials_ptr, query_even, query_odd, HEAD_SIZE, BLOCK_D)
        _store_sum(partials_ptr + HEAD_SIZE, key_even, key_odd, HEAD_SIZE, BLOCK_D)


def _tiles(n_heads: int, head_size: int) -> tuple[int, int, dict[str, int]]:
    """Groups of heads, heads of a group, and the sizes of a tile: powers of two, so that no head is masked."""
    heads_per_group = math.gcd(n_heads, HEADS_PER_PROGRAM)
    block_h = min(heads_per_group, HEADS_PER_TILE)
    block_d = next_power_of_2(head_size)
    block_s = LAUNCH.block // (block_h * block_d)
    return n_heads // heads_per_group, heads_per_group, {"BLOCK_S": block_s, "BLOCK_H": block_h, "BLOCK_D": block_d}


def _parts(image: Sequence[Tensor], text: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Image and text tensors as (B, S, H D) of any strides but the last, the text's in the dtype of the image's."""
    parts = [unit_stride(part.flatten(2)) for part in image]
    return parts, [
        None if part is None else unit_stride(part.flatten(2).to(of.dtype))
        for part, of in zip(text, image, strict=True)
    ]


def _strides(n_axes: int, *tensors: Tensor | None) -> list[int]:
    """The strides of the first axes of each tensor, 0 where it is absent."""
    return [stride for tensor in tensors for stride in ([0] * n_axes if tensor is None else tensor.stride()[:n_axes])]


def _weights(norms: Sequence[Tensor]) -> list[Tensor | None]:
    """The weights of the image's query and key, and of the text's in the same dtype, or None."""
    text = [weight.to(of.dtype).contiguous() for weight, of in zip(norms[2:], norms[:2], strict=False)]
    return [norms[0].contiguous(), norms[1].contiguous(), *(text or (None, None))]


def _angles(*tables: Tensor | None) -> list[Tensor | None]:
    return [None if table is None else table.contiguous() for table in tables]


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
    """q, k, v (B, T + S, H, D) in query's dtype and rstd (2, B, T + S, H) float32, in one launch.

    Without a text stream v is empty (0,).
    query, key, value: (B, S, H D). Text: the same, (B, T, H D), or None. norms: (D,) weights for query, key and, with
    a text stream, its query and key. cos, sin: (T + S, D) float32, equal within each pair (2i, 2i + 1); None without a
    rotary embedding.
    """
    head_size = norms[0].shape[0]
    n_samples, n_image, width = query.shape
    n_text = 0 if text_query is None else text_query.shape[1]
    n_groups, heads_per_group, tile = _tiles(width // head_size, head_size)
    shape = (n_samples, n_text + n_image, width // head_size)
    q, k = (torch.empty((*shape, head_size), dtype=query.dtype, device=query.device) for _ in range(2))
    v = torch.empty((0,) if text_value is None else (*shape, head_size), dtype=query.dtype, device=query.device)
    rstd = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
    image, text = _parts((query, key, value), (text_query, text_key, text_value))
    n_blocks = cdiv(n_text, tile["BLOCK_S"]) + cdiv(n_image, tile["BLOCK_S"])
    if q.numel() > 0:
        launch(
            _qk_norm_rope_fwd_kernel,
            n_samples * n_blocks * n_groups,
            (*image, *text, *_weights(norms), *_angles(cos, sin), q, k, v, rstd),
            (*_strides(2, *image, *text), eps, n_samples, n_text, n_image, n_groups, heads_per_group),
            HAS_TEXT=text_query is not None, HAS_ROPE=cos is not None, HEAD_SIZE=head_size, **tile,
            num_warps=LAUNCH.num_warps,
        )  # fmt: skip
    return q, k, v, rstd


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
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, (B, S, H D), of the text's, (B, T, H D), in query's dtype, and of the norms.

    grad_q, grad_k, grad_v: (B, T + S, H, D), any strides. query, key: (B, S, H, D), text (B, T, H, D), with any strides
    between tokens: the forward's outputs where `rotated`, else its inputs. The rest as given to and by the forward.
    Without a text stream the gradients of value and text are empty (0,). grad_norms: (2 or 4, D) float32, or empty.
    """
    n_samples, n_image, n_heads, head_size = query.shape
    n_text = 0 if text_query is None else text_query.shape[1]
    has_text = text_query is not None
    n_groups, heads_per_group, tile = _tiles(n_heads, head_size)
    image, text = _parts((query, key), (text_query, text_key))

    def empty(n_tokens: int, exists: bool) -> Tensor:
        shape = (n_samples, n_tokens, n_heads * head_size) if exists else (0,)
        return torch.empty(shape, dtype=query.dtype, device=query.device)

    grads = [empty(n_image, exists) for exists in (True, True, has_text)]
    grads += [empty(n_text, has_text) for _ in range(3)]
    n_text_blocks = cdiv(n_text, tile["BLOCK_S"])
    n_blocks = n_text_blocks + cdiv(n_image, tile["BLOCK_S"])
    shape = (n_samples, n_blocks, n_groups, 2, head_size) if need_norms else (0,)
    partials = torch.empty(shape, dtype=torch.float32, device=query.device)
    outer = [None if grad is None else unit_stride(grad) for grad in (grad_q, grad_k, grad_v)]
    if grad_q.numel() > 0:
        launch(
            _qk_norm_rope_bwd_kernel,
            n_samples * n_blocks * n_groups,
            (*outer, *image, *text, rstd.contiguous(), *_weights(norms), *_angles(cos, sin), *grads, partials),
            (
                *_strides(3, *outer), *_strides(2, *image, *text),
                n_samples, n_text, n_image, n_groups, heads_per_group,
            ),
            HAS_TEXT=has_text, HAS_ROPE=cos is not None, ROTATED=rotated, NEED_NORMS=need_norms, HEAD_SIZE=head_size,
            **tile, num_warps=LAUNCH.num_warps,
        )  # fmt: skip
    if not need_norms:
        return (*grads, partials)
    streams = [partials[:, n_text_blocks:], partials[:, :n_text_blocks]][: 1 + has_text]
    grad_norms = torch.empty((2 * len(streams), head_size), dtype=torch.float32, device=query.device)
    for stream, result in zip(streams, grad_norms.split(2), strict=True):
        column_sums(stream.reshape(1, -1, 2 * head_size), [result])
    return (*grads, grad_norms)
