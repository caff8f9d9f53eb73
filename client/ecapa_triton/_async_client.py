"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Literal, TypeVar, overload

from ._base import BaseClient, Embedding, Long, Status, cancel, check_many, embeddings
from ._connection import CLOSED
from ._scoring import Utterance, Verification
from .audio import Audio
from .errors import ClosedError, EcapaError

T = TypeVar("T")


class AsyncSpeakerClient(BaseClient):
    """`SpeakerClient` for asyncio: the same options, methods, results and errors.

    Many tasks of one event loop may use a client at once. A cancelled task cancels its requests. Files are read and
    resampled in threads, so that the event loop stays responsive.

    ```python
    async with AsyncSpeakerClient() as client:
        print(await client.verify("anna.flac", "unknown.mp3"))
    ```

    Args:
        url: As for `SpeakerClient`, and so are all others.
        model: Name of the model.
        timeout: Seconds that one request may take, retries included; None waits for ever.
        model_version: Version of the model; empty: the server chooses.
        retries: Most retries of a request.
        max_in_flight: Requests that one call of `embed_many`, `utterances`, or of `embed` in windows, keeps in flight.
        max_duration: Longest recording in seconds that `long="windows"` reads.
        tls: How the connection is encrypted; None: not at all.
        api_key: Key for the server, where it requires one.
        metadata: Further gRPC metadata of every request.
    """

    async def __aenter__(self) -> AsyncSpeakerClient:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; requests in flight raise `ClosedError`. Closing twice does no harm."""
        self._close()

    async def embed(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Embedding:
        """Embed one clip, as `SpeakerClient.embed`; float32 `[192]`."""
        return (await self._utterance(audio, sample_rate, long)).embedding

    async def utterance(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Utterance:
        """Embed one clip, as `SpeakerClient.utterance`."""
        return await self._utterance(audio, sample_rate, long)

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
        """Embed many clips, as `SpeakerClient.embed_many`; `audios` may be an asynchronous generator."""
        outcomes = [outcome async for outcome in self.utterances(audios, sample_rate, long=long)]
        return embeddings(outcomes, return_exceptions)

    def utterances(
        self,
        audios: Iterable[Audio] | AsyncIterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
    ) -> AsyncGenerator[Utterance | EcapaError, None]:
        """Embed many clips, as `SpeakerClient.utterances`; `audios` may be an asynchronous generator.

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
    ) -> Verification:
        """Decide whether two clips are of one speaker, as `SpeakerClient.verify`."""
        return await self._verification(a, b, threshold, sample_rate, long)

    async def status(self) -> Status:
        """Ask for the state of server and model, as `SpeakerClient.status`."""
        return await self._status()

    async def _utterances(
        self, audios: Iterable[Audio] | AsyncIterable[Audio], sample_rate: float | None, long: Long
    ) -> AsyncGenerator[Utterance | EcapaError, None]:
        in_flight = self._options.max_in_flight
        gate = asyncio.Semaphore(in_flight)
        pending: deque[asyncio.Task[Utterance | EcapaError]] = deque()
        try:
            async for audio in _each(audios):
                if self._connection.closed:
                    raise ClosedError(CLOSED)
                while pending and (len(pending) == 2 * in_flight or pending[0].done()):
                    yield await pending.popleft()
                pending.append(asyncio.ensure_future(self._outcome(audio, sample_rate, long, gate)))
            while pending:
                yield await pending.popleft()
        finally:
            await cancel(pending)


async def _each(audios: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(audios, AsyncIterable):
        async for audio in audios:
            yield audio
    else:
        for audio in audios:
            yield audio
            await asyncio.sleep(0)  # so that requests start and end while a slow iterator is drawn
