"""Options of classes that a table knows by name: objectives, advantage estimators. The fields are the options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

Options = Mapping[str, tuple[str, ...]]
"""name -> the names of its options"""


def options_of(table: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The options of each dataclass of a table."""
    return {name: tuple(field.name for field in fields(kind)) for name, kind in table.items()}


def check_options(kind: str, known: Options, name: str, given: Iterable[str]) -> None:
    """Raise ValueError unless the table of this kind knows the name, and the name has these options."""
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}; got {name!r}")
    for option in given:
        if option not in known[name]:
            raise ValueError(unknown_option(known, name, option))


def unknown_option(known: Options, name: str, option: str) -> str:
    """What is wrong with an option that `name` does not have, in words."""
    others = [other for other, options in known.items() if option in options]
    elsewhere = f"; it is an option of {', '.join(others)}" if others else ""
    return f"{name} has no option {option!r}{elsewhere}. Known: {', '.join(known[name]) or 'it has none'}"


def is_number(value: object) -> bool:
    """A plain or numpy number; not a bool, which would be taken for 0 or 1, and not a tensor, which may be on a GPU."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless the option called `name` is a number."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the option called `name` is a positive, finite number."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")


def check_at_least_0(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the option called `name` is a number that is not negative."""
    check_number(name, value)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0; got {value}")


def check_share(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the option called `name` lies in [0, 1)."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {value}")
