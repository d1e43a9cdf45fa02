"""Parts of the site that are made from the code, when the site is built: a hook of mkdocs.

`<!-- fields -->` becomes the fields of a recipe, `<!-- objectives -->` the options of each objective, and
`<!-- estimators -->` those of each advantage estimator.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from fastguard import config
from fastguard.advantages import ESTIMATORS
from fastguard.loss.objectives import OBJECTIVES
from fastguard.loss.objectives.base import EitherLogRatio


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    for made in (fields, objectives, estimators):
        marker = f"<!-- {made.__name__} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, "\n\n".join(made()))
    return markdown


def documented(cls: type) -> Iterator[tuple[str, str, str]]:
    """(name, annotation, docstring) of each field of a dataclass, those of its bases first."""
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        names = {field.name for field in dataclasses.fields(base)}
        for line, following in zip(body.body, [*body.body[1:], None], strict=True):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id in names):
                continue
            text = following.value.value if isinstance(following, ast.Expr) else ""  # type: ignore[attr-defined]
            yield line.target.id, ast.unparse(line.annotation), text


def default_of(cls: type, name: str) -> str:
    """The default as TOML writes it."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(_quoted(part) for part in value)}]`"
    return f"`{_quoted(value)}`"


def _quoted(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, int) else f'"{value}"'


def values_of(annotation: str) -> str:
    """An annotation in words: choices, or the type."""
    node = ast.parse(annotation, mode="eval").body
    return ", ".join(dict.fromkeys(_words(node)))


def _words(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.BinOp):
        yield from (*_words(node.left), *_words(node.right))
    elif isinstance(node, ast.Subscript):
        name, inside = ast.unparse(node.value), node.slice
        parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if name == "Literal":
            for part in parts:
                yield from [f'`"{part.value}"`'] if isinstance(part, ast.Constant) else _words(part)
        elif name == "tuple":
            several = [part for part in parts if not (isinstance(part, ast.Constant) and part.value is ...)]
            words = list(dict.fromkeys(word for part in several for word in _words(part)))
            yield f"list of {' or '.join(words)}"
        else:
            yield "table"
    elif isinstance(node, ast.Constant):
        yield "not set"
    else:
        alias = getattr(config, ast.unparse(node), None)
        plain = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "Path": "path"}
        if ast.unparse(node) in plain:
            yield plain[ast.unparse(node)]
        elif hasattr(alias, "__args__") and all(isinstance(choice, str) for choice in alias.__args__):
            yield from (f'`"{choice}"`' for choice in alias.__args__)
        elif ast.unparse(node) == "ClipRange":
            yield from ("number", "list of two numbers")
        else:
            yield ast.unparse(node)


def table(cls: type) -> str:
    """The fields of a dataclass that are no sections of their own."""
    lines = ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, annotation, text in documented(cls):
        if "RewardConfig" not in annotation:
            meaning = " ".join(text.split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {values_of(annotation)} | {default_of(cls, name)} | {meaning} |")
    return "\n".join(lines)


def fields() -> Iterator[str]:
    """Every section of a recipe with its fields."""
    sections: dict[str, Any] = dict(get_type_hints(config.Recipe))
    sections.pop("__pydantic_config__", None)
    for name, _, text in documented(config.Recipe):
        kind = config.NAMED[name].base if name in config.NAMED else sections[name]
        kind = config.RewardConfig if name == "rewards" else kind
        title = "[[rewards]]" if name == "rewards" else f"[{name}]"
        words = inspect.cleandoc(kind.__doc__ or text)
        yield f"## `{title}` {{ #{name} }}\n\n{words}"
        yield table(kind)
        if name == "monitor":
            yield "`[[monitor.gold]]` entries have the fields of [`[[rewards]]`](#rewards)."
        if name == "objective":
            yield "Further fields are the options of the objective that `name` chooses: [Objectives](objectives.md)."
        if name == "advantages":
            yield "Further fields are the options of the estimator that `name` chooses: [Advantages](advantages.md)."


def objectives() -> Iterator[str]:
    """Every objective with its options."""
    for name, cls in OBJECTIVES.items():
        yield f"## `{name}`: {cls.title} {{ #{name} }}\n\n{inspect.cleandoc(cls.__doc__ or '')}"
        ratios = {"normalized": "`std * cross`", "plain": "`cross - drift / 2`"}
        words = f"The log-ratio is {ratios[cls.log_ratio]}"
        words += ", or `std * cross` by the option `log_ratio`." if issubclass(cls, EitherLogRatio) else "."
        if cls.process == "forward":
            words = "It trains on [final latents](#final-latents)."
        if cls.limit_name is not None:
            what = "an image" if cls.scope == "trajectory" else "a sample"
            words += f" `{cls.limit_name}` limits how far {what} may move."
        yield words
        yield table(cls)


def estimators() -> Iterator[str]:
    """Every advantage estimator with its options."""
    for name, cls in ESTIMATORS.items():
        yield f"## `{name}`: {cls.title} {{ #{name} }}\n\n{inspect.cleandoc(cls.__doc__ or '')}"
        yield table(cls) if dataclasses.fields(cls) else "It has no options."
