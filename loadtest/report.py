"""A page of figures, written as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

TEMPLATE = Path(__file__).parent / "report.html.j2"
MISSING = "—"  # in a cell without a figure
_FIGURE = re.compile(r"[\d.,]+(e-?\d+)?%?|" + MISSING)


class Strong(str):
    """The text of a cell to be set in bold: the best of its group, or a figure that needs attention."""


@dataclass(frozen=True)
class Table:
    """Cells are formatted already. Columns that hold figures alone are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A titled part of a page."""

    title: str
    text: str = ""  # paragraphs, with an empty line between two; one whose lines begin with "- " is a list
    table: Table | None = None
    plot: str | None = None  # file name of a PNG beside the page


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    summary: str  # what was found, like the text of a section
    facts: Mapping[str, str] = field(default_factory=dict)  # conditions, such as command, commit, hardware, versions
    sections: Sequence[Section] = ()


def write(page: Page, stem: Path) -> list[Path]:
    """Write STEM.md and STEM.html, which holds the plots; return their paths.

    Raises:
        OSError: a plot is not in the folder of `stem`, or a file cannot be written.
    """
    import jinja2

    stem.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["strong"] = lambda cell: isinstance(cell, Strong)
    environment.filters |= {"blocks": _blocks, "numeric": _numeric}
    environment.filters["base64"] = lambda plot: base64.b64encode((stem.parent / plot).read_bytes()).decode()
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page)
    paths = [Path(f"{stem}.md"), Path(f"{stem}.html")]
    paths[0].write_text(_markdown(page), encoding="utf-8")
    paths[1].write_text(html, encoding="utf-8")
    return paths


def _blocks(text: str) -> list[list[str]]:
    """Paragraphs and lists of a text, each as its lines."""
    return [block.splitlines() for block in re.split(r"\n\s*\n", text.strip()) if block]


def _numeric(table: Table) -> list[bool]:
    """Whether each column holds figures alone."""
    return [all(_FIGURE.fullmatch(cell) for cell in column) for column in zip(*table.rows, strict=True)]


def _markdown(page: Page) -> str:
    parts = [f"# {_plain(page.title)}", *_paragraphs(page.summary)]
    if page.facts:
        parts += ["## Conditions", _table(Table(["", ""], list(page.facts.items())))]
    for section in page.sections:
        parts += [f"## {_plain(section.title)}", *_paragraphs(section.text)]
        parts += [f"![{_plain(section.title)}]({quote(section.plot)})"] if section.plot else []
        parts += [_table(section.table)] if section.table else []
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> list[str]:
    return ["\n".join(map(_plain, block)) for block in _blocks(text)]


def _table(table: Table) -> str:
    ruler = ["---:" if right else "---" for right in _numeric(table)]
    rows = [[f"**{_plain(cell)}**" if isinstance(cell, Strong) else _plain(cell) for cell in row] for row in table.rows]
    lines = [[_plain(name) for name in table.header], ruler, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text on one line in which Markdown finds no markup."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))
