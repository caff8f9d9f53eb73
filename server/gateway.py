"""The gateway: nginx in front of Triton, from `nginx.conf.template`. Limits size and number of the requests in flight.

Triton limits no size. Its own limit on waiting requests, the queue policy of a model's config, makes its scheduler miss
requests for up to half a second, so the configs have none.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from server import child
from server.options import Limits, Place, ServerError, Tls

TEMPLATES = [Path(__file__).parent / f"{name}.conf.template" for name in ("tls", "nginx")]
PLACES = ["nginx", "/usr/sbin/nginx", "/usr/local/sbin/nginx"]  # sbin is on the PATH of root alone
_STOP_TIMEOUT = 3  # s until nginx is killed; Triton has ended before, so few replies are left to pass on


def find() -> str | None:
    """Finds the nginx binary."""
    return next(filter(None, map(shutil.which, PLACES)), None)


class Gateway:
    """A running nginx that passes gRPC and HTTP on to a Triton."""

    def __init__(
        self, folder: Path, limits: Limits, tls: Tls | None, front: Mapping[str, Place], behind: Mapping[str, Place]
    ) -> None:
        """Starts it.

        Args:
            folder: An empty folder for its files.
            limits: What it lets through.
            tls: Encryption; None: plain text.
            front: By API ("grpc", "http"), the address and port that it listens on.
            behind: Likewise those of Triton.

        Raises:
            ServerError: nginx is missing, or rejects its configuration.
        """
        binary = find()
        if binary is None:
            raise ServerError("nginx is not installed: apt install nginx-light, or --gateway off")
        values = {
            "FOLDER": folder,
            "GRPC": "{}:{}".format(*front["grpc"]),
            "GRPC_BEHIND": "{}:{}".format(*behind["grpc"]),
            "HTTP": "{}:{}".format(*front["http"]),
            "HTTP_BEHIND": "{}:{}".format(*behind["http"]),
            "RESOLVER": "127.0.0.1",  # never queried: Triton has a fixed address here
            "MAX_REQUESTS": limits.requests,
            "REQUEST_LOG": "off",
            "MAX_REQUEST_MB": limits.request_mb,
            "SSL": "ssl" if tls else "",
            "TLS_CONF": folder / "tls.conf" if tls else os.devnull,
            "CERTIFICATE": _quoted(tls.certificate) if tls else "",
            "CERTIFICATE_KEY": _quoted(tls.key) if tls else "",
            "VERIFY_CLIENT": "on" if tls and tls.client_ca else "off",
            "CLIENT_CA": _quoted(tls.client_ca or tls.certificate) if tls else "",
        }
        for template in TEMPLATES:
            configuration = folder / template.stem
            text = re.sub(r"\$\{(\w+)\}", lambda name: str(values[name[1]]), template.read_text())
            configuration.write_text(text)
        command = [binary, "-c", str(configuration), "-p", str(folder)]
        # In a session of its own nginx has no terminal to ask for a pass phrase.
        test = subprocess.run(
            [*command, "-t"], stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
        )
        if test.returncode != 0:
            raise ServerError(f"nginx does not start: {_reason(test.stderr)}")
        self._ports = [port for _, port in front.values()]
        self._log = folder / "nginx.log"
        with self._log.open("wb") as log:
            self._process = child.start(command, log)

    def wait_until_ready(self, timeout: float) -> None:
        """Waits until nginx listens; ServerError if it ends or needs more than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not all(child.listens(self._process.pid, port) for port in self._ports):
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(f"nginx was not ready within {timeout:g} s")
            time.sleep(0.01)

    def check(self) -> None:
        """Raises ServerError when nginx has ended."""
        if (code := self._process.poll()) is not None:
            self._kill_workers()  # they outlive the master and would pass clients on to a Triton that is stopping
            reason = _reason(self._log.read_text(errors="replace"))
            raise ServerError(f"nginx in front of tritonserver {child.ending(code)}{reason and f': {reason}'}")

    def stop(self) -> None:
        """Ends nginx after it has passed on the last replies."""
        self._process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT)
        self._kill_workers()
        self._process.wait()

    def _kill_workers(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _quoted(path: Path) -> str:
    """The path of a certificate or key, in nginx's syntax."""
    escaped = re.sub(r'(["\\])', r"\\\1", str(path.absolute()))
    return f'"{escaped}"'


def _reason(log: str) -> str:
    """The first line of nginx's log that ends it."""
    found = re.search(r"\[(?:emerg|crit)\] (?:\d+#\d+: )?(.*)", log)
    return found[1] if found else ""
