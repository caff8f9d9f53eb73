"""The asynchronous client: read, embed, retry, average windows."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import os
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, TypeAlias, TypeVar, get_args, overload

import numpy as np
from tritonclient.grpc import service_pb2

from . import audio as audio_module
from . import protocol
from ._connection import CLOSED, Connection, Options, State
from ._scoring import (
    MIN_SPEECH,
    Embedding,
    Utterance,
    Verification,
    agreeing,
    check_speech,
    check_threshold,
    decide,
    embeddings,
    mean_direction,
    score,
)
from .audio import PLAIN, SAMPLE_RATE, Audio, Clip, Waveform, counted
from .errors import (
    ClosedError,
    ConnectError,
    DeadlineError,
    EcapaError,
    EmbeddingError,
    ModelNotReadyError,
    OverloadedError,
    TooLongError,
    TooShortError,
)
from .protocol import ModelInfo, Reply, Status
from .speech import speech_seconds

T = TypeVar("T")
Audios: TypeAlias = Iterable[Audio] | AsyncIterable[Audio]

Long: TypeAlias = Literal["error", "truncate", "windows"]
"""How to embed a clip above the model's limit; see `SpeakerClient.embed`."""

AWAY = ConnectError, ModelNotReadyError
FIRST_PAUSE = 0.1  # s, between two attempts
AWAY_PAUSE, BUSY_PAUSE = 0.5, 2.0  # s, the longest; a server that is away costs nothing to ask, a busy one work
SILENCE: Waveform = np.zeros(protocol.USUAL.min_samples, np.float32)
READ_AT_ONCE = 1 << 19  # samples of an array; copying them takes about a millisecond, a thread hardly less
FORKED = "this client was used before this process was forked off, where gRPC would hang: make one in each process"


class AsyncSpeakerClient(Options):
    """`SpeakerClient` for asyncio: the same options, methods, results and errors.

    Many tasks of one event loop may use a client at once. A cancelled task cancels its requests. Files are read and
    resampled in threads, so that the event loop stays responsive.

    ```python
    async with AsyncSpeakerClient() as client:
        print(await client.verify("anna.flac", "unknown.mp3"))
    ```
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._connection = Connection(self)
        self._info: ModelInfo | None = None  # of the latest reply
        self._process = 0  # the one that opened the connection
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> State:
        """Whether the client is new, open or closed."""
        if self._connection.closed:
            return State.CLOSED
        return State.OPEN if self._process else State.NEW

    async def __aenter__(self) -> AsyncSpeakerClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._close()

    async def close(self) -> None:
        """Same as `SpeakerClient.close`, awaited."""
        self._close()

    async def embed(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Embedding:
        """Same as `SpeakerClient.embed`, awaited."""
        return (await self.utterance(audio, sample_rate, long=long)).embedding

    async def utterance(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Utterance:
        """Same as `SpeakerClient.utterance`, awaited."""
        _check_long(long)
        self._open()
        if not isinstance(audio, PLAIN):  # once: a file object cannot be read again
            audio = await self._in_thread(functools.partial(audio_module.plain, audio))
        for _ in range(3):  # with a guess of the limits, those of the model, those of a model that replaced it
            info = self._info or protocol.USUAL
            clip = await self._read(audio, sample_rate, info.max_samples)
            if not len(clip.waveform):
                raise TooShortError(f"{clip.name}: holds no samples: pass a clip of a second or more")
            if self._info is None and (clip.cut or len(clip.waveform) < info.min_samples):
                await self._ask_info()  # a guess may limit reading, but must not reject a clip
                continue
            _check_length(clip, info, long)
            if clip.cut and long == "windows":
                async with self._one_long_clip:  # so that max_duration bounds memory
                    clip, replies = await self._windows(audio, sample_rate, info)
            else:
                replies = [await self._request(clip.name, clip.waveform)]
            one_model = len({reply.info for reply in replies}) == 1
            sent = min(len(clip.waveform), info.max_samples)
            info = replies[0].info
            if one_model and (sent <= info.max_samples or long == "truncate"):  # else a model with other limits replied
                embeddings = [reply.embedding for reply in replies]
                embedding = embeddings[0] if len(embeddings) == 1 else mean_direction(embeddings)
                seconds = min(clip.seconds, info.max_seconds) if long == "truncate" else clip.seconds
                speech = await asyncio.to_thread(speech_seconds, clip.waveform)
                return Utterance(embedding, seconds, info.id, info.threshold, speech, clip.name)
        raise ModelNotReadyError(f"model {self.model!r} at {self.url} keeps changing its limits: try again")

    @overload
    async def embed_many(
        self, audios: Audios, sample_rate: float | None = None, *, long: Long = "error"
    ) -> list[Embedding]: ...

    @overload
    async def embed_many(
        self, audios: Audios, sample_rate: float | None = None, *, long: Long = "error", return_exceptions: bool
    ) -> list[Embedding | EcapaError]: ...

    async def embed_many(
        self, audios: Audios, sample_rate: float | None = None, *, long: Long = "error", return_exceptions: bool = False
    ) -> Sequence[Embedding | EcapaError]:
        """Same as `SpeakerClient.embed_many`, awaited; `audios` may be an asynchronous generator."""
        outcomes = [outcome async for outcome in self.utterances(audios, sample_rate, long=long)]
        return embeddings(outcomes, return_exceptions)

    def utterances(
        self, audios: Audios, sample_rate: float | None = None, *, long: Long = "error"
    ) -> AsyncGenerator[Utterance | EcapaError, None]:
        """Same as `SpeakerClient.utterances`, for `async for`; `audios` may be an asynchronous generator.

        `aclose()` of the returned generator cancels the requests in flight.
        """
        check_many(audios, long)
        return self._utterances(audios, sample_rate, long)

    async def verify(
        self,
        a: Audio,
        b: Audio,
        threshold: float | None = None,
        *,
        sample_rate: float | None = None,
        long: Long = "error",
        min_speech: float = MIN_SPEECH,
    ) -> Verification:
        """Same as `SpeakerClient.verify`, awaited."""
        check_threshold(threshold)
        one, two = agreeing([outcome async for outcome in self.utterances([a, b], sample_rate, long=long)])
        check_speech(one, min_speech)
        check_speech(two, min_speech)
        return decide(score(one.embedding, two.embedding), threshold, two.threshold)

    async def status(self) -> Status:
        """Same as `SpeakerClient.status`, awaited."""
        self._open()

        async def ask(method: str, request: Any) -> Any:
            call = functools.partial(self._connection.call, method, request)
            return await self._retrying(call, ConnectError)  # a server that is reached is shown as it is

        model = {"name": self.model, "version": self.model_version}
        live = await ask("ServerLive", service_pb2.ServerLiveRequest())
        server = await ask("ServerMetadata", service_pb2.ServerMetadataRequest())
        ready = (await ask("ServerReady", service_pb2.ServerReadyRequest())).ready
        ready = ready and (await ask("ModelReady", service_pb2.ModelReadyRequest(**model))).ready
        versions: tuple[str, ...] = ()
        deployment, statistics, info = None, None, self._info
        try:
            versions = tuple((await ask("ModelMetadata", service_pb2.ModelMetadataRequest(**model))).versions)
            config = await ask("ModelConfig", service_pb2.ModelConfigRequest(**model))
            deployment = protocol.read_config(config.config)
            counters = await ask("ModelStatistics", service_pb2.ModelStatisticsRequest(**model))
            statistics = protocol.read_statistics(counters)
            silence = protocol.request(SILENCE, self.model, self.model_version)
            info = self._info = protocol.read_reply(await ask("ModelInfer", silence)).info
        except (ModelNotReadyError, OverloadedError):
            pass  # the rest of the status matters now more than ever
        return Status(self.url, server.version, live.live, ready, self.model, versions, deployment, info, statistics)

    def _open(self) -> None:
        """Use the running event loop, and connect if need be."""
        if self._process not in (0, os.getpid()):
            raise RuntimeError(FORKED)
        loop = asyncio.get_running_loop()
        if self._connection.closed or self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this client belongs to another event loop that is still open: make one for each")
        self._loop = loop
        self._closing: asyncio.Future[None] = loop.create_future()
        self._one_long_clip = asyncio.Lock()
        if not self._process:
            self._process = os.getpid()
            self._readers = ThreadPoolExecutor(self.max_in_flight, "ecapa-triton")
            self._connection.open()

    def _close(self) -> None:
        """Close the connection and end what is in flight, from any thread."""
        if self._process not in (0, os.getpid()):
            self._connection.closed = True
            return
        self._connection.close()
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop is closed, nothing waits in it
                self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._closing.cancel()
        self._readers.shutdown(wait=False)

    async def _utterances(
        self, audios: Audios, sample_rate: float | None, long: Long
    ) -> AsyncGenerator[Utterance | EcapaError, None]:
        gate = asyncio.Semaphore(self.max_in_flight)
        pending: deque[asyncio.Task[Utterance | EcapaError]] = deque()
        try:
            async for audio in _each(audios):
                if self._connection.closed:
                    raise ClosedError(CLOSED)
                while pending and (len(pending) == 2 * self.max_in_flight or pending[0].done()):
                    yield await pending.popleft()
                pending.append(asyncio.ensure_future(self._outcome(audio, sample_rate, long, gate)))
            while pending:
                yield await pending.popleft()
        finally:
            await _cancel(pending)

    async def _outcome(
        self, audio: Audio, sample_rate: float | None, long: Long, gate: asyncio.Semaphore
    ) -> Utterance | EcapaError:
        """Embed one clip of several, once the gate lets it pass; an error is returned."""
        try:
            async with gate:
                return await self.utterance(audio, sample_rate, long=long)
        except EcapaError as exc:
            return _without_frames(exc)

    async def _windows(self, audio: Audio, sample_rate: float | None, info: ModelInfo) -> tuple[Clip, list[Reply]]:
        """Read all of a clip and send the windows that cover it; the first error cancels the others."""
        clip = await self._read(audio, sample_rate, round(self.max_duration * SAMPLE_RATE))
        if clip.cut:
            raise TooLongError(
                f"{clip.name}: longer than the {self.max_duration:g} s that this client reads "
                "(max_duration of SpeakerClient): cut the recording"
            )
        gate = asyncio.Semaphore(self.max_in_flight)

        async def request(place: slice) -> Reply:
            async with gate:
                return await self._request(clip.name, clip.waveform[place])

        places = audio_module.windows(len(clip.waveform), info.max_samples)
        requests = [asyncio.ensure_future(request(place)) for place in places]
        try:
            return clip, await asyncio.gather(*requests)
        finally:
            await _cancel(requests)

    async def _ask_info(self) -> ModelInfo:
        """The model's constants; each reply has them, even one without an embedding."""
        with suppress(EmbeddingError, TooShortError):
            await self._request("a clip of silence", SILENCE)
        assert self._info is not None
        return self._info

    async def _request(self, name: str, waveform: Waveform) -> Reply:
        """Send one clip; NaN is retried too."""
        message = protocol.request(waveform, self.model, self.model_version)
        times = itertools.count(1)

        async def send(seconds: float | None) -> Reply:
            reply = protocol.read_reply(await self._connection.call("ModelInfer", message, seconds))
            self._info = reply.info
            if reply.finite:
                return reply
            if len(waveform) < reply.info.min_samples:
                raise _too_short(name, len(waveform), reply.info)
            seconds_of_audio = f"{len(waveform) / SAMPLE_RATE:.2f} s of valid audio"
            raise EmbeddingError(
                f"{name}: the model answered NaN {counted(next(times), 'time')} for {seconds_of_audio}: "
                "try again, then check the model with `python -m export verify`"
            )

        return await self._retrying(send)

    async def _retrying(self, send: Callable[[float | None], Awaitable[T]], kind: type[EcapaError] = EcapaError) -> T:
        """The result of `send(seconds left)`; transient failures of this kind are retried until the timeout."""
        end = math.inf if self.timeout is None else time.monotonic() + self.timeout
        before = ""
        for attempt in itertools.count():
            try:
                return await send(None if self.timeout is None else end - time.monotonic())
            except EcapaError as exc:
                if isinstance(exc, DeadlineError) and before:
                    raise DeadlineError(f"{exc}; before that: {before}") from exc
                before = str(exc)  # not the error: its frames hold the clip
                seconds = pause(attempt, AWAY_PAUSE if isinstance(exc, AWAY) else BUSY_PAUSE)
                retried = exc.transient and isinstance(exc, kind) and attempt != self.retries
                if not retried or time.monotonic() + seconds >= end:
                    raise
            await self._unless_closed(asyncio.ensure_future(asyncio.sleep(seconds)))
        raise AssertionError("an attempt returns, raises or is followed by another")

    async def _read(self, audio: Audio, sample_rate: float | None, max_samples: int) -> Clip:
        """Read a clip, in a thread unless that takes longer than the reading."""
        read = functools.partial(audio_module.read, audio, sample_rate, max_samples=max_samples)
        if isinstance(audio, np.ndarray) and audio.size <= READ_AT_ONCE and sample_rate in (None, SAMPLE_RATE):
            return read()
        return await self._in_thread(read)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._connection.closed:
            raise ClosedError(CLOSED)
        return await self._unless_closed(asyncio.get_running_loop().run_in_executor(self._readers, work))

    async def _unless_closed(self, future: asyncio.Future[T]) -> T:
        """The result of a future, or `ClosedError` as soon as the client is closed."""
        either: set[asyncio.Future[Any]] = {future, self._closing}
        try:
            done, _ = await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            future.cancel()  # without effect where it is done
        if future not in done:
            raise ClosedError(CLOSED)
        return future.result()


async def _each(audios: Audios) -> AsyncIterator[Audio]:
    if isinstance(audios, AsyncIterable):
        async for audio in audios:
            yield audio
    else:
        for audio in audios:
            yield audio
            await asyncio.sleep(0)  # so that requests start and end while a slow iterator is drawn


def check_many(audios: object, long: Long) -> None:
    """Reject a single clip in place of a list, and an unknown `long`."""
    single = isinstance(audios, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(audios, "read")
    if single or (hasattr(audios, "__dlpack__") and getattr(audios, "ndim", 2) < 2):  # an array or a tensor
        raise TypeError(f"audios is a single {type(audios).__name__}: expected a list of clips")
    _check_long(long)


def _check_long(long: Long) -> None:
    """Reject an unknown `long`."""
    if long not in get_args(Long):
        raise ValueError(f"long is {long!r}: expected one of {', '.join(get_args(Long))}")


def pause(attempt: int, longest: float) -> float:
    """Seconds to wait after attempt 0, 1, ...: they double up to `longest`, and each is shortened by up to half."""
    return min(longest, FIRST_PAUSE * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1)


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel the tasks that are not done, and wait for their end."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _without_frames(error: EcapaError) -> EcapaError:
    """The error without its frames, which would keep the whole clip in memory."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _check_length(clip: Clip, info: ModelInfo, long: Long) -> None:
    if len(clip.waveform) < info.min_samples:
        raise _too_short(clip.name, len(clip.waveform), info)
    if clip.cut and long == "error":
        known = clip.source_seconds > info.max_seconds
        length = f"{clip.source_seconds:g} s long" if known else "longer than its header says"
        raise TooLongError(
            f"{clip.name}: {length}, the model takes up to {info.max_seconds:g} s: "
            "choose truncate (the first of it) or windows (the mean over all of it) for long"
        )


def _too_short(name: str, samples: int, info: ModelInfo) -> TooShortError:
    return TooShortError(
        f"{name}: {samples / SAMPLE_RATE * 1000:.1f} ms long, "
        f"expected {info.min_samples / SAMPLE_RATE * 1000:g} ms or more: pass a clip of a second or more"
    )
