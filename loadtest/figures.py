"""The page and the plots of load tests, from their JSON.

A result is the JSON of `python -m loadtest run`; those of several machines, a CPU's and a GPU's, make one page.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .machine import MeasureError
from .report import MISSING, Page, Section, Strong, Table
from .report import write as write_page
from .scenarios import BASELINES, OURS, PADDED, SCENARIOS, Level

Row: TypeAlias = dict[str, Any]

KIND = "load"  # of the JSON
BUSY = 0.9  # of a core: above it the load generator may be the limit
FEW = 5  # requests of a row, below which percentiles mean little
DIGITS = 6  # significant ones of a figure in the JSON
CONTENDERS = {
    OURS: "clips of every length in one batch, without padding",
    BASELINES[0]: "SpeechBrain in Triton's Python backend, each request alone",
    PADDED: "SpeechBrain in Triton's Python backend, batches padded to their longest clip",
}
LOOPS = {
    False: "closed: each client sends its next request after the last reply",
    True: "open: requests are sent at scheduled times, from which their latency counts",
}
COLOURS, MARKERS = ("#3b82d9", "#e0762f", "#2f9e68"), "os^"
STYLES = "-", "--", ":", "-."
# The plot of a scenario: the key and the label of its x axis, and of the y axis of each panel.
PLOTS = {
    "single": ("seconds", "length of the clip, s", {"p50_ms": "p50 latency, ms", "p95_ms": "p95 latency, ms"}),
    "batch": ("batch", "clips in a request", {"clips_per_s": "clips/s"}),
    "clients": ("users", "clients", {"clips_per_s": "clips/s", "p95_ms": "p95 latency, ms"}),
    "arrivals": ("offered", "clips/s that arrive", {"p95_ms": "p95 latency, ms", "rejected_percent": "rejected, %"}),
    "ramp": ("t", "time, s", {"users": "clients", "clips_per_s": "clips/s", "p95_ms": "p95 latency, ms"}),
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
    advice = "give the NAME.json of python -m loadtest run"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeasureError(f"{path}: cannot be read ({error.strerror}): {advice}") from error
    except ValueError as error:
        raise MeasureError(f"{path}: not JSON ({error}): {advice}") from error
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind != KIND:
        raise MeasureError(f"{path}: kind is {kind!r}, expected {KIND!r}: {advice}")
    return {**found, "name": path.stem}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m loadtest report`."""
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="written by run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: that of the first result")


def run(options: argparse.Namespace) -> None:
    """Write the page of `options.results` into `options.out`, or beside the first, and print the paths.

    Raises:
        MeasureError: a file holds no whole result.
    """
    paths: list[Path] = options.results
    results = [read(path) for path in paths]
    name = "-and-".join(dict.fromkeys(path.stem for path in paths[:2])) + f"-and-{len(paths) - 2}-more" * (
        len(paths) > 2
    )
    try:
        written = write(results, options.out or paths[0].parent, name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise MeasureError(f"{', '.join(map(str, paths))}: incomplete ({found}): measure again") from error
    for path in written:
        print(f"wrote {path}")


def write(results: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.html and the plots NAME-SCENARIO.png into a folder; return their paths.

    Args:
        results: of `python -m loadtest run`, complete or not.
        folder: made where it is missing.
        name: of the files, without suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = Results.of(results)
    make_page(every, {})  # no plot is written of a broken result
    plots = draw(every, folder, name)
    return [*write_page(make_page(every, plots), folder / name), *(folder / plot for plot in plots.values())]


def _number(value: float) -> str:
    """Three significant digits."""
    size = abs(value)
    if size == 0 or size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 0.9995 else f"{value:.3g}"


def _tiny(value: float) -> str:
    return f"{value:.2g}" if value == 0 or value >= 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else _number(value)


def _span(values: Sequence[float]) -> str:
    ends = f"{min(values):.3g}", f"{max(values):.3g}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


# Columns of a scenario's table: the figure's title, its text, and which one of a level is the best.
COLUMNS: dict[str, tuple[str, Callable[[float], str], Callable[[Sequence[float]], float] | None]] = {
    "clips_per_s": ("clips/s", _number, max),
    "audio_per_s": ("s of audio/s", _number, max),
    **{f"p{n}_ms": (f"p{n}, ms", _number, min) for n in (50, 90, 95, 99)},
    "speed_up": (f"{OURS} / this", _times, None),
    "mean_batch": ("mean batch", _number, None),
    "queue_ms": ("queue, ms", _number, None),
    "compute_ms": ("compute, ms", _number, None),
    "rejected": ("rejected", "{:,}".format, None),
    "failures": ("failed", "{:,}".format, None),
    "wrong": ("wrong", "{:,}".format, None),
    "cpu": ("CPU", _percent, None),
    "memory_mb": ("memory, MB", _number, None),
    "gpu": ("GPU", _percent, None),
    "gpu_memory_mb": ("GPU memory, MB", _number, None),
    "generator_cpu": ("generator, of a core", _percent, None),
}


@dataclass(frozen=True)
class Results:
    """One or several results together.

    Attributes:
        results: as they are.
        servers: of all results, each with a name that no other has.
        rows: with figures, each with the name of its server.
        failed: rows without figures.
        agreement: of embeddings, with the names of the servers.
        missing: devices that no result has, and why.
    """

    results: Sequence[Row]
    servers: list[Row]
    rows: list[Row]
    failed: list[Row]
    agreement: list[Row]
    missing: dict[str, str]

    @classmethod
    def of(cls, results: Sequence[Row]) -> Results:
        """Put results together; a server whose name several results have gets the number of its result."""
        taken = Counter(server["name"] for result in results for server in result["servers"])
        servers, rows, agreement = [], [], []
        missing: dict[str, str] = {}
        for number, result in enumerate(results, 1):
            names = {s["name"]: s["name"] + f" ({number})" * (taken[s["name"]] > 1) for s in result["servers"]}
            servers += [{**server, "name": names[server["name"]]} for server in result["servers"]]
            rows += [{**row, "server": names[row["server"]]} for row in result["rows"]]
            for found in result["agreement"]:
                sides = {key: found[key].partition("/") for key in ("a", "b")}
                agreement.append(found | {k: f"{names.get(name, name)}{s}{m}" for k, (name, s, m) in sides.items()})
            missing |= result["missing"]
        present = {(server["device"] or "").lower() for server in servers}
        return cls(
            results,
            servers,
            [row for row in rows if "failed" not in row],
            [row for row in rows if "failed" in row],
            agreement,
            {device: why for device, why in missing.items() if device not in present},
        )

    def on(self, device: str) -> list[str]:
        """The servers on a device, "CPU" or "GPU"."""
        return [server["name"] for server in self.servers if server["device"] == device]

    def find(self, row: Row, **other: str) -> Row | None:
        """The row of another server or contender at the same level."""
        wanted = {key: row[key] for key in ("server", "contender", *LEVEL)} | other
        return next((one for one in self.rows if wanted.items() <= one.items()), None)


LEVEL = ("scenario", "seconds", "batch", "users", "share")


def _level(row: Row) -> Level:
    return Level(**{key: row[key] for key in LEVEL})


def setting(row: Row) -> str:
    """The level of a row within its scenario."""
    text = str(_level(row)).partition(", ")[2]
    return f"{text}: {_number(row['offered'])} clips/s" if row.get("offered") else text


def ratio(row: Row, base: Row) -> float | None:
    """Throughput of a row over that of another, in seconds of audio/s: the median over rounds of each round's ratio.

    Rounds are interleaved, so whatever slows the machine down slows both. Where their numbers differ, the ratio of the
    medians; None where the base is 0.
    """
    ours, theirs = row["audio_per_round"], base["audio_per_round"]
    if len(ours) == len(theirs) and all(theirs):
        return float(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)))
    return row["audio_per_s"] / base["audio_per_s"] if base["audio_per_s"] else None


def make_page(every: Results, plots: dict[str, str]) -> Page:
    """The page of results; `plots` has the file names of plots by scenario."""
    dates = " and ".join(sorted({result["date"][:10] for result in every.results}))
    sections = [Section("Servers", table=_servers(every))]
    for scenario in SCENARIOS:
        if any(row["scenario"] == scenario for row in every.rows + every.failed):
            sections.append(_scenario(every, scenario, plots.get(scenario)))
    sections += [_agreement(every), _devices(every), Section("What this does not show", _limits(every))]
    return Page(f"Load test of ECAPA-TDNN on Triton, {dates}", summary(every), _facts(every), sections)


def summary(every: Results) -> str:
    """The findings, and warnings about the figures, as a list."""
    wrong, rejected = (sum(row[key] for row in every.rows) for key in ("wrong", "rejected"))
    failed = sum(sum(row["errors"].values()) for row in every.rows)
    replies = wrong + sum(row["requests"] for row in every.rows)
    found = [f"Replies compared: {replies:,}; {wrong:,} wrong. Requests failed: {failed:,}; rejected: {rejected:,}."]
    for server in every.servers:
        for baseline in BASELINES:
            found += _verdict(every, server["name"], baseline)
    for cpu in every.on("CPU"):
        for gpu in every.on("GPU"):
            if ratios := [value for *_, value in _compared(every, cpu, gpu)]:
                found.append(f"{gpu} has {_span(ratios)} times the throughput of {cpu} ({OURS}).")
    found += [f"Not measured: {device}: {why}." for device, why in every.missing.items()]
    found += ["Interrupted: the figures are incomplete."] * any(result["interrupted"] for result in every.results)
    if busy := [row for row in every.rows if (row["generator_cpu"] or 0) > BUSY]:
        found.append(
            f"The load generator used more than {BUSY:.0%} of a core in {len(busy)} rows and may be their limit: "
            "measure them with --processes."
        )
    if few := [row for row in every.rows if row["requests"] < FEW]:
        found.append(
            f"{len(few)} rows have fewer than {FEW} requests and no sound percentiles: measure with --seconds."
        )
    return "\n".join(f"- {text}" for text in found)


def _verdict(every: Results, server: str, baseline: str) -> list[str]:
    """Our model against a baseline: throughput, and the levels at which the baseline is better."""
    ours = [row for row in every.rows if (row["server"], row["contender"]) == (server, OURS)]
    pairs = [(row, base) for row in ours if (base := every.find(row, contender=baseline))]
    ratios = [(row, value) for row, base in pairs if (value := ratio(row, base)) is not None]
    if not ratios:
        return []
    lower = [row for row, base in pairs if row["p95_ms"] and base["p95_ms"] and row["p95_ms"] > base["p95_ms"]]
    better = {
        "more throughput": [row for row, value in ratios if value < 1],
        "the lower p95": lower,
    }
    text = f"{server}: {OURS} has {_span([value for _, value in ratios])} times the throughput of {baseline}"
    text += f" in {len(ratios)} settings."
    for what, rows in better.items():
        if rows:
            levels = "; ".join(f"{row['scenario']}, {setting(row)}" for row in rows)
            text += f" {baseline} has {what} at {levels}."
    return [text]


def _facts(every: Results) -> dict[str, str]:
    found = [_facts_of(result) for result in every.results]
    facts = {}
    for key in found[0]:
        values = [one[key] for one in found]
        same = len(set(values)) == 1
        facts[key] = values[0] if same else "; ".join(f"{number}: {value}" for number, value in enumerate(values, 1))
    return facts


def _facts_of(result: Row) -> dict[str, str]:
    conditions = result["conditions"]
    rows = [row for row in result["rows"] if "failed" not in row]
    loops = sorted({row["share"] is not None for row in rows})
    present = {row["contender"] for row in rows}
    mix = conditions["mix"]
    bounds = ", ".join(f"{_tiny(bound)} for {precision}" for precision, bound in conditions["bound"].items())
    compared = f"{conditions['references']}; largest relative L2 error: {bounds}"
    if PADDED in present:
        compared += f". Padding changes embeddings: of {PADDED} only shape and finiteness are checked"
    measured = "nothing"
    if rows:
        rounds = [len(row["audio_per_round"]) for row in rows]
        seconds = [row["duration_s"] / number for row, number in zip(rows, rounds, strict=True)]
        measured = f"{_span(seconds)} s for each row in each of {_span(rounds)} rounds, contenders in turn"
    packages = {"Python": result["python"], **result["packages"]}
    name = result.get("name", "")
    return {
        "date": result["date"],
        "machine": f"{result['cpu']}, {result['cores']} cores",
        "commit": result["commit"] or "unknown",
        "command": result["command"],
        "versions": ", ".join(f"{package} {version}" for package, version in packages.items()),
        "weights": conditions["source"] or "those of the servers",
        "clips": conditions["clips"],
        "mix": ", ".join(f"{seconds} s {_percent(count / sum(mix.values()))}" for seconds, count in mix.items()),
        "warm-up": f"{conditions['warm_up_s']:g} s before each measurement, whose latencies do not count",
        "measured": measured,
        "loop": "; ".join(LOOPS[loop] for loop in loops),
        "load generator": f"Locust, processes: {conditions['processes']}",
        "contenders": "; ".join(f"{one}: {text}" for one, text in CONTENDERS.items() if one in present),
        "every reply is compared with": compared,
        "took": f"{result['took_s']:,.0f} s",
        "raw figures": f"{name}.json; each request: {name}.csv, written beside it" if name else "",
    }


def _servers(every: Results) -> Table:
    header = ["server", "URL", "device", "GPUs", "Triton", "limit of requests", "model", "contender", "backend", "file"]
    header += ["instances", "precision", "largest batch", "weights, SHA-256"]
    rows = []
    for server in every.servers:
        limit, gpus = server["max_requests"], ", ".join(map(str, server["gpus"]))
        about = [server["name"], server["url"], server["device"], gpus, server["version"], limit]
        for model, served in server["models"].items():
            keys = "contender", "backend", "file"
            cells = [*about, model, *(served[key] for key in keys), ", ".join(served["instances"])]
            rows.append([*cells, served["precision"], served["max_batch"], (served["sha256"] or "")[:12]])
    return Table(header, [[str(cell or MISSING) for cell in row] for row in rows])


def _scenario(every: Results, scenario: str, plot: str | None) -> Section:
    rows = [row | _derived(every, row) for row in every.rows if row["scenario"] == scenario]
    failed = [row for row in every.failed if row["scenario"] == scenario]
    several, named = len({row["contender"] for row in rows}) > 1, len(every.servers) > 1
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    if not several:
        columns = [key for key in columns if key != "speed_up"]
    settings = list(dict.fromkeys(setting(row) for row in rows + failed))
    servers = [server["name"] for server in every.servers]
    cells = []
    for row in sorted(rows + failed, key=lambda row: (settings.index(setting(row)), servers.index(row["server"]))):
        peers = [one for one in rows if (one["server"], setting(one)) == (row["server"], setting(row))]
        figures = [MISSING if row in failed else _cell(key, row, peers) for key in columns]
        cells.append([setting(row), *[row["server"]] * named, row["contender"], *figures])
    text = f"{SCENARIOS[scenario].capitalize()}." + " Bold: the best contender on a server at a level." * several
    notes = [f"{_where(row)}: {row['failed']}" for row in failed]
    notes += [f"{_where(row)}: {count:,} x {error}" for row in rows for error, count in row["errors"].items()]
    usual = {server["name"]: server["max_requests"] for server in every.servers}
    limits = {(row["server"], row["max_requests"]) for row in rows if row["max_requests"]} - set(usual.items())
    notes += [f"{name}: a limit of {limit} requests in flight at these levels" for name, limit in sorted(limits)]
    text += "\n\n" * bool(notes) + "\n".join(f"- {note}" for note in notes)
    header = ["setting", *["server"] * named, "contender", *(COLUMNS[key][0] for key in columns)]
    return Section(f"Scenario {scenario}", text, Table(header, cells), plot)


def _derived(every: Results, row: Row) -> Row:
    """Figures of a row that the JSON has not: failed requests, and the speed-up of our model over it."""
    ours = every.find(row, contender=OURS)
    return {"failures": sum(row["errors"].values()), "speed_up": ratio(ours, row) if ours else None}


def _cell(key: str, row: Row, peers: list[Row]) -> str:
    value = row.get(key)
    if value is None:
        return MISSING
    _, text, best = COLUMNS[key]
    values = [peer[key] for peer in peers if peer.get(key) is not None]
    bold = best is not None and len(values) > 1 and value == best(values)
    doubtful = value > {"wrong": 0, "generator_cpu": BUSY}.get(key, float("inf"))
    return Strong(text(value)) if bold or doubtful else text(value)


def _where(row: Row) -> str:
    return f"{row['server']}, {row['contender']}, {setting(row)}"


def _agreement(every: Results) -> Section:
    header = ["embeddings of", "compared with", "clips", "smallest cosine", "largest relative L2 error", "bound"]
    rows = []
    for one in every.agreement:
        error = _tiny(one["error"])
        error = error if one["error"] <= one["bound"] else Strong(f"{error}, above the bound")
        rows.append([one["a"], one["b"], f"{one['clips']:,}", f"{one['cosine']:.12g}", error, _tiny(one["bound"])])
    furthest: dict[str, float] = {}
    for row in every.rows:
        name = f"{row['server']}, {row['contender']}"
        furthest[name] = max(furthest.get(name, 0.0), row["worst_error"])
    under_load = "; ".join(f"{name}: {_tiny(error)}" for name, error in furthest.items())
    text = f"Under load, the largest relative L2 error of a reply that counts as right: {under_load}."
    return Section("Agreement of embeddings", text if furthest else "", Table(header, rows) if rows else None)


def _devices(every: Results) -> Section:
    title = "GPU against CPU"
    missing = [device for device in ("CPU", "GPU") if not every.on(device)]
    if missing:
        return Section(title, f"Not measured: no figures of a {' or a '.join(missing)}.")
    rows = []
    for cpu in every.on("CPU"):
        for gpu in every.on("GPU"):
            for one, other, value in _compared(every, cpu, gpu):
                pair = [
                    _number(row[key]) if row[key] else MISSING
                    for key in ("clips_per_s", "p95_ms")
                    for row in (one, other)
                ]
                rows.append([f"{one['scenario']}, {setting(one)}", cpu, gpu, *pair, _times(value)])
    header = ["setting", "CPU", "GPU", "CPU, clips/s", "GPU, clips/s", "CPU, p95 in ms", "GPU, p95 in ms", "GPU / CPU"]
    return Section(title, f"{OURS} on both, in the closed loop at the same levels.", Table(header, rows))


def _compared(every: Results, cpu: str, gpu: str) -> list[tuple[Row, Row, float]]:
    """Rows of our model on a CPU and on a GPU at the same level, and the ratio of throughputs."""
    ours = [row for row in every.rows if (row["server"], row["contender"]) == (cpu, OURS) and not _level(row).alone]
    pairs = [(row, other) for row in ours if (other := every.find(row, server=gpu))]
    return [(one, other, other["audio_per_s"] / one["audio_per_s"]) for one, other in pairs if one["audio_per_s"]]


def _limits(every: Results) -> str:
    """What a reader must not conclude from the page."""
    texts = [
        "Another machine, or the same one on another day.",
        "Accuracy: the clips are few and say nothing of how well speakers are told apart.",
        "Clients that do not wait: in the closed loop a slow reply delays the next request, which hides waiting time; "
        "the open loop (arrivals) shows it.",
    ]
    if any(server["local"] for server in every.servers):
        texts.append("A network: client and server share a machine, and the load generator uses a part of its cores.")
    if every.rows:
        shortest = min(row["duration_s"] for row in every.rows)
        texts.append(f"Hours of load: the shortest row has {_number(shortest)} s, so p99 rests on few requests.")
    if any("random" in (result["conditions"]["source"] or "") for result in every.results):
        texts.append("Trained weights: these are random, which is as fast.")
    if any(result["conditions"]["references"] != "SpeechBrain" for result in every.results):
        texts.append("That embeddings are right: replies were compared with the server's own first replies.")
    return " ".join(texts)


def draw(every: Results, folder: Path, name: str) -> dict[str, str]:
    """Draw a plot NAME-SCENARIO.png of each scenario that has figures; return the file names by scenario."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    drawn = {}
    servers = [server["name"] for server in every.servers]
    for scenario, (x, label, panels) in PLOTS.items():
        series: dict[tuple[str, str], list[Row]] = {}
        for row in every.rows:
            if row["scenario"] == scenario:
                sent = row["requests"] + row["wrong"] + row["rejected"] + sum(row["errors"].values())
                points = row.get("windows", [row | {"rejected_percent": 100 * row["rejected"] / max(sent, 1)}])
                series.setdefault((row["server"], row["contender"]), []).extend(points)
        if not series:
            continue
        looks = {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.2, "font.size": 9}
        with matplotlib.rc_context(looks):  # type: ignore[arg-type]
            figure = Figure(figsize=(8.5, 3.4), layout="constrained", dpi=110)
            for axes, (y, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
                for (server, contender), points in series.items():
                    good = sorted((p[x], p[y]) for p in points if p.get(x) is not None and p.get(y) is not None)
                    number = list(CONTENDERS).index(contender)
                    axes.plot(
                        *zip(*good, strict=True) if good else ([], []),
                        label=f"{contender} on {server}" if len(servers) > 1 else contender,
                        color=COLOURS[number],
                        marker=MARKERS[number],
                        linestyle=STYLES[servers.index(server) % len(STYLES)],
                    )
                values = [p[y] for points in series.values() for p in points if p.get(y)]
                if x in ("users", "batch"):
                    axes.set_xscale("log", base=2)
                    axes.xaxis.set_major_formatter("{x:g}")
                if values and max(values) > 30 * min(values):
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(0)
                axes.set(xlabel=label, ylabel=title)
                axes.yaxis.set_major_formatter("{x:,.10g}")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
            drawn[scenario] = f"{name}-{scenario}.png"
            file = io.BytesIO()
            figure.savefig(file, format="png", facecolor="white")
            few = Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)  # the file is kept in git
            few.save(folder / drawn[scenario], optimize=True)
    return drawn
