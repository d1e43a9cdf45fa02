"""Plots and the self-contained HTML page of a run.

One palette and labelled axes for everything. Pictures are embedded, so that the page can be mailed or moved as one
file.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fastguard.utils.files import write_text

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The Okabe-Ito palette, which colour-blind readers can tell apart."""
MOST_MARKERS = 60
"""Curves of more points are drawn thin, and without a marker for each."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9e9e9",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Line:
    """One curve; curves of equal label share one legend entry."""

    label: str
    color: str
    x: list[float]
    y: list[float]
    dashed: bool = False
    band: list[float] | None = None
    """half the height of a shaded band around the curve, at each point"""


@dataclass(frozen=True)
class Picture:
    """A PNG file, its title, and a description for those who cannot see it."""

    path: Path
    title: str
    alt: str


@dataclass(frozen=True)
class Table:
    """A small table; the first column holds the row names."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""
    prose: bool = False
    """left-aligned, wrapping cells instead of right-aligned numbers"""


@dataclass(frozen=True)
class Section:
    """A heading, its paragraphs and list points (plain text), then its table and pictures."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    table: Table | None = None
    pictures: list[Picture] = field(default_factory=list)


def plot_lines(
    path: Path,
    lines: list[Line],
    xlabel: str,
    ylabel: str,
    *,
    yscale: str = "linear",
    linthresh: float = 1.0,
    integer_x: bool = False,
    marker_x: tuple[float, str] | None = None,
    marker_y: tuple[float, str] | None = None,
    xlim: tuple[float | None, float | None] = (None, None),
    ylim: tuple[float | None, float | None] = (None, None),
) -> Path:
    """Draw curves with a legend to a PNG.

    Args:
        yscale: matplotlib's "linear", "log" or "symlog" (linear within +- linthresh).
        integer_x: put ticks at whole numbers only.
        marker_x, marker_y: position and label of a thin dotted reference line.
    """
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(4.8, 3.2), dpi=200, layout="constrained")
        axes = canvas.subplots()
        labelled: set[str] = set()
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=line.color,
                linestyle=(0, (4, 2)) if line.dashed else "-",
                alpha=0.85,
                linewidth=1.6 if len(line.x) <= MOST_MARKERS else 0.8,
                marker="o" if len(line.x) <= MOST_MARKERS else None,
                markersize=2.6,
                label=None if line.label in labelled else line.label,
            )
            if line.band is not None:
                y, half = np.array(line.y, float), np.array(line.band, float)
                axes.fill_between(line.x, y - half, y + half, color=line.color, alpha=0.15, linewidth=0)
            labelled.add(line.label)
        if yscale == "symlog":
            axes.set_yscale("symlog", linthresh=linthresh)
        else:
            axes.set_yscale(yscale)
        if yscale == "log" and axes.get_ylim()[1] > 1:
            # Plain numbers read better than powers of ten over one or two decades.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(*xlim)
        axes.set_ylim(*ylim)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if integer_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if marker_x is not None:
            axes.axvline(marker_x[0], color="#777777", linewidth=0.9, linestyle=":", label=marker_x[1])
        if marker_y is not None:
            axes.axhline(marker_y[0], color="#777777", linewidth=0.9, linestyle=":", label=marker_y[1])
        axes.legend(loc="best", handlelength=2.2)
        canvas.savefig(path, metadata={"Software": None})
    return path


def write_page(path: Path, title: str, lead: str, sections: list[Section], notice: str = "") -> Path:
    """Write one self-contained HTML file, atomically; all text is escaped, pictures become data URLs.

    Args:
        lead: the paragraph under the title.
        notice: a highlighted line above everything (a partial run, say); empty for none.
    """
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']
    if notice:
        body.insert(0, f'<p class="notice" role="status">{html.escape(notice)}</p>')
    body += [_section(section) for section in sections]
    page = _PAGE.format(title=html.escape(title), style=_CSS, body="\n".join(body))
    write_text(path, page)
    return path


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.points:
        parts.append("<ul>" + "".join(f"<li>{html.escape(point)}</li>" for point in section.points) + "</ul>")
    if section.table is not None:
        parts.append(_table(section.table))
    if section.pictures:
        parts.append('<div class="pictures">' + "\n".join(_picture(p) for p in section.pictures) + "</div>")
    return "<section>" + "\n".join(parts) + "</section>"


def _table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        name, *rest = (html.escape(cell) for cell in cells)
        scope = "col" if tag == "th" else "row"
        return f'<tr><th scope="{scope}">{name}</th>' + "".join(f"<{tag}>{cell}</{tag}>" for cell in rest) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    head = row(table.header, "th")
    kind = ' class="prose"' if table.prose else ""
    return f'<div class="scroll"><table{kind}><thead>{head}</thead><tbody>{rows}</tbody></table></div>{note}'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f"<figure><figcaption>{html.escape(picture.title)}</figcaption>"
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}"></figure>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fcfcfb; color: #22262b; font: 17px/1.6 "Source Serif 4", Charter, Georgia, serif; }
main { max-width: 1060px; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1, h2, table, figcaption, .notice, .note {
  font-family: Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.8rem; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 3.2rem 0 0.7rem; }
p { max-width: 44rem; margin: 0 0 0.9rem; }
ul { max-width: 44rem; margin: 0 0 0.9rem; padding-left: 1.15rem; }
li { margin: 0.3rem 0; }
p, li, figcaption, .prose th, .prose td { overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; line-height: 1.55; color: #4a515a; }
.notice {
  max-width: none; padding: 0.7rem 1rem; font-size: 0.95rem;
  background: #fff4df; border-left: 4px solid #e69f00;
}
.note { font-size: 0.85rem; color: #666d75; margin-top: 0.6rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 1.4rem 0.42rem 0; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th, thead th:first-child { font-weight: 600; border-bottom: 1.5px solid #22262b; }
.prose th, .prose td { text-align: left; white-space: normal; vertical-align: top; }
tbody tr { border-bottom: 1px solid #e7e7e4; }
.pictures {
  display: grid; gap: 1.6rem; margin-top: 1.4rem; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr));
}
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.88rem; font-weight: 600; color: #3a4047; margin-bottom: 0.35rem; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
@media (max-width: 600px) {
  body { font-size: 16px; }
  main { padding: 1.6rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
}
"""
