"""Servers that are told to stop, killed, or brought down by a request, and what their clients see of it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from server import gateway
from server.triton import TritonServer

from .harness import (
    SECOND,
    Clip,
    Gate,
    GrpcSender,
    Load,
    Outcome,
    Refusal,
    ServerCommand,
    Tally,
    grpc_outcome,
    infer_request,
    wait_until,
    wait_until_queued,
    words,
)

README = (Path(__file__).parent / "README.md").read_text()
TABLE = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
HARM = {case: cells for case, *cells in TABLE if case != "case"}
# What good clips get, over gRPC, when the server is not well.
BAD_TIMES = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|(?: [^|]+ \|){3}$", README, re.MULTILINE))
IN_FLIGHT = 24
TWO_62 = 1 << 62  # samples, whose bytes are 0 modulo 2^64
DEADLY = "shape [1, 2^62 + 16000], one second of bytes"
UNANSWERED = "shape [0, 0]"


@pytest.mark.parametrize(
    "victim, behind_gateway", [("tritonserver", False), ("stub", False), ("tritonserver", True), ("nginx", True)]
)
def test_killed_under_load(
    victim: str, behind_gateway: bool, repository: Path, short: list[Clip], tally: Tally
) -> None:
    """It is started again, and a SpeakerClient that was there before goes on by itself."""
    if behind_gateway and gateway.find() is None:
        pytest.skip("nginx is not installed")
    with ServerCommand(repository, gateway=behind_gateway) as server, under_load(server, short, tally) as load:
        load.wait_for_more(len(short))
        os.kill(getattr(server, victim)(), signal.SIGKILL)
        tally.fault()
        server.wait_for_start(2)
        load.wait_for_more(2 * len(short))
    (error,) = (line for line in server.lines if line.startswith("error"))
    how = {
        "tritonserver": "tritonserver was killed by SIGKILL",
        "stub": "in which a model ran, ended",
        "nginx": "nginx in front of tritonserver was killed by SIGKILL",
    }
    assert how[victim] in error and "; starting again in " in error


def under_load(server: ServerCommand, clips: Sequence[Clip], tally: Tally) -> Load:
    """Clients of every kind; a right reply counts as recovered once the server has been started again."""

    def check(clip: Clip, outcome: Outcome) -> str:
        return tally.check(clip, outcome, recovered=server.starts > 1)

    return Load(server.urls.senders() * 2, clips, check)


def is_stopping(outcome: Outcome) -> bool:
    return isinstance(outcome, Refusal) and words(outcome) == BAD_TIMES["the server was told to stop"]


def test_told_to_stop_under_load(repository: Path, gate: Gate, pool: list[Clip], tally: Tally) -> None:
    """What was accepted is answered right, what comes later is UNAVAILABLE, and the server ends in order."""
    clips = pool[:IN_FLIGHT]
    with ServerCommand(repository, gate.backends) as server, GrpcSender(server.urls.grpc) as sender:
        with gate.hold():
            accepted = [sender.start(clip.waveform) for clip in clips]
            wait_until_queued(server.urls, len(clips) - 3)
            server.process.terminate()
            tally.fault()
            wait_until(lambda: is_stopping(sender.ask(clips[0].waveform, timeout=1)), "a refusal")
            late = [sender.start(clip.waveform) for clip in clips]
        for clip, call in zip(clips, accepted, strict=True):
            assert tally.check(clip, grpc_outcome(call)) == "right"
        for clip, call in zip(clips, late, strict=True):
            outcome = grpc_outcome(call)
            assert tally.check(clip, outcome) == "refused"
            assert is_stopping(outcome), outcome
        assert server.stop() == 0
        assert server.lines[-1] == "stopped"


def test_the_table_has_every_harmful_case() -> None:
    assert list(HARM) == [DEADLY, UNANSWERED]


def test_a_request_that_brings_the_server_down(repository: Path, short: list[Clip], tally: Tally) -> None:
    """It costs replies until the server has started itself again; nobody gets a wrong embedding."""
    sound = np.zeros((1, SECOND), np.float32)
    request = infer_request(sound, shape=[1, TWO_62 + SECOND]).SerializeToString()
    with ServerCommand(repository) as server, under_load(server, short, tally) as load:
        load.wait_for_more(len(short))
        with GrpcSender(server.urls.grpc) as sender:
            tally.fault()
            outcome = sender.ask(request)
        assert tally.check(Clip(DEADLY, sound[0], None), outcome) == "refused"
        assert isinstance(outcome, Refusal) and f"`{outcome.code}`" in HARM[DEADLY][0]
        server.wait_for_start(2)
        load.wait_for_more(2 * len(short))


def test_a_request_that_is_never_answered(repository: Path, short: list[Clip], tally: Tally) -> None:
    """The others do not notice; but the server waits for it when it is told to stop, until its time is over."""
    none = Clip(UNANSWERED, np.zeros(0, np.float32), None)
    request = infer_request(np.zeros((0, 0), np.float32)).SerializeToString()
    with TritonServer(repository, device="cpu", exit_timeout=3) as server, GrpcSender(server.grpc_url) as sender:
        tally.fault(1 + len(short))
        outcome = sender.ask(request, timeout=3)
        assert tally.check(none, outcome) == "refused"
        assert isinstance(outcome, Refusal) and f"`{outcome.code}`" in HARM[UNANSWERED][0]
        # In the batches of others it makes the model fail, which then answers one by one.
        calls = [(clip, sender.start(clip.waveform), sender.start(request, timeout=3)) for clip in short]
        for clip, good, bad in calls:
            assert tally.check(clip, grpc_outcome(good)) == "right"
            assert tally.check(none, grpc_outcome(bad)) == "refused"
        assert not server.stop()
