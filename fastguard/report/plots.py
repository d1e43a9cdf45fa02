"""Plots of curves as PNG files, all in one look: labelled axes, a legend, thin grid lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fastguard.report.palette import REFERENCE

MOST_MARKERS = 60
"""Curves of more points are drawn thin, and without a marker for each."""

LEGEND_INSIDE = 6
"""Curves with more names have their legend under the plot, as it would hide them."""
Style = Literal["solid", "dashed", "dotted", "dashdot"]
DASHES: dict[Style, Any] = {
    "solid": "-",
    "dashed": (0, (4, 2)),
    "dotted": (0, (1, 1.5)),
    "dashdot": (0, (6, 1.5, 1, 1.5)),
}

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
    "legend.handlelength": 3.6,
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
    style: Style = "solid"
    band: list[float] | None = None
    """half the height of a shaded band around the curve, at each point"""


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
        names = len({line.label for line in lines})
        below = -(-names // 4) if names > LEGEND_INSIDE else 0
        canvas = Canvas(figsize=(4.8, 3.2 + 0.17 * below), dpi=200, layout="constrained")
        axes = canvas.subplots()
        labelled: set[str] = set()
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=line.color,
                linestyle=DASHES[line.style],
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
            axes.axvline(marker_x[0], color=REFERENCE, linewidth=0.9, linestyle=":", label=marker_x[1])
        if marker_y is not None:
            axes.axhline(marker_y[0], color=REFERENCE, linewidth=0.9, linestyle=":", label=marker_y[1])
        if below:
            canvas.legend(loc="outside lower center", ncols=4, fontsize=7, columnspacing=1.2)
        else:
            axes.legend(loc="best")
        canvas.savefig(path, metadata={"Software": None})
    return path


def plot_intervals(
    path: Path, names: Sequence[str], means: Sequence[float], half_widths: Sequence[float], xlabel: str, color: str
) -> Path:
    """Draw a point with its interval for each name, from the top down, beside a line at 0, to a PNG.

    Args:
        half_widths: of the intervals; NaN draws the point alone.
    """
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(4.8, 1.0 + 0.24 * len(names)), dpi=200, layout="constrained")
        axes = canvas.subplots()
        places = np.arange(len(names))
        axes.axvline(0, color=REFERENCE, linewidth=0.9, linestyle=":")
        axes.errorbar(means, places, xerr=half_widths, fmt="o", color=color, markersize=4, linewidth=1.4, capsize=2)
        axes.set_yticks(places, list(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        canvas.savefig(path, metadata={"Software": None})
    return path
