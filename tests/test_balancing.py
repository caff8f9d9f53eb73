"""One client, two real servers, one list of addresses: the load is shared, and the loss of one costs little."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from ecapa_triton import EcapaError, SpeakerClient

from server import TritonServer, gateway
from server.gateway import Limits

SOON = 40  # s


@dataclass
class Load:
    """What clients that ask without a pause have got."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[tuple[int, str]] = field(default_factory=list)  # thread, message
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def load(
    client: SpeakerClient, clips: list[np.ndarray], references: list[np.ndarray], threads: int = 8
) -> Iterator[Load]:
    """Threads, each of which sends clip after clip inside the block; every reply is compared."""
    result, over = Load(), threading.Event()

    def send(thread: int) -> None:
        for number in range(thread, 1_000_000):
            if over.is_set():
                return
            which = number % len(clips)
            try:
                embedding = client.embed(clips[which], 16_000)
            except EcapaError as error:
                with result.lock:
                    result.errors.append((thread, str(error)))
                continue
            distance = np.linalg.norm(embedding - references[which]) / np.linalg.norm(references[which])
            with result.lock:
                if distance < 1e-4:
                    result.right += 1
                else:
                    result.wrong.append(f"clip {which}: {distance:g}")

    senders = [threading.Thread(target=send, args=[number]) for number in range(threads)]
    for sender in senders:
        sender.start()
    try:
        yield result
    finally:
        over.set()
        for sender in senders:
            sender.join(60)


def served(server: TritonServer) -> int:
    """Requests that it answered since it started, those of its warm-up among them."""
    page = urlopen(server.metrics_url, timeout=20).read().decode()
    return int(re.search(r'nv_inference_request_success\{model="ecapa",version="1"\} (\d+)', page)[1])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Of different lengths and different noise, so that the reply to another clip is no right one."""
    return [
        (0.1 * np.random.default_rng(number).standard_normal(4_000 + 1_500 * number)).astype(np.float32)
        for number in range(5)
    ]


@pytest.fixture(scope="module")
def references(clips: list[np.ndarray], reference: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    return [reference(clip) for clip in clips]


def pair(repository: Path, limits: Limits | None = None) -> list[TritonServer]:
    return [TritonServer(repository, device="cpu", address=f"127.0.0.{n}", limits=limits) for n in (1, 2)]


def all_served(servers: list[TritonServer]) -> list[int]:
    return [served(server) for server in servers]


def shares(servers: list[TritonServer], before: list[int]) -> list[float]:
    """The parts that the servers have of what was answered since they had answered so many."""
    answered = [now - begin for now, begin in zip(all_served(servers), before, strict=True)]
    return [number / max(sum(answered), 1) for number in answered]


def url(servers: list[TritonServer]) -> str:
    return f"ipv4:{','.join(server.grpc_url for server in servers)}"


def test_load_is_shared_and_a_killed_server_costs_only_what_it_had_in_work(
    repository: Path, clips: list[np.ndarray], references: list[np.ndarray]
) -> None:
    servers = pair(repository)
    with servers[0], servers[1], SpeakerClient(url(servers)) as client:
        before = all_served(servers)
        with load(client, clips, references) as first:
            wait_until(lambda: first.right >= 300)
        assert shares(servers, before) == pytest.approx([0.5, 0.5], abs=0.1)
        port = servers[0].grpc_url.partition(":")[2]
        with SpeakerClient(f"dns:///localhost:{port}") as named:  # as it is with the headless Service of Kubernetes
            np.testing.assert_allclose(named.embed(clips[0], 16_000), references[0], rtol=0, atol=1e-3)

        with load(client, clips, references) as second:
            wait_until(lambda: second.right > 50)
            os.kill(servers[1].pid, signal.SIGKILL)
            right = second.right
            wait_until(lambda: second.right > right + 200)  # the other one has it all
            servers[1].stop()
            servers[1].start()  # on the same ports
            warm = served(servers[1])
            wait_until(lambda: served(servers[1]) > warm)

        before = all_served(servers)
        with load(client, clips, references) as third:
            wait_until(lambda: third.right >= 300)
        assert shares(servers, before) == pytest.approx([0.5, 0.5], abs=0.1)

    assert not first.wrong + second.wrong + third.wrong
    assert not first.errors + third.errors
    # Each thread has one request in work at most, and it fails at most once.
    failed = [thread for thread, _ in second.errors]
    assert len(failed) == len(set(failed)), second.errors


@pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed: apt install nginx-light")
def test_a_server_that_is_taken_out_of_service_costs_nothing(
    repository: Path, reference: Callable[[np.ndarray], np.ndarray]
) -> None:
    """In the order of deploy/kubernetes: nginx ends with the requests that it has, and then Triton does.

    So many long clips that this takes more than a second.
    """
    clips = [(0.1 * np.random.default_rng(seed).standard_normal(400_000)).astype(np.float32) for seed in (1, 2)]
    references = [reference(clip) for clip in clips]
    servers = pair(repository, Limits(requests=128))
    with servers[0], servers[1], SpeakerClient(url(servers), timeout=60) as client:
        before = all_served(servers)
        with load(client, clips, references, threads=24) as result:
            wait_until(lambda: all(shares(servers, before)))
            nginx = servers[1]._gateway._process
            nginx.send_signal(signal.SIGQUIT)
            nginx.wait(SOON)
            servers[1].stop()
            right = result.right
            wait_until(lambda: result.right > right + 12)
    assert not result.errors and not result.wrong
