"""The synchronous client."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, overload

from tritonclient.grpc import InferenceServerClient, InferResult
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
from .audio import Audio, Waveform
from .errors import ClosedError, EcapaError
from .protocol import Reply

T = TypeVar("T")


class SpeakerClient(BaseClient):
    """Speaker embeddings from an ecapa model on a Triton server.

    Many threads may use one client at once. It connects when first used, and again after a lost connection. Processes
    that are forked off need a client of their own, made there; start them by "spawn" where you can.

    ```python
    with SpeakerClient() as client:
        print(client.verify("anna.flac", "unknown.mp3"))
    ```

    Args:
        url: `HOST:PORT` of Triton's gRPC endpoint, with or without `grpc://`; `grpcs://` is `tls=Tls()`.
            `dns:///NAME:PORT` or a list `ipv4:HOST:PORT,HOST:PORT`: the servers behind it take turns.
        model: Name of the model.
        timeout: Seconds that one request may take, from sending to reply, all its attempts and the waits between them
            included; up to 1e6; None waits for ever.
        model_version: Version of the model; empty: the server chooses.
        retries: How often a request is sent again that failed for a reason that may pass: no connection, an
            overloaded server, a model that is not ready, NaN by another client's clip in the batch. The waits
            between are 0.1, 0.2, 0.4 ... s, at most 2, each shortened at random by up to half. A server that was
            never reached is tried again 4 times at most.
        max_in_flight: Requests that one call of `embed_many`, `utterances`, or of `embed` in windows, keeps under way.
            A CPU answers 8 long clips within the default timeout; a GPU has use for 32 and more.
        max_duration: Seconds of audio that `long="windows"` reads at most, up to 86400; longer is an error.
            An hour takes 230 MB, twice that while it is read; such clips are read one at a time.
        tls: How the connection is encrypted; None: in the clear.
        api_key: What the server asks of its clients, where it does.
        metadata: Further gRPC metadata to send with every request: names in small letters, values in ASCII.
    """

    def _set_up(self) -> None:
        self._opening = threading.Lock()
        self._sending = threading.Lock()
        self._alone = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> SpeakerClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def state(self) -> State:
        """Whether the client is new, has a connection, or was closed."""
        return self._state(self._closed.is_set())

    def close(self) -> None:
        """Close the connection; requests under way end in `ClosedError`. Closing twice does no harm."""
        self._closed.set()
        with self._opening:
            if self._triton is not None:
                self._triton.close()

    def embed(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Embedding:
        """Embed one clip.

        Args:
            audio: A path, the bytes of an audio file (WAV, FLAC, OGG, MP3), or an array: float in [-1, 1] or
                int16, `[samples]` or `[samples, channels]`.
                Any rate is resampled to 16 kHz, channels are averaged.
            sample_rate: Hz of an array (None: 16000). Files carry their own.
            long: What to do with a clip above the model's limit, `max_seconds` (usually 30):
                `"error"` raises `TooLongError`;
                `"truncate"` embeds the first `max_seconds`;
                `"windows"` embeds the fewest windows of `max_seconds` that cover the clip, evenly spaced,
                and averages their embeddings, each at length 1.

        Returns:
            The embedding, float32 `[192]`; not of unit length.

        Raises:
            AudioError: The clip cannot be embedded.
            ServerError: The server could not be asked.
            EmbeddingError: The model has no embedding for the clip, asked several times.
        """
        return self.utterance(audio, sample_rate, long=long).embedding

    def utterance(self, audio: Audio, sample_rate: float | None = None, *, long: Long = "error") -> Utterance:
        """Embed one clip, and tell how long it is and whose the embedding is; as `embed`."""
        check_long(long)
        with _Work(self._closed) as work:
            return self._perform(self._flow.utterance(audio, sample_rate, long), work)

    @overload
    def embed_many(
        self,
        audios: Iterable[Audio],
        sample_rate: float | None = None,
        *,
        long: Long = "error",
        return_exceptions: Literal[False] = False,
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
        """Embed clips of any lengths, many under way at once, so that the server can batch them.

        Files are read and resampled while other clips are with the server. `audios` may be a generator:
        no more than twice `max_in_flight` of its items are held at a time.

        Args:
            audios: Clips as `embed` takes them, mixed as you like.
            sample_rate: Hz of the arrays among them (None: 16000).
            long: As for `embed`.
            return_exceptions: Put a clip's error in its place instead of raising, as in `asyncio.gather`.

        Returns:
            Embeddings, float32 `[192]` each, in the order of `audios`.

        Raises:
            EcapaError: The first error in the list, once all clips are done (not with `return_exceptions`).
            ModelMismatchError: The model was replaced meanwhile.
        """
        outcomes = list(self.utterances(audios, sample_rate, long=long))
        return embeddings(outcomes, return_exceptions)

    def utterances(
        self, audios: Iterable[Audio], sample_rate: float | None = None, *, long: Long = "error"
    ) -> Generator[Utterance | EcapaError, None, None]:
        """Embed clips as `embed_many`, and yield the outcomes in order: each once the next clip is drawn.

        Memory does not grow with their number. Leaving the iteration early cancels what is under way.

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
    ) -> Verification:
        """Tell whether two clips are of one speaker.

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
        one, two = self.utterances([a, b], sample_rate, long=long)
        return self._flow.verification(one, two, threshold)

    def status(self) -> Status:
        """Ask the server for its version and readiness, and for the model's constants and statistics.

        The constants come with a reply: one short clip of silence is embedded, once the statistics are read.

        Raises:
            ServerError: The server is away, or has no such model.
        """
        with _Work(self._closed) as work:
            return self._perform(self._flow.status(), work)

    def _utterances(
        self, audios: Iterable[Audio], sample_rate: float | None, long: Long
    ) -> Generator[Utterance | EcapaError, None, None]:
        def outcome(audio: Audio) -> Utterance | EcapaError:
            try:
                return self._perform(self._flow.utterance(audio, sample_rate, long), work)
            except EcapaError as exc:
                return exc

        in_flight = self._connection.max_in_flight
        pool = ThreadPoolExecutor(in_flight, thread_name_prefix="ecapa-triton")
        pending: deque[Future[Utterance | EcapaError]] = deque()
        with _Work(self._closed) as work:
            try:
                for audio in audios:
                    if self._closed.is_set():
                        raise ClosedError(CLOSED)
                    while pending and (len(pending) == 2 * in_flight or pending[0].done()):
                        yield without_frames(_result(pending.popleft()))
                    pending.append(pool.submit(outcome, audio))
                while pending:
                    yield without_frames(_result(pending.popleft()))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    # --- performing steps ---

    def _perform(self, steps: Steps[T], work: _Work) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._do(step, work)
                except EcapaError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _do(self, step: Step, work: _Work) -> Any:
        work.check()
        match step:
            case Read(audio, sample_rate, max_samples):
                return audio_module.read(audio, sample_rate, max_samples=max_samples)
            case Send(waveform, timeout):
                return self._send(waveform, timeout, work)
            case Ask(method, arguments):
                with self._errors():
                    return getattr(self._connected(), method)(
                        *arguments, client_timeout=self._connection.timeout, headers=self._headers
                    )
            case Wait(seconds):
                work.wait(seconds)
            case Together(parts):
                return self._together(parts, work)
            case Alone(inner):
                with self._alone:
                    return self._perform(inner, work)

    def _together(self, parts: Sequence[Steps[Reply]], work: _Work) -> list[Reply]:
        with (
            ThreadPoolExecutor(min(len(parts), self._connection.max_in_flight)) as pool,
            work.begun(_Work(self._closed)) as own,  # the first error cancels the rest of these, and nothing else
            own,
        ):
            return list(pool.map(lambda part: self._perform(part, own), parts))

    def _send(self, waveform: Waveform, timeout: float | None, work: _Work) -> Reply:
        future: Future[tuple[InferResult, InferenceServerException | None]] = Future()

        def done(result: InferResult, error: InferenceServerException | None) -> None:
            future.set_result((result, error))

        arguments = protocol.request(waveform)
        # async_infer keeps the call in an attribute for a moment: two threads in it would swap replies.
        with self._errors(), self._sending:
            call = self._connected().async_infer(
                self._connection.model,
                model_version=self._connection.model_version,
                client_timeout=timeout,
                headers=self._headers,
                callback=done,
                **arguments,
            )
        with work.begun(call):
            result, error = _result(future)
        with self._errors():
            if error is not None:
                raise error
        return protocol.read_reply(result)

    def _connected(self) -> Any:
        with self._opening:
            if self._closed.is_set():
                raise ClosedError(CLOSED)
            return self._open(InferenceServerClient)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (InferenceServerException, ValueError) as exc:  # ValueError: gRPC on a closed channel
            if self._closed.is_set():
                raise ClosedError(CLOSED) from exc
            if isinstance(exc, ValueError):
                raise
            raise self._flow.error(exc) from exc


class _Call(Protocol):
    def cancel(self) -> None: ...


_C = TypeVar("_C", bound=_Call)


class _Work:
    """The requests of one call of the client that are under way; they are cancelled when it ends."""

    def __init__(self, closed: threading.Event) -> None:
        self._closed = closed
        self._cancelled = threading.Event()
        self._lock = threading.RLock()  # the garbage collector may end an iteration in the middle of another
        self._calls: set[_Call] = set()

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            for call in self._calls:
                call.cancel()

    @contextmanager
    def begun(self, call: _C) -> Iterator[_C]:
        """Cancel the call too, if it comes to that; in any case if the body raises, as by a Ctrl-C."""
        with self._lock:
            self._calls.add(call)
            if self._cancelled.is_set():
                call.cancel()
        try:
            yield call
        except BaseException:
            call.cancel()
            raise
        finally:
            with self._lock:
                self._calls.discard(call)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._cancelled.wait(min(left, 0.1))
            self.check()

    def check(self) -> None:
        """Nothing more is done for whom nobody waits."""
        if self._cancelled.is_set() or self._closed.is_set():
            raise ClosedError(CLOSED)


def _result(future: Future[T]) -> T:
    while not wait([future], timeout=0.5).done:
        pass  # Python sees a Ctrl-C that comes just before a wait only after it
    return future.result()
