"""What becomes of a clip, step by step: no network, no thread, no clock that waits.

Each function here is a generator of steps. A client performs them, by blocking or by awaiting, and sends back what came
of each; so that both clients do the same, and differ in nothing but how they wait.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from . import _scoring, protocol
from . import audio as audio_module
from ._connection import FORKED, Connection, State, Tls
from ._scoring import Utterance, Verification
from .audio import SAMPLE_RATE, Audio, Clip, Waveform
from .errors import (
    ConnectError,
    DeadlineError,
    EcapaError,
    EmbeddingError,
    ModelMismatchError,
    ModelNotReadyError,
    OverloadedError,
    TooLongError,
    TooShortError,
    from_grpc,
)
from .protocol import Deployment, ModelInfo, Reply, Statistics

Embedding: TypeAlias = NDArray[np.float32]
"""An embedding, float32 `[192]`, not of unit length."""

Long: TypeAlias = Literal["error", "truncate", "windows"]
"""What to do with a clip above the model's limit; `SpeakerClient.embed` tells."""

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0  # s, between two attempts
FIRST_RETRIES = 4  # of a server that was never reached: the address may be wrong


@dataclass(frozen=True)
class Read:
    """Read a clip, as `audio.read`; the answer is a `Clip`."""

    audio: Audio
    sample_rate: float | None
    max_samples: int


@dataclass(frozen=True)
class Send:
    """Send one request and wait for its reply for `timeout` seconds; the answer is a `Reply`."""

    waveform: Waveform
    timeout: float | None


@dataclass(frozen=True)
class Ask:
    """Call a method of Triton's client; the answer is what it returns."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Together:
    """Perform all of these, `max_in_flight` at a time; the answer is the list of their results, or the first error."""

    parts: Sequence[Generator[Any, Any, Reply]]


@dataclass(frozen=True)
class Alone:
    """Perform these steps while no others of this kind are performed; the answer is their result."""

    steps: Generator[Any, Any, Any]


Step: TypeAlias = Read | Send | Ask | Wait | Together | Alone
Steps: TypeAlias = Generator[Step, Any, T]


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
        deployment: How the model is served; None where it is not ready.
        info: Constants of the model; None where they could not be asked for.
        statistics: What the server counted for the model; None where it is not ready.
    """

    url: str
    server_version: str
    live: bool
    ready: bool
    model: str
    model_versions: tuple[str, ...]
    deployment: Deployment | None
    info: ModelInfo | None
    statistics: Statistics | None


class Flow:
    """The steps of one client, and what it has learned of the model."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._info: ModelInfo | None = None  # of the latest reply

    def utterance(self, audio: Audio, sample_rate: float | None, long: Long) -> Steps[Utterance]:
        """Embed one clip."""
        for _ in range(3):  # with a guess of the limits, the model's own, those of a model that replaced it
            info = self._info or protocol.USUAL
            clip: Clip = yield Read(audio, sample_rate, info.max_samples)
            if not len(clip.waveform):
                raise TooShortError(f"{clip.name}: holds no samples: pass a clip of a second or more")
            if self._info is None and (clip.cut or len(clip.waveform) < info.min_samples):
                yield from self._ask_info()  # a guess is good enough to read by, not to refuse by
                continue
            _check_length(clip, info, long)
            if clip.cut and long == "windows":  # one at a time, so that memory is bounded by max_duration
                clip, replies = yield Alone(self._windows(audio, sample_rate, info))
            else:
                replies = [(yield from self.request(clip.name, clip.waveform))]
            one_model = len({reply.info for reply in replies}) == 1
            sent = min(len(clip.waveform), info.max_samples)
            info = replies[0].info
            whole = sent <= info.max_samples or long == "truncate"
            if one_model and whole:  # else the model was replaced by one with other limits
                embeddings = [reply.embedding for reply in replies]
                embedding = embeddings[0] if len(embeddings) == 1 else _scoring.mean_direction(embeddings)
                seconds = min(clip.seconds, info.max_seconds) if long == "truncate" else clip.seconds
                return Utterance(embedding, seconds, info.id, info.threshold)
        raise ModelNotReadyError(
            f"model {self.connection.model!r} at {self.connection.url} keeps changing its limits: try again"
        )

    def request(self, name: str, waveform: Waveform) -> Steps[Reply]:
        """Ask for one embedding, again where that may help, until the time is up."""
        timeout, retries = self.connection.timeout, self.connection.retries
        end = math.inf if timeout is None else time.monotonic() + timeout
        before = ""
        for attempt in range(retries + 1):
            try:
                reply: Reply = yield Send(waveform, None if timeout is None else end - time.monotonic())
                self._info = reply.info
                if reply.finite:
                    return reply
                if len(waveform) < reply.info.min_samples:
                    raise _too_short(name, len(waveform), reply.info)
                raise _no_embedding(name, len(waveform), attempt + 1)
            except EcapaError as exc:
                if isinstance(exc, DeadlineError) and before:
                    raise DeadlineError(f"{exc}; before that: {before}") from exc
                before = str(exc)  # not the error: its frames hold the clip
                pause = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt, 10)) * random.uniform(0.5, 1)
                nobody = self._info is None and isinstance(exc, ConnectError) and attempt >= FIRST_RETRIES
                if not exc.transient or attempt == retries or nobody or time.monotonic() + pause >= end:
                    raise
            yield Wait(pause)
        raise AssertionError("the last attempt returns or raises")

    def verification(
        self, one: Utterance | EcapaError, two: Utterance | EcapaError, threshold: float | None
    ) -> Verification:
        """Tell whether two utterances are of one speaker; an error among them is raised."""
        one, two = raise_first([one, two])
        _check_one_model([one, two])
        return _scoring.decide(_scoring.score(one.embedding, two.embedding), threshold, two.threshold)

    def status(self) -> Steps[Status]:
        """Ask for all that `Status` tells. A clip of silence is embedded, once the statistics are read."""
        model = (self.connection.model, self.connection.model_version)
        live = yield Ask("is_server_live")
        server = yield Ask("get_server_metadata")
        ready = (yield Ask("is_server_ready")) and (yield Ask("is_model_ready", model))
        versions: tuple[str, ...] = ()
        deployment, statistics, info = None, None, self._info
        try:
            versions = tuple((yield Ask("get_model_metadata", model)).versions)
            deployment = protocol.read_config((yield Ask("get_model_config", model)).config)
            statistics = protocol.read_statistics((yield Ask("get_inference_statistics", model)))
            info = yield from self._ask_info()
        except (ModelNotReadyError, OverloadedError):
            pass  # the rest is worth telling, now more than ever
        return Status(
            url=self.connection.url,
            server_version=server.version,
            live=bool(live),
            ready=bool(ready),
            model=self.connection.model,
            model_versions=versions,
            deployment=deployment,
            info=info,
            statistics=statistics,
        )

    def error(self, exc: InferenceServerException) -> EcapaError:
        """The error of ours for one of Triton's client."""
        status = (exc.status() or "UNKNOWN").removeprefix("StatusCode.")
        connection = self.connection
        return from_grpc(
            status, exc.message() or "", url=connection.url, model=connection.model, timeout=connection.timeout
        )

    def _windows(self, audio: Audio, sample_rate: float | None, info: ModelInfo) -> Steps[tuple[Clip, list[Reply]]]:
        longest = self.connection.max_duration
        clip: Clip = yield Read(audio, sample_rate, round(longest * SAMPLE_RATE))
        if clip.cut:
            raise TooLongError(
                f"{clip.name}: longer than the {longest:g} s that this client reads "
                "(max_duration of SpeakerClient): cut the recording"
            )
        places = audio_module.windows(len(clip.waveform), info.max_samples)
        replies = yield Together([self.request(clip.name, clip.waveform[place]) for place in places])
        return clip, replies

    def _ask_info(self) -> Steps[ModelInfo]:
        """The model's constants, which come with any reply, even one without an embedding."""
        try:
            silence = np.zeros(protocol.USUAL.min_samples, np.float32)
            yield from self.request("a clip of silence", silence)
        except (EmbeddingError, TooShortError):
            pass
        assert self._info is not None
        return self._info


class BaseClient:
    """The options of both clients, and the process that a connection is of."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "ecapa",
        timeout: float | None = 10.0,
        *,
        model_version: str = "",
        retries: int = 4,
        max_in_flight: int = 8,
        max_duration: float = 3600.0,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._connection = Connection(
            url, model, timeout, model_version, retries, max_in_flight, max_duration, tls, api_key, metadata or {}
        )
        self._arguments = self._connection.arguments()
        self._headers = self._connection.headers
        self._flow = Flow(self._connection)
        self._triton: Any = None  # Triton's client, once it is used
        self._process = 0  # that it is of
        self._set_up()

    def _set_up(self) -> None:
        """What a client needs besides."""
        raise NotImplementedError

    def _open(self, kind: Callable[..., Any]) -> Any:
        """Triton's client, made when it is first asked for."""
        if self._triton is None:
            self._triton, self._process = kind(**self._arguments), os.getpid()
        if self._process != os.getpid():
            raise RuntimeError(FORKED)
        return self._triton

    def _state(self, closed: bool) -> State:
        return State.CLOSED if closed else State.NEW if self._triton is None else State.OPEN


def check_many(audios: object, long: Long) -> None:
    """Refuse a single clip where a list is meant, and an unknown `long`."""
    single = isinstance(audios, str | bytes | bytearray | memoryview | os.PathLike)
    if single or (isinstance(audios, np.ndarray) and audios.ndim < 2):
        raise TypeError(f"audios is a single {type(audios).__name__}: expected a list of clips")
    check_long(long)


def check_long(long: Long) -> None:
    """Refuse an unknown `long`."""
    if long not in get_args(Long):
        raise ValueError(f"long is {long!r}: expected one of {', '.join(get_args(Long))}")


def raise_first(outcomes: Iterable[Utterance | EcapaError]) -> list[Utterance]:
    """The outcomes, once all are there, or the first error among them raised."""
    finished = list(outcomes)
    for outcome in finished:
        if isinstance(outcome, EcapaError):
            raise outcome
    return [outcome for outcome in finished if isinstance(outcome, Utterance)]


def embeddings(outcomes: list[Utterance | EcapaError], return_exceptions: bool) -> list[Embedding | EcapaError]:
    """The bare embeddings, of one model."""
    if not return_exceptions:
        raise_first(outcomes)
    _check_one_model(outcomes)
    return [outcome if isinstance(outcome, EcapaError) else outcome.embedding for outcome in outcomes]


def _check_one_model(outcomes: Iterable[Utterance | EcapaError]) -> None:
    models = dict.fromkeys(outcome.model for outcome in outcomes if isinstance(outcome, Utterance))
    if len(models) > 1:
        raise ModelMismatchError(
            f"the model was replaced between these clips ({', then '.join(models)}), and their embeddings do not "
            "compare: try again"
        )


def without_frames(outcome: Utterance | EcapaError) -> Utterance | EcapaError:
    """An outcome to hand out: the frames of an error's traceback would keep the whole clip in memory."""
    link: BaseException | None = outcome if isinstance(outcome, EcapaError) else None
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__
    return outcome


def _check_length(clip: Clip, info: ModelInfo, long: Long) -> None:
    if len(clip.waveform) < info.min_samples:
        raise _too_short(clip.name, len(clip.waveform), info)
    if clip.cut and long == "error":
        seconds = clip.source_seconds
        digits = next((n for n in range(1, 7) if round(seconds, n) > info.max_seconds), None)  # 30.0001, not 30.0
        length = "longer than its header says" if digits is None else f"{seconds:.{digits}f} s long"
        raise TooLongError(
            f"{clip.name}: {length}, the model takes up to {info.max_seconds:g} s: "
            "choose long=truncate (the first of it) or long=windows (the mean over all of it)"
        )


def _too_short(name: str, samples: int, info: ModelInfo) -> TooShortError:
    return TooShortError(
        f"{name}: {samples / SAMPLE_RATE * 1000:.1f} ms long, "
        f"expected {info.min_samples / SAMPLE_RATE * 1000:g} ms or more: pass a longer clip, "
        "best of a second or more"
    )


def _no_embedding(name: str, samples: int, times: int) -> EmbeddingError:
    return EmbeddingError(
        f"{name}: the model answered NaN {times} times for {samples / SAMPLE_RATE:.2f} s of good audio; "
        "another client's empty clip in the same batch explains one NaN, hardly more: try again, "
        "then check the model with `python -m export verify`"
    )
