"""The errors of this package, as one tree.

Each message says what was found, what was expected and what to do. Where `transient` is true, the same request may
succeed a moment later; the client has retried it before, unless `retries` is 0.

    EcapaError
        AudioError              the clip cannot be embedded; it was not sent
            AudioFileError          the path cannot be opened as a file
            NotAudioError           the file or the bytes are not audio, or damaged
            AudioFormatError        type, dtype, shape or sample rate is not supported
            TooShortError           empty, or shorter than the model's limit
            TooLongError            longer than the model's or the client's limit
            NotFiniteError          holds NaN, infinity, or samples far outside [-1, 1]
        ServerError             the server was not reached, rejected the request or gave no valid reply
            ConnectError            no Triton is reached at this address
                AddressError            the url is not that of a gRPC endpoint
                TrustError              client and server do not accept each other's certificates
            KeyRefusedError         the server requires another API key
            DeadlineError           no reply within the timeout
            OverloadedError         the server's queue is full, or the request waited too long in it
            ModelNotFoundError      the server has no model of this name
            ModelNotReadyError      the server knows the model but has not loaded it
            RejectedError           the server rejects the request
            ProtocolError           the reply is not that of an ecapa model
        EmbeddingError          the model has no embedding for a valid clip (NaN)
        ThresholdError          there is no threshold, or it is not a cosine
        ClosedError             the client was closed
        ModelMismatchError      embeddings of two models do not compare
        GalleryError            an invalid name, or nothing to enrol
            UnknownVoiceError       no voice of this name is enrolled
            GalleryFileError        the file is not a gallery, or damaged
        ManifestError           a list of files is wrong
        EvaluationError         a list of trials is wrong, or a requirement of the evaluation is missing
        OutputError             a file cannot be written at this path
"""

from __future__ import annotations

import re
from typing import ClassVar

# In gRPC's messages of a failed TLS handshake.
_NO_TRUST = r"handshak|hostname verification|certificate[ _]verify|ssl_error|wrong version number"


class EcapaError(Exception):
    """Base of all errors that this package raises on purpose.

    Attributes:
        transient: Whether the same request may succeed a moment later.
    """

    transient: ClassVar[bool] = False


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


class ConnectError(ServerError):
    """No Triton is reached at this address."""

    transient = True


class AddressError(ConnectError):
    """The url is not that of a gRPC endpoint."""

    transient = False


class TrustError(ConnectError):
    """Client and server do not accept each other's certificates."""

    transient = False


class KeyRefusedError(ServerError):
    """The server requires another API key."""


class DeadlineError(ServerError):
    """No reply within the timeout."""


class OverloadedError(ServerError):
    """The server's queue is full, or the request waited too long in it."""

    transient = True


class ModelNotFoundError(ServerError):
    """The server has no model of this name."""


class ModelNotReadyError(ServerError):
    """The server knows the model but has not loaded it."""

    transient = True


class RejectedError(ServerError):
    """The server rejects the request."""


class ProtocolError(ServerError):
    """The reply is not that of an ecapa model."""


class EmbeddingError(EcapaError):
    """The model has no embedding for a valid clip (NaN)."""

    transient = True


class ThresholdError(EcapaError):
    """There is no threshold, or it is not a cosine."""


class ClosedError(EcapaError):
    """The client was closed."""


class ModelMismatchError(EcapaError):
    """Embeddings of two models do not compare."""


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


def from_grpc(status: str, detail: str, *, url: str, model: str, timeout: float | None) -> EcapaError:
    """The error for a gRPC status; the only place where Triton's errors become those of this package.

    Args:
        status: Name of the status, such as `UNAVAILABLE`.
        detail: Message of the server or of gRPC.
        url: Address of the server.
        model: Name of the model.
        timeout: Timeout of the call in seconds.
    """
    detail = " ".join(detail.split())  # one line
    words = detail.lower()
    if status == "DEADLINE_EXCEEDED":
        return DeadlineError(f"no reply from {url} in {timeout} s: raise the timeout, or send less at once")
    if "rst_stream" in words or "stream removed" in words or status == "ABORTED":
        return ConnectError(f"the connection to {url} broke off ({detail}): try again")
    if "status: 404" in words:
        return AddressError(f"{url} is not a gRPC endpoint of Triton ({detail}): is it the right port?")
    if "protocol is restricted" in words or status == "PERMISSION_DENIED" or "status: 401" in words:
        return KeyRefusedError(
            f"the server at {url} requires another key ({detail}): pass its api_key (command line: --key-file)"
        )
    if "unknown model" in words:
        if "no available versions" not in words and (status == "NOT_FOUND" or "is not found" in words):
            return ModelNotFoundError(
                f"model {model!r} is not on the server at {url} ({detail}): "
                "pass the name of a folder of its model repository"
            )
        return ModelNotReadyError(
            f"model {model!r} is not ready on the server at {url} ({detail}): try again later, or see the server's log"
        )
    if "queue size" in words or "request timeout expired" in words:
        return OverloadedError(
            f"the server at {url} has too many requests ({detail}): try again later, or send fewer at once"
        )
    if "server is stopping" in words:
        return ConnectError(f"the server at {url} is stopping ({detail}): try again once it is back")
    if status == "UNAUTHENTICATED" or (status == "UNAVAILABLE" and re.search(_NO_TRUST, words)):
        return TrustError(
            f"this client and the server at {url} do not trust each other ({detail}): check the "
            "names and dates of its certificate, pass the authority that signed it, and a client certificate if it "
            "requires one"
        )
    if status == "UNAVAILABLE":
        return ConnectError(
            f"no Triton answers at {url} ({detail}): check that it runs, that this is its gRPC port, usually 8001, "
            "and whether it requires TLS (grpcs://)"
        )
    if "received message larger" in words and words.startswith("client"):
        return ProtocolError(f"the reply from {url} is too large ({detail}): is this an ecapa model?")
    if status == "RESOURCE_EXHAUSTED":
        return RejectedError(f"too large for the server at {url} ({detail}): send less audio in one request")
    if status in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"):
        return RejectedError(
            f"the server at {url} rejects the request ({detail}): is {model!r} a model of this project?"
        )
    return ServerError(f"the server at {url} failed ({status}: {detail}): see the server's log")
