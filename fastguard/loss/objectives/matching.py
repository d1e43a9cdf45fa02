"""What objectives of the forward process answer.

They train on final latents x0 alone. `x_t = x0 + t (n - x0)` is x0 with noise n at flow time t, and `target = n - x0`
is what a velocity there should be. Two velocities are compared by their errors, so the log-ratio is

    log_ratio = (|v_old - target|^2 - |v - target|^2) / D          drift = 2 |v - v_old|^2 / D

which are those of Gaussians N(v, 1/2) and N(v_old, 1/2) at the target: the sums and the gradient are a transition's.

Axes: N noised latents; g groups of n images, noised alike; D elements of one image's latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from fastguard.loss.objectives.base import LogRatio, Objective, Process, Terms


class Noised(NamedTuple):
    """What is known of noised latents beside the log-ratio and the drift; (N,), or (g, n) with scope "group"."""

    sigma: Tensor
    """flow time"""
    square: Tensor | None = None
    """mean over the elements of `(v_old - target)^2`; this and the next two for an `error_spread` alone"""
    towards: Tensor | None = None
    """mean of `|v_old + spread (v - v_old) - target|`"""
    away: Tensor | None = None
    """mean of `|v_old - spread (v - v_old) - target|`"""


@dataclass(frozen=True)
class MatchingObjective(Objective):
    """Base of the objectives of the forward process, for `matching_loss`."""

    process: ClassVar[Process] = "forward"
    log_ratio: ClassVar[LogRatio] = "plain"

    def error_spread(self) -> float | None:
        """The spread of the absolute errors that `terms` asks for, or None. They take no gradient."""
        return None

    def time_factor(self, sigma: Tensor) -> Tensor | None:
        """A factor on the log-ratio and the drift of each flow time, (N,), or None for 1."""
        return None

    def decay_of_average(self, epoch: int) -> float:
        """With anchor "average": its decay after so many epochs, `average = decay average + (1 - decay) weights`."""
        return 0.0

    def terms(
        self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int, noised: Noised | None = None
    ) -> Terms:
        """Loss and derivatives of N noised latents, as `Objective.terms` has them.

        With scope "group", of g groups: log_ratio, drift, advantages and the derivatives are (g, n), loss is (g,).

        Args:
            log_ratio: (N,), see this module.
            drift: (N,), see this module.
            advantages: (N,).
            n_elements: D, elements of one image's latents.
            noised: the flow times, and the errors of `error_spread`; `matching_loss` always gives it.
        """
        raise NotImplementedError
