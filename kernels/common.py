"""What kernels share: launch tables, how tensors are seen as rows, and how tokens are shared out among programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Launch:
    """Elements per program and iteration, and warps per program."""

    block: int
    num_warps: int


# 8 warps x 32 threads x 16 elements: each thread has two 16-byte accesses of bf16, or four of float32, in flight
# for every tensor that is read. Not autotuned: one table, changed only with a measurement beside it.
LAUNCH = Launch(block=4096, num_warps=8)

# Upper bound on the partial sums of one sample, and so on the programs that share its elements: enough to fill a
# GPU with a single large sample, few enough for one program to add up. It depends on the size of a sample
# alone, so a sample's sums are bitwise the same in every batch (of the same strides and alignment).
MAX_PARTIALS = 1024


# A warp reads 256 bf16 channels of a token in one 512-byte access, and the channels of a tile stay in one warp's
# column: sums over tokens first add up within a thread, and meet across warps once, at the end of the loop.
BLOCK_C = 256
BLOCK_S = LAUNCH.block // BLOCK_C

# Tokens per program. 32 keep the partial sums (8 bytes a channel, written and read) within 5% of the 6 bytes that
# each token moves, and give the 512 tokens of a text stream 192 programs; long image streams have enough for 64.
TOKENS_PER_PROGRAM = (32, 64)
LONG_STREAM = 2048


def interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors (TRITON_INTERPRET=1 before the first import of triton)."""
    return isinstance(_probe, InterpretedFunction)


@triton.jit
def _probe():
    pass


def launch(kernel: Any, n_programs: int, tensors: Sequence[Any], numbers: Sequence[float], **flags: Any) -> None:
    """`kernel[(n_programs,)](*tensors, *numbers, **flags)`, for less of the host's time.

    The first tensor has to be there; others may be None.

    Before each launch Triton works out which compiled kernel fits the arguments, which takes longer than the kernel of
    a small loss. Its choice depends on no more than the dtypes of the tensors, whether they start at multiples of 16
    bytes, the numbers, the flags, and Triton's own settings. So a launch reuses the compiled kernel of an earlier one
    in which these were the same. Settings that are changed in between (knobs for debugging and instrumentation) are not
    seen.
    """
    if not REMEMBERS_LAUNCHES or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        kernel[(n_programs,)](*tensors, *numbers, **flags)
        return
    dtypes: list[torch.dtype | None] = []
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            dtypes.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    key = (id(kernel), tensors[0].device, *dtypes, *numbers, *map(type, numbers), *flags.items())
    aligned = addresses % 16 == 0
    known = _LAUNCHES.get(key) if aligned else None
    if known is not None:
        _, compiled, constants = known
        compiled[n_programs, 1, 1](*tensors, *numbers, *constants)
        return
    compiled = kernel[(n_programs,)](*tensors, *numbers, **flags)
    if aligned and compiled is not None:  # a hook of Triton's may have refused it
        if len(_LAUNCHES) >= MAX_LAUNCHES:  # shapes that change from call to call
            _LAUNCHES.clear()
        constants = tuple([flags[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]])
        _LAUNCHES[key] = kernel, compiled, constants  # the kernel, so that its id stays its own


# Before 3.3, a compiled kernel takes other arguments. On AMD, Triton's choice depends on more.
REMEMBERS_LAUNCHES = torch.version.hip is None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
MAX_LAUNCHES = 4096
_LAUNCHES: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}


def cdiv(n: int, size: int) -> int:
    """Blocks of this size that hold n. Triton's own takes the host 4 us."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Where a kernel finds B samples (B, ...) of contiguous elements: a tensor that starts with them, and the stride
    from one to the next.

    Any stride between samples is taken as it is; a tensor that is strided within a sample is copied once.
    """
    if tensor.is_contiguous():  # no view of it: that would cost the host a microsecond
        return tensor, tensor.numel() // tensor.shape[0]
    rows = tensor.reshape(tensor.shape[0], -1)
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def entry_stride(column: Tensor | None) -> int:
    """Stride of a number per sample, (B,) or one for all, (1,)."""
    return 0 if column is None or column.numel() == 1 else column.stride(0)


def tokens_per_program(n_tokens: int) -> int:
    """How many tokens of a stream one program takes: it depends on the stream's length alone."""
    return TOKENS_PER_PROGRAM[n_tokens >= LONG_STREAM]


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with neighbours of the last axis side by side in memory: itself, or a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@triton.jit
def logistic(z, power):
    """`s = sigmoid(u)` and `s (1 - s)`, for a u of z's sign and `power = exp(-|u|)`.

    That power cannot overflow, and s (1 - s) made of it does not cancel.
    """
    inverse = 1.0 / (1.0 + power)
    small = power * inverse
    return tl.where(z >= 0, inverse, small), inverse * small


@triton.jit
def tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program):
    """A program's sample, chunk of tokens, its first and last (excluded) token, and its tile of channels.

    Programs that run side by side take the channels of the same tokens, so that whole rows are read together.
    """
    pid = tl.program_id(0)
    chunk = (pid // n_tiles) % n_chunks
    start = chunk * tokens_per_program
    sample = (pid // n_tiles // n_chunks).to(tl.int64)
    return sample, chunk, start, min(start + tokens_per_program, n_tokens), pid % n_tiles
