"""What an objective answers.

Axes: N transitions. An objective is a function of a few numbers per transition: `log_ratio`, `drift` (so that
`drift / 2` is KL(new || old) per element) and `advantages`, each (N,) float32 or float64. What becomes of the latents
is the same for all (docs/math.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastguard.ops.transition import FusedEpilogue, Terms, log1p_of
from fastguard.options import check_at_least_0, check_number, check_positive, is_number

Scope = Literal["transition", "trajectory", "group"]
Process = Literal["reverse", "forward"]
Anchor = Literal["rollout", "average", "reference"]
LogRatio = Literal["normalized", "plain"]
Reuse = Literal["none", "rollouts", "best"]
ClipRange = float | tuple[float, float]

__all__ = [
    "Anchor",
    "ClipRange",
    "ClipRanged",
    "EitherLogRatio",
    "FusedEpilogue",
    "LogRatio",
    "Objective",
    "Process",
    "Reuse",
    "Scope",
    "Terms",
    "beyond_clip",
    "by_sign",
    "check_adv_clip",
    "check_at_least_0",
    "check_number",
    "check_positive",
    "check_window",
    "clip_pair",
    "is_number",
    "penalized",
    "terms_of",
    "without_idle",
]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: frozen dataclasses whose fields are their options."""

    title: ClassVar[str]
    """name in reports and plots"""
    scope: ClassVar[Scope] = "transition"
    """what a loss is of: "transition" is one step alone, "trajectory" all steps of an image, "group" all of a prompt"""
    process: ClassVar[Process] = "reverse"
    """what it trains on: "reverse" is the steps that sampled an image, "forward" the image with fresh noise"""
    anchor: ClassVar[Anchor] = "rollout"
    """the policy that it compares with: of the rollout, an average, which samples then, or the model before training"""
    if TYPE_CHECKING:  # a ClassVar of dataclasses would hide that it is an option of some
        log_ratio: ClassVar[LogRatio]
        """the log-ratio that `terms` receives: "normalized" is RatioNorm's `s cross`, "plain" is `cross - drift / 2`"""
        bandwidth: ClassVar[float]
        """width h of a kernel that smooths both policies, as if the step's variance were `s^2 + h^2`"""
    else:
        bandwidth = 0.0
    moves_drift: ClassVar[bool] = False
    """whether `terms` has a derivative with respect to the drift"""
    limit_name: ClassVar[str | None] = None
    """the option that limits how far a transition may move, if there is one"""
    reuse: ClassVar[Reuse] = "none"
    """what the trainer keeps of earlier rollouts: nothing, whole "rollouts", or the "best" images of each prompt"""

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that changes what is computed is not what its base's fused epilogue computes."""
        super().__init_subclass__(**options)
        if vars(cls).keys() & {"terms", "log_ratio", "moves_drift", "bandwidth"} and "fused" not in vars(cls):
            cls.fused = Objective.fused  # type: ignore[method-assign]
        log_ratio = vars(cls).get("log_ratio")
        if isinstance(log_ratio, str):
            check_log_ratio(log_ratio, f"{cls.__name__}.log_ratio")

    def __post_init__(self) -> None:
        """Check the options. Raises ValueError or TypeError."""

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        """Loss and derivatives of N transitions, before any weight or mean over them.

        With scope "trajectory", of n images with T steps each: log_ratio and drift are (n, T), advantages (n,). The
        results are loss (n,), by_log_ratio, by_drift and clipped (n, T). The derivatives are of the sum of the losses.

        Args:
            log_ratio: (N,), of the kind `self.log_ratio`.
            drift: (N,), `<w, w> / D` of the whitened drift w.
            advantages: (N,).
            n_elements: D, elements of one sample's latents.
        """
        raise NotImplementedError

    def fused(self) -> FusedEpilogue | None:
        """Parameters for the fused kernel, if it knows this objective. With None, `terms` runs between two kernels."""
        return None

    @property
    def limit(self) -> float:
        """The value of the option `limit_name`. Of a pair it is the smaller one. Without it, a usual clip range."""
        if self.limit_name is None:
            return USUAL_CLIP_RANGE
        value: ClipRange = getattr(self, self.limit_name)
        return min(value) if isinstance(value, (tuple, list)) else value

    def moved(self, log_ratio: Tensor, drift: Tensor, *, n_elements: int) -> Tensor:
        """How far each transition has moved from the rollout, (N,), in the unit of `limit`."""
        return log_ratio.abs()

    @property
    def rollouts(self) -> int:
        """How many rollouts the trainer's updates draw from, the fresh one counted."""
        return 1

    def trained_steps(self, steps: int) -> int:
        """How many of the stochastic steps of an image are trained, from the noisiest on."""
        return steps

    def replayed_images(self, group_size: int) -> int:
        """How many images of earlier rollouts may join a group."""
        return 0

    def trajectory_weights(self, log_ratio: Tensor) -> Tensor:
        """Weights (n,) of images of earlier rollouts.

        Args:
            log_ratio: (n, T) of the policy at the start of the updates to the policy that drew each trained step.
        """
        return torch.ones_like(log_ratio[:, 0])


@dataclass(frozen=True)
class ClipRanged(Objective):
    """Base of objectives with a clip range."""

    limit_name: ClassVar[str] = "clip_range"

    clip_range: ClipRange = 2e-6
    """distance of the ratio from 1, or (low, high); depends on the objective and on the number of latent elements"""

    def __post_init__(self) -> None:
        super().__post_init__()
        clip_pair(self.clip_range)
        if isinstance(self.clip_range, list):
            object.__setattr__(self, "clip_range", tuple(self.clip_range))  # for equality and hashes


def check_log_ratio(value: str, name: str = "log_ratio") -> None:
    """Raise ValueError unless it is a kind of log-ratio."""
    if value not in get_args(LogRatio):
        raise ValueError(f"{name} must be one of {', '.join(get_args(LogRatio))}; got {value!r}")


def check_window(window: int) -> None:
    """Raise TypeError or ValueError unless updates can draw from so many rollouts."""
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window must be a whole number of rollouts; got {window!r}")
    if not 1 <= window <= MOST_ROLLOUTS:
        raise ValueError(f"window must lie in [1, {MOST_ROLLOUTS}] rollouts; got {window}")


MOST_ROLLOUTS = 8
"""that an update draws from: older policies are too far away, and each rollout takes memory"""
LARGEST_BANDWIDTH = 1e6
"""Latents are of size 1."""
USUAL_CLIP_RANGE = 1e-5
"""of log-ratios that are means over 65,536 elements"""


@dataclass(frozen=True)
class EitherLogRatio(Objective):
    """Base of objectives that take the one log-ratio or the other."""

    log_ratio: LogRatio = "plain"  # type: ignore[misc]
    """"plain" is `cross - drift / 2`, as published; "normalized" is RatioNorm's `std * cross`"""
    bandwidth: float = 0.0  # type: ignore[misc]
    """h of policy convolution, in units of the latents: the two policies have the variance `std^2 + h^2`; 0 is off"""

    def __post_init__(self) -> None:
        check_log_ratio(self.log_ratio)
        check_at_least_0("bandwidth", self.bandwidth)
        if not self.bandwidth <= LARGEST_BANDWIDTH:
            raise ValueError(f"bandwidth must be at most {LARGEST_BANDWIDTH:g}; got {self.bandwidth}")


def terms_of(
    loss: Tensor, by_log_ratio: Tensor, *, by_drift: Tensor | None = None, clipped: Tensor | None = None
) -> Terms:
    """Terms whose derivative by the drift is 0 and that clip nothing, if not said otherwise."""
    return Terms(
        loss,
        by_log_ratio,
        torch.zeros_like(loss) if by_drift is None else by_drift,
        torch.zeros_like(loss, dtype=torch.bool) if clipped is None else clipped,
    )


def penalized(ratio: Tensor, advantages: Tensor, penalty: Tensor) -> Tensor:
    """`-a r + penalty`, (N,), for a penalty that outgrows the ratio: it alone is left where both overflow."""
    return torch.where(ratio.isinf(), penalty, penalty - advantages * ratio)


def without_idle(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """The log-ratio, 0 where the advantage is 0: no advantage, no loss, even if the ratio overflows. A NaN stays."""
    return torch.where(advantages == 0, 0 * log_ratio, log_ratio)


def beyond_clip(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where PPO's clip takes the gradient, (N,) bool, and the log of the bound on the side of the advantage, (N,)."""
    # In log space: a float32 ratio holds a clip range of 2e-6 to two digits only.
    up, down = advantages > 0, advantages < 0
    above, below = log1p_of(1, high, log_ratio), log1p_of(-1, low, log_ratio)
    beyond = (up & (log_ratio > above)) | (down & (log_ratio < below))
    return beyond, by_sign(advantages, above, below)


def by_sign(advantages: Tensor, positive: float | Tensor, otherwise: float | Tensor) -> Tensor:
    """One number for positive advantages and another for the rest, (N,), in the dtype of the advantages."""
    # torch.where of two numbers has torch's default dtype.
    zero = torch.zeros_like(advantages)
    return torch.where(advantages > 0, zero + positive, zero + otherwise)


def clip_pair(clip_range: ClipRange) -> tuple[float, float]:
    """(low, high) of a clip range. Raises ValueError unless both are positive and finite."""
    pair = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if len(pair) == 2 and all(map(is_number, pair)) and -math.inf < pair[0] < 0 < pair[1] < math.inf:
        raise ValueError(
            f"clip_range holds the distances of the ratio from 1, both positive; got {clip_range!r}; "
            f"pass {(-pair[0], pair[1])}"
        )
    if len(pair) != 2 or not all(is_number(value) and 0 < value < math.inf for value in pair):
        raise ValueError(
            f"clip_range must be a positive, finite number, or a pair (low, high) of such; got {clip_range!r}"
        )
    return float(pair[0]), float(pair[1])


def check_adv_clip(adv_clip: float | None) -> None:
    """Raise TypeError or ValueError unless advantages can be clipped to this, or not at all (None)."""
    if adv_clip is not None and not is_number(adv_clip):
        raise TypeError(f"adv_clip must be a number; got {adv_clip!r}")
    if adv_clip is not None and not adv_clip > 0:
        raise ValueError(f"adv_clip must be positive, or None for no clipping; got {adv_clip}")
