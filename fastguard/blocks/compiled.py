"""Transformer blocks under `torch.compile`, one by one: blocks of a kind share their graphs, and weights are inputs.

`torch.compile` makes other graphs for a pass without gradients than for one with them, and inductor rounds
intermediate results where it ends a kernel. The two would not have the same bits, and the first ratio after a rollout
would not be 1. So passes without gradients run the graphs of training, too: the transformer runs with gradients, and
each block cuts its results off its graph. What a block saves for backward is freed as soon as it returns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastguard.errors import UserError

MOST_GRAPHS = 256
"""Of one kind of block. Each size of a batch has its own, with and without adapters, and with one for the first block
of a kind, whose inputs differ. PyTorch's limit is 8: then it would run further sizes uncompiled, with other bits."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's name in the environment of the folder of compiled code"""


def compile_blocks(transformer: Any, blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the blocks of a transformer, in place: classes, parameters and their names stay. Nothing is compiled yet;
    a graph is made when a block is first called with inputs of its shapes.

    Under `torch.inference_mode`, and where nothing is trained, a pass without gradients has graphs of its own.

    Call it before or after `fuse`, and before DDP or FSDP2 wraps the model. Blocks run uncompiled where a dispatch mode
    looks on, such as the planner's fake tensors.

    Calls of a compiled block raise UserError if the block cannot be compiled to one graph, and after `MOST_GRAPHS`.

    Args:
        blocks: of the transformer, of any kinds.
        backend: of `torch.compile`.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    config.optimize_ddp = False  # it cuts a graph where a bucket of DDP ends, and a block is no larger than a bucket
    options: Any = None
    if backend == "inductor" and "deterministic" in torch._inductor.list_options():  # not in torch 2.9
        # Else a clock may choose the order of a sum, and a resumed run would not go on with the same bits.
        options = {"deterministic": True}
    calls = _Calls()
    for block in blocks:
        # Static shapes: a graph depends on nothing but the inputs. A dynamic one would take over sizes that had a graph
        # of their own, in mid-run, and would depend on the size that came first.
        compiled = torch.compile(block._call_impl, fullgraph=True, dynamic=False, backend=backend, options=options)
        block._compiled_call_impl = partial(calls.block, block, compiled)
    transformer._compiled_call_impl = partial(calls.transformer, transformer)


class _Calls:
    """Calls of a transformer and of its blocks."""

    def __init__(self) -> None:
        self._cut = False
        """whether blocks cut their results off their graphs"""

    def transformer(self, transformer: Any, *args: Any, **kwargs: Any) -> Any:
        """A pass without gradients runs as one of training, unless nothing is trained: with adapters switched off."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not _is_trained(transformer):
            return transformer._call_impl(*args, **kwargs)
        self._cut = True
        try:
            with torch.enable_grad():
                outputs = transformer._call_impl(*args, **kwargs)
        finally:
            self._cut = False
        return tree_map_only(Tensor, Tensor.detach, outputs)

    def block(self, block: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        watched = torch._C._len_torch_dispatch_stack() > 0
        try:
            outputs = (block._call_impl if watched else compiled)(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise _cannot_compile(f"a {type(block).__name__}", error) from error
        return tree_map_only(Tensor, _cut_off, outputs) if self._cut else outputs


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _cut_off(tensor: Tensor) -> Tensor:
    """Without its graph, but with a gradient if it had one: the next block is to run the graph that training runs."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _cannot_compile(what: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f'model.compile = "blocks": torch.compile fails for {what} ({type(error).__name__}: {reason}); set '
        'model.compile = "none"'
    )


def start_compiler(cache: Path, device: torch.device) -> Path:
    """Compile a small function, and keep compiled code in the cache's folder `inductor`, or in the one that the
    environment names. Returns that folder.

    Raises UserError if that fails, as without a C++ compiler or, on a GPU, without Triton.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE) in (None, default_cache_dir()):  # imports of inductor set it to that
        os.environ[CACHE] = str(cache / "inductor")
    try:
        torch.compile(_small_function, fullgraph=True, dynamic=False)(torch.zeros(64, device=device))
    except Exception as error:  # of many classes
        what = f"a small function on {device.type}: it needs a C++ compiler, and Triton on a GPU"
        raise _cannot_compile(what, error) from error
    return Path(os.environ[CACHE])


def _small_function(x: Tensor) -> Tensor:
    return torch.sin(x) + x
