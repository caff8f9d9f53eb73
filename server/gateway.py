"""nginx in front of Triton, from `nginx.conf.template`: bounds the size and the number of the requests in work.

Triton takes a request of any size. Its own limit on waiting requests, the queue policy of a model's config, makes its
scheduler miss requests for up to half a second, so the configs have none.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

from server import child
from server.options import Limits, Tls

TEMPLATES = [Path(__file__).parent / f"{name}.conf.template" for name in ("tls", "nginx")]
_STOPPING = 3  # s until it is killed; Triton has ended before it, so there is little that it still has to send
PLACES = ["nginx", "/usr/sbin/nginx", "/usr/local/sbin/nginx"]  # sbin is on the PATH of root alone


class GatewayError(Exception):
    """nginx did not start. The message is one line."""


def find() -> str | None:
    """Finds the nginx binary."""
    return next(filter(None, map(shutil.which, PLACES)), None)


class Gateway:
    """A running nginx, which passes gRPC and HTTP on to a Triton."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        tls: Tls | None = None,
        *,
        grpc: tuple[str, str],
        http: tuple[str, str],
    ) -> None:
        """Starts it.

        Args:
            folder: An empty folder for its files.
            limits: What it lets through.
            tls: How; None: in the clear.
            grpc: Address and port that it listens on for gRPC, and those of Triton behind it; `http` likewise.
            http: See `grpc`.

        Raises:
            GatewayError: With one line on what is in the way.
        """
        binary = find()
        if binary is None:
            raise GatewayError("nginx is not installed: apt install nginx-light, or --gateway off")
        values = {
            "FOLDER": folder,
            "GRPC": grpc[0],
            "GRPC_BEHIND": grpc[1],
            "HTTP": http[0],
            "HTTP_BEHIND": http[1],
            "RESOLVER": "127.0.0.1",  # never queried: Triton has a fixed address here
            "MAX_REQUESTS": limits.requests,
            "REQUEST_LOG": "off",
            "MAX_REQUEST_MB": limits.request_mb,
            "SSL": "ssl" if tls else "",
            "TLS_CONF": folder / "tls.conf" if tls else os.devnull,
            "CERTIFICATE": _readable(tls.certificate) if tls else "",
            "CERTIFICATE_KEY": _readable(tls.key) if tls else "",
            "VERIFY_CLIENT": "on" if tls and tls.client_ca else "off",
            "CLIENT_CA": _readable(tls.client_ca or tls.certificate) if tls else "",
        }
        for template in TEMPLATES:
            configuration = folder / template.stem
            text = re.sub(r"\$\{(\w+)\}", lambda name: str(values[name[1]]), template.read_text())
            configuration.write_text(text)
        self._log = folder / "nginx.log"
        command = [binary, "-c", str(configuration), "-p", str(folder)]
        # In a session of its own it has no terminal to ask for a pass phrase.
        test = subprocess.run(
            [*command, "-t"], stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
        )
        if test.returncode != 0:
            raise GatewayError(f"nginx does not start: {_first(test.stderr)}")
        with self._log.open("wb") as log:
            self._process = child.start(command, log)

    @property
    def pid(self) -> int:
        """Process id of nginx's master process."""
        return self._process.pid

    def check(self) -> None:
        """Raises GatewayError when it has ended."""
        if self._process.poll() is not None:
            self._end_workers()  # which would go on without it, and let clients in to a Triton that is being stopped
            self._raise_ended()

    def stop(self) -> None:
        """Ends it once it has passed on what it was given."""
        self._process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOPPING)
        self._end_workers()
        self._process.wait()

    def _end_workers(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _raise_ended(self) -> NoReturn:
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        words = _first(self._log.read_text(errors="replace"))
        raise GatewayError(f"nginx in front of tritonserver {how}{': ' if words else ''}{words}")


def _readable(path: Path) -> str:
    """As nginx takes it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GatewayError(f"cannot read {path}: {error.strerror}") from error
    if b"ENCRYPTED" in content:
        raise GatewayError(f"{path} is encrypted: expected a key without pass phrase (openssl pkey -in ... -out ...)")
    if "$" in str(path.absolute()):
        raise GatewayError(f"{path}: nginx takes no path with a $ in it: put the file elsewhere")
    escaped = re.sub(r'(["\\])', r"\\\1", str(path.absolute()))
    return f'"{escaped}"'


def _first(log: str) -> str:
    """The line of nginx's log that tells best of a failure; it has alerts on log files that it may not write."""
    for level in "emerg", "crit", "alert":
        if found := re.search(rf"\[{level}\] (?:\d+#\d+: )?(.*)", log):
            return found[1].strip()
    return ""
