"""A real tritonserver as a child process: started, waited for, measured and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import psutil  # type: ignore[import-untyped]
from ecapa_triton.protocol import KEY_HEADER

from server import child, preflight, wheel
from server.gateway import GRPC_SOCKET, HTTP_SOCKET, Gateway, make_sockets_folder
from server.options import (
    ADMIN,
    DEFAULT_REQUESTS,
    Device,
    Keys,
    Limits,
    Place,
    Precision,
    ServerError,
    Tls,
    check_keys,
    url_of,
)
from server.workdir import Workdir

STDOUT = Path("/dev/stdout")
LONGEST_TIMEOUT = 86400  # s
# Tritonserver is asked so often (s) whether it lives; after so many questions without an answer it is killed.
WATCH, UNANSWERED = 5.0, 6
KEPT_LOGS = 10  # of failures


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
        gateway_metrics_port: int = 0,
        sockets: Path | None = None,
        address: str = "127.0.0.1",
        metrics_address: str = "127.0.0.1",
        limits: Limits | None = None,
        tls: Tls | None = None,
        keys: Keys = MappingProxyType({}),
        extra: Sequence[str] = (),
        log: Path | None = None,
        start_timeout: float = 120,
        exit_timeout: float = 30,
    ) -> None:
        """Describes the server; `start` or the `with` statement starts it.

        Args:
            repository: The model repository.
            device: Where the models run; "auto" is a GPU if one is usable.
            gpus: Numbers of the GPUs to run on; None: all. The configs give the number of instances on each.
            precision: "fp16" serves the float16 files where the models run on GPUs, "int8" the int8 files on CPUs.
            models: Names of the models to serve, each of them exported; None: all that are exported.
            threads: Threads of each model instance on the CPU; None: as the configs say.
            http_port: Port of the HTTP API, 0 for a free one; `grpc_port` and `metrics_port` likewise.
            grpc_port: Port of the gRPC API.
            metrics_port: Port of the Prometheus metrics.
            gateway_metrics_port: Port of the gateway's metrics, on `metrics_address`.
            sockets: Folder in which Triton's HTTP and gRPC APIs listen, on unix sockets in place of ports, for a
                gateway that another launcher runs.
            address: Address of HTTP and gRPC.
            metrics_address: Address of the metrics.
            limits: Limits of the gateway, which then listens in front of Triton's HTTP and gRPC APIs. None: no gateway
                and no limits.
            tls: Encryption of both APIs by the gateway; needs `limits`, as `keys` does.
            keys: By group of `GROUPS`, the keys of which a client must send one in the header `KEY_HEADER` (gRPC:
                `GRPC_KEY_HEADER`). The groups of `ADMIN` are closed unless they have a key.
            extra: Further options for tritonserver.
            log: File that Triton's log is appended to, `-` for standard output. None: a temporary file, which is kept
                only after a failure.
            start_timeout: Seconds until the server must be ready.
            exit_timeout: Seconds that requests in flight have when the server stops.
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
        if limits is not None:
            self._ports["gateway metrics"] = gateway_metrics_port
        elif sockets is not None:
            self._ports = {"metrics": metrics_port}
        self._sockets = sockets
        self._address = address
        self._metrics_address = metrics_address
        self._extra = extra
        self._log = log
        self._start_timeout = start_timeout
        self._exit_timeout = exit_timeout
        self._workdir: Workdir | None = None
        self._kept_logs: list[Path] = []
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
                if self._log is None:
                    shutil.rmtree(self._kept_logs.pop().parent, ignore_errors=True)
                self._ports = ports

    def stop(self, timeout: float | None = None) -> bool:
        """Lets requests in flight finish, then ends the server and everything it started.

        Args:
            timeout: Seconds that requests in flight have; None: the exit timeout.

        Returns:
            Whether the server stopped within that time; if not, it was killed.
        """
        in_time = True
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self._exit_timeout if timeout is None else timeout)
            except subprocess.TimeoutExpired:
                in_time, self._keep_log = False, True
        self._clean_up()
        return in_time

    def wait(self) -> NoReturn:
        """Waits until the server or a part of it ends unexpectedly, or the server no longer answers.

        Raises:
            ServerError: What ended, always.
        """
        assert self._process is not None
        asked, unanswered = time.monotonic(), 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=0.2)
                raise self._failure(f"tritonserver {child.ending(code)} while serving{self._out_of_memory()}")
            if self._gateway is not None:
                self._gateway.supervise()
            for stub in self._stubs:
                if not child.is_alive(stub):
                    # Triton itself would claim to be ready, fail every request and never stop in order.
                    self._process.kill()
                    raise self._failure(f"process {stub.pid} of a model ended while serving{self._out_of_memory()}")
            if time.monotonic() - asked >= WATCH:
                unanswered = 0 if self._lives() else unanswered + 1
                asked = time.monotonic()
                if unanswered == UNANSWERED:
                    self._process.kill()
                    raise self._failure(f"tritonserver did not answer for {WATCH * UNANSWERED:g} s and was killed")

    @property
    def is_open(self) -> bool:
        """Whether clients reach it at every address of this host."""
        return self._places.get("http", ("", 0))[0] == "0.0.0.0"

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

    def _prepare(self) -> tuple[Path | None, str]:
        """Checks and choices: the installed tritonserver, the name of the configs; addresses and ports."""
        for name, seconds in ("start", self._start_timeout), ("exit", self._exit_timeout):
            if not 0 < seconds <= LONGEST_TIMEOUT:
                raise ServerError(f"{name} timeout is {seconds:g} s: expected more than 0, at most {LONGEST_TIMEOUT}")
        for what, wanted in ("TLS needs", self.tls), ("keys need", self.keys):
            if wanted and self.limits is None:
                raise ServerError(f"{what} nginx in front of Triton: apt install nginx-light")
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
        self._choose_places()
        # The C++ backends of an installed server run in its process and need no shared memory.
        warnings = ["" if installed else preflight.shm_warning()]
        if "http" in self._places:
            if installed is None and self.limits is None:
                preflight.check_unguarded(self._address)
            warnings.append(preflight.exposure_warning(self._address, self.tls, self.keys))
        self.warnings = [warning for warning in warnings if warning]
        return installed, config_name

    def _choose_places(self) -> None:
        """Settles the addresses and ports for clients."""
        self._address, self._metrics_address = (
            preflight.resolve(self._address),
            preflight.resolve(self._metrics_address),
        )
        wanted = {
            api: (self._metrics_address if "metrics" in api else self._address, port)
            for api, port in self._ports.items()
        }
        self._places = preflight.choose_ports(wanted)
        self._ports = {api: port for api, (_, port) in self._places.items()}  # a restarted server keeps them
        if "http" in self._places:
            self.http_url, self.grpc_url = url_of(self._places["http"]), url_of(self._places["grpc"])
        elif self._sockets is not None:
            self.http_url, self.grpc_url = (f"unix:{self._sockets / name}" for name in (HTTP_SOCKET, GRPC_SOCKET))
        self.metrics_url = f"http://{url_of(self._places['metrics'])}/metrics"
        if self.limits is not None:
            self.gateway_metrics_url = f"http://{url_of(self._places['gateway metrics'])}/metrics"

    def _run(self, installed: Path | None, config_name: str) -> None:
        self._keep_log = False
        self._memory_kills = child.out_of_memory_kills()
        self._workdir = workdir = Workdir()
        own_log = workdir.path / "tritonserver.log"
        self.log_path = STDOUT if self._log == Path("-") else (self._log or own_log).absolute()
        try:
            # The sockets of a server with a gateway are in its private folder.
            folder = self._sockets or (workdir.path if self.limits is not None else None)
            sockets = make_sockets_folder(folder) if folder else None
            self._launch(workdir, installed, config_name, sockets)
            self._http = sockets / HTTP_SOCKET if sockets else self._places["http"]
            self._wait_until_ready()
            # The wheel has no newer release to change to: on this machine alone it may be old.
            if installed or not all(map(preflight.is_loopback, (self._address, self._metrics_address))):
                self.warnings += filter(None, [preflight.release_warning(self.version)])
            self._stubs = psutil.Process(self.pid).children()  # of the wheel's Python backend
            if self.limits is not None and sockets is not None:
                self._open_gateway(workdir.path, self.limits, sockets)
        except BaseException as error:
            self._clean_up()
            if isinstance(error, OSError):  # a full disk, for example
                raise ServerError(f"cannot set up the server: {error}") from error
            raise

    def _launch(self, workdir: Workdir, installed: Path | None, config_name: str, sockets: Path | None) -> None:
        models = [self.repository / name for name in self.models]
        threads = self._threads if self.device == "CPU" else None
        changed = threads is not None or len(models) < len(preflight.all_models(self.repository))
        options: dict[str, object] = {
            "model-repository": workdir.link(models, threads) if changed else self.repository.absolute(),
            "model-config-name": config_name,
            "model-control-mode": "none",
            "metrics-config": "summary_latencies=true",
            "allow-gpu-metrics": str(self.device == "GPU").lower(),
            "exit-timeout-secs": math.ceil(self._exit_timeout),
            "grpc-infer-allocation-pool-size": 0,  # else Triton keeps the clips of past requests in memory
        }
        places = {api: place for api, place in self._places.items() if api != "gateway metrics"}
        if sockets:
            places["http"] = f"unix:{sockets / HTTP_SOCKET}", 1
            name, _, number = GRPC_SOCKET.partition(":")
            places["grpc"] = f"unix:{sockets / name}", int(number)
        for api, (address, port) in places.items():
            options |= {f"{api}-address": address, f"{api}-port": port}
        environment = dict(os.environ) | preflight.gpu_environment(self.device, self._gpus)
        if installed is None:
            binary, backends = wheel.assemble(workdir.path, environment)
            options["backend-config"] = f"python,shm-region-prefix-name={workdir.path.name}-"
        else:
            binary, backends = installed, installed.resolve().parents[1] / "backends"
        options["backend-directory"] = backends
        command = [str(binary), *(f"--{name}={value}" for name, value in options.items())]
        # The configs are complete; completing them would start each model once more.
        command += ["--disable-auto-complete-config", *([] if sockets else _closed()), *self._extra]
        with contextlib.ExitStack() as stack:
            log = None if self.log_path == STDOUT else stack.enter_context(self.log_path.open("ab"))
            self._log_start = log.tell() if log else 0
            self._process = child.start(command, log, environment)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout
        for api, place, path in (
            ("HTTP", self._http, "/v2/health/ready"),
            ("metrics", self._places["metrics"], "/metrics"),
            ("HTTP", self._http, "/v2"),
        ):
            while True:
                if (code := self._process.poll()) is not None:
                    reason = (code >= 0 and self._reason()) or child.ending(code)
                    raise self._failure(f"tritonserver did not start: {reason}")
                try:
                    body = ask(place, path)
                    if isinstance(place, Path) or child.listens(self.pid, place[1]):  # else another server has replied
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

    def _open_gateway(self, folder: Path, limits: Limits, sockets: Path) -> None:
        if limits.requests is None:
            self.limits = limits = replace(limits, requests=DEFAULT_REQUESTS[self.device])
        front = {api: self._places[api] for api in ("grpc", "http", "gateway metrics")}
        self._gateway = Gateway(folder, limits, self.tls, self.keys, front, sockets)
        self._gateway.wait_until_ready(self._start_timeout)

    def _lives(self) -> bool:
        try:
            ask(self._http, "/v2/health/live", timeout=2)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _out_of_memory(self) -> str:
        """A note if the kernel has killed a process of this container for want of memory since the start."""
        return " (out of memory)" if child.out_of_memory_kills() > self._memory_kills else ""

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
        """Ends all that was started and removes the files; a second time it does what is left to do."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # also a stub that outlived the server
            self._process.wait()
            self._process = None
        if self._gateway is not None:
            self._gateway.stop()
            self._gateway = None
        if self._workdir is not None:
            keeps = self._keep_log and self._log is None
            self._workdir.remove(self.log_path if keeps else None)
            self._workdir = None
            self._kept_logs += [self.log_path] if keeps else []
            for old in self._kept_logs[:-KEPT_LOGS]:
                shutil.rmtree(old.parent, ignore_errors=True)
            del self._kept_logs[:-KEPT_LOGS]


def _closed() -> list[str]:
    """Tritonserver's options that close the APIs of operators where no gateway does."""
    secret = secrets.token_urlsafe()  # not told to anyone
    return [
        f"--{option}={group}:{KEY_HEADER}={secret}"
        for group in ADMIN
        for option in ("grpc-restricted-protocol", "http-restricted-api")
    ]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(place: Place | Path, path: str, timeout: float = 5) -> bytes:
    """The body of the reply to a GET at an address and port, or at a unix socket; OSError or HTTPException without."""
    where = str(place) if isinstance(place, Path) else url_of(place)
    connection = (_UnixConnection if isinstance(place, Path) else http.client.HTTPConnection)(where, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        reply = connection.getresponse()
        if reply.status != 200:
            raise http.client.HTTPException(f"HTTP status {reply.status}")
        return reply.read()
