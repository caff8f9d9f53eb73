"""The page and the plots of load tests, from their JSON.

A result is the JSON of `python -m loadtest run`; those of several machines, a CPU's and a GPU's, make one page.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .machine import MeasureError
from .report import MISSING, Page, Section, Strong, Table
from .report import write as write_page
from .scenarios import BASELINES, OURS, PADDED, SCENARIOS, Level

Row: TypeAlias = dict[str, Any]

KIND = "load"  # of the JSON
LEVEL = ("scenario", "seconds", "batch", "users", "share")  # keys of a row that say which level it is
BUSY = 0.9  # of a core: above it the load generator may be the limit
FEW = 20  # requests of a row, below which nothing is concluded from it
DIGITS = 6  # significant ones of a figure in the JSON
CONTENDERS = (
    f"{OURS} is the model of this project: clips of every length share a batch without padding.",
    f"{BASELINES[0]} and {PADDED} are SpeechBrain's encode_batch in Triton's Python backend on the same server: one "
    "request at a time, and in dynamic batches padded to their longest clip.",
)
LOOP = (
    "closed: each client sends its next request after the last reply; in arrivals open: requests are sent at scheduled "
    "times, from which their latency counts"
)
LIMITS = (
    "Another machine, or the same one on another day. Accuracy: the clips are few and say nothing of how well speakers "
    "are told apart, nor do random weights, which are as fast as trained ones. Clients that do not wait: in the closed "
    "loop a slow reply delays the next request, which hides waiting time; the open loop (arrivals) shows it. A "
    "network: where a server is on 127.0.0.1, the load generator uses a part of its cores. Hours of load: rows last "
    "seconds, so p99 rests on few requests. That embeddings are right, where replies are compared with first replies."
)
# The plot of a scenario: the key and the label of its x axis, and of the y axis of each panel.
PLOTS = {
    "single": ("seconds", "length of the clip, s", {"p50_ms": "p50 latency, ms", "p95_ms": "p95 latency, ms"}),
    "batch": ("batch", "clips in a request", {"clips_per_s": "clips/s"}),
    "clients": ("users", "clients", {"clips_per_s": "clips/s", "p95_ms": "p95 latency, ms"}),
    "arrivals": ("offered", "clips/s that arrive", {"p95_ms": "p95 latency, ms", "rejected": "rejected requests"}),
    "ramp": ("t", "time, s", {"users": "clients", "clips_per_s": "clips/s", "p95_ms": "p95 latency, ms"}),
}
LOOKS = {OURS: ("#3b82d9", "o"), BASELINES[0]: ("#e0762f", "s"), PADDED: ("#2f9e68", "^")}
STYLES = "-", "--", ":", "-."  # of servers


def number(value: float) -> str:
    """A figure with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


# Columns of a scenario's table: the figure's title, its text, and which one of a level is the best.
COLUMNS: dict[str, tuple[str, Callable[[float], str], Callable[[Iterable[float]], float] | None]] = {
    "requests": ("requests", "{:,}".format, None),
    "clips_per_s": ("clips/s", number, max),
    "audio_per_s": ("s of audio/s", number, max),
    **{f"p{n}_ms": (f"p{n}, ms", number, min) for n in (50, 90, 95, 99)},
    "speed_up": (f"{OURS} / this", number, None),
    "mean_batch": ("mean batch", number, None),
    "queue_ms": ("queue, ms", number, None),
    "compute_ms": ("compute, ms", number, None),
    "rejected": ("rejected", "{:,}".format, None),
    "failures": ("failed", "{:,}".format, None),
    "wrong": ("wrong", "{:,}".format, None),
    "worst_error": ("largest L2 error", "{:.1e}".format, None),
    "cpu": ("CPU", "{:.0%}".format, None),
    "memory_mb": ("memory, MB", number, None),
    "gpu": ("GPU", "{:.0%}".format, None),
    "gpu_memory_mb": ("GPU memory, MB", number, None),
    "generator_cpu": ("generator, of a core", "{:.0%}".format, None),
}


def shorten(value: Any) -> Any:
    """The same JSON with DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: shorten(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shorten(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def save(result: Row, path: Path) -> None:
    """Write a result as JSON, each row on one line."""
    parts = []
    for key, value in result.items():
        lines = [json.dumps(one) for one in value] if isinstance(value, list) else []
        parts.append(f"{json.dumps(key)}: " + ("[\n " + ",\n ".join(lines) + "\n]" if lines else json.dumps(value)))
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def read(path: Path) -> Row:
    """The result in a file; its name is added under "name".

    Raises:
        MeasureError: the file cannot be read or holds no result of `python -m loadtest run`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != KIND:
            raise ValueError(f"its kind is {found['kind']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MeasureError(f"{path}: expected the NAME.json of python -m loadtest run ({error})") from error
    return {**found, "name": path.stem}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m loadtest report`."""
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="result files, written by run")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the page (default: that of the first result)"
    )


def run(options: argparse.Namespace) -> None:
    """Write the page of `options.results` into `options.out`, or beside the first, and print the paths."""
    paths: list[Path] = options.results
    stem = (options.out or paths[0].parent) / "-and-".join(path.stem for path in paths)
    print(*write([read(path) for path in paths], stem), sep="\n")


def write(results: Sequence[Row], stem: Path) -> list[Path]:
    """Write the page of results to STEM.md and STEM.html and its plots to STEM-SCENARIO.png; return their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    every = Results.of(results)
    plots = draw(every, stem)
    page = make_page(every, {scenario: path.name for scenario, path in plots.items()})
    return [*write_page(page, stem), *plots.values()]


@dataclass(frozen=True)
class Results:
    """One or several results together; each server has a name that no other has."""

    results: Sequence[Row]
    servers: list[Row]
    rows: list[Row]  # with figures
    failed: list[Row]  # without
    agreement: list[Row]

    @classmethod
    def of(cls, results: Sequence[Row]) -> Results:
        """Put results together; where servers share a name, that of each begins with the number of its result."""
        names = [server["name"] for result in results for server in result["servers"]]
        servers, rows, agreement = [], [], []
        for place, result in enumerate(results, 1):
            prefix = f"{place}: " if len(set(names)) < len(names) else ""
            servers += [{**server, "name": prefix + server["name"]} for server in result["servers"]]
            rows += [{**row, "server": prefix + row["server"]} for row in result["rows"]]
            agreement += [{**one, "a": prefix + one["a"]} for one in result["agreement"]]
        for row in rows:
            row["failures"] = sum(row.get("errors", {}).values())
        done = [row for row in rows if "failed" not in row]
        return cls(results, servers, done, [row for row in rows if "failed" in row], agreement)

    def find(self, row: Row, **other: str) -> Row | None:
        """The row of another server or contender at the same level."""
        wanted = {key: row[key] for key in ("server", "contender", *LEVEL)} | other
        return next((one for one in self.rows if wanted.items() <= one.items()), None)

    def devices(self) -> list[tuple[str, str]]:
        """Every pair of a server on a CPU and one on a GPU."""
        cpus, gpus = ([s["name"] for s in self.servers if s["device"] == device] for device in ("CPU", "GPU"))
        return [(cpu, gpu) for cpu in cpus for gpu in gpus]

    def pairs(self, name: str, **other: str) -> list[tuple[Row, Row]]:
        """The closed-loop rows of our model on a server, each with that of another server or contender."""
        ours = [row for row in self.rows if (row["server"], row["contender"], row["share"]) == (name, OURS, None)]
        return [(row, found) for row in ours if (found := self.find(row, **other))]


def setting(row: Row) -> str:
    """The level of a row within its scenario."""
    text = str(Level(**{key: row[key] for key in LEVEL})).partition(", ")[2]
    return f"{text}: {number(row['offered'])} clips/s" if row.get("offered") else text


def enough(*rows: Row) -> bool:
    """Whether every row has the requests that a conclusion needs."""
    return all(row["requests"] >= FEW for row in rows)


def ratio(row: Row, base: Row) -> float | None:
    """Throughput of a row over that of another, in seconds of audio/s: the median over rounds of each round's ratio.

    Rounds are interleaved, so whatever slows the machine down slows both. None where one of the rows has fewer than FEW
    requests, or the base a round without throughput.
    """
    if not enough(row, base):
        return None
    rounds = list(zip(row["audio_per_round"], base["audio_per_round"], strict=False))
    return statistics.median(a / b for a, b in rounds) if all(b for _, b in rounds) else None


def make_page(every: Results, plots: dict[str, str]) -> Page:
    """The page of results; `plots` has the file names of plots by scenario."""
    dates = " and ".join(sorted({result["date"][:10] for result in every.results}))
    sections = [Section("Servers", table=_servers(every))]
    for scenario in SCENARIOS:
        if any(row["scenario"] == scenario for row in every.rows + every.failed):
            sections.append(_scenario(every, scenario, plots.get(scenario)))
    sections += [_agreement(every), _devices(every), Section("What this does not show", LIMITS)]
    found = [_facts(result) for result in every.results]
    facts = {key: " | ".join(dict.fromkeys(one[key] for one in found)) for key in found[0]}
    return Page(f"Load test of ECAPA-TDNN on Triton, {dates}", summary(every), facts, sections)


def summary(every: Results) -> str:
    """The contenders in two sentences; then the findings, and warnings about the figures, as a list."""
    baselines = any(row["contender"] in BASELINES for row in every.rows)
    total = {key: sum(row[key] for row in every.rows) for key in ("requests", "wrong", "failures", "rejected")}
    found = [
        f"Replies compared: {total['requests'] + total['wrong']:,}; {total['wrong']:,} wrong. "
        f"Requests failed: {total['failures']:,}; rejected: {total['rejected']:,}."
    ]
    for server in every.servers:
        found += [_verdict(every, server["name"], baseline) for baseline in BASELINES]
    for cpu, gpu in every.devices():
        if ratios := [value for pair in every.pairs(cpu, server=gpu) if (value := ratio(*reversed(pair)))]:
            found.append(f"{gpu} has {_span(ratios)} times the throughput of {cpu} ({OURS}).")
    for result in every.results:
        found += [f"Not measured: {device}: {why}." for device, why in result["missing"].items()]
        found += ["Interrupted: the figures are incomplete."] * result["interrupted"]
    if busy := sum((row["generator_cpu"] or 0) > BUSY for row in every.rows):
        found.append(f"Locust used over {BUSY:.0%} of a core in {busy} rows and may be their limit: use --processes.")
    if few := sum(not enough(row) for row in every.rows):
        found.append(f"Nothing is concluded from {few} rows of fewer than {FEW} requests: use --seconds for more.")
    return " ".join(CONTENDERS[: 1 + baselines]) + "\n\n" + "\n".join(f"- {text}" for text in found if text)


def _verdict(every: Results, server: str, baseline: str) -> str:
    """Our model against a baseline: throughput, and the levels at which the baseline is better."""
    pairs = [pair for pair in every.pairs(server, contender=baseline) if enough(*pair)]
    ratios = [value for ours, base in pairs if (value := ratio(ours, base)) is not None]
    if not ratios:
        return ""
    text = f"{server}: {OURS} has {_span(ratios)} times the throughput of {baseline} in {len(ratios)} settings."
    better = {
        "more throughput": [ours for ours, base in pairs if base["audio_per_s"] > ours["audio_per_s"]],
        "the lower p95": [ours for ours, base in pairs if (base["p95_ms"] or 1e9) < (ours["p95_ms"] or 0)],
    }
    for what, rows in better.items():
        if rows:
            text += f" {baseline} has {what} at " + "; ".join(f"{r['scenario']}, {setting(r)}" for r in rows) + "."
    return text


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{end(values):.3g}" for end in (min, max)))


def _facts(result: Row) -> dict[str, str]:
    conditions, mix = result["conditions"], result["conditions"]["mix"]
    bounds = ", ".join(f"{bound:g} for {precision}" for precision, bound in conditions["bound"].items())
    compared = f"{conditions['references']}; largest relative L2 error: {bounds}"
    if any(row["contender"] == PADDED for row in result["rows"]):
        compared += f". Padding changes embeddings: of {PADDED} only shape and finiteness are checked"
    seconds = [r["duration_s"] / len(r["audio_per_round"]) for r in result["rows"] if "failed" not in r]
    packages = {"Python": result["python"], **result["packages"]}
    name = result.get("name")
    return {
        "date": result["date"],
        "machine": f"{result['cpu']}, {result['cores']} cores",
        "commit": result["commit"] or "unknown",
        "command": result["command"],
        "versions": ", ".join(f"{package} {version}" for package, version in packages.items()),
        "weights": conditions["source"] or "those of the servers",
        "clips": conditions["clips"],
        "mix": ", ".join(f"{seconds} s {count / sum(mix.values()):.0%}" for seconds, count in mix.items()),
        "measured": f"{_span(seconds or [0])} s for each row and round after {conditions['warm_up_s']:g} s of warm-up, "
        "contenders in turn",
        "loop": LOOP,
        "load generator": f"Locust, processes: {conditions['processes']}",
        "every reply is compared with": compared,
        "took": f"{result['took_s']:,.0f} s",
        "raw figures": f"{name}.json; each request: {name}.csv, written beside it" if name else "",
    }


def _servers(every: Results) -> Table:
    rows = []
    for server in every.servers:
        for model, served in server["models"].items():
            cells = {
                "server": server["name"],
                "URL": server["url"],
                "device": server["device"],
                "GPUs": ", ".join(server["gpus"]),
                "Triton": server["version"],
                "limit of requests": server["max_requests"],
                "model": model,
                **{key: served[key] for key in ("contender", "backend", "file", "precision")},
                "instances": ", ".join(served["instances"]),
                "largest batch": served["max_batch"],
                "weights, SHA-256": (served["sha256"] or "")[:12],
            }
            rows.append([str(cell or MISSING) for cell in cells.values()])
    return Table(list(cells), rows)


def _scenario(every: Results, scenario: str, plot: str | None) -> Section:
    rows = [row for row in every.rows if row["scenario"] == scenario]
    failed = [row for row in every.failed if row["scenario"] == scenario]
    levels: dict[str, list[Row]] = defaultdict(list)  # the contenders of a server are neighbours
    several = len({row["contender"] for row in rows}) > 1
    for row in rows:
        ours = every.find(row, contender=OURS) if several else None
        levels[f"{row['server']}, {setting(row)}"].append(row | {"speed_up": ratio(ours, row) if ours else None})
    columns = [key for key in COLUMNS if any(row.get(key) is not None for peers in levels.values() for row in peers)]
    cells = [
        [setting(row), row["server"], row["contender"], *(_cell(key, row, peers) for key in columns)]
        for peers in levels.values()
        for row in peers
    ]
    notes = [f"{_where(row)}: {row['failed']}" for row in failed]
    notes += [f"{_where(row)}: {count:,} x {error}" for row in rows for error, count in row["errors"].items()]
    usual = {(server["name"], server["max_requests"]) for server in every.servers}
    limits = {(row["server"], row["max_requests"]) for row in rows} - usual
    notes += [f"{name}: a limit of {limit} requests in flight at these levels" for name, limit in sorted(limits)]
    text = f"{SCENARIOS[scenario].text.capitalize()}."
    text += f" Bold: the best contender on a server, where each has {FEW} requests." * several
    text += "\n\n" + "\n".join(f"- {note}" for note in notes)
    header = ["setting", "server", "contender", *(COLUMNS[key][0] for key in columns)]
    return Section(f"Scenario {scenario}", text, Table(header, cells) if cells else None, plot)


def _cell(key: str, row: Row, peers: list[Row]) -> str:
    value = row.get(key)
    if value is None:
        return MISSING
    _, text, best = COLUMNS[key]
    if best:
        bold = len(peers) > 1 and enough(*peers) and value == best(peer[key] for peer in peers if peer[key] is not None)
    else:
        bold = value > {"wrong": 0, "generator_cpu": BUSY}.get(key, float("inf"))
    return Strong(text(value)) if bold else text(value)


def _where(row: Row) -> str:
    return f"{row['server']}, {row['contender']}, {setting(row)}"


def _agreement(every: Results) -> Section:
    header = ["embeddings of", "compared with", "clips", "smallest cosine", "largest relative L2 error", "bound"]
    rows = []
    for one in every.agreement:
        error = f"{one['error']:.1e}" if one["error"] <= one["bound"] else Strong(f"{one['error']:.1e}")
        rows.append([one["a"], one["b"], f"{one['clips']:,}", f"{one['cosine']:.12g}", error, f"{one['bound']:g}"])
    return Section(
        "Agreement of embeddings", "Each clip alone, before the load.", Table(header, rows) if rows else None
    )


def _devices(every: Results) -> Section:
    header = ["setting", "CPU", "GPU", "CPU, clips/s", "GPU, clips/s", "CPU, p95 in ms", "GPU, p95 in ms", "GPU / CPU"]
    rows = []
    for cpu, gpu in every.devices():
        for one, other in every.pairs(cpu, server=gpu):
            figures = [row[key] for key in ("clips_per_s", "p95_ms") for row in (one, other)] + [ratio(other, one)]
            cells = [MISSING if figure is None else number(figure) for figure in figures]
            rows.append([f"{one['scenario']}, {setting(one)}", cpu, gpu, *cells])
    text = f"{OURS} on both at the same levels." if rows else "Not measured: no figures of both a CPU and a GPU."
    return Section("GPU against CPU", text, Table(header, rows) if rows else None)


def draw(every: Results, stem: Path) -> dict[str, Path]:
    """Draw a plot STEM-SCENARIO.png of each scenario that has figures; return the paths by scenario."""
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    drawn = {}
    servers = [server["name"] for server in every.servers]
    for scenario, (x, label, panels) in PLOTS.items():
        series: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in every.rows:
            if row["scenario"] == scenario:
                series[row["server"], row["contender"]] += row.get("windows", [row])
        if not series:
            continue
        figure = Figure(figsize=(8.5, 3.4), layout="constrained", dpi=110)
        for axes, (y, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for (server, contender), rows in series.items():
                points = sorted((row[x], row[y]) for row in rows if None not in (row[x], row[y]))
                color, marker = LOOKS[contender]
                style = STYLES[servers.index(server) % len(STYLES)]
                xs, ys = [a for a, _ in points], [b for _, b in points]
                axes.plot(xs, ys, color=color, marker=marker, linestyle=style, label=f"{contender} on {server}")
            if x in ("users", "batch"):
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
            if axes.dataLim.ymax > 30 * axes.dataLim.minposy:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0)
            axes.set(xlabel=label, ylabel=title)
            axes.grid(alpha=0.2)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        drawn[scenario] = stem.with_name(f"{stem.name}-{scenario}.png")
        few = Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)  # the file is kept in git
        few.save(drawn[scenario], optimize=True)
    return drawn
