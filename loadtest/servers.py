"""The servers under test: reached over the network, or started on this machine with the baselines beside the model."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from ecapa_triton import protocol
from ecapa_triton.protocol import CHANNEL_ARGS, SCHEME
from tritonclient.grpc import InferenceServerClient

from .clips import MAX_ERROR, Array
from .machine import ROOT, MeasureError, reason
from .scenarios import BASELINES, MODEL, OURS, PADDED

if TYPE_CHECKING:  # where only the load generator is installed, neither can be imported
    from export.checkpoint import Checkpoint
    from server import TritonServer
    from server.options import Precision

Device: TypeAlias = Literal["cpu", "gpu"]

TIMEOUT = 10.0  # s, of a request for metadata
QUEUE = 1.0  # s of work that may wait in the open loop
GAUGES = {  # Triton's name to the key in a sample and the unit
    "nv_cpu_utilization": ("cpu", 1.0),
    "nv_cpu_memory_used_bytes": ("memory_mb", 1e6),
    "nv_gpu_utilization": ("gpu", 1.0),
    "nv_gpu_memory_used_bytes": ("gpu_memory_mb", 1e6),
}


@dataclass(eq=False)
class Server:
    """A server under load."""

    name: str  # in the report
    url: str  # of its gRPC API, grpc://HOST:PORT
    metrics_url: str
    models: dict[str, str]  # to measure, by contender, ours first
    local: TritonServer | None = None  # if it was started here
    about: dict[str, Any] = field(default_factory=dict)  # facts for the report

    def describe(self, sha256: str | None) -> None:
        """Fill in `about`; `sha256` is that of our model's weights, if it is known."""
        with self.client() as triton:
            version = triton.get_server_metadata(client_timeout=TIMEOUT).version
            configs = [triton.get_model_config(model, client_timeout=TIMEOUT).config for model in self.models.values()]
        served = dict(zip(self.models, map(protocol.read_config, configs), strict=True))
        on_gpu = "GPU" in "".join(served[OURS].instances)
        self.about = {
            "name": self.name,
            "url": self.url,
            "local": self.local is not None,
            "device": self.local.device if self.local else "GPU" if on_gpu else "CPU",
            "version": version,
            "gpus": [gpu.uuid for gpu in protocol.read_gpus(self._metrics())],
            "max_requests": self.max_requests,
            "models": {
                self.models[name]: {"contender": name, **asdict(one), "sha256": sha256 if name == OURS else None}
                for name, one in served.items()
            },
        }

    def max_error(self, contender: str) -> float:
        """Largest relative L2 error of a right embedding; padding changes embeddings without a bound."""
        precision = self.about["models"][self.models[contender]]["precision"]
        return math.inf if contender == PADDED else MAX_ERROR.get(precision, MAX_ERROR["fp32"])

    @property
    def max_requests(self) -> int | None:
        """Its limit of requests in flight, if it was started here and has one."""
        return self.local.limits.requests if self.local and self.local.limits else None

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A client of its gRPC API; every failure is a MeasureError."""
        try:
            with InferenceServerClient(self.url.removeprefix(SCHEME), channel_args=CHANNEL_ARGS) as triton:
                yield triton
        except Exception as error:
            raise MeasureError(
                f"{self.name}: {self.url} does not answer over gRPC ({reason(error)}): check the address and the server"
            ) from error

    def statistics(self, model: str) -> Counter[str]:
        """Triton's counts of a model since it was loaded."""
        with self.client() as triton:
            (found,) = triton.get_inference_statistics(model, client_timeout=TIMEOUT).model_stats
        stats = found.inference_stats
        return Counter(
            inferences=found.inference_count,
            executions=found.execution_count,
            requests=stats.success.count,
            queue_ns=stats.queue.ns,
            compute_ns=stats.compute_infer.ns,
        )

    def gauges(self) -> dict[str, float]:
        """Triton's gauges of the machine, by the keys in GAUGES: of several GPUs, the largest."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(nv_\w+)(?:\{[^}]*\})? ([\d.e+]+)$", self._metrics(), re.MULTILINE):
            if name in GAUGES:
                key, unit = GAUGES[name]
                found[key] = max(float(value) / unit, found.get(key, 0.0))
        return found

    def _metrics(self) -> str:
        try:
            with urllib.request.urlopen(self.metrics_url, timeout=TIMEOUT) as reply:
                return str(reply.read().decode())
        except OSError:  # metrics are optional
            return ""


def reach(name: str, url: str, model: str, metrics_url: str = "") -> Server:
    """A running server, with those of the baselines that it serves.

    Args:
        name: in the report.
        url: `grpc://HOST:PORT`.
        model: name of our model there.
        metrics_url: of its metrics; port 8002 of the same host if empty.

    Raises:
        MeasureError: the server does not answer or does not serve the model.
    """
    if not re.fullmatch(rf"{SCHEME}\S+:\d+", url):
        raise MeasureError(f"{name}: found {url!r}, expected {SCHEME}HOST:PORT, such as {SCHEME}127.0.0.1:8001")
    host = url.removeprefix(SCHEME).rpartition(":")[0]
    server = Server(name, url, metrics_url or f"http://{host}:8002/metrics", {OURS: model})
    with server.client() as triton:
        ready = [one for one in (model, *BASELINES) if triton.is_model_ready(one, client_timeout=TIMEOUT)]
    if model not in ready:
        raise MeasureError(f"{name}: {url} has no model {model} that is ready: choose one with --model")
    server.models |= {name: name for name in BASELINES if name in ready}
    return server


class Local:
    """Servers on this machine, all from one checkpoint and one model repository."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Choose the devices of `options.local` that can be used.

        Raises:
            MeasureError: none can.
        """
        from server import ServerError
        from server.preflight import choose_device, cuda_gpus

        self.missing: dict[str, str] = {}  # why a device cannot be measured
        self._options = options
        self.models: dict[Device, str] = {}  # ours, by device
        self.baselines: Sequence[str] = BASELINES if options.baselines else ()
        for device in dict.fromkeys(options.local):
            try:
                choose_device(device, *cuda_gpus())
                self.models[device] = options.model or _usual_model(device)
            except ServerError as error:
                self._leave_out(device, error)
        if not self.models:
            raise MeasureError("; ".join(self.missing.values()))

    def start(self, repository: Path, stack: ExitStack) -> list[Server]:
        """Export, and start a server on each device; `stack` stops them.

        Raises:
            MeasureError: no server starts, the model is unknown, or its source has other weights now.
        """
        self.checkpoint = _fill(repository, self._options, set(self.models.values()))
        servers: list[Server] = []
        for device, model in self.models.items():
            names = {OURS: model} | {name: name for name in self.baselines}
            try:
                servers.append(stack.enter_context(self._serve(device, repository, names)))
            except MeasureError as error:
                self._leave_out(device, error)
        if not servers:
            raise MeasureError("; ".join(self.missing.values()))
        for server in servers:
            server.describe(self.checkpoint.sha256)
        return servers

    def _leave_out(self, device: str, error: Exception) -> None:
        self.missing[device] = str(error)
        print(f"{device}: not measured: {error}", flush=True)

    def reference(self, clips: Sequence[Array]) -> Array:
        """SpeechBrain's embedding of each clip alone, float32 `[n, E]`."""
        import torch

        embed = self.checkpoint.classifier.encode_batch
        with torch.inference_mode():
            return np.stack([embed(torch.from_numpy(clip)[None])[0, 0].numpy() for clip in clips])

    def open_loop(self, server: Server, capacity: float) -> AbstractContextManager[Server]:
        """Our model alone, with at most QUEUE seconds of work in flight, for a server that was started here."""
        assert server.local is not None
        device: Device = "gpu" if server.local.device == "GPU" else "cpu"
        most = max(4, math.ceil(capacity * QUEUE))
        return self._serve(device, server.local.repository, {OURS: server.models[OURS]}, most)

    @contextmanager
    def _serve(
        self, device: Device, repository: Path, models: dict[str, str], max_requests: int | None = None
    ) -> Iterator[Server]:
        """A server; where nginx is installed, with a limit of requests in flight (None: the default of `server`)."""
        from server import Limits, ServerError, TritonServer, gateway

        limits = Limits(max_requests) if gateway.find() else None
        wanted: Precision = self._options.precision
        precision: Precision = wanted if wanted == {"cpu": "int8", "gpu": "fp16"}[device] else "fp32"
        names = list(models.values())
        running = TritonServer(repository, device=device, precision=precision, models=names, limits=limits)
        with ExitStack() as stack:
            try:
                stack.enter_context(running)
            except ServerError as error:
                raise MeasureError(str(error)) from error
            yield Server(device, SCHEME + running.grpc_url, running.metrics_url, models, running)


def _fill(repository: Path, options: argparse.Namespace, models: set[str]) -> Checkpoint:
    """Put our models, exported from `options`, and the baselines into a repository; return their checkpoint."""
    from export import configs
    from export.pipeline import export

    from .baseline import install
    from .contenders import made_from

    formats = {kind.folder: name for name, kind in configs.FORMATS.items()}
    if unknown := models - set(formats):
        raise MeasureError(f"model is {', '.join(unknown)}, a local server has {', '.join(formats)}")
    source = options.repository or ROOT / "model_repository"
    for model in models:
        unwanted = () if options.repository else ("*.onnx", "*.pt", ".*")
        shutil.copytree(source / model, repository / model, ignore=shutil.ignore_patterns(*unwanted))
    if not options.repository:
        kinds = [formats[model] for model in models]
        wanted = {"half": options.precision == "fp16", "int8": options.precision == "int8"}
        export(repository, options.source, channels=options.channels, formats=kinds, **wanted)
    model = min(models)
    file = repository / model / "1" / configs.FORMATS[formats[model]].file
    checkpoint = made_from(configs.ModelFile.read(file).metadata)
    install(repository, checkpoint.origin)
    return checkpoint


def _usual_model(device: Device) -> str:
    """The model for ONNX Runtime, or the TorchScript one on a GPU that the installed ONNX Runtime cannot use."""
    from .contenders import onnx_devices

    return MODEL if device == "cpu" or "cuda" in onnx_devices() else f"{MODEL}_torchscript"
