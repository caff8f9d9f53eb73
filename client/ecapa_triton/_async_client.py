"""The asynchronous client: the same steps as the synchronous one's, awaited."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from . import audio as audio_module
from . import protocol
from ._connection import CLOSED, State
from ._flow import (
    Alone,
    Ask,
    BaseClient,
    Embedding,
    Long,
    Read,
    Send,
    Status,
    Step,
    Steps,
    Together,
    Wait,
    check_long,
    check_many,
    embeddings,
    without_frames,
)
from ._scoring import Utterance, Verification, check_threshold
from .audio import Audio
from .errors import ClosedError, EcapaError
from .protocol import Reply

T = TypeVar("T")


class AsyncSpeakerClient(BaseClient):
    """`SpeakerClient` for asyncio: the same options, methods, results and errors.

    Many tasks of one event loop may use a client at once. A task that is cancelled cancels its requests. Files are read
    and resampled in threads, so that the loop goes on meanwhile.

    ```python
    async with AsyncSpeakerClient() as client:
        print(await client.verify("anna.flac", "unknown.mp3"))
    ```

    Args:
        url: As for `SpeakerClient`, and so are all others.
        model: Name of the model.
        timeout: Seconds that one request may take, all its attempts included; None waits for ever.
        model_version: Version of the model; empty: the server chooses.
        retries: How often a request is sent again that failed for a reason that may pass.
        max_in_flight: Requests that one call of `embed_many`, `utterances`, or of `embed` in windows, keeps under way.
        max_duration: Seconds of audio that `long="windows"` reads at most.
        tls: How the connection is encrypted; None: in the clear.
        api_key: What the server asks of its clients, where it does.
        metadata: Further gRPC metadata to send with every request.
    """

    def _set_up(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # that the connection belongs to
        self._alone, self._ended = asyncio.Lock(), asyncio.Event()
        self._closed = False

    async def __aenter__(self) -> AsyncSpeakerClient:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def state(self) -> State:
        """Whether the client is new, has a connection, or was closed."""
        return self._state(self._closed)

    async def close(self) -> None:
        """Close the connection; requests under way end in `ClosedError`. Closing twice does no harm.

        To be awaited in the event loop that the client was used in.
        """
        triton, closed = self._triton, self._closed
        self._closed = True
        self._ended.set()
        if triton is not None and not closed and self._loop is asyncio.get_running_loop():
            await triton.close()

    async def embed(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Embedding:
        """Embed one clip, as `SpeakerClient.embed`.

        Args:
            audio: A path, the bytes of an audio file, or an array `[samples]` or `[samples, channels]`.
            sample_rate: Hz of an array (None: 16000).
            long: What to do with a clip above the model's limit: `"error"`, `"truncate"`, `"windows"`.

        Returns:
            The embedding, float32 `[192]`; not of unit length.

        Raises:
            AudioError: The clip cannot be embedded.
            ServerError: The server could not be asked.
            EmbeddingError: The model has no embedding for the clip, asked several times.
        """
        return (await self.utterance(audio, sample_rate, long=long)).embedding

    async def utterance(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Utterance:
        """Embed one clip, and tell how long it is and whose the embedding is; as `embed`."""
        check_long(long)
        return await self._perform(self._flow.utterance(audio, sample_rate, long))

    @overload
    async def embed_many(
        self,
        audios: Iterable[Audio] | AsyncIterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
        return_exceptions: Literal[False] = False,
    ) -> list[Embedding]: ...

    @overload
    async def embed_many(
        self,
        audios: Iterable[Audio] | AsyncIterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
        return_exceptions: bool,
    ) -> list[Embedding | EcapaError]: ...

    async def embed_many(
        self,
        audios: Iterable[Audio] | AsyncIterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
        return_exceptions: bool = False,
    ) -> Sequence[Embedding | EcapaError]:
        """Embed clips of any lengths, many under way at once, as `SpeakerClient.embed_many`.

        Args:
            audios: Clips as `embed` takes them; an asynchronous generator may bring them, too.
            sample_rate: Hz of the arrays among them (None: 16000).
            long: As for `embed`.
            return_exceptions: Put a clip's error in its place instead of raising.

        Returns:
            Embeddings, float32 `[192]` each, in the order of `audios`.

        Raises:
            EcapaError: The first error in the list, once all clips are done (not with `return_exceptions`).
            ModelMismatchError: The model was replaced meanwhile.
        """
        outcomes = [outcome async for outcome in self.utterances(audios, sample_rate, long=long)]
        return embeddings(outcomes, return_exceptions)

    def utterances(
        self,
        audios: Iterable[Audio] | AsyncIterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
    ) -> AsyncGenerator[Utterance | EcapaError, None]:
        """Embed clips as `embed_many`, and yield the outcomes in order: each once the next clip is drawn.

        Memory does not grow with their number. Closing the iterator cancels what is under way.

        Yields:
            An utterance, or the error of its clip in its place.
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
    ) -> Verification:
        """Tell whether two clips are of one speaker, as `SpeakerClient.verify`.

        Args:
            a: A clip as `embed` takes it.
            b: Another.
            threshold: Cosine above which they are one speaker; None takes the model's own.
            sample_rate: Hz of arrays (None: 16000).
            long: As for `embed`.

        Raises:
            ThresholdError: No threshold is given and the model has none, or it is no cosine.
            EcapaError: As for `embed`.
        """
        check_threshold(threshold)
        one, two = [outcome async for outcome in self.utterances([a, b], sample_rate, long=long)]
        return self._flow.verification(one, two, threshold)

    async def status(self) -> Status:
        """Ask the server for its version and readiness, and for the model's constants and statistics.

        Raises:
            ServerError: The server is away, or has no such model.
        """
        return await self._perform(self._flow.status())

    async def _utterances(
        self, audios: Iterable[Audio] | AsyncIterable[Audio], sample_rate: float | None, long: Long
    ) -> AsyncGenerator[Utterance | EcapaError, None]:
        in_flight = self._connection.max_in_flight
        gate = asyncio.Semaphore(in_flight)
        pending: deque[asyncio.Task[Utterance | EcapaError]] = deque()

        async def outcome(audio: Audio) -> Utterance | EcapaError:
            async with gate:
                try:
                    return await self._perform(self._flow.utterance(audio, sample_rate, long))
                except EcapaError as exc:
                    return exc

        try:
            async for audio in _each(audios):
                if self._closed:
                    raise ClosedError(CLOSED)
                while pending and (len(pending) == 2 * in_flight or pending[0].done()):
                    yield without_frames(await pending.popleft())
                pending.append(asyncio.ensure_future(outcome(audio)))
            while pending:
                yield without_frames(await pending.popleft())
        finally:
            await _cancel(pending)

    # --- performing steps ---

    async def _perform(self, steps: Steps[T]) -> T:
        self._bind()
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._do(step)
                except EcapaError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _do(self, step: Step) -> Any:
        if self._closed:
            raise ClosedError(CLOSED)
        match step:
            case Read(audio, sample_rate, max_samples):
                return await asyncio.to_thread(audio_module.read, audio, sample_rate, max_samples=max_samples)
            case Send(waveform, timeout):
                result = await self._call(
                    "infer",
                    self._connection.model,
                    model_version=self._connection.model_version,
                    client_timeout=timeout,
                    **protocol.request(waveform),
                )
                return protocol.read_reply(result)
            case Ask(method, arguments):
                return await self._call(method, *arguments, client_timeout=self._connection.timeout)
            case Wait(seconds):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), seconds)
                    raise ClosedError(CLOSED)
            case Together(parts):
                return await self._together(parts)
            case Alone(inner):
                async with self._alone:
                    return await self._perform(inner)

    async def _together(self, parts: Sequence[Steps[Reply]]) -> list[Reply]:
        gate = asyncio.Semaphore(self._connection.max_in_flight)

        async def one(part: Steps[Reply]) -> Reply:
            async with gate:
                return await self._perform(part)

        tasks = [asyncio.ensure_future(one(part)) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        triton = self._open(InferenceServerClient)
        try:
            return await getattr(triton, method)(*args, headers=self._headers, **kwargs)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            cancelled = task is not None and sys.version_info >= (3, 11) and task.cancelling()
            if self._closed and not cancelled:  # closing a connection cancels what is under way on it
                raise ClosedError(CLOSED) from None
            raise
        except InferenceServerException as exc:
            if self._closed:
                raise ClosedError(CLOSED) from exc
            raise self._flow.error(exc) from exc

    def _bind(self) -> None:
        """Belong to the running event loop: connection, lock and event are of one."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this client belongs to another event loop that is still open: make one for each")
        self._loop, self._triton = loop, None
        self._alone, self._ended = asyncio.Lock(), asyncio.Event()


async def _each(audios: Iterable[Audio] | AsyncIterable[Audio]) -> AsyncIterator[Audio]:
    if isinstance(audios, AsyncIterable):
        async for audio in audios:
            yield audio
    else:
        for audio in audios:
            yield audio


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
