"""Requests for embeddings over gRPC: serialised beforehand, sent, and their replies checked.

They fit any model with input `waveform` FP32 `[n, samples]` and output `embedding` FP32 `[n, E]`.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import numpy as np
from ecapa_triton.audio import SAMPLE_RATE
from ecapa_triton.protocol import CHANNEL_ARGS, SCHEME
from tritonclient.grpc import service_pb2

from .clips import Array, distances
from .machine import MeasureError

TIMEOUT = 60.0  # s, of a request
_FULL = "Exceeds maximum queue size"  # in the message of Triton and of the gateway at their limit of requests
_CHANNEL_ARGS = [*CHANNEL_ARGS, ("grpc.use_local_subchannel_pool", 1)]  # else all clients share one connection


class Failure(Exception):
    """A request has no right reply."""


class Rejected(Failure):
    """The server has reached its limit of requests in flight."""


class CallFailed(Failure):
    """The call failed; the message has gRPC's code and the server's message."""


class WrongReply(Failure):
    """The reply does not hold the embeddings of the clips that were sent."""


@dataclass(frozen=True)
class Request:
    """A serialised request and the expected reply."""

    name: str  # in Locust's statistics
    body: bytes  # a ModelInferRequest
    clips: int
    seconds: float  # of audio, all clips together
    embeddings: Array | None  # expected, float32 [clips, E]; None: any finite ones
    max_error: float  # largest relative L2 distance from them that is right


class Sent(NamedTuple):
    """A request that was sent: a line of the log that the locustfile writes and the load test reads."""

    start: float  # s since the epoch; in the open loop when it was due
    latency: float  # s until the reply
    clips: int
    audio: float  # s, all clips together
    users: int  # at the time of the reply
    result: str  # "right" or the failure
    error: float  # relative L2 distance of a right reply from the expected embeddings
    cpu: float  # s of CPU time that the process of Locust has used so far

    @property
    def end(self) -> float:
        """Time of the reply."""
        return self.start + self.latency

    @property
    def right(self) -> bool:
        """Whether the reply holds the expected embeddings."""
        return self.result == "right"


def make_requests(
    model: str,
    waveforms: list[Array],
    embeddings: Array | None = None,
    *,
    batch: int = 1,
    max_error: float = np.inf,
    name: str = "",
) -> list[Request]:
    """Serialise waveforms, float32 `[samples]` at 16 kHz, into requests of `batch` clips of one length, in their order.

    The other arguments are as in `Request`.
    """
    requests = []
    for start in range(0, len(waveforms) - batch + 1, batch):
        rows = np.stack(waveforms[start : start + batch])
        message = service_pb2.ModelInferRequest(model_name=model)
        message.inputs.add(name="waveform", datatype="FP32", shape=rows.shape)
        message.outputs.add(name="embedding")
        message.raw_input_contents.append(rows.astype(np.float32).tobytes())
        expected = None if embeddings is None else embeddings[start : start + batch]
        seconds = rows.size / SAMPLE_RATE
        requests.append(Request(name, message.SerializeToString(), batch, seconds, expected, max_error))
    return requests


class Connection:
    """A gRPC connection to a Triton server at `grpc://HOST:PORT`, shared with no other object."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url.removeprefix(SCHEME), options=_CHANNEL_ARGS)
        self._infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=None,  # bytes already
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def embed(self, body: bytes) -> Array:
        """Send a serialised request and return its embeddings, float32 `[clips, E]`.

        Raises:
            Rejected: the server is at its limit.
            CallFailed: the call failed otherwise.
            WrongReply: the reply has no embeddings.
        """
        try:
            reply = self._infer(body, timeout=TIMEOUT)
        except grpc.RpcError as error:
            code, message = error.code(), error.details() or ""
            if code is grpc.StatusCode.UNAVAILABLE and _FULL in message:
                raise Rejected("the server has reached its limit of requests in flight") from error
            raise CallFailed(f"{code.name}: {' '.join(message.split())[:200]}") from error
        for output, content in zip(reply.outputs, reply.raw_output_contents, strict=True):
            if output.name == "embedding" and output.datatype == "FP32":
                return np.frombuffer(content, np.float32).reshape(output.shape)
        raise WrongReply("the reply has no output embedding of type FP32")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def check(reply: Array, request: Request) -> float:
    """The largest relative L2 distance of a reply `[clips, E]` from the expected embeddings.

    Raises:
        WrongReply: the reply has another shape, is not finite or is too far.
    """
    if reply.ndim != 2 or len(reply) != request.clips or not reply.size:
        raise WrongReply(f"the reply has shape {list(reply.shape)}, expected {request.clips} rows")
    if not np.isfinite(reply).all():
        raise WrongReply("the embedding is not finite")
    if request.embeddings is None:
        return 0.0
    if reply.shape != request.embeddings.shape:
        raise WrongReply(f"the reply has shape {list(reply.shape)}, expected {list(request.embeddings.shape)}")
    if (worst := float(distances(reply, request.embeddings).max())) > request.max_error:
        raise WrongReply("the embedding is not that of the clip")
    return worst


def first_replies(url: str, model: str, waveforms: list[Array]) -> Array:
    """The embedding of each clip, float32 `[n, E]`, sent alone and one after another.

    Raises:
        MeasureError: the server gave no finite embedding.
    """
    rows = []
    try:
        with closing(Connection(url)) as connection:
            for request in make_requests(model, waveforms):
                rows.append(connection.embed(request.body))
                check(rows[-1], request)
    except Failure as error:
        raise MeasureError(f"{url}: {model} does not embed a clip: {error}") from error
    return np.concatenate(rows)
