"""The client against a server that misbehaves on purpose, then against the real one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ecapa_triton
import grpc
import numpy as np
import pytest
import soundfile
import soxr
from ecapa_triton import (
    AddressError,
    AsyncSpeakerClient,
    AudioFileError,
    AudioFormatError,
    ClosedError,
    ConnectError,
    DeadlineError,
    EcapaError,
    EmbeddingError,
    KeyRefusedError,
    ModelInfo,
    ModelMismatchError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAudioError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    ServerError,
    SpeakerClient,
    State,
    Status,
    ThresholdError,
    TooLongError,
    TooShortError,
    TrustError,
    Utterance,
    Verification,
    _flow,
    audio,
    score,
)
from ecapa_triton._flow import Wait
from ecapa_triton.protocol import Deployment
from fake_triton import (
    MODEL,
    SIZE,
    Answer,
    FakeTriton,
    fingerprint,
    good,
    model_info,
    nan,
    outputs,
    refuse,
    slow,
)
from tritonclient.grpc import InferenceServerClient

from export import checkpoint

T = TypeVar("T")
OVERLOAD = refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
AWAY = refuse(grpc.StatusCode.UNAVAILABLE, "Socket closed")

SECOND = 16_000
SAMPLES = sorted(p for p in (Path(__file__).parents[1] / "samples").iterdir() if p.suffix in (".flac", ".wav"))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * SECOND)).astype(np.float32)


def info(*limits: float) -> Answer:
    return outputs(model_info=model_info(*limits))


class Awaited(SpeakerClient):
    """`AsyncSpeakerClient` with an event loop of its own, so that the same tests run on both clients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._twin = AsyncSpeakerClient(*args, **kwargs)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def _wait(self, awaited: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    def __exit__(self, *error: object) -> None:
        if self._loop.is_closed():
            return
        self.close()
        self._wait(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def state(self) -> State:
        return self._twin.state

    def close(self) -> None:
        self._wait(self._twin.close())

    def utterance(self, *args: Any, **kwargs: Any) -> Utterance:
        return self._wait(self._twin.utterance(*args, **kwargs))

    def embed(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self._wait(self._twin.embed(*args, **kwargs))

    def embed_many(self, *args: Any, **kwargs: Any) -> Any:
        return self._wait(self._twin.embed_many(*args, **kwargs))

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        return self._wait(self._twin.verify(*args, **kwargs))

    def status(self) -> Status:
        return self._wait(self._twin.status())

    def utterances(self, *args: Any, **kwargs: Any) -> Generator[Utterance | EcapaError, None, None]:
        return self._each(self._twin.utterances(*args, **kwargs))

    def _each(
        self, outcomes: AsyncGenerator[Utterance | EcapaError, None]
    ) -> Generator[Utterance | EcapaError, None, None]:
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

        def one(*args: Any, **kwargs: Any) -> SpeakerClient:
            return made.enter_context(request.param(*args, **kwargs))

        yield one


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those between attempts, in seconds; nobody waits for them."""
    asked: list[float] = []
    monkeypatch.setattr(_flow, "Wait", lambda seconds: (asked.append(seconds), Wait(0.0))[1])
    return asked


@pytest.fixture
def client(fake: FakeTriton, make: Make) -> SpeakerClient:
    return make(fake.url)


# --- one clip ---


def test_embed_is_one_request(fake: FakeTriton, client: SpeakerClient) -> None:
    waveform = noise(1)
    embedding = client.embed(waveform)
    np.testing.assert_array_equal(embedding, fingerprint(waveform))
    assert embedding.shape == (SIZE,) and embedding.dtype == np.float32 and embedding.flags.writeable
    assert fake.lengths == [SECOND]


def test_a_clip_of_the_usual_limit_needs_no_further_request(fake: FakeTriton, client: SpeakerClient) -> None:
    client.embed(noise(30))
    assert fake.lengths == [30 * SECOND]


@pytest.mark.parametrize("samples", [0, 1, 639])
def test_too_short(fake: FakeTriton, client: SpeakerClient, samples: int) -> None:
    for _ in range(2):  # with the limits guessed, then known
        with pytest.raises(TooShortError, match=rf"array float32\[{samples}\]: (holds no samples|.* expected 40 ms)"):
            client.embed(noise(1)[:samples])
        client.embed(noise(1))
    assert samples not in fake.lengths
    client.embed(noise(1)[:640])


def test_the_smallest_clip_is_the_models_own(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 30.0, 320.0)
    assert client.embed(noise(0.03))[0] == 480
    fake.info = (0.45, 30.0, 1600.0)
    fake.otherwise = nan
    with pytest.raises(TooShortError, match="50.0 ms long, expected 100 ms or more"):
        client.embed(noise(0.05))


def test_too_long(fake: FakeTriton, client: SpeakerClient) -> None:
    with pytest.raises(TooLongError, match=r"array float32\[\d+\]: 31.0 s long, .* up to 30 s: choose long=truncate"):
        client.embed(noise(31))
    assert max(fake.lengths) == 640  # only the limits were asked for


def test_too_long_by_a_sample(client: SpeakerClient) -> None:
    with pytest.raises(TooLongError, match=r": 30\.0001 s long, the model takes up to 30 s: choose"):
        client.embed(np.append(noise(30), np.float32(0)))


def test_truncate(fake: FakeTriton, client: SpeakerClient) -> None:
    waveform = noise(31)
    np.testing.assert_array_equal(client.embed(waveform, long="truncate"), fingerprint(waveform[: 30 * SECOND]))


def test_windows(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 2.0, 640.0)
    fake.otherwise = slow(0.5)
    waveform = noise(5)
    embedding = client.embed(waveform, long="windows")
    starts = [0, 1.5, 3]
    parts = [fingerprint(waveform[int(s * SECOND) : int((s + 2) * SECOND)]) for s in starts]
    np.testing.assert_allclose(embedding, np.mean([p / np.linalg.norm(p) for p in parts], axis=0), atol=1e-6)
    assert embedding.dtype == np.float32
    assert fake.most_busy == 3
    short = client.embed(waveform[:SECOND], long="windows")
    np.testing.assert_array_equal(short, fingerprint(waveform[:SECOND]))


def test_windows_stop_at_max_duration(make: Make, fake: FakeTriton) -> None:
    with (
        make(fake.url, max_duration=60) as client,
        pytest.raises(TooLongError, match=r"longer than the 60 s .*\(max_duration of SpeakerClient\): cut the rec"),
    ):
        client.embed(noise(61), long="windows")


def test_a_smaller_limit_in_the_reply_counts(fake: FakeTriton, client: SpeakerClient) -> None:
    """A model that cut the clip says so in the same reply: no embedding of a part passes for one of the whole."""
    fake.info = (0.45, 2.0, 640.0)
    with pytest.raises(TooLongError, match="takes up to 2 s"):
        client.embed(noise(5))
    assert client.embed(noise(5), long="truncate")[0] == 2 * SECOND
    fake.info = (0.45, 1.0, 640.0)
    assert client.embed(noise(5), long="windows").shape == (SIZE,)
    assert fake.lengths[-5:] == [SECOND] * 5


def test_a_larger_limit_is_learned(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 60.0, 640.0)
    assert client.embed(noise(45))[0] == 45 * SECOND


def test_limits_that_keep_changing_end(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.otherwise = lambda fake, waveform: info(0.45, len(waveform) / SECOND / 2, 640)(fake, waveform)
    with pytest.raises(ModelNotReadyError, match="keeps changing its limits"):
        client.embed(noise(29), long="windows")


def test_models_are_not_mixed_in_windows(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    models = iter([MODEL] * 2)
    fake.model = lambda fake: next(models, "f" * 24)
    assert client.utterance(noise(3), long="windows").model == "f" * 24
    assert fake.lengths[-3:] == [SECOND] * 3 and len(fake.lengths) >= 6


def test_long_is_checked(client: SpeakerClient) -> None:
    with pytest.raises(ValueError, match="long is 'cut': expected one of error, truncate, windows"):
        client.embed(noise(1), long="cut")  # type: ignore[arg-type]


# --- NaN ---


def test_nan_is_asked_again(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.answers = [nan, nan]
    np.testing.assert_array_equal(client.embed(noise(1)), fingerprint(noise(1)))
    assert len(fake.lengths) == 3


def test_nan_for_ever_says_why(fake: FakeTriton, make: Make) -> None:
    fake.otherwise = nan
    with pytest.raises(EmbeddingError, match=r"NaN 3 times for 1.00 s of good audio; another client's empty clip"):
        make(fake.url, retries=2).embed(noise(1))
    assert len(fake.lengths) == 3


def test_nan_in_one_window_is_asked_again(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    expected = client.embed(noise(3), long="windows")
    fake.answers = [nan]
    np.testing.assert_array_equal(client.embed(noise(3), long="windows"), expected)


# --- what the server does wrong ---


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (
            refuse(grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'ecapa' has no available versions"),
            ModelNotReadyError,
            "'ecapa' is not ready",
        ),
        (refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"), OverloadedError, "too many requests"),
        (refuse(grpc.StatusCode.UNAVAILABLE, "Server is stopping, scheduler for"), ConnectError, "once it is back"),
        (refuse(grpc.StatusCode.UNAVAILABLE, "Request timeout expired"), OverloadedError, "too many requests"),
        (refuse(grpc.StatusCode.UNAVAILABLE, "Socket closed"), ConnectError, "no Triton answers at"),
        (refuse(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"), ConnectError, "broke off"),
        (refuse(grpc.StatusCode.ABORTED, "by a proxy"), ConnectError, "broke off"),
        (refuse(grpc.StatusCode.UNIMPLEMENTED, "Received http2 header with status: 404"), AddressError, "right port"),
        (refuse(grpc.StatusCode.UNAUTHENTICATED, "Received http2 header with status: 401"), KeyRefusedError, "api_key"),
        (refuse(grpc.StatusCode.PERMISSION_DENIED, "no"), KeyRefusedError, "api_key"),
        (refuse(grpc.StatusCode.UNAUTHENTICATED, "A certificate is asked for"), TrustError, "no trust"),
        (
            refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (2 vs. 1)"),
            ProtocolError,
            "reply .* is too large",
        ),
        (refuse(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape"), RejectedError, "refuses .*unexpected shape"),
        (refuse(grpc.StatusCode.INTERNAL, "onnx runtime\nerror"), ServerError, "INTERNAL: onnx runtime error"),
        (outputs(embedding=None), ProtocolError, "output 'embedding' of the reply is missing"),
        (outputs(model_info=None), ProtocolError, "output 'model_info' of the reply is missing"),
        (outputs(embedding=np.zeros((2, SIZE), np.float32)), ProtocolError, r"is float32 \[2, 192\]; expected"),
        (outputs(embedding=np.zeros(SIZE, np.float32)), ProtocolError, r"is float32 \[192\]; expected"),
        (outputs(embedding=np.zeros((1, 0), np.float32)), ProtocolError, r"is float32 \[1, 0\]; expected"),
        (outputs(embedding=np.zeros((1, SIZE))), ProtocolError, r"is float64 \[1, 192\]; expected"),
        (outputs(model_info=np.zeros((1, 2), np.float32)), ProtocolError, r"is float32 \[1, 2\]; expected .*\[1, 7\]"),
        (info(0.45, math.nan, 640), ProtocolError, "max_seconds nan"),
        (info(0.45, 30, math.nan), ProtocolError, "min_samples nan"),
        (outputs(model_info=model_info(0.45, 30, 640) + 0.5), ProtocolError, "expected the model's identity"),
    ],
)
def test_server_errors(
    fake: FakeTriton, client: SpeakerClient, answer: Answer, kind: type[EcapaError], words: str
) -> None:
    fake.answers = [answer] * 5
    with pytest.raises(kind, match=words) as caught:
        client.embed(noise(1))
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert len(fake.lengths) == (5 if kind.transient else 1)
    fake.answers.clear()
    assert client.embed(noise(1)).shape == (SIZE,)  # and the client goes on


def test_timeout(make: Make, fake: FakeTriton) -> None:
    fake.otherwise = slow(1)
    with make(fake.url, timeout=0.2) as client:
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=rf"no reply from {fake.url} in 0.2 s: raise the timeout"):
            client.embed(noise(1))
        assert time.monotonic() - start < 0.9


def test_server_away(make: Make) -> None:
    with (
        make("127.0.0.1:9") as client,
        pytest.raises(ConnectError, match=r"no Triton answers at 127\.0\.0\.1:9 .*8001"),
    ):
        client.embed(noise(1))


def test_the_clip_is_looked_at_before_the_server(make: Make, tmp_path: Path) -> None:
    with make("127.0.0.1:9") as client, pytest.raises(AudioFileError):
        client.embed(tmp_path / "none.wav")


def test_model_missing(make: Make, fake: FakeTriton) -> None:
    with make(fake.url, model="other") as client:
        for call in (lambda: client.embed(noise(1)), client.status):
            with pytest.raises(ModelNotFoundError, match="model 'other' is not on the server at"):
                call()


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://host", "", "grpc://"])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ConnectError, match="expected HOST:PORT"):
        SpeakerClient(url)


@pytest.mark.parametrize(
    ("option", "values", "words"),
    [
        ("timeout", [0, -1, math.nan, math.inf, 1e10, 1e300], "expected seconds above 0 and up to 1000000, or None"),
        ("max_in_flight", [0], "expected 1 or more"),
        ("max_duration", [0, -1, math.nan, math.inf, 86_401], "expected seconds above 0 and up to 86400"),
    ],
)
def test_wrong_options(option: str, values: list[float], words: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{option} is {re.escape(str(value))}: {words}"):
            SpeakerClient(**{option: value})  # type: ignore[arg-type]


def test_the_longest_timeout(make: Make, fake: FakeTriton) -> None:
    with make(fake.url, timeout=1e6, max_duration=86_400) as client:
        assert client.embed(noise(1)).shape == (SIZE,)


def test_no_proxy_sees_the_clips(make: Make, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with make(fake.url) as client:
        assert client.embed(noise(1)).shape == (SIZE,)


def test_grpc_scheme(make: Make, fake: FakeTriton) -> None:
    with make(f"grpc://{fake.url}") as client:
        assert client.embed(noise(1)).shape == (SIZE,)


def test_closed(fake: FakeTriton, client: SpeakerClient) -> None:
    client.close()
    client.close()
    for call in (lambda: client.embed(noise(1)), client.status):
        with pytest.raises(ClosedError, match="make a new one"):
            call()


def test_closing_ends_requests_under_way(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.otherwise = slow(1)
    threading.Timer(0.2, client.close).start()
    start = time.monotonic()
    with pytest.raises(ClosedError):
        client.embed(noise(1))
    assert time.monotonic() - start < 0.9


# --- again ---


def test_what_may_pass_is_tried_again(fake: FakeTriton, client: SpeakerClient, waits: list[float]) -> None:
    fake.answers = [OVERLOAD, AWAY, nan, OVERLOAD]
    np.testing.assert_array_equal(client.embed(noise(1)), fingerprint(noise(1)))
    assert len(fake.lengths) == 5
    assert all(first / 2 <= wait <= first for wait, first in zip(waits, (0.1, 0.2, 0.4, 0.8), strict=True))


def test_waits_grow_to_two_seconds_and_differ(fake: FakeTriton, make: Make, waits: list[float]) -> None:
    fake.otherwise = OVERLOAD
    with pytest.raises(OverloadedError):
        make(fake.url, timeout=None, retries=30).embed(noise(1))
    assert len(waits) == 30 and 1 <= min(waits[5:]) < max(waits[5:]) <= 2
    assert len(set(waits[5:])) == 25


def test_a_server_that_was_never_reached_is_not_waited_for_long(make: Make, waits: list[float]) -> None:
    with pytest.raises(ConnectError):
        make("127.0.0.1:9", timeout=None, retries=1000).embed(noise(1))
    assert len(waits) == 4


def test_no_retries(fake: FakeTriton, make: Make, waits: list[float]) -> None:
    fake.answers = [OVERLOAD]
    with pytest.raises(OverloadedError):
        make(fake.url, retries=0).embed(noise(1))
    assert (len(fake.lengths), waits) == (1, [])


def test_the_timeout_holds_for_all_attempts(fake: FakeTriton, make: Make) -> None:
    def late(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.3)
        return AWAY(fake, waveform)

    fake.otherwise = late
    start = time.monotonic()
    with pytest.raises(DeadlineError, match="in 0.5 s"):
        make(fake.url, timeout=0.5, retries=100).embed(noise(1))
    assert time.monotonic() - start < 0.9
    assert len(fake.lengths) == 2


def test_a_deadline_tells_what_was_before(fake: FakeTriton, make: Make) -> None:
    fake.answers = [OVERLOAD]
    fake.otherwise = slow(1)
    with pytest.raises(DeadlineError, match=r"no reply .*; before that: the server at .* has too many requests"):
        make(fake.url, timeout=0.5).embed(noise(1))


def test_no_wait_that_ends_after_the_timeout(fake: FakeTriton, make: Make, waits: list[float]) -> None:
    """The reason is worth more than a timeout that says nothing."""
    fake.otherwise = OVERLOAD
    with pytest.raises(OverloadedError):
        make(fake.url, timeout=0.15, retries=100).embed(noise(1))
    assert len(waits) < 5 and max(waits, default=0) < 0.15


def test_windows_are_tried_again_each_by_itself(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    expected = client.embed(noise(3), long="windows")
    fake.lengths.clear()
    fake.answers = [OVERLOAD, AWAY]
    np.testing.assert_array_equal(client.embed(noise(3), long="windows"), expected)
    assert len(fake.lengths) == 5


def test_transient_errors() -> None:
    errors = {name: getattr(ecapa_triton, name) for name in ecapa_triton.__all__ if name.endswith("Error")}
    assert {name for name, error in errors.items() if error.transient} == {
        "ConnectError", "OverloadedError", "ModelNotReadyError", "EmbeddingError"
    }  # fmt: skip


# --- connection ---


def test_states(fake: FakeTriton, client: SpeakerClient) -> None:
    assert client.state is State.NEW and fake.calls == 0
    client.embed(noise(1))
    assert client.state is State.OPEN
    client.close()
    assert client.state is State.CLOSED


def test_a_client_that_was_never_used_is_closed(make: Make) -> None:
    client = make("127.0.0.1:9")
    client.close()
    with pytest.raises(ClosedError):
        client.embed(noise(1))


def test_key_and_metadata_go_with_every_call(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, api_key="secret", metadata={"x-tenant": "calls", "a.b_c": "1"})
    client.embed(noise(1))
    client.status()
    assert len(fake.metadata) > 5
    for metadata in fake.metadata:
        assert metadata["x-tenant"] == "calls" and metadata["triton-grpc-protocol-api-key"] == "secret"


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"api_key": "ke\ny"}, TrustError, "api_key is not of visible ASCII"),
        ({"metadata": {"Upper": "1"}}, ValueError, "metadata has the name 'Upper': expected small letters"),
        ({"metadata": {"": "1"}}, ValueError, "metadata has the name ''"),
        ({"metadata": {"\u00e9": "1"}}, ValueError, "metadata has the name"),
        ({"metadata": {"x-bin": "1"}}, ValueError, "metadata has the name 'x-bin'"),
        ({"metadata": {"grpc-timeout": "1"}}, ValueError, "metadata has the name 'grpc-timeout'"),
        ({"metadata": {"name": "\u00e9"}}, TrustError, "metadata 'name' is not of visible ASCII"),
        ({"retries": -1}, ValueError, "retries is -1: expected 0 or more"),
        ({"url": "http://host:8000"}, AddressError, "8000 is its HTTP port"),
    ],
)
def test_options_that_cannot_work(make: Make, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make(**options)


def test_dns_names(fake: FakeTriton, make: Make) -> None:
    assert make(f"dns:///localhost:{fake.url.rpartition(':')[2]}").embed(noise(1)).shape == (SIZE,)


@pytest.mark.parametrize("url", ["host", "127.0.0.1", "host:0", "host:99999", "a b:1", "host:1\n", "dns:///a b"])
def test_urls_without_a_port(make: Make, url: str) -> None:
    with pytest.raises(AddressError, match="expected HOST:PORT"):
        make(url)


def test_a_client_that_was_forked_says_so(fake: FakeTriton, client: SpeakerClient) -> None:
    """gRPC hangs there."""
    client.embed(noise(1))
    for one in client, getattr(client, "_twin", client):
        one._process = -1  # as it is in the other process
    with pytest.raises(RuntimeError, match="make one in each process"):
        client.embed(noise(1))


def test_any_number_of_retries(fake: FakeTriton, make: Make, waits: list[float]) -> None:
    fake.otherwise = OVERLOAD
    with pytest.raises(OverloadedError):
        make(fake.url, timeout=None, retries=1100).embed(noise(1))
    assert len(waits) == 1100


def test_a_closed_client_draws_no_more_clips(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url)

    def clips() -> Iterator[np.ndarray]:
        for i in range(1000):
            if i == 30:
                threading.Thread(target=client.close).start()
            assert i < 500
            time.sleep(0.005)
            yield noise(0.1)

    with pytest.raises(ClosedError):
        client.embed_many(clips(), return_exceptions=True)


def test_outcomes_come_before_a_slow_next_clip(fake: FakeTriton) -> None:
    seen: list[object] = []

    def clips() -> Iterator[np.ndarray]:
        for i in range(4):
            assert len(seen) >= i - 1
            yield noise(0.1, i)
            time.sleep(0.3)

    with SpeakerClient(fake.url, max_in_flight=8) as client:
        for outcome in client.utterances(clips()):
            seen.append(outcome)
    assert len(seen) == 4


def test_an_event_loop_after_another(fake: FakeTriton) -> None:
    client = AsyncSpeakerClient(fake.url)
    for _ in range(2):
        assert asyncio.run(client.embed(noise(1))).shape == (SIZE,)


def test_event_loops_one_after_another_with_long_clips(fake: FakeTriton) -> None:
    fake.info = (0.45, 1.0, 640.0)
    client = AsyncSpeakerClient(fake.url)
    for _ in range(2):
        embeddings = asyncio.run(client.embed_many([noise(2, i) for i in range(4)], long="windows"))
        assert len(embeddings) == 4


def test_two_event_loops_at_once(fake: FakeTriton) -> None:
    async def two() -> None:
        async with AsyncSpeakerClient(fake.url) as client:
            await client.embed(noise(1))
            with pytest.raises(RuntimeError, match="another event loop that is still open: make one for each"):
                await asyncio.to_thread(asyncio.run, client.embed(noise(1)))

    asyncio.run(two())


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
    start = time.monotonic()
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=90)
    assert done.stdout == "noticed\n", done.stderr
    assert time.monotonic() - start < 60  # and not the 100 s of the timeout


# --- cancelled ---


def gave_up(fake: FakeTriton, requests: int) -> bool:
    """Whether the server saw so many requests whose client was gone, in good time."""
    deadline = time.monotonic() + 10
    while fake.cancelled < requests and time.monotonic() < deadline:
        time.sleep(0.01)
    return fake.cancelled == requests


def test_leaving_the_iteration_cancels(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, max_in_flight=3)
    fake.otherwise = lambda fake, waveform: (good if len(waveform) == SECOND else slow(0.5))(fake, waveform)
    outcomes = client.utterances(noise(0.1 if i else 1, i) for i in range(100))
    assert isinstance(next(outcomes), Utterance)
    while fake.busy < 3:
        time.sleep(0.01)
    outcomes.close()
    assert gave_up(fake, 3) and len(fake.lengths) <= 5


def test_a_window_that_fails_takes_no_other_clip_along(fake: FakeTriton, make: Make) -> None:
    fake.info = (0.45, 2.0, 640.0)
    client = make(fake.url, max_in_flight=4)
    client.embed(noise(1))
    rejected = refuse(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape")
    fake.otherwise = lambda fake, waveform: (rejected if len(waveform) == 2 * SECOND else slow(0.5))(fake, waveform)
    long, *others = client.utterances([noise(3), *(noise(1, i) for i in range(3))], long="windows")
    assert isinstance(long, RejectedError)
    assert all(isinstance(other, Utterance) for other in others)


def test_a_cancelled_task_cancels_its_request(fake: FakeTriton) -> None:
    async def give_up() -> None:
        async with AsyncSpeakerClient(fake.url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.embed(noise(1)), 0.2)
            assert await asyncio.to_thread(gave_up, fake, 1)
            fake.otherwise = good
            assert (await client.embed(noise(1))).shape == (SIZE,)

    fake.otherwise = slow(0.5)
    asyncio.run(give_up())


def test_an_interrupt_cancels_the_request(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(future: object) -> None:
        while not fake.busy:
            time.sleep(0.01)
        raise KeyboardInterrupt

    fake.otherwise = slow(0.5)
    with SpeakerClient(fake.url) as client:
        monkeypatch.setattr("ecapa_triton._client._result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.embed(noise(1))
        assert gave_up(fake, 1)


def test_nothing_is_read_for_whom_nobody_waits(fake: FakeTriton, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.info = (0.45, 1.0, 640.0)
    client = make(fake.url, max_in_flight=4)
    client.embed(noise(1))
    reads: list[int] = []
    read = audio.read

    def slowly(audio: np.ndarray, sample_rate: float | None = None, *, max_samples: int) -> Any:
        reads.append(max_samples)
        if max_samples > SECOND:
            time.sleep(0.3)
        return read(audio, sample_rate, max_samples=max_samples)

    monkeypatch.setattr(audio, "read", slowly)
    outcomes = client.utterances([noise(0.1), *(noise(3, i) for i in range(7))], long="windows")
    next(outcomes)
    while not [samples for samples in reads if samples > SECOND]:
        time.sleep(0.01)
    outcomes.close()
    time.sleep(0.8)
    assert len([samples for samples in reads if samples > SECOND]) <= 2


def test_closing_ends_a_wait(fake: FakeTriton, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flow, "Wait", lambda seconds: Wait(60))
    fake.otherwise = OVERLOAD
    client = make(fake.url, timeout=None)
    threading.Timer(0.3, client.close).start()
    start = time.monotonic()
    with pytest.raises(ClosedError):
        client.embed(noise(1))
    assert time.monotonic() - start < 5


# --- many clips ---


def test_utterances_tell_what_they_are(fake: FakeTriton, client: SpeakerClient) -> None:
    one, error, long = client.utterances([noise(1), b"no audio", noise(31)], long="truncate")
    assert isinstance(one, Utterance) and isinstance(long, Utterance) and isinstance(error, NotAudioError)
    assert (one.seconds, one.model, one.threshold) == (1, MODEL, 0.45)
    assert long.seconds == 30 and long.embedding[0] == 30 * SECOND
    np.testing.assert_array_equal(client.utterance(noise(1)).embedding, one.embedding)


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_embeddings_of_two_models_are_not_handed_out_together(
    fake: FakeTriton, client: SpeakerClient, return_exceptions: bool
) -> None:
    models = iter([MODEL] * 3)
    fake.model = lambda fake: next(models, "f" * 24)
    with pytest.raises(ModelMismatchError, match=f"replaced between these clips .{MODEL}, then {'f' * 24}"):
        client.embed_many([noise(0.1, i) for i in range(6)], return_exceptions=return_exceptions)


def test_errors_hold_no_clips(fake: FakeTriton, client: SpeakerClient) -> None:
    client.embed(noise(1))
    tracemalloc.start()
    try:
        errors = list(client.utterances(noise(31, i) for i in range(20)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(error, TooLongError) for error in errors)
    assert held < 31 * SECOND * 4 * 3  # bytes: no more than a few of the clips


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
    fake.answers = [slow(0.01 * (i % 3)) for i in range(40)]
    clips = [noise(0.1 + 0.05 * (i % 7), seed=i) for i in range(40)]
    embeddings = client.embed_many(iter(clips))
    np.testing.assert_array_equal(np.stack(embeddings), np.stack([fingerprint(clip) for clip in clips]))


def test_embed_many_is_under_way_together_and_bounded(make: Make, fake: FakeTriton) -> None:
    fake.otherwise = slow(0.5)
    taken = 0

    def clips() -> Iterator[np.ndarray]:
        nonlocal taken
        for i in range(12):
            taken += 1
            assert taken - (len(fake.lengths) - fake.busy) <= 3 * 4  # under way, waiting, and just handed over
            yield noise(0.1, i)

    with make(fake.url, max_in_flight=4) as client:
        assert len(client.embed_many(clips())) == 12
    assert fake.most_busy == 4


def test_one_bad_clip_does_not_lose_the_others(fake: FakeTriton, client: SpeakerClient) -> None:
    clips = [noise(1), b"no audio", noise(31), "/none.wav", noise(0), noise(2)]
    outcomes = client.embed_many(clips, return_exceptions=True)
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [np.ndarray, NotAudioError, TooLongError, AudioFileError, TooShortError, np.ndarray]
    sent = fake.lengths.count(2 * SECOND)
    with pytest.raises(NotAudioError):  # the first, when all are done
        client.embed_many(clips)
    assert fake.lengths.count(2 * SECOND) == sent + 1


def test_embed_many_of_nothing_and_of_a_string(client: SpeakerClient) -> None:
    assert client.embed_many([]) == []
    for single in "clip.wav", b"RIFF", bytearray(b"RIFF"), Path("clip.wav"), noise(1):
        with pytest.raises(TypeError, match=f"audios is a single {type(single).__name__}: expected a list of clips"):
            client.embed_many(single)


def test_threads_get_their_own_replies(make: Make, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tritonclient passes the call through an attribute: a thread may be held up right there."""

    def hold_up(triton: InferenceServerClient, call: object) -> None:
        triton.__dict__["call"] = call
        time.sleep(0.001)

    attribute = property(lambda triton: triton.__dict__["call"], hold_up)
    monkeypatch.setattr(InferenceServerClient, "_call_future", attribute, raising=False)
    clips = [noise(0.05, seed=i) for i in range(200)]
    with make(fake.url) as client, ThreadPoolExecutor(16) as pool:
        embeddings = list(pool.map(client.embed, clips))
    np.testing.assert_array_equal(np.stack(embeddings), np.stack([fingerprint(clip) for clip in clips]))


# --- two clips ---


def test_verify(fake: FakeTriton, client: SpeakerClient) -> None:
    a, b = noise(1), noise(1.5, seed=1)
    verification = client.verify(a, b)
    assert verification.score == pytest.approx(score(fingerprint(a), fingerprint(b)))
    assert verification.threshold == 0.45  # not 0.44999998807907104
    assert client.verify(a, a).same
    assert client.verify(a, a).score == pytest.approx(1)
    assert not client.verify(a, -a).same
    assert not client.verify(a, a, threshold=1.0).same
    assert client.verify(a, b, threshold=-1.0).same


def test_verify_without_a_threshold(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (math.nan, 30.0, 640.0)
    with pytest.raises(ThresholdError, match="has no threshold of its own: pass threshold"):
        client.verify(noise(1), noise(1))
    assert client.verify(noise(1), noise(1), 0.9).same


@pytest.mark.parametrize("threshold", [45, -1.01, math.nan])
def test_verify_with_a_wrong_threshold(fake: FakeTriton, client: SpeakerClient, threshold: float) -> None:
    with pytest.raises(ThresholdError, match="expected a cosine"):
        client.verify(noise(1), noise(1), threshold)
    assert fake.lengths == []


def test_verify_does_not_compare_two_models(fake: FakeTriton, client: SpeakerClient) -> None:
    models = iter(("1" * 24, "2" * 24))
    fake.model = lambda fake: next(models)
    with pytest.raises(ModelMismatchError, match=r"replaced between these clips \([0-9a-f]{24}, then [0-9a-f]{24}\)"):
        client.verify(noise(1), noise(1))


@pytest.mark.parametrize(
    ("a", "b"),
    [([1.0, 0.0], [1.0]), ([[1.0]], [[1.0]]), ([0.0, 0.0], [1.0, 0.0]), ([math.nan, 1.0], [1.0, 0.0])],
)
def test_score_refuses(a: list[float], b: list[float]) -> None:
    with pytest.raises(EmbeddingError, match="expected"):
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


def test_status_of_a_model_that_is_not_ready(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.ready = False
    status = client.status()
    assert (status.live, status.ready, status.model_versions) == (True, False, ())
    assert (status.deployment, status.info, status.statistics) == (None, None, None)


def test_status_of_an_overloaded_server(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.otherwise = refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    assert client.status().info is None


# --- the package ---


def test_all_is_there_and_sorted() -> None:
    assert all(hasattr(ecapa_triton, name) for name in ecapa_triton.__all__)
    assert sorted(set(ecapa_triton.__all__)) == sorted(ecapa_triton.__all__)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    lines = [line for line in (ecapa_triton.errors.__doc__ or "").splitlines() if line.startswith("    ")]
    parents: list[str] = []
    for line in lines:
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 4 - 1
        base = getattr(ecapa_triton, name).__bases__[0].__name__
        assert base == (parents[depth - 1] if depth else "Exception")
        parents[depth:] = [name]
    assert {line.split()[0] for line in lines} == {n for n in ecapa_triton.__all__ if n.endswith("Error")}


# --- the real server ---

Reference = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def served(server, make: Make) -> SpeakerClient:  # type: ignore[no-untyped-def]
    return make(server.grpc_url, timeout=60)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b))


def test_served_files_bytes_and_arrays(served: SpeakerClient, reference: Reference) -> None:
    path = next(p for p in SAMPLES if p.name == "anna_1.flac")
    floats, rate = soundfile.read(path, dtype="float32")
    ints, _ = soundfile.read(path, dtype="int16")
    assert rate == SECOND
    expected = reference(floats)
    for clip in (path, str(path), path.read_bytes(), floats, ints, floats[:, None], np.stack([floats] * 2, axis=1)):
        assert close(served.embed(clip), expected)


def test_served_mixed_lengths(served: SpeakerClient, reference: Reference) -> None:
    clips = [noise(s, seed=i) for i, s in enumerate([0.04, 2.5, 0.3, 7, 1, 0.11, 4, 0.04])]
    for embedding, clip in zip(served.embed_many(clips), clips, strict=True):
        assert close(embedding, reference(clip))


def test_served_long_clips(served: SpeakerClient, reference: Reference) -> None:
    clip = noise(40)
    with pytest.raises(TooLongError, match="40.0 s long, the model takes up to 30 s"):
        served.embed(clip)
    first, last = reference(clip[: 30 * SECOND]), reference(clip[10 * SECOND :])
    assert close(served.embed(clip, long="truncate"), first)
    mean = (first / np.linalg.norm(first) + last / np.linalg.norm(last)) / 2
    assert close(served.embed(clip, long="windows"), mean)


def test_served_verdicts(served: SpeakerClient) -> None:
    speakers = {path: path.name.split("_")[0] for path in SAMPLES}
    assert len(speakers) == 6 and len(set(speakers.values())) == 3
    for a in SAMPLES:
        for b in SAMPLES:
            verification = served.verify(a, b)
            assert verification.threshold == 0.45
            assert verification.same == (speakers[a] == speakers[b]), (a, b, verification)


def test_served_resampling_keeps_the_voice(served: SpeakerClient) -> None:
    """At 48 kHz and back, and at half the level: the same clip to the model."""
    samples, rate = soundfile.read(SAMPLES[0], dtype="float32")
    from_44100 = soxr.resample(samples, rate, 48_000)
    assert score(served.embed(samples, rate), served.embed(from_44100, 48_000)) > 0.99


def test_served_status(served: SpeakerClient, mini: checkpoint.Checkpoint) -> None:
    time.sleep(0.5)  # Triton counts a request just after it has replied, and tests before this one sent some
    before = served.status()
    served.embed_many([noise(0.5, seed=i) for i in range(8)])
    time.sleep(0.5)
    after = served.status()
    assert before.server_version == after.server_version != ""
    assert after.live and after.ready and after.model_versions
    assert after.info == ModelInfo(threshold=0.45, max_seconds=30.0, min_samples=640, id=mini.sha256[:24])
    assert after.statistics.requests == before.statistics.requests + 9  # with the clip of silence of `before`
    assert 0 < after.statistics.executions - before.statistics.executions <= 9
    assert after.statistics.compute_ms > 0


def test_served_unknown_model_and_wrong_version(make: Make, server) -> None:  # type: ignore[no-untyped-def]
    for options in ({"model": "other"}, {"model_version": "999"}):
        with make(server.grpc_url, **options) as client:
            for call in (lambda client=client: client.embed(noise(1)), client.status):
                with pytest.raises((ModelNotFoundError, ModelNotReadyError)):
                    call()


def test_served_wrong_array(served: SpeakerClient) -> None:
    with pytest.raises(AudioFormatError):
        served.embed(np.zeros((2, 3, 4), np.float32))
