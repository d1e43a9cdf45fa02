"""LayerNorm and modulation of a token (adaLN), with the gated residual that comes before it in one pass.

Axes: B sample; S token; C channel; P programs (partial sums) per sample.

A row of channels lives in registers, and a program walks over consecutive rows of one sample: the sample's scale,
shift and gate are read once per program, and a program's partial sums are one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.column_sums import column_sums
from fastguard.kernels.common import cdiv, launch, next_power_of_2, unit_stride

# Programs per sample, at most. They depend on the number of rows alone, so a sample's results are bitwise the same in
# every batch and on every device. Without sums: up to four blocks of 8 warps on each of an H100's 132 multiprocessors.
# With sums: one block of 16 warps each, since a program costs one float32 row per sum, written and read again. At Flux
# 1024^2 (4,608 rows, 36 a program) that is 4-7% of the bytes.
PROGRAMS = 512
SUM_PROGRAMS = 128

# Up to two rows are copied to shared memory while a third is worked on: loads stay in flight through the reductions,
# which all warps of a program wait for. 96 KiB is what a program may use on every GPU since the A100.
ROWS_AHEAD = 2
STAGED_BYTES = 98304


@triton.jit
def _adaln_fwd_kernel(
    x_ptr,
    residual_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    normed_ptr,
    summed_ptr,
    stride_x_sample,
    stride_x_row,
    stride_residual_sample,
    stride_residual_row,
    stride_gate,
    stride_scale,
    stride_shift,
    eps,
    n_rows,
    n_channels,
    n_programs,
    rows_per_program,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`normed = (x - mean) rstd (1 + scale) + shift`; with a residual, of `summed = x + gate residual` as stored.

    Reads and writes each row once (bf16: 4 bytes a channel, 8 with a residual) and computes in float32. With HAS_STATS
    mean and rstd are read, else computed in two passes over the registers, and written. x, residual: (B, S, C) with any
    strides between rows. gate, scale, shift: (B, C). mean, rstd: (B, S) float32. normed, summed: (B, S, C), contiguous.
    """
    pid = tl.program_id(0)
    sample = (pid // n_programs).to(tl.int64)
    first = (pid % n_programs).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < n_channels

    scale = 1.0 + tl.load(scale_ptr + sample * stride_scale + lanes, mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * stride_shift + lanes, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        gate = tl.load(gate_ptr + sample * stride_gate + lanes, mask, other=0.0).to(tl.float32)
        residual_ptr += sample * stride_residual_sample
    x_ptr += sample * stride_x_sample
    size = tl.cast(n_channels, tl.float32)
    for row in tl.range(first, last, num_stages=STAGES):
        out = sample * n_rows + row
        x = tl.load(x_ptr + row * stride_x_row + lanes, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * stride_residual_row + lanes, mask, other=0.0).to(tl.float32)
            summed = (x + gate * residual).to(summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + out * n_channels + lanes, summed, mask)
            x = summed.to(tl.float32)
        if HAS_STATS:
            mean = tl.load(mean_ptr + out)
            rstd = tl.load(rstd_ptr + out)
            centered = x - mean
        else:
            # The exact quotient: a product would be contracted into the subtraction, and the mean in use would not be
            # the mean that is kept; the fast quotient would give a row of one value another mean.
            mean = tl.div_rn(tl.sum(x), size)
            centered = tl.where(mask, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centered * centered) / size + eps)
            tl.store(mean_ptr + out, mean)
            tl.store(rstd_ptr + out, rstd)
        normed = centered * rstd * scale + shift
        tl.store(normed_ptr + out * n_channels + lanes, normed.to(normed_ptr.dtype.element_ty), mask)


@triton.jit
def _adaln_bwd_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    grad_summed_ptr,
    residual_ptr,
    gate_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    partials_ptr,
    stride_grad_sample,
    stride_grad_row,
    stride_x_sample,
    stride_x_row,
    stride_scale,
    stride_grad_summed_sample,
    stride_grad_summed_row,
    stride_residual_sample,
    stride_residual_row,
    stride_gate,
    n_rows,
    n_channels,
    n_programs,
    rows_per_program,
    HAS_GRAD_SUMMED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NEED_MODULATION: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`total = grad_summed + rstd (w - mean(w) - x_hat mean(w x_hat))`, with `w = grad (1 + scale)`.

    grad_x is `total`, grad_residual `gate total`; the partial sums over rows are `grad x_hat`, `grad` and
    `total residual`, as far as they are needed: (0 to 3, B, P, C) float32, one row per program. Reads and writes each
    row once (bf16: 6 bytes a channel; a gate, a grad_summed, a residual cost 2 more each), computes in float32.
    Shapes as forward; x is what was normalized; grad_x, grad_residual: (B, S, C), contiguous.
    """
    pid = tl.program_id(0)
    sample = (pid // n_programs).to(tl.int64)
    first = (pid % n_programs).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < n_channels

    scale = 1.0 + tl.load(scale_ptr + sample * stride_scale + lanes, mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + sample * stride_gate + lanes, mask, other=0.0).to(tl.float32)
    grad_ptr += sample * stride_grad_sample
    x_ptr += sample * stride_x_sample
    if HAS_GRAD_SUMMED:
        grad_summed_ptr += sample * stride_grad_summed_sample
    if HAS_RESIDUAL:
        residual_ptr += sample * stride_residual_sample
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    grad_shift = tl.zeros((BLOCK,), tl.float32)
    grad_gate = tl.zeros((BLOCK,), tl.float32)
    inv_size = 1.0 / n_channels
    for row in tl.range(first, last, num_stages=STAGES):
        out = sample * n_rows + row
        grad = tl.load(grad_ptr + row * stride_grad_row + lanes, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x_row + lanes, mask, other=0.0).to(tl.float32)
        if HAS_GRAD_SUMMED:
            grad_summed = tl.load(grad_summed_ptr + row * stride_grad_summed_row + lanes, mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * stride_residual_row + lanes, mask, other=0.0)
        rstd = tl.load(rstd_ptr + out)
        x_hat = (x - tl.load(mean_ptr + out)) * rstd
        w = grad * scale
        # Joined, the two sums share one reduction, and its barriers. Dead lanes add nothing: their grad is 0.
        mean_w, mean_wx = tl.split(tl.sum(tl.join(w, w * x_hat), axis=0) * inv_size)
        total = rstd * (w - mean_w - x_hat * mean_wx)
        if HAS_GRAD_SUMMED:
            total += grad_summed.to(tl.float32)
        tl.store(grad_x_ptr + out * n_channels + lanes, total.to(grad_x_ptr.dtype.element_ty), mask)
        if HAS_GATE:
            grad_residual = (gate * total).to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + out * n_channels + lanes, grad_residual, mask)
        if HAS_RESIDUAL:
            grad_gate += total * residual.to(tl.float32)
        if NEED_MODULATION:
            grad_scale += grad * x_hat
            grad_shift += grad

    one_sum = tl.num_programs(0).to(tl.int64) * n_channels
    offset = pid.to(tl.int64) * n_channels
    if NEED_MODULATION:
        tl.store(partials_ptr + offset + lanes, grad_scale, mask)
        tl.store(partials_ptr + offset + one_sum + lanes, grad_shift, mask)
        offset += 2 * one_sum
    if HAS_RESIDUAL:
        tl.store(partials_ptr + offset + lanes, grad_gate, mask)


def adaln_fwd(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed and summed (B, S, C) in the dtype of x, mean and rstd (B, S) float32, in one launch.

    residual (B, S, C) and gate (B, C) come together; without them summed is empty, (0,).
    """
    summed = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    normed = _launch_fwd(x, residual, gate, scale, shift, mean, rstd, summed, eps, has_stats=False)
    return normed, summed, mean, rstd


def adaln_apply(x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Bitwise the forward's normed, from what was normalized and its statistics."""
    return _launch_fwd(x, None, None, scale, shift, mean.contiguous(), rstd.contiguous(), None, 0.0, has_stats=True)


def _launch_fwd(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    summed: Tensor | None,
    eps: float,
    *,
    has_stats: bool,
) -> Tensor:
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if normed.numel() == 0:
        return normed
    x, stride_x = _strided(x)
    residual, stride_residual = _strided(residual)
    gate, stride_gate = _strided(gate)
    scale, stride_scale = _strided(scale)
    shift, stride_shift = _strided(shift)
    n_samples, n_rows, n_channels = normed.shape
    rows_per_program = cdiv(n_rows, PROGRAMS)
    n_programs = cdiv(n_rows, rows_per_program)
    launch(
        _adaln_fwd_kernel,
        n_samples * n_programs,
        (x, residual, gate, scale, shift, mean, rstd, normed, summed),
        (
            *stride_x, *stride_residual, stride_gate[0], stride_scale[0], stride_shift[0],
            eps, n_rows, n_channels, n_programs, rows_per_program,
        ),
        HAS_RESIDUAL=residual is not None, HAS_STATS=has_stats, **_tile(n_channels, [x, residual]),
    )  # fmt: skip
    return normed


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
    """grad_x, grad_residual (B, S, C) in the dtype of x; grad_scale, grad_shift, grad_gate (B, C) float32.

    x: what was normalized. Without a gate grad_residual is empty, (0,); without need_modulation so are grad_scale and
    grad_shift; without a residual, which is only read for it, so is grad_gate.
    """
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_residual = torch.empty((0,) if gate is None else x.shape, dtype=x.dtype, device=x.device)
    n_samples, n_rows, n_channels = x.shape
    n_sums = 2 * need_modulation + (residual is not None)
    rows_per_program = max(1, cdiv(n_rows, SUM_PROGRAMS if n_sums else PROGRAMS))
    n_programs = cdiv(n_rows, rows_per_program)
    partials = torch.empty((n_sums, n_samples, n_programs, n_channels), dtype=torch.float32, device=x.device)
    if grad_x.numel():
        grad, stride_grad = _strided(grad)
        x, stride_x = _strided(x)
        scale, stride_scale = _strided(scale)
        grad_summed, stride_grad_summed = _strided(grad_summed)
        residual, stride_residual = _strided(residual)
        gate, stride_gate = _strided(gate)
        launch(
            _adaln_bwd_kernel,
            n_samples * n_programs,
            (
                grad, x, mean.contiguous(), rstd.contiguous(), scale, grad_summed, residual, gate,
                grad_x, grad_residual, partials,
            ),
            (
                *stride_grad, *stride_x, stride_scale[0], *stride_grad_summed, *stride_residual, stride_gate[0],
                n_rows, n_channels, n_programs, rows_per_program,
            ),
            HAS_GRAD_SUMMED=grad_summed is not None, HAS_GATE=gate is not None, HAS_RESIDUAL=residual is not None,
            NEED_MODULATION=need_modulation, **_tile(n_channels, [grad, x, grad_summed, residual], n_sums > 0),
        )  # fmt: skip
    # Tensors of their own, since the outputs of an operator must not share memory.
    shape = (n_samples, n_channels)
    sums = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(n_sums)]
    if sums:
        column_sums(partials.flatten(0, 1), sums)
    grad_gate = partials.new_empty(0) if residual is None else sums.pop()
    grad_scale, grad_shift = sums or (partials.new_empty(0) for _ in range(2))
    return grad_x, grad_residual, grad_scale, grad_shift, grad_gate


def _strided(tensor: Tensor | None) -> tuple[Any, tuple[int, ...]]:
    """The tensor with contiguous channels, and the strides of its other axes."""
    if tensor is None:
        return None, (0, 0)
    tensor = unit_stride(tensor)
    return tensor, tensor.stride()[:-1]


def _tile(n_channels: int, streamed: list[Tensor | None], sums: bool = False) -> dict[str, int]:
    """Launch options for rows of this size: 16 elements a thread, 8 beside the registers of sums."""
    # Two elements a thread at least: of one, a sum of squares over lanes would contract each lane's own square, and the
    # lanes would differ in their last bit.
    block = max(next_power_of_2(n_channels), 64)
    row_bytes = block * sum(tensor.element_size() for tensor in streamed if tensor is not None)
    num_warps = min(max(block // (256 if sums else 512), 1), 32)
    return {"BLOCK": block, "STAGES": 1 + min(ROWS_AHEAD, STAGED_BYTES // row_bytes), "num_warps": num_warps}
