"""Settings of the whole process that a reward may change, and that the run reads.

Rewards are code of others: importing one may turn on cuDNN's autotuner, and building one may change torch's default
dtype. The trainer puts these settings back after it has built a reward and after it has collected scores. Between the
two, rewards run beside the rollout and share the settings with it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fastguard.utils.signals import ENDING


def keep_settings() -> Callable[[], None]:
    """Read the settings of this process and thread; returns a function that puts back those that have changed."""
    held = [(get, put, get()) for get, put in SETTINGS]

    def put_back() -> None:
        for get, put, value in held:
            if get() != value:
                put(value)

    return put_back


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return None


def _enter(folder: str | None) -> None:
    if folder is not None and os.path.isdir(folder):
        os.chdir(folder)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _handle(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: not one of Python's
            signal.signal(number, handler)


def _matmul_precision() -> str:
    """What torch.set_float32_matmul_precision leaves alone: torch has two switches for one thing."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (_folder, _enter),
    (torch.get_default_dtype, torch.set_default_dtype),
    # The device "cpu" is also what is said where none was set, and setting it would slow down every call.
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    *(
        (partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind))
        for kind in ("cpu", "cuda")
    ),
    (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_matmul_precision, lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value)),
    *(_attribute(torch.backends.cudnn, name) for name in ("benchmark", "deterministic")),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (lambda: {number: signal.getsignal(number) for number in ENDING}, _handle),
    (np.geterr, lambda value: np.seterr(**value)),
]
"""(get, put) of each; what belongs to a thread (grad mode, device, signals, numpy's errors) matters while a reward is
built."""
