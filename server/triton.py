"""Real tritonserver as a child process: found, started, waited for, measured and stopped.

An installed tritonserver (the container's) is used with its own backends. Else the one inside the wheel
nvidia-pytriton is, with the Python-based backend in `server/backends` in place of the missing C++ one.
"""

import contextlib
import ctypes
import ctypes.util
import fcntl
import http.client
import importlib.util
import ipaddress
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

from ecapa_triton.protocol import KEY_HEADER

from export import configs
from server import child
from server.gateway import Gateway, GatewayError
from server.options import ADMIN, Device, Limits, Precision, ServerError, Tls, check_keys

_INSTALLED = "/opt/tritonserver/bin/tritonserver"
_BACKENDS = Path(__file__).parent / "backends"
LONGEST_TIMEOUT = 86400  # s
_USUAL_REQUESTS = {"CPU": 128, "GPU": 1024}  # in work at once, where clients are limited
_FOLDER = "ecapa-triton-"  # in the system's folder for temporary files, and more letters
_LOCK = "lock"  # held by the process whose folder it is
_SETTING_UP = 60  # s, at most, between the making of a folder and of its lock
_SHM = Path("/dev/shm")
_STDOUT = Path("/dev/stdout")
# Bytes. A batch passes through shared memory on its way to the model, and Triton does not limit what a request holds.
# Where it does not fit, the clips that share the batch fail, and requests stay behind that hold up the server's stop.
_ENOUGH_SHM = 1 << 30


class TritonServer:
    """A tritonserver that is ready inside the `with` block and gone after it.

    When the thread that started it ends the server ends too, so it never outlives a process that was killed:
    start it from a thread that lives as long as it is needed.
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
            device: Where the models run; "auto" takes a GPU if one can be used.
            gpus: Numbers of the GPUs to run on; all without. Each has the instances that the configs say.
            precision: "fp16" takes the float16 files where the models run on GPUs.
            models: Names of the models to serve, each of them exported; None: all that are exported.
            threads: CPU threads of each model instance where the models run on the CPU; None: those of the configs.
            http_port: Port of the HTTP API, 0 for a free one; `grpc_port` and `metrics_port` likewise.
            grpc_port: Port of the gRPC API.
            metrics_port: Port of the Prometheus metrics.
            address: Address that HTTP and gRPC listen on.
            metrics_address: Address that the metrics listen on.
            limits: What clients may ask for; nginx then listens in front of Triton's HTTP and gRPC APIs. Triton itself
                sets no limit.
            tls: How nginx encrypts both APIs; needs `limits`.
            keys: By group of `GROUPS`, what a client's header `KEY_HEADER` (gRPC: `GRPC_KEY_HEADER`) must hold.
                Those of `ADMIN` without one are closed to everyone.
            extra: Further options for tritonserver.
            log: File that Triton's log is appended to, `-` for standard output. Without one it goes to a temporary
                file, which stays only when something went wrong.
            start_timeout: Seconds until the server must be ready.
            exit_timeout: Seconds that requests in flight have when the server stops.
            warn_exposed: Whether `warnings` says so when other machines reach the server without TLS and keys.
        """
        self.repository = repository
        self._device: Device = device
        self._gpus = gpus
        self._precision: Precision = precision
        self._wanted_models = models
        self._threads = threads
        self._ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._address = address
        self._metrics_address = metrics_address
        self.limits = limits
        self.tls = tls
        self.keys = keys
        self._extra = extra
        self._log = log
        self._start_timeout = start_timeout
        self._exit_timeout = exit_timeout
        self._warn_exposed = warn_exposed
        self._keep_log = False
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gateway: Gateway | None = None
        self._log_start: int | None = None

    def __enter__(self) -> "TritonServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns once its models are ready.

        Raises:
            ServerError: With one line on what is in the way.
        """
        asked = self._ports
        for last in False, False, True:
            try:
                return self._start()
            except ServerError as error:
                if last or 0 not in asked.values() or "already in use" not in str(error):
                    raise
                # Somebody was quicker to take a port that had been free.
                if self._folder is not None and self._log is None:
                    shutil.rmtree(self._folder, ignore_errors=True)
                self._ports = asked

    def _start(self) -> None:
        for what, seconds in ("start", self._start_timeout), ("exit", self._exit_timeout):
            if not 0 < seconds <= LONGEST_TIMEOUT:
                raise ServerError(
                    f"{what} timeout is {seconds:g} s: expected more than 0 and at most {LONGEST_TIMEOUT}"
                )
        installed = find_installed()
        gpus, no_gpu = cuda_gpus()
        if gpus and self._gpus is not None:
            gpus = choose_gpus(gpus, self._gpus)
        if gpus and installed is None and (reason := _cannot_use_cuda(self.repository)):
            gpus, no_gpu = [], f"{reason} cannot use the {gpus[0]}: its build for CUDA can"
        self.device, self.chosen, self.config_name = choose_device(self._device, gpus, no_gpu, self._precision)
        served = check_repository(self.repository, self.config_name, self._wanted_models)
        self.models = list(served)
        if installed is None:
            for backend in sorted(set(served.values()) & set(_PACKAGES)):
                if importlib.util.find_spec(_PACKAGES[backend]) is None:
                    raise ServerError(f"{_PACKAGES[backend]} is not installed: pip install {_PACKAGES[backend]}")
        if self.tls is not None and self.limits is None:
            raise ServerError("TLS needs nginx in front of Triton: apt install nginx-light")
        check_keys(self.keys)
        self._address, self._metrics_address = resolve(self._address), resolve(self._metrics_address)
        wanted = {api: (self._address, port) for api, port in self._ports.items()}
        wanted["metrics"] = self._metrics_address, self._ports["metrics"]
        if self.limits is not None:
            wanted |= {f"{api} behind nginx": ("127.0.0.1", 0) for api in ("http", "grpc")}
        listen = choose_ports(wanted)
        ports = self._ports = {api: listen[api][1] for api in self._ports}  # the same ones when it is started again
        # What listens on every address is reached on the loopback one.
        host, metrics = ("127.0.0.1" if at == "0.0.0.0" else at for at in (self._address, self._metrics_address))
        self.http_url, self.grpc_url = f"{host}:{ports['http']}", f"{host}:{ports['grpc']}"
        self.metrics_url = f"http://{metrics}:{ports['metrics']}/metrics"
        # Where Triton itself listens.
        listen = {api: listen.get(f"{api} behind nginx", listen[api]) for api in ports}

        # C++ backends live in tritonserver's process and need no shared memory.
        warnings = [] if installed else [shm_warning()]
        if self._warn_exposed:
            warnings.append(exposure_warning(self._address, self.tls, self.keys))
        self.warnings = [warning for warning in warnings if warning]
        self._keep_log = False
        remove_stale_folders()
        self._folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        self._lock = _lock(self._folder)
        to_output = self._log == Path("-")
        self.log_path = _STDOUT if to_output else (self._log or self._folder / "tritonserver.log").absolute()
        try:
            self._launch(installed, listen)
            triton = f"{'127.0.0.1' if self.limits else host}:{listen['http'][1]}"
            self._wait_until_ready(triton)
            self._parts = self._session()
            if self.limits is not None:
                self._open_gateway(self.limits, listen)
            self.version: str = json.loads(_get(triton, "/v2", headers=self._key("metadata")))["version"]
        except BaseException as error:
            self._keep_log = isinstance(error, ServerError | http.client.HTTPException)
            self._clean_up()
            if isinstance(error, GatewayError):
                raise ServerError(str(error)) from error
            if isinstance(error, http.client.HTTPException):  # an option of `extra` that closes what is asked here
                raise ServerError(
                    f"tritonserver does not tell its version ({error}): check the options after --"
                ) from error
            if isinstance(error, OSError):  # a full disk, say
                raise ServerError(f"cannot set up the server in {self._folder}: {error}") from error
            raise

    def stop(self) -> bool:
        """Lets requests in flight finish, then ends the server and everything it started.

        Returns:
            Whether the server stopped by itself within its exit timeout; if not, it was killed.
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
        """Waits until the server or a part of it ends without being asked to, and raises ServerError then."""
        assert self._process is not None
        while True:
            try:
                code = self._process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                try:
                    if self._gateway is not None:
                        self._gateway.check()
                except GatewayError as error:
                    raise ServerError(str(error)) from None
                if gone := self._parts - self._session():
                    # Triton goes on, says it is ready and fails every request: it would not even stop in order.
                    self._process.kill()
                    self._keep_log = True
                    raise ServerError(
                        f"process {min(gone)} of tritonserver, in which a model ran, ended while serving "
                        f"(out of memory?); its log: {self.log_path}"
                    ) from None
        self._keep_log = True
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        raise ServerError(f"tritonserver {how} while serving; its log: {self.log_path}")

    def _session(self) -> set[int]:
        """The process ids of the server and its stub processes."""
        found = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):  # the process has just ended
                continue
            if int(session) == self.pid and state != "Z":
                found.add(int(stat.parent.name))
        return found

    @property
    def pid(self) -> int:
        """Process id of tritonserver, which is its session id and that of its stub processes too."""
        assert self._process is not None
        return self._process.pid

    def memory(self) -> dict[str, int]:
        """Resident bytes of "tritonserver", of the "model" processes, and of the "shared" memory between them.

        Pages of libraries that several processes map count in parts (PSS). Of shared memory, all that the segments
        hold counts, also what no process has touched through its latest mapping.
        """
        parts = {"tritonserver": 0, "model": 0, "shared": 0}
        segments = set()
        for pid in self._session():
            try:
                rollup = dict(re.findall(r"(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text()))
                segments |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
                own = 1024 * (int(rollup["Pss"]) - int(rollup["Pss_Shmem"]))
            except (OSError, KeyError):  # the process has just ended
                continue
            parts["tritonserver" if pid == self.pid else "model"] += own
        for segment in segments:
            with contextlib.suppress(OSError):
                parts["shared"] += 512 * os.stat(segment).st_blocks
        return parts

    def _launch(self, installed: Path | None, listen: dict[str, tuple[str, int]]) -> None:
        assert self._folder is not None
        options = {
            "model-repository": self._view(),
            "model-config-name": self.config_name,
            "model-control-mode": "none",
            "metrics-config": "summary_latencies=true",
            "allow-gpu-metrics": str(self.device == "GPU").lower(),
            "exit-timeout-secs": math.ceil(self._exit_timeout),
            # Else Triton keeps the last requests with their clips, to use their memory again.
            "grpc-infer-allocation-pool-size": 0,
        }
        for api, (address, port) in listen.items():
            options |= {f"{api}-address": address, f"{api}-port": port}
        environment = dict(os.environ)
        if self.device == "CPU":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # or Triton takes some memory of every GPU it sees
        else:
            # The configs say so too, where their backend has a setting for it.
            environment.setdefault("NVIDIA_TF32_OVERRIDE", "0")
            if self._gpus is not None:
                visible = environment.get("CUDA_VISIBLE_DEVICES", "")
                names = visible.split(",") if visible else list(map(str, range(max(self._gpus) + 1)))
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in self._gpus)
        if installed is None:
            binary, backends = assemble_wheel(self._folder, environment)
            options["backend-config"] = f"python,shm-region-prefix-name={self._folder.name}-"
        else:
            binary, backends = installed, installed.resolve().parents[1] / "backends"
        options["backend-directory"] = backends
        command = [str(binary), *(f"--{name}={value}" for name, value in options.items())]
        # The configs are complete; completing them would start each model once more.
        command += ["--disable-auto-complete-config", *_restricted(self.keys), *self._extra]
        try:
            # A pipe that nobody reads is an error, not a wait for ever.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            # The container's standard output may belong to root: it cannot be opened by name.
            to_output = self.log_path == _STDOUT
            log = open(os.dup(1) if to_output else os.open(self.log_path, flags, 0o644), "ab", closefd=True)
            os.set_blocking(log.fileno(), True)
        except OSError as error:
            raise ServerError(f"cannot write the log {self.log_path}: {error.strerror}") from error
        try:
            with log:
                self._log_start = log.tell() if self.log_path.is_file() else None
                self._process = child.start(command, log, environment)
        except OSError as error:
            raise ServerError(f"cannot run {binary}: {error.strerror}") from error

    def _view(self) -> Path:
        """The repository, or a folder with links to the models that are served, and their configs if they change."""
        threads = self._threads if self.device == "CPU" else None
        if threads is None and len(self.models) == len(_models(self.repository)):
            return self.repository.absolute()
        assert self._folder is not None
        view = self._folder / "models"
        view.mkdir()
        for name in self.models:
            model = (self.repository / name).absolute()
            config = next(filter(Path.is_file, [model / f"configs/{self.config_name}.pbtxt", model / "config.pbtxt"]))
            key = _THREADS.get(configs.read(config).backend)
            if threads is None or key is None:
                (view / name).symlink_to(model)
                continue
            (view / name).mkdir()
            for path in model.iterdir():
                if path.name not in ("config.pbtxt", "configs"):
                    (view / name / path.name).symlink_to(path)
            setting = f'parameters {{ key: "{key}" value: {{ string_value: "{threads}" }} }}'  # the last one counts
            (view / name / "config.pbtxt").write_text(f"{config.read_text()}\n{setting}\n")
        return view

    def _open_gateway(self, limits: Limits, behind: dict[str, tuple[str, int]]) -> None:
        assert self._folder is not None
        folder = self._folder / "gateway"
        folder.mkdir()
        places = {
            api: (f"{self._address}:{self._ports[api]}", "{}:{}".format(*behind[api])) for api in ("grpc", "http")
        }
        if limits.requests is None:
            self.limits = limits = replace(limits, requests=_USUAL_REQUESTS[self.device])
        self._gateway = Gateway(folder, limits, self.tls, **places)
        deadline = time.monotonic() + self._start_timeout
        while not all(_listens(self._gateway.pid, self._ports[api]) for api in places):
            self._gateway.check()
            if time.monotonic() > deadline:
                raise ServerError(f"nginx was not ready within {self._start_timeout:g} s")
            time.sleep(0.01)

    def _wait_until_ready(self, http_url: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout
        metrics, _, path = self.metrics_url.removeprefix("http://").partition("/")
        awaited = [(http_url, "/v2/health/ready"), (metrics, f"/{path}")]
        while awaited:
            if self._process.poll() is not None:
                code = self._process.returncode
                reason = f"killed by {signal.Signals(-code).name}" if code < 0 else self._failure() or f"status {code}"
                raise ServerError(f"tritonserver did not start: {reason}; its log: {self.log_path}")
            try:
                _get(*awaited[0], headers=self._key("health"))
                if not _listens(self.pid, int(awaited[0][0].rpartition(":")[2])):
                    raise ConnectionError("another process answers")
                awaited.pop(0)
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"tritonserver was not ready within {self._start_timeout:g} s "
                        f"(http://{''.join(awaited[0])}: {error}); its log: {self.log_path}"
                    ) from error
                time.sleep(0.05)

    def _key(self, group: str) -> dict[str, str]:
        """The header that a group of the HTTP API asks for."""
        return {KEY_HEADER: self.keys[group]} if group in self.keys else {}

    def _failure(self) -> str:
        """What the log says of why the server ended; empty where the log cannot be read back."""
        if self._log_start is None:
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return failure_reason(log.read().decode(errors="replace"))

    def _clean_up(self) -> None:
        assert self._folder is not None
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # a stub that outlived the server, too
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None
        if self._gateway is not None:
            self._gateway.stop()
            self._gateway = None
        for segment in _SHM.glob(f"{self._folder.name}-*"):
            segment.unlink(missing_ok=True)
        (self._folder / _LOCK).unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
        keep = self._keep_log and self.log_path.parent == self._folder
        for part in ("backends", "gateway", "models") if keep else ("",):
            shutil.rmtree(self._folder / part, ignore_errors=True)


def remove_stale_folders() -> None:
    """Removes what servers left behind whose process was killed: their folder, with the log that nobody asked for."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/{_LOCK}"):
        try:
            status = lock.lstat()
            old = status.st_uid == os.getuid() and time.time() - status.st_mtime > _SETTING_UP
            if old and (descriptor := _lock(lock.parent)) is not None:
                shutil.rmtree(lock.parent, ignore_errors=True)
                os.close(descriptor)
        except OSError:  # another user's, or just removed
            continue


def _lock(folder: Path) -> int | None:
    """The descriptor of the folder's lock, which is free again when this process ends; None if another holds it."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def find_installed() -> Path | None:
    """Finds a tritonserver that brings its own ONNX Runtime backend."""
    for binary in shutil.which("tritonserver"), _INSTALLED:
        if binary is not None:
            root = Path(binary).resolve().parents[1]
            if (root / "backends/onnxruntime/libtriton_onnxruntime.so").exists():
                return Path(binary)
    return None


def assemble_wheel(folder: Path, environment: dict[str, str]) -> tuple[Path, Path]:
    """Puts the parts of the wheel nvidia-pytriton and our backends together.

    Args:
        folder: Where the backend directory is made.
        environment: The server's environment variables, completed in place.

    Returns:
        The tritonserver binary and the backend directory.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "tritonserver is not installed: pip install -e '.[server]', or run in NVIDIA's Triton container"
        )
    wheel = Path(spec.origin).parent / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.exists():
        versions = ", ".join(sorted(path.name for path in stub.parents[1].iterdir()))
        raise ServerError(f"nvidia-pytriton has no stub for Python {python}: use one of {versions}")
    backends = folder / "backends"
    # Copies, since Triton refuses a library that links out of its backend directory.
    shutil.copytree(wheel / "backends", backends)
    shutil.copy2(stub, backends / "python")
    shutil.copytree(_BACKENDS, backends, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Stubs import from here, whatever their working directory: they pass over PYTHONPATH.
    modules = backends / "python" / "export"
    modules.mkdir()
    for module in "__init__.py", "seal.py":
        shutil.copy2(Path(configs.__file__).parent / module, modules)

    libraries = [str(wheel.parents[1] / "nvidia_pytriton.libs"), *_libpython_folder(python)]
    libraries += filter(None, [environment.get("LD_LIBRARY_PATH")])
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    # The stub embeds Python and finds this environment by the python3 that comes first on PATH.
    path = environment.get("PATH", os.defpath)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy computes nothing there
    return wheel / "bin/tritonserver", backends


def shm_warning() -> str:
    """What to tell who serves with little shared memory; empty where there is enough."""
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError as error:
        return f"{_SHM} cannot be used ({error.strerror}): tritonserver passes clips to the model through it"
    if free >= _ENOUGH_SHM:
        return ""
    return (
        f"{_SHM} has {free / 1e6:.0f} MB free: large requests will fail, and clips that share their batch with them; "
        f"give it {_ENOUGH_SHM >> 30} GB or more (docker run --shm-size={_ENOUGH_SHM >> 30}g)"
    )


def exposure_warning(address: str, tls: Tls | None, keys: Mapping[str, str]) -> str:
    """What to tell who serves everybody; empty for a loopback address, with TLS and with keys."""
    if tls is not None or keys or ipaddress.IPv4Address(address).is_loopback:
        return ""
    return f"all who reach {address} are served, unencrypted: --tls-cert and --key-file"


def _libpython_folder(python: str) -> list[str]:
    name = f"libpython{python}.so.1.0"  # the stub links to it
    for folder in sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib"):
        if folder and os.path.exists(os.path.join(folder, name)):
            return [folder]
    if ctypes.util.find_library(f"python{python}"):  # where the system's loader looks
        return []
    raise ServerError(f"Triton's Python stub needs {name}, which is missing: apt install libpython{python}")


def cuda_gpus() -> tuple[list[str], str]:
    """Asks the CUDA driver, which also obeys CUDA_VISIBLE_DEVICES.

    Returns:
        The names of the GPUs that can be used and, if there are none, why.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "no NVIDIA driver (libcuda.so.1) was found"
    if code := cuda.cuInit(0):
        return [], f"the NVIDIA driver finds no usable GPU (cuInit returned {code})"
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(100)
        cuda.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode())
    return names, "" if names else "the NVIDIA driver shows no GPU"


# The parameter of each backend for the threads of an instance.
_THREADS = {"onnxruntime": "intra_op_thread_count", "pytorch": "INTRA_OP_THREAD_COUNT"}
# The package that stands behind each backend with the wheel, and the library that such a package has for CUDA.
_PACKAGES = {"onnxruntime": "onnxruntime", "pytorch": "torch"}
_CUDA_LIBRARIES = {"onnxruntime": "capi/libonnxruntime_providers_cuda.so", "torch": "lib/libtorch_cuda.so"}


def _cannot_use_cuda(repository: Path) -> str:
    """The first package that a model of the repository needs and that has no CUDA; empty if all have."""
    for model in _models(repository) if repository.is_dir() else []:
        try:
            backend = configs.read(model / "config.pbtxt").backend if _is_exported(model) else ""
        except configs.ConfigError:  # which is told when the repository is checked
            continue
        package = _PACKAGES.get(backend)
        spec = importlib.util.find_spec(package) if package else None  # not imported: it would stay in memory
        if spec is not None and spec.origin is not None and package is not None:
            if not (Path(spec.origin).parent / _CUDA_LIBRARIES[package]).exists():
                return f"the installed {package}"
    return ""


def choose_gpus(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """The names of the GPUs with these numbers.

    Raises:
        ServerError: There is no GPU with one of the numbers, or one comes twice.
    """
    for number in numbers:
        if not 0 <= number < len(names) or numbers.count(number) > 1:
            there = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
            raise ServerError(f"gpus {','.join(map(str, numbers))}: expected different numbers of {there}")
    return [names[number] for number in numbers]


def choose_device(
    device: Device, gpus: Sequence[str], no_gpu: str, precision: Precision = "fp32"
) -> tuple[str, str, str]:
    """Chooses between the configs for CPU and GPU.

    Args:
        device: What was asked for.
        gpus: Names of the GPUs that can be used.
        no_gpu: Why there are none.
        precision: Of the models on a GPU.

    Returns:
        "CPU" or "GPU", a sentence on what was chosen and why, and the name of the configs.
    """
    if device == "cpu" and precision == "fp16":
        raise ServerError("precision fp16 is for GPUs, on a CPU it only costs accuracy: use --precision fp32")
    if device == "cpu":
        return "CPU", "CPU, as asked", "cpu"
    if gpus:
        in_half = ", in float16" if precision == "fp16" else ""
        name = "gpu_fp16" if precision == "fp16" else "gpu"
        return "GPU", f"GPU{', as asked' if device == 'gpu' else ''}: {', '.join(gpus)}{in_half}", name
    if device == "gpu":
        raise ServerError(f"device gpu: {no_gpu}; use --device cpu, or auto to take what there is")
    return "CPU", f"CPU{', in float32' if precision == 'fp16' else ''}: {no_gpu}", "cpu"


def check_repository(repository: Path, config_name: str, names: Sequence[str] | None = None) -> dict[str, str]:
    """Checks that the models of the repository have the files their configs ask for, and ours that they are safe.

    A model of this project is refused when its file is damaged, was changed since the export, lacks a guard against
    bad input, or disagrees with its config. One that was never exported is passed over, as long as another was.

    Args:
        repository: The model repository.
        config_name: "cpu", for example: of the configs to take in place of `config.pbtxt`.
        names: Of the models to serve, each of which must be there and exported; None: all that are exported.

    Returns:
        The backend of each model to serve, by the model's name.
    """
    if not repository.is_dir():
        raise ServerError(f"model repository {repository} is not a folder: give its path with --repository")
    models = _models(repository)
    if not models:
        raise ServerError(f"model repository {repository} has no models: expected a folder {repository}/ecapa")
    backends = {}
    if unknown := sorted(set(names or ()) - {model.name for model in models}):
        has = ", ".join(model.name for model in models)
        raise ServerError(f"model repository {repository} has no model {', '.join(unknown)}: it has {has}")
    if names is not None:
        models = [model for model in models if model.name in names]
    else:
        models = [model for model in models if _is_exported(model)] or models
    for model in models:
        paths = [model / "configs" / f"{config_name}.pbtxt", model / "config.pbtxt"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ServerError(f"model {model} has no config: expected {paths[1]}")
        try:
            config = configs.read(path)
            files = _served_files(model, config)
            if configs.is_ours(config):
                for file in files:
                    configs.check(path, configs.ModelFile.read(file), model.name)
        except (configs.ConfigError, configs.ModelFileError) as error:
            raise ServerError(str(error)) from error
        backends[model.name] = str(config.backend)
    return backends


def _models(repository: Path) -> list[Path]:
    return sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_exported(model: Path) -> bool:
    """Whether it has anything to serve, as far as Triton's own conventions tell."""
    kind = next((kind for kind in configs.FORMATS.values() if kind.folder == model.name), None)
    return kind is None or any((model / "1" / name).exists() for name in (kind.file, kind.half_file))


def _served_files(model: Path, config: Any) -> list[Path]:
    """The model files that Triton would load, of the backends that are known here."""
    usual = "model.onnx" if configs.is_ours(config) else ""  # one of ours is not served unchecked
    filename = config.default_model_filename or configs.USUAL_FILES.get(config.backend, usual)
    if not filename:
        return []
    names = (path.name for path in model.iterdir() if path.is_dir())
    versions = sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))
    if config.version_policy.WhichOneof("policy_choice") in (None, "latest"):
        versions = versions[-(config.version_policy.latest.num_versions or 1) :]
    files = [file for version in versions if (file := model / str(version) / filename).exists()]
    if not files:
        raise ServerError(
            f"{model / str(versions[-1] if versions else 1) / filename} is missing: write it with `python -m export`"
            f"{', or mend default_model_filename in the config' if config.default_model_filename else ''}"
        )
    return files


def resolve(address: str) -> str:
    """Finds the IPv4 address that a name stands for; Triton's HTTP server takes no names."""
    try:
        if not address:
            raise OSError("it is empty")
        return str(socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"address {address!r} cannot be used ({getattr(error, 'strerror', None) or error}): "
            "give an IPv4 address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
        ) from error


def choose_ports(wanted: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Checks that each address and port can be listened on, and finds a free port for each that is 0."""
    sockets: list[socket.socket] = []
    chosen: dict[str, tuple[str, int]] = {}
    try:
        for api, (address, port) in wanted.items():
            listener = socket.socket(socket.AF_INET)
            sockets.append(listener)  # all stay open until the end, so that no port is chosen twice
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address, port))
                listener.listen()
            except (OSError, OverflowError) as error:
                why = error.strerror if isinstance(error, OSError) else "a port is 0 to 65535"
                raise ServerError(
                    f"cannot listen on {address} port {port} for {api}: {why}; "
                    f"choose another with --{api}-port (0 takes a free one) or --address"
                ) from error
            chosen[api] = (address, listener.getsockname()[1])
    finally:
        for listener in sockets:
            listener.close()
    return chosen


def failure_reason(log: str) -> str:
    """Finds the line of Triton's log that tells why the server did not start."""
    log = "\n".join(line for line in log.split("\n") if "CudaDriverHelper" not in line)  # said on every CPU
    for pattern in (
        r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)",
        r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)",
        r"(?P<reason>(?:unrecognized|ambiguous) option.*|option .* requires an argument.*)",
        r"(?m)^E\d.*?\] (?P<reason>.*)",
        r"(?m)^[Ee]rror: (?P<reason>.*)",
    ):
        if match := re.search(pattern, log):
            # Without the traceback, whose line ends Triton escapes.
            reason = match["reason"].partition(r"\n\nAt:")[0].strip(' ";')
            model = match.groupdict().get("model")
            return f"model {model} does not load ({reason}): check its configs or export it again" if model else reason
    lines = log.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")


def _restricted(keys: Mapping[str, str]) -> list[str]:
    """Tritonserver's options for APIs that ask for a key."""
    nobodys = secrets.token_urlsafe()
    return [
        f"--{option}={group}:{KEY_HEADER}={key}"
        for group, key in (dict.fromkeys(ADMIN, nobodys) | dict(keys)).items()
        for option in ("grpc-restricted-protocol", "http-restricted-api")
    ]


def _get(host: str, path: str, *, headers: dict[str, str]) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise http.client.HTTPException(f"status {response.status}")
    return body


def _listens(pid: int, port: int) -> bool:
    """Whether the process itself holds the listening socket of a port, not somebody who was quicker."""
    sockets = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: listening
            sockets.add(f"socket:[{fields[9]}]")
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(descriptor) in sockets:
                return True
        except OSError:  # closed in the meantime
            continue
    return False
