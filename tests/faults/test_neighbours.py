"""Bad requests among good ones: README.md's table row by row, streams of garbage, and all of them at once."""

from __future__ import annotations

import re
import socket
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from export.artifacts import ExportedModel
from server import TritonServer
from tests.faults.hostile import LONGEST, STREAMS, Hostile
from tests.faults.judge import PATIENCE, ClientSender, Clip, GrpcSender, Outcome, Rejection, Tally, Traffic, Urls

from .harness import INSTALLED, all_at_once, changed_backend, serving_with

README = (Path(__file__).parent / "README.md").read_text().partition("## Bad requests")[2].partition("\n## ")[0]
TABLE = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
ROWS = {case: cells for case, *cells in TABLE if case != "case"}
EMPTY = "an empty clip", "three empty clips"
NOT_SAID = "–"  # this protocol cannot express the case
wheel_only = pytest.mark.skipif(INSTALLED, reason="this Triton has its own backend")


def described(verdict: str, outcome: Outcome) -> str:
    if isinstance(outcome, Rejection):
        return f"`{outcome.code}`"
    return "NaN" if verdict == "rejected" else verdict


def test_the_table_has_every_case(hostile: dict[str, Hostile]) -> None:
    assert list(ROWS) == list(hostile)


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_request(case: str, hostile: dict[str, Hostile], served: Urls, short: list[Clip], tally: Tally) -> None:
    request = hostile[case]
    for message, send, cell in zip(
        (request.grpc, request.http), (request.over_grpc, request.over_http), ROWS[case], strict=True
    ):
        if message is None:
            assert cell == NOT_SAID
            continue
        tally.fault()
        outcome = send(served)
        assert described(tally.check_batch(request.clips, outcome), outcome) == cell

    def ask_beside(clip: Clip) -> str:
        tally.fault()
        tally.check_batch(request.clips, request.send(served))
        return ask_good(clip)

    def ask_good(clip: Clip) -> str:
        with GrpcSender(served.grpc) as sender:
            return tally.check(clip, sender.ask(clip.waveform))

    good = zip(short[:6], [ask_good, ask_beside] * 3, strict=True)
    verdicts = set(all_at_once([partial(ask_clip, clip) for clip, ask_clip in good]))
    assert verdicts <= ({"right", "rejected"} if case in EMPTY and INSTALLED else {"right"})


@pytest.mark.usefixtures("still_right")
@pytest.mark.parametrize("case", STREAMS)
def test_garbage_on_every_port(case: str, served: Urls, short: list[Clip], tally: Tally) -> None:
    """It gets an error, a closed connection or nothing, and other clients get right replies."""
    connections = []
    try:
        for url in served.grpc, served.http, served.metrics.split("/")[2]:
            host, port = url.split(":")
            connection = socket.create_connection((host, int(port)), timeout=60)
            connections.append(connection)
            try:
                connection.sendall(STREAMS[case])
            except (BrokenPipeError, ConnectionResetError):
                pass  # rejected before its end
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
    bad = [request for case, request in hostile.items() if case != LONGEST]
    with Traffic(served.senders() * 2, short, tally.check) as load:
        for request in bad * 3:
            tally.check_batch(request.clips, request.send(served))
            tally.fault()
        load.wait_for_more(len(short))
    assert set(load.verdicts) == {"right"} or INSTALLED


def test_in_int8_too(repository: Path, hostile: dict[str, Hostile], short: list[Clip], tally: Tally) -> None:
    """Good clips beside every bad request get the embedding that the int8 model gives them alone."""
    model = ExportedModel(repository / "ecapa/1/model_int8.onnx")
    own = [Clip(clip.name, clip.waveform, model.embed([clip.waveform])[0]) for clip in short]
    with TritonServer(repository, device="cpu", precision="int8") as server:
        urls = Urls.of(server)
        with Traffic(urls.senders() * 2, own, tally.check) as load:
            for case, request in hostile.items():
                if case != LONGEST:
                    request.send(urls)
                    tally.fault()
            load.wait_for_more(3 * len(own))
    assert set(load.verdicts) == {"right"} or INSTALLED


@wheel_only
def test_the_client_beside_empty_clips_that_spoil_batches(
    repository: Path, short: list[Clip], tally: Tally, tmp_path: Path
) -> None:
    """With a backend that keeps empty clips in batches, as the container's does, good clips may get NaN, once."""
    spoiled = threading.Semaphore(0)

    def check(clip: Clip, outcome: Outcome) -> str:
        verdict = tally.check(clip, outcome)
        if clip.reference is not None and verdict == "rejected":
            tally.fault()
            spoiled.release()
        return verdict

    empty = Clip("empty", np.zeros(0, np.float32), None)
    backends = changed_backend(tmp_path, "TritonPythonModel.execute = TritonPythonModel._run\n")
    with serving_with(backends), TritonServer(repository, device="cpu") as server:
        raw = [lambda: GrpcSender(server.grpc_url)] * 6
        client = [lambda: ClientSender(server.grpc_url)]
        with Traffic(raw, [empty, *short[:2]], check), Traffic(client, short, tally.check) as load:
            for _ in range(10):
                assert spoiled.acquire(timeout=PATIENCE), "no good clip shared a batch with an empty one"
                load.wait_for_more(4)


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


@wheel_only
def test_the_client_retries_one_nan(repository: Path, short: list[Clip], tally: Tally, tmp_path: Path) -> None:
    with serving_with(changed_backend(tmp_path, EVERY_SECOND_BATCH_IS_NAN)):
        with TritonServer(repository, device="cpu") as server:
            with GrpcSender(server.grpc_url) as raw, ClientSender(server.grpc_url, retries=1) as client:
                verdicts = [tally.check(clip, raw.ask(clip.waveform)) for clip in short[:4]]
                assert sorted(verdicts) == ["rejected", "rejected", "right", "right"]
                for clip in short:
                    tally.fault()
                    assert tally.check(clip, client.ask(clip.waveform), recovered=True) == "right"
