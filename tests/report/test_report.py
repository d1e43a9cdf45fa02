"""The page is one safe file, and pictures show what they were given."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from fastguard.report.page import Picture, Section, Table, write_page
from fastguard.report.palette import BLUE, VERMILLION
from fastguard.report.plots import Line, plot_lines
from fastguard.utils.grids import save_grid


def colored_pixels(path: Path, color: str) -> int:
    """Pixels within rounding of an RGB color."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(matplotlib.image.imread(path)[..., :3] - rgb).max(-1) < 0.02).sum())


def test_page_is_self_contained_and_escapes_text(tmp_path: Path) -> None:
    picture = Picture(save_grid(tmp_path / "a.png", np.zeros((1, 1, 4, 4), np.uint8)), "t < u", 'alt "quoted"')
    table = Table(["name", "A&B"], [["row <1>", "2"]], note="a > b")
    section = Section("Heading", ["x <script>alert(1)</script> y"], ["point <li>"], table, [picture])
    page = write_page(tmp_path / "report.html", "Title & more", "lead", [section], "careful <b>").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Title &amp; more" in page
    assert "row &lt;1&gt;" in page
    assert "<li>point &lt;li&gt;</li>" in page
    assert "careful &lt;b&gt;" in page
    assert 'alt="alt &#34;quoted&#34;"' in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert "url(" not in page
    assert not list(tmp_path.glob("*.part"))


def test_notice_is_optional(tmp_path: Path) -> None:
    page = write_page(tmp_path / "report.html", "t", "l", []).read_text()
    assert 'class="notice"' not in page


def test_prose_tables_are_marked(tmp_path: Path) -> None:
    section = Section("s", table=Table(["a", "b"], [["1", "2"]], prose=True))
    assert '<table class="prose">' in write_page(tmp_path / "r.html", "t", "l", [section]).read_text()


def test_grid_places_tiles_by_row_and_column_with_white_gaps(tmp_path: Path) -> None:
    tiles = np.array([0, 50, 100, 150, 200, 250], np.uint8).reshape(2, 3, 1, 1) * np.ones((1, 1, 4, 5), np.uint8)
    image = np.round(matplotlib.image.imread(save_grid(tmp_path / "g.png", tiles, gap=2))[..., 0] * 255)
    assert image.shape == (2 * 4 + 2, 3 * 5 + 2 * 2)
    assert [image[0, 0], image[0, 7], image[0, 14]] == [0, 50, 100]
    assert [image[6, 0], image[6, 7], image[9, 18]] == [150, 200, 250]
    assert (image[:, 5:7] == 255).all()
    assert (image[4:6] == 255).all()


def test_plot_draws_each_color(tmp_path: Path) -> None:
    flow = Line("Flow-GRPO", VERMILLION, [0.0, 1.0], [1.0, 2.0])
    guard = Line("GRPO-Guard", BLUE, [0.0, 1.0], [2.0, 1.0])
    both = plot_lines(tmp_path / "both.png", [flow, guard], "x", "y")
    one = plot_lines(tmp_path / "one.png", [flow], "x", "y")
    # The legend's line is opaque, so its exact color must be there.
    assert colored_pixels(both, VERMILLION) > 50
    assert colored_pixels(both, BLUE) > 50
    assert colored_pixels(one, BLUE) == 0


@pytest.mark.parametrize("yscale", ["log", "symlog"])
def test_scales_change_the_picture(tmp_path: Path, yscale: str) -> None:
    line = Line("a", "#000000", [0.0, 1.0, 2.0], [1.0, 10.0, 1000.0])
    linear = plot_lines(tmp_path / "linear.png", [line], "x", "y").read_bytes()
    assert plot_lines(tmp_path / "other.png", [line], "x", "y", yscale=yscale).read_bytes() != linear


def test_reference_line_appears_in_the_legend(tmp_path: Path) -> None:
    line = Line("a", "#000000", [0.0, 1.0], [0.0, 1.0])
    plain = colored_pixels(plot_lines(tmp_path / "plain.png", [line], "x", "y"), "#777777")
    marked = plot_lines(tmp_path / "marked.png", [line], "x", "y", marker_x=(0.5, "equal proxy"))
    assert colored_pixels(marked, "#777777") > plain + 100
