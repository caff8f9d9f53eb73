"""Bad requests by name, as bytes for gRPC and for HTTP; connections that break; byte streams that are no requests."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from ecapa_triton.audio import SAMPLE_RATE as SECOND  # samples

from .clips import Array
from .judge import PATIENCE, Clip, GrpcSender, HttpSender, Outcome, Urls, http_request, infer_request

Reference: TypeAlias = Callable[[Array], Array]  # SpeechBrain's embedding [E] of a clip [samples] alone
Http: TypeAlias = tuple[bytes, bytes, str, dict[str, str]]  # header, body, path, further header fields

INFER = "/v2/models/ecapa/infer"
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
        http: None where HTTP cannot express it.
    """

    clips: list[Clip]
    grpc: bytes | None
    http: Http | None

    def over_grpc(self, urls: Urls) -> Outcome:
        """Send it over a new gRPC connection."""
        assert self.grpc is not None
        with GrpcSender(urls.grpc) as sender:
            return sender.ask(self.grpc)

    def over_http(self, urls: Urls) -> Outcome:
        """Send it over a new HTTP connection."""
        assert self.http is not None
        header, body, path, fields = self.http
        with HttpSender(urls.http) as sender:
            return sender.post(header, body, path, **fields)

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
    header, body = http_request(waveform[np.newaxis])
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(header) + len(body)}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + (header + body)[:size])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def requests(reference: Reference, max_samples: int = 30 * SECOND) -> dict[str, Hostile]:
    """Every bad request that leaves the server up, by name; the model takes `max_samples` of a clip."""
    random = np.random.default_rng(2)
    speech = (random.standard_normal(SECOND) * 0.1).astype(np.float32)
    wave = speech[np.newaxis]
    data = wave.tobytes()

    def none(samples: Array) -> Clip:
        return Clip("no embedding", samples, None)

    def with_sample(value: float) -> Array:
        samples = speech.copy()
        samples[500] = value
        return samples

    def alone(clip: Clip) -> Hostile:
        return changed([clip], clip.waveform[np.newaxis])

    def changed(clips: list[Clip], waveform: Array = wave, **changes: Any) -> Hostile:
        header, body = http_request(waveform, **changes)
        version = f"/versions/{changes['version']}" if "version" in changes else ""
        path = f"/v2/models/{changes.get('model', 'ecapa')}{version}/infer"
        request = infer_request(waveform, **changes)
        if "output" in changes:
            request.outputs.add(name=changes["output"])
        return Hostile(clips, request.SerializeToString(), (header, body, path, {}))

    def bad(**changes: Any) -> Hostile:
        return changed([none(speech)], **changes)

    def grpc_only(request: bytes) -> Hostile:
        return Hostile([none(speech)], request, None)

    def http_only(header: bytes, body: bytes, **fields: str) -> Hostile:
        return Hostile([none(speech)], None, (header, body, INFER, fields))

    def batch(clips: int) -> Hostile:
        rows = (random.standard_normal((clips, 8000)) * 0.1).astype(np.float32)
        return changed([Clip(f"row {i}", row, reference(row)) for i, row in enumerate(rows)], rows)

    minutes = np.resize(speech, 600 * SECOND)
    denormal = (random.standard_normal(SECOND) * 1e-40).astype(np.float32)
    constant = np.full(SECOND, 0.5, np.float32)
    silence = np.zeros(SECOND, np.float32)
    good = infer_request(wave)
    twice, other, no_input, no_raw = (type(good).FromString(good.SerializeToString()) for _ in range(4))
    twice.inputs.append(good.inputs[0])
    twice.raw_input_contents.append(data)
    other.inputs.add(name="lengths", datatype="INT32", shape=[1, 1])
    other.raw_input_contents.append(np.int32(5).tobytes())
    del no_input.inputs[:], no_input.raw_input_contents[:]
    del no_raw.raw_input_contents[:]
    header, _ = http_request(wave)

    def http_inputs(*inputs: tuple[str, str, list[int], int]) -> bytes:
        tensors = [
            {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
            for name, datatype, shape, size in inputs
        ]
        return json.dumps({"inputs": tensors}).encode()

    waveform = "waveform", "FP32", [1, SECOND], len(data)
    return {
        "an empty clip": alone(none(speech[:0])),
        "three empty clips": changed([none(speech[:0])] * 3, np.zeros((3, 0), np.float32)),
        "1 sample": alone(none(speech[:1])),
        "100 samples": alone(none(speech[:100])),
        "639 samples": alone(none(speech[:639])),
        "a sample is NaN": alone(none(with_sample(np.nan))),
        "a sample is Inf": alone(none(with_sample(np.inf))),
        "a sample is -Inf": alone(none(with_sample(-np.inf))),
        "a sample is 1e30": alone(none(with_sample(1e30))),
        "all samples are NaN": alone(none(np.full(SECOND, np.nan, np.float32))),
        "denormal samples": alone(Clip("denormal", denormal, reference(denormal))),
        "a constant": alone(Clip("constant", constant, reference(constant), CONSTANT_TOLERANCE)),
        "silence": alone(Clip("silence", silence, reference(silence))),
        LONGEST: alone(Clip(LONGEST, minutes, reference(minutes[:max_samples]))),
        "two clips in a request": batch(2),
        "as many clips as a batch takes": batch(MAX_BATCH),
        "one clip more than a batch takes": batch(MAX_BATCH + 1),
        "no clip of one second": changed([], np.zeros((0, SECOND), np.float32)),
        "type INT32": bad(datatype="INT32"),
        "type FP64": bad(datatype="FP64"),
        "an unknown type": bad(datatype="FLOAT"),
        "rank 1": bad(shape=[SECOND]),
        "rank 3": bad(shape=[1, 1, SECOND]),
        "another input's name": bad(name="audio"),
        "no input": Hostile(
            [none(speech)], no_input.SerializeToString(), (json.dumps({"inputs": []}).encode(), b"", INFER, {})
        ),
        "the input twice": Hostile(
            [none(speech)], twice.SerializeToString(), (http_inputs(waveform, waveform), 2 * data, INFER, {})
        ),
        "lengths sent along": Hostile(
            [none(speech)],
            other.SerializeToString(),
            (http_inputs(waveform, ("lengths", "INT32", [1, 1], 4)), data + np.int32(5).tobytes(), INFER, {}),
        ),
        "a byte too few": bad(raw=data[:-1]),
        "a sample too few": bad(raw=data[:-4]),
        "a sample too many": bad(raw=data + b"1234"),
        "no bytes": bad(raw=b""),
        "shape [1, -1]": bad(shape=[1, -1]),
        "shape [1, -16000]": bad(shape=[1, -SECOND]),
        "shape [-1, 0]": bad(shape=[-1, 0], raw=b""),
        "shape [1, 2^62], one second of bytes": bad(shape=[1, TWO_62]),
        "shape [2^62 + 1, 16000], one second of bytes": changed(
            [Clip("speech", speech, reference(speech))], shape=[TWO_62 + 1, SECOND]
        ),
        "an unknown output": bad(output="secret"),
        "an unknown model": bad(model="nobody"),
        "an unknown version": bad(version="7"),
        "a version that is no number": bad(version="x"),
        "no tensor contents": grpc_only(no_raw.SerializeToString()),
        "half a message": grpc_only(good.SerializeToString()[: good.ByteSize() // 2]),
        "random bytes for a message": grpc_only(np.random.default_rng(0).bytes(1000)),
        "an empty message": grpc_only(b""),
        "broken JSON": http_only(b'{"inputs":[', b""),
        "100,000 brackets for JSON": http_only(b"[" * 100_000, b""),
        "words for samples": http_only(
            b'{"inputs":[{"name":"waveform","shape":[1,2],"datatype":"FP32","data":["a","b"]}]}', b""
        ),
        "a terabyte announced": http_only(http_request(wave, size=10**12)[0], data),
        "a header longer than the body": http_only(header, data, Inference_Header_Content_Length=str(10**9)),
        "a negative header length": http_only(header, data, Inference_Header_Content_Length="-5"),
        "a header length that is no number": http_only(header, data, Inference_Header_Content_Length="abc"),
        "not gzip, as announced": http_only(header, data, Content_Encoding="gzip"),
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
