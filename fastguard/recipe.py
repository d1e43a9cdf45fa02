"""Recipes: TOML files into `config.Recipe`, strictly, and what follows from one in words."""

from __future__ import annotations

from fastguard.extras import need

need("train")

import copy
import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fastguard.backbones import family_of
from fastguard.config import NAMED, Recipe, named_config
from fastguard.errors import UserError
from fastguard.options import unknown_option
from fastguard.utils.files import read_text


def shipped_recipes() -> Path:
    """The folder of the recipes that come with the package."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"  # an editable install


def find_recipe(name: str) -> Path:
    """A file, or the name of a shipped recipe (with or without .toml). Raises UserError with the names there are."""
    if os.path.isfile(name):  # which is False for what is no path, too, as a name that is too long
        return Path(name)
    folder = shipped_recipes()
    shipped = folder / f"{name.removesuffix('.toml')}.toml"
    if "/" not in name and os.path.isfile(shipped):
        return shipped
    raise UserError(
        f"there is no recipe {name}; give a TOML file, or one of the shipped ones: {', '.join(shipped_names())}"
    )


def shipped_names() -> list[str]:
    """The recipes that come with the package, by name."""
    stems = (path.stem for path in shipped_recipes().glob("*.toml"))
    return sorted(stem for stem in stems if not stem.endswith(ARMS))


ARMS = "_arms"
"""How the name of a file of arms ends, which `fastguard compare` reads; its beginning is the name of the recipe."""


def arms_beside(path: Path) -> Path | None:
    """The file of arms beside a recipe, if there is one: `digits_arms.toml` for `digits.toml`."""
    arms = path.with_name(f"{path.stem}{ARMS}.toml")
    return arms if arms.is_file() else None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Paths in it are relative to its own folder (run.dir: to the working directory).

    Raises UserError that names every field that is unknown, of a wrong type, or at odds with another.
    """
    content = load_toml(path)
    _resolve_paths(content, path.parent)
    recipe = parse_recipe(content, str(path))
    refuse_unread(recipe, unread_values(recipe))
    return recipe


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError if it is none."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides its own: integers of thousands of digits, nesting
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of a recipe's tables relative to the folder of its file."""
    for section, name in (("prompts", "file"), ("monitor", "file")):
        value = content.get(section, {}).get(name) if isinstance(content.get(section, {}), dict) else None
        if isinstance(value, str):
            content[section][name] = str(folder / value)


def with_names(recipe: Recipe, args: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe with the sections that `--objective.name` and `--advantages.name` choose, and the other arguments.

    The last one of each counts. Another name starts from its defaults; fields that every name has stay (reweight,
    kl_weight, kl_type). The other arguments can then set its options. Raises UserError for an unknown name.
    """
    flags = {f"--{section}.name": section for section in NAMED}
    names = {section: getattr(recipe, section).name for section in NAMED}
    others, rest = [], list(args)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag in flags and (equals or rest):
            names[flags[flag]] = value if equals else rest.pop(0)
        else:
            others.append(flag + equals + value)
    for section, name in names.items():
        current = getattr(recipe, section)
        if name != current.name:
            shared = {f.name for f in dataclasses.fields(NAMED[section].base)} - {"name"}
            kept = {field: getattr(current, field) for field in shared}
            recipe = replace(recipe, **{section: named_config(section, name, **kept)})
    return recipe, others


def unread_values(recipe: Recipe) -> dict[str, str]:
    """`section.field` -> reason, for values that are not the default and that neither a run nor its model reads."""
    return recipe.unread(family_of(recipe.model.kind).unread)


def refuse_unread(recipe: Recipe, unread: Mapping[str, str]) -> None:
    """Raise UserError for values that are set but that nothing reads (from `unread_values`)."""
    for field, reason in unread.items():
        section, name = field.split(".")
        value = getattr(getattr(recipe, section), name)
        raise UserError(f"{field} = {value}: set, but not read: {reason}. Remove it, or change what it depends on")


def overridden(recipe: Recipe, changed: Recipe) -> Recipe:
    """The recipe changed on the command line. What a change leaves unread is passed over; a change that is not read
    itself is refused."""
    before = as_dict(recipe)
    unread = {}
    for field, reason in unread_values(changed).items():
        section, name = field.split(".")
        if as_dict(changed)[section][name] != before[section].get(name):
            unread[field] = reason
    refuse_unread(changed, unread)
    return changed


def with_values(recipe: Recipe, content: dict[str, Any], folder: Path, where: str) -> Recipe:
    """The recipe with other values of some fields, nested as in a recipe's file; errors begin with `where`.

    As on the command line: another name of a section starts from its defaults. Paths are relative to `folder`.
    """
    content = copy.deepcopy(content)
    _resolve_paths(content, folder)
    sections = {name: values for name, values in content.items() if isinstance(values, dict)}
    names = {section: sections.get(section, {}).get("name") for section in NAMED}
    try:
        chosen, _ = with_names(recipe, [f"--{s}.name={name}" for s, name in names.items() if isinstance(name, str)])
        base = as_dict(chosen)
        merged = {name: {**base.get(name, {}), **values} for name, values in sections.items()}
        return overridden(recipe, parse_recipe({**base, **content, **merged}, ""))
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(':').strip()}") from None


def parse_recipe(content: dict[str, Any], where: str) -> Recipe:
    """A recipe from nested dictionaries; errors begin with `where`. As `load_recipe`."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is no recipe: expected an object, got {content!r:.80}")
    for section, named in NAMED.items():
        chosen = content.get(section, {})
        if isinstance(chosen, dict):
            content = {**content, section: {"name": named.default, **chosen}}
    try:
        # As JSON, whose strict mode takes lists for tuples but no string or bool for a number.
        return _ADAPTER.validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        found = error.errors()
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, nesting
        raise UserError(f"{where} is no recipe: {error}") from None
    problems = [_problem(e["loc"], e["type"], e["msg"], e["input"]) for e in found[:MOST_PROBLEMS]]
    if len(found) > MOST_PROBLEMS:
        problems.append(f"and {len(found) - MOST_PROBLEMS} more")
    raise UserError("\n".join([f"{where}:", *(f"  {_shortened(problem)}" for problem in problems)]))


MOST_PROBLEMS = 20
"""of a recipe that are told"""
_ADAPTER = TypeAdapter(Recipe)
_REPLACED = {"model.checkpointing": "model.recompute", "scoring.std": "advantages.name"}
"""Fields of earlier versions, and what to set now."""


def _problem(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    section: Any = Recipe
    inside = location[:-1]
    table = NAMED.get(str(location[0])) if location else None
    name = str(location[1]) if table is not None and len(location) > 1 else ""
    if table is not None and name in table.configs:  # pydantic puts it into the location
        location, section, inside = (location[0], *location[2:]), table.configs[name], ()
    field = ".".join(str(part) for part in location)
    if kind == "union_tag_invalid" and table is not None:
        return f"{field}.name: must be one of {', '.join(table.configs)}, got {value['name']!r}"
    if kind == "unexpected_keyword_argument":
        if table is not None and any(location[-1] in options for options in table.options.values()):
            return f"{field}: {unknown_option(table.options, name, str(location[-1]))}"
        for part in inside:
            section = _element(section, part)
        names = [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
        close = [_REPLACED[field]] if field in _REPLACED else difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
        return f"{field}: there is no such field{hint}"
    if kind == "missing":
        return f"{field}: this field is needed"
    if kind == "value_error":
        prefix = f"{field}: " if field else ""
        return prefix + message.removeprefix("Value error, ")
    if kind == "json_invalid":  # not the user's JSON, which was read: nested too deeply, or half of a character
        return f"not valid: {message}"
    return f"{field}: {message[0].lower()}{message[1:]}, got {value!r}"


def _shortened(text: str, most: int = 500) -> str:
    """The beginning and the end of a long text; a value may be as long as its file."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _element(section: Any, part: int | str) -> Any:
    """The dataclass behind a field, or behind an entry of a list of tables."""
    if isinstance(part, int):
        return section
    kind = get_type_hints(section)[part]
    inside = [a for a in getattr(kind, "__args__", ()) if dataclasses.is_dataclass(a)]
    return inside[0] if inside else kind


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """JSON values, all fields."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: old -> new` for everything that two recipes (as dictionaries) do not share."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = _by_name(old.get(key), new.get(key))
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def _by_name(before: Any, after: Any) -> tuple[Any, Any]:
    """Lists of as many tables as dictionaries of them, by their numbers."""
    lists = isinstance(before, list) and isinstance(after, list) and len(before) == len(after)
    if lists and all(isinstance(entry, dict) for entry in before + after):
        return {str(i): entry for i, entry in enumerate(before)}, {str(i): entry for i, entry in enumerate(after)}
    return before, after


def _extra_passes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What an objective costs beside the forward and backward pass of each transition."""
    objective, one = recipe.objective, "1 forward pass a transition without gradients"
    if objective.process == "forward":
        whose = {
            "rollout": "the policy that sampled",
            "average": "the averaged policy, which samples too",
            "reference": "the model before training",
        }[objective.anchor]
        yield "after a rollout", f"{one}, for the velocities of {whose}"
    if objective.kl_weight > 0 and objective.anchor != "reference":
        yield "for the KL", f"{one}, for the velocities of the model before training"
    if objective.scope != "transition":
        updates = recipe.update.inner_epochs * recipe.update.minibatches
        saved = f"; not in the first of the {updates} updates of a rollout" if objective.anchor == "rollout" else ""
        yield "first pass of an update", f"{one}, before its forward and backward pass{saved}"


def _trained(recipe: Recipe) -> tuple[str, str]:
    """The transitions of an image."""
    sampler = recipe.sampler
    if recipe.objective.process == "forward":
        of = f"{recipe.update.draws} flow times and noises of an image a pass"
        return "trained draws", f"{of}; images are sampled in {sampler.num_steps} steps without noise"
    end = sampler.window_start + recipe.trained_steps - 1
    moving = "" if sampler.window == "fixed" else f", {sampler.window} from step {sampler.window_start} on"
    window = f"steps {sampler.window_start} to {end}" if sampler.window == "fixed" else f"{recipe.trained_steps} steps"
    return "trained steps", f"{window} of {sampler.num_steps} ({sampler.kind}){moving}"


def _scored_images(recipe: Recipe) -> Sequence[tuple[str, str]]:
    """What advantages per step cost beside the others."""
    if not recipe.advantages.per_step:
        return ()
    each, images = recipe.scored_per_image, recipe.images_per_epoch
    reason = f"advantages.name = {recipe.advantages.name} decodes and scores one after each trained step"
    return (("images scored per epoch", f"{each * images} = {images} x {each}: {reason}"),)


def _earlier_rollouts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What an objective that trains on earlier rollouts keeps of them, and what that costs."""
    rollouts, group = recipe.objective.rollouts, recipe.sampler.group_size
    if rollouts == 1:
        return
    kept = f"{rollouts - 1} kept"
    if recipe.objective.reuse == "rollouts":
        yield "earlier rollouts", f"{kept}, whole: an update trains on {rollouts} rollouts as soon as there are so many"
        return
    count = recipe.objective.replayed_images(group)
    yield "earlier rollouts", f"{kept}: the best {count} of {group} images of each prompt, on every process"
    yield (
        "replayed images",
        f"at most {recipe.best_images} per epoch, of prompts that come again; 1 forward pass a transition without "
        "gradients, before the updates",
    )


def totals(recipe: Recipe) -> Sequence[tuple[str, str]]:
    """What follows from a recipe, as (name, value) lines."""
    sampler, update, processes = recipe.sampler, recipe.update, recipe.hardware.processes
    updates = update.inner_epochs * update.minibatches
    fewer = "" if update.stop == "none" else f", or fewer by update.stop = {update.stop}"
    trained = "" if update.subsample == 1 else f"; a pass trains on {recipe.trained_images} of each"
    per_update = recipe.transitions_per_update
    return (
        ("images per epoch", f"{recipe.images_per_epoch} = {recipe.prompts.per_epoch} prompts x {sampler.group_size}"),
        ("images per GPU", f"{recipe.images_per_process}, in rollout batches of {sampler.batch_size}{trained}"),
        *_scored_images(recipe),
        _trained(recipe),
        ("updates per epoch", f"{updates} = {update.inner_epochs} passes x {update.minibatches} minibatches{fewer}"),
        (
            "transitions per update",
            f"{per_update * processes} = {processes} x {per_update} per GPU, in micro-batches of {recipe.micro_batch}",
        ),
        *_extra_passes(recipe),
        *_earlier_rollouts(recipe),
        ("updates in all", f"{updates * recipe.run.epochs} in {recipe.run.epochs} epochs{fewer}"),
        ("images in all", f"{recipe.images_per_epoch * recipe.run.epochs}"),
    )
