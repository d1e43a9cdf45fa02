"""A second copy of the trained weights: their average (EMA), or what they were before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from fastguard.utils.sharding import forget_gathered, trained_parameters


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
