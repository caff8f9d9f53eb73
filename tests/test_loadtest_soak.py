"""The soak test, and the tally that it shares with the fault tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loadtest import soak
from loadtest.__main__ import main
from loadtest.machine import MeasureError
from server import TritonServer
from tests.faults import hostile
from tests.faults.judge import Clip, Outcome, Rejection, Tally, Urls, check_apart

Reference = Callable[[np.ndarray], np.ndarray]


def clips(reference: Reference) -> list[Clip]:
    random = np.random.default_rng(0)
    waveforms = [0.1 * random.standard_normal(8000 + 1000 * n).astype(np.float32) for n in range(4)]
    return [Clip(f"clip {n}", waveform, reference(waveform)) for n, waveform in enumerate(waveforms)]


@pytest.mark.slow
@pytest.mark.parametrize("exported", [True, False])
def test_the_soak_runs(exported: bool, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(soak, "LENGTHS", 12)
    figures, drawn = tmp_path / "new" / "figures.json", tmp_path / "new" / "memory.png"
    served = ["--repository", str(repository)] if exported else ["--source", "random", "--channels", "32"]
    load = ["--minutes", "0.2", "--clients", "3", "--hostile", "0.4"]
    assert main(["soak", *served, *load, "--json", str(figures), "--plot", str(drawn)]) == 0
    report = json.loads(figures.read_text())
    good, bad = report["good_requests"], report["hostile_requests"]
    assert good["requests"] == good["right"] > 0
    assert bad["faults"] >= bad["requests"] > 0
    assert report["wrong"] == [] and not report["process_ended"]
    assert report["levels_off"] is None  # too short
    assert report["largest_bytes"] >= report["ready_bytes"] > 1e7
    assert drawn.read_bytes().startswith(b"\x89PNG\r\n")


def run_client(traffic: soak.MixedTraffic, number: int, requests: int) -> None:
    """Runs one client until so many requests have a reply."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(traffic.client, number)
        while traffic.requests < requests and not future.done():
            time.sleep(0.01)
        traffic.stop.set()
        future.result()


@pytest.mark.parametrize("number", [0, 1, 2], ids=["gRPC", "HTTP", "SpeakerClient"])
def test_another_clips_embedding_is_wrong(server: TritonServer, reference: Reference, number: int) -> None:
    right = clips(reference)
    check_apart(right)
    traffic = soak.MixedTraffic(Urls.of(server), [[clip] for clip in right], {}, 0)
    run_client(traffic, number, 6)
    assert traffic.good.counts["right"] == traffic.good.counts["requests"] >= 6
    swapped = [Clip(a.name, a.waveform, b.reference) for a, b in zip(right, [*right[1:], right[0]], strict=True)]
    traffic = soak.MixedTraffic(Urls.of(server), [[clip] for clip in swapped], {}, 0)
    run_client(traffic, number, 6)
    assert len(traffic.good.wrong) == traffic.good.counts["requests"] >= 6


def test_hostile_requests_are_judged_apart(server: TritonServer, reference: Reference) -> None:
    bad = {name: request for name, request in hostile.requests(reference).items() if name != hostile.LONGEST}
    bad[hostile.LONGEST] = bad["silence"]
    traffic = soak.MixedTraffic(Urls.of(server), [[clip] for clip in clips(reference)], bad, 1)
    run_client(traffic, 0, len(bad))
    assert traffic.hostile.counts["requests"] >= len(bad) and traffic.hostile.wrong == []
    assert traffic.hostile.counts["right"] and traffic.hostile.rejections["NaN"] and not traffic.good.counts["requests"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda row: row, "right"),
        (lambda row: row * (1 + 1e-6), "right"),
        (lambda row: row * 1.001, "wrong"),
        (lambda row: row[::-1], "wrong"),
        (lambda row: np.where(np.arange(len(row)) == 3, np.nan, row), "wrong"),
        (lambda row: row * np.nan, "rejected"),
    ],
)
def test_the_verdict_on_a_reply(change: Callable[[np.ndarray], np.ndarray], verdict: str) -> None:
    row = np.arange(1, 193, dtype=np.float32)
    clip, none = Clip("clip", np.zeros(1, np.float32), row), Clip("none", np.zeros(1, np.float32), None)
    outcomes: list[tuple[list[Clip], Outcome, str]] = [
        ([clip], change(row)[None], verdict),
        ([clip, clip], np.stack([row, change(row)]), verdict),
        ([clip, clip], change(row)[None], "wrong"),  # a row is missing
        ([none], change(row)[None], "rejected" if verdict == "rejected" else "wrong"),
        ([clip], Rejection("UNAVAILABLE"), "rejected"),
    ]
    for sent, outcome, expected in outcomes:
        tally = Tally([clip])
        assert tally.check_batch(sent, outcome) == expected
        assert tally.counts[expected] == tally.counts["requests"] == 1
        assert bool(tally.wrong) is (expected == "wrong")


def test_clips_that_cannot_be_told_apart_are_rejected() -> None:
    row = np.arange(192, dtype=np.float32)
    one, other = (Clip(name, np.zeros(1, np.float32), row * scale) for name, scale in (("a", 1), ("b", 1 + 1e-5)))
    with pytest.raises(MeasureError):
        check_apart([one, other])


def test_a_soak_that_cannot_write_does_not_begin(tmp_path: Path) -> None:
    assert main(["soak", "--json", str(tmp_path)]) == 1


GOOD = {
    "wrong": [],
    "rejections": {"good": {"NaN": 2}},
    "process_ended": False,
    "good_requests": {"right": 1},
    "levels_off": True,
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, ""),
        ({"levels_off": None}, ""),
        ({"wrong": ["clip 7"]}, "clip 7"),
        ({"rejections": {"good": {"INTERNAL": 3}}}, "INTERNAL"),
        ({"process_ended": True}, "ended"),
        ({"good_requests": {}}, "no request"),
        ({"levels_off": False}, "memory"),
    ],
)
def test_a_broken_promise_fails_the_soak(change: dict[str, object], broken: str) -> None:
    found = soak.faults(GOOD | change)
    assert len(found) == bool(broken) and broken in "".join(found)


MB = 1e6


@pytest.mark.parametrize(
    ("what", "bytes_at", "levels_off"),
    [
        ("level at once", lambda at: 300 * MB, True),
        ("rises, then level", lambda at: min(100 + at, 300) * MB, True),
        ("sinks", lambda at: (900 - at) * MB, True),
        ("a leak of 10 MB a minute", lambda at: (300 + at / 6) * MB, False),
        ("a leak that is small beside 2 GB", lambda at: (2000 + at / 6) * MB, True),
        ("large batches now and then", lambda at: (800 if at % 10 == 0 else 300) * MB, True),
        ("one step up at the end", lambda at: (300 if at < 595 else 900) * MB, True),
        ("a step up that stays", lambda at: (300 if at < 450 else 330) * MB, False),
    ],
)
def test_the_verdict_on_memory(what: str, bytes_at: Callable[[float], float], levels_off: bool) -> None:
    *_, found = soak.judge_memory([(float(at), bytes_at(at)) for at in range(0, 601, 2)])
    assert found is levels_off


def test_a_short_run_is_not_judged() -> None:
    *_, verdict = soak.judge_memory([(float(at), (100 + at) * MB) for at in range(0, 179, 2)])
    assert verdict is None
