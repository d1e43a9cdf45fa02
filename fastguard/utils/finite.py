"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastguard.errors import UserError
from fastguard.utils.sharding import local_shard, parameter_name, unpacked
from fastguard.utils.terminal import a_few


def is_finite(tensor: Tensor) -> Tensor:
    """Whether a tensor holds neither NaN nor Inf, as a tensor on its device; one reading, and no copy."""
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def not_finite(module: nn.Module) -> list[str]:
    """Names of the weights and buffers with NaN or Inf in this process's part of them; waits once for the device."""
    return names_not_finite((parameter_name(n), t) for n, t in (*module.named_parameters(), *module.named_buffers()))


@torch.no_grad()
def names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the (name, tensor) with NaN or Inf in this process's part of them; waits once for each device."""
    devices: dict[torch.device, dict[str, Tensor]] = {}
    parts = ((n, local_shard(part)) for owner, tensor in tensors for n, part in unpacked(owner, tensor))
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
    """Raise UserError, naming the weights, if a freshly loaded part of the pipeline at `path` holds NaN or Inf."""
    if names := not_finite(module):
        raise UserError(
            f"model.path = {path!r}: weights of {part} hold NaN or infinity ({a_few(names)}): download them again"
        )
