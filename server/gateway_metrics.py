"""Counts the gateway's inference requests by outcome, for Prometheus, and says where wrong keys come from.

Triton's own metrics leave out the requests that nginx rejects and those that Triton's front end does (a wrong shape,
for example). nginx sends a datagram for each to a socket (`server/nginx.conf.template`). The same port answers
`/ready`: whether the Triton behind the gateway is ready. A process of its own, since a busy one would miss datagrams;
standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import re
import signal
import socket
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

APIS = "grpc", "http"
# The gateway itself decides the first four: too many requests in flight, request too large, no answer from Triton, no
# key or a wrong one.
OUTCOMES = "busy", "too_large", "away", "key", "ok", "bad_request", "unavailable", "failed", "gave_up"
_REFUSED = {"crowded": "busy", "full": "busy", **dict.fromkeys(OUTCOMES[:4], "")}
# https://grpc.io/docs/guides/status-codes/; all others are "failed".
_GRPC = {"0": "ok", "1": "gave_up", "4": "gave_up", "3": "bad_request", "5": "bad_request", "14": "unavailable"}
# The log_format "request" after the syslog header. gRPC's status is in the headers of a reply without a body, otherwise
# in the trailers; "-" is none.
_LINE = re.compile(
    r'(?P<api>grpc|http) "(?P<refused>\w*|-)" (?P<http>\d+) "(?P<header>\S+)" "(?P<trailer>\S+)" (?P<size>\d+) '
    r"(?P<address>\S+) (?P<group>\S+)$"
)
_PAUSE = 60  # s between two messages about an address
_ADDRESSES = 1000  # messages are about at most so many


class Counts:
    """Inference requests by API and outcome (wrong keys: those of any group), and bytes of those that succeeded."""

    def __init__(self) -> None:
        """Every series starts at 0: Prometheus misses the first requests of a counter that appears with them."""
        self.requests = Counter({(api, outcome): 0 for api in APIS for outcome in OUTCOMES})
        self.answered_bytes = Counter(dict.fromkeys(APIS, 0))

    def add(self, datagram: bytes) -> tuple[str, str] | None:
        """Counts the request that a datagram of nginx describes; ignores any other datagram.

        Returns:
            The address and the group of APIs, if its key was missing or wrong.
        """
        line = _LINE.search(datagram.decode(errors="replace"))
        if line is None:
            return None
        outcome = _outcome(line["api"], line["refused"], line["http"], line["header"], line["trailer"])
        self.requests[line["api"], outcome] += 1
        if outcome == "ok":
            self.answered_bytes[line["api"]] += int(line["size"])
        return (line["address"], line["group"]) if outcome == "key" else None

    def text(self) -> str:
        """The counts in Prometheus's text format."""
        lines = [
            "# HELP gateway_requests_total Inference requests at the gateway, by outcome; with key, of any API.",
            "# TYPE gateway_requests_total counter",
            *(
                f'gateway_requests_total{{api="{api}",result="{outcome}"}} {n}'
                for (api, outcome), n in self.requests.items()
            ),
            "# HELP gateway_answered_bytes_total Size of the inference requests with result ok.",
            "# TYPE gateway_answered_bytes_total counter",
            *(f'gateway_answered_bytes_total{{api="{api}"}} {n}' for api, n in self.answered_bytes.items()),
        ]
        return "\n".join([*lines, ""])


class KeyWarnings:
    """A message about wrong keys, at most once a minute for each address."""

    def __init__(self) -> None:
        """Begins without any."""
        self._told: dict[str, float] = {}  # when, by address
        self._since: Counter[str] = Counter()

    def about(self, address: str, group: str, now: float) -> str:
        """The message about one more request; empty where one was given within the minute."""
        self._since[address] += 1
        if now - self._told.get(address, -_PAUSE) < _PAUSE:
            return ""
        if len(self._told) >= _ADDRESSES:
            for old in [one for one, told in self._told.items() if now - told >= _PAUSE]:
                del self._told[old], self._since[old]
            if len(self._told) >= _ADDRESSES:
                return ""
        count, self._since[address] = self._since[address], 0
        self._told[address] = now
        return f"{count} request{'' if count == 1 else 's'} from {address} without the right key, the last for {group}"


def is_ready(triton: Path) -> bool:
    """Whether the Triton behind this socket of its HTTP API is ready."""
    connection = http.client.HTTPConnection("triton")
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(4)
        connection.sock.connect(str(triton))
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _outcome(api: str, refused: str, http: str, header: str, trailer: str) -> str:
    if refused in _REFUSED:
        return _REFUSED[refused] or refused
    if http == "499":  # nginx's own: the client closed its connection or stream
        return "gave_up"
    if refused not in ("", "-"):
        return "bad_request"
    if api == "grpc" and http == "200":
        return _GRPC.get(header if header != "-" else trailer, "failed")
    return "ok" if http == "200" else "unavailable" if http == "503" else "bad_request" if http < "500" else "failed"


def main() -> None:
    """Counts until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Counts nginx's inference requests by outcome, for Prometheus.")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="created here; nginx sends to it")
    parser.add_argument("--triton", type=Path, required=True, metavar="PATH", help="socket of Triton's HTTP API")
    parser.add_argument("--address", default="127.0.0.1", help="of /metrics and /ready (%(default)s)")
    parser.add_argument("--port", type=int, default=8003, help="%(default)s")
    options = parser.parse_args()
    counts, warnings = Counts(), KeyWarnings()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # s, for a client that connects and sends nothing

        def do_GET(self) -> None:
            status, body = 404, b""
            if self.path == "/metrics":
                status, body = 200, counts.text().encode()
            elif self.path == "/ready":
                status = 200 if is_ready(options.triton) else 503
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    def receive(datagrams: socket.socket) -> None:
        while True:
            if wrong := counts.add(datagrams.recv(2048)):
                if message := warnings.about(*wrong, time.monotonic()):
                    print(f"warning: {message}", file=sys.stderr, flush=True)

    ending = signal.SIGTERM, signal.SIGINT  # blocked and awaited, so that threads do not see them
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    options.socket.unlink(missing_ok=True)  # from the run before
    datagrams.bind(str(options.socket))
    options.socket.chmod(0o777)  # nginx's worker may have another user
    server = ThreadingHTTPServer((options.address, options.port), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    Thread(target=receive, args=[datagrams], daemon=True).start()
    signal.sigwait(ending)


if __name__ == "__main__":
    main()
