"""A Locust user of a Triton server, for any model that takes `waveform` [n, samples] and answers `embedding` [n, E].

gRPC runs under gevent here, requests are made beforehand, only the call is timed, and every reply is compared with the
embeddings that it must hold. Import this from a locustfile; Locust has prepared the process for gevent then.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gevent
import grpc
import grpc.experimental.gevent
import numpy as np
from ecapa_triton.protocol import CHANNEL_ARGS, SCHEME
from locust import User, events
from tritonclient.grpc import service_pb2

from .clips import SAMPLE_RATE, Array, distances

TIMEOUT = 60.0  # s, of a request
UNDER_WAY = 5000  # requests of one process, at most
REFUSED_PAUSE = 0.5  # s, before a client that was refused asks again
_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_FULL = "Exceeds maximum queue size"  # Triton's words, and those of what limits the requests in front of it
_CHANNEL_ARGS = [*CHANNEL_ARGS, ("grpc.use_local_subchannel_pool", 1)]  # else all users share one connection


class Refused(Exception):
    """The server has as many requests in work as it takes."""


class CallFailed(Exception):
    """The call ended with an error; the message has gRPC's code and the server's words."""


class WrongReply(Exception):
    """What came back is not the embedding of what was sent."""


@dataclass(frozen=True)
class Request:
    """A request, serialised, and the right reply to it.

    Attributes:
        name: in Locust's statistics.
        body: the message ModelInferRequest.
        clips: in it.
        seconds: of audio, all clips together.
        embeddings: the right ones, float32 `[clips, E]`; None: any that are finite will do.
        max_error: relative L2 distance from `embeddings` at which a reply is still right.
    """

    name: str
    body: bytes
    clips: int
    seconds: float
    embeddings: Array | None
    max_error: float


def make_requests(
    model: str,
    waveforms: list[Array],
    embeddings: Array | None,
    *,
    batch: int = 1,
    max_error: float = np.inf,
    name: str = "",
) -> list[Request]:
    """Serialise clips into requests of `batch` clips of one length each, in their order.

    Args:
        model: that is asked.
        waveforms: float32 `[samples]` at 16 kHz.
        embeddings: what must come back, float32 `[n, E]`; None: anything finite.
        batch: clips in a request.
        max_error: relative L2 distance at which an embedding is still right.
        name: of the requests in Locust's statistics.
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
    """A gRPC connection of its own, to a Triton server."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url.removeprefix(SCHEME), options=_CHANNEL_ARGS)
        self._infer = self._channel.unary_unary(
            _METHOD,
            request_serializer=None,  # bytes already
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def embed(self, body: bytes, timeout: float = TIMEOUT) -> Array:
        """Send a request and return its embeddings, float32 `[clips, E]`."""
        try:
            reply = self._infer(body, timeout=timeout)
        except grpc.RpcError as error:
            code, words = error.code(), error.details() or ""
            if code is grpc.StatusCode.UNAVAILABLE and _FULL in words:
                raise Refused("refused: as many requests are in work as the server takes") from error
            raise CallFailed(f"{code.name}: {words.splitlines()[0][:200] if words else 'no words'}") from error
        for output, content in zip(reply.outputs, reply.raw_output_contents, strict=True):
            if output.name == "embedding" and output.datatype == "FP32":
                return np.frombuffer(content, np.float32).reshape(output.shape)
        raise WrongReply("the reply has no output embedding of type FP32")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def check(reply: Array, request: Request) -> float:
    """How far a reply is from the right one: the largest relative L2 distance of its embeddings.

    Raises:
        WrongReply: It has another shape, is not finite or is too far.
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
        raise WrongReply("the embedding is not the clip's own")
    return worst


class TritonUser(User):
    """Sends requests to the Triton server at `--host grpc://HOST:PORT` and tells Locust what became of them.

    The context of Locust's `request` event has the number of `clips`, the `seconds` of audio and the `error`: the
    relative L2 distance of a right reply.
    """

    abstract = True
    connections = 1  # of each user

    def on_start(self) -> None:
        """Connect."""
        assert self.host is not None
        self._connections = [Connection(self.host) for _ in range(self.connections)]
        self._sent = 0

    def on_stop(self) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.close()

    def send(self, request: Request, due: float | None = None) -> Exception | None:
        """Send a request, wait for its reply and report it.

        Args:
            request: what to send.
            due: when it should have been sent, by `time.perf_counter`; its latency counts from there. None: now.

        Returns:
            What went wrong.
        """
        connection = self._connections[self._sent % len(self._connections)]
        self._sent += 1
        now = time.perf_counter()
        begun = now if due is None else due
        start = time.time() - (now - begun)
        failure: Exception | None = None
        error, size = 0.0, 0
        try:
            reply = connection.embed(request.body)
            took = time.perf_counter() - begun
            size = reply.nbytes
            error = check(reply, request)
        except (Refused, CallFailed, WrongReply) as exc:
            took, failure = time.perf_counter() - begun, exc
        self.environment.events.request.fire(
            request_type="gRPC",
            name=request.name,
            start_time=start,
            response_time=took * 1e3,
            response_length=size,
            exception=failure,
            context={"clips": request.clips, "seconds": request.seconds, "error": error},
        )
        return failure


@events.init.add_listener  # type: ignore[untyped-decorator]
def _use_gevent(**_: Any) -> None:
    """Let gRPC wait by gevent's loop. After the forks of `--processes`: gRPC must not have begun before."""
    # gRPC waits for each reply in a thread of this pool. Of its usual ten, the eleventh would have to wait for one.
    gevent.get_hub().threadpool.maxsize = UNDER_WAY
    grpc.experimental.gevent.init_gevent()
