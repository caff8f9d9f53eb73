"""Clips with SpeechBrain's embedding of each, ways to send them, and the tally that judges every reply.

The soak test and the fault tests stand on this. A reply is right when it is the embedding of the clip that was sent,
rejected when it is an error or a row of NaN, and wrong otherwise.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import grpc
import numpy as np
from ecapa_triton import EcapaError, SpeakerClient
from ecapa_triton.protocol import CHANNEL_ARGS
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from export.configs import MODEL
from export.verify import MAX_ERROR, difference
from loadtest.clips import Array, Clips
from loadtest.machine import MeasureError

PATIENCE = 120  # s, after which anything counts as stuck
HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the binary body
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ONCE: dict[str, Any] = {"timeout": PATIENCE, "retries": 0}  # options of a client that shows the first error
CHANNEL = [*CHANNEL_ARGS, ("grpc.use_local_subchannel_pool", 1)]  # each client has its own connection


@dataclass(frozen=True)
class Rejection:
    """A reply without an embedding: gRPC's or HTTP's status, or the name of the client's exception; and the message."""

    code: str
    message: str = ""


Outcome: TypeAlias = "Array | Rejection"  # embedding [n, E] or why there is none


@dataclass(frozen=True)
class Clip:
    """A clip and the embedding that it must get.

    Attributes:
        name: in messages.
        waveform: float32 `[samples]`, 16 kHz.
        reference: its embedding `[E]`; None where it must get none.
        tolerance: relative L2 distance within which an embedding is right.
    """

    name: str
    waveform: Array
    reference: Array | None
    tolerance: float = MAX_ERROR

    def is_right(self, row: Array) -> bool:
        """Whether an embedding `[E]` is this clip's."""
        return self.reference is not None and difference(row, self.reference)[0] < self.tolerance


def check_apart(clips: Sequence[Clip]) -> None:
    """Require that no clip would take another one's embedding for its own.

    Raises:
        MeasureError: two clips are too much alike.
    """
    references = np.stack([clip.reference for clip in clips if clip.reference is not None])
    apart = Clips([], references).apart()
    if apart < 10 * MAX_ERROR:
        raise MeasureError(f"two clips have embeddings only {apart:.1e} apart: an exchange could be missed")


class Tally:
    """Counts requests and verdicts, and keeps a line on every wrong reply.

    Attributes:
        pool: clips among which the owner of a wrong embedding is looked up.
        counts: requests, right, rejected, wrong, faults and recovered.
        rejections: by code.
        wrong: a line on each wrong reply.
    """

    def __init__(self, pool: Sequence[Clip]) -> None:
        self.pool = pool
        self.counts: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def fault(self, number: int = 1) -> None:
        """Count injected faults."""
        with self._lock:
            self.counts["faults"] += number

    def check(self, clip: Clip, outcome: Outcome, *, recovered: bool = False) -> str:
        """Judge the reply to one clip: "right", "rejected" or "wrong"."""
        return self.check_batch([clip], outcome, recovered=recovered)

    def check_batch(self, clips: Sequence[Clip], outcome: Outcome, *, recovered: bool = False) -> str:
        """Judge the reply to a request of several clips by its worst row."""
        if isinstance(outcome, Rejection):
            verdicts = [("rejected", outcome.code)]
        elif len(outcome) != len(clips):
            verdicts = [("wrong", f"{len(outcome)} rows for {len(clips)} clips")]
        else:
            verdicts = [self._judge(clip, row) for clip, row in zip(clips, outcome, strict=True)]
        verdict, detail = max(verdicts, key=lambda found: ("right", "rejected", "wrong").index(found[0]))
        with self._lock:
            self.counts["requests"] += 1
            self.counts[verdict] += 1
            self.counts["recovered"] += recovered and verdict == "right"
            if verdict == "rejected":
                self.rejections[detail] += 1
            if verdict == "wrong":
                self.wrong.append(detail)
        return verdict

    def _judge(self, clip: Clip, row: Array) -> tuple[str, str]:
        if np.isnan(row).all():
            return "rejected", "NaN"
        if clip.is_right(row):
            return "right", ""
        if not np.isfinite(row).all():
            return "wrong", f"{clip.name} got an embedding that is partly not finite"
        errors = [(difference(row, one.reference)[0], one.name) for one in self.pool if one.reference is not None]
        error, owner = min(errors, default=(np.inf, "any clip"))
        return "wrong", f"{clip.name} got an embedding that is {error:.1e} from that of {owner}"

    def __str__(self) -> str:
        names = "requests", "right", "rejected", "wrong", "faults", "recovered"
        rejections = ", ".join(f"{number:,} {code}" for code, number in self.rejections.most_common())
        table = [" ".join(f"{name:>10}" for name in names), " ".join(f"{self.counts[name]:10,}" for name in names)]
        return "\n".join([*table, f"rejected: {rejections}", *(f"WRONG: {line}" for line in self.wrong[:20])])


# --- requests ---


def infer_request(waveform: NDArray[Any], **changes: Any) -> pb.ModelInferRequest:
    """Triton's request for clips `[n, samples]`, damaged by shape, name, datatype, raw, model, version or output."""
    request = pb.ModelInferRequest(model_name=changes.get("model", MODEL), model_version=changes.get("version", ""))
    tensor = request.inputs.add(name=changes.get("name", "waveform"), datatype=changes.get("datatype", "FP32"))
    tensor.shape.extend(changes.get("shape", waveform.shape))
    request.raw_input_contents.append(changes.get("raw", waveform.tobytes()))
    request.outputs.add(name=changes.get("output", "embedding"))
    return request


def http_request(request: pb.ModelInferRequest) -> tuple[str, bytes, bytes]:
    """The same request over HTTP: path, JSON header and binary body."""
    inputs = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
            "parameters": {"binary_data_size": len(raw)},
        }
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    ]
    outputs = [{"name": output.name, "parameters": {"binary_data": True}} for output in request.outputs]
    version = f"/versions/{request.model_version}" if request.model_version else ""
    path = f"/v2/models/{request.model_name}{version}/infer"
    header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    return path, header, b"".join(request.raw_input_contents)


class GrpcSender(AbstractContextManager["GrpcSender"]):
    """Triton's gRPC protocol without a client library: any bytes can be sent."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url, options=CHANNEL)
        self._call = self._channel.unary_unary(METHOD)

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def start(self, clips: Array | bytes, timeout: float = PATIENCE) -> Any:
        """Send a clip `[samples]`, clips `[n, samples]` or the bytes of a request, and return gRPC's future."""
        data = clips if isinstance(clips, bytes) else infer_request(np.atleast_2d(clips)).SerializeToString()
        return self._call.future(data, timeout=timeout)

    def ask(self, clips: Array | bytes, timeout: float = PATIENCE) -> Outcome:
        """Send and wait for the reply."""
        return grpc_outcome(self.start(clips, timeout))


def grpc_outcome(call: Any) -> Outcome:
    """The outcome of a call, however it ended."""
    try:
        reply = pb.ModelInferResponse.FromString(call.result())
    except grpc.FutureCancelledError:
        return Rejection("CANCELLED")
    except grpc.RpcError as error:
        return Rejection(error.code().name, error.details() or "")
    (output,), (content,) = reply.outputs, reply.raw_output_contents
    return np.frombuffer(content, np.float32).reshape(output.shape)


class HttpSender(AbstractContextManager["HttpSender"]):
    """Triton's HTTP protocol over one kept connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url, timeout=PATIENCE)

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, clips: Array) -> Outcome:
        """Send a clip `[samples]` or clips `[n, samples]` and wait for the reply."""
        return self.post(*http_request(infer_request(np.atleast_2d(clips))))

    def post(self, path: str, header: bytes, body: bytes, fields: Mapping[str, str] | None = None) -> Outcome:
        """Send header and body with further fields of HTTP's header."""
        headers = {HEADER_LENGTH: str(len(header)), **(fields or {})}
        try:
            self._connection.request("POST", path, header + body, headers)
            response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens it again
            return Rejection(type(error).__name__)
        if response.status != http.HTTPStatus.OK:
            return Rejection(str(response.status), data.decode(errors="replace"))
        split = int(response.headers.get(HEADER_LENGTH, len(data)))
        (output,) = json.loads(data[:split])["outputs"]
        return np.frombuffer(data[split:], np.float32).reshape(output["shape"])


class ClientSender(AbstractContextManager["ClientSender"]):
    """This project's client with these options; it hands out no NaN, so each of its embeddings must be right."""

    def __init__(self, url: str, **options: Any) -> None:
        self._client = SpeakerClient(url, **options)

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, clip: Array) -> Outcome:
        """Send a clip `[samples]` and wait for the reply."""
        try:
            embedding = self._client.embed(clip, long="truncate")
        except EcapaError as error:
            return Rejection(type(error).__name__, str(error))
        assert np.isfinite(embedding).all(), "SpeakerClient handed out an embedding that is not finite"
        return embedding[np.newaxis]


Sender: TypeAlias = GrpcSender | HttpSender | ClientSender


class Urls(NamedTuple):
    """Addresses of a server."""

    grpc: str
    http: str
    metrics: str

    @classmethod
    def of(cls, server: Any) -> Urls:
        """Those of a TritonServer."""
        return cls(server.grpc_url, server.http_url, server.metrics_url)

    def senders(self) -> list[Callable[[], Sender]]:
        """One of each kind."""
        return [lambda: GrpcSender(self.grpc), lambda: HttpSender(self.http), lambda: ClientSender(self.grpc, **ONCE)]


def shuffled(clips: Sequence[Clip], seed: int) -> list[Clip]:
    """The clips in another order."""
    return random.Random(seed).sample(clips, len(clips))


@dataclass
class Traffic:
    """Senders that send clips, each in its thread, while the block runs; every reply goes through `check`.

    Attributes:
        senders: that connect, one for each thread.
        clips: that each sends over and over, shuffled.
        check: judges a reply, as `Tally.check`.
        verdicts: counted.
    """

    senders: Sequence[Callable[[], Sender]]
    clips: Sequence[Clip]
    check: Callable[[Clip, Outcome], str]
    verdicts: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Traffic:
        self._changed = threading.Condition()
        self._stop = False
        self._pool = ThreadPoolExecutor(len(self.senders))
        self._running = [self._pool.submit(self._run, *item) for item in enumerate(self.senders)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._pool.shutdown()
        for future in self._running:
            future.result()

    def wait_for_more(self, number: int, verdict: str = "right") -> None:
        """Wait until so many further replies have this verdict."""
        with self._changed:
            goal = self.verdicts[verdict] + number
            reached = self._changed.wait_for(lambda: self.verdicts[verdict] >= goal, PATIENCE)
        assert reached, f"expected {number} further {verdict} replies within {PATIENCE} s, got {dict(self.verdicts)}"

    def _run(self, seed: int, connect: Callable[[], Sender]) -> None:
        with connect() as sender:
            for clip in itertools.cycle(shuffled(self.clips, seed)):
                if self._stop:
                    return
                verdict = self.check(clip, sender.ask(clip.waveform))
                with self._changed:
                    self.verdicts[verdict] += 1
                    self._changed.notify_all()
                if verdict == "rejected":
                    time.sleep(0.02)  # a stopped server rejects thousands per second
