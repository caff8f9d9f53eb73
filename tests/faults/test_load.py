"""Crowds, clients that give up or vanish, and more than the server can do."""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from server import wheel
from server.gateway import Limits
from server.triton import TritonServer

from .harness import (
    METHOD,
    PATIENCE,
    SECOND,
    ClientSender,
    Clip,
    Gate,
    GrpcSender,
    HttpSender,
    Load,
    Outcome,
    Refusal,
    Tally,
    Urls,
    all_at_once,
    assert_right,
    grpc_outcome,
    http_request,
    infer_request,
    pending,
    shuffled,
    wait_until,
    wait_until_queued,
    words,
)
from .hostile import PREFERRED_BATCH
from .test_kill import BAD_TIMES as TABLE

CLIENTS = 64
OF_THE_POOL = 2  # clips of any length that each of them sends
CROWD = 16  # requests waiting while some are given up
USUAL_REQUESTS = 128  # in work at once, on a CPU
MEASURED = 50  # replies that tell the capacity
ENOUGH_REFUSALS = 60

on_the_shared_server = pytest.mark.usefixtures("still_right")


@on_the_shared_server
def test_a_crowd_of_every_kind_of_client(served: Urls, pool: list[Clip], tiny: list[Clip], tally: Tally) -> None:
    """64 clients send shuffled lengths, some thousand requests in all; each gets the embedding of its own clip."""

    def run(number: int) -> Counter[str]:
        clips = shuffled([*tiny * 4, *shuffled(pool, number)[:OF_THE_POOL]], number)
        raw = GrpcSender(served.grpc) if number % 3 else HttpSender(served.http)
        with raw:
            # Every other one goes through the one SpeakerClient that all threads share.
            senders = [raw, client]
            return Counter(tally.check(clip, senders[i % 2].ask(clip.waveform)) for i, clip in enumerate(clips))

    with ClientSender(served.grpc) as client:
        verdicts = sum(all_at_once([partial(run, number) for number in range(CLIENTS)]), Counter[str]())
    assert verdicts == {"right": CLIENTS * (4 * len(tiny) + OF_THE_POOL)}


def test_calls_that_are_cancelled(held: Urls, gate: Gate, short: list[Clip], tally: Tally) -> None:
    """In execution and in the queue."""
    clips = (short * 2)[: 2 * CROWD]
    with GrpcSender(held.grpc) as sender:
        with gate.hold():
            calls = [sender.start(clip.waveform) for clip in clips]
            wait_until_queued(held, len(calls) - PREFERRED_BATCH)
            assert all(call.cancel() for call in calls[::2])
            tally.fault(len(calls[::2]))
        verdicts = [tally.check(clip, grpc_outcome(call)) for clip, call in zip(clips, calls, strict=True)]
    assert verdicts[::2] == ["refused"] * len(calls[::2])
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
            assert tally.check(clip, outcome) == "refused"
            assert words(outcome) == TABLE["the client's own deadline has passed"]
            assert tally.check(clip, grpc_outcome(call)) == "right"
    assert_right(held, short[::5], tally)


def test_timeout_parameter_of_a_request(held: Urls, gate: Gate, short: list[Clip], tally: Tally) -> None:
    """The shipped configs do not obey it."""
    for outcome, clip in zip(hasty_outcomes(held, gate, short, tally), short, strict=True):
        assert tally.check(clip, outcome) == "right"


def test_timeout_parameter_where_the_config_obeys_it(
    repository_copy: Path, gate: Gate, short: list[Clip], tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is refused and not computed late."""
    config = repository_copy / "ecapa/configs/cpu.pbtxt"
    policy = "timeout_action: REJECT default_timeout_microseconds: 10000000 allow_timeout_override: true"
    text = config.read_text()
    assert text.count("dynamic_batching {") == 1
    config.write_text(text.replace("dynamic_batching {", f"dynamic_batching {{ default_queue_policy {{ {policy} }}"))
    monkeypatch.setattr(wheel, "BACKENDS", gate.backends)
    with TritonServer(repository_copy, device="cpu") as server:
        for outcome, clip in zip(hasty_outcomes(Urls.of(server), gate, short, tally), short, strict=True):
            assert tally.check(clip, outcome) == "refused"
            assert str(outcome) == "`UNAVAILABLE` Request timeout expired"


def hasty_outcomes(urls: Urls, gate: Gate, clips: Sequence[Clip], tally: Tally) -> list[Outcome]:
    """What requests get that give themselves a microsecond, behind others that must be answered right."""
    with GrpcSender(urls.grpc) as sender:
        with gate.hold():
            patient = [sender.start(clip.waveform) for clip in clips]
            wait_until_queued(urls, len(patient) - PREFERRED_BATCH)
            hasty = []
            for clip in clips:
                request = infer_request(clip.waveform[None])
                request.parameters["timeout"].int64_param = 1  # microsecond
                hasty.append(sender.start(request.SerializeToString()))
            tally.fault(len(hasty))
            wait_until_queued(urls, len(hasty))
        for clip, call in zip(clips, patient, strict=True):
            assert tally.check(clip, grpc_outcome(call)) == "right"
        return [grpc_outcome(call) for call in hasty]


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
    """A process in which so many clients have begun to send the clip of zeros in a file."""
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
    with Load(served.senders(), short, tally.check) as load:
        for number in 1, 2, 4:
            with other_clients(served, message, number):
                tally.fault(number)
        load.wait_for_more(20)
    assert set(load.verdicts) == {"right"}


@on_the_shared_server
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_sockets_closed_halfway_through_a_body(served: Urls, short: list[Clip], tally: Tally, reset: bool) -> None:
    host, port = served.http.split(":")
    header, body = http_request(short[0].waveform[None])
    head = (
        f"POST /v2/models/ecapa/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(header) + len(body)}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n\r\n"
    )
    with Load(served.senders(), short, tally.check) as load:
        for part in 0, len(header) // 2, len(header), len(header) + len(body) // 2, len(header) + len(body) - 1:
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
                connection.sendall(head.encode() + (header + body)[:part])
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            tally.fault()
        load.wait_for_more(20)
    assert set(load.verdicts) == {"right"}


def test_three_times_the_capacity(limited: Urls, short: list[Clip], tally: Tally) -> None:
    """An open loop against the usual limits: what finds them reached is refused sooner than others are answered."""
    # Of one second, so that the model has more to do than their sender.
    clips = [clip for clip in short if len(clip.waveform) == SECOND]
    with Load([lambda: GrpcSender(limited.grpc)] * 8, clips, tally.check) as load:
        load.wait_for_more(10)
        begun = time.monotonic()
        load.wait_for_more(MEASURED)
        interval = (time.monotonic() - begun) / MEASURED / 3

    longest_seen = 0.0
    finished = threading.Event()

    def watch() -> None:
        nonlocal longest_seen
        while not finished.wait(0.02):
            longest_seen = max(longest_seen, pending(limited))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answers: list[tuple[Clip, float, Outcome]] = []
    with GrpcSender(limited.grpc) as sender:

        def send(clip: Clip) -> None:
            sent = time.monotonic()
            call = sender.start(clip.waveform)
            call.add_done_callback(lambda _: answers.append((clip, time.monotonic() - sent, grpc_outcome(call))))

        due, started = time.monotonic(), 0
        while refusals(answers) < ENOUGH_REFUSALS:
            assert started < 20 * USUAL_REQUESTS, "three times the capacity is never refused"
            send(clips[started % len(clips)])
            started += 1
            due += interval
            time.sleep(max(0.0, due - time.monotonic()))
        wait_until(lambda: len(answers) == started, "the last answers")
    finished.set()
    watcher.join()

    seconds: dict[str, list[float]] = {"right": [], "refused": []}
    for clip, took, outcome in answers:
        seconds[tally.check(clip, outcome)].append(took)
        if isinstance(outcome, Refusal):
            assert words(outcome) == TABLE["as many requests in work as the server takes"]
    tally.fault(refusals(answers))
    assert len(seconds["right"]) >= USUAL_REQUESTS
    assert statistics.median(seconds["refused"]) < statistics.median(seconds["right"])
    assert USUAL_REQUESTS / 2 < longest_seen <= USUAL_REQUESTS
    assert_right(limited, clips, tally)


def test_a_request_larger_than_the_limit(limited: Urls, limits: Limits, short: list[Clip], tally: Tally) -> None:
    """Over gRPC and HTTP, announced and not, and the same clips right beside it."""
    large = Clip("too large", np.zeros((limits.request_mb << 20) // 4, np.float32), None)
    expected = TABLE["a request larger than the server takes"]
    with Load(limited.senders(), short, tally.check) as load:
        with GrpcSender(limited.grpc) as grpc_sender, HttpSender(limited.http) as http_sender:
            tally.fault(2)
            outcome = grpc_sender.ask(large.waveform)
            assert tally.check(large, outcome) == "refused" and words(outcome) == expected
            outcome = http_sender.ask(large.waveform)
            assert tally.check(large, outcome) == "refused"
            assert str(outcome) == f"`413` {expected.partition('` ')[2]}"
        load.wait_for_more(len(short))
    assert set(load.verdicts) == {"right"}


def refusals(answers: Sequence[tuple[Clip, float, Outcome]]) -> int:
    return sum(isinstance(outcome, Refusal) for _, _, outcome in answers)
