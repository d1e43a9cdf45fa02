"""Triton's launches without a GPU: kernels are compiled for an H100, and a driver that runs nothing gets them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastguard.kernels import common

NO_DEVICE = -1  # Triton keeps compiled kernels by device, and these belong to none


class _Driver:
    """What Triton asks of a driver between a call of a kernel and the launch."""

    def __init__(self, launches: list[Any] | None) -> None:
        self.utils = SimpleNamespace(
            # module (without one Triton would load it again for each launch), function, registers, spills, threads that
            # a program may have
            load_binary=lambda name, binary, shared, device: (name, (name, binary), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 228 * 1024},
        )
        self._launches = launches

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return (lambda *args: None) if self._launches is None else (lambda *args: self._launches.append(args))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stub_driver(launches: list[Any] | None = None) -> Iterator[None]:
    """Inside, backend="triton" takes CPU tensors, and Triton launches on nothing. Not with TRITON_INTERPRET=1.

    launches: gets the arguments of each launch: grid, stream, function, metadata, hooks, then those of the kernel.
    """
    # Not by set_active: its way back asks for a driver that is there.
    with patch.object(driver, "_active", _Driver(launches)), patch.object(common, "interpreted", lambda: True):
        yield
