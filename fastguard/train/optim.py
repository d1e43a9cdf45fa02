"""Optimizers: AdamW with float32 weights and state on the GPU, in 8 bits, or in host memory.

Weights in bfloat16 cannot take small steps (a relative change below 2^-9 rounds to none), so AdamW keeps float32
masters of them; the 8-bit variant rounds stochastically instead, which needs no masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastguard.config import UpdateConfig
from fastguard.errors import UserError
from fastguard.extras import importing
from fastguard.utils.sharding import copy_into, unpacked


class Optimizer(Protocol):
    """What the trainer asks of an optimizer."""

    def step(self) -> Any: ...
    def zero_grad(self) -> None: ...
    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Its tensors for one parameter, live: writing to them changes the optimizer."""
        ...


class AdamW:
    """torch's AdamW. A parameter in low precision, or one whose state waits on the host, gets a float32 master.

    Each parameter has an optimizer of its own, so that with masters only one parameter's float32 gradient exists at a
    time.

    Args:
        where: "cpu" keeps masters and state in host memory; None beside each parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], config: UpdateConfig, where: str | None = None) -> None:
        self._optimizers: dict[nn.Parameter, torch.optim.AdamW] = {}
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in parameters:
            trained = parameter
            if parameter.dtype != torch.float32 or (where is not None and parameter.device.type != where):
                master = parameter.detach().to(where or parameter.device, torch.float32, copy=True)
                trained = self._masters[parameter] = nn.Parameter(master)
            self._optimizers[parameter] = torch.optim.AdamW([trained], **_settings(config))

    @torch.no_grad()
    def step(self) -> None:
        for parameter, optimizer in self._optimizers.items():
            master = self._masters.get(parameter)
            if master is None:
                optimizer.step()
            elif parameter.grad is not None:
                master.grad = parameter.grad.to(master.device, torch.float32)
                optimizer.step()
                master.grad = None
                parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in self._optimizers:
            parameter.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        master = self._masters.get(parameter)
        optimizer = self._optimizers[parameter]
        state = optimizer.state[parameter if master is None else master]
        return {**state, "master": master} if state and master is not None else dict(state)


class AdamW8bit:
    """torchao's AdamW with 8-bit state and stochastic rounding of low-precision weights."""

    def __init__(self, parameters: list[nn.Parameter], config: UpdateConfig) -> None:
        with importing("torchao", 'update.optimizer = "adamw8bit"', '"adamw" or "adamw_cpu"'):
            from torchao.optim import AdamW8bit as TorchaoAdamW8bit
        self._optimizer = TorchaoAdamW8bit(parameters, bf16_stochastic_round=True, **_settings(config))

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return dict(self._optimizer.state[parameter])


def _settings(config: UpdateConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def build_optimizer(parameters: list[nn.Parameter], config: UpdateConfig) -> Optimizer:
    """The optimizer that `config.optimizer` names, for parameters in their final place (after DDP or FSDP2)."""
    if config.optimizer == "adamw8bit":
        return AdamW8bit(parameters, config)
    return AdamW(parameters, config, "cpu" if config.optimizer == "adamw_cpu" else None)


def state_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """(`parameter.key`, live tensor) of the whole state, in a fixed order; none before the first step."""
    for name, parameter in parameters.items():
        for key, tensor in sorted(optimizer.state_of(parameter).items()):
            yield from unpacked(f"{name}.{key}", tensor)


def load_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Restore what `state_tensors` gave. The weights may change: load them afterwards.

    Raises UserError, naming the tensor, if it does not fit.
    """
    if not saved:  # saved before the first update
        return
    # One step on zero gradients creates the state tensors.
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    live = dict(state_tensors(optimizer, parameters))
    if live.keys() != saved.keys():
        differing = sorted(live.keys() ^ saved.keys())
        raise UserError(f"its optimizer state is of another kind (update.optimizer?): {differing[:3]}")
    for name, tensor in live.items():
        copy_into(tensor, saved[name])
