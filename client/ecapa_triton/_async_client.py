"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import TypeAlias, overload

from ._base import BaseClient, Embedding, Long, Status, cancel, check_many, embeddings
from ._connection import CLOSED
from ._scoring import Utterance, Verification
from .audio import Audio
from .errors import ClosedError, EcapaError

Audios: TypeAlias = Iterable[Audio] | AsyncIterable[Audio]


class AsyncSpeakerClient(BaseClient):
    """`SpeakerClient` for asyncio: the same options, methods, results and errors.

    Many tasks of one event loop may use a client at once. A cancelled task cancels its requests. Files are read and
    resampled in threads, so that the event loop stays responsive.

    ```python
    async with AsyncSpeakerClient() as client:
        print(await client.verify("anna.flac", "unknown.mp3"))
    ```
    """

    async def __aenter__(self) -> AsyncSpeakerClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Same as `SpeakerClient.close`, awaited."""
        self._close()

    async def embed(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Embedding:
        """Same as `SpeakerClient.embed`, awaited."""
        return (await self._utterance(audio, sample_rate, long)).embedding

    async def utterance(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Utterance:
        """Same as `SpeakerClient.utterance`, awaited."""
        return await self._utterance(audio, sample_rate, long)

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
    ) -> Verification:
        """Same as `SpeakerClient.verify`, awaited."""
        return await self._verification(a, b, threshold, sample_rate, long)

    async def status(self) -> Status:
        """Same as `SpeakerClient.status`, awaited."""
        return await self._status()

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
            await cancel(pending)


async def _each(audios: Audios) -> AsyncIterator[Audio]:
    if isinstance(audios, AsyncIterable):
        async for audio in audios:
            yield audio
    else:
        for audio in audios:
            yield audio
            await asyncio.sleep(0)  # so that requests start and end while a slow iterator is drawn
