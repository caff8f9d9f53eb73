"""A real tritonserver as a child process: started, waited for, measured and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn
from urllib.request import ProxyHandler, Request, build_opener

import psutil  # type: ignore[import-untyped]
from ecapa_triton.protocol import KEY_HEADER

from server import child, preflight, wheel
from server.gateway import Gateway
from server.options import ADMIN, DEFAULT_REQUESTS, Device, Limits, Place, Precision, ServerError, Tls, check_keys
from server.workdir import Workdir

STDOUT = Path("/dev/stdout")
LONGEST_TIMEOUT = 86400  # s
_WITHOUT_PROXY = build_opener(ProxyHandler({}))


class TritonServer:
    """A tritonserver that is ready inside the `with` block and gone after it.

    The server ends with the thread that started it, so it never outlives a process that was killed: start it from a
    thread that lives as long as the server is needed.

    Attributes:
        device: "CPU" or "GPU".
        chosen: The device and why it was chosen, in words.
        models: Names of the models that are served.
        version: Triton's.
        http_url: Address and port of the HTTP API; `grpc_url` likewise.
        metrics_url: URL of the Prometheus metrics.
        log_path: Triton's log.
        warnings: One line for each risk that the start found.
    """

    def __init__(
        self,
        repository: Path = Path("model_repository"),
        *,
        device: Device = "auto",
        gpus: Sequence[int] | None = None,
        precision: Precision = "fp32",
        models: Sequence[str] | None = None,
        threads: int | None = None,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        address: str = "127.0.0.1",
        metrics_address: str = "127.0.0.1",
        limits: Limits | None = None,
        tls: Tls | None = None,
        keys: Mapping[str, str] = MappingProxyType({}),
        extra: Sequence[str] = (),
        log: Path | None = None,
        start_timeout: float = 120,
        exit_timeout: float = 30,
        warn_exposed: bool = True,
    ) -> None:
        """Describes the server; `start` or the `with` statement starts it.

        Args:
            repository: The model repository.
            device: Where the models run; "auto" is a GPU if one is usable.
            gpus: Numbers of the GPUs to run on; None: all. The configs give the number of instances on each.
            precision: "fp16" serves the float16 files where the models run on GPUs.
            models: Names of the models to serve, each of them exported; None: all that are exported.
            threads: Threads of each model instance on the CPU; None: as the configs say.
            http_port: Port of the HTTP API, 0 for a free one; `grpc_port` and `metrics_port` likewise.
            grpc_port: Port of the gRPC API.
            metrics_port: Port of the Prometheus metrics.
            address: Address of HTTP and gRPC.
            metrics_address: Address of the metrics.
            limits: Limits of the gateway, which then listens in front of Triton's HTTP and gRPC APIs. None: no gateway
                and no limits.
            tls: Encryption of both APIs by the gateway; needs `limits`.
            keys: By group of `GROUPS`, the key that a client must send in the header `KEY_HEADER` (gRPC:
                `GRPC_KEY_HEADER`). The groups of `ADMIN` are closed unless they have a key.
            extra: Further options for tritonserver.
            log: File that Triton's log is appended to, `-` for standard output. None: a temporary file, which is kept
                only after a failure.
            start_timeout: Seconds until the server must be ready.
            exit_timeout: Seconds that requests in flight have when the server stops.
            warn_exposed: False where another gateway protects this server: then `warnings` does not mention that other
                machines need neither key nor certificate, and the wheel's Triton may serve them.
        """
        self.repository = repository
        self.limits = limits
        self.tls = tls
        self.keys = keys
        self._device: Device = device
        self._gpus = gpus
        self._precision: Precision = precision
        self._names = models
        self._threads = threads
        self._ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._address = address
        self._metrics_address = metrics_address
        self._extra = extra
        self._log = log
        self._start_timeout = start_timeout
        self._exit_timeout = exit_timeout
        self._warn_exposed = warn_exposed
        self._process: subprocess.Popen[bytes] | None = None
        self._gateway: Gateway | None = None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns once its models are ready.

        Raises:
            ServerError: The server cannot start; one line says why.
        """
        ports = self._ports
        for last in False, False, True:
            prepared = self._prepare()
            try:
                return self._run(*prepared)
            except ServerError as error:
                if last or 0 not in ports.values() or "already in use" not in str(error):
                    raise
                # Another process took a port that had been free.
                self._workdir.remove()
                self._ports = ports

    def stop(self) -> bool:
        """Lets requests in flight finish, then ends the server and everything it started.

        Returns:
            Whether the server stopped within its exit timeout; if not, it was killed.
        """
        if self._process is None:
            return True
        in_time = True
        self._process.terminate()
        try:
            self._process.wait(self._exit_timeout)
        except subprocess.TimeoutExpired:
            in_time, self._keep_log = False, True
        self._clean_up()
        return in_time

    def wait(self) -> NoReturn:
        """Waits until the server or a part of it ends unexpectedly.

        Raises:
            ServerError: What ended, always.
        """
        assert self._process is not None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=1)
                raise self._failure(f"tritonserver {child.ending(code)} while serving")
            if self._gateway is not None:
                self._gateway.check()
            for stub in self._stubs:
                if not child.is_alive(stub):
                    # Triton itself would claim to be ready, fail every request and never stop in order.
                    self._process.kill()
                    raise self._failure(f"process {stub.pid} of a model ended while serving (out of memory?)")

    @property
    def pid(self) -> int:
        """Process id of tritonserver, which is also its process group and that of its stubs."""
        assert self._process is not None
        return self._process.pid

    def memory(self) -> dict[str, int]:
        """Resident bytes of "tritonserver", of the "model" processes (stubs), and "shared" between them.

        A page of a library that several processes map counts in equal parts (PSS). Shared memory counts whole,
        whether or not a process has touched it.
        """
        return {"model": 0} | child.memory({self.pid: "tritonserver"} | {stub.pid: "model" for stub in self._stubs})

    def _prepare(self) -> tuple[Path | None, str, dict[str, Place]]:
        """Checks and choices: the installed tritonserver, the name of the configs, Triton's addresses and ports."""
        for name, seconds in ("start", self._start_timeout), ("exit", self._exit_timeout):
            if not 0 < seconds <= LONGEST_TIMEOUT:
                raise ServerError(f"{name} timeout is {seconds:g} s: expected more than 0, at most {LONGEST_TIMEOUT}")
        if self.tls is not None and self.limits is None:
            raise ServerError("TLS needs nginx in front of Triton: apt install nginx-light")
        check_keys(self.keys)
        installed = wheel.find_installed()
        gpus, no_gpu = preflight.cuda_gpus()
        if gpus and self._gpus is not None:
            gpus = preflight.choose_gpus(gpus, self._gpus)
        models = preflight.models_to_serve(self.repository, self._names)
        if gpus and installed is None and (package := wheel.package_without_cuda(models)):
            gpus, no_gpu = [], f"the installed {package} cannot use the {gpus[0]}: install its build for CUDA"
        self.device, self.chosen, config_name = preflight.choose_device(self._device, gpus, no_gpu, self._precision)
        backends = preflight.check_repository(self.repository, config_name, self._names)
        self.models = list(backends)
        if installed is None:
            wheel.check_packages(backends.values())
        listen = self._choose_places()
        if installed is None and self.limits is None and self._warn_exposed:
            preflight.check_unguarded(self._address)
        # The C++ backends of an installed server run in its process and need no shared memory.
        warnings = ["" if installed else preflight.shm_warning()]
        if self._warn_exposed:
            warnings.append(preflight.exposure_warning(self._address, self.tls, self.keys))
        self.warnings = [warning for warning in warnings if warning]
        return installed, config_name, listen

    def _choose_places(self) -> dict[str, Place]:
        """Settles the addresses and ports for clients; returns those at which Triton itself listens."""
        self._address, self._metrics_address = (
            preflight.resolve(self._address),
            preflight.resolve(self._metrics_address),
        )
        wanted = {api: (self._address, port) for api, port in self._ports.items()}
        wanted["metrics"] = self._metrics_address, self._ports["metrics"]
        if self.limits is not None:
            wanted |= {f"{api} behind nginx": ("127.0.0.1", 0) for api in ("http", "grpc")}
        places = preflight.choose_ports(wanted)
        self._ports = {api: places[api][1] for api in self._ports}  # a restarted server keeps them
        self.http_url, self.grpc_url = _url(places["http"]), _url(places["grpc"])
        self.metrics_url = f"http://{_url(places['metrics'])}/metrics"
        return {api: places.get(f"{api} behind nginx", places[api]) for api in self._ports}

    def _run(self, installed: Path | None, config_name: str, listen: dict[str, Place]) -> None:
        self._keep_log = False
        self._workdir = Workdir()
        own_log = self._workdir.path / "tritonserver.log"
        self.log_path = STDOUT if self._log == Path("-") else (self._log or own_log).absolute()
        try:
            self._launch(installed, config_name, listen)
            self._wait_until_ready(listen)
            # The wheel has no newer release to change to: on this machine alone it may be old.
            if installed or not all(map(preflight.is_loopback, (self._address, self._metrics_address))):
                self.warnings += filter(None, [preflight.release_warning(self.version)])
            self._stubs = psutil.Process(self.pid).children()  # of the wheel's Python backend
            if self.limits is not None:
                self._open_gateway(self.limits, listen)
        except BaseException as error:
            self._clean_up()
            if isinstance(error, OSError):  # a full disk, for example
                raise ServerError(f"cannot set up the server: {error}") from error
            raise

    def _launch(self, installed: Path | None, config_name: str, listen: dict[str, Place]) -> None:
        models = [self.repository / name for name in self.models]
        threads = self._threads if self.device == "CPU" else None
        changed = threads is not None or len(models) < len(preflight.all_models(self.repository))
        options: dict[str, object] = {
            "model-repository": self._workdir.link(models, threads) if changed else self.repository.absolute(),
            "model-config-name": config_name,
            "model-control-mode": "none",
            "metrics-config": "summary_latencies=true",
            "allow-gpu-metrics": str(self.device == "GPU").lower(),
            "exit-timeout-secs": math.ceil(self._exit_timeout),
            "grpc-infer-allocation-pool-size": 0,  # else Triton keeps the clips of past requests in memory
        }
        for api, (address, port) in listen.items():
            options |= {f"{api}-address": address, f"{api}-port": port}
        environment = dict(os.environ) | preflight.gpu_environment(self.device, self._gpus)
        if installed is None:
            binary, backends = wheel.assemble(self._workdir.path, environment)
            options["backend-config"] = f"python,shm-region-prefix-name={self._workdir.path.name}-"
        else:
            binary, backends = installed, installed.resolve().parents[1] / "backends"
        options["backend-directory"] = backends
        command = [str(binary), *(f"--{name}={value}" for name, value in options.items())]
        # The configs are complete; completing them would start each model once more.
        command += ["--disable-auto-complete-config", *_restricted(self.keys), *self._extra]
        with contextlib.ExitStack() as stack:
            log = None if self.log_path == STDOUT else stack.enter_context(self.log_path.open("ab"))
            self._log_start = log.tell() if log else 0
            self._process = child.start(command, log, environment)

    def _wait_until_ready(self, listen: dict[str, Place]) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout
        for api, path, group in (
            ("http", "/v2/health/ready", "health"),
            ("metrics", "/metrics", ""),
            ("http", "/v2", "metadata"),
        ):
            headers = {KEY_HEADER: self.keys[group]} if group in self.keys else {}
            while True:
                if (code := self._process.poll()) is not None:
                    reason = (code >= 0 and self._reason()) or child.ending(code)
                    raise self._failure(f"tritonserver did not start: {reason}")
                try:
                    request = Request(f"http://{_url(listen[api])}{path}", headers=headers)
                    body = _WITHOUT_PROXY.open(request, timeout=5).read()
                    if child.listens(self.pid, listen[api][1]):  # else another server has replied
                        break
                    reason = "another process answers"
                except (OSError, http.client.HTTPException) as error:
                    reason = str(error)
                if time.monotonic() > deadline:
                    raise self._failure(
                        f"tritonserver was not ready within {self._start_timeout:g} s ({api} API, {path}: {reason})"
                    )
                time.sleep(0.05)
        self.version = str(json.loads(body)["version"])

    def _open_gateway(self, limits: Limits, behind: dict[str, Place]) -> None:
        folder = self._workdir.path / "gateway"
        folder.mkdir()
        if limits.requests is None:
            self.limits = limits = replace(limits, requests=DEFAULT_REQUESTS[self.device])
        front = {api: (self._address, self._ports[api]) for api in ("grpc", "http")}
        self._gateway = Gateway(folder, limits, self.tls, front, behind)
        self._gateway.wait_until_ready(self._start_timeout)

    def _failure(self, message: str) -> ServerError:
        """An error that names the log, which is then kept."""
        self._keep_log = True
        return ServerError(f"{message}; its log: {self.log_path}")

    def _reason(self) -> str:
        """The line of the log that says why the server did not start; empty where there is none."""
        if self.log_path == STDOUT:
            return ""
        text = self.log_path.read_bytes()[self._log_start :].decode(errors="replace")
        for pattern in (
            r"(?:failed to load|Poll failed for model directory) '(?P<model>[^']+)'.*?: (?P<reason>.*)",
            # CudaDriverHelper is in the log of every CPU.
            r"(?m)^(?!.*CudaDriverHelper)(?:E\d.*?\] |[Ee]rror: |.*tritonserver: )(?P<reason>.*)",
            r"(?P<reason>[^\n]*\S)\s*\Z",
        ):
            if match := re.search(pattern, text):
                reason = match["reason"].partition(r"\n\nAt:")[0].strip(' ";')  # without the traceback
                model = match.groupdict().get("model")
                hint = f"model {model} does not load ({reason}): check its configs or export it again"
                return hint if model else reason
        return ""

    def _clean_up(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # also a stub that outlived the server
            self._process.wait()
            self._process = None
        if self._gateway is not None:
            self._gateway.stop()
            self._gateway = None
        self._workdir.remove(self.log_path if self._keep_log and self._log is None else None)


def _restricted(keys: Mapping[str, str]) -> list[str]:
    """Tritonserver's options for the groups of APIs that require a key."""
    secret = secrets.token_urlsafe()  # known to nobody: it closes the group
    return [
        f"--{option}={group}:{KEY_HEADER}={key}"
        for group, key in (dict.fromkeys(ADMIN, secret) | dict(keys)).items()
        for option in ("grpc-restricted-protocol", "http-restricted-api")
    ]


def _url(place: Place) -> str:
    """Where a client on this machine reaches a server: one on all addresses, on the loopback one."""
    address, port = place
    return f"{'127.0.0.1' if address == '0.0.0.0' else address}:{port}"
