"""The site of docs/: it builds without a warning or a network, and its generated parts are those of the code."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import tables
from helpers import ROOT, script

from fastguard.advantages import ESTIMATOR_OPTIONS
from fastguard.config import Recipe
from fastguard.loss.objectives import OPTIONS
from fastguard.memory import kept_activations, plan
from fastguard.memory.passes import as_built, weights_of
from fastguard.recipe import find_recipe, load_recipe

MEMORY = script("docs/memory.py")
ROWS = json.loads(MEMORY.TABLE.read_text())
FORMATS = script("docs/formats.py")
QUANTIZED = json.loads(FORMATS.TABLE.read_text())
MODELS = script("docs/models.py")
PLANNED = json.loads(MODELS.TABLE.read_text())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does, where nothing outside can be reached."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?://[^\s\">]+)", text)
        assert not loaded, f"{page.name}: {loaded}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import", path.read_text(encoding="utf-8")), path


def test_every_field_of_a_recipe_is_on_its_page(site: Path) -> None:
    text = (site / "recipes.html").read_text(encoding="utf-8")
    sections = {name: kind for name, kind in get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}
    assert len(sections) >= 8
    for name, kind in sections.items():
        (part,) = re.findall(rf'<h2 id="{name}">.*?(?=<h2|</article>)', text, re.DOTALL)
        for field in dataclasses.fields(kind):
            assert f"<code>{field.name}</code>" in part or field.name == "gold", f"{name}.{field.name}"
    assert '<code>"none"</code>, <code>"pointwise"</code>' in html.unescape(text)  # choices behind a name


@pytest.mark.parametrize(("page", "table"), [("objectives", OPTIONS), ("advantages", ESTIMATOR_OPTIONS)])
def test_every_name_is_on_its_page_with_its_options(site: Path, page: str, table: dict[str, tuple[str, ...]]) -> None:
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    for name, options in table.items():
        assert f"<td><code>{name}</code></td>" in text.partition("<h2")[0]  # the table of papers
        (part,) = re.findall(rf'<h2 id="{name}">.*?(?=<h2|</article>)', text, re.DOTALL)
        for option in options:
            assert f"<td><code>{option}</code></td>" in part


def test_the_tables_of_memory_are_those_of_its_file() -> None:
    for page, (marker, table) in MEMORY.tables(ROWS).items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert f"<!-- {marker}: begin -->\n{table}\n<!-- {marker}: end -->" in text


def test_the_planner_saves_what_the_file_of_memory_says() -> None:
    """One number of it; `make test-all` compares them all."""
    recipe = MEMORY.at_level(load_recipe(find_recipe("flux_lora")), "block")
    (row,) = [row for row in ROWS if (row["recipe"], row["level"]) == ("flux_lora", "block")]
    assert kept_activations(MEMORY.one_image(recipe)).total == row["saved_for_backward"]


def test_the_tables_of_benchmarks_are_those_of_the_results() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    made = text.partition(tables.BEGIN)[2].partition(tables.END)[0]
    found = "\n\n".join(tables.pages(tables.load(tables.rows.RESULTS)))
    assert found in made
    assert "not yet measured" not in made
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", made):
        assert (ROOT / "docs" / picture).is_file()


def test_the_tables_of_quantized_weights_are_those_of_their_file() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for marker, table in FORMATS.tables(QUANTIZED).items():
        assert f"<!-- {marker}: begin -->\n{table}\n<!-- {marker}: end -->" in text
    assert all(row["bytes"] <= 1.25 * row["bytes_in_full_precision"] for row in QUANTIZED["costs"])


def test_the_weights_of_each_format_are_those_of_the_guide() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for how, names in FORMATS.FORMATS.items():
        recipe = FORMATS.chosen(512, how, "block", 1)
        weights = weights_of(as_built(recipe.model), recipe.lora)
        size = (weights.transformer.n_bytes - weights.trained.n_bytes) / 2**30
        cell = '`"none"`' if how == "none" else ", ".join(f'`"{name}"`' for name in names.split(", "))
        assert f"| {cell} | {size:.1f} GiB |" in text


def test_the_tables_of_models_are_those_of_their_file() -> None:
    text = MODELS.PAGE.read_text(encoding="utf-8")
    for marker, table in MODELS.tables(PLANNED).items():
        assert f"<!-- {marker}: begin -->\n{table}\n<!-- {marker}: end -->" in text
    assert {row["model"] for row in PLANNED["models"]} == MODELS.MODELS.keys()
    assert {row["recipe"] for row in PLANNED["recipes"]} == set(MODELS.RECIPES)
    for row in PLANNED["models"]:
        assert row["fused"] == row["blocks"]
        assert row["saved"]["pointwise"] <= 0.7 * row["saved"]["unfused"]


def test_the_planner_saves_what_the_file_of_models_says() -> None:
    """One number of it; `make test-all` compares them all."""
    (row,) = [row for row in PLANNED["models"] if row["model"] == "SD3.5 Medium"]
    assert kept_activations(MODELS.chosen("SD3.5 Medium", 1024, "block")).total == row["saved"]["block"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MODELS.RECIPES)
def test_the_planner_says_all_that_the_file_of_models_does(recipe: str) -> None:
    assert list(MODELS.rows(recipe)) == [row for row in PLANNED["models"] if row["recipe"] == recipe]
    assert list(MODELS.plans(recipe)) == [row for row in PLANNED["recipes"] if row["recipe"] == recipe]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_lora_16gb", "flux_lora_24gb"])
def test_recipes_for_small_cards_fit_with_a_margin(name: str) -> None:
    planned = plan(load_recipe(find_recipe(name)))
    assert planned.peak < 0.95 * planned.limit
    assert all(planned.phase(phase).peak < 12 * 2**30 for phase in ("encode", "decode") if name.endswith("16gb"))


@pytest.mark.slow
def test_the_planner_says_all_that_the_file_of_quantized_weights_does() -> None:
    assert list(FORMATS.rows()) == QUANTIZED["peaks"]


@pytest.mark.slow
def test_the_planner_says_all_that_the_file_of_memory_does() -> None:
    assert list(MEMORY.rows()) == ROWS
