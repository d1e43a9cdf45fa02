"""Changes to a recipe that make it fit: the fastest ones first, each of them really planned."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastguard.config import Recipe, Recompute, recompute_levels
from fastguard.errors import UserError
from fastguard.memory.phases import (
    GIB,
    Phase,
    check_plannable,
    gib,
    leaves_reserve,
    limit_bytes,
    planned_phases,
    resolve_recompute,
)
from fastguard.recipe import overridden

Changes = Mapping[str, Any]
"""section.field -> value"""


@dataclass(frozen=True)
class Lever:
    """A field that takes less memory with other values, which cost time or accuracy."""

    field: str
    """section.field"""
    values: Sequence[Any] | Callable[[Recipe], Sequence[Any]]
    """from the mildest to the strongest; or a function of the recipe that gives those stronger than its own"""
    phases: Sequence[str]
    """whose peaks it lowers"""
    activations: bool = False
    """whether it lowers activations alone, so that it is no help where the rest is over the limit already"""

    def stronger(self, recipe: Recipe) -> Sequence[Any]:
        """The values that take less memory than the recipe's."""
        return self.values(recipe) if callable(self.values) else _after(self.values, _value(recipe, self.field))


def _after(values: Sequence[Any], value: Any) -> Sequence[Any]:
    return values[values.index(value) + 1 :] if value in values else ()


def _levels_to_block(recipe: Recipe) -> Sequence[Recompute]:
    levels = recompute_levels(recipe.model.fuse)
    return _after(levels[: levels.index("block") + 1], recipe.model.recompute)


def _levels_after_block(recipe: Recipe) -> Sequence[Recompute]:
    levels = recompute_levels(recipe.model.fuse)
    return _after(levels[levels.index("block") :], recipe.model.recompute)


def _micro_batches(recipe: Recipe) -> Sequence[int]:
    return _halvings(recipe, "update.micro_batch", recipe.micro_batch)


def _batch_sizes(recipe: Recipe) -> Sequence[int]:
    return _halvings(recipe, "sampler.batch_size", recipe.sampler.batch_size, recipe.images_per_process)


def _decode_batches(recipe: Recipe) -> Sequence[int]:
    return _halvings(recipe, "sampler.decode_batch", min(recipe.sampler.decode_batch, recipe.sampler.batch_size))


def _formats(recipe: Recipe) -> Sequence[str]:
    """float8 takes as much as int8, and is less exact."""
    return _after(("none", "int8", "nf4"), "int8" if recipe.model.quantize == "float8" else recipe.model.quantize)


def _shardings(recipe: Recipe) -> Sequence[str]:
    return _after(("none", "fsdp2"), recipe.hardware.sharding) if recipe.hardware.processes > 1 else ()


RESIDENT = ("rollout", "decode", "update")
"""Phases in which the transformer is on the GPU, with all that belongs to it."""
RECOMPUTE = Lever("model.recompute", _levels_to_block, ("update",), activations=True)
# From what costs next to nothing to what costs most. What helps one phase comes before what changes all of them.
LEVERS = (
    Lever("prompts.encoders", ("device", "int8", "cpu"), ("encode",)),
    Lever("model.fuse", (False, True), ("update",)),
    Lever("sampler.store", ("device", "cpu"), RESIDENT),
    Lever("update.copies", ("device", "cpu"), RESIDENT),
    Lever("sampler.decode_batch", _decode_batches, ("decode",), activations=True),
    Lever("sampler.decode_tiled", (False, True), ("decode",), activations=True),
    Lever("model.compile", ("blocks", "none"), ("rollout",), activations=True),
    Lever("sampler.batch_size", _batch_sizes, ("rollout", "decode"), activations=True),
    RECOMPUTE,
    Lever("model.quantize", _formats, RESIDENT),
    Lever("update.micro_batch", _micro_batches, ("update",), activations=True),
    Lever("model.recompute", _levels_after_block, ("update",), activations=True),
    Lever("update.optimizer", ("adamw", "adamw8bit", "adamw_cpu"), RESIDENT),
    Lever("hardware.sharding", _shardings, RESIDENT),
)


@dataclass(frozen=True)
class Tried:
    """A change that was planned, together with those that were kept before it."""

    field: str
    value: Any
    peaks: Mapping[str, int]
    """bytes, by phase"""
    fits: bool
    kept: bool
    """whether it brings the phases that are too large closer to the limit"""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def change(self) -> str:
        return _written(self.field, self.value)


@dataclass(frozen=True)
class Proposal:
    """The mildest changes that make a recipe fit; if none do, those with the smallest peak."""

    changes: Changes
    recipe: Recipe
    """with the changes"""
    phases: tuple[Phase, ...]
    """as planned with them"""
    recompute: Recompute
    """of it; "auto" is resolved"""
    fits: bool
    tried: tuple[Tried, ...]
    """in order"""

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(phase.peak for phase in self.phases)

    @property
    def toml(self) -> str:
        """The changed fields by section, as in a recipe's file."""
        sections: dict[str, list[str]] = {}
        for field, value in self.changes.items():
            section, name = field.split(".")
            sections.setdefault(section, []).append(_written(name, value))
        return "\n\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items())

    @property
    def options(self) -> str:
        """The changed fields as options of a command."""
        return " ".join(_option(field, value) for field, value in self.changes.items())

    @property
    def summary(self) -> str:
        """One line."""
        if not self.fits:
            return f"nothing that the planner knows makes it fit, the smallest peak is {gib(self.peak)}"
        return f"{self.options} would fit, with a peak of {gib(self.peak)}"

    def table(self) -> str:
        """What was tried as text, with the peaks of all phases in GiB, and the changes."""
        lines: list[str] = []
        if self.tried:
            width = max(len(one.change) for one in self.tried) + 2
            phases = "".join(f"{name:>9}" for name in self.tried[0].peaks)
            lines += ["Changes tried, each with those above that are kept (+), the last of each field; peaks in GiB:"]
            lines += [f"{'':<{width}}{phases}"]
        for one in self.tried:
            peaks = "".join(f"{peak / GIB:>9.2f}" for peak in one.peaks.values())
            lines.append(f"{'+' if one.kept else ' '} {one.change:<{width - 2}}{peaks}{'  fits' if one.fits else ''}")
        fields = ["  " + line if line else "" for line in self.toml.splitlines()]
        options = [f"or with these options: {self.options}"]
        if self.fits:
            lines += ["", f'Fits with {gib(self.peak)}, recompute "{self.recompute}", with these fields of the recipe:']
            return "\n".join([*lines, *fields, *options])
        large = " and ".join(f"{p.name} {gib(p.peak)}" for p in self.phases if p.peak > limit_bytes(self.recipe))
        lines += ["", f"Nothing that the planner knows makes it fit: at the least, {large}."]
        if self.changes:
            lines += ["That takes these fields of the recipe:", *fields, *options]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def propose(recipe: Recipe) -> Proposal:
    """The fastest recipe that fits into hardware.memory_gb, by the order of `LEVERS`.

    Each lever in turn is set to its strongest value and kept while the next ones are tried, until all phases fit. Then
    each is set back to its mildest value with which they still do, the costliest lever first.

    Raises UserError as `plan` does.
    """
    check_plannable(recipe)
    return _Search(recipe).proposal()


@dataclass(frozen=True)
class _Pulled:
    """A lever that is kept."""

    lever: Lever
    values: Sequence[Any]
    """the value before, then the lever's from the mildest to the strongest, which is set"""


class _Search:
    """Levers pulled one after the other; "auto" of model.recompute counts as pulled to the level that it takes."""

    def __init__(self, recipe: Recipe) -> None:
        self._asked, self._recipe, self._limit = recipe, recipe, limit_bytes(recipe)
        self._changes: Changes = {}
        self._pulled: list[_Pulled] = []
        self._tried: list[Tried] = []
        self._auto = recipe.model.recompute == "auto"
        if self._auto:
            levels = recompute_levels(recipe.model.fuse)
            # Levels after "block" have their own place among the levers.
            last = min(levels.index(resolve_recompute(recipe)), levels.index("block"))
            self._recipe = replace(recipe, model=replace(recipe.model, recompute=levels[0]))
            self._changes = {RECOMPUTE.field: levels[last]}
            self._pulled = [_Pulled(RECOMPUTE, levels[: last + 1])]

    def proposal(self) -> Proposal:
        pending = list(LEVERS)
        while (lever := self._next(pending)) is not None:
            pending.remove(lever)
            self._pull(lever)
        if self._fits(self._changes):
            for pulled in sorted(self._pulled, key=lambda one: LEVERS.index(one.lever), reverse=True):
                self._set_back(pulled)
        changes = self._with_auto() if self._auto else self._changes
        recipe = _with(self._asked, changes)
        level = resolve_recompute(recipe)
        phases = planned_phases(recipe, level)
        fits = all(phase.peak <= self._limit for phase in phases)
        return Proposal(changes, recipe, phases, level, fits, tuple(self._tried))

    def _with_auto(self) -> Changes:
        """The changes without a level, unless "auto" would take one that recomputes more than they need."""
        changes = {field: value for field, value in self._changes.items() if field != RECOMPUTE.field}
        recipe, needed = _with(self._asked, changes), _with(self._recipe, self._changes).model.recompute
        taken, levels = resolve_recompute(recipe), recompute_levels(recipe.model.fuse)
        if levels.index(taken) <= max(levels.index(needed), levels.index("block")):
            return changes
        return {**changes, RECOMPUTE.field: needed}

    def _next(self, pending: Sequence[Lever]) -> Lever | None:
        """The first lever that can help a phase which is too large; None if all fit, or if there is none."""
        large = {phase.name: phase for phase in self._phases(self._changes) if phase.peak > self._limit}
        helpful = [lever for lever in pending if large.keys() & set(lever.phases)]
        # Where everything but the activations is too large already, another lever has to come first.
        enough = {name for name, phase in large.items() if phase.peak - phase.activations <= self._limit}
        able = (lever for lever in helpful if not lever.activations or enough & set(lever.phases))
        return next(able, helpful[0] if helpful else None)

    def _pull(self, lever: Lever) -> None:
        """Set a lever to its strongest value, and keep it if that helps."""
        field, current = lever.field, _with(self._recipe, self._changes)
        values = [v for v in lever.stronger(current) if _goes(self._recipe, self._together(field, v))]
        if not values:
            return
        changes = self._together(field, values[-1])
        helps = self._excess(changes) < self._excess(self._changes)
        self._note(field, values[-1], changes, helps)
        if helps:
            self._pulled.append(_Pulled(lever, [_value(current, field), *values]))
            self._changes = changes

    def _together(self, field: str, value: Any) -> Changes:
        """The change, after the kept ones, or those of them that go together with it."""
        together = {**{other: kept for other, kept in self._changes.items() if other != field}, field: value}
        if _goes(self._recipe, together):
            return together
        others: dict[str, Any] = {}
        for other, kept in self._changes.items():
            if _goes(self._recipe, {**others, other: kept, field: value}):
                others[other] = kept
        return {**others, field: value}

    def _set_back(self, pulled: _Pulled) -> None:
        """Set a lever to its mildest value with which everything still fits."""
        field, values = pulled.lever.field, pulled.values
        if self._changes.get(field) != values[-1]:  # another lever does not go with it, or sets the same field further
            return

        def fits(i: int) -> bool:
            changes = {**self._changes, field: values[i]}
            return _goes(self._recipe, changes) and self._fits(changes)

        chosen = 0 if fits(0) else bisect_left(range(len(values) - 1), True, lo=1, key=fits)
        if chosen == len(values) - 1:
            return
        changes = {**self._changes, field: values[chosen]}
        self._note(field, values[chosen], changes, kept=True)
        if values[chosen] == _value(self._recipe, field):
            del changes[field]
        self._changes = changes

    def _note(self, field: str, value: Any, changes: Changes, kept: bool) -> None:
        peaks = {phase.name: phase.peak for phase in self._phases(changes)}
        self._tried.append(Tried(field, value, peaks, max(peaks.values()) <= self._limit, kept))

    def _phases(self, changes: Changes) -> tuple[Phase, ...]:
        recipe = _with(self._recipe, changes)
        return planned_phases(recipe, resolve_recompute(recipe))

    def _fits(self, changes: Changes) -> bool:
        """Whether all phases fit; where "auto" is to take a level before "block", with its reserve."""
        recipe, phases = _with(self._recipe, changes), self._phases(changes)
        if any(phase.peak > self._limit for phase in phases):
            return False
        free = self._auto and len(_levels_to_block(recipe)) > 0
        return not free or leaves_reserve(recipe, phases[-1])

    def _excess(self, changes: Changes) -> int:
        """Bytes over the limit, of all phases."""
        return sum(max(0, phase.peak - self._limit) for phase in self._phases(changes))


def _value(recipe: Recipe, field: str) -> Any:
    section, name = field.split(".")
    return getattr(getattr(recipe, section), name)


def _with(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with the changes. Raises UserError for one that does not go with it, or that nothing reads."""
    sections: dict[str, dict[str, Any]] = {}
    for field, value in changes.items():
        section, name = field.split(".")
        sections.setdefault(section, {})[name] = value
    changed = {section: replace(getattr(recipe, section), **values) for section, values in sections.items()}
    return overridden(recipe, replace(recipe, **changed))


def _goes(recipe: Recipe, changes: Changes) -> bool:
    try:
        _with(recipe, changes)
    except UserError:
        return False
    return True


def _halvings(recipe: Recipe, field: str, value: int, dividend: int = 0) -> list[int]:
    """Halvings of a count, each moved down to the next value that divides `dividend` and goes with the recipe."""
    found: list[int] = []
    target = value // 2
    while target >= 1:
        works = next((v for v in range(target, 0, -1) if dividend % v == 0 and _goes(recipe, {field: v})), None)
        if works is None:
            break
        found.append(works)
        target = works // 2
    return found


def _written(field: str, value: Any) -> str:
    """As in a recipe."""
    return f"{field} = {json.dumps(value)}"


def _option(field: str, value: Any) -> str:
    """As on a command line."""
    section, name = field.replace("_", "-").split(".")
    if isinstance(value, bool):
        return f"--{section}.{'' if value else 'no-'}{name}"
    return f"--{section}.{name} {value}"
