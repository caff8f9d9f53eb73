"""Life of a client: states, closing, event loops, processes, and requests that are cancelled."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clients import OVERLOAD, SAMPLE, SECOND, Make, meanwhile, noise
from ecapa_triton import AsyncSpeakerClient, SpeakerClient, State, Utterance, errors
from fake_triton import PATIENCE, SIZE, Answer, FakeTriton, good, held


def long_ones_held(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    return (held if len(waveform) >= SECOND else good)(fake, waveform)


class Watched(os.PathLike[str]):
    """A path that tells when it is opened, and can make the reader wait for `gate`."""

    def __init__(self, path: Path, gate: threading.Event) -> None:
        self.path, self.gate, self.opened = path, gate, threading.Event()

    def __fspath__(self) -> str:
        self.opened.set()
        assert self.gate.wait(PATIENCE)
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


# --- states, closing, processes ---


def test_states(fake: FakeTriton, client: SpeakerClient, make: Make) -> None:
    unused = make(fake.url)
    unused.close()
    assert client.state is State.NEW and fake.calls == 0
    client.embed(noise(1))
    assert client.state is State.OPEN
    for _ in range(2):
        client.close()
        assert client.state is State.CLOSED
    for call in (
        lambda: client.embed(noise(1)),
        client.status,
        lambda: client.embed(SAMPLE),
        lambda: unused.embed(noise(1)),
    ):
        with pytest.raises(errors.ClosedError):
            call()


@pytest.mark.parametrize("answer", [held, OVERLOAD], ids=["in flight", "before a retry"])
def test_closing_ends_requests(fake: FakeTriton, make: Make, answer: Answer) -> None:
    client, other = make(fake.url, timeout=None, retries=1000), make(fake.url)
    other.embed(noise(1))
    fake.otherwise = answer
    with (
        meanwhile(lambda: (fake.wait_until(lambda fake: len(fake.lengths) == 2), client.close())),
        pytest.raises(errors.ClosedError),
    ):
        client.embed(noise(1))
    fake.otherwise = good
    assert other.embed(noise(1)).shape == (SIZE,)


def test_closing_does_not_wait_for_reading(fake: FakeTriton, client: SpeakerClient) -> None:
    clip = Watched(SAMPLE, threading.Event())
    with meanwhile(lambda: (clip.opened.wait(PATIENCE), client.close())), pytest.raises(errors.ClosedError):
        client.embed(clip)
    clip.gate.set()


def test_a_closed_client_draws_no_more_clips(fake: FakeTriton, client: SpeakerClient) -> None:
    closing = threading.Thread(target=client.close)

    def clips() -> Iterator[np.ndarray]:
        for i in itertools.count():
            if i == 30:
                closing.start()
            time.sleep(0.001)
            yield noise(0.1)

    with pytest.raises(errors.ClosedError):
        client.embed_many(clips(), return_exceptions=True)


def test_event_loops(fake: FakeTriton) -> None:
    async def two(client: AsyncSpeakerClient) -> None:
        assert len(await client.embed_many([noise(2, i) for i in range(4)], long="windows")) == 4
        with pytest.raises(RuntimeError, match="event loop"):
            await asyncio.to_thread(asyncio.run, client.embed(noise(1)))
        with SpeakerClient(fake.url) as blocking:
            assert blocking.embed(noise(1)).shape == (SIZE,)

    fake.info = (0.45, 1.0, 640.0)
    client = AsyncSpeakerClient(fake.url)
    for _ in range(2):  # one after another
        asyncio.run(two(client))


SCRIPT = """
import asyncio, os, sys
import numpy as np
from ecapa_triton import AsyncSpeakerClient, SpeakerClient

kind, url = sys.argv[1:]
clip = np.full(16_000, 0.1, np.float32)
loop = asyncio.new_event_loop()

def make():
    return (SpeakerClient if kind == "sync" else AsyncSpeakerClient)(url, timeout=60)

def wait(result):
    return result if kind == "sync" else loop.run_until_complete(result)
"""
FORK = """
client = make()
wait(client.embed(clip))
child = os.fork()
if not child:
    loop = asyncio.new_event_loop()
    try:
        wait(client.embed(clip))
    except RuntimeError as error:
        assert "process" in str(error)
        wait(client.close())
        os._exit(len(wait(make().embed(clip))))
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 192
wait(client.embed(clip))
"""
EXIT = """
client = make()
async def first(outcomes):
    return await outcomes.__anext__()
outcomes = client.utterances([clip[:1600]] + [clip] * 3)
next(outcomes) if kind == "sync" else wait(first(outcomes))
"""


@pytest.mark.parametrize("script", [FORK, EXIT], ids=["fork", "exit with requests in flight"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_processes(fake: FakeTriton, kind: str, script: str) -> None:
    """A forked process needs a client of its own; the interpreter exits although nothing was closed."""
    fake.otherwise = long_ones_held if script == EXIT else good
    command = [sys.executable, "-c", SCRIPT + script, kind, fake.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Error" not in done.stderr


GONE = """
import os, subprocess
from ecapa_triton import ConnectError, SpeakerClient
from fake_triton import fake_triton
import numpy as np

with fake_triton() as fake, SpeakerClient(fake.url, timeout=100, retries=0) as client:
    clip = np.full(160_000, 0.1, np.float32)
    client.embed(clip)
    for command in "del local 127.0.0.1 table local", "add blackhole 127.0.0.1 table local":
        subprocess.run(["ip", "route", *command.split()], check=True)
    try:
        client.embed(clip)
    except ConnectError:
        print("noticed", flush=True)
        os._exit(0)
"""


@pytest.mark.slow
def test_a_machine_that_vanishes_is_noticed() -> None:
    """In a network of its own, in which packets to the server are lost from some moment on."""
    own = ["unshare", "--map-root-user", "--net", "sh", "-c"]
    if not shutil.which("unshare") or not shutil.which("ip") or subprocess.run([*own, "ip link"]).returncode:
        pytest.skip("needs unshare and ip, and leave to use them: apt install util-linux iproute2")
    command = [*own, 'ip link set lo up && exec "$0" -c "$1"', sys.executable, GONE]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=90)
    assert done.stdout == "noticed\n", done.stderr  # before the 100 s of the timeout, which is no errors.ConnectError


# --- cancelling ---


def test_leaving_the_iteration_cancels(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, max_in_flight=3)
    fake.otherwise = long_ones_held
    outcomes = client.utterances(noise(1 if i else 0.1, i) for i in range(100))
    assert isinstance(next(outcomes), Utterance)
    fake.wait_until(lambda fake: fake.busy == 3)
    outcomes.close()
    fake.wait_until(lambda fake: fake.cancelled == 3)
    fake.gate.set()
    client.embed(noise(2))
    assert sorted(fake.lengths) == [1600, *[SECOND] * 3, 2 * SECOND]  # clips that were drawn ahead are not sent


def test_cancelled_clips_are_not_read(fake: FakeTriton, make: Make) -> None:
    client, gate = make(fake.url, max_in_flight=3), threading.Event()
    clips = [Watched(SAMPLE, gate) for _ in range(6)]
    outcomes = client.utterances([noise(0.1), *clips])
    next(outcomes)
    for clip in clips[:2]:
        assert clip.opened.wait(PATIENCE)
    outcomes.close()
    gate.set()
    assert client.embed(SAMPLE).shape == (SIZE,)
    assert not any(clip.opened.is_set() for clip in clips[3:])


def test_a_cancelled_task_cancels_its_request(fake: FakeTriton) -> None:
    async def give_up() -> None:
        async with AsyncSpeakerClient(fake.url) as client:
            task = asyncio.ensure_future(client.embed(noise(1)))
            await asyncio.to_thread(fake.wait_until, lambda fake: fake.busy == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(fake.wait_until, lambda fake: fake.cancelled == 1)
            fake.gate.set()
            assert (await client.embed(noise(1))).shape == (SIZE,)

    fake.otherwise = held
    asyncio.run(give_up())


@pytest.mark.parametrize("many", [False, True])
def test_ctrl_c_cancels_requests(fake: FakeTriton, many: bool) -> None:
    requests = 3 if many else 1
    fake.otherwise = held

    def interrupt() -> None:
        fake.wait_until(lambda fake: fake.busy == requests)
        os.kill(os.getpid(), signal.SIGINT)

    with SpeakerClient(fake.url, timeout=None, max_in_flight=3) as client:
        with meanwhile(interrupt), pytest.raises(KeyboardInterrupt):
            client.embed_many([noise(1)] * 5) if many else client.embed(noise(1))
        fake.wait_until(lambda fake: fake.cancelled == requests)
        fake.gate.set()
        assert client.embed(noise(1)).shape == (SIZE,)
    assert len(fake.lengths) == requests + 1
