"""Live bytes of a real program on fake tensors, as PyTorch's CUDA allocator would count them.

Fake tensors lie on the CPU, since a fake CUDA tensor that requires a gradient needs a PyTorch built with CUDA. Where
the CPU's kernels keep or allocate something else than CUDA's, `LiveBytes` and `use_cuda_kernels` stand in for CUDA's.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["weights", "gradients", "optimizer", "activations", "trajectories", "host"]
BLOCK = 512
"""the CUDA caching allocator rounds every allocation up to this many bytes"""


def allocated(n_bytes: int) -> int:
    """Bytes that an allocation of `n_bytes` takes."""
    return -(-n_bytes // BLOCK) * BLOCK


def pinned(n_bytes: int) -> int:
    """Bytes that an allocation in pinned host memory takes: PyTorch hands it out in powers of two."""
    return 2 ** (n_bytes - 1).bit_length() if n_bytes else 0


@dataclass(frozen=True)
class Label:
    """What a storage is."""

    place: str
    """the watched module that was running when it was made; empty outside of all of them"""
    operator: str
    """what made it: as in `NAMES`, or the operator's own name; empty for a tensor made elsewhere"""
    shape: tuple[int, ...]
    """of the tensor that it was made for"""
    dtype: torch.dtype
    n_bytes: int
    """as allocated"""


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive while it is active, by kind, and remembers the largest sum.

    A storage enters with the operator that makes it and leaves when the last tensor on it is gone; it counts as
    activations unless `hold` or `making` says otherwise. Temporaries inside a kernel count as listed in `WORKSPACES`.
    The kind "host" is pinned memory of the host: it has a peak of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[Kind, int] = {}
        self.at_peak: dict[Kind, int] = {}
        self.peak = 0
        self.host_peak = 0
        self._made: Kind = "activations"
        self._kinds: dict[int, Kind] = {}
        self._labels: dict[int, Label] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._place = ""

    def watch(self, module: nn.Module, name: str) -> None:
        """Label what is made while this module runs forward with `name`."""
        module.register_forward_pre_hook(lambda *_: setattr(self, "_place", name))
        module.register_forward_hook(lambda *_: setattr(self, "_place", ""))

    def labels(self, kind: Kind) -> list[Label]:
        """Of the storages of this kind that are alive, in the order in which they were made."""
        return [label for key, label in self._labels.items() if self._kinds[key] == kind]

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """What operators make inside counts as this kind."""
        before, self._made = self._made, kind
        try:
            yield
        finally:
            self._made = before

    def hold(self, tensors: Iterable[Tensor], kind: Kind, operator: str = "") -> None:
        """Count tensors made elsewhere, or move tensors to another kind."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, n_bytes = storage._cdata, storage.nbytes()
            size = pinned(n_bytes) if kind == "host" else allocated(n_bytes)
            if key in self._kinds:
                self._add(self._kinds[key], -size)
            else:
                self._refs[key] = weakref.ref(storage, self._forget(key, size))
                self._labels[key] = Label(self._place, operator, tuple(tensor.shape), tensor.dtype, size)
            self._kinds[key] = kind
            self._add(kind, size)
        self._note()

    def hold_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients count as such as soon as they are accumulated."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.hold([parameter.grad], "gradients")
            parameter.register_post_accumulate_grad_hook(lambda p: self.hold([p.grad], "gradients"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if new := [x for x in _tensors(out) if x.untyped_storage()._cdata not in self._kinds]:
            # A view of a tensor from elsewhere is nothing new.
            given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
            mine = [x for x in new if x.untyped_storage()._cdata not in given]
            self.hold(mine, self._made, NAMES.get(func) or func._schema.name)
        if (workspace := WORKSPACES.get(func)) is not None:
            self._add("activations", extra := allocated(workspace(args, out)))
            self._note()
            self._add("activations", -extra)
        return out

    def _add(self, kind: Kind, size: int) -> None:
        self.live[kind] = self.live.get(kind, 0) + size

    def _note(self) -> None:
        on_device: dict[Kind, int] = {kind: n_bytes for kind, n_bytes in self.live.items() if kind != "host"}
        if (total := sum(on_device.values())) > self.peak:
            self.peak, self.at_peak = total, on_device
        self.host_peak = max(self.host_peak, self.live.get("host", 0))

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self._refs[key], self._labels[key]
            self._add(self._kinds.pop(key), -size)

        return forget


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _n_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _attention_backward(args: Any, _: Any) -> int:
    """FlashAttention-2 adds up the gradient of q (B, H, S, D) in float32, and keeps a float32 number per row."""
    q = args[1]
    rows = math.ceil(q.shape[2] / 128) * 128
    return q.shape[0] * q.shape[1] * rows * (q.shape[3] + 1) * 4


def _convolution(args: Any, out: Any) -> int:
    """cuDNN's tensor-core kernels want channels last: copies of input, weight and output. An assumption."""
    return _n_bytes(args[0], args[1], out)


WORKSPACES: dict[Any, Callable[[Any, Any], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    torch.ops.aten.convolution.default: _convolution,
}


NAMES = {
    torch.ops.aten.mm.default: "linear",
    torch.ops.aten.addmm.default: "linear",
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: "attention",
    torch.ops.aten._to_copy.default: "cast",
    torch.ops.aten.empty_like.default: "rms_norm",  # in `_FusedRmsNorm`
    torch.ops.aten.new_empty.default: "rms_norm",
}
"""Names of operators for people."""


class CudaRMSNorm(nn.RMSNorm):
    """RMSNorm as CUDA runs it, in one kernel; the CPU takes it apart, and keeps float32 copies of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None and self.weight.dtype != x.dtype:  # CUDA takes it apart, too
            return super().forward(x)
        return _FusedRmsNorm.apply(x, self.weight)


def use_cuda_kernels(module: nn.Module) -> None:
    """Give a module's layers the memory that they take on CUDA, in place; their values are lost."""
    for layer in module.modules():
        if type(layer) is nn.RMSNorm:
            layer.__class__ = CudaRMSNorm


class _FusedRmsNorm(torch.autograd.Function):
    """Allocates and keeps what `aten::_fused_rms_norm` does on CUDA: the input and a float32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
