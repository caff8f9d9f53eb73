"""Reports: their rendering, and figures of synthetic requests and results against ones computed by hand."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from loadtest import figures, load
from loadtest.__main__ import main
from loadtest.figures import Results
from loadtest.infer import Sent
from loadtest.load import Round
from loadtest.machine import MeasureError
from loadtest.report import Page, Section, Strong, Table, write
from loadtest.scenarios import BASELINES, OURS, SCENARIOS, Level

Row = dict[str, Any]
ALONE, PADDED = BASELINES
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


def sent(start: float, latency: float, result: str = "right", clips: int = 1, users: int = 1) -> Sent:
    return Sent(start, latency, clips, 2.0 * clips, users, result, 1e-6, 0.0)


def test_the_closed_loop_counts_from_the_first_request_to_the_last_reply() -> None:
    # One client, requests of 2 s from -1 s on; measured from 0 to 10.
    one = Round(0, 10, [sent(-1 + 2 * n, 2) for n in range(6)])
    assert load.throughput(Level("single", 2.0), one) == (pytest.approx(0.5), pytest.approx(1.0))
    assert load.latencies(one) == [pytest.approx(2000)] * 5
    # Ten clients at once, a server that embeds one clip a second.
    queued = [sent(0, n + 1) for n in range(10)] + [sent(n, 10) for n in range(1, 5)]
    assert load.throughput(Level("clients", 2.0, users=10), Round(1, 5, queued))[0] == pytest.approx(1)
    rejected = [sent(0, 0.1, "Rejected: full"), sent(0, 4, clips=8), sent(4, 4, clips=8)]
    assert load.throughput(Level("batch", 2.0, 8), Round(0, 5, rejected))[0] == pytest.approx(2)
    assert load.throughput(Level("single", 2.0), Round(0, 5, rejected[:1])) == (0, 0)


def test_the_open_loop_counts_replies_within_the_measured_time() -> None:
    one = Round(0, 10, [sent(n - 0.5, 1) for n in range(12)] + [sent(5, 0.1, "Rejected: full")])
    assert load.throughput(Level("arrivals", None, users=None, share=0.5), one)[0] == pytest.approx(1.0)
    assert len(load.latencies(one)) == 10


def test_requests_longer_than_the_measurement_have_a_latency() -> None:
    assert load.latencies(Round(0, 1, [sent(-1, 5), sent(-3, 1)])) == [pytest.approx(5000)]


def test_figures_of_several_rounds() -> None:
    counts = Counter(inferences=4, executions=2, requests=4, queue_ns=8_000_000, compute_ns=4_000_000)
    slow = Round(0, 4, [sent(n, 1) for n in range(4)], counts, [{"cpu": 0.5, "memory_mb": 300.0}])
    fast = Round(10, 14, [sent(10 + n / 2, 0.5) for n in range(8)], Counter(inferences=8, executions=2, requests=8))
    fast.requests += [
        sent(11, 0.1, "WrongReply: the embedding is not that of the clip"),
        sent(11, 0.1, "Rejected: full"),
        sent(12, 0.1, "CallFailed: INTERNAL: broken"),
        sent(20, 0.1, "CallFailed: INTERNAL: after the end"),
        sent(20, 0.1, "WrongReply: the embedding is not finite"),  # counts at any time
    ]
    fast.busy, fast.samples = 0.95, [{"cpu": 1.0, "memory_mb": 200.0}, {}]
    row = load.measured(Level("mixed", None, users=1), [slow, fast])
    assert row["clips_per_s"] == pytest.approx(1.5) and row["audio_per_s"] == pytest.approx(3)
    assert row["audio_per_round"] == [pytest.approx(2), pytest.approx(4)]
    assert (row["requests"], row["clips"], row["duration_s"]) == (12, 12, 8)
    assert (row["p50_ms"], row["p99_ms"]) == (pytest.approx(500), pytest.approx(1000))
    assert (row["wrong"], row["rejected"], row["generator_cpu"]) == (2, 1, 0.95)
    assert row["errors"] == {"INTERNAL: broken": 1}
    assert (row["mean_batch"], row["queue_ms"], row["compute_ms"]) == (3, pytest.approx(8 / 12), pytest.approx(4 / 12))
    assert (row["cpu"], row["memory_mb"], row["worst_error"]) == (0.75, 300, 1e-6) and "gpu" not in row


def test_a_ramp_over_time() -> None:
    one = Round(0, 4, [sent(0.5, 0.5, users=1), sent(2.5, 1, users=2), sent(3, 0.5, "Rejected: full", users=3)])
    windows = load.measured(Level("ramp", None), [one])["windows"]
    assert [w["users"] for w in windows] == [1, 3] and [w["clips_per_s"] for w in windows] == [0.5, 0.5]
    assert windows[1]["p95_ms"] == pytest.approx(1000)


MEASURED = figures.read(ROOT / "loadtest/results/2026-11-23-cpu-load.json")
# Seconds of audio per second of each contender on the CPU, and how much faster the GPU is.
SPEED = {OURS: (60.0, 40), ALONE: (30.0, 4), PADDED: (15.0, 8)}


def make_row(server: str, contender: str, level: Level) -> Row:
    """A row of made-up but consistent figures."""
    speed = SPEED[contender][0] * (SPEED[contender][1] if server == "gpu" else 1)
    rate = speed / (level.seconds or 3.0)
    p50 = 1e3 * (level.users or 8) * level.batch / rate
    row = MEASURED["rows"][0] | {key: getattr(level, key) for key in figures.LEVEL}
    row |= {"server": server, "contender": contender, "offered": level.share and level.share * rate}
    row |= {"requests": 100, "clips_per_s": rate, "audio_per_s": speed, "audio_per_round": [speed, speed]}
    row |= {f"p{n}_ms": p50 * factor for n, factor in ((50, 1), (90, 1.3), (95, 1.4), (99, 1.9))}
    if level.scenario == "ramp":
        points = [{"t": t + 0.5, "users": t + 1, "clips_per_s": 4.0, "p50_ms": 50.0, "p95_ms": None} for t in range(4)]
        row["windows"] = points
    return row


def make_result(*servers: str, **given: Any) -> Row:
    """A full result of servers called cpu and gpu."""
    every = [level for scenario in SCENARIOS.values() for level in scenario.levels]
    return MEASURED | {
        "servers": [MEASURED["servers"][0] | {"name": name, "device": name.upper()} for name in servers],
        "missing": {} if "gpu" in servers else MEASURED["missing"],
        "rows": [
            make_row(name, one, level)
            for name in servers
            for level in every
            for one in SPEED
            if not level.long or one == OURS
        ],
        "agreement": [MEASURED["agreement"][0] | {"a": f"{name}/ecapa"} for name in servers],
        **given,
    }


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., str]:
    """The Markdown of results, without plots."""

    def make(*results: Row) -> str:
        return write(figures.make_page(Results.of(results), {}), tmp_path / "load")[0].read_text()

    return make


def cells(text: str, section: str) -> list[list[str]]:
    """Cells of the table of a section of Markdown, with its header."""
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def column(text: str, section: str, title: str) -> list[str]:
    header, *rows = cells(text, section)
    return [row[header.index(title)] for row in rows]


def test_a_full_report_names_its_conditions_and_has_every_plot(tmp_path: Path) -> None:
    paths = figures.write([make_result("cpu", "gpu", name="raw")], tmp_path / "new" / "load")
    plots = [f"load-{scenario}.png" for scenario in figures.PLOTS]
    assert [path.name for path in paths] == ["load.md", "load.html", *plots]
    for path in paths[2:]:
        assert path.read_bytes().startswith(PNG[:8]) and path.stat().st_size < 100e3
    text, html = (path.read_text() for path in paths[:2])
    assert re.findall(r"\]\((.*?)\)", text) == plots and len(Parsed(html).links) == len(plots)
    for fact in ("AMD EPYC", "4ba3e20", "locust 2.47.0", "--local cpu --local gpu", "raw.json", "cd45b6fb", "5 s 15%"):
        assert fact in text


def test_ratios_are_medians_of_the_ratios_within_a_round() -> None:
    def ratio(ours: list[float], base: list[float]) -> float | None:
        rows = ({"requests": figures.FEW, "audio_per_round": audio} for audio in (ours, base))
        return figures.ratio(*rows)

    assert ratio([10, 20, 60], [5, 20, 15]) == 2  # of 2, 1 and 4
    assert ratio([10, 20, 30], [5, 10]) == 2  # interrupted
    assert ratio([10, 20], [0, 10]) is None and ratio([0, 0], [1, 1]) == 0


def test_contenders_of_a_level_are_neighbours_and_the_best_is_bold(page: Callable[..., str]) -> None:
    result = make_result("cpu")
    for row in result["rows"]:
        if (row["scenario"], row["batch"], row["contender"]) == ("batch", 32, ALONE):
            row |= {"clips_per_s": 99.0, "audio_per_s": 198.0, "audio_per_round": [198.0] * 2, "p95_ms": 1.0}
    text = page(result)
    title = "Scenario batch"
    assert column(text, title, "contender") == [OURS, ALONE, PADDED] * 4
    assert column(text, title, "setting")[::3] == [f"{size}2 s, 1 client" for size in ("", "8 x ", "16 x ", "32 x ")]
    assert column(text, title, "clips/s")[-3:] == ["30", "**99**", "7.5"]
    assert column(text, title, "p95, ms")[-2] == "**1**"
    assert column(text, title, f"{OURS} / this")[-3:] == ["1", "0.303", "4"]
    # The summary names where a baseline is better.
    (line,) = (line for line in text.splitlines() if line.startswith("- ") and line.count("batch, 32 x 2 s") == 2)
    assert ALONE in line and "0.303 to 2" in line
    assert f"{OURS} / this" not in cells(text, "Scenario arrivals")[0]  # nothing to compare


def test_the_page_opens_with_two_sentences_on_the_contenders(page: Callable[..., str]) -> None:
    def opening(result: Row) -> str:
        return page(result).split("\n\n")[1]

    text = opening(make_result("cpu"))
    ours, theirs = text.removesuffix(".").split(". ")
    assert ours.startswith(OURS) and theirs.startswith(ALONE) and PADDED in theirs
    alone = make_result("cpu")
    alone["rows"] = [row for row in alone["rows"] if row["contender"] == OURS]
    assert opening(alone) == f"{ours}."


@pytest.mark.parametrize("contender", SPEED)
def test_nothing_is_concluded_from_fewer_than_20_requests(contender: str, page: Callable[..., str]) -> None:
    def conclusions(requests: int) -> tuple[list[str], list[str], list[str], str]:
        result = make_result("cpu", "gpu")
        for row in result["rows"]:
            if (row["scenario"], row["seconds"], row["contender"]) == ("single", 10, contender):
                row |= {"requests": requests, "audio_per_s": 1e3, "audio_per_round": [1e3] * 2, "p95_ms": 1.0}
        text = page(result)
        single = [column(text, "Scenario single", title)[-3:] for title in ("p95, ms", f"{OURS} / this")]
        return *single, column(text, "GPU against CPU", "GPU / CPU"), text.partition("## Conditions")[0]

    best, ratios, devices, found = conclusions(19)
    assert not any("*" in cell for cell in best) and "1,000" not in found and "33.3" not in found
    assert ratios == ["—"] * 3 if contender == OURS else ratios.count("—") == 1
    assert devices[2] == ("—" if contender == OURS else "40")
    assert "single, 10 s" not in found and " 20 requests" in found
    best, ratios, devices, found = conclusions(20)
    assert "**1**" in best and "—" not in [*ratios, *devices] and " 20 requests" not in found
    assert contender == OURS or f"{contender} has more throughput at single, 10 s, 1 client" in found


def test_the_devices_are_compared_at_the_same_levels(page: Callable[..., str]) -> None:
    text = page(make_result("cpu", "gpu"))
    assert set(column(text, "GPU against CPU", "GPU / CPU")) == {"40"}
    assert column(text, "GPU against CPU", "setting")[0] == "single, 1 s, 1 client"
    assert column(text, "GPU against CPU", "CPU, clips/s")[0] == "60"
    assert column(text, "GPU against CPU", "GPU, clips/s")[0] == "2,400"
    alone = page(make_result("cpu"))
    assert "no NVIDIA driver" in alone and "GPU / CPU" not in alone


def test_results_of_several_machines_are_one_page(page: Callable[..., str]) -> None:
    cpu, gpu = make_result("cpu", name="here"), make_result("gpu", name="there", cpu="Xeon")
    text = page(cpu, gpu)
    assert set(column(text, "GPU against CPU", "GPU / CPU")) == {"40"}
    for fact in ("here.json", "there.json", "Xeon", "AMD EPYC"):
        assert fact in text
    twice = page(cpu, make_result("cpu"))
    assert set(column(twice, "Scenario mixed", "server")) == {"1: cpu", "2: cpu"}
    assert [row[0] for row in cells(twice, "Agreement of embeddings")[1:]] == ["1: cpu/ecapa", "2: cpu/ecapa"]


def test_wrong_replies_are_in_the_summary_and_the_table(page: Callable[..., str]) -> None:
    result = make_result("cpu")
    result["rows"][0]["wrong"] = 3
    replies = sum(row["requests"] for row in result["rows"]) + 3
    text = page(result)
    assert column(text, "Scenario single", "wrong")[0] == "**3**"
    assert f"{replies:,}; 3 wrong" in text.partition("## Conditions")[0]


def test_doubtful_figures_have_a_warning(page: Callable[..., str]) -> None:
    def items(result: Row) -> int:
        return page(result).partition("## Conditions")[0].count("\n- ")

    usual = items(make_result("cpu"))
    assert items(make_result("cpu", interrupted=True)) == usual + 1
    result = make_result("cpu")
    result["rows"][0]["generator_cpu"] = figures.BUSY
    assert items(result) == usual
    result["rows"][0] |= {"generator_cpu": 0.95, "requests": figures.FEW - 1}
    assert items(result) == usual + 2
    assert column(page(result), "Scenario single", "generator, of a core")[0] == "**95%**"
    result["agreement"][0]["error"] = 2e-4
    assert column(page(result), "Agreement of embeddings", "largest relative L2 error")[0] == "**2.0e-04**"


def test_failures_are_listed_with_their_reason(page: Callable[..., str]) -> None:
    result = make_result("cpu")
    place = next(n for n, row in enumerate(result["rows"]) if (row["contender"], row["batch"]) == (PADDED, 32))
    keys = ("server", "contender", *figures.LEVEL)
    result["rows"][place] = {key: result["rows"][place][key] for key in keys} | {"failed": "exit status 137"}
    result["rows"][0]["errors"] = {"DEADLINE_EXCEEDED": 2}
    result["rows"][-2]["max_requests"] = 7
    text = page(result)
    assert len(column(text, "Scenario batch", "clips/s")) == 11
    assert f"cpu, {PADDED}, 32 x 2 s, 1 client: exit status 137" in text
    assert column(text, "Scenario single", "failed")[0] == "2" and "DEADLINE" in text
    assert "7 requests" in text


@pytest.mark.parametrize("kept", [0, 1, 5, 17])
def test_any_rows_make_a_report(kept: int, tmp_path: Path) -> None:
    result = make_result("cpu", interrupted=True, agreement=[])
    result["rows"] = result["rows"][:kept]
    nothing_right = {f"p{n}_ms": None for n in (50, 90, 95, 99)} | {"clips_per_s": 0.0, "audio_per_round": [0.0]}
    if kept:
        result["rows"][0] |= nothing_right | {"requests": 0, "audio_per_s": 0.0, "generator_cpu": None}
    assert all(path.exists() for path in figures.write([result], tmp_path / "load"))


def test_a_result_is_read_as_it_was_saved(tmp_path: Path) -> None:
    result = make_result("cpu")
    figures.save(result, tmp_path / "load.json")
    assert figures.read(tmp_path / "load.json") == result | {"name": "load"}
    assert figures.shorten({"a": [1 / 3, 1], "b": None}) == {"a": [0.333333, 1], "b": None}


def test_the_command_writes_beside_the_first_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, server in ("one", "cpu"), ("two", "gpu"):
        figures.save(make_result(server), tmp_path / f"{name}.json")
    results = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    assert main(["report", results[0]]) == 0
    assert f"{tmp_path / 'one.html'}" in capsys.readouterr().out and (tmp_path / "one.md").exists()
    assert main(["report", *results, "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "one-and-two.md").exists()


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[1]", b'{"kind": "soak"}'])
def test_a_file_without_a_result_is_rejected(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MeasureError, match="bad.json"):
        figures.read(path)
