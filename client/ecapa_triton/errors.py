"""The errors of this package, as one tree.

Each message says what was found, what was expected and what to do. Where `transient` is true, the same request may
succeed a moment later; the client has retried it until its timeout, unless `retries` limits that.

    EcapaError
        AudioError
            AudioFileError, NotAudioError, AudioFormatError, TooShortError, TooLongError, NotFiniteError
        ServerError
            ConnectError
                AddressError, TrustError
            KeyRefusedError, DeadlineError, OverloadedError, ModelNotFoundError, ModelNotReadyError
            RejectedError, ProtocolError
        EmbeddingError, ThresholdError, ClosedError, ModelMismatchError, TooLittleSpeechError
        GalleryError
            UnknownVoiceError, GalleryFileError
        ManifestError, EvaluationError, OutputError
"""

from __future__ import annotations

import re
from typing import ClassVar


class EcapaError(Exception):
    """Base of all errors that this package raises on purpose.

    Attributes:
        transient: Whether the same request may succeed a moment later.
    """

    transient: ClassVar[bool] = False

    def __init_subclass__(cls, transient: bool = False) -> None:
        cls.transient = transient


class AudioError(EcapaError):
    """The clip cannot be embedded; it was not sent."""


class AudioFileError(AudioError):
    """The path cannot be opened as a file: missing, a directory, no permission."""


class NotAudioError(AudioError):
    """The file or the bytes are not audio, or damaged."""


class AudioFormatError(AudioError):
    """Type, dtype, shape or sample rate is not supported."""


class TooShortError(AudioError):
    """Empty, or shorter than the model's limit."""


class TooLongError(AudioError):
    """Longer than the model's limit (`long="error"`) or than the client's `max_duration`."""


class NotFiniteError(AudioError):
    """Holds NaN, infinity, or samples far outside [-1, 1]."""


class ServerError(EcapaError):
    """The server was not reached, rejected the request or gave no valid reply."""


class ConnectError(ServerError, transient=True):
    """No Triton is reached at this address."""


class AddressError(ConnectError):
    """The url is not that of a gRPC endpoint."""


class TrustError(ConnectError):
    """Client and server do not accept each other's certificates."""


class KeyRefusedError(ServerError):
    """The server requires another API key."""


class DeadlineError(ServerError):
    """No reply within the timeout."""


class OverloadedError(ServerError, transient=True):
    """The server's queue is full, or the request waited too long in it."""


class ModelNotFoundError(ServerError):
    """The server has no model of this name."""


class ModelNotReadyError(ServerError, transient=True):
    """The server knows the model but has not loaded it."""


class RejectedError(ServerError):
    """The server rejects the request."""


class ProtocolError(ServerError):
    """The reply is not that of an ecapa model."""


class EmbeddingError(EcapaError, transient=True):
    """The model has no embedding for a valid clip (NaN)."""


class ThresholdError(EcapaError):
    """There is no threshold, or it is not a cosine."""


class ClosedError(EcapaError):
    """The client was closed."""


class ModelMismatchError(EcapaError):
    """Embeddings of two models do not compare."""


class TooLittleSpeechError(EcapaError):
    """The clip has less speech than `min_speech`: no decision, no enrolment."""


class GalleryError(EcapaError):
    """An invalid name, or nothing to enrol."""


class UnknownVoiceError(GalleryError):
    """No voice of this name is enrolled."""


class GalleryFileError(GalleryError):
    """The file is not a gallery, or damaged."""


class ManifestError(EcapaError):
    """A list of files cannot be read, or one of its lines names no file."""


class EvaluationError(EcapaError):
    """A trial list cannot be evaluated: it is wrong, or a requirement is missing."""


class OutputError(EcapaError):
    """A file cannot be written at this path."""


# Errors that the next clip would meet as well.
HOPELESS = ClosedError, ConnectError, KeyRefusedError, ModelNotFoundError, ModelNotReadyError


# What a gRPC status and its details in small letters mean; the first expression that is found in them decides.
_FROM_GRPC: list[tuple[str, type[EcapaError], str]] = [
    ("^DEADLINE_EXCEEDED", DeadlineError, "no reply in {timeout} s: raise the timeout, or send less at once"),
    ("^(ABORTED|CANCELLED)|rst_stream|stream removed", ConnectError, "the connection broke off: try again"),
    ("status: 404", AddressError, "not a gRPC endpoint of Triton: is it the right port?"),
    (
        "^PERMISSION_DENIED|protocol is restricted|status: 401",
        KeyRefusedError,
        "the server requires another key: pass its api_key (command line: --key-file)",
    ),
    ("unknown model.* no available versions", ModelNotReadyError, "model {model!r} is not ready: try again later"),
    (
        "^NOT_FOUND.*unknown model|unknown model.* is not found",
        ModelNotFoundError,
        "the server has no model {model!r}: pass the name of a folder of its model repository",
    ),
    ("unknown model", ModelNotReadyError, "model {model!r} is not ready: see the server's log"),
    (
        "queue size|request timeout expired",
        OverloadedError,
        "too many requests: try again later, or send fewer at once",
    ),
    ("server is stopping", ConnectError, "the server is stopping: try again once it is back"),
    (
        "^UNAUTHENTICATED|^UNAVAILABLE.*(handshake failed|hostname verif|certificate[ _]verif)",
        TrustError,
        "client and server do not trust each other: check the names and dates of the server's certificate, pass the "
        "authority that signed it, and a client certificate if the server requires one",
    ),
    (
        "^UNAVAILABLE",
        ConnectError,
        "no Triton answers: check that it runs, the gRPC port (usually 8001), and whether it requires TLS (grpcs://)",
    ),
    ("client.*received message larger", ProtocolError, "the reply is too large: is this an ecapa model?"),
    ("^RESOURCE_EXHAUSTED", RejectedError, "too large for the server: send less audio in one request"),
    ("^(INVALID_ARGUMENT|NOT_FOUND|UNIMPLEMENTED)", RejectedError, "request rejected: is {model!r} an ecapa model?"),
    ("", ServerError, "the server failed: see its log"),
]


def from_grpc(status: str, detail: str, *, url: str, model: str, timeout: float | None) -> EcapaError:
    """The error for the name and detail of a gRPC status; the only place where Triton's errors become ours."""
    detail = " ".join(detail.split())  # one line
    found = f"{status}: {detail.lower()}"
    error, message = next((error, message) for sign, error, message in _FROM_GRPC if re.search(sign, found))
    return error(f"{url}: {message.format(model=model, timeout=timeout)} ({status}: {detail})")
