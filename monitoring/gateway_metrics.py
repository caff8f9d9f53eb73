"""Counts the inference requests at nginx by outcome, for Prometheus.

Triton's own metrics leave out the requests that nginx rejects and those that Triton's front end does (a wrong shape,
for example). With `REQUEST_LOG` set (`server/nginx.conf.template`), nginx sends a datagram per inference request to a
socket in a folder that both containers mount. Standard library only, so that any image with Python runs this file.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

APIS = "grpc", "http"
# nginx itself decides the first three: too many requests in flight, request too large, no answer from Triton.
OUTCOMES = "busy", "too_large", "away", "ok", "bad_request", "unavailable", "failed", "gave_up"
# https://grpc.io/docs/guides/status-codes/; all others are "failed".
_GRPC = {"0": "ok", "1": "gave_up", "4": "gave_up", "3": "bad_request", "5": "bad_request", "14": "unavailable"}
# The log_format "request" after the syslog header. gRPC's status is in the headers of a reply without a body, otherwise
# in the trailers; "-" is none.
_LINE = re.compile(
    r"request (?P<api>grpc|http) (?P<rejected>\S+) (?P<http>\d+) (?P<header>\S+) (?P<trailer>\S+) (?P<size>\d+)$"
)


class Counts:
    """Inference requests by API and outcome, and bytes of those that succeeded."""

    def __init__(self) -> None:
        """Every series starts at 0: Prometheus misses the first requests of a counter that appears with them."""
        self.requests = Counter({(api, outcome): 0 for api in APIS for outcome in OUTCOMES})
        self.answered_bytes = Counter(dict.fromkeys(APIS, 0))

    def add(self, datagram: bytes) -> None:
        """Counts the request that a datagram of nginx describes; ignores any other datagram."""
        line = _LINE.search(datagram.decode(errors="replace"))
        if line is None:
            return
        outcome = _outcome(line["api"], line["rejected"], line["http"], line["header"], line["trailer"])
        self.requests[line["api"], outcome] += 1
        if outcome == "ok":
            self.answered_bytes[line["api"]] += int(line["size"])

    def text(self) -> str:
        """The counts in Prometheus's text format."""
        lines = [
            "# HELP gateway_requests_total Inference requests at the gateway, by outcome.",
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


def _outcome(api: str, rejected: str, http: str, header: str, trailer: str) -> str:
    if rejected in OUTCOMES:
        return rejected
    if http == "499":  # nginx's own: the client closed its connection or stream
        return "gave_up"
    if api == "grpc" and http == "200":
        return _GRPC.get(header if header != "-" else trailer, "failed")
    return "ok" if http == "200" else "unavailable" if http == "503" else "bad_request" if http < "500" else "failed"


def main() -> None:
    """Counts until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Counts nginx's inference requests by outcome, for Prometheus.")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="created here; nginx sends to it")
    parser.add_argument("--address", default="127.0.0.1", help="where Prometheus reads /metrics (%(default)s)")
    parser.add_argument("--port", type=int, default=9514, help="%(default)s")
    options = parser.parse_args()
    counts = Counts()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # s, for a client that connects and sends nothing

        def do_GET(self) -> None:
            body = counts.text().encode() if self.path == "/metrics" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    def receive(datagrams: socket.socket) -> None:
        while True:
            counts.add(datagrams.recv(2048))

    ending = signal.SIGTERM, signal.SIGINT  # blocked and awaited: process 1 of a container has no default handlers
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    options.socket.unlink(missing_ok=True)  # from the run before
    datagrams.bind(str(options.socket))
    options.socket.chmod(0o777)  # nginx runs as another user
    server = ThreadingHTTPServer((options.address, options.port), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    Thread(target=receive, args=[datagrams], daemon=True).start()
    signal.sigwait(ending)


if __name__ == "__main__":
    main()
