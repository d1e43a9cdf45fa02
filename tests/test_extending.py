"""The pages of docs/extending: each example as it stands, in a copy of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, TESTS
from helpers.pages import blocks_of, changed, run_page

PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_example_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = run_page(page, tmp_path)
    assert any("/" in block.title for block in blocks)  # the file
    assert any(block.language == "python" and not block.title for block in blocks)  # the use


def test_the_first_page_lists_the_others() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert len(PAGES) >= 4
    for page in PAGES:
        assert f"(extending/{page.name})" in text


def test_the_family_of_the_page_is_the_one_that_other_tests_train() -> None:
    code = next(block.code for block in blocks_of(ROOT / "docs" / "extending" / "backbone.md") if block.title)
    assert code == (TESTS / "helpers" / "shades.py").read_text(encoding="utf-8")


def test_an_example_that_fails_or_does_not_fit_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```python title="one.py"\nx = 1\n```\n\n```python\nfrom one import x\n\nassert x == 2\n```\n')
    assert [block.title for block in blocks_of(page)] == ["one.py", ""]
    with pytest.raises(AssertionError, match=r"page\.md, block 1"):
        run_page(page, tmp_path)
    assert changed("a\nb\n", " a\n+c\n") == "a\nc\nb\n"
    with pytest.raises(ValueError, match="occurs 0 times"):
        changed("a\nb\n", " c\n+d\n")
