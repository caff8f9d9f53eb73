"""Keys, limits, certificates and encryption, on a real tritonserver: requests with them pass, others are rejected."""

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
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import stand_in
import trustme
from conftest import ROOT, entry_point
from ecapa_triton import ConnectError, KeyRefusedError, SpeakerClient, Tls
from ecapa_triton.protocol import GRPC_KEY_HEADER, KEY_HEADER
from launcher import launched, wait_until
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2
from tritonclient.utils import InferenceServerException

from server import Limits, ServerError, TritonServer, __main__, child, gateway
from server.options import ADMIN, GROUPS
from server.preflight import choose_ports

needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")
KEYS = {group: f"the:key=of,{group}/{'x' * 16}" for group in GROUPS}

CLIP = np.ones((1, 5), np.float32)
JSON_INPUTS = [
    {"name": "clip", "datatype": "FP32", "shape": [1, 5], "data": [1, 1, 1, 1, 1]},
    {"name": "scale", "datatype": "FP32", "shape": [1, 1], "data": [1]},
]


def inputs() -> list[InferInput]:
    return stand_in.inputs(CLIP)


# A request to each group, over gRPC and over HTTP.
GRPC: dict[str, Callable[[InferenceServerClient, dict[str, str]], object]] = {
    "health": lambda triton, key: triton.is_server_ready(headers=key),
    "metadata": lambda triton, key: triton.get_server_metadata(headers=key),
    "inference": lambda triton, key: triton.infer("sums", inputs(), headers=key),
    "model-config": lambda triton, key: triton.get_model_config("sums", headers=key),
    "statistics": lambda triton, key: triton.get_inference_statistics("sums", headers=key),
    "shared-memory": lambda triton, key: triton.get_system_shared_memory_status(headers=key),
    "model-repository": lambda triton, key: triton.get_model_repository_index(headers=key),
    "trace": lambda triton, key: triton.get_trace_settings(headers=key),
    "logging": lambda triton, key: triton.get_log_settings(headers=key),
}
HTTP = {
    "health": ("GET", "/v2/health/ready"),
    "metadata": ("GET", "/v2"),
    "inference": ("POST", "/v2/models/sums/infer"),
    "model-config": ("GET", "/v2/models/sums/config"),
    "statistics": ("GET", "/v2/models/sums/stats"),
    "shared-memory": ("GET", "/v2/systemsharedmemory/status"),
    "model-repository": ("POST", "/v2/repository/index"),
    "trace": ("GET", "/v2/trace/setting"),
    "logging": ("GET", "/v2/logging"),
}


@dataclass(frozen=True)
class Certificates:
    """Files of an authority, of a server and a client that it certifies, and of a client of another authority."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    foreign: Path
    foreign_key: Path
    others_ca: Path

    @property
    def of_server(self) -> gateway.Tls:
        return gateway.Tls(self.server, self.server_key)

    @property
    def of_client(self) -> Tls:
        return Tls(self.ca, self.client, self.client_key)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp('cert "of \\ us')  # characters that nginx quotes
    names = {name: folder / f"{name}.pem" for name in Certificates.__dataclass_fields__}
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(names["ca"])
    others.cert_pem.write_to_path(names["others_ca"])
    for name, certificate in {
        "server": ours.issue_cert("127.0.0.1", "localhost"),
        "client": ours.issue_cert("client@example.org"),
        "foreign": others.issue_cert("foreign@example.org"),
    }.items():
        certificate.cert_chain_pems[0].write_to_path(names[name])
        certificate.private_key_pem.write_to_path(names[f"{name}_key"])
    return Certificates(**names)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    stand_in.write(folder / "sums")
    return folder


def http_status(url: str, group: str, headers: dict[str, str], context: ssl.SSLContext | None = None) -> int:
    if context is None:
        connection = http.client.HTTPConnection(url, timeout=20)
    else:
        connection = http.client.HTTPSConnection(url, timeout=20, context=context)
    method, path = HTTP[group]
    body = json.dumps({"inputs": JSON_INPUTS}) if group == "inference" else "{}" if method == "POST" else None
    try:
        connection.request(method, path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


# --- keys ---


@pytest.fixture(scope="module", params=[None, pytest.param(Limits(8), marks=needs_nginx)], ids=["bare", "nginx"])
def limits(request: pytest.FixtureRequest) -> Limits | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def usual(stand_ins: Path, limits: Limits | None) -> Iterator[TritonServer]:
    with TritonServer(stand_ins, device="cpu", limits=limits) as server:
        yield server


@pytest.fixture(scope="module")
def closed(stand_ins: Path, limits: Limits | None) -> Iterator[TritonServer]:
    with TritonServer(stand_ins, device="cpu", limits=limits, keys=KEYS) as server:
        yield server


def assert_open(server: TritonServer, group: str, key: str | None = None) -> None:
    with InferenceServerClient(server.grpc_url) as triton:
        assert GRPC[group](triton, {GRPC_KEY_HEADER: key} if key else {})
    assert http_status(server.http_url, group, {KEY_HEADER: key} if key else {}) == 200


def assert_closed(server: TritonServer, group: str, *keys: str | None) -> None:
    for key in keys:
        with InferenceServerClient(server.grpc_url) as triton, pytest.raises(InferenceServerException):
            GRPC[group](triton, {} if key is None else {GRPC_KEY_HEADER: key})
        assert http_status(server.http_url, group, {} if key is None else {KEY_HEADER: key}) == 403


@pytest.mark.parametrize("group", GROUPS)
def test_groups_for_operators_are_closed(group: str, usual: TritonServer) -> None:
    assert set(GROUPS) == set(GRPC) == set(HTTP)
    if group in ADMIN:
        assert_closed(usual, group, None, "", "a guess", KEYS[group])
    else:
        assert_open(usual, group)


@pytest.mark.parametrize("group", GROUPS)
def test_a_key_opens_its_group_alone(group: str, closed: TritonServer) -> None:
    assert_closed(closed, group, None, KEYS[GROUPS[GROUPS.index(group) - 1]], KEYS[group][:-1])
    assert_open(closed, group, KEYS[group])


def test_every_call_of_the_client_carries_its_key(repository: Path, clip: np.ndarray) -> None:
    groups = "metadata", "inference", "model-config", "statistics", "health"
    with TritonServer(repository, device="cpu", keys=dict.fromkeys(groups, KEYS["inference"])) as server:
        with SpeakerClient(server.grpc_url, api_key=KEYS["inference"]) as client:
            assert client.embed(clip).shape == (192,)
            assert client.status().ready
        for key in None, "another key, as long as it is":
            with SpeakerClient(server.grpc_url, api_key=key) as client:
                for call in lambda: client.embed(clip), client.status:
                    with pytest.raises(KeyRefusedError, match="api_key"):
                        call()


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.1, 0.1, 16000).astype(np.float32)


@pytest.mark.parametrize("keys", [{"doors": "x" * 16}, {"inference": "x" * 15}, {"inference": "x" * 15 + " x"}])
def test_keys_are_checked(keys: dict[str, str], stand_ins: Path) -> None:
    with pytest.raises(ServerError, match=next(iter(keys))):
        TritonServer(stand_ins, device="cpu", keys=keys).start()


# --- ways around the limits ---


@pytest.fixture(scope="module")
def limited(stand_ins: Path) -> Iterator[TritonServer]:
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    with TritonServer(stand_ins, device="cpu", limits=Limits(2, 2)) as server:
        yield server


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP", "identity, gzip"])
def test_compressed_requests_are_rejected(encoding: str, limited: TritonServer) -> None:
    """Triton would decompress a request of any size."""
    assert http_status(limited.http_url, "inference", {"Content-Encoding": encoding}) == 415
    assert http_status(limited.http_url, "inference", {"Content-Encoding": "identity"}) == 200
    with InferenceServerClient(limited.grpc_url) as triton:
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            triton.infer("sums", inputs(), compression_algorithm="gzip")
        assert triton.infer("sums", inputs()).as_numpy("sum")[0, 0] == 5


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
def nginx(folder: Path, **environment: object) -> Iterator[int]:
    """nginx as in a container, which fills the template from its environment. Yields its port for HTTP."""
    ports = [port for _, port in choose_ports(dict.fromkeys(("grpc", "http", "nowhere"), ("127.0.0.1", 0))).values()]
    grpc, http_, nowhere = (f"127.0.0.1:{port}" for port in ports)
    usual = {"GRPC": grpc, "GRPC_BEHIND": nowhere, "HTTP": http_, "HTTP_BEHIND": nowhere, "RESOLVER": "127.0.0.1"}
    usual |= {"FOLDER": folder, "MAX_REQUESTS": 2, "MAX_REQUEST_MB": 2, "REQUEST_LOG": "off", "SSL": ""}
    template = (ROOT / "server/nginx.conf.template").read_text()
    (folder / "nginx.conf").write_text(entry_point(template, usual | {"TLS_CONF": "/dev/null"} | environment))
    command = [str(gateway.find()), "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: child.listens(process.pid, ports[1]))
            yield ports[1]
        finally:
            process.terminate()


@needs_nginx
@pytest.mark.parametrize("encodings", [("identity", "gzip"), ("gzip", "identity")])
def test_a_second_header_hides_nothing(encodings: tuple[str, str], tmp_path: Path) -> None:
    """nginx up to 1.22 checks the first of them and passes the request on, newer ones reject it."""
    with behind("127.0.0.1") as (port, seen), nginx(tmp_path, HTTP_BEHIND=f"127.0.0.1:{port}") as front:
        connection = http.client.HTTPConnection(f"127.0.0.1:{front}", timeout=20)
        connection.putrequest("POST", HTTP["inference"][1])
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


def nginx_version() -> tuple[int, ...]:
    text = subprocess.run([gateway.find() or "false", "-v"], capture_output=True, text=True).stderr
    return tuple(map(int, re.findall(r"nginx/(\d+)\.(\d+)\.(\d+)", text)[0])) if text else ()


@pytest.mark.skipif(nginx_version() < (1, 27, 3), reason="needs nginx 1.27.3 or newer")
def test_a_triton_that_restarts_at_another_address_is_found(tmp_path: Path) -> None:
    """As in compose, where Triton is a name with the `resolve` option; nginx is not reloaded."""
    names = Names("127.0.0.1")
    resolver = f"127.0.0.1:{names.socket.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        with behind("127.0.0.1") as (port, _):
            place = f"triton:{port} resolve"
            front = stack.enter_context(nginx(tmp_path, HTTP_BEHIND=place, GRPC_BEHIND=place, RESOLVER=resolver))
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
    for one in JSON_INPUTS:
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
            triton.async_stream_infer("sums", inputs())
        assert "ModelInfer" in str(answers.get(timeout=20))


def test_only_inference_requests_are_large(limited: TritonServer) -> None:
    # 500 is Triton's reply to a body that is not JSON: it arrived.
    for path, status in ("/v2/models/sums/infer", 500), ("/v2/repository/index", 413), ("/v2/logging", 413):
        connection = http.client.HTTPConnection(limited.http_url, timeout=20)
        connection.request("POST", path, b" " * (3 << 19))
        assert connection.getresponse().status == status
        connection.close()


@needs_nginx
def test_a_client_that_disconnects_keeps_its_place_until_triton_is_done(tmp_path: Path) -> None:
    stand_in.write(tmp_path / "sums", delay=4_000_000)
    with TritonServer(tmp_path, device="cpu", limits=Limits(1, 1)) as server:
        connection = http.client.HTTPConnection(server.http_url, timeout=20)
        connection.request("POST", HTTP["inference"][1], json.dumps({"inputs": JSON_INPUTS}))
        pending = re.compile(r'nv_inference_pending_request_count\{model="sums",version="1"\} 1\n')
        wait_until(lambda: pending.search(urlopen(server.metrics_url).read().decode()))
        connection.close()
        assert http_status(server.http_url, "inference", {}) == 503
        wait_until(lambda: http_status(server.http_url, "inference", {}) == 200)


# --- TLS ---


@pytest.fixture(scope="module", params=[False, True], ids=["tls", "mutual"])
def encrypted(stand_ins: Path, certificates: Certificates, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    tls = replace(certificates.of_server, client_ca=certificates.ca if request.param else None)
    with TritonServer(stand_ins, device="cpu", limits=Limits(8), tls=tls) as server:
        yield server


def ask_grpc(url: str, ca: Path, certificate: Path | None = None, key: Path | None = None) -> float:
    files = {"root_certificates": ca, "certificate_chain": certificate, "private_key": key}
    paths = {name: str(path) for name, path in files.items() if path}
    with InferenceServerClient(url, ssl=True, **paths) as triton:
        return float(triton.infer("sums", inputs(), client_timeout=10).as_numpy("sum")[0, 0])


def ask_http(url: str, ca: Path, certificate: Path | None = None, key: Path | None = None) -> int:
    context = ssl.create_default_context(cafile=ca)
    if certificate:
        context.load_cert_chain(certificate, key)
    return http_status(url, "inference", {}, context)


def test_clients_with_and_without_a_certificate(encrypted: TritonServer, certificates: Certificates) -> None:
    files = certificates
    mutual = encrypted.tls is not None and encrypted.tls.client_ca is not None
    known = files.client, files.client_key
    assert ask_grpc(encrypted.grpc_url, files.ca, *known) == 5
    assert ask_http(encrypted.http_url, files.ca, *known) == 200
    for identity in (), (files.foreign, files.foreign_key):
        if mutual:
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                ask_grpc(encrypted.grpc_url, files.ca, *identity)
            assert ask_http(encrypted.http_url, files.ca, *identity) == 403
        else:
            assert ask_grpc(encrypted.grpc_url, files.ca, *identity) == 5
    with pytest.raises(InferenceServerException):
        ask_grpc(encrypted.grpc_url, files.others_ca, *known)
    with pytest.raises(ssl.SSLError):
        ask_http(encrypted.http_url, files.others_ca, *known)
    with InferenceServerClient(encrypted.grpc_url) as triton, pytest.raises(InferenceServerException):
        triton.infer("sums", inputs(), client_timeout=10)
    assert http_status(encrypted.http_url, "health", {}) == 400  # a plain request to a TLS port


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_protocols_are_rejected(encrypted: TritonServer, certificates: Certificates) -> None:
    context = ssl.create_default_context(cafile=certificates.ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        http_status(encrypted.http_url, "health", {}, context)


@needs_nginx
def test_the_launcher_and_the_client_with_all_of_it(
    repository: Path, certificates: Certificates, clip: np.ndarray, tmp_path: Path
) -> None:
    files, secret = certificates, KEYS["inference"]
    key = tmp_path / "key"
    key.write_text(secret + "\n")
    options = [f"--tls-cert={files.server}", f"--tls-key={files.server_key}", f"--tls-client-ca={files.ca}"]
    options += [f"--key-file=inference,metadata={key}", f"--key-file=admin={key}", "--metrics-address=127.0.0.2"]
    with launched(repository, *options) as launcher:
        assert secret not in "".join(launcher.output)
        address, _, metrics = launcher.urls
        assert metrics.startswith("http://127.0.0.2:")
        url, several = f"grpcs://{address}", f"ipv4:{address},{address}"
        for url_, name in (url, None), (several, "127.0.0.1"), (several, "localhost"):
            with SpeakerClient(url_, tls=replace(files.of_client, name=name), api_key=secret) as client:
                assert client.embed(clip).shape == (192,)
        other_ca = Tls(files.others_ca, files.client, files.client_key)
        for url_, tls, api_key, error in (
            (several, files.of_client, secret, ConnectError),  # which name its certificate has, is not known
            (url, files.of_client, None, KeyRefusedError),
            (url, Tls(files.ca), secret, ConnectError),
            (url, other_ca, secret, ConnectError),
            (url, None, secret, ConnectError),
            (address, None, secret, ConnectError),
        ):
            with SpeakerClient(url_, tls=tls, api_key=api_key) as client, pytest.raises(error):
                client.embed(clip)
        status = [sys.executable, "-c", "import sys; from ecapa_triton._cli import main; sys.exit(main())", "status"]
        status += [f"--url={url}", f"--metrics={metrics}"]
        status += [f"--tls-ca={files.ca}", f"--tls-cert={files.client}", f"--tls-key={files.client_key}"]
        done = subprocess.run([*status, f"--key-file={key}"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "ecapa" in done.stdout, done.stderr
        assert subprocess.run(status, capture_output=True, timeout=60).returncode == 2


@pytest.mark.parametrize(
    "options, fact",
    [
        (["--tls-cert=x"], "--tls-key"),
        (["--tls-key=x"], "--tls-cert"),
        (["--tls-client-ca=x"], "--tls-cert"),
        (["--tls-cert=x", "--tls-key=x", "--gateway=off"], "--gateway off"),
        (["--max-requests=1", "--gateway=external"], "--gateway external"),
        (["--key-file=inference"], "--key-file"),
        (["--key-file=inference={key}", "--key-file=inference={key}"], "inference"),
        (["--key-file=admin={key}", "--key-file=logging={key}"], "logging"),
        (["--key-file=admin={key}", "--key-env=logging=KEY"], "logging"),
        (["--key-file=inference={binary}"], "inference"),
        (["--key-file=inference=/nowhere"], "inference"),
        (["--key-file=doors={key}"], "'doors'"),
        (["--key-file=inference={short}"], "16 to 1024"),
        (["--key-env=inference"], "--key-env"),
        (["--key-env=inference=SHORT"], "16 to 1024"),
        (["--key-env=inference=BLANK"], "16 to 1024"),
    ],
)
def test_wrong_options(
    options: list[str],
    fact: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, content in ("key", b"x" * 20), ("short", b"x"), ("binary", b"\xff" * 20):
        (tmp_path / name).write_bytes(content)
    for name, value in ("KEY", "x" * 20), ("SHORT", "x"), ("BLANK", " "):
        monkeypatch.setenv(name, value)
    files = {name: tmp_path / name for name in ("key", "short", "binary")}
    with pytest.raises(SystemExit, match="2"):
        __main__.main([option.format_map(files) for option in options])
    message = capsys.readouterr().err
    assert fact in message.splitlines()[-1] and "x" * 20 not in message


@needs_nginx
@pytest.mark.parametrize(
    "certificate, key, fact",
    [("key", "encrypted", "encrypted"), ("a$b", "key", r"a\$b"), ("x", "x", "No such file"), ("key", "key", "nginx")],
)
def test_wrong_certificates(certificate: str, key: str, fact: str, stand_ins: Path, tmp_path: Path) -> None:
    for name, content in ("key", "x" * 20), ("a$b", "x"), ("encrypted", "-----BEGIN ENCRYPTED PRIVATE KEY-----"):
        (tmp_path / name).write_text(content)
    tls = gateway.Tls(tmp_path / certificate, tmp_path / key)
    with pytest.raises(ServerError, match=fact):
        TritonServer(stand_ins, device="cpu", limits=Limits(1), tls=tls).start()


def test_options_after_the_launchers_may_not_hide_the_version(stand_ins: Path) -> None:
    with pytest.raises(ServerError, match="403"):
        TritonServer(stand_ins, device="cpu", extra=["--http-restricted-api=metadata:foo=bar"]).start()


@pytest.mark.parametrize(
    "tls, reason", [(Tls(ca="/nowhere"), "/nowhere: No such file"), (Tls(certificate="x"), "go together")]
)
def test_wrong_files_of_the_client(tls: Tls, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        SpeakerClient(tls=tls)


def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(ConnectError, match="visible ASCII"):
        SpeakerClient(api_key="Schlüssel")
