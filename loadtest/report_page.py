"""How a report looks: text, tables and plots as one page of HTML and as Markdown, and the plots themselves.

Whatever is said is plain text until it is written here: what comes from data is escaped in one place. A contender has
its colour and marker in every plot, a target its line style.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import quote

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row: TypeAlias = dict[str, Any]

INK = "#24292f"  # of text and axes in a plot; on the page it follows the theme
COLOURS = {"ours": "#3b82d9", "one at a time": "#e0762f", "padded batches": "#2f9e68", "in process": "#9a6fd0"}
MARKERS = {"ours": "o", "one at a time": "s", "padded batches": "^", "in process": "D"}
OTHER = "#b0892a", "v"  # of a contender that has no colour and marker of its own
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = "-", "--", ":", "-."
WIDTH = 8.5  # inches
DPI = 130
SPREAD = 30  # largest / smallest above which a y axis is logarithmic
LOGARITHMIC = "users", "batch"  # on an x axis

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #ffffff; --faint: #656d76; --line: #d5dae0;
  --band: #f5f7f9; --warn: #fff3d6; --warn-line: #d99a1c; --good: #1a7f37; --bad: #c3241c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e6ea; --paper: #14181d; --faint: #98a2ad; --line: #39414a;
  --band: #1c2229; --warn: #3a2f14; --warn-line: #c08a1e; --good: #56c271; --bad: #ff7b72; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p, li { max-width: 62rem; }
ul { padding-left: 1.25rem; margin: .5rem 0; }
.warnings { background: var(--warn); border: 1px solid var(--warn-line); border-left-width: 6px; border-radius: 4px;
  padding: .6rem 1rem; margin: 1rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .5rem; text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); }
tbody { border-bottom: 1px solid var(--line); }
tbody th { font-weight: normal; }
td.text, th.text { text-align: left; overflow-wrap: break-word; min-width: 5.5rem; }
.figures td.text { white-space: nowrap; }
.words td.text { overflow-wrap: anywhere; min-width: 6.5rem; }
tbody:nth-of-type(even) { background: var(--band); }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.none { color: var(--faint); }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; max-width: 56rem; height: auto; color: var(--ink); }
figcaption { color: var(--faint); font-size: .87rem; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { --ink: #000000; --paper: #ffffff; --faint: #444444; --line: #aaaaaa; --band: #f5f5f5; --warn: #ffffff;
    --good: #000000; --bad: #000000; color-scheme: light; }
  body { padding: 0; max-width: none; font-size: 9.5pt; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; }
  td.text, th.text { min-width: 0; }
  tbody, figure, .warnings { break-inside: avoid; }
  h2, p:has(+ figure), p:has(+ .scroll) { break-after: avoid; }
  figure svg { max-width: 170mm; }
}
"""


@dataclass(frozen=True)
class Cell:
    """Text of a table with a look: "strong", "code", "good", "bad" or "none" (for what is not there)."""

    text: str
    look: str = ""


Value: TypeAlias = Cell | str | None  # None: a dash


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list; with a title it is a box of warnings."""

    items: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Groups of neighbouring rows; the first column has one label for each group, `left` columns are words."""

    head: Sequence[str]
    groups: Sequence[tuple[Value, Sequence[Sequence[Value]]]]
    left: int = 1


@dataclass(frozen=True)
class Plot:
    """The place of a plot."""

    name: str
    caption: str


Block: TypeAlias = Heading | Text | Points | Table | Plot


def page(title: str, blocks: Sequence[Block], plots: Mapping[str, Figure]) -> str:
    """One page of HTML that needs no other file."""
    body = "\n".join(_html(block, plots) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, plots: Mapping[str, Figure]) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Points(items, title):
            inner = "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
            if not title:
                return inner
            return f'<div class="warnings" role="note"><strong>{html.escape(title)}</strong>{inner}</div>'
        case Table():
            return _html_table(block)
        case Plot(name, caption):
            words = html.escape(caption)
            return f"<figure>{_svg(plots[name], name, words)}<figcaption>{words}</figcaption></figure>"


def _html_table(table: Table) -> str:
    def kind(column: int) -> str:
        return ' class="text"' if column < table.left else ""

    numbers = len(table.head) - table.left
    name = "words" if not numbers else "figures" if numbers > 3 else "both"
    lines = [f'<div class="scroll"><table class="{name}">']
    if any(table.head):
        head = "".join(f'<th scope="col"{kind(n)}>{html.escape(title)}</th>' for n, title in enumerate(table.head))
        lines.append(f"<thead><tr>{head}</tr></thead>")
    for label, rows in table.groups:
        lines.append("<tbody>")
        first = f'<th scope="rowgroup" class="text" rowspan="{len(rows)}">{_html_cell(label)}</th>'
        for number, row in enumerate(rows):
            cells = "".join(f"<td{kind(n)}>{_html_cell(value)}</td>" for n, value in enumerate(row, 1))
            lines.append(f"<tr>{'' if number else first}{cells}</tr>")
        lines.append("</tbody>")
    return "\n".join([*lines, "</table></div>"])


def _html_cell(value: Value) -> str:
    cell = _cell(value)
    text = html.escape(cell.text)
    if cell.look in ("strong", "code"):
        return f"<{cell.look}>{text}</{cell.look}>"
    return f'<span class="{cell.look}">{text}</span>' if cell.look else text


def _cell(value: Value) -> Cell:
    if value is None:
        return Cell("—", "none")
    return value if isinstance(value, Cell) else Cell(value)


def markdown(title: str, blocks: Sequence[Block], name: str) -> str:
    """The same as Markdown, whose plots are the files NAME-PLOT.png beside it."""
    return "\n\n".join([f"# {_plain(title)}", *(_markdown(block, name) for block in blocks)]) + "\n"


def _markdown(block: Block, name: str) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Points(items, title):
            lines = [f"- {_plain(item)}" for item in items]
            if title:
                lines = [f"> {line}".rstrip() for line in (f"**{_plain(title)}**", "", *lines)]
            return "\n".join(lines)
        case Table():
            ruler = ["---" if n < block.left else "---:" for n in range(len(block.head))]
            lines = [_line(_plain(text) for text in block.head), _line(ruler)]
            for label, rows in block.groups:
                labels = [_markdown_cell(label)] + [""] * (len(rows) - 1)
                lines += [_line([first, *map(_markdown_cell, row)]) for first, row in zip(labels, rows, strict=True)]
            return "\n".join(lines)
        case Plot(plot, caption):
            return f"![{_plain(caption)}]({quote(f'{name}-{plot}.png')})"


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(value: Value) -> str:
    cell = _cell(value)
    if cell.look == "code" and cell.text and "`" not in cell.text:
        return f"`{_one_line(cell.text).replace('|', chr(92) + '|')}`"
    text = _plain(cell.text)
    return f"**{text}**" if cell.look in ("strong", "bad") and text else text


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else, on one line; an underscore within a word means nothing."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"^(\d+)(?=[.)](?: |$))", r"\1\\", text)  # or a list would begin, or a title
    return re.sub(r"^(?=[#+-])", r"\\", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def save(plot: Figure, path: Path) -> None:
    """Write a plot as a PNG on white, in few colours: it is kept in git."""
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    plot.savefig(file, format="png", dpi=DPI, facecolor="white")
    Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _svg(plot: Figure, name: str, label: str) -> str:
    """A plot as an element of the page, in the colours of its theme; `label` is escaped already."""
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        plot.savefig(file, format="svg", facecolor="none", metadata=nothing)
    text = file.getvalue().partition("<svg ")[2].replace(INK, "currentColor")
    for before in ('id="', '"#', "url(#"):  # an id is unique on the page, not only in its plot
        text = text.replace(before, f"{before}{name}-")
    head, _, body = text.partition(">")
    head = re.sub(r'\b(width|height)="[^"]*"', "", head)  # as wide as the page allows
    body = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)  # 1/100 pt is enough
    text = f"{head}>{body}"
    return f'<svg role="img" aria-label="{label}" {text.rstrip()}'


def draw(rows: Sequence[Row], targets: Sequence[str]) -> dict[str, Figure]:
    """The plots for which there is data, by name.

    Args:
        rows: As `python -m loadtest run` writes them, without those that failed.
        targets: Names of all targets, in the order of their line styles.
    """
    import matplotlib  # an extra of its own, and heavy

    names = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"
    looks: dict[Any, Any] = dict.fromkeys(names, INK) | {"axes.facecolor": "none", "grid.alpha": 0.15, "font.size": 9.5}
    looks |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "legend.frameon": False}
    looks |= {
        "text.parse_math": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
    }
    makers: dict[str, Callable[[Sequence[Row], Sequence[str]], Figure | None]] = {
        "latency": _latency,
        "batch": _batch,
        "clients": _clients,
        "arrivals": _arrivals,
        "ramp": _ramp,
        "resources": _resources,
    }
    with matplotlib.rc_context(looks):
        made = {name: make(rows, targets) for name, make in makers.items()}
    figures = {name: figure for name, figure in made.items() if figure is not None}
    for figure in figures.values():  # it is written twice, but laid out once
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figures


def _figure(height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.08))
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, [list(line) for line in axes]


def _series(rows: Sequence[Row], key: str) -> dict[tuple[str, str, str], list[Row]]:
    """Rows with a number under `key`, in its order, by target, contender and model; ours is drawn last, on top."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted((row for row in rows if row.get(key) is not None), key=lambda row: float(row[key])):
        found.setdefault((row["target"], row["contender"], row.get("model") or ""), []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0][1] == "ours"))


def _look(contender: str) -> dict[str, Any]:
    return {"color": COLOURS.get(contender, OTHER[0]), "marker": MARKERS.get(contender, OTHER[1])}


def _style(target: str, targets: Sequence[str]) -> Literal["-", "--", ":", "-."]:
    return STYLES[targets.index(target) % len(STYLES)] if target in targets else STYLES[0]


def _lines(axes: Axes, rows: Sequence[Row], targets: Sequence[str], x: str, y: str) -> None:
    """A line for each contender on each target, and ticks where something was measured."""
    for (target, contender, _), line in _series(rows, x).items():
        good = [row for row in line if row.get(y) is not None]
        axes.plot([row[x] for row in good], [row[y] for row in good], _style(target, targets), **_look(contender))
    if x in LOGARITHMIC:
        axes.set_xscale("log", base=2)
    places = sorted({row[x] for row in rows})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)
    _scale(axes, [row[y] for row in rows if row.get(y)])


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A y axis from zero, or a logarithmic one where zero would hide the smaller values."""
    from matplotlib.ticker import LogLocator, NullLocator

    if values and max(values) / min(values) > SPREAD:
        axes.set_yscale("log")
        few = max(values) / min(values) < 1000
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, max([*values, 1e-9]) * 1.06)
    axes.yaxis.set_major_formatter("{x:,.10g}")


def _legend(figure: Figure, rows: Sequence[Row], targets: Sequence[str], more: Mapping[str, Row] | None = None) -> None:
    """Contenders by colour, targets by line style if there are several, and what else is drawn."""
    from matplotlib.lines import Line2D

    order = [*COLOURS, *sorted({row["contender"] for row in rows} - set(COLOURS))]
    seen = [name for name in order if any(row["contender"] == name for row in rows)]
    handles = [Line2D([], [], label=_label(name), **_look(name)) for name in seen]
    here = [target for target in targets if any(row["target"] == target for row in rows)]
    if len(here) > 1 and not more:
        handles += [Line2D([], [], label=_label(name), color=INK, linestyle=_style(name, targets)) for name in here]
    handles += [Line2D([], [], label=name, **look) for name, look in (more or {}).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))


def _label(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out what begins with one


def _of(rows: Sequence[Row], scenario: str) -> list[Row]:
    keys = "clips_per_s", "p50_ms", "p95_ms"
    return [row for row in rows if row["scenario"] == scenario and all(row.get(key) is not None for key in keys)]


def _latency(rows: Sequence[Row], targets: Sequence[str]) -> Figure | None:
    rows = [row for row in _of(rows, "single") if row.get("seconds") is not None]
    if not rows:
        return None
    figure, [[axes]] = _figure(4.3)
    series = _series(rows, "seconds")
    places = sorted({row["seconds"] for row in rows})
    apart = 0.012 * (places[-1] - places[0] or 1)  # whiskers that would lie on each other
    for number, ((target, contender, _), line) in enumerate(series.items()):
        middle = [row["p50_ms"] for row in line]
        above = [max(0, row["p95_ms"] - row["p50_ms"]) for row in line]
        axes.errorbar(
            [row["seconds"] + apart * (number - (len(series) - 1) / 2) for row in line],
            middle,
            [[0] * len(line), above],
            linestyle=_style(target, targets),
            capsize=3,
            elinewidth=1,
            **_look(contender),
        )
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set(xlabel="length of the clip, s", ylabel="latency, ms: p50, whisker up to p95")
    _scale(axes, [row[key] for row in rows for key in ("p50_ms", "p95_ms")])
    _legend(figure, rows, targets)
    return figure


def _batch(rows: Sequence[Row], targets: Sequence[str]) -> Figure | None:
    if not (rows := _of(rows, "batch")):
        return None
    figure, [[axes]] = _figure(4)
    _lines(axes, rows, targets, "batch", "clips_per_s")
    axes.set(xlabel="clips in a request", ylabel="clips/s")
    _legend(figure, rows, targets)
    return figure


def _clients(rows: Sequence[Row], targets: Sequence[str]) -> Figure | None:
    if not (rows := [row for row in _of(rows, "clients") if row.get("users")]):
        return None
    figure, [[left, right]] = _figure(4, columns=2)
    for axes, key, label in (left, "clips_per_s", "clips/s"), (right, "p95_ms", "p95 latency, ms"):
        _lines(axes, rows, targets, "users", key)
        axes.set(xlabel="clients that send at once", ylabel=label)
    _legend(figure, rows, targets)
    return figure


def _arrivals(rows: Sequence[Row], targets: Sequence[str]) -> Figure | None:
    rows = [row for row in _of(rows, "arrivals") if row.get("offered")]
    if not (here := [target for target in targets if any(row["target"] == target for row in rows)]):
        return None
    figure, (above, below) = _figure(4.8, 2, len(here), sharex="col", height_ratios=[3, 1.2])
    for column, target in enumerate(here):
        mine = [row for row in rows if row["target"] == target]
        for (_, contender, _), line in _series(mine, "offered").items():
            x = [row["offered"] for row in line]
            for key, style in ("p95_ms", "-"), ("p50_ms", ":"):
                above[column].plot(x, [row[key] for row in line], style, **_look(contender))
            below[column].plot(x, [100 * refused_share(row) for row in line], "-", **_look(contender))
        _scale(above[column], [row[key] for row in mine for key in ("p50_ms", "p95_ms")])
        largest = max(100 * refused_share(row) for row in mine)
        below[column].set(ylim=(0, max(5, largest * 1.15)), xlabel="clips/s that arrive")
        if capacities := [row["offered"] / row["share"] for row in mine if row.get("share")]:
            capacity = sorted(capacities)[len(capacities) // 2]
            for axes in above[column], below[column]:
                axes.axvline(capacity, color=INK, linewidth=1, linestyle=(0, (5, 3)))
            above[column].annotate(
                "capacity ",
                (capacity, 1),
                xycoords=("data", "axes fraction"),
                ha="right",
                va="top",
                color=INK,
            )
        above[column].set_xlim(0, max([row["offered"] for row in mine] + capacities) * 1.06)
        below[column].xaxis.set_major_formatter("{x:,.10g}")
        above[column].set_title(target if len(here) > 1 else "")
    above[0].set_ylabel("latency, ms")
    below[0].set_ylabel("refused, %")
    figure.align_ylabels([above[0], below[0]])
    _legend(figure, rows, targets, {"p95": {"color": INK}, "p50": {"color": INK, "linestyle": ":"}})
    return figure


def refused_share(row: Row) -> float:
    """Of all requests of a row, the share that was refused, 0 to 1."""
    refused = row.get("refused") or 0
    total = (row.get("requests") or 0) + (row.get("wrong") or 0) + refused + sum((row.get("errors") or {}).values())
    return float(refused / total) if total else 0.0


def _ramp(rows: Sequence[Row], targets: Sequence[str]) -> Figure | None:
    rows = [row for row in rows if row["scenario"] == "ramp" and row.get("windows")]
    if not rows:
        return None
    figure, lines = _figure(5.2, 3, sharex=True, height_ratios=[1, 1.5, 1.5])
    labels = {"users": "clients", "clips_per_s": "clips/s", "p95_ms": "p95 latency, ms"}
    for [axes], (key, label) in zip(lines, labels.items(), strict=True):
        values = []
        for row in rows:
            good = [(window["t"], window[key]) for window in row["windows"] if window.get(key) is not None]
            values += [value for _, value in good if value]
            look = _look(row["contender"]) | {"marker": ""}
            style = _style(row["target"], targets)
            axes.plot(
                [t for t, _ in good],
                [v for _, v in good],
                style,
                drawstyle="steps-mid" if key == "users" else None,
                **look,
            )
        _scale(axes, values)
        axes.set_ylabel(label)
    lines[-1][0].set(xlabel="time, s", xlim=(0, None))
    figure.align_ylabels([axes for [axes] in lines])
    _legend(figure, rows, targets)
    return figure


def _resources(rows: Sequence[Row], targets: Sequence[str]) -> Figure | None:
    """Over the measured time of all rows, one after the other; the scenarios are told apart by bands."""
    gpu, cpu = ("gpu", "gpu_memory_mb"), ("cpu", "memory_mb")
    names = {
        "gpu": "GPU busy, %",
        "gpu_memory_mb": "GPU memory, MB",
        "cpu": "CPU busy, %",
        "memory_mb": "memory used, MB",
    }
    sampled = [row for row in rows if row.get("samples")]
    panels: list[tuple[str, str]] = []  # target, key
    for target in targets:
        samples = [sample for row in sampled if row["target"] == target for sample in row["samples"]]
        have = {key for sample in samples for key, value in sample.items() if value is not None}
        panels += [(target, key) for key in (gpu if have & set(gpu) else cpu) if key in have]
    if not panels:
        return None
    figure, lines = _figure(1.2 + 1.5 * len(panels), len(panels))
    several = len({target for target, _ in panels}) > 1
    for number, ([axes], (target, key)) in enumerate(zip(lines, panels, strict=True)):
        first = number == 0 or panels[number - 1][0] != target
        _over_time(axes, [row for row in sampled if row["target"] == target], key, first)
        axes.set_ylabel(f"{target}: {names[key]}" if several else names[key], fontsize=8.5 if several else None)
    lines[-1][0].set_xlabel("measured time, s: all rows one after the other")
    figure.align_ylabels([axes for [axes] in lines])
    _legend(figure, sampled, targets[:1])
    return figure


def _over_time(axes: Axes, rows: Sequence[Row], key: str, names: bool) -> None:
    """One figure of the samples of a target's rows, each row in its contender's colour; with the scenarios' names."""
    percent = 100 if key in ("gpu", "cpu") else 1
    begin, largest = 0.0, 0.0
    starts: dict[str, float] = {}
    order = list(dict.fromkeys(row["scenario"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["scenario"])):
        starts.setdefault(row["scenario"], begin)
        samples = sorted(row["samples"], key=lambda sample: float(sample["t"]))
        good = [sample for sample in samples if sample.get(key) is not None]
        values = [percent * sample[key] for sample in good]
        look = _look(row["contender"]) | {"marker": "" if len(good) > 1 else "."}
        axes.plot([begin + sample["t"] for sample in good], values, **look, linewidth=1.2)
        largest = max([largest, *values])
        begin += max(samples[-1]["t"], row.get("duration_s") or 0)
    for number, (scenario, start) in enumerate(starts.items()):
        end = [*starts.values(), begin][number + 1]
        if number % 2:
            axes.axvspan(start, end, color=INK, alpha=0.06, linewidth=0)
        if names:
            above = 2 if end - start > 0.07 * begin else 11  # points: a narrow one has no room beside the next
            place: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "ha": "center",
            }
            axes.annotate(scenario, ((start + end) / 2, 1), (0, above), fontsize=8, annotation_clip=False, **place)
    axes.set(xlim=(0, begin or 1), ylim=(0, 105 if percent == 100 else (largest or 1) * 1.15))
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.grid(axis="x", visible=False)
