"""Crowds, clients that give up or vanish, and more requests than the limits allow."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from server import gateway
from tests.faults.hostile import SlowSender, send_part
from tests.faults.judge import (
    HEADER_LENGTH,
    METHOD,
    ONCE,
    ClientSender,
    Clip,
    GrpcSender,
    HttpSender,
    Outcome,
    Tally,
    Traffic,
    Urls,
    grpc_outcome,
    http_request,
    infer_request,
    shuffled,
)

from .harness import (
    LIMIT,
    LIMIT_MB,
    PREFERRED_BATCH,
    SECOND,
    Gate,
    ServerCommand,
    all_at_once,
    assert_right,
    code,
    pending,
    wait_until_queued,
)

CLIENTS = 64
OF_THE_POOL = 2  # clips of any length that each of them sends
CROWD = 16  # requests in the queue while some are cancelled
OVER_THE_LIMIT = 60  # requests

on_the_shared_server = pytest.mark.usefixtures("still_right")


@on_the_shared_server
def test_a_crowd_of_every_kind_of_client(served: Urls, pool: list[Clip], tiny: list[Clip], tally: Tally) -> None:
    """64 clients send shuffled lengths, some thousand requests in all; each gets the embedding of its own clip."""

    def run(number: int) -> Counter[str]:
        clips = shuffled([*tiny * 4, *shuffled(pool, number)[:OF_THE_POOL]], number)
        raw = GrpcSender(served.grpc) if number % 3 else HttpSender(served.http)
        with raw:
            senders = [raw, client]  # the SpeakerClient is one, shared by all threads
            return Counter(tally.check(clip, senders[i % 2].ask(clip.waveform)) for i, clip in enumerate(clips))

    with ClientSender(served.grpc, **ONCE) as client:
        verdicts = sum(all_at_once([partial(run, number) for number in range(CLIENTS)]), Counter[str]())
    assert verdicts == {"right": CLIENTS * (4 * len(tiny) + OF_THE_POOL)}


def test_cancelled_calls(held: Urls, gate: Gate, short: list[Clip], tally: Tally) -> None:
    """In execution and in the queue."""
    clips = (short * 2)[: 2 * CROWD]
    with GrpcSender(held.grpc) as sender:
        with gate.hold():
            calls = [sender.start(clip.waveform) for clip in clips]
            wait_until_queued(held, len(calls) - PREFERRED_BATCH)
            assert all(call.cancel() for call in calls[::2])
            tally.fault(len(calls[::2]))
        verdicts = [tally.check(clip, grpc_outcome(call)) for clip, call in zip(clips, calls, strict=True)]
    assert verdicts[::2] == ["rejected"] * len(calls[::2])
    assert verdicts[1::2] == ["right"] * len(calls[1::2])
    assert_right(held, short[::5], tally)


def test_deadlines_shorter_than_the_queue(held: Urls, gate: Gate, short: list[Clip], tally: Tally) -> None:
    with GrpcSender(held.grpc) as sender:
        with gate.hold():
            patient = [sender.start(clip.waveform) for clip in short]
            wait_until_queued(held, len(patient) - PREFERRED_BATCH)
            hasty = [sender.start(clip.waveform, timeout=0.2) for clip in short]
            tally.fault(len(hasty))
            outcomes = [grpc_outcome(call) for call in hasty]
        for clip, outcome, call in zip(short, outcomes, patient, strict=True):
            assert tally.check(clip, outcome) == "rejected" and code(outcome) == "DEADLINE_EXCEEDED"
            assert tally.check(clip, grpc_outcome(call)) == "right"
    assert_right(held, short[::5], tally)


def test_timeout_parameter_of_a_request(held: Urls, gate: Gate, short: list[Clip], tally: Tally) -> None:
    """The shipped configs ignore it."""
    with GrpcSender(held.grpc) as sender:
        with gate.hold():
            calls = []
            for clip in short * 2:
                request = infer_request(clip.waveform[None])
                request.parameters["timeout"].int64_param = 1  # microsecond
                calls.append((clip, sender.start(request.SerializeToString())))
            tally.fault(len(calls))
            wait_until_queued(held, len(calls) - PREFERRED_BATCH)
        assert all(tally.check(clip, grpc_outcome(call)) == "right" for clip, call in calls)


CLIENT = """
import sys
import grpc
url, method, message, calls = sys.argv[1:]
options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
data = open(message, "rb").read()
channels = [grpc.insecure_channel(url, options=options) for _ in range(int(calls))]
sent = [channel.unary_unary(method).future(data) for channel in channels]
print("sending", flush=True)
sent[0].result()
"""


@contextmanager
def other_clients(urls: Urls, message: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    """A process in which so many clients have begun to send the request in a file."""
    command = [sys.executable, "-c", CLIENT, urls.grpc, METHOD, str(message), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "sending\n"
        try:
            yield process
        finally:
            process.kill()


def write_zeros(path: Path, seconds: float) -> Path:
    waveform = np.zeros((1, round(seconds * SECOND)), np.float32)
    path.write_bytes(infer_request(waveform).SerializeToString())
    return path


def test_clients_killed_while_they_wait(
    held: Urls, gate: Gate, short: list[Clip], tally: Tally, tmp_path: Path
) -> None:
    message = write_zeros(tmp_path / "message", 0.1)
    with GrpcSender(held.grpc) as sender:
        with gate.hold(), other_clients(held, message, CROWD) as process:
            wait_until_queued(held, CROWD - PREFERRED_BATCH)
            calls = [(clip, sender.start(clip.waveform)) for clip in short]
            wait_until_queued(held, CROWD - PREFERRED_BATCH + len(calls))
            process.kill()
            process.wait()
            tally.fault(CROWD)
        for clip, call in calls:
            assert tally.check(clip, grpc_outcome(call)) == "right"
    assert_right(held, short[::5], tally)


@on_the_shared_server
def test_clients_killed_while_they_send(served: Urls, short: list[Clip], tally: Tally, tmp_path: Path) -> None:
    """Minutes of audio are on the way."""
    message = write_zeros(tmp_path / "message", 180)
    with Traffic(served.senders(), short, tally.check) as load:
        for number in 1, 2, 4:
            with other_clients(served, message, number):
                tally.fault(number)
        load.wait_for_more(20)
    assert set(load.verdicts) == {"right"}


@on_the_shared_server
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_sockets_closed_halfway_through_a_body(served: Urls, short: list[Clip], tally: Tally, reset: bool) -> None:
    waveform = short[0].waveform
    _, header, body = http_request(infer_request(waveform[None]))
    with Traffic(served.senders(), short, tally.check) as load:
        for size in 0, len(header) // 2, len(header), len(header) + len(body) // 2, -1:
            send_part(served, waveform, size, reset=reset)
            tally.fault()
        load.wait_for_more(20)
    assert set(load.verdicts) == {"right"}


def ask_over_http(urls: Urls, clip: Clip) -> Outcome:
    with HttpSender(urls.http) as sender:
        return sender.ask(clip.waveform)


def test_more_requests_than_the_limit(limited: Urls, gate: Gate, short: list[Clip], tally: Tally) -> None:
    """Each over the limit is rejected at once, while the others still wait; and these get their embeddings.

    Each API has the limit for itself.
    """
    clips = (short * LIMIT)[: LIMIT + OVER_THE_LIMIT]
    with (
        GrpcSender(limited.grpc) as sender,
        HttpSender(limited.http) as http,
        ClientSender(limited.grpc, **ONCE) as client,
        ThreadPoolExecutor(LIMIT) as waiting,
    ):
        with gate.hold():
            accepted = [(clip, sender.start(clip.waveform)) for clip in clips[:LIMIT]]
            crowd = [waiting.submit(ask_over_http, limited, clip) for clip in clips[:LIMIT]]
            wait_until_queued(limited, 2 * LIMIT - PREFERRED_BATCH)
            for clip in clips[LIMIT:]:
                for ask, expected in (
                    (sender.ask, "UNAVAILABLE"),
                    (http.ask, "503"),
                    (client.ask, "OverloadedError"),
                ):
                    tally.fault()
                    outcome = ask(clip.waveform)
                    assert tally.check(clip, outcome) == "rejected" and code(outcome) == expected
            assert pending(limited) <= 2 * LIMIT and not any(call.done() for _, call in accepted)
        assert all(tally.check(clip, grpc_outcome(call)) == "right" for clip, call in accepted)
        assert all(tally.check(clip, one.result()) == "right" for clip, one in zip(clips, crowd, strict=False))
    assert_right(limited, short[::5], tally)


def test_slow_senders(repository: Path, short: list[Clip], tally: Tally) -> None:
    """More than there are places, a byte every second; others get right replies, and the server stops in order."""
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    request = infer_request(np.zeros((1, SECOND), np.float32))
    path, header, body = http_request(request)
    number = LIMIT + OVER_THE_LIMIT
    with ExitStack() as stack, ServerCommand(repository, gateway=True) as server:
        field = f"{HEADER_LENGTH}: {len(header)}"
        senders = [SlowSender(server.urls.grpc, METHOD, request.SerializeToString(), grpc=True) for _ in range(number)]
        senders += [SlowSender(server.urls.http, path, header + body, grpc=False, field=field) for _ in range(number)]
        for sender in senders:
            stack.enter_context(sender)
        tally.fault(len(senders))
        with Traffic(server.urls.senders(), short, tally.check) as load:
            for _ in range(12):  # longer than a pause may be
                load.wait_for_more(len(short))
                for sender in senders:
                    sender.send(b"\0")
                time.sleep(1)
        assert set(load.verdicts) == {"right"}
        assert server.stop() == 0


def test_a_request_larger_than_the_limit(limited: Urls, short: list[Clip], tally: Tally) -> None:
    """Over gRPC and HTTP, beside good clips."""
    large = Clip("too large", np.zeros((LIMIT_MB << 20) // 4, np.float32), None)
    with Traffic(limited.senders(), short, tally.check) as load:
        with GrpcSender(limited.grpc) as grpc_sender, HttpSender(limited.http) as http_sender:
            for sender, expected in (grpc_sender, "RESOURCE_EXHAUSTED"), (http_sender, "413"):
                tally.fault()
                outcome = sender.ask(large.waveform)
                assert tally.check(large, outcome) == "rejected" and code(outcome) == expected
        load.wait_for_more(len(short))
    assert set(load.verdicts) == {"right"}
