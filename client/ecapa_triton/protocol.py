"""The wire contract: build a request, read a reply. Pure functions, no connection."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import InferenceServerException

from .audio import SAMPLE_RATE, Waveform
from .errors import ProtocolError

SCHEME, TLS_SCHEME = "grpc://", "grpcs://"
KEY_HEADER = "api-key"  # HTTP header of a key
GRPC_KEY_HEADER = f"triton-grpc-protocol-{KEY_HEADER}"  # the same in gRPC metadata, with Triton's prefix

CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),  # the client limits the length of a clip before it is sent
    ("grpc.max_receive_message_length", 16 << 20),  # bytes; the largest reply is that of the model's config
    # Find a restarted server soon: gRPC's own backoff grows to two minutes.
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the longest attempt to connect
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # gRPC would send to a vanished machine for a quarter of an hour. With keepalive, a connection ends when sent bytes
    # are not acknowledged in 10 s. Pings are rare, as gRPC servers end connections with more than one ping in 300 s.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),  # gRPC would send clips, even those for 127.0.0.1, through $http_proxy
    ("grpc.lb_policy_name", "round_robin"),  # spread requests over all servers of a name or a list
]


@dataclass(frozen=True)
class ModelInfo:
    """Constants of a model, part of each of its replies.

    Attributes:
        threshold: Cosine above which two clips are of one speaker; None where the model has none.
        max_seconds: Longest clip in seconds; the model ignores samples beyond.
        min_samples: Shortest clip in samples at 16 kHz.
        id: Model identity: the first 24 hexadecimal digits of the SHA-256 of the weights.
    """

    threshold: float | None
    max_seconds: float
    min_samples: int
    id: str

    @property
    def max_samples(self) -> int:
        """`max_seconds` in samples at 16 kHz."""
        return round(self.max_seconds * SAMPLE_RATE)


# The defaults of an export: a guess of how much to read before the first reply.
USUAL = ModelInfo(threshold=None, max_seconds=30.0, min_samples=640, id="")


@dataclass(frozen=True)
class Reply:
    """Reply for one clip: `embedding` float32 [dims], all NaN where a guard rejected the clip."""

    embedding: Waveform
    info: ModelInfo

    @property
    def finite(self) -> bool:
        """Whether the reply has an embedding."""
        return bool(np.isfinite(self.embedding).all())


@dataclass(frozen=True)
class Statistics:
    """Triton's counters of a model since it was loaded, summed over its versions.

    Attributes:
        requests: Requests answered.
        failures: Requests that Triton counts as failed; those rejected at a full queue are not included.
        executions: Executions of the model; each serves a batch of requests.
        mean_batch: Clips per execution; NaN before the first.
        queue_ms: Mean milliseconds of a request in the queue; NaN before the first.
        compute_ms: Mean milliseconds of a request in the model, copies included; NaN before the first.
    """

    requests: int
    failures: int
    executions: int
    mean_batch: float
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Deployment:
    """How a model is served, according to its config.

    Attributes:
        backend: Name of the Triton backend.
        file: Name of the model file; empty for the backend's default.
        instances: Instances and their devices, such as "1 on the CPU" or "2 on GPU 0".
        precision: "fp32" or "fp16"; empty where the config has none.
        max_batch: Most clips in one execution.
    """

    backend: str
    file: str
    instances: tuple[str, ...]
    precision: str
    max_batch: int


@dataclass(frozen=True)
class Status:
    """State of the server and of the model.

    Attributes:
        url: Address of the server.
        server_version: Version of Triton.
        live: The server runs.
        ready: The server and the model take requests.
        model: Name of the model.
        model_versions: Versions of the model that are loaded.
        deployment: How the model is served; None where it is not ready.
        info: Constants of the model; None where it gave no reply.
        statistics: Triton's counters of the model; None where it is not ready.
    """

    url: str
    server_version: str
    live: bool
    ready: bool
    model: str
    model_versions: tuple[str, ...]
    deployment: Deployment | None
    info: ModelInfo | None
    statistics: Statistics | None


@dataclass(frozen=True)
class Gpu:
    """A GPU in Triton's metrics; a figure that they lack is NaN.

    Attributes:
        uuid: NVIDIA's identifier.
        memory_used: Bytes in use by all processes.
        memory_total: Bytes.
        utilization: Share of time spent computing, 0 to 1.
    """

    uuid: str
    memory_used: float
    memory_total: float
    utilization: float


def request(waveform: Waveform, model: str, version: str = "") -> service_pb2.ModelInferRequest:
    """The request to embed a clip, float32 `[samples]` at 16 kHz; no version: the server chooses."""
    message = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    message.inputs.add(name="waveform", datatype="FP32", shape=[1, len(waveform)])
    message.raw_input_contents.append(np.ascontiguousarray(waveform, np.float32).tobytes())
    for output in "embedding", "model_info":
        message.outputs.add(name=output)
    return message


def read_reply(response: service_pb2.ModelInferResponse) -> Reply:
    """The reply to `request`; raises `ProtocolError` where it is not one."""
    result = InferResult(response)
    return Reply(_output(result, "embedding"), _model_info(_output(result, "model_info", size=7).tobytes()))


@lru_cache(maxsize=8)  # hardly ever another one
def _model_info(values: bytes) -> ModelInfo:
    """The constants in an output `model_info`, float32 [7]."""
    threshold, max_seconds, min_samples, *identity = numbers = np.frombuffer(values, np.float32)
    limits = 0 < max_seconds < math.inf and 0 <= min_samples < math.inf
    if not (limits and all(0 <= number < 1 << 24 and number == int(number) for number in identity)):
        raise ProtocolError(
            f"output 'model_info' is {numbers.tolist()}: expected threshold, max_seconds, min_samples and the "
            "model identity as whole numbers of 24 bits: export the model again"
        )
    # The shortest decimal that rounds to this float32: 0.45, not 0.44999998807907104.
    cosine = None if np.isnan(threshold) else float(str(threshold))
    digits = "".join(f"{int(number):06x}" for number in identity)
    return ModelInfo(cosine, float(max_seconds), int(min_samples), digits)


def _output(result: InferResult, name: str, size: int | None = None) -> Waveform:
    """Output `name`, a float32 `[1, size]`, as `[size]`."""
    try:
        values = result.as_numpy(name)
    except (InferenceServerException, ValueError, TypeError) as exc:
        raise ProtocolError(f"output {name!r} of the reply cannot be read: {exc}") from exc
    found = "missing" if values is None else f"{values.dtype} {list(values.shape)}"
    if values is None or values.dtype != np.float32 or values.shape != (1, size or values.size) or not values.size:
        raise ProtocolError(
            f"output {name!r} of the reply is {found}, expected float32 [1, {size or 'dims'}]: is this an ecapa model?"
        )
    row: Waveform = values[0].copy()  # the reply's own memory is read-only
    return row


def read_statistics(response: service_pb2.ModelStatisticsResponse) -> Statistics:
    """The counters in Triton's statistics of one model, summed over its versions."""
    stats = response.model_stats
    requests = sum(s.inference_stats.success.count for s in stats)
    executions = sum(s.execution_count for s in stats)
    queue = sum(s.inference_stats.queue.ns for s in stats)
    parts = ("compute_input", "compute_infer", "compute_output")
    compute = sum(getattr(s.inference_stats, part).ns for s in stats for part in parts)
    return Statistics(
        requests=requests,
        failures=sum(s.inference_stats.fail.count for s in stats),
        executions=executions,
        mean_batch=_ratio(sum(s.inference_count for s in stats), executions),
        queue_ms=_ratio(queue / 1e6, requests),
        compute_ms=_ratio(compute / 1e6, requests),
    )


def read_config(config: Any) -> Deployment:
    """The deployment that Triton's `ModelConfig` describes."""
    instances = []
    for group in config.instance_group:
        kind = type(group).Kind.Name(group.kind)
        if kind == "KIND_GPU":
            instances += [f"{group.count} on GPU {number}" for number in group.gpus] or [f"{group.count} on every GPU"]
        else:
            instances.append(f"{group.count} on the CPU" if kind == "KIND_CPU" else f"{group.count} of {kind}")
    precision = config.parameters["precision"].string_value if "precision" in config.parameters else ""
    return Deployment(config.backend, config.default_model_filename, tuple(instances), precision, config.max_batch_size)


def read_gpus(metrics: str) -> list[Gpu]:
    """The GPUs in the text of Triton's metrics."""
    found: dict[str, dict[str, float]] = {}
    for name, uuid, value in re.findall(r'^nv_gpu_(\w+)\{[^}]*gpu_uuid="([^"]+)"[^}]*\} (\S+)$', metrics, re.MULTILINE):
        found.setdefault(uuid, {})[name] = float(value)
    names = "memory_used_bytes", "memory_total_bytes", "utilization"
    return [Gpu(uuid, *(values.get(name, math.nan) for name in names)) for uuid, values in sorted(found.items())]


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
