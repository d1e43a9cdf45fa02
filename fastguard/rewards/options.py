"""Options of the built-in rewards: a recipe's values against the annotations of a constructor."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from fastguard.errors import UserError

Self = TypeVar("Self")
Options = ParamSpec("Options")


def checked(init: Callable[Concatenate[Self, Options], None]) -> Callable[Concatenate[Self, Options], None]:
    """Let an `__init__` refuse options that are not of its annotations' types, or not within their bounds.

    The UserError names the option as a recipe does.
    """
    validated = validate_call(config=ConfigDict(strict=True, allow_inf_nan=False))(init)

    @wraps(init)
    def checked_init(self: Self, *args: Options.args, **options: Options.kwargs) -> None:
        try:
            validated(self, *args, **options)
        except ValidationError as error:
            first = error.errors()[0]
            message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {_short(first['input'])}"
            raise UserError(f"rewards.options.{first['loc'][-1]}: {message}") from None

    return checked_init


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
