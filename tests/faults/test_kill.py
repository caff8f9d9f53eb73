"""Servers that are stopped, killed, or brought down by a request."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from server import TritonServer, gateway
from tests.faults.judge import (
    PATIENCE,
    ClientSender,
    Clip,
    GrpcSender,
    Outcome,
    Tally,
    Traffic,
    grpc_outcome,
    infer_request,
)

from .harness import PREFERRED_BATCH, SECOND, Gate, ServerCommand, code, wait_until, wait_until_queued

TWO_62 = 1 << 62  # samples, whose bytes are 0 modulo 2^64
NOTHING = Clip("nothing", np.zeros(0, np.float32), None)


def under_load(server: ServerCommand, clips: Sequence[Clip], tally: Tally) -> Traffic:
    """Clients of every kind; a right reply counts as recovered once the server has restarted."""

    def check(clip: Clip, outcome: Outcome) -> str:
        return tally.check(clip, outcome, recovered=server.restarted)

    return Traffic(server.urls.senders() * 2, clips, check)


@pytest.mark.parametrize(
    "victim, behind_gateway", [("tritonserver", False), ("stub", False), ("tritonserver", True), ("nginx", True)]
)
def test_killed_under_load(
    victim: str, behind_gateway: bool, repository: Path, short: list[Clip], tally: Tally
) -> None:
    """The launcher restarts it, and a SpeakerClient that was connected before gets replies again."""
    if behind_gateway and gateway.find() is None:
        pytest.skip("nginx is not installed")
    with ServerCommand(repository, gateway=behind_gateway) as server, under_load(server, short, tally) as load:
        load.wait_for_more(len(short))
        tally.fault()
        server.kill(victim)
        load.wait_for_more(2 * len(short))
        (error,) = (line for line in server.lines if line.startswith("error"))
    assert {"tritonserver": "tritonserver", "stub": "model", "nginx": "nginx"}[victim] in error


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ten_restarts_under_load(replicas: int, repository: Path, short: list[Clip], tally: Tally) -> None:
    """By turns a stop and a kill: no error reaches 8 clients, with the default settings where a replica is left."""
    options = {} if replicas > 1 else {"timeout": PATIENCE}  # a slow machine may be without a server for 10 s
    with ExitStack() as stack:
        behind_gateway = gateway.find() is not None
        servers = [stack.enter_context(ServerCommand(repository, gateway=behind_gateway)) for _ in range(replicas)]
        url = f"ipv4:{','.join(server.urls.grpc for server in servers)}"
        load = stack.enter_context(Traffic([lambda: ClientSender(url, **options)] * 8, short, tally.check))
        for number in range(10):
            load.wait_for_more(len(short))
            tally.fault()
            how = signal.SIGTERM if number // replicas % 2 == 0 else signal.SIGKILL
            servers[number % replicas].restart(how)
        load.wait_for_more(len(short))
    assert set(load.verdicts) == {"right"}, tally.rejections


def test_stopped_under_load(repository: Path, gate: Gate, pool: list[Clip], tally: Tally) -> None:
    """Accepted requests get right replies, later ones UNAVAILABLE, and the server ends in order."""
    with ServerCommand(repository, gate.backends) as server, GrpcSender(server.urls.grpc) as sender:
        with gate.hold():
            accepted = [sender.start(clip.waveform) for clip in pool]
            wait_until_queued(server.urls, len(pool) - PREFERRED_BATCH)
            server.process.terminate()
            tally.fault()
            wait_until(lambda: code(sender.ask(pool[0].waveform, timeout=1)) == "UNAVAILABLE", "a rejection")
            late = [sender.start(clip.waveform) for clip in pool]
        for clip, call in zip(pool, accepted, strict=True):
            assert tally.check(clip, grpc_outcome(call)) == "right"
        for clip, call in zip(pool, late, strict=True):
            outcome = grpc_outcome(call)
            assert tally.check(clip, outcome) == "rejected" and code(outcome) == "UNAVAILABLE"
        assert server.process.wait() == 0


def test_a_request_that_brings_the_server_down(repository: Path, short: list[Clip], tally: Tally) -> None:
    """It costs replies until the restart, and never a wrong embedding."""
    request = infer_request(np.zeros((1, SECOND), np.float32), shape=[1, TWO_62 + SECOND]).SerializeToString()
    with ServerCommand(repository) as server, under_load(server, short, tally) as load:
        load.wait_for_more(len(short))
        victim = server.running("tritonserver")
        assert victim is not None
        with GrpcSender(server.urls.grpc) as sender:
            tally.fault()
            outcome = sender.ask(request)
        assert tally.check(NOTHING, outcome) == "rejected" and code(outcome) in ("UNAVAILABLE", "INTERNAL")
        server.wait_for_another("tritonserver", victim)
        load.wait_for_more(2 * len(short))


def test_clients_outlast_requests_that_bring_the_server_down(repository: Path, short: list[Clip], tally: Tally) -> None:
    """Five in a row, each as soon as the server is back: no error reaches a client with the default settings."""
    request = infer_request(np.zeros((1, SECOND), np.float32), shape=[1, TWO_62 + SECOND]).SerializeToString()
    with ServerCommand(repository) as server:
        with Traffic([lambda: ClientSender(server.urls.grpc)] * 4, short, tally.check) as load:
            for _ in range(5):
                load.wait_for_more(len(short))
                victim = server.running("tritonserver")
                assert victim is not None
                with GrpcSender(server.urls.grpc) as sender:
                    tally.fault()
                    assert tally.check(NOTHING, sender.ask(request)) == "rejected"
                server.wait_for_another("tritonserver", victim)
            load.wait_for_more(len(short))
        assert len([line for line in server.lines if line.endswith("; starting again")]) == 5
    assert set(load.verdicts) == {"right"}, tally.rejections


def test_a_request_that_never_gets_a_reply(repository: Path, short: list[Clip], tally: Tally) -> None:
    """Other requests get theirs; but a stop waits for it until the exit timeout."""
    request = infer_request(np.zeros((0, 0), np.float32)).SerializeToString()
    with TritonServer(repository, device="cpu", exit_timeout=3) as server, GrpcSender(server.grpc_url) as sender:
        tally.fault(1 + len(short))
        outcome = sender.ask(request, timeout=3)
        assert tally.check(NOTHING, outcome) == "rejected" and code(outcome) == "DEADLINE_EXCEEDED"
        # In the batches of others it makes the model fail, which then computes each clip alone.
        calls = [(clip, sender.start(clip.waveform), sender.start(request, timeout=3)) for clip in short]
        for clip, good, bad in calls:
            assert tally.check(clip, grpc_outcome(good)) == "right"
            assert tally.check(NOTHING, grpc_outcome(bad)) == "rejected"
        assert not server.stop()
