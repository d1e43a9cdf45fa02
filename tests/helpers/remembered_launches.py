"""Launch every operator three times on no GPU: by Triton alone, for the first time, and from what was remembered.

Prints how many launches were alike. In a process of its own, since kernels must not be interpreted in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from operator_calls import BF16, FP32, ODD, Call, timed_block_calls, timed_loss_calls
from stub_driver import stub_driver
from torch import Tensor
from torch.utils._pytree import tree_map
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.runtime import JITFunction

from fastguard.kernels import common, transition


def main() -> None:
    launches: list[Any] = []
    by_triton: list[Any] = []
    run = JITFunction.run

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        by_triton.append(kernel)
        return run(kernel, *args, **options)

    def seen(call: Call) -> list[Any]:
        launches.clear()
        by_triton.clear()
        call()
        return [tuple(map(described, launch)) for launch in launches]

    n_alike = 0
    with stub_driver(launches), patch.object(JITFunction, "run", counted):
        for call in calls():
            with patch.object(common, "REMEMBERS_LAUNCHES", False):
                expected = seen(call)
            assert len(by_triton) == len(expected) > 0, call.name
            for _ in range(2):
                assert seen(call) == expected, call.name
            assert not by_triton or not aligned(call), f"{call.name}: Triton was asked again"
            n_alike += len(expected)
        hooks_of_triton(timed_loss_calls((2, 40, 16), FP32, "cpu")["guard_loss"], launches)
    print(n_alike)


def hooks_of_triton(call: Call, launches: list[Any]) -> None:
    """They see and refuse each launch that they asked for."""
    common._LAUNCHES.clear()
    launches.clear()
    with patch.object(knobs.runtime, "jit_cache_hook", lambda **_: True):
        for kernel in (transition._transition_sums_kernel, transition._guard_epilogue_kernel):
            kernel.device_caches.clear()
        call()
    assert not launches
    call()
    before = len(launches)
    assert before > 0
    calls_of_hook: list[Any] = []
    kernel = transition._transition_sums_kernel
    kernel.add_pre_run_hook(lambda *args, **options: calls_of_hook.append(args))
    call()
    call()
    assert len(calls_of_hook) == 2


def calls() -> Iterator[Call]:
    """Each of them twice from the same place in memory, then from one that is not aligned, then of another size."""
    for dtype in (BF16, FP32):
        loss = timed_loss_calls((2, 40, 16), dtype, "cpu")
        for call in [*loss.values(), *timed_block_calls(ODD, dtype, "cpu").values()]:
            yield call
            yield replace(call, args=tree_map(moved, call.args))
        yield from timed_loss_calls((1, 40, 16), dtype, "cpu").values()
        yield from timed_loss_calls((3, 41, 9), dtype, "cpu").values()


def moved(leaf: Any) -> Any:
    """A tensor at an address that is no multiple of 16."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty(leaf.numel() + 1, dtype=leaf.dtype)[1:].view(leaf.shape).copy_(leaf)


def aligned(call: Call) -> bool:
    return all(leaf.data_ptr() % 16 == 0 for leaf in call.args if isinstance(leaf, Tensor))


def described(argument: Any) -> Any:
    """What has to be the same of an argument of a launch. The contents of a result are whatever the memory held."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16 == 0
    return type(argument), None if isinstance(argument, LazyDict) else argument  # which is of this launch, for hooks


if __name__ == "__main__":
    main()
