"""Tells Prometheus what came of the inference requests at nginx, which sees more than Triton counts.

Triton's own figures leave out what nginx refuses and what Triton's front end does (a wrong shape, say). With
`REQUEST_LOG` set (`server/nginx.conf.template`), nginx sends a datagram for each inference request to a socket in a
folder that both see. Nothing beyond the standard library is needed.
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

ENDING = signal.SIGTERM, signal.SIGINT
APIS = "grpc", "http"
# The first three are nginx's own: more in work than may be, larger than may be, no answer from Triton.
RESULTS = "busy", "too_large", "away", "ok", "bad_request", "unavailable", "failed", "gave_up"
# https://grpc.io/docs/guides/status-codes/; all others are "failed".
_GRPC = {"0": "ok", "1": "gave_up", "4": "gave_up", "3": "bad_request", "5": "bad_request", "14": "unavailable"}
# The log_format "request", behind the header of syslog. gRPC's status stands in the headers of a reply without a body,
# else in the trailers; "-" is none.
_LINE = re.compile(
    r"request (?P<api>\w+) (?P<refused>\S+) (?P<http>\d+) (?P<header>\S+) (?P<trailer>\S+) (?P<size>\d+)$"
)

# All are there from the start: Prometheus does not see the first requests of a counter that begins with them.
requests = Counter({(api, result): 0 for api in APIS for result in RESULTS})
answered_bytes = Counter(dict.fromkeys(APIS, 0))


def count(datagram: bytes) -> None:
    """Adds one request, as nginx tells of it."""
    line = _LINE.search(datagram.decode(errors="replace"))
    if line is None or line["api"] not in APIS:
        return
    key = line["api"], result(line["api"], line["refused"], line["http"], line["header"], line["trailer"])
    requests[key] += 1
    if key[1] == "ok":
        answered_bytes[line["api"]] += int(line["size"])


def result(api: str, refused: str, http: str, header: str, trailer: str) -> str:
    """One of RESULTS."""
    if refused in RESULTS:
        return refused
    if http == "499":  # nginx's own: the client has closed its connection or stream
        return "gave_up"
    if api == "grpc" and http == "200":
        return _GRPC.get(header if header != "-" else trailer, "failed")
    return "ok" if http == "200" else "unavailable" if http == "503" else "bad_request" if http < "500" else "failed"


def metrics() -> str:
    """The counts in Prometheus's text format."""
    lines = [
        "# HELP gateway_requests_total Inference requests at the gateway, by what came of them.",
        "# TYPE gateway_requests_total counter",
        *(f'gateway_requests_total{{api="{api}",result="{result}"}} {n}' for (api, result), n in requests.items()),
        "# HELP gateway_answered_bytes_total Size of the inference requests with result ok.",
        "# TYPE gateway_answered_bytes_total counter",
        *(f'gateway_answered_bytes_total{{api="{api}"}} {n}' for api, n in answered_bytes.items()),
    ]
    return "\n".join([*lines, ""])


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # s, for a client that connects and says nothing

    def do_GET(self) -> None:
        body = metrics().encode() if self.path == "/metrics" else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    """Counts until it is told to stop."""
    parser = argparse.ArgumentParser(description="Counts nginx's inference requests and shows them to Prometheus.")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="where nginx sends to; made here")
    parser.add_argument("--address", default="127.0.0.1", help="where Prometheus asks (%(default)s)")
    parser.add_argument("--port", type=int, default=9514, help="(%(default)s)")
    options = parser.parse_args()
    # The first process of a container ignores what it does not wait for.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    options.socket.unlink(missing_ok=True)  # that of one before
    datagrams.bind(str(options.socket))
    options.socket.chmod(0o777)  # nginx is another user
    server = ThreadingHTTPServer((options.address, options.port), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    Thread(target=_count_all, args=[datagrams], daemon=True).start()
    signal.sigwait(ENDING)


def _count_all(datagrams: socket.socket) -> None:
    while True:
        count(datagrams.recv(2048))


if __name__ == "__main__":
    main()
