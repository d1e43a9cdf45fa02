"""Changes to a recipe that make it fit, each of them really planned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastguard.config import Recipe, recompute_levels
from fastguard.errors import UserError
from fastguard.memory.phases import gib, limit_bytes, planned_phases, resolve_recompute

Change = tuple[str, Any]
"""("section.field", value)"""


def suggest(recipe: Recipe) -> Iterator[str]:
    """Each change alone, and where none is enough, all that help together."""
    limit, current = limit_bytes(recipe), _peak(recipe)
    enough, helpful = [], []
    for path, values in _alternatives(recipe):
        value, peak = _first_that_fits(recipe, path, values, limit)
        if peak <= limit:
            enough.append(f"{_written(path, value)}: peak {gib(peak)}, fits")
        elif current - peak > 0.1 * (current - limit):  # less would only be noise
            helpful.append((path, value, peak))
    yield from enough
    for path, value, peak in helpful:
        yield f"{_written(path, value)}: peak {gib(peak)}, not enough alone"
    if enough:
        return
    together: list[Change] = []
    combined = recipe
    for path, value in [*((p, v) for p, v, _ in helpful), *_last_resorts(recipe)]:
        try:
            candidate = _changed(combined, path, value)
        except UserError:  # does not go together with an earlier change
            continue
        if _peak(candidate) >= _peak(combined):
            continue
        combined = candidate
        together = [w for w in together if w[0] != path] + [(path, value)]
        if _peak(combined) <= limit:
            break
    if len(together) > 1 or (together and _peak(combined) <= limit):
        verdict = "fits" if _peak(combined) <= limit else "still does not fit"
        yield f"{' and '.join(_written(*w) for w in together)}: peak {gib(_peak(combined))}, {verdict}"


def _alternatives(recipe: Recipe) -> Iterator[tuple[str, Sequence[Any]]]:
    """(field, values from the mildest to the strongest), for the phases that are over the limit."""
    limit = limit_bytes(recipe)
    recompute = resolve_recompute(recipe)
    over = {p.name for p in planned_phases(recipe, recompute) if p.peak > limit}
    if "update" in over:
        if not recipe.model.fuse:
            yield "model.fuse", [True]
        levels = recompute_levels(recipe.model.fuse)
        if stronger := levels[levels.index(recompute) + 1 :]:
            yield "model.recompute", stronger
        yield "update.micro_batch", _smaller(recipe.micro_batch, recipe, "update.micro_batch")
    if "rollout" in over:
        if recipe.model.compile == "blocks":
            yield "model.compile", ["none"]
        images = recipe.images_per_process
        yield "sampler.batch_size", _smaller(recipe.sampler.batch_size, recipe, "sampler.batch_size", images)
    if "decode" in over:
        yield "sampler.decode_batch", _smaller(recipe.sampler.decode_batch, recipe, "sampler.decode_batch")
    if over & {"rollout", "decode", "update"}:
        yield "sampler.store", ["cpu"]
        if recipe.objective.rollouts > 1:
            yield "objective.window", list(range(recipe.objective.rollouts - 1, 0, -1))
        yield "update.copies", ["cpu"]
        yield "update.optimizer", ["adamw8bit"]
        yield "update.optimizer", ["adamw_cpu"]
        if recipe.hardware.processes > 1:
            yield "hardware.sharding", ["fsdp2"]
    if "encode" in over:
        yield "prompts.max_tokens", [n for n in (256, 128, 64) if n < recipe.prompts.max_tokens]


def _last_resorts(recipe: Recipe) -> Iterator[Change]:
    """The strongest value of each alternative, whether or not it lowers the peak alone."""
    for path, values in _alternatives(recipe):
        if values:
            yield path, values[-1]


def _smaller(value: int, recipe: Recipe, path: str, dividend: int = 0) -> list[int]:
    """Halvings of a count, each moved down to the next value that divides `dividend` and that the recipe accepts."""
    found: list[int] = []
    target = value // 2
    while target >= 1:
        works = next((v for v in range(target, 0, -1) if dividend % v == 0 and _accepts(recipe, path, v)), None)
        if works is None:
            break
        found.append(works)
        target = works // 2
    return found


def _accepts(recipe: Recipe, path: str, value: Any) -> bool:
    try:
        _changed(recipe, path, value)
    except UserError:
        return False
    return True


def _first_that_fits(recipe: Recipe, path: str, values: Sequence[Any], limit: int) -> tuple[Any, int]:
    """(value, peak): by bisection, since each next value takes less memory; the last value if none fits."""
    usable = [value for value in values if _accepts(recipe, path, value)]
    if not usable:
        return None, _peak(recipe)

    def peak_of(i: int) -> int:
        return _peak(_changed(recipe, path, usable[i]))

    low, high = 0, len(usable) - 1
    if peak_of(high) > limit:
        return usable[high], peak_of(high)
    while low < high:
        middle = (low + high) // 2
        if peak_of(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    return usable[high], peak_of(high)


def _changed(recipe: Recipe, path: str, value: Any) -> Recipe:
    section, name = path.split(".")
    return replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})


def _peak(recipe: Recipe) -> int:
    return max(phase.peak for phase in planned_phases(recipe, resolve_recompute(recipe)))


def _written(path: str, value: Any) -> str:
    """As in a recipe."""
    return f"{path} = {json.dumps(value)}"
