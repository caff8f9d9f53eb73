"""What goes over the wire: build a request, read a reply. Pure functions, no connection."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult, service_pb2
from tritonclient.utils import InferenceServerException

from .audio import SAMPLE_RATE, Waveform
from .errors import ProtocolError

SCHEME, TLS_SCHEME = "grpc://", "grpcs://"
# The header that carries a key: of HTTP, and with Triton's prefix of gRPC.
KEY_HEADER = "api-key"
GRPC_KEY_HEADER = f"triton-grpc-protocol-{KEY_HEADER}"

CHANNEL_ARGS = [
    # No clip is longer than the model's limit: the client cuts or refuses it before.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 16 << 20),  # bytes; the largest reply is that of the model's config
    # A long-lived client must find a restarted server soon: gRPC's own waits grow to two minutes.
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt to connect takes; a mute address takes no more
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A server whose machine is gone says nothing, and gRPC would send to it for a quarter of an hour. With keepalive, a
    # connection ends on which what was sent is not acknowledged in 10 s. Pings themselves come once in 330 s at most: a
    # server with gRPC's usual settings ends connections that ping more than once in 300 s.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A Triton endpoint is addressed directly; gRPC would hand clips, even those for 127.0.0.1, to $http_proxy.
    ("grpc.enable_http_proxy", 0),
    # Where a name or a list stands for several servers they take turns, not the first one everything.
    ("grpc.lb_policy_name", "round_robin"),
]


@dataclass(frozen=True)
class ModelInfo:
    """Constants of a model; they come with every one of its replies.

    Attributes:
        threshold: Cosine above which two clips are of one speaker; None where the model has none.
        max_seconds: Of a clip; the model embeds no more seconds of it than these.
        min_samples: Smallest clip, in samples at 16 kHz.
        id: Which model it is: the first 24 hexadecimal digits of the SHA-256 of its weights.
    """

    threshold: float | None
    max_seconds: float
    min_samples: int
    id: str

    @property
    def max_samples(self) -> int:
        """`max_seconds` in samples at 16 kHz."""
        return round(self.max_seconds * SAMPLE_RATE)


# What an export gives when not told otherwise; only a guess how much to read before a first reply is there.
USUAL = ModelInfo(threshold=None, max_seconds=30.0, min_samples=640, id="")


@dataclass(frozen=True)
class Reply:
    """What the model says about one clip: `embedding` float32 [dims], NaN where it has none."""

    embedding: Waveform
    info: ModelInfo

    @property
    def finite(self) -> bool:
        """Whether there is an embedding."""
        return bool(np.isfinite(self.embedding).all())


@dataclass(frozen=True)
class Statistics:
    """What the server counted for a model since it was loaded, over its versions.

    Attributes:
        requests: Requests answered.
        failures: Requests that Triton counts as failed; those refused at a full queue are not among them.
        executions: Runs of the model; several requests share one.
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
    """How a model is served, by its config.

    Attributes:
        backend: Triton's backend for it.
        file: The model file in the version's folder; empty where the backend's usual one is taken.
        instances: What it runs on, such as "1 on the CPU" or "2 on GPU 0".
        precision: "fp32" or "fp16"; empty where the config does not say.
        max_batch: Clips that share one execution at most.
    """

    backend: str
    file: str
    instances: tuple[str, ...]
    precision: str
    max_batch: int


@dataclass(frozen=True)
class Gpu:
    """A GPU as Triton's metrics show it; NaN where they do not.

    Attributes:
        uuid: NVIDIA's name for it.
        memory_used: Bytes in use, by any process.
        memory_total: Bytes.
        utilization: Share of the time in which it computes, 0 to 1.
    """

    uuid: str
    memory_used: float
    memory_total: float
    utilization: float


def request(waveform: Waveform) -> dict[str, Any]:
    """Arguments of Triton's `infer` for one clip, float32 [samples] at 16 kHz."""
    tensor = InferInput("waveform", [1, len(waveform)], "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(waveform[np.newaxis], np.float32))
    return {
        "inputs": [tensor],
        "outputs": [InferRequestedOutput("embedding"), InferRequestedOutput("model_info")],
    }


def read_reply(result: InferResult) -> Reply:
    """The reply to `request`, or `ProtocolError` if it is not one."""
    embedding = _output(result, "embedding")
    threshold, max_seconds, min_samples, *identity = _output(result, "model_info", size=7)
    if not (0 < max_seconds < math.inf and 0 <= min_samples < math.inf):
        raise ProtocolError(
            f"model_info says max_seconds {max_seconds} and min_samples {min_samples}, "
            "expected positive numbers: export the model again"
        )
    if not all(0 <= number < 1 << 24 and number == int(number) for number in identity):
        raise ProtocolError(
            f"model_info ends with {', '.join(map(str, identity))}, expected the model's identity, "
            "whole numbers of 24 bits: export the model again"
        )
    # As the shortest decimal that this float32 is nearest to: 0.45, not 0.44999998807907104.
    cosine = None if np.isnan(threshold) else float(str(threshold))
    digits = "".join(f"{int(number):06x}" for number in identity)
    return Reply(embedding, ModelInfo(cosine, float(max_seconds), int(min_samples), digits))


def _output(result: InferResult, name: str, size: int | None = None) -> Waveform:
    """Output `name`, a float32 `[1, size]`, as `[size]`."""
    try:
        values = result.as_numpy(name)
    except (InferenceServerException, ValueError, TypeError, KeyError) as exc:
        raise _not_ours(name, f"cannot be read: {exc}", size) from exc
    if values is None:
        raise _not_ours(name, "is missing", size)
    if values.dtype != np.float32 or values.shape != (1, size or values.size) or not values.size:
        raise _not_ours(name, f"is {values.dtype} {list(values.shape)}", size)
    row: Waveform = values[0].copy()  # the reply's own memory is read-only
    return row


def _not_ours(name: str, found: str, size: int | None) -> ProtocolError:
    wanted = f"float32 [1, {size or 'dims'}]"
    return ProtocolError(f"output {name!r} of the reply {found}; expected {wanted}: is this an ecapa model?")


def read_statistics(response: service_pb2.ModelStatisticsResponse) -> Statistics:
    """Triton's statistics of one model, summed over its versions."""
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
    """What Triton's `ModelConfig` says of a deployment."""
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
    """The GPUs on Triton's page of metrics."""
    found: dict[str, dict[str, float]] = {}
    for name, uuid, value in re.findall(r'^nv_gpu_(\w+)\{[^}]*gpu_uuid="([^"]+)"[^}]*\} (\S+)$', metrics, re.MULTILINE):
        found.setdefault(uuid, {})[name] = float(value)
    names = "memory_used_bytes", "memory_total_bytes", "utilization"
    return [Gpu(uuid, *(values.get(name, math.nan) for name in names)) for uuid, values in sorted(found.items())]


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
