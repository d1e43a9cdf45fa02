"""Weights as the trainer handles them: whole copies of sharded tensors, and shadows (average, model before training).

A tensor of a policy may be plain, sharded (DTensor, under FSDP2) or packed (torchao's 8-bit optimizer state); only this
file knows the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def trained_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained; names without the wrappers of DDP and checkpointing."""
    return {
        name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }


def whole(tensor: Tensor) -> Tensor:
    """The whole of a plain or sharded tensor. Collective: every process calls it in the same order."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a plain or sharded tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a plain or sharded one. Raises ValueError for another shape."""
    if target.shape != value.shape:
        raise ValueError(f"shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def put_all(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """`put` by name. Raises ValueError, naming the tensors, for other names or shapes."""
    if targets.keys() != values.keys():
        raise ValueError(f"it holds other weights: {sorted(targets.keys() ^ values.keys())[:3]}")
    for name, target in targets.items():
        try:
            put(target, values[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def unpacked(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the plain or sharded tensors that a packed one is made of; itself if it is not packed."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from unpacked(f"{name}.{part}", getattr(tensor, part))


def forget_gathered(policy: nn.Module) -> None:
    """Free the whole weights that FSDP2 keeps after a forward pass: a change of the shards would not reach them."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Shadow:
    """A second copy of the trained weights: an average of them, or what they were before training.

    Args:
        policy: its trained parameters are copied, with their values.
        where: "device" beside the parameter, or "cpu" (whole parameters only).
        dtype: of the copy; None keeps each parameter's.
    """

    def __init__(self, policy: nn.Module, where: Literal["cpu", "device"], dtype: torch.dtype | None = None) -> None:
        self._policy = policy
        self._parameters = trained_parameters(policy)
        self.tensors = {
            name: p.detach().to(device="cpu" if where == "cpu" else p.device, dtype=dtype or p.dtype, copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def move_towards(self, decay: float) -> None:
        """shadow = decay * shadow + (1 - decay) * weights."""
        for name, parameter in self._parameters.items():
            shadow = self.tensors[name]
            shadow.lerp_(parameter.detach().to(shadow.device, shadow.dtype), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the shadow's values; afterwards their own again, to the bit."""
        held = {}
        forget_gathered(self._policy)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                held[name] = parameter.detach().to(self.tensors[name].device, copy=True)
                parameter.copy_(self.tensors[name])
        try:
            yield
        finally:
            forget_gathered(self._policy)
            with torch.no_grad():
                for name, value in held.items():
                    self._parameters[name].copy_(value)
