"""The client against a server that misbehaves on purpose, then against the real one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ecapa_triton
import grpc
import numpy as np
import pytest
import soundfile
from ecapa_triton import AsyncSpeakerClient, ModelInfo, SpeakerClient, State, Utterance, errors, score
from ecapa_triton._async_client import pause
from ecapa_triton.protocol import Deployment
from fake_triton import MODEL, PATIENCE, SIZE, Answer, FakeTriton, fingerprint, good, held, model_info, nan, outputs
from fake_triton import refuse as refuse_with

from export import checkpoint

Status = grpc.StatusCode
OVERLOAD = refuse_with(Status.UNAVAILABLE, "Exceeds maximum queue size")
AWAY = refuse_with(Status.UNAVAILABLE, "Socket closed")
REJECTED = refuse_with(Status.INVALID_ARGUMENT, "unexpected shape")
OTHER = "f" * 24  # identity of another model

SECOND = 16_000
SAMPLES = sorted(p for p in (Path(__file__).parents[1] / "samples").iterdir() if p.suffix in (".flac", ".wav"))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * SECOND)).astype(np.float32)


def info(*limits: float) -> Answer:
    return outputs(model_info=model_info(*limits))


def long_ones_held(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    return (held if len(waveform) >= SECOND else good)(fake, waveform)


class Awaited:
    """`AsyncSpeakerClient` on an event loop in a thread, with the methods of `SpeakerClient`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = AsyncSpeakerClient(*args, **kwargs)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._loop.is_closed():
            self.close()
            self._wait(self._loop.shutdown_asyncgens())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            made = attribute(*args, **kwargs)
            return self._each(made) if isinstance(made, AsyncGenerator) else self._wait(made)

        return call

    def _wait(self, awaited: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    def _each(self, outcomes: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while True:
                yield self._wait(outcomes.__anext__())
        except StopAsyncIteration:
            pass
        finally:
            self._wait(outcomes.aclose())


Make = Callable[..., SpeakerClient]


@pytest.fixture(params=[SpeakerClient, Awaited], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes clients of either kind; they end with the test."""
    with contextlib.ExitStack() as made:
        yield lambda *args, **kwargs: made.enter_context(request.param(*args, **kwargs))


@pytest.fixture
def client(fake: FakeTriton, make: Make) -> SpeakerClient:
    return make(fake.url, timeout=PATIENCE)


@contextlib.contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Runs an action in another thread; its errors are raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
        done.result(PATIENCE)


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


# --- one clip ---


@pytest.mark.parametrize("seconds", [1, 30])
def test_embed_is_one_request(fake: FakeTriton, client: SpeakerClient, seconds: float) -> None:
    embedding = client.embed(noise(seconds))
    np.testing.assert_array_equal(embedding, fingerprint(noise(seconds)))
    assert embedding.shape == (SIZE,) and embedding.dtype == np.float32 and embedding.flags.writeable
    assert fake.lengths == [seconds * SECOND]


def test_too_short(fake: FakeTriton, client: SpeakerClient) -> None:
    for _ in range(2):  # with the limits guessed, then known
        for samples in 0, 1, 639:
            with pytest.raises(errors.TooShortError, match=rf"array float32\[{samples}\]"):
                client.embed(noise(1)[:samples])
        client.embed(noise(1)[:640])
    assert set(fake.lengths) == {640}
    fake.info = (0.45, 30.0, 320.0)
    client.embed(noise(1))
    assert client.embed(noise(0.03))[0] == 480
    fake.info = (0.45, 30.0, 1600.0)
    fake.otherwise = nan
    with pytest.raises(errors.TooShortError, match=r"50.0 ms .*100 ms"):
        client.embed(noise(0.05))


def test_too_long(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, max_duration=60)
    for clip, fact in (noise(31), ": 31 s .* 30 s"), (np.append(noise(30), np.float32(0)), r": 30\.0001 s .* 30 s"):
        with pytest.raises(errors.TooLongError, match=fact):
            client.embed(clip)
    assert max(fake.lengths) == 640  # only a clip of silence, for the limits
    np.testing.assert_array_equal(client.embed(noise(31), long="truncate"), fingerprint(noise(31)[: 30 * SECOND]))
    with pytest.raises(errors.TooLongError, match=r"60 s .*max_duration"):
        client.embed(noise(61), long="windows")
    fake.info = (0.45, 60.0, 640.0)  # a larger limit is learned
    client.embed(noise(1))
    assert client.embed(noise(45))[0] == 45 * SECOND


def test_windows(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 2.0, 640.0)
    waveform = noise(5)
    client.embed(waveform[:SECOND])  # the limits
    fake.otherwise = held
    with meanwhile(lambda: (fake.wait_until(lambda fake: fake.busy == 3), fake.gate.set())):  # all in flight at once
        outcomes = list(client.utterances([waveform, *(noise(5, i) for i in range(3))], long="windows"))
    assert all(isinstance(outcome, Utterance) for outcome in outcomes)
    assert fake.most_busy == 3  # one clip at a time: memory is bounded by `max_duration`
    starts = [0, 1.5, 3]
    parts = [fingerprint(waveform[int(s * SECOND) : int((s + 2) * SECOND)]) for s in starts]
    mean = np.mean([p / np.linalg.norm(p) for p in parts], axis=0)
    np.testing.assert_allclose(outcomes[0].embedding, mean, atol=1e-6)
    assert outcomes[0].embedding.dtype == np.float32 and outcomes[0].seconds == 5
    short = client.embed(waveform[:SECOND], long="windows")
    np.testing.assert_array_equal(short, fingerprint(waveform[:SECOND]))


def test_a_smaller_limit_in_the_reply_counts(fake: FakeTriton, client: SpeakerClient) -> None:
    """The reply of a model that cut the clip says so: an embedding of a part never passes for one of the whole."""
    fake.info = (0.45, 2.0, 640.0)
    with pytest.raises(errors.TooLongError, match=" 2 s"):
        client.embed(noise(5))
    assert client.embed(noise(5), long="truncate")[0] == 2 * SECOND
    fake.info = (0.45, 1.0, 640.0)
    assert client.embed(noise(5), long="windows").shape == (SIZE,)
    assert fake.lengths[-5:] == [SECOND] * 5


def test_limits_that_keep_changing_end(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.otherwise = lambda fake, waveform: info(0.45, len(waveform) / SECOND / 2, 640)(fake, waveform)
    with pytest.raises(errors.ModelNotReadyError, match="limits"):
        client.embed(noise(29), long="windows")


def test_models_are_not_mixed_in_windows(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    models = iter([MODEL] * 2)
    fake.model = lambda fake: next(models, OTHER)
    assert client.utterance(noise(3), long="windows").model == OTHER
    assert fake.lengths[-3:] == [SECOND] * 3 and len(fake.lengths) >= 6


def test_long_is_checked(client: SpeakerClient) -> None:
    for call in client.embed, client.utterance, lambda clip, long: client.verify(clip, clip, long=long):
        with pytest.raises(ValueError, match="long is 'cut'"):
            call(noise(1), long="cut")
    with pytest.raises(ValueError, match="long is 'cut'"):
        client.utterances([], long="cut")  # type: ignore[arg-type]


# --- errors of the server ---


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        (Status.UNAVAILABLE, "Request for unknown model: 'ecapa' has no available versions", errors.ModelNotReadyError),
        (Status.UNAVAILABLE, "Exceeds maximum queue size", errors.OverloadedError),
        (Status.UNAVAILABLE, "Server is stopping, scheduler for", errors.ConnectError),
        (Status.UNAVAILABLE, "Request timeout expired", errors.OverloadedError),
        (Status.UNAVAILABLE, "Socket closed", errors.ConnectError),
        (Status.INTERNAL, "Received RST_STREAM with error code 2", errors.ConnectError),
        (Status.ABORTED, "by a proxy", errors.ConnectError),
        (Status.UNIMPLEMENTED, "Received http2 header with status: 404", errors.AddressError),
        (Status.UNAUTHENTICATED, "Received http2 header with status: 401", errors.KeyRefusedError),
        (Status.PERMISSION_DENIED, "no", errors.KeyRefusedError),
        (Status.UNAUTHENTICATED, "A certificate is asked for", errors.TrustError),
        (Status.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (2 vs. 1)", errors.ProtocolError),
        (Status.INVALID_ARGUMENT, "unexpected shape", errors.RejectedError),
        (Status.INTERNAL, "onnx runtime\nerror", errors.ServerError),
    ],
)
def test_server_errors(
    fake: FakeTriton, make: Make, status: Status, detail: str, kind: type[errors.EcapaError]
) -> None:
    client = make(fake.url, retries=1)
    fake.answers = [refuse_with(status, detail)] * 2
    with pytest.raises(kind) as caught:
        client.embed(noise(1))
    assert type(caught.value) is kind
    assert fake.url in str(caught.value) and f"{' '.join(detail.split())})" in str(caught.value)
    assert len(fake.lengths) == (2 if kind.transient else 1)
    fake.answers.clear()
    assert client.embed(noise(1)).shape == (SIZE,)  # the client stays usable


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        (outputs(embedding=None), ["embedding"]),
        (outputs(model_info=None), ["model_info"]),
        (outputs(embedding=np.zeros((2, SIZE), np.float32)), ["embedding", "float32 [2, 192]"]),
        (outputs(embedding=np.zeros(SIZE, np.float32)), ["embedding", "float32 [192]"]),
        (outputs(embedding=np.zeros((1, 0), np.float32)), ["embedding", "float32 [1, 0]"]),
        (outputs(embedding=np.zeros((1, SIZE))), ["embedding", "float64 [1, 192]"]),
        (outputs(model_info=np.zeros((1, 2), np.float32)), ["model_info", "float32 [1, 2]", "float32 [1, 7]"]),
        (info(0.45, math.nan, 640), ["model_info", "nan"]),
        (info(0.45, 30, math.nan), ["model_info", "nan"]),
        (outputs(model_info=model_info(0.45, 30, 640) + 0.5), ["model_info", "24 bits"]),
    ],
)
def test_replies_of_another_model(fake: FakeTriton, client: SpeakerClient, answer: Answer, facts: list[str]) -> None:
    fake.answers = [answer]
    with pytest.raises(errors.ProtocolError) as caught:
        client.embed(noise(1))
    assert all(fact in str(caught.value) for fact in facts)
    assert client.embed(noise(1)).shape == (SIZE,)


def test_server_away(make: Make, tmp_path: Path) -> None:
    client = make("127.0.0.1:9", timeout=None, retries=1000)  # an address that was never right is retried 4 times
    with pytest.raises(errors.ConnectError, match=r"127\.0\.0\.1:9: .*8001"):
        client.embed(noise(1))
    with pytest.raises(errors.AudioFileError):  # the clip is read before anything is sent
        client.embed(tmp_path / "none.wav")


def test_model_missing(make: Make, fake: FakeTriton) -> None:
    client = make(fake.url, model="other")
    for call in (lambda: client.embed(noise(1)), client.status):
        with pytest.raises(errors.ModelNotFoundError, match=f"{fake.url}: .*'other'"):
            call()


# --- options ---


@pytest.mark.parametrize(
    "url",
    "http://127.0.0.1:8000 https://host grpc:// host 127.0.0.1 host:0 host:99999".split()
    + ["", "a b:1", "host:1\n", "dns:///a b"],
)
def test_wrong_urls(make: Make, url: str) -> None:
    with pytest.raises(errors.AddressError, match="HOST:PORT"):
        make(url)


@pytest.mark.parametrize(
    ("option", "values", "error"),
    [
        ("timeout", [0, -1, math.nan, math.inf, 1e10, 1e300], ValueError),
        ("max_in_flight", [0], ValueError),
        ("max_duration", [0, -1, math.nan, math.inf, 86_401], ValueError),
        ("retries", [-1], ValueError),
        ("metadata", [{name: "1"} for name in ("Upper", "", "\u00e9", "x-bin", "grpc-timeout")], ValueError),
        ("metadata", [{"name": "\u00e9"}], errors.TrustError),
        ("api_key", ["ke\ny"], errors.TrustError),
    ],
)
def test_wrong_options(make: Make, option: str, values: list[Any], error: type[Exception]) -> None:
    for value in values:
        with pytest.raises(error, match=option):
            make(**{option: value})


def test_no_proxy_sees_the_clips(make: Make, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make(fake.url).embed(noise(1)).shape == (SIZE,)


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:{}", "dns:///localhost:{}", "ipv4:127.0.0.1:{}"])
def test_forms_of_urls(make: Make, fake: FakeTriton, url: str) -> None:
    client = make(url.format(fake.url.rpartition(":")[2]), timeout=1e6, max_duration=86_400)  # the longest times
    assert client.embed(noise(1)).shape == (SIZE,)


def test_key_and_metadata_go_with_every_call(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, api_key="secret", metadata={"x-tenant": "calls", "a.b_c": "1"})
    client.embed(noise(1))
    client.status()
    assert len(fake.metadata) > 5
    for metadata in fake.metadata:
        assert metadata["x-tenant"] == "calls" and metadata["triton-grpc-protocol-api-key"] == "secret"


# --- retries ---


def test_transient_failures_are_retried_with_backoff_within_one_timeout(fake: FakeTriton, make: Make) -> None:
    fake.answers = [OVERLOAD, AWAY, nan, OVERLOAD]
    np.testing.assert_array_equal(make(fake.url, timeout=9).embed(noise(1)), fingerprint(noise(1)))
    assert len(fake.lengths) == 5
    assert (np.diff(fake.times) > [0.05, 0.1, 0.2, 0.4]).all()
    assert fake.deadlines[4] < 9 - 0.75 + 0.3  # s, and what gRPC rounds up


def test_pauses_double_up_to_two_seconds_and_have_jitter() -> None:
    for attempt, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 2, 2]):
        assert longest / 2 <= pause(attempt) <= longest
    assert len({pause(1100) for _ in range(20)}) == 20 and 1 <= pause(1100) <= 2


def test_a_timeout_names_the_failure_before_it(fake: FakeTriton, make: Make) -> None:
    fake.answers = [OVERLOAD]
    fake.otherwise = held
    with pytest.raises(errors.DeadlineError, match=r" in 2 s.*Exceeds maximum queue size"):
        make(fake.url, timeout=2).embed(noise(1))


def test_retries_end(fake: FakeTriton, make: Make) -> None:
    fake.otherwise = nan
    with pytest.raises(errors.EmbeddingError, match=r"NaN 3 times for 1.00 s"):
        make(fake.url, retries=2).embed(noise(1))
    assert len(fake.lengths) == 3
    fake.otherwise = OVERLOAD
    with pytest.raises((errors.OverloadedError, errors.DeadlineError), match="Exceeds maximum queue size"):
        make(fake.url, timeout=1, retries=10**9).embed(noise(1))  # no pause beyond the timeout


def test_windows_are_retried_one_by_one(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    expected = client.embed(noise(3), long="windows")
    fake.lengths.clear()
    fake.answers = [OVERLOAD, AWAY, nan]
    np.testing.assert_array_equal(client.embed(noise(3), long="windows"), expected)
    assert len(fake.lengths) == 6


# --- life of a client ---


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
        lambda: client.embed(SAMPLES[0]),
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
    clip = Watched(SAMPLES[0], threading.Event())
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
    clips = [Watched(SAMPLES[0], gate) for _ in range(6)]
    outcomes = client.utterances([noise(0.1), *clips])
    next(outcomes)
    for clip in clips[:2]:
        assert clip.opened.wait(PATIENCE)
    outcomes.close()
    gate.set()
    assert client.embed(SAMPLES[0]).shape == (SIZE,)
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


# --- many clips ---


def test_utterances(fake: FakeTriton, client: SpeakerClient) -> None:
    one, error, long = client.utterances([noise(1), b"no audio", noise(31)], long="truncate")
    assert isinstance(one, Utterance) and isinstance(long, Utterance) and isinstance(error, errors.NotAudioError)
    assert (one.seconds, one.model, one.threshold) == (1, MODEL, 0.45)
    assert long.seconds == 30 and long.embedding[0] == 30 * SECOND
    np.testing.assert_array_equal(client.utterance(noise(1)).embedding, one.embedding)


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_embeddings_of_two_models_are_not_returned_together(
    fake: FakeTriton, client: SpeakerClient, return_exceptions: bool
) -> None:
    models = iter([MODEL] * 3)
    fake.model = lambda fake: next(models, OTHER)
    with pytest.raises(errors.ModelMismatchError) as caught:
        client.embed_many([noise(0.1, i) for i in range(6)], return_exceptions=return_exceptions)
    assert MODEL in str(caught.value) and OTHER in str(caught.value)


@pytest.mark.parametrize(("seconds", "kind"), [(31, errors.TooLongError), (29, errors.RejectedError)])
def test_errors_hold_no_clips(
    fake: FakeTriton, client: SpeakerClient, seconds: int, kind: type[errors.EcapaError]
) -> None:
    client.embed(noise(1))
    fake.otherwise = REJECTED
    tracemalloc.start()
    try:
        outcomes = list(client.utterances(noise(seconds, i) for i in range(20)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(outcome, kind) for outcome in outcomes)
    assert held < seconds * SECOND * 4 * 3  # bytes of a few of the clips


def test_an_asynchronous_generator_of_clips(fake: FakeTriton) -> None:
    async def clips() -> AsyncIterator[np.ndarray]:
        for i in range(20):
            await asyncio.sleep(0)
            yield noise(0.1, i)

    async def embed() -> list[np.ndarray]:
        async with AsyncSpeakerClient(fake.url) as client:
            return await client.embed_many(clips())

    np.testing.assert_array_equal(asyncio.run(embed()), [fingerprint(noise(0.1, i)) for i in range(20)])


def test_embed_many_keeps_the_order(fake: FakeTriton, client: SpeakerClient) -> None:
    def last_first(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        fake.wait_until(lambda fake: len(fake.lengths) >= 8)
        if len(waveform) == 1600:  # the first clip
            fake.wait_until(lambda fake: fake.busy == 1)
        return good(fake, waveform)

    fake.answers = [last_first] * 8
    clips = [noise(0.1 + 0.05 * (i % 7), seed=i) for i in range(40)]
    clips[7] = noise(2)
    embeddings = client.embed_many(iter(clips))
    np.testing.assert_array_equal(np.stack(embeddings), np.stack([fingerprint(clip) for clip in clips]))


def test_clips_in_flight_and_drawn_ahead_are_bounded(make: Make, fake: FakeTriton) -> None:
    client, drawn, ahead, done = make(fake.url, max_in_flight=4), 0, 0, 0
    fake.otherwise = lambda fake, waveform: (good if len(waveform) == 2 * SECOND else held)(fake, waveform)

    def clips() -> Iterator[np.ndarray]:
        nonlocal drawn, ahead
        for i in range(40):
            drawn += 1
            ahead = max(ahead, drawn - done)
            yield noise(0.1, i)

    def look() -> None:
        try:
            fake.wait_until(lambda fake: fake.busy == 4)
            while drawn < 9:
                time.sleep(0.01)
            client.embed(noise(2))  # would arrive after any further request of the other call
            assert len(fake.lengths) == 4 + 1
        finally:
            fake.gate.set()

    with meanwhile(look):
        for _ in client.utterances(clips()):
            done += 1
    assert done == 40 and ahead <= 2 * 4 + 1


def test_outcomes_do_not_wait_for_the_last_clip(fake: FakeTriton, make: Make) -> None:
    seen: list[object] = []

    def clips() -> Iterator[np.ndarray]:
        for i in itertools.takewhile(lambda _: not seen, itertools.count()):
            yield noise(0.1, i)
            time.sleep(0.01)

    for outcome in make(fake.url, max_in_flight=10_000).utterances(clips()):
        seen.append(outcome)
    assert all(isinstance(outcome, Utterance) for outcome in seen)


def test_one_bad_clip_does_not_lose_the_others(fake: FakeTriton, client: SpeakerClient) -> None:
    clips = [noise(1), b"no audio", noise(31), "/none.wav", noise(0), noise(2)]
    outcomes = client.embed_many(clips, return_exceptions=True)
    kinds = [type(outcome) for outcome in outcomes]
    long, short = errors.TooLongError, errors.TooShortError
    assert kinds == [np.ndarray, errors.NotAudioError, long, errors.AudioFileError, short, np.ndarray]
    sent = fake.lengths.count(2 * SECOND)
    with pytest.raises(errors.NotAudioError):  # the first, when all are done
        client.embed_many(clips)
    assert fake.lengths.count(2 * SECOND) == sent + 1


def test_embed_many_of_nothing_and_of_a_single_clip(client: SpeakerClient) -> None:
    assert client.embed_many([]) == []
    for single in "clip.wav", b"RIFF", bytearray(b"RIFF"), Path("clip.wav"), noise(1):
        with pytest.raises(TypeError, match=type(single).__name__):
            client.embed_many(single)


def test_an_error_of_the_callers_generator_is_raised(fake: FakeTriton, client: SpeakerClient) -> None:
    def clips() -> Iterator[np.ndarray]:
        yield noise(0.1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.embed_many(clips())


def test_threads_get_their_own_replies(client: SpeakerClient) -> None:
    clips = [noise(0.05, seed=i) for i in range(200)]
    with ThreadPoolExecutor(16) as pool:
        embeddings = list(pool.map(client.embed, clips))
    np.testing.assert_array_equal(np.stack(embeddings), np.stack([fingerprint(clip) for clip in clips]))


# --- two clips ---


def test_verify(fake: FakeTriton, client: SpeakerClient) -> None:
    a, b = noise(1), noise(1.5, seed=1)
    for threshold in 45, -1.01, math.nan:
        with pytest.raises(errors.ThresholdError, match=f"{threshold}"):
            client.verify(a, b, threshold)
    assert fake.lengths == []
    verification = client.verify(a, b)
    assert verification.score == pytest.approx(score(fingerprint(a), fingerprint(b)))
    assert verification.threshold == 0.45  # not 0.44999998807907104
    assert client.verify(a, a).same
    assert client.verify(a, a).score == pytest.approx(1)
    assert not client.verify(a, -a).same
    assert not client.verify(a, a, threshold=1.0).same
    assert client.verify(a, b, threshold=-1.0).same
    with pytest.raises(errors.NotAudioError):
        client.verify(a, b"no audio")
    fake.info = (math.nan, 30.0, 640.0)
    with pytest.raises(errors.ThresholdError):
        client.verify(a, a)
    assert client.verify(a, a, 0.9).same
    models = iter((MODEL, OTHER))
    fake.model = lambda fake: next(models)
    with pytest.raises(errors.ModelMismatchError) as caught:
        client.verify(a, a)
    assert MODEL in str(caught.value) and OTHER in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b"),
    [([1.0, 0.0], [1.0]), ([[1.0]], [[1.0]]), ([0.0, 0.0], [1.0, 0.0]), ([math.nan, 1.0], [1.0, 0.0])],
)
def test_score_rejects(a: list[float], b: list[float]) -> None:
    with pytest.raises(errors.EmbeddingError):
        score(np.array(a), np.array(b))


# --- status ---


def test_status(fake: FakeTriton, client: SpeakerClient) -> None:
    status = client.status()
    assert (status.server_version, status.live, status.ready) == ("2.51.0", True, True)
    assert status.model_versions == ("1", "2")
    assert status.info == ModelInfo(threshold=0.45, max_seconds=30.0, min_samples=640, id=MODEL)
    assert status.deployment == Deployment(
        "onnxruntime", "model_fp16.onnx", ("2 on GPU 0", "2 on GPU 1", "1 on the CPU"), "fp16", 3
    )
    statistics = status.statistics
    assert (statistics.requests, statistics.failures, statistics.executions) == (20, 2, 8)
    assert (statistics.mean_batch, statistics.queue_ms, statistics.compute_ms) == (3.0, 3.0, 11.0)


def test_status_of_a_server_in_trouble(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, retries=0)
    fake.otherwise = OVERLOAD
    status = client.status()
    assert status.info is None and status.ready and status.statistics
    fake.ready = False
    status = client.status()
    assert (status.live, status.ready, status.model_versions) == (True, False, ())
    assert (status.deployment, status.info, status.statistics) == (None, None, None)


# --- the package ---


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    lines = [line for line in (ecapa_triton.errors.__doc__ or "").splitlines() if line.startswith("    ")]
    parents: list[str] = []
    for line in lines:
        names, depth = line.strip().split(", "), (len(line) - len(line.lstrip())) // 4 - 1
        for name in names:
            base = getattr(ecapa_triton, name).__bases__[0].__name__
            assert base == (parents[depth - 1] if depth else "Exception")
        parents[depth:] = names
    assert {n for line in lines for n in line.strip().split(", ")} == {
        n for n in ecapa_triton.__all__ if n.endswith("Error")
    }


# --- the real server ---

Reference = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def served(server, make: Make) -> SpeakerClient:  # type: ignore[no-untyped-def]
    return make(server.grpc_url, timeout=60)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b))


def test_served_files_bytes_arrays_and_mixed_lengths(served: SpeakerClient, reference: Reference) -> None:
    path = next(p for p in SAMPLES if p.name == "anna_1.flac")
    floats, rate = soundfile.read(path, dtype="float32")
    ints, _ = soundfile.read(path, dtype="int16")
    assert rate == SECOND
    expected = reference(floats)
    for clip in (path, str(path), path.read_bytes(), floats, ints, floats[:, None], np.stack([floats] * 2, axis=1)):
        assert close(served.embed(clip), expected)
    clips = [noise(s, seed=i) for i, s in enumerate([0.04, 2.5, 0.3, 7, 1, 0.11, 4, 0.04])]
    for embedding, clip in zip(served.embed_many(clips), clips, strict=True):
        assert close(embedding, reference(clip))


def test_served_long_clips(served: SpeakerClient, reference: Reference) -> None:
    clip = noise(40)
    with pytest.raises(errors.TooLongError, match="40 s .* 30 s"):
        served.embed(clip)
    first, last = reference(clip[: 30 * SECOND]), reference(clip[10 * SECOND :])
    assert close(served.embed(clip, long="truncate"), first)
    mean = (first / np.linalg.norm(first) + last / np.linalg.norm(last)) / 2
    assert close(served.embed(clip, long="windows"), mean)


def test_served_status(served: SpeakerClient, mini: checkpoint.Checkpoint) -> None:
    before = served.status()
    served.embed_many([noise(0.5, seed=i) for i in range(8)])
    after = served.status()
    while after.statistics.requests < before.statistics.requests + 9:  # Triton counts a request after it has replied
        after = served.status()
    assert before.server_version == after.server_version != ""
    assert after.live and after.ready and after.model_versions
    assert after.info == ModelInfo(threshold=0.45, max_seconds=30.0, min_samples=640, id=mini.sha256[:24])
    assert after.statistics.executions > before.statistics.executions and after.statistics.compute_ms > 0


def test_served_unknown_model_and_wrong_version(make: Make, server) -> None:  # type: ignore[no-untyped-def]
    for options in ({"model": "other"}, {"model_version": "999"}):
        client = make(server.grpc_url, retries=1, **options)
        for call in (lambda client=client: client.embed(noise(1)), client.status):
            with pytest.raises((errors.ModelNotFoundError, errors.ModelNotReadyError)):
                call()
