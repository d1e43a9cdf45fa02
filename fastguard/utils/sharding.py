"""Tensors of a policy, which may be plain, sharded (DTensor, under FSDP2) or packed (torchao's 8-bit optimizer state).

Only this file knows the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastguard.errors import UserError
from fastguard.utils.terminal import a_few


def trained_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that is trained; names without the wrappers of DDP and checkpointing."""
    return {parameter_name(name): parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def parameter_name(name: str) -> str:
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a plain or sharded tensor. Collective: every process calls it in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    whole = tensor.full_tensor().detach()
    # Of an uneven axis it is a part of what was gathered, and safetensors refuses a part.
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a plain or sharded tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a plain or sharded one. Raises UserError for another shape."""
    if target.shape != value.shape:
        raise UserError(f"shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def copy_all_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """`copy_into` by name. Raises UserError, naming the tensors, for other names or shapes."""
    if targets.keys() != values.keys():
        raise UserError(f"it holds other weights: {a_few(sorted(targets.keys() ^ values.keys()))}")
    for name, target in targets.items():
        try:
            copy_into(target, values[name])
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


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
