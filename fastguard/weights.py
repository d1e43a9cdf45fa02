"""Weights as the trainer handles them: whole copies of sharded tensors, and shadows (average, model before training).

A tensor of a policy may be plain, sharded (DTensor, under FSDP2) or packed (torchao's 8-bit optimizer state); only this
file knows the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def trained_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained; names without the wrappers of DDP and checkpointing."""
    return {_plain(name): parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def _plain(name: str) -> str:
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


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
        raise ValueError(f"it holds other weights: {a_few(sorted(targets.keys() ^ values.keys()))}")
    for name, target in targets.items():
        try:
            put(target, values[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def is_finite(tensor: Tensor) -> Tensor:
    """Whether a tensor holds neither NaN nor Inf, as a tensor on its device; one reading, and no copy."""
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def not_finite(module: nn.Module) -> list[str]:
    """Names of the weights and buffers with NaN or Inf in this process's part of them; waits once for the device."""
    return names_not_finite((_plain(n), t) for n, t in (*module.named_parameters(), *module.named_buffers()))


@torch.no_grad()
def names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the (name, tensor) with NaN or Inf in this process's part of them; waits once for each device."""
    devices: dict[torch.device, dict[str, Tensor]] = {}
    parts = ((n, local(part)) for owner, tensor in tensors for n, part in unpacked(owner, tensor))
    for name, part in (found for owner, shard in parts for found in unpacked(owner, shard)):  # packed shards
        # A shard may be empty, and float8 cannot be compared.
        if part.is_floating_point() and part.itemsize > 1 and part.numel():
            devices.setdefault(part.device, {})[name] = is_finite(part)
    names = []
    for finite in devices.values():
        good = torch.stack(list(finite.values())).tolist()
        names += [name for name, is_good in zip(finite, good, strict=True) if not is_good]
    return names


def require_finite(module: nn.Module, part: str, path: str) -> None:
    """Raise ValueError, naming the weights, if a freshly loaded part of the pipeline at `path` holds NaN or Inf."""
    if names := not_finite(module):
        raise ValueError(
            f"model.path = {path!r}: weights of {part} hold NaN or infinity ({a_few(names)}): download them again"
        )


def a_few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
