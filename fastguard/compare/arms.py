"""Arms: recipes that differ from one recipe in a few fields, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.loss.objectives import OBJECTIVES
from fastguard.recipe import load_toml, with_values

SHARED = ("run", "model", "rewards", "monitor", "hardware")
"""Sections that are the same for all arms: with other weights, rewards or evaluations, their numbers do not compare."""
EVALUATED_BY = (
    ("sampler", "shift"), ("sampler", "decode_tiled"), ("prompts", "file"), ("prompts", "max_tokens"),
    ("prompts", "encoders"),
)  # fmt: skip
"""Further fields on which an evaluation depends."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""of an arm, which is that of a folder, too"""


@dataclass(frozen=True)
class Arm:
    """One of the recipes that are compared."""

    name: str
    recipe: Recipe

    def run(self, out: Path, index: int) -> Recipe:
        """The recipe of its run number `index`, in a folder of its own; the seeds are the same for all arms."""
        seed = self.recipe.run.seed + index
        return replace(self.recipe, run=replace(self.recipe.run, dir=out / self.name / f"seed_{seed}", seed=seed))


def build_arms(recipe: Recipe, names: Sequence[str], file: Path | None) -> list[Arm]:
    """The arms of these names, or without names all arms of the file.

    A name is that of a table of the file, whose entries are fields of the recipe, or an objective's, with its options
    as in the recipe or their defaults. Raises UserError, with the name of the arm, for anything that does not do.
    """
    tables = {} if file is None else _read(file)
    names = list(names) or list(tables)
    if not names:
        raise UserError(f"name the arms to compare: --objectives A B ..., of {', '.join(OBJECTIVES)}, or --arms FILE")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--objectives names {', '.join(twice)} twice")
    for name in names:
        if name not in tables and name not in OBJECTIVES:
            known = f"a table of {file} ({', '.join(tables)})" if tables else "an arm of a file (--arms)"
            raise UserError(f"there is no arm {name}: expected {known}, or one of {', '.join(OBJECTIVES)}")
    folder = Path() if file is None else file.parent
    return [Arm(name, _changed(recipe, name, tables.get(name, {}), folder)) for name in names]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    tables = load_toml(file)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{file}: {name} = {table!r:.80}: expected a table for each arm, such as [{name}]")
        if not _NAME.fullmatch(name):
            raise UserError(f"{file}: [{name!r:.80}]: the name of an arm has letters, digits, _ and - only")
    return tables


def _changed(recipe: Recipe, name: str, table: dict[str, Any], folder: Path) -> Recipe:
    shared = [section for section in SHARED if section in table]
    if shared:
        raise UserError(
            f"arm {name}: [{shared[0]}] is the same for all arms: change it for all, in the recipe or by "
            f"--{shared[0]}.FIELD VALUE"
        )
    objective = table.get("objective", {})
    if isinstance(objective, dict):
        table = {**table, "objective": {"name": name, **objective}}
    changed = with_values(recipe, table, folder, f"arm {name}")
    for section, field in EVALUATED_BY:
        if (section, field) == ("prompts", "file") and recipe.monitor.file is not None:
            continue
        if getattr(getattr(changed, section), field) != getattr(getattr(recipe, section), field):
            raise UserError(
                f"arm {name}: evaluations depend on {section}.{field}, so it is the same for all arms: change it for "
                f"all, in the recipe or by --{section}.{field} VALUE"
            )
    return changed
