"""The report of a load test: `python -m loadtest report RESULT.json`, a page of HTML, Markdown and plots.

The results of several machines, a CPU's and a GPU's say, make one report if they are given together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report_page import Block, Cell, Heading, Plot, Points, Row, Table, Text, Value, draw, markdown, page, save

KIND = "load"  # of the JSON that `python -m loadtest run` writes
OURS, ALONE, PADDED, IN_PROCESS = "ours", "one at a time", "padded batches", "in process"
CONTENDERS = {
    OURS: "clips of every length in one batch, without padding",
    ALONE: "SpeechBrain's model on the same Triton, each clip alone",
    PADDED: "SpeechBrain's model on the same Triton, batches padded to their longest clip",
    IN_PROCESS: "the same model file as ours, run by ONNX Runtime in the process of the measurement, without a server",
}
FEW = 5  # requests of a row
BUSY = 0.9  # of a core: above it the load generator may be what limits
MEASURED = "not measured"
CPU, GPU = "CPU", "GPU"
SCENARIOS = {  # title, and what happens in it
    "single": ("One client", "One client sends one clip, waits for the embedding and sends the next."),
    "batch": ("Batches", "One client sends requests of several clips; latency is of the whole request."),
    "mixed": ("Mixed lengths", "Every client sends clips whose lengths are drawn from the mix, each alone."),
    "clients": ("More clients", "Every client sends one clip at a time, and the next as soon as it has the reply."),
    "arrivals": (
        "Arrivals",
        "Clips of the mix arrive at a constant rate, whether or not earlier ones are answered. "
        "Capacity is what ours reached there with mixed lengths in the closed loop, unless the command gives it.",
    ),
    "ramp": ("Rising load", "The number of clients rises during the measurement; clips of the mix."),
}
CAPTIONS = {
    "latency": "Latency over the length of the clip: p50, and p95 at the end of the whisker.",
    "batch": "Clips per second over the number of clips in a request.",
    "clients": "Clips per second and p95 latency over the number of clients.",
    "arrivals": "Latency and refused requests over the rate at which clips arrive.",
    "ramp": "Clients, clips per second and p95 latency over time.",
    "resources": "Load and memory over the measured time, by contender.",
}
EXPECTED = {range(1, 2): (5, 10), range(8, 33): (10, 32)}  # GPU against CPU, by clips in a request
COMPARED = ("single", 5.0, 1, 1), ("batch", 2.0, 8, 1), ("batch", 2.0, 32, 1)  # CPU and GPU, measured or not


class ReportError(Exception):
    """No report can be made of what was given; the message says why and what to do."""


def run(options: argparse.Namespace) -> None:
    """Write the report of `options.results` into `options.out`, or beside the first, and print the paths.

    Raises:
        ReportError: a file cannot be read, or is not what `python -m loadtest run` writes.
    """
    results: list[Path] = options.results
    reports = [read(path) for path in results]
    name = results[0].stem
    if len(results) == 2:
        name += f"-and-{results[1].stem}"
    elif len(results) > 2:
        name += f"-and-{len(results) - 1}-more"
    try:
        paths = write(reports, options.out or results[0].parent, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ReportError(f"{', '.join(map(str, results))}: not whole ({what}): measure again") from error
    for path in paths:
        print(f"wrote {path}")


def read(path: Path) -> Row:
    """The result in a file; its name is added under "name".

    Raises:
        ReportError: it cannot be read, or is not what `python -m loadtest run` writes.
    """
    advice = "give the NAME.json that `python -m loadtest run` wrote"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}): {advice}") from error
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}): {advice}") from error
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind != KIND:
        what = "no result of a load test" if kind is None else f'of kind "{kind}"'
        raise ReportError(f'{path}: {what}, expected kind "{KIND}": {advice}')
    return {**found, "name": path.stem}


def write(reports: list[Row], folder: Path, name: str) -> list[Path]:
    """Write NAME.html, NAME.md and the plots NAME-PLOT.png into `folder`, which is made if need be; their paths.

    Args:
        reports: What `python -m loadtest run` measured, on one machine or several, all of it or not.
        folder: For all files.
        name: Of the files, without suffix; of the raw figures too, where a report has no "name".
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = Measured.of(reports, name)
    drawn = importlib.util.find_spec("matplotlib") is not None
    plots = draw(measured.rows, [target["name"] for target in measured.targets]) if drawn else {}
    blocks = _blocks(measured, list(plots))
    if not drawn:
        blocks.insert(0, Text("No plots: matplotlib is not installed (pip install -e '.[loadtest]')."))
    title = _title(reports)
    paths = [folder / f"{name}.html", folder / f"{name}.md"]
    paths[0].write_text(page(title, blocks, plots), encoding="utf-8")
    paths[1].write_text(markdown(title, blocks, name), encoding="utf-8")
    for plot, figure in plots.items():
        paths.append(folder / f"{name}-{plot}.png")
        save(figure, paths[-1])
    return paths


def summary(reports: list[Row]) -> str:
    """What came out, in a few lines for a terminal: warnings, ratios, goals."""
    measured = Measured.of(reports)
    lines = [f"! {text}" for text in warnings(measured)]
    lines += verdicts(measured)
    judged = goals(measured)
    wide = max(len(goal.verdict) for goal in judged)
    lines += [f"{goal.verdict:{wide}}  {goal.name}" + (f": {goal.found}" if goal.found else "") for goal in judged]
    return "\n".join(lines)


@dataclass(frozen=True)
class Measured:
    """All that was measured, in one or several reports.

    Attributes:
        reports: As they came; each has a "name".
        targets: Of all reports, each with a "name" that no other has.
        rows: Those with figures, each with the name of its target.
        failed: Those without.
        agreement: Of all reports, with the names of the targets.
        missing: Why there is nothing of a target, for those that no report has.
    """

    reports: list[Row]
    targets: list[Row]
    rows: list[Row]
    failed: list[Row]
    agreement: list[Row]
    missing: dict[str, str]

    @classmethod
    def of(cls, reports: list[Row], name: str = "") -> Measured:
        """Put reports together; a target of a name that several have gets the number of its report."""
        taken = Counter(target["name"] for report in reports for target in report["targets"])
        targets, rows, agreement = [], [], []
        missing: dict[str, str] = {}
        for number, report in enumerate(reports, 1):
            names = {
                target["name"]: f"{target['name']} ({number})" if taken[target["name"]] > 1 else target["name"]
                for target in report["targets"]
            }
            targets += [{**target, "name": names[target["name"]]} for target in report["targets"]]
            rows += [{**row, "target": names.get(row["target"], row["target"])} for row in report["rows"]]
            for found in report.get("agreement") or []:
                parts = {key: found[key].partition("/") for key in ("a", "b")}
                agreement.append({**found, **{k: f"{names.get(a, a)}{s}{b}" for k, (a, s, b) in parts.items()}})
            missing |= report.get("not_measured") or {}
        present = {row["target"] for row in rows if not row.get("failed")}
        devices = {(target.get("device") or "").lower() for target in targets if target["name"] in present}
        return cls(
            [{**report, "name": report.get("name") or name} for report in reports],
            targets,
            [row for row in rows if not row.get("failed")],
            [row for row in rows if row.get("failed")],
            agreement,
            {key: why for key, why in missing.items() if key not in present and key.lower() not in devices},
        )

    def on(self, device: str) -> list[str]:
        """Targets of a device that have figures."""
        have = {row["target"] for row in self.rows}
        return [t["name"] for t in self.targets if t.get("device") == device and t["name"] in have]

    def select(self, contender: str, scenario: str | None = None, **values: Any) -> list[Row]:
        """Rows of a contender with these values."""
        return [
            row
            for row in self.rows
            if row["contender"] == contender
            and scenario in (None, row["scenario"])
            and all(row.get(key) == value for key, value in values.items())
        ]

    def other(self, row: Row, contender: str) -> Row | None:
        """What another contender did on the same target with the same load."""
        found = [
            other
            for other in self.rows
            if other["contender"] == contender and other["target"] == row["target"] and _same_load(other, row)
        ]
        found.sort(key=lambda other: other.get("model") != row.get("model"))
        return found[0] if found else None


def _same_load(one: Row, other: Row) -> bool:
    keys = ["scenario", "seconds", "batch", "share", "offered"]
    if IN_PROCESS not in (one["contender"], other["contender"]):
        keys.append("users")
    return all(one.get(key) == other.get(key) for key in keys)


def ratio(row: Row, base: Row) -> float | None:
    """Speed of one row over that of another, in seconds of audio/s: the median over the rounds of each round's ratio.

    Rounds are interleaved, so what slows the machine down slows both. Where their numbers differ, the ratio of the
    medians; None where there is nothing to divide by.
    """
    ours, theirs = ([part.get("audio_per_s") for part in of.get("per_round") or []] for of in (row, base))
    if ours and len(ours) == len(theirs) and None not in ours and all(theirs):
        return float(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)))
    return _quotient(row.get("audio_per_s"), base.get("audio_per_s"))


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _title(reports: list[Row]) -> str:
    dates = sorted({report["date"][:10] for report in reports})
    return f"Load test of ECAPA-TDNN on Triton, {' and '.join(dates)}"


def _blocks(measured: Measured, plots: list[str]) -> list[Block]:
    blocks: list[Block] = [Points(verdicts(measured))]
    if found := warnings(measured):
        blocks.append(Points(found, "Warnings"))
    blocks += [Heading("Conditions"), _conditions(measured)]
    blocks += [Heading("Servers and their models"), *_targets(measured)]
    drawn = {"single": "latency", "batch": "batch", "clients": "clients", "arrivals": "arrivals", "ramp": "ramp"}
    for scenario in SCENARIOS:
        blocks += _scenario(measured, scenario, drawn.get(scenario, "") if drawn.get(scenario) in plots else "")
    if "resources" in plots:
        blocks += [Heading("Load and memory"), Plot("resources", CAPTIONS["resources"])]
    blocks += [Heading("Agreement of the embeddings"), *_agreement(measured)]
    blocks += [Heading("CPU against GPU"), *_devices(measured)]
    blocks += [Heading("Goals"), _goals_table(measured)]
    return [*blocks, Heading("What this does not show"), Text(_limits(measured))]


def verdicts(measured: Measured) -> list[str]:
    """One sentence for each comparison."""
    lines = []
    for target in (target["name"] for target in measured.targets):
        ours = [row for row in measured.rows if row["target"] == target and row["contender"] == OURS]
        for contender in (ALONE, PADDED, IN_PROCESS):
            pairs = [(row, measured.other(row, contender)) for row in ours]
            lines.append(_verdict(target, contender, [(row, base) for row, base in pairs if base is not None]))
    for cpu, gpu in _pairs(measured):
        if cpu is None or gpu is None:
            lines.append(f"GPU against CPU: {MEASURED}{_why(measured, GPU if gpu is None else CPU)}.")
            continue
        speed_ups = [value for *_, value in _compared(measured, cpu, gpu) if value is not None]
        words = f"{_span(speed_ups)} times the speed of the CPU" if speed_ups else MEASURED
        lines.append(f"{_against(cpu, gpu)}: {words}.")
    wrong, replies = _replies(measured)
    lines.append(f"Wrong replies: {wrong:,} of {replies:,}." if replies else "No reply was measured.")
    return lines


def _verdict(target: str, contender: str, pairs: list[tuple[Row, Row]]) -> str:
    ratios = [(row, value) for row, base in pairs if (value := ratio(row, base)) is not None]
    if not ratios:
        return f"{target}, ours against {contender}: {MEASURED}."
    span = _span([value for _, value in ratios])
    if contender == IN_PROCESS:
        return f"{target}: the server keeps {span} of the speed of the same model in process."
    both = [(row["p95_ms"], base["p95_ms"]) for row, base in pairs if _has(row, "p95_ms") and _has(base, "p95_ms")]
    lower = sum(a < b for a, b in both)
    text = f"{target}: ours has {span} times the speed of {contender}"
    text += f", more in {sum(value > 1 for _, value in ratios)} of {len(ratios)} settings"
    text += f", with the lower p95 in {lower} of {len(both)}" if both else ""
    if slower := sorted((value, f"{_setting(row)} ({_times(value)})") for row, value in ratios if value < 1):
        more = f" and {len(slower) - 3} more" if len(slower) > 3 else ""
        text += f"; it is slower with {', '.join(words for _, words in slower[:3])}{more}"
    return f"{text}."


def warnings(measured: Measured) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    wrong, replies = _replies(measured)
    if wrong:
        rows = [row for row in measured.rows if row.get("wrong")]
        where = "; ".join(f"{row['wrong']:,} of {_where(row)}" for row in rows[:5])
        where += "; and others" if len(rows) > 5 else ""
        found.append(f"{wrong:,} of {replies:,} replies were WRONG, not the embedding of the clip: {where}.")
    for report in measured.reports:
        if report.get("interrupted"):
            which = f" ({report['name']})" if len(measured.reports) > 1 else ""
            found.append(f"Interrupted{which}: what follows is not all that was asked for.")
    if not measured.rows:
        found.append("Nothing was measured: no row has figures.")
    busy = [row for row in measured.rows if _busy(row)]
    if busy:
        most = max(busy, key=lambda row: row["generator_cpu"])
        found.append(
            f"In {_count(len(busy), 'row')} the load generator was the limit: use --processes. It was busy for up to "
            f"{_percent(most['generator_cpu'])} of a core ({_where(most)}); the server may be faster than that."
        )
    few = [row for row in measured.rows if (row.get("requests") or 0) < FEW and not row.get("wrong")]
    if few:
        found.append(
            f"In {_count(len(few), 'row')} fewer than {FEW} requests were answered within the measured time, so their "
            "percentiles mean little: use --seconds."
        )
    found += [f"Failed: {_where(row)}: {row['failed']}" for row in measured.failed]
    found += [f"Not measured: {target}: {why}" for target, why in measured.missing.items()]
    for row in measured.agreement:
        if (bound := _bound(measured, row)) is not None and row["error"] > bound:
            found.append(f"{row['a']} and {row['b']} differ by {_tiny(row['error'])}, {_tiny(bound)} is allowed.")
    return found


def _busy(row: Row) -> bool:
    return bool(row["contender"] != IN_PROCESS and (row.get("generator_cpu") or 0) > BUSY)


def _replies(measured: Measured) -> tuple[int, int]:
    """Wrong replies, and all of them."""
    wrong = sum(row.get("wrong") or 0 for row in measured.rows)
    return wrong, wrong + sum(row.get("requests") or 0 for row in measured.rows)


def _conditions(measured: Measured) -> Table:
    several = len(measured.reports) > 1
    head = ["", *(f"{n}: {report['name']}" for n, report in enumerate(measured.reports, 1))] if several else ["", ""]
    columns = [_facts(measured, report) for report in measured.reports]
    keys = dict.fromkeys(key for column in columns for key in column)
    groups = [(key, [[column.get(key) for column in columns]]) for key in keys]
    return Table(head, groups, left=len(head))


def _facts(measured: Measured, report: Row) -> dict[str, Value]:
    conditions = report["conditions"]
    here = {row["contender"] for row in report["rows"]}
    loops = {row.get("loop") for row in report["rows"]}
    mix = conditions.get("mix") or {}
    total = sum(mix.values())
    turns = [(row["duration_s"], len(row["per_round"])) for row in report["rows"] if row.get("per_round")]
    lengths = [seconds / count for seconds, count in turns] or [conditions.get("seconds") or 0.0]
    rounds = [count for _, count in turns] or [conditions.get("rounds") or 1]
    measures = f"{_range(lengths)} s for each row"
    if max(rounds) > 1:
        measures += f" in each of {_range(rounds)} rounds, all contenders in turn within each"
    words = {
        "closed": "closed: each client sends again when it has the reply",
        "open": "open: requests are sent at their scheduled times, and latency counts from then",
    }
    files = [
        f"{target['name']}/{name}, {model.get('file') or 'file unknown'}: {model['sha256']}"
        for target in report["targets"]
        for name, model in (target.get("models") or {}).items()
        if model.get("sha256")
    ]
    bounds = ", ".join(f"{_tiny(bound)} for {name}" for name, bound in (conditions.get("bound") or {}).items())
    facts: dict[str, Value] = {
        "date": report["date"],
        "machine": f"{report.get('cpu') or 'unknown'}, {_count(report.get('cores') or 0, 'core')}",
        "commit": Cell(report["commit"], "code") if report.get("commit") else "unknown",
        "command": Cell(report.get("command") or "", "code") if report.get("command") else "unknown",
        "versions": ", ".join(
            [f"Python {report.get('python') or 'unknown'}"]
            + [f"{name} {version}" for name, version in (report.get("packages") or {}).items()]
        ),
        "model": conditions.get("source") or "unknown (the servers are not ours to look into)",
        "SHA-256 of the weights": "; ".join(files) or "unknown",
        "clips": conditions.get("clips") or "unknown",
        "mix": ", ".join(f"{length} s {_percent(share / total)}" for length, share in mix.items()) if total else None,
        "warm-up": f"{_plus(conditions.get('warm_up_s'), 's')} before each, whose latencies do not count",
        "measured": measures,
        "loop": "; ".join(words[kind] for kind in ("closed", "open") if kind in loops) or MEASURED,
        "load generator": f"{_count(conditions.get('processes') or 1, 'process', 'processes')}, on the machine above",
        "contenders": "; ".join(f"{name}: {CONTENDERS.get(name, 'other')}" for name in _ordered(here)) or MEASURED,
        "every reply is compared with": f"{conditions.get('references') or 'unknown'}"
        + (f"; largest relative L2 error allowed: {bounds}" if bounds else "")
        + (f". Of {PADDED} only shape and finiteness are judged: padding moves embeddings" if PADDED in here else ""),
        "took": f"{report['took_s']:,.0f} s" if _has(report, "took_s") else None,
        "raw figures": Cell(f"{report['name']}.json, {report['name']}.csv", "code") if report["name"] else None,
    }
    return facts


def _ordered(contenders: set[str]) -> list[str]:
    return [*(name for name in CONTENDERS if name in contenders), *sorted(contenders - set(CONTENDERS))]


def _targets(measured: Measured) -> list[Block]:
    if not measured.targets:
        return [Text(f"{MEASURED.capitalize()}.")]
    servers, models = [], []
    for target in measured.targets:
        gpus = [
            " ".join(str(value) for value in gpu.values()) if isinstance(gpu, dict) else str(gpu)
            for gpu in target.get("gpus") or []
        ]
        local = "this machine" if target.get("local") else "elsewhere"
        limit = target.get("max_requests")
        cells: list[Value] = [target.get("url"), local, target.get("device") or "unknown", target.get("chosen") or None]
        cells += [target.get("server_version") or None, ", ".join(gpus) or None, f"{limit:,}" if limit else None]
        servers.append((target["name"], [cells]))
        rows: list[list[Value]] = []
        for name, model in (target.get("models") or {}).items():
            largest = model.get("max_batch")
            sha = model.get("sha256")
            rows.append(
                [name, *(model.get(key) or None for key in ("contender", "backend", "file"))]
                + [", ".join(map(str, model.get("instances") or [])) or None, model.get("precision") or None]
                + [Cell(sha[:12], "code") if sha else None]
                + [f"{largest:,}" if largest else None]
            )
        models.append((target["name"], rows))
    head = ["server", "URL", "where", "device", "why", "Triton", "GPUs", "requests at once, at most"]
    blocks: list[Block] = [Table(head, servers, left=7)]
    head = ["server", "model", "contender", "backend", "file", "instances", "precision", "SHA-256 of the weights"]
    head += ["largest batch"]
    if models := [(label, rows) for label, rows in models if rows]:
        blocks.append(Table(head, models, left=8))
    return blocks


def _scenario(measured: Measured, scenario: str, plot: str) -> list[Block]:
    rows = [row for row in measured.rows + measured.failed if row["scenario"] == scenario]
    if not rows:
        return []
    title, words = SCENARIOS[scenario]
    blocks: list[Block] = [Heading(title), Text(words)]
    blocks += [Plot(plot, CAPTIONS[plot])] if plot else []
    served = {row["contender"] for row in rows} - {IN_PROCESS}
    several = len({target["name"] for target in measured.targets}) > 1
    columns = _columns(measured, rows)
    groups = []
    for group in _groups(measured, rows):
        label = _level(group[0]) if not several else f"{group[0]['target']}: {_level(group[0])}"
        groups.append((label, [_line(row, group, columns) for row in group]))
    blocks.append(Table(["setting", "contender", *(column.title for column in columns)], groups, left=2))
    notes = ["Bold: the best of those that are served, of each setting."] if len(served) > 1 else []
    if any(column.base for column in columns):
        notes.append(
            "Ratios are of seconds of audio/s, above 1 is faster: medians over the rounds of the ratio within a round."
        )
    usual = {target["name"]: target.get("max_requests") for target in measured.targets}
    for target, limit in {(row["target"], row.get("max_requests")): None for row in rows}:
        if limit and limit != usual.get(target):
            notes.append(f"On {target} {_count(limit, 'request')} at once were taken here, the rest refused.")
    errors = [
        f"{_where(row)}: {', '.join(f'{count:,} x {message}' for message, count in row['errors'].items())}"
        for row in rows
        if row.get("errors")
    ]
    blocks += [Text(" ".join(notes))] if notes else []
    blocks += [Text("Failed requests:"), Points(errors)] if errors else []
    return blocks


@dataclass(frozen=True)
class Column:
    """Of a scenario's table: how a row's figure is found and written, and which is best: max, min or neither."""

    title: str
    value: Callable[[Row], float | None]
    text: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None
    base: str = ""  # contender that a ratio divides by
    bad: Callable[[Row], bool] = lambda row: False


def _columns(measured: Measured, rows: list[Row]) -> list[Column]:
    def of(key: str) -> Callable[[Row], float | None]:
        return lambda row: row.get(key)

    def against(contender: str) -> Callable[[Row], float | None]:
        def value(row: Row) -> float | None:
            base = None if row.get("failed") else measured.other(row, contender)
            return None if base is None else 1.0 if row["contender"] == contender else ratio(row, base)

        return value

    columns = [
        Column("clips/s", of("clips_per_s"), _number, max),
        Column("s of audio/s", of("audio_per_s"), _number, max),
        *(Column(f"p{n}, ms", of(f"p{n}_ms"), _number, min) for n in (50, 90, 95, 99)),
        Column("ratio to one at a time", against(ALONE), _times, base=ALONE),
        Column("ratio to padded batches", against(PADDED), _times, base=PADDED),
        Column("mean batch", of("mean_batch"), _number),
        Column("queue, ms", of("queue_ms"), _number),
        Column("compute, ms", of("compute_ms"), _number),
        Column("refused", of("refused"), "{:,.0f}".format),
        Column("failed", lambda row: None if row.get("failed") else _errors(row), "{:,.0f}".format),
        Column("wrong", of("wrong"), "{:,.0f}".format, bad=lambda row: bool(row.get("wrong"))),
        Column("generator, of a core", of("generator_cpu"), _percent, bad=_busy),
    ]
    there = {row["contender"] for row in rows}
    return [column for column in columns if not column.base or {column.base} < there]


def _errors(row: Row) -> int:
    return sum((row.get("errors") or {}).values())


def _line(row: Row, group: list[Row], columns: list[Column]) -> list[Value]:
    """Contender and figures of a row; the best of its group are bold."""
    models = {other.get("model") for other in group if other["contender"] == row["contender"]}
    name = f"{row['contender']} ({row.get('model')})" if len(models) > 1 else row["contender"]
    if row.get("failed"):
        return [name, Cell("failed", "bad"), *[None] * (len(columns) - 1)]
    served = [other for other in group if other["contender"] != IN_PROCESS and not other.get("failed")]
    cells: list[Value] = [name]
    for column in columns:
        value = column.value(row)
        if value is None:
            cells.append(None)
            continue
        others = [found for other in served if (found := column.value(other)) is not None]
        best = column.best is not None and len(others) > 1 and row in served and value == column.best(others)
        text = column.text(value)
        cells.append(Cell(text, "bad") if column.bad(row) else Cell(text, "strong") if best else text)
    return cells


def _groups(measured: Measured, rows: list[Row]) -> list[list[Row]]:
    """Rows of the same load on the same target, ours first; those in process beside the first that fits."""
    order = {target["name"]: number for number, target in enumerate(measured.targets)}
    names = _ordered({row["contender"] for row in rows})

    def place(row: Row) -> tuple[Any, ...]:
        return order.get(row["target"], 0), *_size(row)

    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row["contender"] == IN_PROCESS, place(row))):
        for group in groups:
            if group[0]["target"] == row["target"] and _same_load(group[0], row):
                group.append(row)
                break
        else:
            groups.append([row])
    groups.sort(key=lambda group: place(group[0]))
    return [sorted(group, key=lambda row: names.index(row["contender"])) for group in groups]


def _size(row: Row) -> tuple[float, ...]:
    return tuple(row.get(key) or 0 for key in ("seconds", "batch", "users", "offered"))


def _level(row: Row) -> str:
    """The load of a row within its scenario, in words."""
    seconds, users, batch = row.get("seconds"), row.get("users"), row.get("batch") or 1
    clips = "mixed clips" if seconds is None else f"{seconds:g} s clips"
    clients = f", {_count(users, 'client')}" if users and (users > 1 or row["scenario"] != "single") else ""
    match row["scenario"]:
        case "batch":
            return f"{batch} x {seconds:g} s" if seconds is not None else f"{batch} mixed clips"
        case "clients" if users:
            return f"{_count(users, 'client')}, {clips}"
        case "arrivals":
            rate = f"{_number(row['offered'])} clips/s" if row.get("offered") else "unknown rate"
            return f"{row['share']:g} of capacity, {rate}" if row.get("share") else rate
        case "ramp":
            most = [window["users"] for window in row.get("windows") or [] if window.get("users")]
            return f"{min(most):g} to {max(most):g} clients, {clips}" if most else clips
    return f"{clips}{clients}"


def _setting(row: Row) -> str:
    title = SCENARIOS[row["scenario"]][0].lower()
    return f"{title}: {_level(row)}"


def _where(row: Row) -> str:
    return f"{row['target']}, {row['contender']}, {_setting(row)}"


def _bound(measured: Measured, row: Row) -> float | None:
    """The largest relative L2 error that the less precise of two models may have; of float32 if that is unknown."""
    bounds: dict[str, float] = {}
    for report in measured.reports:
        bounds |= report["conditions"].get("bound") or {}
    models = {
        f"{target['name']}/{name}": model.get("precision")
        for target in measured.targets
        for name, model in (target.get("models") or {}).items()
    }
    half = "fp16" in (models.get(row["a"]), models.get(row["b"]))
    return bounds.get("fp16" if half else "fp32")


def _agreement(measured: Measured) -> list[Block]:
    groups: list[tuple[Value, list[list[Value]]]] = []
    both = False
    devices = {target["name"]: target.get("device") for target in measured.targets}
    for row in measured.agreement:
        bound = _bound(measured, row)
        fits = None if bound is None else row["error"] <= bound
        sides = {devices.get(row[key].partition("/")[0]) for key in ("a", "b")}
        both |= sides >= {CPU, GPU}
        cells: list[Value] = [row["b"], f"{row['clips']:,}" if row.get("clips") else None, f"{row['cosine']:.12g}"]
        cells += [_tiny(row["error"]), _tiny(bound) if bound is not None else None]
        cells.append({True: Cell("yes", "good"), False: Cell("no", "bad"), None: None}[fits])
        groups.append((row["a"], [cells]))
    if not both:
        groups.append(("a GPU", [["a CPU", *[Cell(MEASURED, "none")] * 3, None, None]]))
    head = [
        "embeddings of",
        "compared with",
        "clips",
        "smallest cosine",
        "largest relative L2 error",
        "allowed",
        "within",
    ]
    blocks: list[Block] = [Table(head, groups, left=2)]
    furthest: dict[str, float] = {}
    for row in measured.rows:
        if row.get("worst_error") is not None:
            name = f"{row['target']}, {row['contender']}"
            furthest[name] = max(furthest.get(name, 0.0), row["worst_error"])
    if furthest:
        words = "; ".join(f"{name}: {_tiny(error)}" for name, error in furthest.items())
        blocks.append(Text(f"Under load, the furthest reply that counted as right, as relative L2 error: {words}."))
    return blocks


def _pairs(measured: Measured) -> list[tuple[str | None, str | None]]:
    """Every CPU with every GPU; None for a side that was not measured."""
    none: list[str | None] = [None]
    return [(cpu, gpu) for cpu in measured.on(CPU) or none for gpu in measured.on(GPU) or none]


def _against(cpu: str, gpu: str) -> str:
    return "GPU against CPU" if {cpu.lower(), gpu.lower()} == {"cpu", "gpu"} else f"{gpu} (GPU) against {cpu} (CPU)"


def _why(measured: Measured, device: str) -> str:
    """Why a device was not measured, in brackets, if that is known."""
    whys = [why for name, why in measured.missing.items() if name.lower() == device.lower()]
    return f" ({device}: {whys[0]})" if whys else f" (no figures of a {device})"


def _compared(
    measured: Measured, cpu: str | None, gpu: str | None
) -> list[tuple[Row, Row | None, Row | None, float | None]]:
    """Of each load: a row that stands for it, what ours did on the CPU and on the GPU, and the speed-up."""
    sides = [
        [r for r in measured.select(OURS, target=side) if r["scenario"] not in ("arrivals", "ramp")] if side else []
        for side in (cpu, gpu)
    ]
    loads: list[Row] = [
        {"target": "", "contender": OURS, "scenario": scenario, "seconds": seconds, "batch": batch, "users": users}
        for scenario, seconds, batch, users in COMPARED
    ]
    for row in sides[0] + sides[1]:
        if not any(_same_load(row, load) for load in loads):
            loads.append(row)
    loads.sort(key=lambda row: (list(SCENARIOS).index(row["scenario"]), *_size(row)))
    found = []
    for load in loads:
        one, other = (next((row for row in side if _same_load(row, load)), None) for side in sides)
        faster = _quotient(other.get("audio_per_s"), one.get("audio_per_s")) if one and other else None
        found.append((load, one, other, faster))
    return found


def _devices(measured: Measured) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "Ours on both. Expected is what the original service promised of a GPU against a CPU: 5 to 10 times for "
            "one clip, 10 to 32 times for batches of 8 to 32."
        )
    ]
    pairs = _pairs(measured)
    for cpu, gpu in pairs:
        if len(pairs) > 1 and cpu and gpu:
            blocks.append(Text(f"{_against(cpu, gpu)}:"))
        groups: list[tuple[Value, list[list[Value]]]] = []
        for load, one, other, faster in _compared(measured, cpu, gpu):
            size = (load.get("batch") or 1) if load["scenario"] in ("single", "batch") else 0
            expected = next((times for sizes, times in EXPECTED.items() if size in sizes), None)
            cells: list[Value] = [_figure(row, key) for key in ("clips_per_s", "p95_ms") for row in (one, other)]
            cells.append(Cell(MEASURED, "none") if faster is None else _times(faster))
            cells.append(f"{expected[0]} to {expected[1]}" if expected else None)
            cells.append(_as_expected(faster, expected) if expected else None)
            groups.append((_setting(load), [cells]))
        head = ["ours", "CPU, clips/s", "GPU, clips/s", "CPU, p95 in ms", "GPU, p95 in ms", "GPU / CPU"]
        blocks.append(Table([*head, "expected", ""], groups))
    return blocks


def _figure(row: Row | None, key: str) -> Value:
    return _number(row[key]) if row is not None and _has(row, key) else Cell(MEASURED, "none")


def _as_expected(value: float | None, expected: tuple[int, int]) -> Value:
    if value is None:
        return Cell(MEASURED, "none")
    if value < expected[0]:
        return Cell("below", "bad")
    return Cell("above" if value > expected[1] else "as expected", "good")


@dataclass(frozen=True)
class Goal:
    """A goal, what was found, and "reached", "not reached" or "not measured"."""

    name: str
    found: str
    verdict: str


def goals(measured: Measured) -> list[Goal]:
    """Every goal and what became of it; the worst figure decides, and none counts as reached if a part is missing."""
    cpus, gpus = measured.on(CPU), measured.on(GPU)
    every = [target["name"] for target in measured.targets]
    five, mixed = {"scenario": "single", "seconds": 5.0, "batch": 1, "users": 1}, {"scenario": "mixed"}
    sixteen = mixed | {"users": 16}

    def ratios(targets: list[str], contender: str, **load: Any) -> list[tuple[str, float]]:
        rows = [row for target in targets for row in measured.select(OURS, target=target, **load)]
        pairs = [(row, measured.other(row, contender)) for row in rows]
        found = [(row, ratio(row, base)) for row, base in pairs if base is not None]
        return [(f"{row['target']}, {_level(row)}", value) for row, value in found if value is not None]

    def tails(contender: str, **load: Any) -> list[tuple[str, float]]:
        rows = [row for target in cpus for row in measured.select(OURS, target=target, **load)]
        pairs = [(row, base) for row in rows if (base := measured.other(row, contender)) and base.get("p95_ms")]
        return [
            (f"{row['target']}, {_level(row)}, {contender}", (row.get("p95_ms") or math.inf) / base["p95_ms"])
            for row, base in pairs
        ]

    many = [
        found
        for target in gpus
        for row in measured.select(OURS, "clients", target=target)
        if (row.get("users") or 0) >= 64
        for found in ratios([target], ALONE, scenario="clients", users=row["users"], seconds=row.get("seconds"))
    ]
    wrong, replies = _replies(measured)
    none_wrong = "reached" if not wrong else "not reached"
    return [
        _at_least(
            "ours >= 1.3 x the speed of one at a time: 5 s clips, one client, CPU", 1.3, ratios(cpus, ALONE, **five)
        ),
        _at_least(
            "ours >= 1.3 x the speed of one at a time: mixed, 16 clients, CPU", 1.3, ratios(cpus, ALONE, **sixteen)
        ),
        _at_least("ours >= 3 x the speed of padded batches: mixed, CPU", 3, ratios(cpus, PADDED, **mixed)),
        _below(
            "p95 of ours below both baselines' in each of these",
            *(tails(contender, **load) for contender in (ALONE, PADDED) for load in (five, sixteen)),
        ),
        Goal("no wrong reply", f"{wrong:,} of {replies:,}" if replies else "", none_wrong if replies else MEASURED),
        _at_least(
            "served >= 0.9 of the speed of the same model in process: 5 s clips, one client; mixed",
            0.9,
            ratios(every, IN_PROCESS, **five),
            ratios(every, IN_PROCESS, **mixed),
        ),
        _at_least("ours >= 10 x the speed of one at a time: 64 clients and more, GPU", 10, many),
    ]


def _at_least(name: str, bound: float, *parts: list[tuple[str, float]]) -> Goal:
    found = [pair for part in parts for pair in part]
    worst = min(found, key=lambda pair: pair[1], default=("", 0.0))
    text = ""
    for digits in (2, 3, 4):  # 1.2996 is not written as a 1.30 that misses 1.3
        text = f"{worst[1]:.{digits}f} ({worst[0]})"
        if (round(worst[1], digits) >= bound) == (worst[1] >= bound):
            break
    return _judge(name, text, worst[1] >= bound, parts)


def _below(name: str, *parts: list[tuple[str, float]]) -> Goal:
    found = [pair for part in parts for pair in part]
    worst = max(found, key=lambda pair: pair[1], default=("", 0.0))
    return _judge(name, f"at most {worst[1]:.3g} x the baseline's ({worst[0]})", worst[1] < 1, parts)


def _judge(name: str, text: str, reached: bool, parts: Sequence[list[tuple[str, float]]]) -> Goal:
    if not any(parts):
        return Goal(name, "", MEASURED)
    missing = sum(not part for part in parts)
    if reached and missing:
        return Goal(name, f"{text}; {missing} of {len(parts)} comparisons missing", MEASURED)
    return Goal(name, text, "reached" if reached else "not reached")


def _goals_table(measured: Measured) -> Table:
    looks = {"reached": "good", "not reached": "bad", MEASURED: "none"}
    judged = [(goal.name, [[goal.found or None, Cell(goal.verdict, looks[goal.verdict])]]) for goal in goals(measured)]
    return Table(["goal", "measured, at worst", ""], judged, left=3)


def _limits(measured: Measured) -> str:
    conditions = [report["conditions"] for report in measured.reports]
    local = [target for target in measured.targets if target.get("local")]
    loops = {row.get("loop") for row in measured.rows}
    shortest = min((row["duration_s"] for row in measured.rows if row.get("duration_s")), default=None)
    texts = ["Another machine, or the same one on another day."]
    if local:
        texts.append(
            "A network between client and server: these clients are on the server's machine, and the load generator "
            "takes its share of the same cores."
        )
    if "closed" in loops:
        texts.append(
            "Waiting in a closed loop: its clients wait for slow replies before they send again, so its latencies hide "
            "what a user who does not wait would see."
        )
    if "open" in loops:
        texts.append("In the open loop latency counts from the scheduled arrival, so that waiting is in it.")
    texts.append("Many voices: the clips are few or synthetic, and say nothing of how well speakers are told apart.")
    if shortest is not None:
        texts.append(f"Hours of load: the shortest row measured {_number(shortest)} s, so p99 rests on few requests.")
    if any("random" in (found.get("source") or "") for found in conditions):
        texts.append("Trained weights: the model's were random, which is as fast but recognises nobody.")
    if any(found.get("references") == "first replies" for found in conditions):
        texts.append(
            "That embeddings are right: replies were compared with the first reply to the same clip, not with "
            "SpeechBrain."
        )
    sides = [f"the {device}" for device in (CPU, GPU) if not measured.on(device)]
    sides += [name for name in measured.missing if name.upper() not in (CPU, GPU)]
    if sides:
        texts.append(f"What was not measured: {', '.join(sides)}.")
    return " ".join(texts)


def _has(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _number(value: float) -> str:
    """Three digits that mean something."""
    size = abs(value)
    if size == 0 or size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 0.9995 else f"{value:.3g}"


def _tiny(value: float) -> str:
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _span(values: list[float]) -> str:
    ends = [_times(min(values)), _times(max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _range(values: Sequence[float]) -> str:
    ends = [f"{min(values):.3g}", f"{max(values):.3g}"]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _plus(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:g} {unit}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
