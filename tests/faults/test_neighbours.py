"""Bad requests among good ones: README.md's table row by row, streams of garbage, and all of them at once."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from server import wheel
from server.triton import TritonServer, find_installed

from .harness import (
    PATIENCE,
    ClientSender,
    Clip,
    GrpcSender,
    HttpSender,
    Load,
    Outcome,
    Refusal,
    Tally,
    Urls,
    all_at_once,
    changed_backend,
    words,
)
from .hostile import STREAMS, Hostile, requests

README = (Path(__file__).parent / "README.md").read_text()
TABLE = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
ROWS = {case: cells for case, *cells in TABLE if case != "case"}
SAME_WORDS = "the same words"  # as over gRPC
EMPTY = "an empty clip", "three empty clips"
NOT_SAID = "–"  # this protocol has no words for the case


@pytest.fixture(scope="session")
def hostile(reference: Callable[[np.ndarray], np.ndarray]) -> dict[str, Hostile]:
    return requests(reference)


def ask_over_grpc(url: str, request: Hostile) -> Outcome:
    assert request.grpc is not None
    with GrpcSender(url) as sender:
        return sender.ask(request.grpc)


def ask_over_http(url: str, request: Hostile) -> Outcome:
    assert request.http is not None
    with HttpSender(url) as sender:
        header, body, path, fields = request.http
        return sender.post(header, body, path, **fields)


def ask(served: Urls, request: Hostile) -> Outcome:
    return ask_over_grpc(served.grpc, request) if request.grpc is not None else ask_over_http(served.http, request)


def described(verdict: str, outcome: Outcome) -> str:
    if isinstance(outcome, Refusal):
        return words(outcome)
    return "NaN" if verdict == "refused" else verdict


def agrees(seen: str, cell: str) -> bool:
    return seen.startswith(cell[:-2]) if cell.endswith(" …") else seen == cell


def test_the_table_has_every_case(hostile: dict[str, Hostile]) -> None:
    assert list(ROWS) == list(hostile)


@pytest.mark.parametrize("case", ROWS)
def test_what_a_bad_request_gets(
    case: str, hostile: dict[str, Hostile], served: Urls, short: list[Clip], tally: Tally
) -> None:
    request, (over_grpc, over_http, beside) = hostile[case], ROWS[case]
    over_http = over_http.replace(SAME_WORDS, over_grpc.partition(" ")[2])
    for said, cell, send, url in (
        (request.grpc, over_grpc, ask_over_grpc, served.grpc),
        (request.http, over_http, ask_over_http, served.http),
    ):
        if said is None:
            assert cell == NOT_SAID
            continue
        tally.fault()
        outcome = send(url, request)
        seen = described(tally.check_batch(request.clips, outcome), outcome)
        assert agrees(seen, cell), f"the table says {cell!r}, seen was {seen!r}"

    def ask_beside(clip: Clip) -> str:
        tally.fault()
        tally.check_batch(request.clips, ask(served, request))
        return ask_good(clip)

    def ask_good(clip: Clip) -> str:
        with GrpcSender(served.grpc) as sender:
            return tally.check(clip, sender.ask(clip.waveform))

    good = zip(short[:6], [ask_good, ask_beside] * 3, strict=True)
    verdicts = set(all_at_once([partial(ask_clip, clip) for clip, ask_clip in good]))
    assert verdicts <= ({beside, "refused"} if case in EMPTY and find_installed() else {beside})


@pytest.mark.usefixtures("still_right")
@pytest.mark.parametrize("case", STREAMS)
def test_garbage_on_every_port(case: str, served: Urls, short: list[Clip], tally: Tally) -> None:
    """It is answered with an error, a closed connection or nothing, and nobody else notices."""
    connections = []
    try:
        for url in served.grpc, served.http, served.metrics.split("/")[2]:
            host, port = url.split(":")
            connection = socket.create_connection((host, int(port)), timeout=60)
            connections.append(connection)
            try:
                connection.sendall(STREAMS[case])
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before it was through
            tally.fault()
        # All three connections are still held here.
        for connect in served.senders():
            with connect() as sender:
                for clip in short[:4]:
                    assert tally.check(clip, sender.ask(clip.waveform)) == "right"
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.usefixtures("still_right")
def test_all_of_them_at_once(hostile: dict[str, Hostile], served: Urls, short: list[Clip], tally: Tally) -> None:
    """Every bad request but the long one, over and over, beside clients of every kind."""
    bad = [request for case, request in hostile.items() if case != "ten minutes"]
    with Load(served.senders() * 2, short, tally.check) as load:
        for request in bad * 3:
            tally.check_batch(request.clips, ask(served, request))
            tally.fault()
        load.wait_for_more(len(short))
    assert set(load.verdicts) == {"right"} or find_installed()


@pytest.mark.skipif(find_installed() is not None, reason="this Triton has its own backend")
def test_the_client_asks_again_where_it_gets_nan(
    repository: Path, short: list[Clip], tally: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that leaves empty clips where they are, as that of the container does, good ones get NaN."""
    backends = changed_backend(tmp_path, "TritonPythonModel.execute = TritonPythonModel._run\n")
    monkeypatch.setattr(wheel, "BACKENDS", backends)
    spoiled = threading.Semaphore(0)

    def check(clip: Clip, outcome: Outcome) -> str:
        verdict = tally.check(clip, outcome)
        if clip.reference is not None and verdict == "refused":
            tally.fault()
            spoiled.release()
        return verdict

    clips = short[:4]
    empty = Clip("empty", np.zeros(0, np.float32), None)
    with TritonServer(repository, device="cpu") as server:
        raw = [lambda: GrpcSender(server.grpc_url)] * 6
        with Load(raw, [empty, *clips[:2]], check), ClientSender(server.grpc_url) as sender:
            verdicts = []
            for _ in range(10):
                assert spoiled.acquire(timeout=PATIENCE), "no good clip shared a batch with an empty one"
                verdicts += [tally.check(clip, sender.ask(clip.waveform)) for clip in clips]
    # NaN twice in a row is an error, as the client says.
    assert verdicts.count("right") > len(verdicts) / 2


EVERY_SECOND_BATCH_IS_NAN = """
_right_run = TritonPythonModel.run
_runs = 0

def _run_spoiled(self, feed, outputs):
    global _runs
    rows = _right_run(self, feed, outputs)
    _runs += 1
    if _runs % 2:
        rows[0][:] = float("nan")
    return rows

TritonPythonModel.run = _run_spoiled
"""


@pytest.mark.skipif(find_installed() is not None, reason="this Triton has its own backend")
def test_one_nan_is_asked_about_again(
    repository: Path, short: list[Clip], tally: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "BACKENDS", changed_backend(tmp_path, EVERY_SECOND_BATCH_IS_NAN))
    with TritonServer(repository, device="cpu") as server:
        with GrpcSender(server.grpc_url) as raw, ClientSender(server.grpc_url, retries=1) as client:
            verdicts = [tally.check(clip, raw.ask(clip.waveform)) for clip in short[:4]]
            assert sorted(verdicts) == ["refused", "refused", "right", "right"]
            for clip in short:
                tally.fault()
                assert tally.check(clip, client.ask(clip.waveform), recovered=True) == "right"
