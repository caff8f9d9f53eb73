"""The servers that a load test compares: started here or reached over the network, and what they say of themselves."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .machine import reason

if TYPE_CHECKING:  # a GPU host may have little more than torch
    from ecapa_triton import protocol

Device: TypeAlias = Literal["cpu", "gpu"]
Precision: TypeAlias = Literal["fp32", "fp16"]

REPOSITORY = Path(__file__).parent.parent / "model_repository"
BASELINES = {"speechbrain": "one at a time", "speechbrain_padded": "padded batches"}  # their models, and contenders
OURS = "ours"
SCHEME = "grpc://"
METRICS_PORT = 8002
TIMEOUT = 10.0  # s, of a question to the server
# Triton's gauge, the sample's name for it, and what it is divided by; the largest where there are several.
GAUGES = {
    "nv_cpu_utilization": ("cpu", 1.0),
    "nv_cpu_memory_used_bytes": ("memory_mb", 1e6),
    "nv_gpu_utilization": ("gpu", 1.0),
    "nv_gpu_memory_used_bytes": ("gpu_memory_mb", 1e6),
    "nv_gpu_power_usage": ("gpu_power_w", 1.0),
    "nv_inference_pending_request_count": ("pending", 1.0),
}


class TargetError(Exception):
    """A target cannot be used. The message is one line."""


@dataclass(eq=False)
class Target:
    """A server under load.

    Attributes:
        name: in the report.
        url: of its gRPC API, `grpc://HOST:PORT`.
        metrics_url: of its metrics; empty if unknown.
        contenders: what each of its models is called in the report.
        local: the server that was started here.
    """

    name: str
    url: str
    metrics_url: str
    contenders: dict[str, str] = field(default_factory=dict)
    local: Any = None

    @property
    def address(self) -> str:
        """HOST:PORT of the gRPC API."""
        return self.url.removeprefix(SCHEME)

    def models(self) -> dict[str, protocol.Deployment]:
        """How each model is served, by its own config."""
        from ecapa_triton import protocol

        with self._asked() as triton:
            return {
                model: protocol.read_config(triton.get_model_config(model, client_timeout=TIMEOUT).config)
                for model in self.contenders
            }

    def describe(self, sha256: dict[str, str]) -> dict[str, Any]:
        """For the report. `sha256` has the checksums of the weights, as far as they are known."""
        from ecapa_triton import protocol

        with self._asked() as triton:
            version = triton.get_server_metadata(client_timeout=TIMEOUT).version
        deployments = self.models()
        models = {
            model: {
                "contender": self.contenders[model],
                "backend": served.backend,
                "file": served.file,
                "instances": list(served.instances),
                "precision": served.precision,
                "max_batch": served.max_batch,
                "sha256": sha256.get(model),
            }
            for model, served in deployments.items()
        }
        limits = self.local.limits if self.local else None
        return {
            "name": self.name,
            "url": self.url,
            "local": self.local is not None,
            "device": self.local.device if self.local else _device(deployments.values()),
            "chosen": self.local.chosen if self.local else "",
            "server_version": version,
            "gpus": [gpu.uuid for gpu in protocol.read_gpus(_metrics(self.metrics_url))],
            "max_requests": limits.requests if limits else None,
            "models": models,
        }

    def statistics(self, model: str) -> Counter[str]:
        """Triton's counts since it started."""
        with self._asked() as triton:
            return statistics(triton, model)

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        """A client; what fails is a TargetError."""
        try:
            with _client(self.address) as triton:
                yield triton
        except Exception as error:
            raise TargetError(f"target {self.name}: {self.url} does not answer ({reason(error)})") from error


def _device(deployments: Iterable[protocol.Deployment]) -> str | None:
    """What all instances run on, as the configs say; None where they differ or do not say."""
    instances = [instance for served in deployments for instance in served.instances]
    kinds = {"GPU" if "GPU" in instance else "CPU" if "CPU" in instance else None for instance in instances}
    return kinds.pop() if len(kinds) == 1 else None


def gauges(metrics_url: str) -> dict[str, float]:
    """Triton's gauges of the machine, by the names in GAUGES; without those that it does not show."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(nv_\w+)(?:\{[^}]*\})? (\S+)$", _metrics(metrics_url), re.MULTILINE):
        if name in GAUGES and math.isfinite(float(value)):
            key, unit = GAUGES[name]
            found[key] = max(float(value) / unit, found.get(key, -math.inf))
    return found


def _metrics(url: str) -> str:
    """Triton's page of metrics; empty if it cannot be had."""
    if not url:
        return ""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return str(reply.read().decode())
    except (OSError, ValueError):
        return ""


def statistics(triton: Any, model: str) -> Counter[str]:
    """Triton's own counts since it started; `triton` is a client of it."""
    counts: Counter[str] = Counter()
    for one in triton.get_inference_statistics(model).model_stats:
        counts["inferences"] += one.inference_count
        counts["executions"] += one.execution_count
        counts["requests"] += one.inference_stats.success.count
        counts["queue_ns"] += one.inference_stats.queue.ns
        counts["compute_ns"] += one.inference_stats.compute_infer.ns
    return counts


def reach(name: str, url: str, model: str, metrics_url: str = "") -> Target:
    """A server that runs somewhere, with those of the baselines that it has.

    Args:
        name: in the report.
        url: `grpc://HOST:PORT`.
        model: of ours that is loaded.
        metrics_url: of its metrics; port 8002 of the same host if empty.

    Raises:
        TargetError: it does not answer, or has no such model.
    """
    port = re.fullmatch(rf"{SCHEME}[^/\s]+:(\d{{1,5}})", url)
    if not port or not 0 < int(port[1]) < 1 << 16:
        raise TargetError(f"target {name}={url}: expected {SCHEME}HOST:PORT, such as {SCHEME}127.0.0.1:8001")
    host = url.removeprefix(SCHEME).rpartition(":")[0]
    target = Target(name, url, metrics_url or f"http://{host}:{METRICS_PORT}/metrics")
    try:
        with _client(target.address) as triton:
            if not triton.is_model_ready(model, client_timeout=TIMEOUT):
                raise TargetError(f"target {name}: {url} has no model {model} that is ready; choose with --model")
            names = [baseline for baseline in BASELINES if triton.is_model_ready(baseline, client_timeout=TIMEOUT)]
    except Exception as error:
        if isinstance(error, TargetError):
            raise
        raise TargetError(f"target {name}: {url} does not answer ({reason(error)}): is the server there?") from error
    target.contenders = {model: OURS} | {baseline: BASELINES[baseline] for baseline in names}
    return target


@contextmanager
def serve(
    repository: Path,
    device: Device,
    model: str,
    precision: Precision = "fp32",
    max_requests: int | None = None,
) -> Iterator[Target]:
    """Start a server on this machine for as long as the block runs.

    Limits are on where nginx is installed, as in `python -m server`; `max_requests` of None is its default.
    """
    from server import Limits, gateway
    from server.triton import TritonServer

    limits = Limits(max_requests) if gateway.find() else None
    with TritonServer(repository, device=device, precision=precision, limits=limits) as server:
        contenders = {name: OURS if name == model else BASELINES[name] for name in server.models}
        yield Target(device, SCHEME + server.grpc_url, server.metrics_url, contenders, server)


def link(folder: Path, model: str, files: list[Path]) -> None:
    """Make a repository of one model with this project's configs and links to the files."""
    shutil.copytree(REPOSITORY / model, folder / model, ignore=shutil.ignore_patterns("*.onnx", "*.pt", ".*"))
    (folder / model / "1").mkdir(exist_ok=True)
    for file in files:
        (folder / model / "1" / file.name).symlink_to(file.absolute())


def add_baselines(folder: Path, origin: str) -> str:
    """Put the baselines into a repository.

    Args:
        folder: the repository.
        origin: what loads their weights, such as `--source mini`.

    Returns:
        Why there are none; empty if there are.
    """
    if importlib.util.find_spec("speechbrain") is None:
        return "SpeechBrain is not installed: pip install -e '.[export]'"
    from .baseline import install

    install(folder, origin)
    return ""


def _client(address: str) -> Any:
    from ecapa_triton.protocol import CHANNEL_ARGS
    from tritonclient.grpc import InferenceServerClient

    return InferenceServerClient(address, channel_args=CHANNEL_ARGS)
