"""Encryption, certificates and keys, on a real tritonserver: what has them passes, what has not is refused."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import queue
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import stand_in
import trustme
from conftest import ROOT
from ecapa_triton import ConnectError, KeyRefusedError, SpeakerClient, Tls
from ecapa_triton.protocol import GRPC_KEY_HEADER, KEY_HEADER
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2
from tritonclient.utils import InferenceServerException

from server import ServerError, TritonServer, gateway
from server.gateway import Limits
from server.options import ADMIN, GROUPS
from server.triton import choose_ports

needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")
KEYS = {group: f"the:key=of,{group}/{'x' * 16}" for group in GROUPS}

JSON_INPUTS = [
    {"name": "clip", "datatype": "FP32", "shape": [1, 5], "data": [1, 1, 1, 1, 1]},
    {"name": "scale", "datatype": "FP32", "shape": [1, 1], "data": [1]},
]


def inputs() -> list[InferInput]:
    tensors = []
    for one in JSON_INPUTS:
        tensors.append(InferInput(one["name"], one["shape"], one["datatype"]))
        tensors[-1].set_data_from_numpy(np.array([one["data"]], np.float32))
    return tensors


# What each group has, asked of a server with the model "sums" over gRPC and over HTTP.
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
    """Files of an authority, of a server and a client that it vouches for, and of a stranger to it."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    stranger: Path
    stranger_key: Path
    others_ca: Path

    @property
    def of_server(self) -> gateway.Tls:
        return gateway.Tls(self.server, self.server_key)

    @property
    def of_client(self) -> Tls:
        return Tls(self.ca, self.client, self.client_key)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp('cert "of \\ us')
    names = {name: folder / f"{name}.pem" for name in Certificates.__dataclass_fields__}
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(names["ca"])
    others.cert_pem.write_to_path(names["others_ca"])
    for name, certificate in {
        "server": ours.issue_cert("127.0.0.1", "localhost"),
        "client": ours.issue_cert("client@example.org"),
        "stranger": others.issue_cert("stranger@example.org"),
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


def test_groups_are_those_of_triton() -> None:
    assert set(GROUPS) == set(GRPC) == set(HTTP)


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_for_administrators_is_closed(group: str, usual: TritonServer) -> None:
    with InferenceServerClient(usual.grpc_url) as triton:
        if group not in ADMIN:
            assert GRPC[group](triton, {})
            assert http_status(usual.http_url, group, {}) == 200
            return
        for key in {}, {GRPC_KEY_HEADER: ""}, {GRPC_KEY_HEADER: "a guess"}, {KEY_HEADER: KEYS[group]}:
            with pytest.raises(InferenceServerException, match="restricted"):
                GRPC[group](triton, key)
    for key in {}, {KEY_HEADER: ""}, {KEY_HEADER: "a guess"}:
        assert http_status(usual.http_url, group, key) == 403


@pytest.mark.parametrize("group", GROUPS)
def test_a_key_opens_its_group_alone(group: str, closed: TritonServer) -> None:
    other = GROUPS[GROUPS.index(group) - 1]
    with InferenceServerClient(closed.grpc_url) as triton:
        for key in {}, {GRPC_KEY_HEADER: KEYS[other]}, {GRPC_KEY_HEADER: KEYS[group][:-1]}:
            with pytest.raises(InferenceServerException, match="restricted"):
                GRPC[group](triton, key)
        assert GRPC[group](triton, {GRPC_KEY_HEADER: KEYS[group]})
    for key in {}, {KEY_HEADER: KEYS[other]}, {KEY_HEADER: KEYS[group][:-1]}:
        assert http_status(closed.http_url, group, key) == 403
    assert http_status(closed.http_url, group, {KEY_HEADER: KEYS[group]}) == 200


def test_every_call_of_the_client_carries_its_key(repository: Path, clip: np.ndarray) -> None:
    groups = "metadata", "inference", "model-config", "statistics", "health"
    with TritonServer(repository, device="cpu", keys=dict.fromkeys(groups, KEYS["inference"])) as server:
        with SpeakerClient(server.grpc_url, api_key=KEYS["inference"]) as client:
            assert client.embed(clip).shape == (192,)
            assert client.status().ready
        for key in None, "another key, as long as it is":
            with SpeakerClient(server.grpc_url, api_key=key) as client:
                for ask in lambda: client.embed(clip), client.status:
                    with pytest.raises(KeyRefusedError, match="api_key"):
                        ask()


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.1, 0.1, 16000).astype(np.float32)


@pytest.mark.parametrize(
    "keys, reason",
    [({"doors": "x" * 16}, ".doors."), ({"inference": "short"}, "16 to 1024")],
)
def test_keys_are_checked(keys: dict[str, str], reason: str, stand_ins: Path) -> None:
    with pytest.raises(ServerError, match=reason):
        TritonServer(stand_ins, device="cpu", keys=keys).start()


# --- what would pass by the limits ---


@pytest.fixture(scope="module")
def limited(stand_ins: Path) -> Iterator[TritonServer]:
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    with TritonServer(stand_ins, device="cpu", limits=Limits(2, 2)) as server:
        yield server


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP", "identity, gzip"])
def test_compressed_requests_are_refused(encoding: str, limited: TritonServer) -> None:
    """Triton would unpack whatever is in them."""
    assert http_status(limited.http_url, "inference", {"Content-Encoding": encoding}) == 415
    assert http_status(limited.http_url, "inference", {"Content-Encoding": "identity"}) == 200
    with InferenceServerClient(limited.grpc_url) as triton:
        with pytest.raises(InferenceServerException, match="(?i)compress"):
            triton.infer("sums", inputs(), compression_algorithm="gzip")
        assert triton.infer("sums", inputs()).as_numpy("sum")[0, 0] == 5


@pytest.mark.parametrize("encodings", [("identity", "gzip"), ("gzip", "identity")])
def test_a_second_header_hides_nothing(encodings: tuple[str, str], tmp_path: Path) -> None:
    """Whichever of them nginx looks at, what is behind it gets none."""
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    told: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as behind:
        behind.settimeout(20)
        names = "grpc", "http", "nowhere"
        at = {
            name: f"127.0.0.1:{port}" for name, (_, port) in choose_ports({n: ("127.0.0.1", 0) for n in names}).items()
        }
        address = f"127.0.0.1:{behind.getsockname()[1]}"
        running = gateway.Gateway(tmp_path, Limits(2, 2), grpc=(at["grpc"], at["nowhere"]), http=(at["http"], address))
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    request = socket.create_connection(("127.0.0.1", int(at["http"].split(":")[1])), timeout=20)
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            with request:
                headers = "".join(f"Content-Encoding: {encoding}\r\n" for encoding in encodings)
                request.sendall(
                    f"POST {HTTP['inference'][1]} HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: 0\r\n\r\n".encode()
                )
                with contextlib.suppress(TimeoutError):
                    behind.settimeout(2)
                    passed, _ = behind.accept()
                    with passed:
                        told.append(passed.recv(10_000))
        finally:
            running.stop()
    # nginx up to 1.22 looks at the first alone, and passes the request on; later ones refuse it.
    assert not any(b"content-encoding" in one.lower() for one in told)


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
        if result.returncode == 92:  # nginx refused before it had read the body, and reset the stream
            return "reset"
        assert result.returncode == 0, result.stderr
        return re.findall(r"grpc-status: (\d+)", result.stdout)[-1]

    assert status(compressed=True) in ("12", "13", "reset")
    if "gzip" not in encodings:
        assert status(compressed=False) == "0"


def test_streams_are_closed(limited: TritonServer) -> None:
    answers: queue.Queue[InferenceServerException | None] = queue.Queue()
    with InferenceServerClient(limited.grpc_url) as triton:
        triton.start_stream(lambda result, error: answers.put(error))
        with contextlib.suppress(InferenceServerException):  # where it is already known to be closed
            triton.async_stream_infer("sums", inputs())
        assert "ModelInfer" in str(answers.get(timeout=20))


def test_what_is_not_inference_is_small(limited: TritonServer) -> None:
    # 500 is Triton's word for what is not JSON: it came through.
    for path, status in ("/v2/models/sums/infer", 500), ("/v2/repository/index", 413), ("/v2/logging", 413):
        connection = http.client.HTTPConnection(limited.http_url, timeout=20)
        connection.request("POST", path, b" " * (3 << 19))
        assert connection.getresponse().status == status
        connection.close()


def test_who_hangs_up_keeps_the_place_until_triton_is_done(tmp_path: Path) -> None:
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    stand_in.write(tmp_path / "sums", delay=3_000_000)
    with TritonServer(tmp_path, device="cpu", limits=Limits(1, 1)) as server:
        body = json.dumps({"inputs": JSON_INPUTS})
        connection = http.client.HTTPConnection(server.http_url, timeout=20)
        connection.request("POST", HTTP["inference"][1], body)
        time.sleep(0.5)
        connection.close()
        time.sleep(0.2)
        assert http_status(server.http_url, "inference", {}) == 503
        deadline = time.monotonic() + 20
        while http_status(server.http_url, "inference", {}) != 200:
            assert time.monotonic() < deadline


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


def test_who_is_let_in(encrypted: TritonServer, certificates: Certificates) -> None:
    files = certificates
    mutual = encrypted.tls is not None and encrypted.tls.client_ca is not None
    known = files.client, files.client_key
    assert ask_grpc(encrypted.grpc_url, files.ca, *known) == 5
    assert ask_http(encrypted.http_url, files.ca, *known) == 200
    for identity in (), (files.stranger, files.stranger_key):
        if mutual:
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                ask_grpc(encrypted.grpc_url, files.ca, *identity)
            assert ask_http(encrypted.http_url, files.ca, *identity) == 403
        else:
            assert ask_grpc(encrypted.grpc_url, files.ca, *identity) == 5
    with pytest.raises(InferenceServerException, match="(?i)handshake|certificate"):
        ask_grpc(encrypted.grpc_url, files.others_ca, *known)
    with pytest.raises(ssl.SSLError):
        ask_http(encrypted.http_url, files.others_ca, *known)
    with InferenceServerClient(encrypted.grpc_url) as triton, pytest.raises(InferenceServerException):
        triton.infer("sums", inputs(), client_timeout=10)
    assert http_status(encrypted.http_url, "health", {}) == 400  # a plain request to a TLS port


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_protocols_are_refused(encrypted: TritonServer, certificates: Certificates) -> None:
    context = ssl.create_default_context(cafile=certificates.ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        http_status(encrypted.http_url, "health", {}, context)


@needs_nginx
def test_the_command_and_the_client_with_all_of_it(
    repository: Path, certificates: Certificates, clip: np.ndarray, tmp_path: Path
) -> None:
    files = certificates
    key = tmp_path / "key"
    key.write_text(KEYS["inference"] + "\n")
    options = [f"--tls-cert={files.server}", f"--tls-key={files.server_key}", f"--tls-client-ca={files.ca}"]
    options += [f"--key-file=inference,metadata={key}", f"--key-file=admin={key}", "--metrics-address=127.0.0.2"]
    command = [sys.executable, "-m", "server", f"--repository={repository}", "--device=cpu", *options]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            told = ""
            while not (ready := re.search(r"ready in .* grpc (\S+), .* metrics (http://127\.0\.0\.2:\S+)", told)):
                line = process.stdout.readline()
                assert line, process.stderr.read()
                told += line
            assert "TLS, client certificate required" in told
            assert "key required for inference, metadata, shared-memory, model-repository, trace, logging" in told
            assert KEYS["inference"] not in told
            url = f"grpcs://{ready[1]}"
            address = ready[1]
            several = f"ipv4:{address},{address}"
            for url_, name in (url, None), (several, "127.0.0.1"), (several, "localhost"):
                tls = replace(files.of_client, name=name)
                with SpeakerClient(url_, tls=tls, api_key=KEYS["inference"]) as client:
                    assert client.embed(clip).shape == (192,)
            with SpeakerClient(several, tls=files.of_client, api_key=KEYS["inference"]) as client:
                with pytest.raises(ConnectError, match="names and dates of its certificate"):
                    client.embed(clip)
            for tls, secret, error in (
                (files.of_client, None, KeyRefusedError),
                (Tls(files.ca), KEYS["inference"], ConnectError),
                (Tls(files.others_ca, files.client, files.client_key), KEYS["inference"], ConnectError),
                (None, KEYS["inference"], ConnectError),
            ):
                with SpeakerClient(url, tls=tls, api_key=secret) as client, pytest.raises(error):
                    client.embed(clip)
            with SpeakerClient(ready[1], api_key=KEYS["inference"]) as client, pytest.raises(ConnectError):
                client.embed(clip)
            status = [
                sys.executable,
                "-c",
                "import sys; from ecapa_triton._cli import main; sys.exit(main())",
                "status",
                f"--url={url}",
                f"--metrics={ready[2]}",
            ]
            status += [f"--tls-ca={files.ca}", f"--tls-cert={files.client}", f"--tls-key={files.client_key}"]
            done = subprocess.run([*status, f"--key-file={key}"], capture_output=True, text=True, timeout=30)
            assert done.returncode == 0 and "ecapa" in done.stdout, done.stderr
            done = subprocess.run(status, capture_output=True, text=True, timeout=30)
            assert done.returncode == 2 and "api_key" in done.stderr
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--tls-cert=x"], "go together"),
        (["--tls-key=x"], "go together"),
        (["--tls-client-ca=x"], "go together"),
        (["--tls-cert=x", "--tls-key=x", "--gateway=off"], "--gateway off"),
        (["--key-file=inference"], "expected groups and a file"),
        (["--key-file=inference={key}", "--key-file=inference={key}"], "two keys for inference"),
        (["--key-file=admin={key}", "--key-file=logging={key}"], "two keys for logging"),
        (["--key-file=inference={binary}"], "inference: "),
        pytest.param(["--tls-cert={key}", "--tls-key={encrypted}"], "without pass phrase", marks=needs_nginx),
        pytest.param(["--tls-cert={dollar}", "--tls-key={key}"], "a$b", marks=needs_nginx),
        (["--", "--http-restricted-api=metadata:foo=bar"], "check the options after --"),
        (["--key-file=inference=/nowhere"], "No such file"),
        (["--key-file=doors={key}"], ".doors."),
        (["--key-file=inference={short}"], "16 to 1024"),
        pytest.param(["--tls-cert=x", "--tls-key=x"], "x: No such file", marks=needs_nginx),
        pytest.param(["--tls-cert={key}", "--tls-key={key}"], "nginx does not start", marks=needs_nginx),
    ],
)
def test_wrong_options(options: list[str], reason: str, stand_ins: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("x" * 20)
    (tmp_path / "short").write_text("x")
    (tmp_path / "binary").write_bytes(b"\xff" * 20)
    (tmp_path / "encrypted").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    (tmp_path / "a$b").write_text("x")
    files = {name: tmp_path / name for name in ("key", "short", "binary", "encrypted")} | {"dollar": tmp_path / "a$b"}
    command = [sys.executable, "-m", "server", f"--repository={stand_ins}", "--device=cpu"]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command += [option.format_map(files) for option in options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and reason in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "tls, reason", [(Tls(ca="/nowhere"), "/nowhere: No such file"), (Tls(certificate="x"), "go together")]
)
def test_wrong_files_of_the_client(tls: Tls, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        SpeakerClient(tls=tls)


def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(ConnectError, match="visible ASCII"):
        SpeakerClient(api_key="Schlüssel")
