"""Where a run leaves its traces."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastguard.train.metrics import EpochLog
from fastguard.train.monitor import Verdict
from fastguard.train.state import TrainState


class Recorder(Protocol):
    """Where a run leaves its traces; every method is called by all processes."""

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint, if there is one to continue from."""
        ...

    def stop_requested(self) -> bool:
        """Whether to save and end at the next safe point; the same answer on every process."""
        ...

    def skipped(self, epoch: int, message: str) -> None:
        """Write down an update that was skipped and the transitions to blame, or a group and the reward that failed."""
        ...

    def end_epoch(self, log: EpochLog, images: Tensor, state: TrainState) -> None:
        """Record an epoch (images: uint8 (B, C, H, W), this process's first rollout batch)."""
        ...

    def evaluated(self, verdict: Verdict) -> None:
        """Record an evaluation of the monitor."""
        ...

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, unless this state has one. Raises FloatingPointError if it is not finite."""
        ...

    def way_back(self) -> str:
        """What to do, in words, after updates that were not finite: from which checkpoint to go on."""
        ...
