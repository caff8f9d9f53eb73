"""An in-process gRPC server that speaks Triton's protocol, misbehaves on demand, and holds replies until released."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

SIZE = 192
MODEL = "0123456789abcdeffedcba98"
PATIENCE = 60  # s, for events that a working client brings about at once
Answer = Callable[["FakeTriton", np.ndarray], "dict[str, np.ndarray]"]


@dataclass
class Refusal(Exception):
    status: grpc.StatusCode
    detail: str


def fingerprint(waveform: np.ndarray) -> np.ndarray:
    """An embedding that tells clips apart: projections on fixed directions, and the length."""
    rng = np.random.default_rng(0)
    row = np.resize(waveform, 640) @ rng.standard_normal((640, SIZE)) * 1000
    row[0] = len(waveform)
    return row.astype(np.float32)


def model_info(*limits: float, model: str = MODEL) -> np.ndarray:
    """Threshold, max_seconds, min_samples, and the model identity."""
    return np.array([[*limits, *(int(model[i : i + 6], 16) for i in range(0, 24, 6))]], np.float32)


def good(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    return {"embedding": fingerprint(waveform)[None], "model_info": model_info(*fake.info, model=fake.model(fake))}


def nan(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    return good(fake, waveform) | {"embedding": np.full((1, SIZE), np.nan, np.float32)}


def held(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    """The good answer, once `fake.gate` is set."""
    fake.gate.wait()
    return good(fake, waveform)


def outputs(**arrays: np.ndarray | None) -> Answer:
    """The good answer with some outputs replaced, or left out where None."""
    return lambda fake, waveform: {k: v for k, v in (good(fake, waveform) | arrays).items() if v is not None}


def refuse(status: grpc.StatusCode, detail: str) -> Answer:
    def answer(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        raise Refusal(status, detail)

    return answer


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with `answers` in turn, one a request, then with `otherwise`."""

    info: tuple[float, float, float] = (0.45, 30.0, 640.0)
    answers: list[Answer] = field(default_factory=list)
    otherwise: Answer = good
    model: Callable[[FakeTriton], str] = lambda fake: MODEL
    gate: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)
    lengths: list[int] = field(default_factory=list)  # samples of the requests seen
    times: list[float] = field(default_factory=list)  # of their arrival, s
    deadlines: list[float | None] = field(default_factory=list)  # seconds that they had left at their arrival
    busy: int = 0
    most_busy: int = 0
    ready: bool = True
    away: int = 0  # calls of ServerLive that fail
    cancelled: int = 0  # requests whose client gave up before the answer
    metadata: list[dict[str, str]] = field(default_factory=list)  # of every call
    url: str = ""

    @property
    def calls(self) -> int:
        return len(self.metadata)

    def wait_until(self, condition: Callable[[FakeTriton], object]) -> None:
        """Wait until requests have brought a condition about."""
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), PATIENCE), (self.busy, self.cancelled, self.lengths)

    def ModelInfer(self, request, context):
        if request.model_name != "ecapa":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.model_name}' is not found")
        assert [i.name for i in request.inputs] == ["waveform"]
        assert [o.name for o in request.outputs] == ["embedding", "model_info"]
        waveform = np.frombuffer(request.raw_input_contents[0], np.float32)
        assert list(request.inputs[0].shape) == [1, len(waveform)]
        answered = []

        def ended() -> None:
            with self.changed:
                self.cancelled += not answered
                self.changed.notify_all()

        context.add_callback(ended)
        with self.changed:
            self.lengths.append(len(waveform))
            self.times.append(time.monotonic())
            self.deadlines.append(context.time_remaining())
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            answer = self.answers.pop(0) if self.answers else self.otherwise
            self.changed.notify_all()
        try:
            arrays = answer(self, waveform)
        except Refusal as refusal:
            answered.append(True)
            context.abort(refusal.status, refusal.detail)
        finally:
            with self.changed:
                answered.append(True)
                self.busy -= 1
                self.changed.notify_all()
        response = service_pb2.ModelInferResponse(model_name="ecapa", model_version="1")
        for name, array in arrays.items():
            kind = {"float32": "FP32", "float64": "FP64"}[array.dtype.name]
            response.outputs.add(name=name, datatype=kind, shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response

    def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def ServerLive(self, request, context):
        if self.away:
            self.away -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def ModelMetadata(self, request, context):
        if request.name != "ecapa":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        if not self.ready:
            context.abort(
                grpc.StatusCode.UNAVAILABLE, f"Request for unknown model: '{request.name}' has no available versions"
            )
        return service_pb2.ModelMetadataResponse(name="ecapa", versions=["1", "2"])

    def ModelConfig(self, request, context):
        config = model_config_pb2.ModelConfig(name="ecapa", backend="onnxruntime", max_batch_size=3)
        config.default_model_filename = "model_fp16.onnx"
        config.parameters["precision"].string_value = "fp16"
        config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_GPU, count=2, gpus=[0, 1])
        config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
        return service_pb2.ModelConfigResponse(config=config)

    def ModelStatistics(self, request, context):
        response = service_pb2.ModelStatisticsResponse()
        for version in ("1", "2"):
            one = response.model_stats.add(name="ecapa", version=version, inference_count=12, execution_count=4)
            one.inference_stats.success.count = 10
            one.inference_stats.fail.count = 1
            one.inference_stats.queue.ns = 30_000_000
            one.inference_stats.compute_infer.ns = 100_000_000
            one.inference_stats.compute_input.ns = 10_000_000
        return response


class _Noted(grpc.ServerInterceptor):
    def __init__(self, fake: FakeTriton) -> None:
        self.fake = fake

    def intercept_service(self, continuation, details):
        self.fake.metadata.append(dict(details.invocation_metadata))
        return continuation(details)


@contextmanager
def fake_triton() -> Iterator[FakeTriton]:
    fake = FakeTriton()
    server = grpc.server(
        ThreadPoolExecutor(64),
        interceptors=[_Noted(fake)],
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield fake
    finally:
        fake.gate.set()
        server.stop(grace=None).wait()
