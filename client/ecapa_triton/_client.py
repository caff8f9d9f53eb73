"""The synchronous client."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException

from . import _audio, _scoring, _wire
from ._audio import SAMPLE_RATE, Audio, Clip, Waveform
from ._errors import (
    ClosedError,
    ConnectError,
    EcapaError,
    EmbeddingError,
    ModelNotReadyError,
    OverloadedError,
    TooLongError,
    TooShortError,
    from_grpc,
)
from ._scoring import Verification
from ._wire import Deployment, Limits, Reply, Statistics

Embedding: TypeAlias = NDArray[np.float32]
Long: TypeAlias = Literal["error", "truncate", "windows"]

MAX_TIMEOUT = 1e6  # s; gRPC takes deadlines in the far future for ones in the past
MAX_DURATION = 86_400  # s


@dataclass(frozen=True)
class Status:
    """What the server says about itself and the model.

    Attributes:
        url: Address of the server.
        server_version: Version of Triton.
        live: The server runs.
        ready: The server and the model take requests.
        model: Name of the model.
        model_versions: Versions of the model that are loaded.
        deployment: How the model is served.
        limits: Constants of the model; None where they could not be asked for.
        statistics: What the server counted for the model.
    """

    url: str
    server_version: str
    live: bool
    ready: bool
    model: str
    model_versions: tuple[str, ...]
    deployment: Deployment
    limits: Limits | None
    statistics: Statistics


@dataclass(frozen=True)
class Embedded:
    """An embedding with what is known about its making."""

    embedding: Embedding
    seconds: float  # of audio that it stands for
    limits: Limits
    version: str


@dataclass(frozen=True)
class Tls:
    """An encrypted connection.

    Attributes:
        ca: File with the certificates of the authorities that the server's is trusted by, PEM. None: those that
            gRPC brings along.
        certificate: File with this client's own certificate, PEM, where the server asks for one.
        key: File with its private key, PEM.
        name: What the server's certificate is for, where the url does not say: a list of addresses.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None
    name: str | None = None

    def _arguments(self) -> dict[str, Any]:
        if (self.certificate is None) != (self.key is None):
            raise ConnectError("a client's certificate and its key go together: pass both or neither")
        named = {"root_certificates": self.ca, "certificate_chain": self.certificate, "private_key": self.key}
        paths = {name: str(path) for name, path in named.items() if path is not None}
        for path in paths.values():
            try:
                open(path, "rb").close()
            except OSError as exc:
                raise ConnectError(f"{path}: {exc.strerror}: pass a file in PEM format") from exc
        return {"ssl": True} | paths


class SpeakerClient:
    """Speaker embeddings from an ecapa model on a Triton server.

    Many threads may use one client at once. It connects when first used, and again after a lost connection.

    ```python
    with SpeakerClient() as client:
        print(client.verify("anna.flac", "unknown.mp3"))
    ```

    Args:
        url: `HOST:PORT` of Triton's gRPC endpoint, with or without `grpc://`; `grpcs://` is `tls=Tls()`.
        model: Name of the model.
        timeout: Seconds that one request may take, from sending to reply, up to 1e6; None waits for ever.
        model_version: Version of the model; empty: the server chooses.
        max_in_flight: Requests that one call of `embed_many`, or of `embed` in windows, keeps under way.
            A CPU answers 8 long clips within the default timeout; a GPU has use for 32 and more.
        max_duration: Seconds of audio that `long="windows"` reads at most, up to 86400; longer is an error.
            An hour takes 230 MB, twice that while it is read; such clips are read one at a time.
        tls: How the connection is encrypted; None: in the clear.
        api_key: What the server asks of its clients, where it does.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "ecapa",
        timeout: float | None = 10.0,
        *,
        model_version: str = "",
        max_in_flight: int = 8,
        max_duration: float = 3600.0,
        tls: Tls | None = None,
        api_key: str | None = None,
    ) -> None:
        if timeout is not None and not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(
                f"timeout is {timeout}: expected seconds above 0 and up to {MAX_TIMEOUT:.0f}, or None to wait for ever"
            )
        if not 0 < max_duration <= MAX_DURATION:
            raise ValueError(f"max_duration is {max_duration}: expected seconds above 0 and up to {MAX_DURATION}")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}: expected 1 or more")
        if url.startswith(_wire.TLS_SCHEME):
            tls = tls or Tls()
        target = url.removeprefix(_wire.SCHEME).removeprefix(_wire.TLS_SCHEME).rstrip("/")
        if not target or target.startswith(("http://", "https://")):
            raise ConnectError(
                f"url is {url!r}: expected HOST:PORT of Triton's gRPC endpoint, such as 127.0.0.1:8001 "
                "(8000 is its HTTP port)"
            )
        self._url = url
        self._model = model
        self._timeout = timeout
        self._model_version = model_version
        self._max_in_flight = max_in_flight
        self._max_duration = max_duration
        self._limits: Limits | None = None  # of the latest reply
        self._closed = False
        self._sending = threading.Lock()
        self._long_clip = threading.Lock()
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConnectError("api_key is not of visible ASCII characters alone: pass the key as the server has it")
        self._headers = {} if api_key is None else {_wire.KEY_HEADER: api_key}
        encrypted = {} if tls is None else tls._arguments()
        channel = list(_wire.CHANNEL_ARGS)
        if tls is not None and tls.name is not None:
            channel.append(("grpc.ssl_target_name_override", tls.name))
        self._triton = InferenceServerClient(target, channel_args=channel, **encrypted)

    def __enter__(self) -> SpeakerClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; requests under way end in `ClosedError`. Closing twice does no harm."""
        self._closed = True
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
            EmbeddingError: The model has no embedding for the clip, asked twice.
        """
        return self._embed(audio, sample_rate, _checked(long)).embedding

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
        """
        outcomes = list(self._embed_each(audios, sample_rate, long=long))
        if not return_exceptions:
            _raise_first(outcomes)
        return [outcome if isinstance(outcome, EcapaError) else outcome.embedding for outcome in outcomes]

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
        if threshold is not None:
            _scoring.decide(0.0, threshold, None)  # refuse a bad one before any work
        one, two = _raise_first(self._embed_each([a, b], sample_rate, long=long))
        if (one.version, one.limits) != (two.version, two.limits):
            raise ModelNotReadyError(
                f"model {self._model!r} was replaced between the two clips (version {one.version}, then "
                f"{two.version}), and their embeddings do not compare: try again"
            )
        return _scoring.decide(_scoring.cosine(one.embedding, two.embedding), threshold, one.limits.threshold)

    def status(self) -> Status:
        """Ask the server for its version and readiness, and for the model's limits and statistics.

        The limits come with a reply: one short clip of silence is embedded, once the statistics are read.

        Raises:
            ServerError: The server is away, or has no such model.
        """
        server = self._call("get_server_metadata")
        model = self._call("get_model_metadata", self._model, self._model_version)
        config = self._call("get_model_config", self._model, self._model_version)
        ready = self._call("is_server_ready") and self._call("is_model_ready", self._model, self._model_version)
        statistics = self._call("get_inference_statistics", self._model, self._model_version)
        limits = self._limits
        try:
            limits = self._ask_limits()
        except OverloadedError:
            pass  # the rest is worth telling, now more than ever
        return Status(
            url=self._url,
            server_version=server.version,
            live=bool(self._call("is_server_live")),
            ready=bool(ready),
            model=self._model,
            model_versions=tuple(model.versions),
            deployment=_wire.read_config(config.config),
            limits=limits,
            statistics=_wire.read_statistics(statistics),
        )

    # --- one clip ---

    def _embed(self, audio: Audio, sample_rate: float | None, long: Long) -> Embedded:
        for _ in range(3):  # with a guess of the limits, the model's own, those of a model that replaced it
            limits = self._limits or _wire.USUAL_LIMITS
            clip = _audio.read(audio, sample_rate, max_samples=limits.max_samples)
            if not len(clip.waveform):
                raise TooShortError(f"{clip.name}: holds no samples: pass a clip of a second or more")
            if self._limits is None and (clip.cut or len(clip.waveform) < limits.min_samples):
                self._ask_limits()  # a guess is good enough to read by, not to refuse by
                continue
            _check_length(clip, limits, long)
            if clip.cut and long == "windows":
                with self._long_clip:  # one at a time, so that memory is bounded by max_duration
                    clip, waveforms = self._read_windows(audio, sample_rate, limits)
                    replies = self._infer_finite(clip.name, waveforms)
            else:
                waveforms = [clip.waveform]
                replies = self._infer_finite(clip.name, waveforms)
            one_model = len({(reply.version, reply.limits) for reply in replies}) == 1
            whole = len(waveforms[0]) <= replies[0].limits.max_samples or long == "truncate"
            if one_model and whole:  # else the model was replaced by one with other limits
                embeddings = [reply.embedding for reply in replies]
                embedding = embeddings[0] if len(embeddings) == 1 else _scoring.mean_direction(embeddings)
                limits = replies[0].limits
                seconds = min(clip.seconds, limits.max_seconds) if long == "truncate" else clip.seconds
                return Embedded(embedding, seconds, limits, replies[0].version)
        raise ModelNotReadyError(f"model {self._model!r} at {self._url} keeps changing its limits: try again")

    def _read_windows(self, audio: Audio, sample_rate: float | None, limits: Limits) -> tuple[Clip, list[Waveform]]:
        clip = _audio.read(audio, sample_rate, max_samples=round(self._max_duration * SAMPLE_RATE))
        if clip.cut:
            raise TooLongError(
                f"{clip.name}: longer than the {self._max_duration:g} s that this client reads "
                "(max_duration of SpeakerClient): cut the recording"
            )
        windows = _audio.windows(len(clip.waveform), limits.max_samples)
        return clip, [clip.waveform[window] for window in windows]

    def _infer_finite(self, name: str, waveforms: Sequence[Waveform]) -> list[Reply]:
        """Replies to good clips. NaN can come of another client's empty clip in the batch: ask again."""
        replies = self._infer(waveforms)
        bad = [i for i, reply in enumerate(replies) if not reply.finite]
        for i, reply in zip(bad, self._infer([waveforms[i] for i in bad]), strict=True):
            samples, limits = len(waveforms[i]), reply.limits
            if samples < limits.min_samples:
                raise _too_short(name, samples, limits)
            if not reply.finite:
                raise EmbeddingError(
                    f"{name}: the model answered NaN twice for {samples / SAMPLE_RATE:.2f} s of good audio; "
                    "another client's empty clip in the same batch explains one NaN, hardly two: try again, "
                    "then check the model with `python -m export verify`"
                )
            replies[i] = reply
        return replies

    def _ask_limits(self) -> Limits:
        silence = np.zeros(_wire.USUAL_LIMITS.min_samples, np.float32)
        return self._infer([silence])[0].limits

    # --- many clips ---

    def _embed_each(
        self, audios: Iterable[Audio], sample_rate: float | None = None, *, long: Long = "error"
    ) -> Iterator[Embedded | EcapaError]:
        """Yield each clip's outcome in order, as soon as it and those before it are there."""
        if isinstance(audios, str | bytes | os.PathLike):
            raise TypeError(f"audios is a single {type(audios).__name__}: expected a list of clips")
        _checked(long)

        def outcome(audio: Audio) -> Embedded | EcapaError:
            try:
                return self._embed(audio, sample_rate, long)
            except EcapaError as exc:
                return exc

        pool = ThreadPoolExecutor(self._max_in_flight, thread_name_prefix="ecapa-triton")
        pending: deque[Future[Embedded | EcapaError]] = deque()
        try:
            for audio in audios:
                if len(pending) == 2 * self._max_in_flight:
                    yield _result(pending.popleft())
                pending.append(pool.submit(outcome, audio))
            while pending:
                yield _result(pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    # --- requests ---

    def _infer(self, waveforms: Iterable[Waveform]) -> list[Reply]:
        replies: list[Reply] = []
        pending: deque[Future[InferResult]] = deque()
        for waveform in waveforms:
            if len(pending) == self._max_in_flight:
                replies.append(self._receive(pending.popleft()))
            pending.append(self._send(waveform))
        replies.extend(self._receive(future) for future in pending)
        return replies

    def _send(self, waveform: Waveform) -> Future[InferResult]:
        future: Future[InferResult] = Future()

        def done(result: InferResult | None, error: InferenceServerException | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        arguments = _wire.request(waveform)
        # async_infer keeps the call in an attribute for a moment: two threads in it would swap replies.
        with self._sending:
            self._call("async_infer", self._model, model_version=self._model_version, callback=done, **arguments)
        return future

    def _receive(self, future: Future[InferResult]) -> Reply:
        try:
            reply = _wire.read_reply(future.result())
        except InferenceServerException as exc:
            raise self._error(exc) from exc
        self._limits = reply.limits
        return reply

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._triton, method)(*args, client_timeout=self._timeout, headers=self._headers, **kwargs)
        except (InferenceServerException, ValueError) as exc:  # ValueError: gRPC on a closed channel
            raise self._error(exc) from exc

    def _error(self, exc: InferenceServerException | ValueError) -> EcapaError:
        if self._closed:
            return ClosedError("the client is closed: make a new SpeakerClient")
        if isinstance(exc, ValueError):
            raise exc
        status = (exc.status() or "UNKNOWN").removeprefix("StatusCode.")
        return from_grpc(status, exc.message() or "", url=self._url, model=self._model, timeout=self._timeout)


def _result(future: Future[Embedded | EcapaError]) -> Embedded | EcapaError:
    while not wait([future], timeout=0.5).done:
        pass  # Python sees a Ctrl-C that comes just before a wait only after it
    return future.result()


def _checked(long: Long) -> Long:
    if long not in get_args(Long):
        raise ValueError(f"long is {long!r}: expected one of {', '.join(get_args(Long))}")
    return long


def _check_length(clip: Clip, limits: Limits, long: Long) -> None:
    if len(clip.waveform) < limits.min_samples:
        raise _too_short(clip.name, len(clip.waveform), limits)
    if clip.cut and long == "error":
        seconds = clip.source_seconds
        digits = next((n for n in range(1, 7) if round(seconds, n) > limits.max_seconds), None)  # 30.0001, not 30.0
        length = "longer than its header says" if digits is None else f"{seconds:.{digits}f} s long"
        raise TooLongError(
            f"{clip.name}: {length}, the model takes up to {limits.max_seconds:g} s: "
            "choose long=truncate (the first of it) or long=windows (the mean over all of it)"
        )


def _too_short(name: str, samples: int, limits: Limits) -> TooShortError:
    return TooShortError(
        f"{name}: {samples / SAMPLE_RATE * 1000:.1f} ms long, "
        f"expected {limits.min_samples / SAMPLE_RATE * 1000:g} ms or more: pass a longer clip, "
        "best of a second or more"
    )


def _raise_first(outcomes: Iterable[Embedded | EcapaError]) -> list[Embedded]:
    finished = list(outcomes)
    for outcome in finished:
        if isinstance(outcome, EcapaError):
            raise outcome
    return [outcome for outcome in finished if isinstance(outcome, Embedded)]
