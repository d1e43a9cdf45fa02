"""Triton's interpreter without a search through all of `triton.language` in each call of each function."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


def list_builtins_once() -> None:
    """At each call the interpreter replaces the builtins of Triton's language, and lists all of its names to find them.

    That was a third of the time of tests of kernels. The names are listed here, before any of them is replaced.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    lists_and_patches = interpreter._patch_builtin
    is_builtin = tl.core.is_builtin
    names = {
        place: [name for name, member in inspect.getmembers(place) if is_builtin(member)]
        for place in (tl, tl.core, tl.math, tl.tensor)
    }

    def patch(place: ModuleType | type, *scope: Any) -> None:
        if place not in names:
            return lists_and_patches(place, *scope)
        for name in names[place]:
            if is_builtin(member := getattr(place, name)):  # it is not while a caller has replaced it
                interpreter._patch_attr(place, name, member, *scope)

    interpreter._patch_builtin = patch
