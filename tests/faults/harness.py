"""Clips with SpeechBrain's word on them, ways to send them, and the tally that every reply goes through."""

from __future__ import annotations

import http.client
import json
import math
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
from ecapa_triton import EcapaError, SpeakerClient
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from export.verify import MAX_ERROR, difference
from server.triton import choose_ports

ROOT = Path(__file__).parents[2]
SECOND = 16_000  # samples
PATIENCE = 120  # s that anything may take before it counts as stuck
METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each client
    ("grpc.max_reconnect_backoff_ms", 500),
]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Refusal:
    """An answer without an embedding: gRPC's status or HTTP's, or the client's exception, and its words."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"`{self.code}` {self.message}".rstrip()


REQUEST_ID = "[request id: <id_unknown>] "  # Triton puts it before some of its messages
Outcome = Array | Refusal  # embedding [n, 192] or why there is none


def words(outcome: Outcome) -> str:
    """A refusal as the tables tell it."""
    return str(outcome).replace(REQUEST_ID, "") if isinstance(outcome, Refusal) else "an embedding"


@dataclass(frozen=True)
class Clip:
    """A clip and the embedding that it must get; None where it must get none."""

    name: str
    waveform: Array  # [samples], 16 kHz
    reference: Array | None
    tolerance: float = MAX_ERROR  # relative L2

    def is_right(self, row: Array) -> bool:
        return self.reference is not None and difference(row, self.reference)[0] < self.tolerance


class Tally:
    """Counts what was sent and what came of it, and keeps every reply that was neither right nor refused."""

    def __init__(self, pool: Sequence[Clip]) -> None:
        self.pool = pool
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def fault(self, number: int = 1) -> None:
        """A fault was injected."""
        with self._lock:
            self.counts["faults"] += number

    def check(self, clip: Clip, outcome: Outcome, *, recovered: bool = False) -> str:
        """Judges the reply to one clip: "right", "refused" or "wrong"."""
        return self.check_batch([clip], outcome, recovered=recovered)

    def check_batch(self, clips: Sequence[Clip], outcome: Outcome, *, recovered: bool = False) -> str:
        """Judges the reply to a request of several clips by its worst row."""
        if isinstance(outcome, Refusal):
            verdicts = [("refused", outcome.code)]
        elif len(outcome) != len(clips):
            verdicts = [("wrong", f"{len(outcome)} rows for {len(clips)} clips")]
        else:
            verdicts = [self._judge(clip, row) for clip, row in zip(clips, outcome, strict=True)]
        verdict, detail = max(verdicts, key=lambda found: ("right", "refused", "wrong").index(found[0]))
        with self._lock:
            self.counts["requests"] += 1
            self.counts[verdict] += 1
            self.counts["recovered"] += recovered and verdict == "right"
            if verdict == "refused":
                self.refusals[detail] += 1
            if verdict == "wrong":
                self.wrong.append(detail)
        return verdict

    def _judge(self, clip: Clip, row: Array) -> tuple[str, str]:
        if np.isnan(row).all():
            return "refused", "NaN"
        if clip.is_right(row):
            return "right", ""
        if not np.isfinite(row).all():
            return "wrong", f"{clip.name} got an embedding that is partly not finite"
        known = [other for other in self.pool if other.reference is not None]
        nearest = min(known, key=lambda other: difference(row, other.reference)[0])  # type: ignore[arg-type]
        error = difference(row, nearest.reference)[0]  # type: ignore[arg-type]
        return "wrong", f"{clip.name} got an embedding that is {error:.1e} from that of {nearest.name}"

    def __str__(self) -> str:
        names = "requests", "right", "refused", "wrong", "faults", "recovered"
        table = [" ".join(f"{name:>10}" for name in names), " ".join(f"{self.counts[name]:10,}" for name in names)]
        if self.refusals:
            table.append("refused: " + ", ".join(f"{number:,} {code}" for code, number in self.refusals.most_common()))
        return "\n".join([*table, *(f"WRONG: {line}" for line in self.wrong[:20])])


# --- requests ---


def infer_request(waveform: Array, **changes: Any) -> pb.ModelInferRequest:
    """Triton's request for clips [n, samples]; `changes` are its faults: shape, name, datatype, raw, model, version."""
    request = pb.ModelInferRequest(model_name=changes.get("model", "ecapa"), model_version=changes.get("version", ""))
    tensor = request.inputs.add(name=changes.get("name", "waveform"), datatype=changes.get("datatype", "FP32"))
    tensor.shape.extend(changes.get("shape", waveform.shape))
    request.raw_input_contents.append(changes.get("raw", waveform.tobytes()))
    return request


class GrpcSender:
    """Triton's gRPC protocol with nothing around it: any bytes can be sent."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url, options=CHANNEL)
        self._call = self._channel.unary_unary(METHOD)

    def __enter__(self) -> GrpcSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def start(self, clip: Array | bytes, timeout: float = PATIENCE) -> Any:
        """Sends a clip [samples] or the bytes of a request, and returns gRPC's future."""
        data = clip if isinstance(clip, bytes) else infer_request(clip[np.newaxis]).SerializeToString()
        return self._call.future(data, timeout=timeout)

    def ask(self, clip: Array | bytes, timeout: float = PATIENCE) -> Outcome:
        return grpc_outcome(self.start(clip, timeout))


def grpc_outcome(call: Any) -> Outcome:
    """What came of a call, however it ended."""
    try:
        reply = pb.ModelInferResponse.FromString(call.result())
    except grpc.FutureCancelledError:
        return Refusal("CANCELLED", "")
    except grpc.RpcError as error:
        return Refusal(error.code().name, error.details() or "")
    (index,) = (i for i, output in enumerate(reply.outputs) if output.name == "embedding")
    if reply.outputs[index].datatype != "FP32":
        return Refusal(reply.outputs[index].datatype, "is no embedding")
    return np.frombuffer(reply.raw_output_contents[index], np.float32).reshape(reply.outputs[index].shape)


class HttpSender:
    """Triton's HTTP protocol over one kept connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url, timeout=PATIENCE)

    def __enter__(self) -> HttpSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def ask(self, clip: Array, timeout: float = PATIENCE) -> Outcome:
        return self.post(*http_request(clip[np.newaxis]))

    def post(self, header: bytes, body: bytes, path: str = "/v2/models/ecapa/infer", **more: str) -> Outcome:
        headers = {"Inference-Header-Content-Length": str(len(header))}
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        try:
            self._connection.request("POST", path, header + body, headers)
            response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens it again
            return Refusal(type(error).__name__, "")
        if response.status != http.HTTPStatus.OK:
            return Refusal(str(response.status), json.loads(data)["error"] if data else "")
        split = int(response.headers.get("Inference-Header-Content-Length", len(data)))
        output = next(item for item in json.loads(data[:split])["outputs"] if item["name"] == "embedding")
        values = output.get("data", np.frombuffer(data[split:], np.float32, int(np.prod(output["shape"]))))
        return np.asarray(values, np.float32).reshape(output["shape"])


def http_request(waveform: Array, **changes: Any) -> tuple[bytes, bytes]:
    """JSON header and binary body for clips [n, samples], with the faults of `infer_request`."""
    raw = changes.get("raw", waveform.tobytes())
    tensor = {
        "name": changes.get("name", "waveform"),
        "shape": list(changes.get("shape", waveform.shape)),
        "datatype": changes.get("datatype", "FP32"),
        "parameters": {"binary_data_size": changes.get("size", len(raw))},
    }
    outputs = [{"name": changes.get("output", "embedding"), "parameters": {"binary_data": True}}]
    return json.dumps({"inputs": [tensor], "outputs": outputs}).encode(), raw


class ClientSender:
    """This project's client; it hands out no NaN, so each of its embeddings must be right."""

    def __init__(self, url: str, retries: int = 0) -> None:
        self.client = SpeakerClient(url, timeout=PATIENCE, retries=retries)

    def __enter__(self) -> ClientSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    def ask(self, clip: Array, timeout: float = PATIENCE) -> Outcome:
        try:
            embedding = self.client.embed(clip, long="truncate")
        except EcapaError as error:
            return Refusal(type(error).__name__, str(error))
        assert np.isfinite(embedding).all(), "SpeakerClient handed out an embedding that is not finite"
        return np.asarray(embedding[np.newaxis])


Sender = GrpcSender | HttpSender | ClientSender


@dataclass(frozen=True)
class Urls:
    """Where a server listens."""

    grpc: str
    http: str
    metrics: str

    @classmethod
    def of(cls, server: Any) -> Urls:
        return cls(server.grpc_url, server.http_url, server.metrics_url)

    def senders(self) -> list[Callable[[], Sender]]:
        """One of each kind."""
        return [lambda: GrpcSender(self.grpc), lambda: HttpSender(self.http), lambda: ClientSender(self.grpc)]


def shuffled(clips: Iterable[Clip], seed: int) -> list[Clip]:
    mixed = list(clips)
    random.Random(seed).shuffle(mixed)
    return mixed


def all_at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that each have a thread of their own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


# --- the server seen from outside ---


def metric(urls: Urls, name: str) -> float:
    """The value of one of Triton's metrics for the model; NaN while it is not on the page."""
    with urlopen(urls.metrics, timeout=PATIENCE) as page:
        lines = page.read().decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")), math.nan)


def pending(urls: Urls) -> float:
    """Requests that wait for execution."""
    return metric(urls, "nv_inference_pending_request_count")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Waits for what has no event to wait on: something in another process."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for: {what}"
        time.sleep(0.02)


def wait_until_drained(urls: Urls) -> None:
    wait_until(lambda: pending(urls) == 0, "an empty queue")


def wait_until_queued(urls: Urls, number: int) -> None:
    """Waits until so many requests are in the queue of a held model, and no more come in."""
    wait_until(lambda: pending(urls) >= number, f"{number} requests in the queue")
    seen = [-1.0]
    while seen[-5:] != [seen[-1]] * 5:
        time.sleep(0.05)
        seen.append(pending(urls))


def assert_right(urls: Urls, clips: Sequence[Clip], tally: Tally) -> None:
    """The queue drains, and senders of every kind are answered right."""
    wait_until_drained(urls)
    for connect in urls.senders():
        with connect() as sender:
            for clip in clips:
                assert tally.check(clip, sender.ask(clip.waveform), recovered=True) == "right"


def changed_backend(folder: Path, change: str) -> Path:
    """A copy of the backends for `server.wheel.BACKENDS`, with code at its end that changes the model's class."""
    backends = Path(shutil.copytree(ROOT / "server/backends", folder / "server/backends"))
    with (backends / "onnxruntime/model.py").open("a") as model:
        model.write(change)
    return backends


class Gate:
    """A backend in which a model waits while `hold` lasts, so that what is sent stays in the queue or in execution."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "hold"
        self.backends = changed_backend(folder, HELD.format(file=self._file))

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._file.touch()
        try:
            yield
        finally:
            self._file.unlink()


HELD = """
import time
_execute = TritonPythonModel.execute

def _execute_when_let(self, requests):
    while Path("{file}").exists():
        time.sleep(0.01)
    return _execute(self, requests)

TritonPythonModel.execute = _execute_when_let
"""


@dataclass
class Load:
    """Senders that go on, each in its thread, while the block runs; every reply goes through `check`."""

    senders: Sequence[Callable[[], Sender]]
    clips: Sequence[Clip]
    check: Callable[[Clip, Outcome], str]
    verdicts: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Load:
        self._changed = threading.Condition()
        self._stop = False
        self._pool = ThreadPoolExecutor(len(self.senders))
        self._running = [self._pool.submit(self._run, *item) for item in enumerate(self.senders)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._pool.shutdown()
        for future in self._running:
            future.result()

    def wait_for_more(self, number: int, verdict: str = "right") -> None:
        """Waits until so many further replies have this verdict."""
        with self._changed:
            goal = self.verdicts[verdict] + number
            reached = self._changed.wait_for(lambda: self.verdicts[verdict] >= goal, PATIENCE)
        assert reached, f"{number} further {verdict} replies did not come, only {dict(self.verdicts)}"

    def _run(self, seed: int, connect: Callable[[], Sender]) -> None:
        with connect() as sender:
            while not self._stop:
                for clip in shuffled(self.clips, seed):
                    verdict = self.check(clip, sender.ask(clip.waveform))
                    with self._changed:
                        self.verdicts[verdict] += 1
                        self._changed.notify_all()
                    if self._stop:
                        break
                    if verdict == "refused":
                        time.sleep(0.02)  # a server that is away refuses thousands a second


WITH_BACKENDS = """
import sys
from pathlib import Path
from server import __main__, wheel
wheel.BACKENDS = Path(sys.argv.pop(1))
sys.exit(__main__.main(sys.argv[1:]))
"""


class ServerCommand:
    """`python -m server` in a process of its own."""

    def __init__(self, repository: Path, backends: Path | None = None, *, gateway: bool = False) -> None:
        chosen = choose_ports(dict.fromkeys(["grpc", "http", "metrics"], ("127.0.0.1", 0)))
        self.urls = Urls(
            f"127.0.0.1:{chosen['grpc'][1]}",
            f"127.0.0.1:{chosen['http'][1]}",
            f"http://127.0.0.1:{chosen['metrics'][1]}/metrics",
        )
        listen = [f"--{api}-port={port}" for api, (_, port) in chosen.items()]
        command = ["-m", "server"] if backends is None else ["-c", WITH_BACKENDS, str(backends)]
        self._command = [sys.executable, *command, f"--repository={repository}", "--device=cpu", *listen]
        self._command.append(f"--gateway={'on' if gateway else 'off'}")
        self._changed = threading.Condition()
        self.lines: list[str] = []  # what it has said

    def __enter__(self) -> ServerCommand:
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.wait_for_start(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def starts(self) -> int:
        """How often it has become ready."""
        return sum(line.startswith("ready") for line in self.lines)

    def wait_for_start(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.starts >= number, PATIENCE), self.lines

    def stop(self) -> int:
        """Tells it to stop and returns its exit status."""
        self.process.terminate()
        self._reader.join()
        return self.process.wait()

    def tritonserver(self) -> int:
        """Process id of tritonserver."""
        return self._child("tritonserver")

    def nginx(self) -> int:
        """Process id of nginx's master process."""
        return self._child("nginx")

    def _child(self, name: str) -> int:
        (pid,) = (pid for pid in _children(self.process.pid) if Path(f"/proc/{pid}/comm").read_text().strip() == name)
        return pid

    def stub(self) -> int:
        """Process id of the process in which the model runs."""
        processes = _descendants(self.tritonserver())
        (stub,) = (pid for pid in processes if "backend_stub" in Path(f"/proc/{pid}/cmdline").read_text())
        return stub

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)
