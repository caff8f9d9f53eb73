"""The report of a load test: what it says of made-up results, whose every figure is known."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtest import load_report as report
from loadtest.load_report import ALONE as ONE
from loadtest.load_report import GPU, IN_PROCESS, MEASURED, OURS, PADDED, Measured, ReportError

Row = dict[str, Any]

MIX = {"1": 2, "2": 4, "3": 3, "5": 2, "10": 1}
SPEED = {OURS: 60.0, ONE: 30.0, PADDED: 15.0, IN_PROCESS: 64.0}  # seconds of audio per second, on the CPU
FASTER = {OURS: 40.0, ONE: 4.0, PADDED: 8.0, IN_PROCESS: 40.0}  # on the GPU
PLOTS = ["latency", "batch", "clients", "arrivals", "ramp", "resources"]
VOID = {"meta", "br", "hr", "img"}


def make_row(target: str, contender: str, scenario: str, **given: Any) -> Row:
    """A row of made-up but consistent figures; `given` are its load and what else it shall say."""
    seconds, batch, users = given.get("seconds"), given.get("batch", 1), given.get("users", 1) or 8
    length = seconds or 3.0
    speed = SPEED[contender] * (FASTER[contender] if target == "gpu" else 1)
    if target == "gpu" and contender in (OURS, IN_PROCESS):
        speed *= min(1.0, 0.2 + 0.05 * users * batch)
    rate = speed / length
    p50 = 1e3 * users * batch / rate
    row: Row = {
        "target": target,
        "model": {OURS: "ecapa", ONE: "speechbrain", PADDED: "speechbrain_padded", IN_PROCESS: "ecapa"}[contender],
        "contender": contender,
        "scenario": scenario,
        "seconds": seconds,
        "batch": batch,
        "users": users,
        "offered": None,
        "share": None,
        "loop": "closed",
        "duration_s": 12.0,
        "requests": max(report.FEW, round(rate * 12 / batch)),
        "clips": round(rate * 12),
        "audio_s": rate * 12 * length,
        "clips_per_s": rate,
        "audio_per_s": speed,
        **{f"p{n}_ms": p50 * factor for n, factor in ((50, 1), (90, 1.3), (95, 1.4), (99, 1.9))},
        "max_ms": p50 * 2.2,
        "wrong": 0,
        "worst_error": 0.21 if contender == PADDED else 3e-6,
        "refused": 0,
        "errors": {},
        "mean_batch": None if contender == IN_PROCESS else min(users, 3.0),
        "queue_ms": None if contender == IN_PROCESS else p50 * 0.6,
        "compute_ms": None if contender == IN_PROCESS else p50 * 0.35,
        "generator_cpu": None if contender == IN_PROCESS else 0.21,
        "per_round": [
            {"clips_per_s": rate * f, "audio_per_s": speed * f, "p50_ms": p50, "p95_ms": p50} for f in (1, 1)
        ],
        "samples": [sample(target, t / 2, contender) for t in range(24)],
        "windows": [],
    }
    return row | given


def sample(target: str, t: float, contender: str) -> Row:
    found = {"t": t, "cpu": 0.9 + 0.08 * math.sin(t), "memory_mb": 400 + 20 * (contender == PADDED) + 5 * math.sin(t)}
    if target == "gpu":
        found |= {"gpu": 0.7 + 0.2 * math.sin(t), "gpu_memory_mb": 2100.0 + 900 * (contender == PADDED), "pending": 3}
    return found


def rows_of(target: str) -> list[Row]:
    """What a full run measures on a target."""
    rows = []
    for contender in (OURS, ONE, PADDED, IN_PROCESS):
        rows += [make_row(target, contender, "single", seconds=float(seconds)) for seconds in (1, 5, 10)]
        rows += [make_row(target, contender, "mixed", users=16)]
        if contender != IN_PROCESS:
            rows += [make_row(target, contender, "batch", seconds=2.0, batch=batch) for batch in (1, 8, 16, 32)]
            rows += [make_row(target, contender, "clients", seconds=2.0, users=users) for users in (1, 4, 16, 64, 200)]
    capacity = make_row(target, OURS, "mixed", users=16)["clips_per_s"]
    for share, p50, refused in ((0.5, 60.0, 0), (0.8, 110.0, 0), (0.95, 300.0, 4), (1.2, 2900.0, 40)):
        tails = {"p50_ms": p50, "p90_ms": p50 * 2, "p95_ms": p50 * 2.4, "p99_ms": p50 * 4}
        load = {"users": None, "offered": share * capacity, "share": share, "loop": "open", "refused": refused}
        rows.append(make_row(target, OURS, "arrivals", **load) | tails)
    windows = [
        {"t": t + 0.5, "users": 2 ** (t // 2), "clips_per_s": min(2.0 ** (t // 2) * 4, capacity), "p50_ms": 50.0 + t}
        | {"p95_ms": 80.0 + 9 * t if t != 3 else None}
        for t in range(14)
    ]
    return [*rows, make_row(target, OURS, "ramp", users=None, windows=windows)]


def make_target(name: str) -> Row:
    device = "GPU" if name == "gpu" else "CPU"
    model = {"backend": "onnxruntime", "file": "model.onnx", "instances": [f"1 on the {device}"], "precision": "fp32"}
    model |= {"contender": OURS, "max_batch": 32, "threshold": 0.45, "max_seconds": 30.0, "sha256": "ab" * 32}
    other = {"backend": "python", "file": "", "instances": ["1"], "precision": "fp32", "max_batch": 32}
    other |= {"threshold": None, "max_seconds": None, "sha256": None}
    return {
        "name": name,
        "url": "grpc://127.0.0.1:41231",
        "local": True,
        "device": device,
        "chosen": f"{device}, as asked",
        "server_version": "2.51.0",
        "gpus": ["NVIDIA H200"] if name == "gpu" else [],
        "max_requests": 128,
        "models": {
            "ecapa": model,
            "speechbrain": {**other, "contender": ONE},
            "speechbrain_padded": {**other, "contender": PADDED},
        },
    }


def make_result(*targets: str, **given: Any) -> Row:
    """A full result of these targets."""
    agreement = [
        {"a": f"{name}/ecapa", "b": "SpeechBrain", "clips": 63, "cosine": 0.9999999, "error": 5.5e-6}
        for name in targets
    ]
    if {"cpu", "gpu"} <= set(targets):
        agreement.append({"a": "gpu/ecapa", "b": "cpu/ecapa", "clips": 63, "cosine": 0.9999998, "error": 8e-6})
    return {
        "kind": "load",
        "date": "2026-11-23T03:00:00+00:00",
        "cpu": "AMD EPYC",
        "cores": 2,
        "python": "3.11.7",
        "packages": {"locust": "2.47.0", "onnxruntime": "1.31.1"},
        "commit": "4f32f0e",
        "command": "python -m loadtest run --local " + " ".join(targets),
        "took_s": 533.1,
        "interrupted": False,
        "conditions": {
            "source": "random (seed 0, channels 1024)",
            "references": "SpeechBrain",
            "clips": "speech of samples/, 9 of each length",
            "mix": MIX,
            "warm_up_s": 1.0,
            "seconds": 6.0,
            "rounds": 2,
            "processes": 1,
            "bound": {"fp32": 1e-4, "fp16": 5e-3},
        },
        "targets": [make_target(name) for name in targets],
        "not_measured": {} if "gpu" in targets else {"gpu": "no NVIDIA driver (libcuda.so.1) was found"},
        "rows": [row for name in targets for row in rows_of(name)],
        "agreement": agreement,
    } | given


class Parsed(HTMLParser):
    """Text, links and ids of a page; every element must be closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plots, which take their time."""
    monkeypatch.setattr(report, "draw", lambda rows, targets: {})


@pytest.fixture
def pages(undrawn: None, tmp_path: Path) -> Callable[..., tuple[Parsed, str]]:
    """What is written of results: the parsed HTML, and the Markdown."""

    def write(*results: Row) -> tuple[Parsed, str]:
        paths = report.write(list(results), tmp_path / "new", "load")
        assert paths == [tmp_path / "new" / "load.html", tmp_path / "new" / "load.md"]
        return Parsed(paths[0].read_text()), paths[1].read_text()

    return write


def verdicts(*results: Row) -> dict[str, str]:
    return {goal.name: goal.verdict for goal in report.goals(Measured.of(list(results)))}


def table_rows(page: str, section: str) -> list[list[str]]:
    """Cells of the Markdown tables of a section, without their heads."""
    part = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "---" not in line][1:]


def test_a_full_report_has_every_plot_and_needs_no_other_file(tmp_path: Path) -> None:
    paths = report.write([make_result("cpu", "gpu")], tmp_path, "load")
    assert [path.name for path in paths] == ["load.html", "load.md", *(f"load-{plot}.png" for plot in PLOTS)]
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and 2e3 < path.stat().st_size < 100e3
    page = Parsed(paths[0].read_text())
    assert not {"script", "link", "iframe", "img"} & page.tags and "svg" in page.tags
    assert page.links and all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert not re.search(r"url\((?!#)|@import", paths[0].read_text())
    words = paths[1].read_text()
    assert re.findall(r"\]\((.*?)\)", words) == [f"load-{plot}.png" for plot in PLOTS]
    order = ["Conditions", "Servers and their models", *(title for title, _ in report.SCENARIOS.values())]
    order += ["Load and memory", "Agreement of the embeddings", "CPU against GPU", "Goals"]
    assert re.findall(r"^## (.*)$", words, re.MULTILINE) == [*order, "What this does not show"]
    for text in (page.text, words):
        for word in (
            "AMD EPYC, 2 cores",
            "4f32f0e",
            "ab" * 32,
            "locust 2.47.0",
            "load.json",
            "warm-up",
            "closed: ",
            "33 %",
        ):
            assert word in text


def test_ratios_are_medians_of_the_ratios_within_a_round(pages: Callable[..., tuple[Parsed, str]]) -> None:
    def rounds(*rates: float) -> Row:
        middle = sorted(rates)[len(rates) // 2]
        return {"audio_per_s": middle, "per_round": [{"audio_per_s": rate} for rate in rates]}

    assert report.ratio(rounds(10, 20, 30), rounds(5, 20, 10)) == 2  # of 2, 1 and 3
    assert report.ratio(rounds(10, 20, 30), rounds(5, 10)) == 20 / 10  # numbers differ: of the medians
    assert report.ratio(rounds(10, 20), rounds(0, 10)) == 20 / 10  # nothing to divide by in one round
    assert report.ratio(rounds(10), rounds(0)) is None
    assert report.ratio(rounds(0, 0, 0), rounds(1, 1, 1)) == 0

    result = make_result("cpu")
    for row in result["rows"]:
        if row["scenario"] == "mixed" and row["contender"] in (OURS, ONE):
            row |= rounds(10, 20, 30) if row["contender"] == OURS else rounds(5, 20, 10)
    ours, alone, *_ = table_rows(pages(result)[1], "Mixed lengths")
    assert (ours[1], ours[8], alone[1], alone[8]) == (OURS, "2.00", ONE, "1.00")


def test_contenders_are_neighbours_and_the_best_served_is_bold(pages: Callable[..., tuple[Parsed, str]]) -> None:
    result = make_result("cpu")
    for row in result["rows"]:
        if row["scenario"] == "batch" and row["batch"] == 32 and row["contender"] == ONE:
            row |= {"clips_per_s": 99.0, "per_round": [{"audio_per_s": 198.0}] * 2, "p50_ms": 1.0}
    page, words = pages(result)
    batches = table_rows(words, "Batches")
    assert [row[1] for row in batches] == [OURS, ONE, PADDED] * 4
    assert [row[0] for row in batches[::3]] == ["1 x 2 s", "8 x 2 s", "16 x 2 s", "32 x 2 s"]
    assert [row[2] for row in batches[-3:]] == ["30.0", "**99.0**", "7.50"] and batches[-2][4] == "**1.00**"
    assert "slower with batches: 32 x 2 s (0.30)" in page.text
    single = table_rows(words, "One client")
    assert [row[1] for row in single[:4]] == [OURS, ONE, PADDED, IN_PROCESS]
    assert single[0][2] == "**60.0**" and single[3][2] == "64.0"  # in process is faster, but is not served
    assert table_rows(words, "Arrivals")[0][1:3] == [OURS, "20.0"]  # alone: nothing to be better than


def test_a_side_that_was_not_measured_is_shown(pages: Callable[..., tuple[Parsed, str]]) -> None:
    page, words = pages(make_result("cpu"))
    assert f"GPU against CPU: {MEASURED} (GPU: no NVIDIA driver (libcuda.so.1) was found)." in page.text
    assert "Not measured: gpu: no NVIDIA driver" in page.text
    compared = {row[0]: row for row in table_rows(words, "CPU against GPU")}
    assert compared["one client: 5 s clips"][1:] == ["12.0", MEASURED, "117", MEASURED, MEASURED, "5 to 10", MEASURED]
    assert compared["batches: 32 x 2 s"][-2:] == ["10 to 32", MEASURED]
    assert table_rows(words, "Agreement of the embeddings")[-1][:4] == ["a GPU", "a CPU", MEASURED, MEASURED]
    assert "What was not measured: the GPU." in words
    _, words = pages(make_result("gpu", not_measured={}))
    compared = {row[0]: row for row in table_rows(words, "CPU against GPU")}
    assert compared["one client: 5 s clips"][1] == MEASURED and compared["one client: 5 s clips"][2] != MEASURED


def test_speed_ups_stand_beside_what_is_expected(pages: Callable[..., tuple[Parsed, str]]) -> None:
    result = make_result("cpu", "gpu")
    page, words = pages(result)
    compared = {row[0]: row for row in table_rows(words, "CPU against GPU")}
    # 40 times as fast, times 0.25 with one clip at a time, 0.6 with eight
    assert compared["one client: 5 s clips"][5:] == ["10.0", "5 to 10", "as expected"]
    assert compared["batches: 8 x 2 s"][5:] == ["24.0", "10 to 32", "as expected"]
    assert compared["batches: 32 x 2 s"][5:] == ["40.0", "10 to 32", "above"]
    assert compared["more clients: 64 clients, 2 s clips"][5:] == ["40.0", "—", "—"]
    assert "GPU against CPU: 10.0 to 40.0 times the speed of the CPU." in page.text
    assert "padded batches: 0.21" in page.text and "Of padded batches only shape" in page.text
    agreed = table_rows(words, "Agreement of the embeddings")
    assert ["gpu/ecapa", "cpu/ecapa", "63", "0.9999998", "8e-6", "1e-4", "yes"] in agreed


def test_goals_are_judged_at_their_bounds() -> None:
    result = make_result("cpu", "gpu")
    five, mixed, padded, tails, wrong, served, gpu = verdicts(result)
    assert verdicts(result) == {
        **dict.fromkeys((five, mixed, padded, tails, wrong, served), "reached"),
        gpu: "reached",  # 2 * 40 / 4 = 20 times
    }

    def with_rates(
        scenario: str, contender: str, base: str, factor: float, key: str = "audio_per_s", **load: Any
    ) -> Row:
        changed = make_result("cpu", "gpu")
        for row in changed["rows"]:
            if (row["scenario"], row["contender"]) == (scenario, contender) and load.items() <= row.items():
                row[key] = factor * 10.0
                row["per_round"] = [{"audio_per_s": row["audio_per_s"]}] * 2
            if (row["scenario"], row["contender"]) == (scenario, base) and load.items() <= row.items():
                row[key] = 10.0
                row["per_round"] = [{"audio_per_s": row["audio_per_s"]}] * 2
        return changed

    def judged(name: str, *given: Any, **load: Any) -> str:
        return verdicts(with_rates(*given, **load))[name]

    one = {"target": "cpu", "seconds": 5.0}
    assert judged(five, "single", OURS, ONE, 1.3, **one) == "reached"
    assert judged(five, "single", OURS, ONE, 1.2999, **one) == "not reached"
    assert judged(five, "single", OURS, ONE, 1.2, target="cpu", seconds=10.0) == "reached"  # another length
    assert judged(mixed, "mixed", OURS, ONE, 1.3, target="cpu") == "reached"
    assert judged(mixed, "mixed", OURS, ONE, 1.29, target="cpu") == "not reached"
    assert judged(mixed, "mixed", OURS, ONE, 1.29, target="gpu") == "reached"  # a goal of CPUs
    assert judged(padded, "mixed", OURS, PADDED, 3.0, target="cpu") == "reached"
    assert judged(padded, "mixed", OURS, PADDED, 2.99, target="cpu") == "not reached"
    assert judged(tails, "mixed", OURS, PADDED, 0.99, "p95_ms", target="cpu") == "reached"
    assert judged(tails, "mixed", OURS, PADDED, 1.0, "p95_ms", target="cpu") == "not reached"
    assert judged(served, "single", OURS, IN_PROCESS, 0.9, **one) == "reached"
    assert judged(served, "mixed", OURS, IN_PROCESS, 0.899, target="gpu") == "not reached"
    assert judged(gpu, "clients", OURS, ONE, 10.0, target="gpu", users=64) == "reached"
    assert judged(gpu, "clients", OURS, ONE, 9.9, target="gpu", users=200) == "not reached"
    assert judged(gpu, "clients", OURS, ONE, 9.9, target="gpu", users=16) == "reached"  # below 64 clients
    (found,) = (
        goal.found
        for goal in report.goals(Measured.of([with_rates("single", OURS, ONE, 1.2996, **one)]))
        if goal.name == five
    )
    assert found.startswith("1.2996 (cpu, 5 s clips")  # not 1.30, which would be enough


def test_a_goal_is_not_reached_by_what_is_missing() -> None:
    result = make_result("cpu")
    five, mixed, padded, tails, wrong, served, gpu = verdicts(result)
    assert verdicts(result)[gpu] == MEASURED
    result["rows"] = [row for row in result["rows"] if row["scenario"] == "single"]
    found = verdicts(result)
    assert found[five] == "reached"
    assert {found[name] for name in (mixed, padded, tails, served, gpu)} == {MEASURED}
    bad = make_result("cpu")
    bad["rows"] = [row for row in bad["rows"] if row["scenario"] == "single"]
    for row in bad["rows"]:
        row["p95_ms"] = 1e4 if row["contender"] == OURS else row["p95_ms"]
    assert verdicts(bad)[tails] == "not reached"  # whatever the missing part would give


def test_wrong_replies_come_first(pages: Callable[..., tuple[Parsed, str]]) -> None:
    result = make_result("cpu")
    result["rows"][0]["wrong"] = 3
    page, words = pages(result)
    replies = sum(row["requests"] for row in result["rows"]) + 3
    warning = (
        f"3 of {replies:,} replies were WRONG, not the embedding of the clip: 3 of cpu, ours, one client: 1 s clips."
    )
    assert warning in page.text and "Warnings" in page.text
    assert page.text.index(warning) < page.text.index("Conditions")
    assert f"> - {warning}" in words and f"Wrong replies: 3 of {replies:,}." in words
    assert table_rows(words, "One client")[0][-2] == "**3**"
    assert verdicts(result)["no wrong reply"] == "not reached"
    assert "! 3 of" in report.summary([result]) and "not reached   no wrong reply" in report.summary([result])


def test_what_spoils_figures_is_said(pages: Callable[..., tuple[Parsed, str]]) -> None:
    assert "Warnings" not in pages(make_result("cpu", "gpu"))[0].text
    assert "Interrupted: what follows is not all" in pages(make_result("cpu", "gpu", interrupted=True))[0].text

    result = make_result("cpu", "gpu")
    slow = next(row for row in result["rows"] if row["users"] == 200 and row["target"] == "gpu")
    slow["generator_cpu"] = 0.95
    page, words = pages(result)
    assert (
        "In 1 row the load generator was the limit: use --processes. It was busy for up to 95 % of a core" in page.text
    )
    assert "gpu, ours, more clients: 200 clients" in page.text and "**95 %**" in words
    slow["generator_cpu"] = 0.9
    assert "was the limit" not in pages(result)[0].text

    result = make_result("cpu", "gpu")
    result["agreement"][0]["error"] = 2e-4
    page, words = pages(result)
    assert "cpu/ecapa and SpeechBrain differ by 2e-4, 1e-4 is allowed." in page.text and "| **no** |" in words
    result["targets"][0]["models"]["ecapa"]["precision"] = "fp16"  # its bound is wider
    assert "is allowed." not in pages(result)[0].text
    few = make_result("cpu")
    few["rows"][0]["requests"] = report.FEW - 1
    assert "In 1 row fewer than 5 requests" in pages(few)[0].text


def test_a_failed_row_keeps_its_place(pages: Callable[..., tuple[Parsed, str]]) -> None:
    result = make_result("cpu", "gpu")
    keys = "target", "model", "contender", "scenario", "seconds", "batch", "users", "offered", "share", "loop"
    place = next(n for n, row in enumerate(result["rows"]) if row["contender"] == PADDED and row["batch"] == 32)
    result["rows"][place] = {key: result["rows"][place][key] for key in keys} | {"failed": "the server ended: 137"}
    result["rows"][0]["errors"] = {"Deadline Exceeded": 2}
    page, words = pages(result)
    assert "Failed: cpu, padded batches, batches: 32 x 2 s: the server ended: 137" in page.text
    found = [row for row in table_rows(words, "Batches") if "**failed**" in row]
    assert len(found) == 1 and found[0][1:4] == [PADDED, "**failed**", "—"]
    assert "cpu, ours, one client: 1 s clips: 2 x Deadline Exceeded" in page.text
    assert table_rows(words, "One client")[0][-3] == "2"


@pytest.mark.parametrize("kept", [0, 1, 5, 17])
def test_any_rows_make_a_report(kept: int, pages: Callable[..., tuple[Parsed, str]]) -> None:
    result = make_result("cpu", interrupted=True, agreement=[])
    result["rows"] = result["rows"][:kept]
    page, words = pages(result)
    assert ("Nothing was measured" in page.text) == (kept == 0)
    assert "Interrupted" in report.summary([result]) and "Goals" in page.text
    empty = make_result(rows=[], not_measured={"cpu": "stopped"})
    assert "Not measured: cpu: stopped" in pages(empty)[0].text
    assert set(verdicts(empty).values()) == {MEASURED}


def test_plots_are_of_what_is_there(tmp_path: Path) -> None:
    names = [target["name"] for target in make_result("cpu")["targets"]]
    assert report.draw([], names) == {}
    other = make_row("cpu", OURS, "batch", seconds=2.0, samples=[]) | {"contender": "another"}
    nothing_right = make_row("cpu", OURS, "clients", users=4, samples=[{"t": 0.5}]) | {"p50_ms": None, "p95_ms": None}
    result = make_result("cpu", rows=[other, nothing_right])
    assert [path.name for path in report.write([result], tmp_path, "a b")] == ["a b.html", "a b.md", "a b-batch.png"]
    assert "](a%20b-batch.png)" in (tmp_path / "a b.md").read_text()


def test_results_of_several_machines_are_one_report(pages: Callable[..., tuple[Parsed, str]]) -> None:
    cpu, gpu = make_result("cpu", name="here"), make_result("gpu", name="there", cpu="Xeon", not_measured={"cpu": "no"})
    page, words = pages(cpu, gpu)
    assert "Not measured:" not in page.text and "GPU against CPU: 10.0 to 40.0 times" in page.text
    for text in ("1: here", "2: there", "here.json", "there.csv", "Xeon", "AMD EPYC"):
        assert text in page.text
    page, words = pages(cpu, make_result("cpu"))  # both have a target of that name
    assert {row[0] for row in table_rows(words, "Mixed lengths")} >= {"cpu (1): mixed clips, 16 clients"}
    assert "cpu (2): ours has 2.00 times" in page.text and "cpu (2)/ecapa" in page.text


def test_what_comes_from_data_is_escaped(undrawn: None, tmp_path: Path) -> None:
    evil = '<script src="http://x">|`*_[a](http://x)'
    result = make_result("cpu", command=evil, not_measured={evil: evil})
    result["targets"][0] |= {"name": evil, "url": evil}
    result["rows"] = [{**row, "target": evil, "contender": row["contender"]} for row in result["rows"]]
    result["rows"][0]["errors"] = {evil + "\n\n# title": 1}
    paths = report.write([result], tmp_path, "load")
    page, words = Parsed(paths[0].read_text()), paths[1].read_text()
    assert page.links == [] and "script" not in page.tags and evil in page.text
    assert "<" not in words and "[a]" not in words and "\n# title" not in words
    for table in re.findall(r"(?:^\|.*\n)+", words, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_plots_are_drawn_with_odd_names(tmp_path: Path) -> None:
    name = "_$\\frac$ <b> &"
    row = make_row("cpu", OURS, "batch", seconds=2.0) | {"target": name}
    result = make_result("cpu", rows=[row, {**row, "target": "cpu"}])
    result["targets"].append({**result["targets"][0], "name": name})
    Parsed(report.write([result], tmp_path, "load")[0].read_text())


def test_the_command_writes_beside_the_first_result(
    undrawn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, target in ("one", "cpu"), ("two", "gpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps(make_result(target)))
    results = [tmp_path / "one.json", tmp_path / "two.json"]
    report.run(argparse.Namespace(results=results[:1], out=None))
    assert capsys.readouterr().out == f"wrote {tmp_path / 'one.html'}\nwrote {tmp_path / 'one.md'}\n"
    assert "one.json, one.csv" in (tmp_path / "one.html").read_text()
    report.run(argparse.Namespace(results=results, out=tmp_path / "new" / "folder"))
    assert (tmp_path / "new" / "folder" / "one-and-two.md").exists()


BROKEN: dict[str, Callable[[Row], Any]] = {
    "no rows": lambda result: result.pop("rows"),
    "rows of text": lambda result: result.update(rows=["x"]),
    "a row without a scenario": lambda result: result["rows"][0].pop("scenario"),
    "latency in words": lambda result: result["rows"][0].update(p50_ms="fast"),
    "no conditions": lambda result: result.update(conditions=None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_result_is_refused(case: str, tmp_path: Path) -> None:
    result = make_result("cpu")
    BROKEN[case](result)
    path = tmp_path / "load.json"
    path.write_text(json.dumps(result))
    with pytest.raises(ReportError, match=": not whole .*: measure again") as caught:
        report.run(argparse.Namespace(results=[path], out=None))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read .No such file or directory.: give the NAME.json"):
        report.read(tmp_path / "none.json")
    for content in (b"{", b"\xff\xfe", b"[1]", b"7"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ReportError, match="not JSON|no result of a load test"):
            report.read(tmp_path / "bad.json")


def test_the_summary_is_short() -> None:
    text = report.summary([make_result("cpu", "gpu")])
    assert len(text.splitlines()) < 20
    assert "cpu: ours has 2.00 times the speed of one at a time, more in 13 of 13 settings" in text
    assert "reached" in text and "Wrong replies: 0 of" in text
    assert GPU in text
