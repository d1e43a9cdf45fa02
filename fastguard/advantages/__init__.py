"""The advantage estimators by name: a plain table. A new one is a class beside these, and its import and row here."""

from __future__ import annotations

from typing import Any

from fastguard.advantages.base import Estimator, Groups
from fastguard.advantages.bnpo import Bnpo
from fastguard.advantages.centered import Centered, LeaveOneOut
from fastguard.advantages.rewards import Gdpo, StdScaled
from fastguard.advantages.running import Running
from fastguard.advantages.standardized import Global, Group, Trim
from fastguard.advantages.vgpo import NegativeRewardError, Vgpo
from fastguard.options import check_options, options_of

ESTIMATORS: dict[str, type[Estimator]] = {
    "group": Group,
    "global": Global,
    "none": Centered,
    "loo": LeaveOneOut,
    "trim": Trim,
    "bnpo": Bnpo,
    "gdpo": Gdpo,
    "std_scaled": StdScaled,
    "running": Running,
    "vgpo": Vgpo,
}
DEFAULT_ESTIMATOR = "group"
ESTIMATOR_OPTIONS = options_of(ESTIMATORS)
"""The names of each estimator's own options."""

__all__ = [
    "DEFAULT_ESTIMATOR",
    "ESTIMATORS",
    "ESTIMATOR_OPTIONS",
    "Estimator",
    "Groups",
    "NegativeRewardError",
    "build_estimator",
]


def build_estimator(name: str, **options: Any) -> Estimator:
    """Make an advantage estimator from its name and its own options, which its class documents.

    Args:
        name: a name of `ESTIMATORS`.
        options: the options of that estimator; others have their defaults.

    Raises:
        ValueError: the name, an option or a value is unknown; the message lists the known ones.
        TypeError: an option has another type.
    """
    check_options("estimator", ESTIMATOR_OPTIONS, name, options)
    return ESTIMATORS[name](**options)
