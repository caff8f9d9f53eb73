"""Everything that can go wrong, as one tree.

Each message says what came, what was expected and what to do. Where `transient` is true, the same request may fare
better a moment later: a clip has been asked about several times then, unless `retries` is 0.

    EcapaError
        AudioError              the clip cannot be embedded; nothing of it was sent
            AudioFileError          the path cannot be opened as a file
            NotAudioError           no audio, or only a damaged part of one, in the file or the bytes
            AudioFormatError        type, dtype, shape or sample rate is not one of those taken
            TooShortError           empty, or shorter than the model's smallest clip
            TooLongError            longer than the model's or the client's limit
            NotFiniteError          holds NaN, infinity, or samples far outside [-1, 1]
        ServerError             the server could not be asked or did not answer as it should
            ConnectError            no Triton is reached at this address
                AddressError            the url is none
                TrustError              client and server do not accept each other's certificates
            KeyRefusedError         the server asks for an API key, and got none or another
            DeadlineError           no reply within the timeout
            OverloadedError         the server's queue is full, or the request waited too long in it
            ModelNotFoundError      the server has no model of this name
            ModelNotReadyError      the server knows the model but it is not loaded
            RejectedError           the server refuses the request
            ProtocolError           the reply is not that of an ecapa model
        EmbeddingError          the model has no embedding for a clip that looks right (NaN)
        ThresholdError          no usable threshold to decide by
        ClosedError             the client was closed
        ModelMismatchError      embeddings of two models do not compare
        GalleryError            a name that cannot be one, or nothing to enrol
            UnknownVoiceError       nobody of this name is enrolled
            GalleryFileError        the file holds no gallery, or only a damaged one
        ManifestError           a list of files is wrong
        EvaluationError         a list of trials is wrong, or what evaluating it takes is not there
        OutputError             a file cannot be written at this path
"""

from __future__ import annotations

import re
from typing import ClassVar

# In gRPC's words for a TLS connection that did not come about.
_NO_TRUST = r"handshak|hostname verification|certificate[ _]verify|ssl_error|wrong version number"


class EcapaError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        transient: Whether the same request may fare better a moment later.
    """

    transient: ClassVar[bool] = False


class AudioError(EcapaError):
    """The clip cannot be embedded; nothing of it was sent."""


class AudioFileError(AudioError):
    """The path cannot be opened as a file: missing, a directory, no permission."""


class NotAudioError(AudioError):
    """No audio, or only a damaged part of one, in the file or the bytes."""


class AudioFormatError(AudioError):
    """Type, dtype, shape or sample rate is not one of those taken."""


class TooShortError(AudioError):
    """Empty, or shorter than the model's smallest clip."""


class TooLongError(AudioError):
    """Longer than the model's limit (`long="error"`) or than the client's `max_duration`."""


class NotFiniteError(AudioError):
    """Holds NaN, infinity, or samples far outside [-1, 1]."""


class ServerError(EcapaError):
    """The server could not be asked or did not answer as it should."""


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
    """The server asks for an API key, and got none or another."""


class DeadlineError(ServerError):
    """No reply within the timeout."""


class OverloadedError(ServerError):
    """The server's queue is full, or the request waited in it for too long."""

    transient = True


class ModelNotFoundError(ServerError):
    """The server has no model of this name."""


class ModelNotReadyError(ServerError):
    """The server knows the model but it is not loaded."""

    transient = True


class RejectedError(ServerError):
    """The server refuses the request."""


class ProtocolError(ServerError):
    """The reply is not that of an ecapa model."""


class EmbeddingError(EcapaError):
    """The model has no embedding for a clip that looks right (NaN)."""

    transient = True


class ThresholdError(EcapaError):
    """No usable threshold to decide by."""


class ClosedError(EcapaError):
    """The client was closed."""


class ModelMismatchError(EcapaError):
    """Embeddings of two models do not compare."""


class GalleryError(EcapaError):
    """A name that cannot be one, or nothing to enrol."""


class UnknownVoiceError(GalleryError):
    """Nobody of this name is enrolled."""


class GalleryFileError(GalleryError):
    """The file holds no gallery, or only a damaged one."""


class ManifestError(EcapaError):
    """A list of files cannot be read, or a line of it names none."""


class EvaluationError(EcapaError):
    """A trial list cannot be evaluated: it is wrong, or something that it takes is not there."""


class OutputError(EcapaError):
    """A file cannot be written at this path."""


# The next clip would fare no better.
HOPELESS = ClosedError, ConnectError, KeyRefusedError, ModelNotFoundError, ModelNotReadyError


def from_grpc(status: str, detail: str, *, url: str, model: str, timeout: float | None) -> EcapaError:
    """The error of ours for a gRPC status: the one place where Triton's errors become ours.

    Args:
        status: Name of the status, such as `UNAVAILABLE`.
        detail: The server's or gRPC's own words.
        url: Address that was asked.
        model: Name of the model that was asked for.
        timeout: Seconds that the call was given.
    """
    detail = " ".join(detail.split())  # one line, whatever came
    words = detail.lower()
    if status == "DEADLINE_EXCEEDED":
        return DeadlineError(f"no reply from {url} in {timeout} s: raise the timeout, or send less at once")
    if "rst_stream" in words or "stream removed" in words or status == "ABORTED":
        return ConnectError(f"the connection to {url} broke off ({detail}): try again")
    if "status: 404" in words:
        return AddressError(f"what answers at {url} is no gRPC endpoint of Triton's ({detail}): is it the right port?")
    if "protocol is restricted" in words or status == "PERMISSION_DENIED" or "status: 401" in words:
        return KeyRefusedError(
            f"the server at {url} asks for a key and got none or another ({detail}): "
            "pass its api_key (command line: --key-file)"
        )
    if "unknown model" in words:
        if "no available versions" not in words and (status == "NOT_FOUND" or "is not found" in words):
            return ModelNotFoundError(
                f"model {model!r} is not on the server at {url} ({detail}): "
                "pass the name of a folder of its model repository"
            )
        return ModelNotReadyError(
            f"model {model!r} is not ready on the server at {url} ({detail}): wait, or see the server's log"
        )
    if "queue size" in words or "request timeout expired" in words:
        return OverloadedError(
            f"the server at {url} has too many requests ({detail}): try again later, or send fewer at once"
        )
    if "server is stopping" in words:
        return ConnectError(f"the server at {url} is stopping ({detail}): try again once it is back")
    if status == "UNAUTHENTICATED" or (status == "UNAVAILABLE" and re.search(_NO_TRUST, words)):
        return TrustError(
            f"no trust between this client and the server at {url} ({detail}): look at the names and dates of its "
            "certificate, pass the authority that signed it, and a certificate of this client's if it asks for one"
        )
    if status == "UNAVAILABLE":
        return ConnectError(
            f"no Triton answers at {url} ({detail}): is it running, is this its gRPC port, usually 8001, and does it "
            "want TLS (grpcs://)?"
        )
    if "received message larger" in words and words.startswith("client"):
        return ProtocolError(f"the reply from {url} is too large ({detail}): is this an ecapa model?")
    if status == "RESOURCE_EXHAUSTED":
        return RejectedError(f"too large for the server at {url} ({detail}): send less audio in one request")
    if status in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"):
        return RejectedError(
            f"the server at {url} refuses the request ({detail}): is {model!r} a model of this project?"
        )
    return ServerError(f"the server at {url} failed ({status}: {detail}): see the server's log")
