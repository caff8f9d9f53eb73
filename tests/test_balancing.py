"""One client, two real servers, one list of addresses: they share the load, and the loss of one costs little."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
from ecapa_triton import EcapaError, SpeakerClient
from launcher import wait_until

from server import Limits, TritonServer, child, gateway

Reference = Callable[[np.ndarray], np.ndarray]


@dataclass
class Load:
    """The replies to clients that send without a pause: by thread, one entry for each."""

    right: list[int] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)


@contextmanager
def load(client: SpeakerClient, clips: list[np.ndarray], reference: Reference, threads: int = 8) -> Iterator[Load]:
    """Threads, each of which sends clip after clip inside the block; every reply is compared."""
    result, over = Load(), threading.Event()
    references = [reference(clip) for clip in clips]

    def send(thread: int) -> None:
        number = thread
        while not over.is_set():
            number = (number + 1) % len(clips)
            try:
                distance = np.linalg.norm(client.embed(clips[number], 16_000) - references[number])
            except EcapaError:
                result.errors.append(thread)
            else:
                right = distance < 1e-4 * np.linalg.norm(references[number])
                (result.right if right else result.wrong).append(thread)

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
    """Requests that it has answered since its start, the warm-up included."""
    page = urlopen(server.metrics_url, timeout=20).read().decode()
    return int(re.findall(r'nv_inference_request_success\{model="ecapa",version="1"\} (\d+)', page)[0])


def noise(samples: int, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@contextmanager
def pair(repository: Path, limits: Limits | None = None) -> Iterator[list[TritonServer]]:
    one, two = (TritonServer(repository, device="cpu", address=f"127.0.0.{n}", limits=limits) for n in (1, 2))
    with one, two:
        yield [one, two]


def url(servers: list[TritonServer]) -> str:
    return f"ipv4:{','.join(server.grpc_url for server in servers)}"


def assert_shared(servers: list[TritonServer], client: SpeakerClient, clips: list[np.ndarray], ref: Reference) -> None:
    before = [served(server) for server in servers]
    with load(client, clips, ref) as result:
        wait_until(lambda: len(result.right) >= 300, 60)
    assert not result.wrong and not result.errors
    answered = [served(server) - begin for server, begin in zip(servers, before, strict=True)]
    assert answered == pytest.approx([sum(answered) / 2] * 2, rel=0.2)


def test_load_is_shared_and_a_killed_server_costs_only_its_requests_in_flight(
    repository: Path, reference: Reference
) -> None:
    clips = [noise(4_000 + 1_500 * seed, seed) for seed in range(5)]  # a wrong clip's reply is far from right
    with pair(repository) as servers, SpeakerClient(url(servers)) as client:
        assert_shared(servers, client, clips, reference)
        port = servers[0].grpc_url.partition(":")[2]
        with SpeakerClient(f"dns:///localhost:{port}") as named:  # as with the headless Service of Kubernetes
            np.testing.assert_allclose(named.embed(clips[0], 16_000), reference(clips[0]), rtol=0, atol=1e-3)

        with load(client, clips, reference) as result:
            wait_until(lambda: len(result.right) > 50)
            os.kill(servers[1].pid, signal.SIGKILL)
            right = len(result.right)
            wait_until(lambda: len(result.right) > right + 200, 60)  # the other server answers them all
            servers[1].stop()
            servers[1].start()  # on the same ports
            warm = served(servers[1])
            wait_until(lambda: served(servers[1]) > warm)
        assert not result.wrong
        assert not result.errors
        assert_shared(servers, client, clips, reference)


@pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed: apt install nginx-light")
def test_a_server_that_leaves_in_order_costs_nothing(repository: Path, reference: Reference) -> None:
    """In the order of deploy/kubernetes: nginx ends after its requests in flight, then Triton does.

    The clips are long enough that this takes more than a second.
    """
    clips = [noise(400_000, seed) for seed in (1, 2)]
    with pair(repository, Limits(requests=128)) as servers, SpeakerClient(url(servers), timeout=60) as client:
        before = [served(server) for server in servers]
        port = int(servers[1].grpc_url.partition(":")[2])
        (nginx,) = (process for process in psutil.Process().children() if child.listens(process.pid, port))
        with load(client, clips, reference, threads=24) as result:
            wait_until(lambda: all(served(server) > begin for server, begin in zip(servers, before, strict=True)))
            nginx.send_signal(signal.SIGQUIT)
            wait_until(lambda: not nginx.is_running() or nginx.status() == psutil.STATUS_ZOMBIE)
            servers[1].stop()
            right = len(result.right)
            wait_until(lambda: len(result.right) > right + 12, 60)
    assert not result.errors and not result.wrong
