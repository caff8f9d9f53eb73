"""Bad requests by name, as bytes for gRPC and for HTTP; connections that break; byte streams that are no requests."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from ecapa_triton.audio import SAMPLE_RATE as SECOND  # samples
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from export.configs import MODEL
from export.verify import MAX_ERROR
from loadtest.clips import Array
from tests.faults.judge import (
    HEADER_LENGTH,
    PATIENCE,
    Clip,
    GrpcSender,
    HttpSender,
    Outcome,
    Urls,
    http_request,
    infer_request,
)

Reference: TypeAlias = Callable[[Array], Array]  # SpeechBrain's embedding [E] of a clip [samples] alone

LONGEST = "ten minutes"  # a request that is much larger than the others
MAX_BATCH = 32  # of configs/cpu.pbtxt
CONSTANT_TOLERANCE = 2e-4  # relative L2, of loud constants, which hold no voice
TWO_62 = 1 << 62  # samples; times four bytes that is 0 modulo 2^64


@dataclass(frozen=True)
class Hostile:
    """A request, the same over both protocols.

    Attributes:
        clips: in it; one without a reference must not get an embedding.
        grpc: the message; None where gRPC cannot express it.
        http: path, header, body; None where HTTP cannot express it.
        fields: further ones of HTTP's header.
    """

    clips: list[Clip]
    grpc: bytes | None
    http: tuple[str, bytes, bytes] | None
    fields: dict[str, str] = field(default_factory=dict)

    def over_grpc(self, urls: Urls) -> Outcome:
        """Send it over a new gRPC connection."""
        assert self.grpc is not None
        with GrpcSender(urls.grpc) as sender:
            return sender.ask(self.grpc)

    def over_http(self, urls: Urls) -> Outcome:
        """Send it over a new HTTP connection."""
        assert self.http is not None
        with HttpSender(urls.http) as sender:
            return sender.post(*self.http, self.fields)

    def send(self, urls: Urls) -> Outcome:
        """Send it over gRPC, or over HTTP where gRPC cannot express it."""
        return self.over_http(urls) if self.grpc is None else self.over_grpc(urls)


def send_part(urls: Urls, waveform: Array, size: int, *, reset: bool) -> None:
    """Send the first `size` bytes of the body of an HTTP request for a clip `[samples]`, then close the connection.

    Args:
        urls: of the server.
        waveform: float32 `[samples]`.
        size: bytes; negative: all but so many.
        reset: close it by a reset.
    """
    host, _, port = urls.http.rpartition(":")
    path, header, body = http_request(infer_request(waveform[np.newaxis]))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(header) + len(body)}\r\n"
        f"{HEADER_LENGTH}: {len(header)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + (header + body)[:size])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class SlowSender(AbstractContextManager["SlowSender"]):
    """A client that has sent the header of an inference request and half of its body."""

    def __init__(self, url: str, path: str, body: bytes, *, grpc: bool, field: str = f"{HEADER_LENGTH}: 0") -> None:
        """Connects and sends; `body` is gRPC's message or HTTP's body, `field` a line of HTTP's header."""
        host, port = url.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=PATIENCE)
        self._grpc = grpc
        if grpc:  # HTTP/2 by hand: settings, then the header without compression
            fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
            fields["content-type"] = "application/grpc"
            block = b"".join(
                bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
                for name, value in fields.items()
            )
            begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 4, 1, block)
            body = struct.pack(">?I", False, len(body)) + body
        else:
            begin = f"POST {path} HTTP/1.1\r\nHost: x\r\n{field}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        self.socket.sendall(begin)
        self.send(body[: len(body) // 2])

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Sends more of the body."""
        self.socket.sendall(_frame(0, 0, 1, data) if self._grpc else data)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def requests(reference: Reference, max_samples: int = 30 * SECOND) -> dict[str, Hostile]:
    """Every bad request that leaves the server up, by name; the model takes `max_samples` of a clip."""
    random = np.random.default_rng(2)
    speech = (random.standard_normal(SECOND) * 0.1).astype(np.float32)
    wave = speech[np.newaxis]
    data = wave.tobytes()

    def request(clips: list[Clip], message: pb.ModelInferRequest) -> Hostile:
        return Hostile(clips, message.SerializeToString(), http_request(message))

    def rejected(waveform: Array) -> Hostile:
        clips = [Clip("no embedding", clip, None) for clip in np.atleast_2d(waveform)]
        return request(clips, infer_request(np.atleast_2d(waveform)))

    def with_sample(value: float) -> Hostile:
        return rejected(np.where(np.arange(SECOND) == 500, np.float32(value), speech))

    def right(waveform: Array, tolerance: float = MAX_ERROR) -> Hostile:
        rows = np.atleast_2d(waveform)
        clips = [Clip(f"row {n}", row, reference(row[:max_samples]), tolerance) for n, row in enumerate(rows)]
        return request(clips, infer_request(rows))

    def batch(clips: int) -> Hostile:
        return right((random.standard_normal((clips, 8000)) * 0.1).astype(np.float32))

    none = [Clip("no embedding", speech, None)]

    def bad(**changes: Any) -> Hostile:
        return request(none, infer_request(wave, **changes))

    def added(tensor: str, datatype: str, values: Array | NDArray[np.int32]) -> Hostile:
        message = infer_request(wave)
        message.inputs.add(name=tensor, datatype=datatype, shape=values.shape)
        message.raw_input_contents.append(values.tobytes())
        return request(none, message)

    def grpc_only(message: bytes) -> Hostile:
        return Hostile(none, message, None)

    def http_only(header: bytes, body: bytes = b"", fields: dict[str, str] | None = None) -> Hostile:
        return Hostile(none, None, (path, header, body), fields or {})

    good = infer_request(wave)
    path, header, _ = http_request(good)
    message = good.SerializeToString()
    no_input = pb.ModelInferRequest(model_name=MODEL)
    no_contents = pb.ModelInferRequest(model_name=MODEL, inputs=good.inputs)
    return {
        "an empty clip": rejected(speech[:0]),
        "three empty clips": rejected(np.zeros((3, 0), np.float32)),
        "1 sample": rejected(speech[:1]),
        "100 samples": rejected(speech[:100]),
        "639 samples": rejected(speech[:639]),
        "a sample is NaN": with_sample(np.nan),
        "a sample is Inf": with_sample(np.inf),
        "a sample is -Inf": with_sample(-np.inf),
        "a sample is 1e30": with_sample(1e30),
        "all samples are NaN": rejected(np.full(SECOND, np.nan, np.float32)),
        "denormal samples": right((random.standard_normal(SECOND) * 1e-40).astype(np.float32)),
        "a constant": right(np.full(SECOND, 0.5, np.float32), CONSTANT_TOLERANCE),
        "silence": right(np.zeros(SECOND, np.float32)),
        LONGEST: right(np.resize(speech, 600 * SECOND)),
        "two clips in a request": batch(2),
        "as many clips as a batch takes": batch(MAX_BATCH),
        "one clip more than a batch takes": batch(MAX_BATCH + 1),
        "no clip of one second": request([], infer_request(np.zeros((0, SECOND), np.float32))),
        "type INT32": bad(datatype="INT32"),
        "type FP64": bad(datatype="FP64"),
        "an unknown type": bad(datatype="FLOAT"),
        "rank 1": bad(shape=[SECOND]),
        "rank 3": bad(shape=[1, 1, SECOND]),
        "another input's name": bad(name="audio"),
        "no input": request(none, no_input),
        "the input twice": added("waveform", "FP32", wave),
        "lengths sent along": added("lengths", "INT32", np.array([[5]], np.int32)),
        "a byte too few": bad(raw=data[:-1]),
        "a sample too few": bad(raw=data[:-4]),
        "a sample too many": bad(raw=data + b"1234"),
        "no bytes": bad(raw=b""),
        "shape [1, -1]": bad(shape=[1, -1]),
        "shape [1, -16000]": bad(shape=[1, -SECOND]),
        "shape [-1, 0]": bad(shape=[-1, 0], raw=b""),
        "shape [1, 2^62], one second of bytes": bad(shape=[1, TWO_62]),
        "shape [2^62 + 1, 16000], one second of bytes": request(
            right(speech).clips, infer_request(wave, shape=[TWO_62 + 1, SECOND])
        ),
        "an unknown output": bad(output="secret"),
        "an unknown model": bad(model="nobody"),
        "an unknown version": bad(version="7"),
        "a version that is no number": bad(version="x"),
        "no tensor contents": grpc_only(no_contents.SerializeToString()),
        "half a message": grpc_only(message[: len(message) // 2]),
        "random bytes for a message": grpc_only(np.random.default_rng(0).bytes(1000)),
        "an empty message": grpc_only(b""),
        "broken JSON": http_only(b'{"inputs":['),
        "100,000 brackets for JSON": http_only(b"[" * 100_000),
        "words for samples": http_only(
            b'{"inputs":[{"name":"waveform","shape":[1,2],"datatype":"FP32","data":["a","b"]}]}'
        ),
        "a terabyte announced": http_only(header.replace(b"%d" % len(data), b"%d" % 10**12), data),
        "a header longer than the body": http_only(header, data, {HEADER_LENGTH: str(10**9)}),
        "a negative header length": http_only(header, data, {HEADER_LENGTH: "-5"}),
        "a header length that is no number": http_only(header, data, {HEADER_LENGTH: "abc"}),
        "not gzip, as announced": http_only(header, data, {"Content-Encoding": "gzip"}),
    }


# Byte streams for all three ports.
_POST = b"POST /v2/models/ecapa/infer HTTP/1.1\r\nHost: x\r\n"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAMS = {
    "random bytes": np.random.default_rng(3).bytes(4096),
    "zeros": bytes(4096),
    "half an HTTP/2 preface": _PREFACE[:12],
    "an HTTP/2 frame of 16 MB announced": _PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + b"x" * 100,
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + np.random.default_rng(4).bytes(190),
    "a request line that does not end": _POST + b"Content-Le",
    "a petabyte announced": _POST + b"Content-Length: 1000000000000000\r\n\r\nabc",
    "a negative length": _POST + b"Content-Length: -1\r\n\r\nabc",
    "a header of 3 MB": b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n",
}
