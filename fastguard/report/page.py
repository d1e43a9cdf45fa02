"""Self-contained HTML pages of text, tables and pictures; page.html has their markup and their look.

Pictures are embedded, so that a page can be mailed or moved as one file.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastguard.utils.files import write_text


@dataclass(frozen=True)
class Picture:
    """A PNG file, its title, and a description for those who cannot see it."""

    path: Path
    title: str
    alt: str

    @property
    def data_url(self) -> str:
        """The file as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


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


def write_page(path: Path, title: str, lead: str, sections: list[Section], notice: str = "") -> Path:
    """Write one self-contained HTML file, atomically; all text is escaped, pictures become data URLs.

    Args:
        lead: the paragraph under the title.
        notice: a highlighted line above everything (a partial run, say); empty for none.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html").render(title=title, lead=lead, sections=sections, notice=notice)
    write_text(path, page)
    return path
