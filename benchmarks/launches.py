"""Kernels as the product launches them, seen without running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import candidates
from operator_calls import Call, n_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard.kernels import (
    adaln,
    column_sums,
    common,
    dequantize,
    gated_residual,
    gelu,
    qk_norm_rope,
    sde_step,
    swiglu,
    transition,
)

BLOCK_MODULES = (adaln, dequantize, gated_residual, gelu, qk_norm_rope, swiglu)
KERNEL_MODULES = (transition, sde_step, column_sums, *BLOCK_MODULES)


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel, and all of its arguments by name."""

    kernel: Any
    args: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class _Recorder:
    kernel: Any
    launches: list[Launched]

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, num_warps: int, launch_pdl: bool = False, **flags: Any) -> None:
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | flags
        self.launches.append(Launched(self.kernel, named, num_warps))


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Inside, launches are listed, and not run: outputs hold whatever the memory held. Tensors may be on the CPU."""
    launches: list[Launched] = []
    with ExitStack() as replaced:
        for module in (*KERNEL_MODULES, candidates):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    replaced.enter_context(patch.object(module, name, _Recorder(kernel, launches)))
        replaced.enter_context(patch.object(common, "interpreted", lambda: True))
        yield launches


@contextmanager
def without_launches() -> Iterator[None]:
    """Inside, launches do nothing and cost nothing. Tensors may be on the CPU."""
    with ExitStack() as replaced:
        for module in KERNEL_MODULES:
            replaced.enter_context(patch.object(module, "launch", lambda *args, **flags: None))
        replaced.enter_context(patch.object(common, "interpreted", lambda: True))
        yield


class _TorchBytes(TorchDispatchMode):
    """Bytes that torch's own operators around a launch read and write; views and empty tensors move none."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.n_bytes += n_bytes((args, kwargs, out))
        return out


def moved_bytes(call: Call) -> int:
    """Bytes that a call of a block's operator moves.

    Each tensor given to a kernel counts once: h100_code.py shows in the machine code that no access is repeated. What
    torch adds (partial sums) counts with its inputs and results.
    """
    name = call.op.name().removeprefix("fastguard::")
    (launcher,) = (vars(module)[name] for module in BLOCK_MODULES if name in vars(module))
    with recorded() as launches, _TorchBytes() as around:  # not through the operator: that would hide what is inside
        launcher(*call.args[:-1])
    overwritten = call.args[0].nbytes if call.overwrites else 0  # read, and written
    return n_bytes([launch.args for launch in launches]) + around.n_bytes + overwritten - call.unread_bytes
