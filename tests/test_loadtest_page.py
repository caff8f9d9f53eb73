"""The renderer of reports: the same page as Markdown and as HTML, whatever its texts hold."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest.report import Page, Section, Strong, Table, write

PNG = b"\x89PNG\r\n\x1a\n not a real one"
EVIL = '<script src="http://x">|`*_[a](http://x)'


class Parsed(HTMLParser):
    """Text, tags and links of a page; every element must be closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_both_files_hold_the_whole_page(tmp_path: Path) -> None:
    (tmp_path / "a b-speed.png").write_bytes(PNG)
    table = Table(["contender", "clips/s"], [["packed", Strong("29.5")], ["speechbrain", "1,011"], ["other", "—"]])
    sections = [
        Section("Speed", "First.\n\n- one\n- two", table, "a b-speed.png"),
        Section("Limits", "Another machine."),
    ]
    paths = write(Page("A title", "Found this.", {"cores": "2"}, sections), tmp_path / "a b")
    assert paths == [tmp_path / "a b.md", tmp_path / "a b.html"]
    text, page = (path.read_text() for path in paths)
    parsed = Parsed(page)
    for word in ("A title", "Found this.", "cores", "Speed", "First.", "one", "29.5", "1,011", "Another machine."):
        assert word in text and word in parsed.text
    assert "| contender | clips/s |\n| --- | ---: |\n| packed | **29.5** |" in text
    assert re.findall(r"\]\((.*?)\)", text) == ["a%20b-speed.png"]
    (link,) = parsed.links
    assert base64.b64decode(link.removeprefix("data:image/png;base64,")) == PNG
    assert not {"script", "link", "iframe"} & set(parsed.tags) and parsed.tags.count("strong") == 1


def test_texts_hold_no_markup(tmp_path: Path) -> None:
    table = Table([EVIL, "b"], [[EVIL + "\n\n# title", "1. x"], [Strong(EVIL), ""]])
    page = Page(EVIL, f"- {EVIL}", {EVIL: EVIL}, [Section(EVIL, EVIL, table)])
    text, html = (path.read_text() for path in write(page, tmp_path / "new" / "x"))
    parsed = Parsed(html)
    assert parsed.links == [] and "script" not in parsed.tags and EVIL in parsed.text
    assert "<" not in text and "[a]" not in text and "\n# title" not in text
    for found in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in found.splitlines()}) == 1


def test_a_missing_plot_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.png"):
        write(Page("A title", "", {}, [Section("Speed", plot="none.png")]), tmp_path / "x")
    assert not list(tmp_path.iterdir())
