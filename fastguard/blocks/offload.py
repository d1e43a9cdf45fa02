"""Gradient checkpointing whose checkpoints wait in host memory: the level `offload` of recompute.

The inputs of a block are copied to the host while it runs, and leave the device before the next block runs. In
backward they come back while the block after it is recomputed. So copies overlap with compute in both directions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint


class OffloadedCheckpoints:
    """A checkpoint function for `enable_gradient_checkpointing` of diffusers; each model needs its own.

    Activations are offloaded: arguments of a block that need a gradient and are not leaves. What the block before was
    given as well stays on the device (in Flux the small `temb`), and so do the inputs of the last block, because
    backward begins with them.

    Gradients are those of `torch.utils.checkpoint` to the bit. Compile the blocks rather than the whole model: its
    graph breaks here. RuntimeError if an input is changed in place before the next block runs.
    """

    def __init__(self) -> None:
        self._newest: Callable[[], _Inputs | None] = _nothing
        self._given: list[weakref.ref[Tensor]] = []
        """tensors that the last block was given"""

    def __reduce__(self) -> Any:
        """Copies and pickles of a model have no checkpoints of their own yet."""
        return (type(self), ())

    @torch.compiler.disable(recursive=False)  # compiled blocks inside stay compiled
    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        shared = {id(tensor) for given in self._given if (tensor := given()) is not None}
        before = self._newest()
        if before is not None:
            before.release()
        inputs = _Inputs([t for t in tensors if id(t) not in shared and _is_activation(t)], before)
        self._newest, self._given = weakref.ref(inputs), [weakref.ref(tensor) for tensor in tensors]
        # These hooks see the arguments. Those of `checkpoint` lie inside, and see what the block saves.
        with saved_tensors_hooks(inputs.pack, inputs.unpack):
            return checkpoint(block, *args, use_reentrant=False)


def _nothing() -> None:
    """A weak reference to nothing."""


def _is_activation(tensor: Tensor) -> bool:
    return tensor.requires_grad and not tensor.is_leaf and not is_traceable_wrapper_subclass(tensor)


class _View(NamedTuple):
    """Where a tensor lies in its storage."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _view_of(tensor: Tensor) -> _View:
    storage = tensor.untyped_storage()._cdata
    return _View(storage, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


class _Inputs:
    """The offloaded inputs of one call of a block. The graph of gradients alone holds it.

    Storages are copied whole: text and image may share one, and views lie in the copies as they did.
    """

    def __init__(self, activations: Sequence[Tensor], before: _Inputs | None) -> None:
        self._on_device = {_view_of(t): t.detach() for t in activations}
        self._versions = {view: t._version for view, t in self._on_device.items()}
        """of the tensors that were given, as long as they are on the device"""
        self._views = tuple(self._on_device)
        self._device = activations[0].device if activations else None
        self._on_host: dict[tuple[int, torch.dtype], Tensor] = {}
        self._before = _nothing if before is None else weakref.ref(before)
        self._copied: Any = None
        """an event after the last copy"""

    def pack(self, tensor: Tensor) -> Tensor | _View:
        view = _view_of(tensor)
        if view not in self._on_device:
            return tensor
        key = (view.storage, view.dtype)
        if key not in self._on_host:
            count = tensor.untyped_storage().nbytes() // tensor.itemsize
            whole = self._on_device[view].as_strided((count,), (1,), 0)
            self._on_host[key] = _host_memory(whole)
            self._copied = _start_copy(self._on_host[key], whole)
        return view

    def release(self) -> None:
        """Leave the device, after the copy.

        The current stream waits for the copy, so that the memory is free for what follows on it. After `record_stream`
        it would be free only when the copy has ended, while the host is already some blocks ahead.
        """
        self._wait()
        self._on_device.clear()

    def prefetch(self) -> None:
        if not self._on_device:
            self._fetch()

    def unpack(self, packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self._on_device:
            self._fetch()
        self._wait()
        if (before := self._before()) is not None:
            before.prefetch()
        return self._on_device.pop(packed)  # fetched again if the graph is retained

    def _fetch(self) -> None:
        """Begin to copy all of it back."""
        whole = {key: torch.empty_like(host, device=self._device) for key, host in self._on_host.items()}
        for key, host in self._on_host.items():
            self._copied = _start_copy(whole[key], host)
        for view in self._views:
            flat = whole[view.storage, view.dtype]
            self._on_device[view] = flat.as_strided(view.size, view.stride, view.offset)

    def _wait(self) -> None:
        """Let the current stream wait for the last copy. Raises RuntimeError for what was changed meanwhile."""
        if self._copied is not None:
            self._copied.wait()
        versions, self._versions = self._versions, {}
        if any(self._on_device[view]._version != version for view, version in versions.items()):
            raise RuntimeError(
                "an input of a checkpointed block has been modified by an inplace operation while it was copied to the "
                "host for the backward pass"
            )

    def __del__(self) -> None:
        # The graph was thrown away amid a copy.
        for tensor in self._on_device.values():
            if tensor.is_cuda:
                tensor.record_stream(_copy_stream(tensor.device))


# --- copies ---------------------------------------------------------------------------------------------------------

_around_host_memory: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("around", default=nullcontext)


@contextmanager
def host_memory_inside(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Allocate every host copy inside of `context()`, by which a memory planner tells it from what the device holds."""
    token = _around_host_memory.set(context)
    try:
        yield
    finally:
        _around_host_memory.reset(token)


def _host_memory(like: Tensor) -> Tensor:
    """Pinned where there is a GPU to copy from. PyTorch's allocator of pinned memory reuses it in the next pass."""
    with _around_host_memory.get()():
        return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)


def _start_copy(target: Tensor, source: Tensor) -> torch.cuda.Event | None:
    """Copy between host and GPU on a stream beside the current one, from where that is now; elsewhere at once."""
    if not (target.is_cuda or source.is_cuda):
        target.copy_(source)
        return None
    device = target.device if target.is_cuda else source.device
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return stream.record_event()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for both directions: a forward pass copies out, and a backward pass in."""
    return torch.cuda.Stream(device)
