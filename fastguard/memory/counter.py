"""FLOPs and bytes of a real program on fake tensors, operator by operator.

FLOPs are two for each multiplication of its matmuls, attention and convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of what runs while it is active.

    PyTorch's `FlopCounterMode` also follows the modules by hooks, which the memory of a pass would show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self._formulas.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class MovedBytes(TorchDispatchMode):
    """Adds up what operators read and write; views and empty tensors move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.dequantizing = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace != "prim" and "empty" not in func.name():
            moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
            self.total += moved
            if "dequantize" in func.name():
                self.dequantizing += moved
        return out


def _linear_flops(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    """(m, k) by (k, n), added to the first argument."""
    return 2 * a[0] * a[1] * b[1]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two matmuls, q k^T and p v; the arguments are shapes (B, H, S, D)."""
    batch, heads, rows, channels = query
    return 2 * batch * heads * rows * key[2] * (channels + value[3])


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four matmuls: the gradients of p, v, q and k."""
    return 2 * _attention_flops(query, key, value)


FORMULAS = {
    torch.ops.aten.addmm_: _linear_flops,  # in place: PyTorch's own table lacks it
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
