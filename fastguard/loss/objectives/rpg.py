"""RPG: the power mean, over the trajectories of several rollouts (arXiv 2506.06178)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastguard.loss.objectives.base import Reuse, check_window
from fastguard.loss.objectives.power_mean import PowerMean


@dataclass(frozen=True)
class Rpg(PowerMean):
    """`power_mean`, each transition against the policy that drew it, with an equal share for each rollout.

    The trainer keeps `window - 1` earlier rollouts whole, with the advantages of their own groups. A stored velocity
    is that of the policy which drew it, so the log-ratio needs no offset. `guard_loss` has one rollout, where this is
    `power_mean`. The formula of the weight and the equal shares are from memory of the paper.
    """

    title: ClassVar[str] = "RPG"
    reuse: ClassVar[Reuse] = "rollouts"

    window: int = 2
    """rollouts that an update trains on, the fresh one counted, 1 to 8; only the trainer reads it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)

    @property
    def rollouts(self) -> int:
        return self.window
