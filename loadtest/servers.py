"""The servers under test: reached over the network, or started on this machine with the baselines beside the model."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from ecapa_triton import protocol
from ecapa_triton.protocol import CHANNEL_ARGS, SCHEME
from tritonclient.grpc import InferenceServerClient

from .clips import Array
from .machine import MeasureError, reason
from .scenarios import BASELINES, MODEL, OURS

if TYPE_CHECKING:  # where only the load generator is installed, neither can be imported
    from export.checkpoint import Checkpoint
    from server import TritonServer

Device: TypeAlias = Literal["cpu", "gpu"]
Precision: TypeAlias = Literal["fp32", "fp16"]

REPOSITORY = Path(__file__).parent.parent / "model_repository"
METRICS_PORT = 8002
TIMEOUT = 10.0  # s, of a request for metadata
QUEUE = 1.0  # s of work that may wait in the open loop
# Triton's gauge, its key in a sample and its unit; the largest where there are several.
GAUGES = {
    "nv_cpu_utilization": ("cpu", 1.0),
    "nv_cpu_memory_used_bytes": ("memory_mb", 1e6),
    "nv_gpu_utilization": ("gpu", 1.0),
    "nv_gpu_memory_used_bytes": ("gpu_memory_mb", 1e6),
}


@dataclass(eq=False)
class Server:
    """A server under load.

    Attributes:
        name: in the report.
        url: of its gRPC API, `grpc://HOST:PORT`.
        metrics_url: of its metrics.
        models: to measure, by contender, ours first.
        local: the server, if it was started here.
    """

    name: str
    url: str
    metrics_url: str
    models: dict[str, str]
    local: TritonServer | None = None

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A client of its gRPC API; every failure is a MeasureError."""
        try:
            with InferenceServerClient(self.url.removeprefix(SCHEME), channel_args=CHANNEL_ARGS) as triton:
                yield triton
        except MeasureError:
            raise
        except Exception as error:
            raise MeasureError(f"server {self.name}: {self.url} does not answer ({reason(error)})") from error

    @property
    def max_requests(self) -> int | None:
        """Its limit of requests in flight, if it was started here and has one."""
        return self.local.limits.requests if self.local and self.local.limits else None

    def describe(self, sha256: str | None) -> dict[str, Any]:
        """Facts for the report; `sha256` is that of our model's weights, if it is known."""
        with self.client() as triton:
            version = triton.get_server_metadata(client_timeout=TIMEOUT).version
            configs = [triton.get_model_config(model, client_timeout=TIMEOUT) for model in self.models.values()]
        served = [protocol.read_config(found.config) for found in configs]
        kinds = {"GPU" if "GPU" in instance else "CPU" for one in served for instance in one.instances}
        about = {
            model: {"contender": name, **asdict(one), "sha256": sha256 if name == OURS else None}
            for (name, model), one in zip(self.models.items(), served, strict=True)
        }
        return {
            "name": self.name,
            "url": self.url,
            "local": self.local is not None,
            "device": self.local.device if self.local else kinds.pop() if len(kinds) == 1 else None,
            "version": version,
            "gpus": [gpu.uuid for gpu in protocol.read_gpus(_metrics(self.metrics_url))],
            "max_requests": self.max_requests,
            "models": about,
        }

    def statistics(self, model: str) -> Counter[str]:
        """Triton's counts of a model since it was loaded."""
        counts: Counter[str] = Counter()
        with self.client() as triton:
            for one in triton.get_inference_statistics(model, client_timeout=TIMEOUT).model_stats:
                counts["inferences"] += one.inference_count
                counts["executions"] += one.execution_count
                counts["requests"] += one.inference_stats.success.count
                counts["queue_ns"] += one.inference_stats.queue.ns
                counts["compute_ns"] += one.inference_stats.compute_infer.ns
        return counts

    def gauges(self) -> dict[str, float]:
        """Triton's gauges of the machine, by the keys in GAUGES; without those that it does not show."""
        found: dict[str, float] = {}
        metrics = re.findall(r"^(nv_\w+)(?:\{[^}]*\})? (\S+)$", _metrics(self.metrics_url), re.MULTILINE)
        for name, value in metrics:
            if name in GAUGES and math.isfinite(float(value)):
                key, unit = GAUGES[name]
                found[key] = max(float(value) / unit, found.get(key, -math.inf))
        return found


def _metrics(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
            return str(reply.read().decode())
    except (OSError, ValueError):  # metrics are optional
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
    port = re.fullmatch(rf"{SCHEME}[^/\s]+:(\d{{1,5}})", url)
    if not port or not 0 < int(port[1]) < 1 << 16:
        raise MeasureError(f"target {name}={url}: expected {SCHEME}HOST:PORT, such as {SCHEME}127.0.0.1:8001")
    host = url.removeprefix(SCHEME).rpartition(":")[0]
    server = Server(name, url, metrics_url or f"http://{host}:{METRICS_PORT}/metrics", {OURS: model})
    with server.client() as triton:
        if not triton.is_model_ready(model, client_timeout=TIMEOUT):
            raise MeasureError(f"target {name}: {url} has no model {model} that is ready: choose one with --model")
        server.models |= {name: name for name in BASELINES if triton.is_model_ready(name, client_timeout=TIMEOUT)}
    return server


class Local:
    """Servers on this machine, all from one checkpoint.

    Attributes:
        servers: those that run.
        missing: why a device cannot be measured.
        checkpoint: the weights of every model; None before a device was found that can be used.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        """Start a server on each device of `options.local` that can be used.

        Args:
            options: of `python -m loadtest run`.
            folder: for model repositories.
            stack: stops the servers.

        Raises:
            MeasureError: the model is unknown or not exported, or its source has other weights now.
        """
        self.servers: list[Server] = []
        self.missing: dict[str, str] = {}
        self.checkpoint: Checkpoint | None = None
        self._options, self._folder = options, folder
        try:
            from export.pipeline import step
        except ModuleNotFoundError as error:
            raise MeasureError(f"--local: {reason(error)}: pip install -e '.[export,server,loadtest]'") from error
        for device in dict.fromkeys(options.local):
            try:
                models = self._prepare(device)
                with step(f"start the server on the {device.upper()}"):
                    self.servers.append(stack.enter_context(self._serve(device, folder / device, models)))
            except _CannotServe as error:
                self.missing[device] = str(error)
                print(f"{device}: not measured: {error}", flush=True)

    def _prepare(self, device: Device) -> dict[str, str]:
        """Make a model repository; return its models by contender."""
        from server import ServerError
        from server.preflight import choose_device, cuda_gpus

        from .baseline import install

        try:
            choose_device(device, *cuda_gpus())
        except ServerError as error:
            raise _CannotServe(str(error)) from error
        model = self._options.model or _usual_model(device)
        files, loaded = self._files(model)
        _link(self._folder / device, model, files)
        baselines = install(self._folder / device, loaded.origin) if self._options.baselines else []
        return {OURS: model} | {name: name for name in baselines}

    def _files(self, model: str) -> tuple[list[Path], Checkpoint]:
        """The files of a model and their checkpoint: of `--repository`, or written here.

        Files written here are not verified, since every reply will be.
        """
        from export import artifacts, checkpoint, configs
        from export.packed import GROUP, PackedEcapa
        from export.pipeline import step

        from .contenders import made_from

        options = self._options
        kinds = {kind.folder: kind for kind in configs.FORMATS.values()}
        if model not in kinds:
            raise MeasureError(f"model is {model}, a local server has {', '.join(kinds)}")
        if options.repository:
            files = model_files(options.repository / model)
            loaded = self.checkpoint = self.checkpoint or made_from(configs.ModelFile.read(files[0]).metadata)
            return files, loaded
        loaded = self.checkpoint = self.checkpoint or checkpoint.load(options.source, channels=options.channels)
        kind, files = kinds[model], []
        for name, half in [(kind.file, False)] + [(kind.half_file, True)] * (options.precision == "fp16"):
            files.append(self._folder / name)
            if not files[-1].exists():
                packed = PackedEcapa(loaded, group=None if half else GROUP, half=half).eval()
                write = artifacts.write_torchscript if name.endswith(".pt") else artifacts.write_onnx
                with step(f"write {name}"):
                    write(packed, loaded, files[-1])
        return files, loaded

    def reference(self, clips: list[Array]) -> Array:
        """SpeechBrain's embedding of each clip alone, float32 `[n, E]`."""
        import torch

        assert self.checkpoint is not None
        classifier = self.checkpoint.classifier
        with torch.inference_mode():
            return np.stack([classifier.encode_batch(torch.from_numpy(clip)[None])[0, 0].numpy() for clip in clips])

    @contextmanager
    def open_loop(self, server: Server, capacity: float) -> Iterator[Server]:
        """A server for the open loop: our model alone, and no more than QUEUE seconds of requests in flight.

        Args:
            server: started here, to take the model and the device from; itself where it has no gateway.
            capacity: its clips per second.
        """
        if server.local is None or server.local.limits is None:
            yield server
            return
        device: Device = "gpu" if server.local.device == "GPU" else "cpu"
        folder, model = self._folder / f"{server.name}-alone", server.models[OURS]
        _link(folder, model, model_files(server.local.repository / model))
        with self._serve(device, folder, {OURS: model}, max(4, math.ceil(capacity * QUEUE))) as alone:
            yield alone

    @contextmanager
    def _serve(
        self, device: Device, folder: Path, models: dict[str, str], max_requests: int | None = None
    ) -> Iterator[Server]:
        """A server; where nginx is installed, with a limit of requests in flight (None: the default of `server`)."""
        from server import Limits, ServerError, TritonServer, gateway

        limits = Limits(max_requests) if gateway.find() else None
        precision: Precision = self._options.precision if device == "gpu" else "fp32"
        running = TritonServer(folder, device=device, precision=precision, limits=limits)
        try:
            running.start()
        except ServerError as error:
            raise _CannotServe(str(error)) from error
        try:
            yield Server(device, SCHEME + running.grpc_url, running.metrics_url, models, running)
        finally:
            running.stop()


class _CannotServe(MeasureError):
    """A server cannot be started on a device."""


def _link(folder: Path, model: str, files: list[Path]) -> None:
    """Make a repository with the project's configs of one model and links to its files, unless it is there."""
    if (folder / model).exists():
        return
    shutil.copytree(REPOSITORY / model, folder / model, ignore=shutil.ignore_patterns("*.onnx", "*.pt", ".*"))
    (folder / model / "1").mkdir(exist_ok=True)
    for file in files:
        (folder / model / "1" / file.name).symlink_to(file.absolute())


def model_files(model: Path) -> list[Path]:
    """The exported files in the folder of a model, links followed, float32 before float16.

    Raises:
        MeasureError: there is none.
    """
    files = sorted(path.resolve() for path in (model / "1").glob("model*") if path.suffix in (".onnx", ".pt"))
    if not files:
        raise MeasureError(f"{model / '1'} has no model: write it with python -m export")
    return files


def _usual_model(device: Device) -> str:
    """The model for ONNX Runtime, or the TorchScript one on a GPU that the installed ONNX Runtime cannot use."""
    from .contenders import onnx_devices

    return MODEL if device == "cpu" or "cuda" in onnx_devices() else f"{MODEL}_torchscript"
