"""OP-GRPO: Flow-GRPO with the best images of earlier rollouts (arXiv 2604.04142)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import Reuse, check_number, check_positive, check_window
from fastguard.loss.objectives.flow_grpo import FlowGrpo


@dataclass(frozen=True)
class OpGrpo(FlowGrpo):
    """`W max(-a r, -a clip)` on `l = cross - drift / 2 - offset`, for the first steps of an image.

    Published are its three parts: a buffer of the best trajectories, one importance weight for a whole trajectory that
    leaves the clip as it is, and late steps left out. The equations here are reconstructed. `offset` is the log-ratio
    of the policy at the start of the updates to the policy that drew the transition, so that the clip is around the
    former. `W = min(exp(mean of the offsets), cap)` of an image. Fresh images have the offset 0 and the weight 1.

    The trainer keeps the best images of each prompt. They join the statistics of the next group of their prompt.
    `guard_loss` has fresh images alone, where this is `flow_grpo`.
    """

    title: ClassVar[str] = "OP-GRPO"
    reuse: ClassVar[Reuse] = "best"

    window: int = 4
    """rollouts whose best images are trained on, the fresh one counted, 1 to 8; only the trainer reads it"""
    replayed: float = 0.25
    """earlier images that join a group, as a share of its size, at least one; only the trainer reads it"""
    keep: float = 0.7
    """share of the trained steps that is left, from the noisiest on, at least one; only the trainer reads it"""
    cap: float = 2.0
    """largest weight of an earlier image; only the trainer reads it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        for name in ("replayed", "keep"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1]; got {value}")
        check_positive("cap", self.cap)

    @property
    def rollouts(self) -> int:
        return self.window

    def trained_steps(self, steps: int) -> int:
        return max(1, round(self.keep * steps))

    def replayed_images(self, group_size: int) -> int:
        return max(1, round(self.replayed * group_size))

    def trajectory_weights(self, log_ratio: Tensor) -> Tensor:
        return torch.exp(log_ratio.mean(1)).clamp(max=self.cap)
