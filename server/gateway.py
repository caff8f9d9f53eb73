"""The gateway: nginx in front of Triton, from `nginx.conf.template`, with the limits, keys and TLS that Triton lacks.

Triton listens on unix sockets, which are files of this user. Its own limit on waiting requests, the queue policy of a
model's config, makes its scheduler miss requests for up to half a second, so the configs have none.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from server import child, preflight
from server.options import ADMIN, DEFAULT_REQUESTS, GROUPS, Keys, Limits, Place, ServerError, Tls, check_keys, url_of
from server.workdir import Workdir

TEMPLATE = Path(__file__).parent / "nginx.conf.template"
COUNTER = Path(__file__).parent / "gateway_metrics.py"
PLACES = ["nginx", "/usr/sbin/nginx", "/usr/local/sbin/nginx"]  # sbin is on the PATH of root alone
# Of JSON bodies, which take Triton twenty times their size: megabytes of one (30 s of audio are 6), requests in flight,
# and those of one address.
JSON_MB, JSON_REQUESTS, JSON_PER_ADDRESS = 8, 16, 8
GRPC_SOCKET, HTTP_SOCKET = "grpc:1", "http"  # Triton's, in a folder; Triton adds a port to the first
_SHORT = 2  # s; a counter that ends sooner is not started again
_LONGEST_SOCKET = 107  # bytes of its path, of the kernel


def find() -> str | None:
    """Finds the nginx binary."""
    return next(filter(None, map(shutil.which, PLACES)), None)


def make_sockets_folder(folder: Path) -> Path:
    """The absolute path of the folder for Triton's sockets, without those of an earlier Triton."""
    folder = folder.absolute()
    if len(os.fsencode(folder / GRPC_SOCKET)) > _LONGEST_SOCKET:
        raise ServerError(
            f"path of Triton's sockets {folder} is too long: expected at most {_LONGEST_SOCKET - len(GRPC_SOCKET) - 1} "
            "bytes; set TMPDIR, or --sockets, to a shorter path"
        )
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in GRPC_SOCKET, HTTP_SOCKET:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ServerError(f"cannot use the folder of Triton's sockets: {error}") from error
    return folder


class Gateway:
    """A running nginx that passes gRPC and HTTP on to a Triton, and the process that counts its requests."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        tls: Tls | None,
        keys: Keys,
        front: Mapping[str, Place],
        sockets: Path,
        stop_timeout: float = 3,
    ) -> None:
        """Starts it.

        Args:
            folder: A private folder for its files; its path is short, since a socket is in it.
            limits: What it lets through.
            tls: Encryption; None: plain text.
            keys: By group of `GROUPS`, the keys of which a client must send one. Groups of `ADMIN` without are closed.
            front: The address and port of "grpc", "http", and "gateway metrics".
            sockets: Folder of Triton's sockets.
            stop_timeout: Seconds for the last replies when it stops. Triton has usually ended before.

        Raises:
            ServerError: nginx is missing, or rejects its configuration.
        """
        binary = find()
        if binary is None:
            raise ServerError("nginx is not installed: apt install nginx-light, or --gateway off")
        values = {
            # Its workers open Triton's sockets, so they must not change to another user.
            "USER": "" if os.geteuid() else "user root;\n",
            "FOLDER": folder,
            "SOCKETS": sockets,
            "GRPC": "{}:{}".format(*front["grpc"]),
            "HTTP": "{}:{}".format(*front["http"]),
            "SSL": "ssl" if tls else "",
            "TLS": _tls(tls) if tls else "",
            "ALLOWED": _allowed(keys),
            "MAX_REQUESTS": limits.requests,
            "MAX_PER_ADDRESS": limits.per_address,
            "MAX_CONNECTION_AGE": limits.connection_age,
            "MAX_REQUEST_MB": limits.request_mb,
            "MAX_JSON": min(JSON_REQUESTS, limits.requests or JSON_REQUESTS),
            "MAX_JSON_PER_ADDRESS": JSON_PER_ADDRESS,
            "MAX_JSON_MB": min(JSON_MB, limits.request_mb),
        }
        configuration = folder / "nginx.conf"
        configuration.touch(0o600)  # it has the keys
        configuration.write_text(re.sub(r"\$\{(\w+)\}", lambda name: str(values[name[1]]), TEMPLATE.read_text()))
        command = [binary, "-e", "stderr", "-c", str(configuration), "-p", str(folder)]
        # In a session of its own nginx has no terminal to ask for a pass phrase.
        test = subprocess.run(
            [*command, "-t"], stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
        )
        if test.returncode != 0:
            raise ServerError(f"nginx does not start: {_reason(test.stderr)}")
        self._front = front
        self._stop_timeout = stop_timeout
        address, port = front["gateway metrics"]
        places = [f"--socket={folder / 'log'}", f"--address={address}", f"--port={port}"]
        self._count = [sys.executable, "-IS", str(COUNTER), *places, f"--triton={sockets / HTTP_SOCKET}"]
        self._log = folder / "nginx.log"
        with self._log.open("wb") as log:
            self._process = child.start(command, log)
        self._start_counter()

    def _start_counter(self) -> None:
        self._counter = child.start(self._count, None)
        self._counting_since = time.monotonic()

    def wait_until_ready(self, timeout: float) -> None:
        """Waits until nginx listens; ServerError if it ends or needs more than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        waiting = {port: self._process.pid for _, port in self._front.values()}
        waiting[self._front["gateway metrics"][1]] = self._counter.pid
        while waiting := {port: pid for port, pid in waiting.items() if not child.listens(pid, port)}:
            self.check()
            if self._counter.poll() is not None:
                raise ServerError(f"the gateway's metrics cannot be served: {child.ending(self._counter.returncode)}")
            if time.monotonic() > deadline:
                raise ServerError(f"nginx was not ready within {timeout:g} s")
            time.sleep(0.01)

    def check(self) -> None:
        """Raises ServerError when nginx has ended."""
        if (code := self._process.poll()) is not None:
            _kill_group(self._process)  # workers outlive the master and would pass clients on to a stopping Triton
            reason = _reason(self._log.read_text(errors="replace"))
            raise ServerError(f"nginx in front of tritonserver {child.ending(code)}{reason and f': {reason}'}")

    def supervise(self) -> None:
        """Raises ServerError when nginx has ended; a dead counter is replaced, since nginx does without it."""
        self.check()
        if self._counter.poll() is not None:
            if time.monotonic() - self._counting_since < _SHORT:
                raise ServerError(f"the gateway's metrics cannot be served: {child.ending(self._counter.returncode)}")
            self._start_counter()

    def stop(self, timeout: float | None = None) -> bool:
        """Ends nginx after it has passed on the last replies; returns whether they took no longer than they may."""
        in_time = True
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(self._stop_timeout if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            in_time = False
        for process in self._process, self._counter:
            _kill_group(process)
            process.wait()
        return in_time


class LoneGateway:
    """A gateway in front of a Triton that another launcher runs with `--gateway off --sockets`, in another container.

    It has the methods and attributes of `TritonServer` that the launcher uses.
    """

    def __init__(
        self,
        sockets: Path,
        limits: Limits,
        *,
        address: str,
        metrics_address: str,
        ports: Mapping[str, int],
        tls: Tls | None,
        keys: Keys,
        exit_timeout: float,
    ) -> None:
        """Describes it; `start` starts it.

        Args:
            sockets: Folder of Triton's sockets, which need not exist yet.
            limits: As for `Gateway`, and `tls` and `keys` likewise.
            address: Address of HTTP and gRPC.
            metrics_address: Address of the gateway's metrics.
            ports: Of "grpc", "http", and "gateway metrics".
            tls: Encryption.
            keys: Keys by group.
            exit_timeout: Seconds that requests in flight have when it stops.
        """
        self.limits = replace(limits, requests=limits.requests or DEFAULT_REQUESTS["CPU"])
        self.tls, self.keys = tls, keys
        self.warnings: list[str] = []
        self._sockets = sockets.absolute()
        self._addresses = address, metrics_address
        self._ports = ports
        self._exit_timeout = exit_timeout
        self._workdir: Workdir | None = None
        self._gateway: Gateway | None = None

    @property
    def is_open(self) -> bool:
        """Whether clients reach it at every address of this host."""
        return self._addresses[0] == "0.0.0.0"

    def start(self) -> None:
        """Starts it and returns once it listens; ServerError if it cannot."""
        check_keys(self.keys)
        address, metrics_address = map(preflight.resolve, self._addresses)
        wanted = {api: (metrics_address if "metrics" in api else address, port) for api, port in self._ports.items()}
        front = preflight.choose_ports(wanted)
        self._ports = {api: port for api, (_, port) in front.items()}
        self.warnings = list(filter(None, [preflight.exposure_warning(address, self.tls, self.keys)]))
        self._workdir = Workdir()
        try:
            self._gateway = Gateway(
                self._workdir.path, self.limits, self.tls, self.keys, front, self._sockets, self._exit_timeout
            )
            self._gateway.wait_until_ready(10)
        except BaseException:
            self.stop()
            raise
        self.places = {api: url_of(place) for api, place in front.items()}

    def wait(self) -> NoReturn:
        """Waits until it ends unexpectedly; then raises ServerError."""
        assert self._gateway is not None
        while True:
            self._gateway.supervise()
            time.sleep(0.5)

    def stop(self, timeout: float | None = None) -> bool:
        """Passes on the last replies, then ends it; returns whether they took no longer than the exit timeout."""
        in_time = self._gateway is None or self._gateway.stop(timeout)
        self._gateway = None
        if self._workdir is not None:
            self._workdir.remove()
        return in_time


def _allowed(keys: Keys) -> str:
    """Lines of nginx's map from group and key to 1. Patterns, since nginx compares strings without their case."""
    lines = [f"    ~^{group}: 1;" for group in GROUPS if group not in keys and group not in ADMIN]
    for group, accepted in keys.items():
        for key in accepted:
            pattern = "".join(one if one.isalnum() else f"\\x{ord(one):02x}" for one in key)
            lines.append(f'    "~^{group}:{pattern}$" 1;')
    return "\n".join(lines)


def _tls(tls: Tls) -> str:
    lines = [
        f"  ssl_certificate {_quoted(tls.certificate)};",
        f"  ssl_certificate_key {_quoted(tls.key)};",
        "  ssl_protocols TLSv1.2 TLSv1.3;",
        "  ssl_session_tickets off;",
    ]
    if tls.client_ca:
        lines += ["  ssl_verify_client on;", f"  ssl_client_certificate {_quoted(tls.client_ca)};"]
    return "\n" + "\n".join(lines)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _quoted(path: Path) -> str:
    """The path of a certificate or key, in nginx's syntax."""
    escaped = re.sub(r'(["\\])', r"\\\1", str(path.absolute()))
    return f'"{escaped}"'


def _reason(log: str) -> str:
    """The first line of nginx's log that ends it."""
    found = re.search(r"\[(?:emerg|crit)\] (?:\d+#\d+: )?(.*)", log)
    return found[1] if found else ""
