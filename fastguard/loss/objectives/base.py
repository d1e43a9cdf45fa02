"""What an objective answers.

Axes: N transitions. An objective is a function of a few numbers per transition: `log_ratio`, `drift` (so that
`drift / 2` is KL(new || old) per element) and `advantages`, each (N,) float32 or float64. What becomes of the latents
is the same for all (docs/math.md).
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from fastguard.ops.transition import FusedEpilogue, Terms

Scope = Literal["transition"]
Ratio = Literal["normalized", "gaussian"]
ClipRange = float | tuple[float, float]

__all__ = [
    "ClipRange",
    "FusedEpilogue",
    "Objective",
    "Ratio",
    "Scope",
    "Terms",
    "check_adv_clip",
    "check_at_least_0",
    "clip_pair",
    "is_number",
]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: frozen dataclasses whose fields are their options."""

    title: ClassVar[str]
    """name in reports and plots"""
    scope: ClassVar[Scope] = "transition"
    """what the loss of one sample needs: "transition" is one denoising step alone"""
    ratio: ClassVar[Ratio]
    """the log-ratio that `terms` receives: "normalized" is RatioNorm's `s cross`, "gaussian" is `cross - drift / 2`"""
    moves_drift: ClassVar[bool] = False
    """whether `terms` has a derivative with respect to the drift"""
    limit_name: ClassVar[str]
    """the option that limits how far a transition may move"""

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that changes what is computed is not what its base's fused epilogue computes."""
        super().__init_subclass__(**options)
        if vars(cls).keys() & {"terms", "ratio", "moves_drift"} and "fused" not in vars(cls):
            cls.fused = Objective.fused  # type: ignore[method-assign]
        ratio = vars(cls).get("ratio")
        if isinstance(ratio, str) and ratio not in get_args(Ratio):
            raise TypeError(f"{cls.__name__}.ratio must be one of {', '.join(get_args(Ratio))}; got {ratio!r}")

    def __post_init__(self) -> None:
        """Check the options. Raises ValueError or TypeError."""

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        """Loss and derivatives of N transitions, before any weight or mean over them.

        Args:
            log_ratio: (N,), of the kind `ratio`.
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
        """The value of the option `limit_name`. Of a pair it is the smaller one."""
        value: ClipRange = getattr(self, self.limit_name)
        return min(value) if isinstance(value, (tuple, list)) else value

    def moved(self, log_ratio: Tensor, drift: Tensor) -> Tensor:
        """How far each transition has moved from the rollout, (N,), in the unit of `limit`."""
        return log_ratio.abs()


def is_number(value: object) -> bool:
    """A plain or numpy number; not a bool, which would be taken for 0 or 1, and not a tensor, which may be on a GPU."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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


def check_at_least_0(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the option called `name` is a number that is not negative."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0; got {value}")
