"""The gateway: nothing passes by its limits, and what it refuses costs nobody else anything."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import http.server
import json
import queue
import re
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import stand_in
from launcher import http_status, launched, wait_until
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2
from tritonclient.utils import InferenceServerException

from server import Limits, TritonServer, gateway
from server.preflight import choose_ports
from tests.faults.hostile import SlowSender
from tests.faults.judge import METHOD

pytestmark = pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")

CLIP = np.ones((1, 5), np.float32)
PENDING = re.compile(r"nv_inference_pending_request_count\{[^}]*\} (\d+)")


def post(url: str, body: bytes, path: str = stand_in.PATH, **headers: str) -> tuple[int, Any]:
    """The status and the strictly parsed JSON of the reply."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with contextlib.closing(http.client.HTTPConnection(url, timeout=30)) as connection:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read(), parse_constant=no_constant)


def infer(server: TritonServer, headers: dict[str, str] | None = None) -> int:
    return http_status(server.http_url, "POST", stand_in.PATH, stand_in.BODY, headers)


def pending(server: TritonServer) -> int:
    found = PENDING.search(urlopen(server.metrics_url).read().decode())
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """With two places for each API, and thirty requests of one address."""
    repository = tmp_path_factory.mktemp("repository")
    stand_in.write(repository / "sums")
    with TritonServer(repository, device="cpu", limits=Limits(2, 9, 30)) as server:
        yield server


@pytest.fixture(scope="module")
def embedding(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, device="cpu", limits=Limits(8)) as server:
        yield server


@pytest.fixture
def unharmed(limited: TritonServer) -> Iterator[TritonServer]:
    """The server, which after the test is still the same process and answers."""
    pid = limited.pid
    yield limited
    assert infer(limited) == 200
    with InferenceServerClient(limited.grpc_url) as triton:
        assert triton.infer("sums", stand_in.inputs(CLIP)).as_numpy("sum")[0, 0] == 5
    assert limited.pid == pid


# --- requests that are compressed, streams, other paths ---


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
def behind(folder: Path) -> Iterator[list[http.client.HTTPMessage]]:
    """An HTTP server in place of Triton, at its socket in a folder: the header of each request."""
    seen: list[http.client.HTTPMessage] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def address_string(self) -> str:
            return "nginx"

        def log_message(self, *arguments: object) -> None:
            pass

    with socketserver.ThreadingUnixStreamServer(str(folder / gateway.HTTP_SOCKET), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[str]:
    """A gateway in front of sockets in a folder. Yields its address for HTTP."""
    front = choose_ports(dict.fromkeys(["grpc", "http", "gateway metrics"], ("127.0.0.1", 0)))
    running = gateway.Gateway(folder, Limits(2), None, {}, front, folder)
    try:
        running.wait_until_ready(20)
        yield "{}:{}".format(*front["http"])
    finally:
        running.stop()


@pytest.mark.parametrize(
    "field, values",
    [
        ("Content-Encoding", ("identity", "gzip")),
        ("Content-Encoding", ("gzip", "identity")),
        ("Inference-Header-Content-Length", ("0", "60000000")),
    ],
)
def test_a_second_header_hides_nothing(field: str, values: tuple[str, str], tmp_path: Path) -> None:
    """nginx up to 1.22 checks the first of them and passes the request on, newer ones reject it."""
    with behind(tmp_path) as seen, alone(tmp_path) as front:
        connection = http.client.HTTPConnection(front, timeout=20)
        connection.putrequest("POST", stand_in.PATH)
        for header, value in *((field, value) for value in values), ("Content-Length", "3000"):
            connection.putheader(header, value)
        connection.endheaders(b"x" * 3000)
        connection.getresponse()
        connection.close()
    for header in seen:
        assert header.get_all(field) in (None, [values[0]]) and "Content-Encoding" not in header


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt install curl")
@pytest.mark.parametrize("encodings", [("identity", "gzip"), ("gzip", "identity"), ("identity",), ()])
def test_no_header_has_triton_unpack_a_grpc_request(
    encodings: tuple[str, ...], limited: TritonServer, tmp_path: Path
) -> None:
    plain = message()

    def status(compressed: bool) -> str:
        content = gzip.compress(plain) if compressed else plain
        (tmp_path / "body").write_bytes(struct.pack(">?I", compressed, len(content)) + content)
        command = ["curl", "-sS", "-m", "20", "-D", "-", "-o", tmp_path / "reply", "--http2-prior-knowledge"]
        for header in "content-type: application/grpc", "te: trailers", *(f"grpc-encoding: {e}" for e in encodings):
            command += ["-H", header]
        command += ["--data-binary", f"@{tmp_path / 'body'}", f"http://{limited.grpc_url}{METHOD}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 92:  # nginx rejected it before it had read the body
            return "reset"
        assert result.returncode == 0, result.stderr
        return re.findall(r"grpc-status: (\d+)", result.stdout)[-1]

    assert status(compressed=True) in ("12", "13", "reset")
    if "gzip" not in encodings:
        assert status(compressed=False) == "0"


def message() -> bytes:
    request = service_pb2.ModelInferRequest(model_name="sums")
    for one in stand_in.JSON:
        request.inputs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        request.raw_input_contents.append(np.array(one["data"], np.float32).tobytes())
    return request.SerializeToString()


def test_streams_are_rejected(limited: TritonServer) -> None:
    answers: queue.Queue[InferenceServerException | None] = queue.Queue()
    with InferenceServerClient(limited.grpc_url) as triton:
        triton.start_stream(lambda result, error: answers.put(error))
        with contextlib.suppress(InferenceServerException):  # where it is already known to be closed
            triton.async_stream_infer("sums", stand_in.inputs(CLIP))
        assert "ModelInfer" in str(answers.get(timeout=20))


@pytest.mark.parametrize(
    "path, status",
    [
        ("/v2/models/sums/%69nfer", 400),
        ("/v2//repository/index", 400),
        ("/v2/models/../repository/index", 400),
        ("/v2/nothing", 404),
        ("/metrics", 404),
        ("/V2/repository/index", 404),
    ],
)
def test_other_paths_do_not_reach_triton(path: str, status: int, limited: TritonServer) -> None:
    assert post(limited.http_url, b"{}", path)[0] == status


# --- limits ---


@pytest.mark.parametrize(
    "path, size, limit",
    [(stand_in.PATH, 10, "9 MB"), ("/v2/models/sums/config", 3, "1 MB"), ("/v2/models/sums/generate", 9, "8 MB")],
)
def test_a_large_request_is_told_its_limit(path: str, size: int, limit: str, limited: TritonServer) -> None:
    headers = {"Inference_Header_Content_Length": "0"} if path == stand_in.PATH else {}
    status, reply = post(limited.http_url, b" " * (size << 20), path, **headers)
    assert status == 413 and limit in reply["error"]
    with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED.* 9 MB"):
        stand_in.ask(limited.grpc_url, np.ones((1, 3 << 20), np.float32))


def test_places_are_for_requests_in_flight(tmp_path: Path) -> None:
    """The one that has the only place is answered, others are refused at once and counted."""
    stand_in.write(tmp_path / "sums", delay=2_000_000)
    with TritonServer(tmp_path, device="cpu", limits=Limits(1, 1)) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(infer, server)
        wait_until(lambda: pending(server) == 1)
        status, reply = post(server.http_url, stand_in.BODY)
        assert status == 503 and "queue size" in reply["error"]
        with InferenceServerClient(server.grpc_url) as triton:
            second = pool.submit(triton.infer, "sums", stand_in.inputs(CLIP))  # the other API has a place of its own
            wait_until(lambda: pending(server) == 2)
            with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*queue size"):
                triton.infer("sums", stand_in.inputs(CLIP))
            assert triton.is_server_ready()
            assert first.result() == 200
            assert second.result().as_numpy("sum")[0, 0] == 5
        counts = urlopen(server.gateway_metrics_url).read().decode()
    for api in "grpc", "http":
        assert f'gateway_requests_total{{api="{api}",result="busy"}} 1\n' in counts


def test_a_client_that_disconnects_keeps_its_place_until_triton_is_done(tmp_path: Path) -> None:
    stand_in.write(tmp_path / "sums", delay=4_000_000)
    with TritonServer(tmp_path, device="cpu", limits=Limits(1, 1)) as server:
        connection = http.client.HTTPConnection(server.http_url, timeout=20)
        connection.request("POST", stand_in.PATH, stand_in.BODY)
        wait_until(lambda: pending(server) == 1)
        connection.close()
        assert infer(server) == 503
        wait_until(lambda: infer(server) == 200)


# --- senders that are slow ---


def connect(url: str) -> socket.socket:
    host, port = url.split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def slow_http(server: TritonServer) -> SlowSender:
    return SlowSender(server.http_url, stand_in.PATH, bytes(100), grpc=False)


def slow_json(server: TritonServer) -> SlowSender:
    return SlowSender(server.http_url, stand_in.PATH, stand_in.BODY, grpc=False, field="X-Kind: JSON")


def slow_grpc(server: TritonServer) -> SlowSender:
    return SlowSender(server.grpc_url, METHOD, message(), grpc=True)


@pytest.mark.parametrize("send", [slow_http, slow_grpc])
def test_slow_senders_take_no_place(send: Callable[[TritonServer], SlowSender], unharmed: TritonServer) -> None:
    """Ten times as many as there are places; and one address can only have so many."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(send(unharmed))
        time.sleep(0.2)  # they are being read
        for _ in range(3):
            assert infer(unharmed) == 200
            assert stand_in.ask(unharmed.grpc_url, CLIP)[0, 0] == 5
        wait_until(lambda: stack.enter_context(send(unharmed)) and infer(unharmed) == 503)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE.*of this address"):
            stand_in.ask(unharmed.grpc_url, CLIP)
    wait_until(lambda: infer(unharmed) == 200)


def test_a_sender_that_stalls_is_disconnected(unharmed: TritonServer) -> None:
    with slow_http(unharmed) as sender:
        begin = time.monotonic()
        assert not re.match(rb"HTTP/1.1 2", sender.socket.recv(1000))
        assert time.monotonic() - begin > 5


def chunked(server: TritonServer, path: str, chunks: list[bytes], pause: float = 0) -> int:
    with connect(server.http_url) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before its end
            for chunk in chunks:
                connection.sendall(chunk)
                time.sleep(pause)
        return int(connection.recv(1000).split()[1])


@pytest.mark.parametrize("path", [stand_in.PATH, "/v2/models/sums/generate", "/v2", "/v2/repository/index"])
def test_a_million_chunks_do_no_harm(path: str, unharmed: TritonServer) -> None:
    """They end tritonserver 2.51 with nothing in front."""
    million = b"1\r\n \r\n" * 1_000_000
    assert chunked(unharmed, path, [million, b"0\r\n\r\n"]) in (400, 403, 405, 413, 500)
    paced = [million[start : start + 300_000] for start in range(0, len(million), 300_000)]
    assert chunked(unharmed, path, [*paced, b"0\r\n\r\n"], 0.02) in (400, 403, 405, 413, 500)


def test_a_chunked_request_is_answered(unharmed: TritonServer) -> None:
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (stand_in.BODY[:50], stand_in.BODY[50:])]
    assert chunked(unharmed, stand_in.PATH, [*chunks, b"0\r\n\r\n"]) == 200


# --- JSON, and what ends Triton 2.51 ---


def body(**changes: object) -> bytes:
    return json.dumps({"inputs": [stand_in.JSON[0] | changes, stand_in.JSON[1]]}).encode()


@pytest.mark.parametrize(
    "request_, reason",
    [
        (b"[" * 120_000, "brackets"),
        (b'{"a":' * 120_000, "brackets"),
        (json.dumps({"inputs": [stand_in.JSON[0]] * 300}).encode(), "brackets"),
        (body(shape=[1, 1 << 40]), "digits"),
        (body(shape=[-(1 << 62), 5]), "digits"),
    ],
)
def test_json_that_ends_triton(request_: bytes, reason: str, unharmed: TritonServer) -> None:
    status, reply = post(unharmed.http_url, request_)
    assert status == 400 and reason in reply["error"]


def test_a_header_of_json_is_small(unharmed: TritonServer) -> None:
    """Whatever else is announced as binary data."""
    for length in "10000", "-1", "x", "0,0":
        assert post(unharmed.http_url, b" " * 20_000, Inference_Header_Content_Length=length)[0] == 400
    header = body(shape=[1, (1 << 62) + 16_000], parameters={"binary_data_size": 64_000}, data=None)
    length = str(len(header))
    status, reply = post(unharmed.http_url, header + bytes(64_000), Inference_Header_Content_Length=length)
    assert status == 400 and "digits" in reply["error"]


def test_few_json_requests_of_an_address_are_in_flight(unharmed: TritonServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(gateway.JSON_PER_ADDRESS):
            stack.enter_context(slow_json(unharmed))
        wait_until(lambda: infer(unharmed) == 503)
        assert stand_in.ask(unharmed.grpc_url, CLIP)[0, 0] == 5


def test_an_embedding_of_nan_is_null_in_json(embedding: TritonServer) -> None:
    clip = {"name": "waveform", "datatype": "FP32", "shape": [1, 640], "data": [1e6] * 640}
    status, reply = post(embedding.http_url, json.dumps({"inputs": [clip]}).encode(), "/v2/models/ecapa/infer")
    (data,) = (one["data"] for one in reply["outputs"] if one["name"] == "embedding")
    assert status == 200 and data == [None] * 192


def ask_each_way(server: TritonServer, samples: int) -> list[int]:
    """The statuses over HTTP as JSON and as binary data, and over gRPC (400: INVALID_ARGUMENT)."""
    path = "/v2/models/ecapa/infer"
    data = [0.5] * samples
    clip = {"name": "waveform", "datatype": "FP32", "shape": [1, samples], "data": data}
    found = [post(server.http_url, json.dumps({"inputs": [clip]}).encode(), path)[0]]
    raw = np.array([data], np.float32)
    found.append(http_status(server.http_url, "POST", path, raw.tobytes(), {"Inference-Header-Content-Length": "0"}))
    tensor = InferInput("waveform", [1, samples], "FP32")
    tensor.set_data_from_numpy(raw)
    with InferenceServerClient(server.grpc_url) as triton:
        try:
            triton.infer("ecapa", [tensor])
        except InferenceServerException as error:
            assert "INVALID_ARGUMENT" in error.status() and "640 samples" in error.message()
            return [*found, 400]
    return [*found, 200]


def test_a_request_too_small_for_a_clip_is_kept_from_the_batch(embedding: TritonServer) -> None:
    """Triton's C++ backends stop copying at an empty request; the embeddings of its batch are NaN then."""
    for samples in 0, 1, 200:
        assert ask_each_way(embedding, samples) == [400, 400, 400]
    assert ask_each_way(embedding, 640) == [200, 200, 200]


# --- in a container of its own ---


def test_the_gateway_alone(tmp_path: Path) -> None:
    """It waits for a Triton in another container, and passes its last replies on before it stops."""
    stand_in.write(tmp_path / "repository/sums", delay=2_000_000)
    sockets = tmp_path / "s"
    options = ["--gateway=only", f"--sockets={sockets}", "--max-requests=3"]
    with launched(tmp_path, *options) as launcher, ThreadPoolExecutor() as pool:
        grpc, url, metrics = launcher.urls
        assert http_status(url, "POST", stand_in.PATH, stand_in.BODY) == 503
        ready = metrics.removesuffix("/metrics")
        assert http_status(ready, "GET", "/ready") == 503
        with TritonServer(tmp_path / "repository", device="cpu", sockets=sockets) as server:
            assert http_status(ready, "GET", "/ready") == 200
            reply = pool.submit(stand_in.ask, grpc, CLIP)
            wait_until(lambda: pending(server) == 1)
            launcher.process.terminate()
            assert reply.result()[0, 0] == 5
            assert launcher.process.wait(20) == 0
