"""The blocking client: `AsyncSpeakerClient`, run on an event loop in a thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone  # of its own until Python 3.10
from contextlib import suppress
from typing import Any, TypeVar, overload

from ._async_client import AsyncSpeakerClient, Long, check_many
from ._connection import CLOSED, Options, State
from ._scoring import MIN_SPEECH, Embedding, Utterance, Verification, embeddings
from .audio import Audio
from .errors import ClosedError, EcapaError
from .protocol import Status

T = TypeVar("T")


class SpeakerClient(Options):
    """Speaker embeddings from an ecapa model on a Triton server.

    Many threads may use one client at once, with or without an event loop of their own. It connects when first used,
    and reconnects after a lost connection. A process that is forked off needs a client of its own, made there; prefer
    the start method "spawn".

    ```python
    with SpeakerClient() as client:
        print(client.verify("anna.flac", "unknown.mp3"))
    ```

    Args:
        url: `HOST:PORT` of Triton's gRPC endpoint, with or without `grpc://`; `grpcs://` stands for `tls=Tls()`.
            Requests take turns over the servers of `dns:///NAME:PORT` or of a list `ipv4:HOST:PORT,HOST:PORT`.
        model: Name of the model.
        timeout: Seconds that one request may take, from sending to reply, retries and the pauses between them
            included; up to 1e6; None waits for ever.
        model_version: Version of the model; empty: the server chooses.
        retries: Most retries of a request after a transient failure: no connection, an overloaded server, a model
            that is not ready, NaN because of another client's clip in the batch. None: until the timeout. The pauses
            between attempts are 0.1, 0.2, 0.4 ... s, each shortened at random by up to half: at most 0.5 s while the
            server or its model is away, 2 s while it is busy.
        max_in_flight: Requests that one call of `embed_many`, `utterances`, or of `embed` in windows, keeps in flight,
            and files that are read at once. A CPU answers 8 long clips within the default timeout; a GPU serves 32
            and more.
        max_duration: Longest recording in seconds that `long="windows"` reads, up to 86400; longer is an error.
            An hour takes 230 MB, twice that while it is read; such clips are read one at a time.
        tls: How the connection is encrypted; None: not at all.
        api_key: Key for the server, where it requires one.
        metadata: Further gRPC metadata of every request: names in small letters, values in ASCII.
    """

    def __post_init__(self) -> None:
        self._async = AsyncSpeakerClient(**vars(self))

    @property
    def state(self) -> State:
        """Whether the client is new, open or closed."""
        return self._async.state

    def __enter__(self) -> SpeakerClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; requests in flight raise `ClosedError`. Closing twice does no harm."""
        self._async._close()

    def embed(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Embedding:
        """Embed one clip.

        Args:
            audio: A path, the bytes of an audio file (WAV, FLAC, OGG, MP3), a binary file object, which is read whole
                from where it stands, or samples: float in [-1, 1] or int16, `[samples]`, `[samples, channels]`, or
                `[1, samples]` as torchaudio has them, in a NumPy array or in whatever becomes one by `__array__` or
                `__dlpack__`: a torch tensor in the CPU's memory, without a gradient.
                Any rate is resampled to 16 kHz, channels are averaged.
            sample_rate: Hz of an array (None: 16000). Files carry their own.
            long: How to embed a clip above the model's limit, `max_seconds` (usually 30):
                `"error"` raises `TooLongError`;
                `"truncate"` embeds the first `max_seconds`;
                `"windows"` embeds the fewest windows of `max_seconds` that cover the clip, evenly spaced,
                and averages their embeddings, each scaled to length 1.

        Returns:
            The embedding, float32 `[192]`, not of unit length.

        Raises:
            AudioError: The clip cannot be embedded.
            ServerError: The server was not reached, rejected the request or gave no valid reply.
            EmbeddingError: The model answered NaN at every attempt.
        """
        return self.utterance(audio, sample_rate, long=long).embedding

    def utterance(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Utterance:
        """Embed one clip, as `embed`; returns the embedding with its duration, speech, model identity and threshold."""
        return _run(self._async.utterance(audio, sample_rate, long=long))

    @overload
    def embed_many(
        self, audios: Iterable[Audio], sample_rate: float | None = None, *, long: Long = "error"
    ) -> list[Embedding]: ...

    @overload
    def embed_many(
        self,
        audios: Iterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
        return_exceptions: bool,
    ) -> list[Embedding | EcapaError]: ...

    def embed_many(
        self,
        audios: Iterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
        return_exceptions: bool = False,
    ) -> Sequence[Embedding | EcapaError]:
        """Embed clips of any lengths, many of them in flight at once, so that the server can batch them.

        Files are read and resampled while other clips are in flight. `audios` may be a generator:
        no more than twice `max_in_flight` of its items are held at a time.

        Args:
            audios: Clips as `embed` takes them, of mixed types.
            sample_rate: Hz of the arrays among them (None: 16000).
            long: As for `embed`.
            return_exceptions: Put a clip's error in its place instead of raising, as in `asyncio.gather`.

        Returns:
            Embeddings, float32 `[192]` each, in the order of `audios`.

        Raises:
            EcapaError: The first error in the list, once all clips are done (not with `return_exceptions`).
            ModelMismatchError: The model was replaced between two clips.
        """
        return embeddings(list(self.utterances(audios, sample_rate, long=long)), return_exceptions)

    def utterances(
        self, audios: Iterable[Audio], sample_rate: float | None = None, *, long: Long = "error"
    ) -> Generator[Utterance | EcapaError, None, None]:
        """Embed clips as `embed_many`, and yield the outcomes in order: each once the next clip is drawn.

        The arguments are those of `embed_many`. Memory does not grow with the number of clips. Leaving the iteration
        early cancels the requests in flight.

        Yields:
            An utterance, or the error of its clip in its place.
        """
        check_many(audios, long)
        return self._utterances(audios, sample_rate, long)

    def verify(
        self,
        a: Audio,
        b: Audio,
        threshold: float | None = None,
        *,
        sample_rate: float | None = None,
        long: Long = "error",
        min_speech: float = MIN_SPEECH,
    ) -> Verification:
        """Decide whether two clips are of one speaker.

        Args:
            a: A clip as `embed` takes it.
            b: Another.
            threshold: Cosine above which they are one speaker; None takes the model's own.
            sample_rate: Hz of arrays (None: 16000).
            long: As for `embed`.
            min_speech: Seconds of speech that each clip must have; 0: no check.

        Raises:
            ThresholdError: No threshold is given and the model has none, or it is not a cosine.
            TooLittleSpeechError: A clip has less speech than `min_speech`.
            EcapaError: As for `embed`.
        """
        return _run(self._async.verify(a, b, threshold, sample_rate=sample_rate, long=long, min_speech=min_speech))

    def status(self) -> Status:
        """Ask the server for its version and readiness, and for the model's constants and statistics.

        The constants are part of a reply: a short clip of silence is embedded, after the statistics are read. A server
        that is not reached is retried; one that is busy, or whose model is not ready, is shown as it is.

        Raises:
            ServerError: The server is not reached, or has no such model.
        """
        return _run(self._async.status())

    def _utterances(
        self, audios: Iterable[Audio], sample_rate: float | None, long: Long
    ) -> Generator[Utterance | EcapaError, None, None]:
        # As in AsyncSpeakerClient, but the clips are drawn in the caller's thread, and may take their time.
        gate = asyncio.Semaphore(self.max_in_flight)
        pending: deque[Future[Utterance | EcapaError]] = deque()
        try:
            for audio in audios:
                if self.state is State.CLOSED:
                    raise ClosedError(CLOSED)
                while pending and (len(pending) == 2 * self.max_in_flight or pending[0].done()):
                    yield _result(pending[0])
                    pending.popleft()
                pending.append(_start(self._async._outcome(audio, sample_rate, long, gate)))
            while pending:
                yield _result(pending[0])
                pending.popleft()
        finally:
            for future in reversed(pending):  # else the gate would let a later one pass before it is cancelled
                future.cancel()


_loops: dict[int, asyncio.AbstractEventLoop] = {}


def _run(work: Coroutine[Any, Any, T]) -> T:
    future = _start(work)
    try:
        return _result(future)
    finally:
        future.cancel()  # without effect where it is done


def _start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the event loop that all blocking clients of this process share."""
    process = os.getpid()  # a loop does not survive a fork
    if process not in _loops:
        loop = asyncio.new_event_loop()
        if _loops.setdefault(process, loop) is loop:
            threading.Thread(target=loop.run_forever, name="ecapa-triton", daemon=True).start()
        else:  # another thread has just made one
            loop.close()
    return asyncio.run_coroutine_threadsafe(work, _loops[process])


def _result(future: Future[T]) -> T:
    """Wait for a coroutine in a way that Ctrl-C interrupts."""
    while not future.done():
        with suppress(NotDone):
            future.exception(timeout=0.5)  # s; a signal just before a wait is handled only after it
    return future.result()
