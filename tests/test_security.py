"""Keys, certificates and encryption, on a real tritonserver: requests with them pass, others are rejected."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import stand_in
import trustme
from containers import needs_nginx
from ecapa_triton import ConnectError, KeyRefusedError, SpeakerClient, Tls
from ecapa_triton.protocol import GRPC_KEY_HEADER, KEY_HEADER
from launcher import http_status, launched
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from server import Limits, ServerError, TritonServer, __main__, gateway
from server.options import ADMIN, GROUPS

CLIP = np.ones((1, 5), np.float32)
KEYS = {group: f"The:key=of,{group}/$1{{}}\"'{chr(92)}{'x' * 16}" for group in GROUPS}
OTHER_KEY = "another-key-for-all-groups"

# A request to each group: over gRPC the client's method and arguments, over HTTP the method and path.
CALLS: dict[str, tuple[str, list[object], str, str]] = {
    "health": ("is_server_ready", [], "GET", "/v2/health/ready"),
    "metadata": ("get_server_metadata", [], "GET", "/v2"),
    "inference": ("infer", ["sums", stand_in.inputs(CLIP)], "POST", stand_in.PATH),
    "model-config": ("get_model_config", ["sums"], "GET", "/v2/models/sums/config"),
    "statistics": ("get_inference_statistics", ["sums"], "GET", "/v2/models/sums/stats"),
    "shared-memory": ("get_system_shared_memory_status", [], "GET", "/v2/systemsharedmemory/status"),
    "model-repository": ("get_model_repository_index", [], "POST", "/v2/repository/index"),
    "trace": ("get_trace_settings", [], "GET", "/v2/trace/setting"),
    "logging": ("get_log_settings", [], "GET", "/v2/logging"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Certificates of an authority (ca), a server and a client that it certifies, and of another authority's client."""
    folder = tmp_path_factory.mktemp('cert "of \\ us')  # characters that nginx quotes
    ours, others = trustme.CA(), trustme.CA()
    paths = {}
    for name, certificate in {
        "server": ours.issue_cert("127.0.0.1", "localhost"),
        "client": ours.issue_cert("client@example.org"),
        "foreign": others.issue_cert("foreign@example.org"),
    }.items():
        paths |= {name: folder / f"{name}.pem", f"{name}_key": folder / f"{name}_key.pem"}
        certificate.cert_chain_pems[0].write_to_path(paths[name])
        certificate.private_key_pem.write_to_path(paths[f"{name}_key"])
    for name, authority in ("ca", ours), ("others_ca", others):
        paths[name] = folder / f"{name}.pem"
        authority.cert_pem.write_to_path(paths[name])
    return SimpleNamespace(**paths)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    stand_in.write(folder / "sums")
    return folder


def call_grpc(triton: InferenceServerClient, group: str, headers: dict[str, str]) -> object:
    method, arguments, *_ = CALLS[group]
    return getattr(triton, method)(*arguments, headers=headers)


def status(url: str, group: str, headers: Mapping[str, str], context: ssl.SSLContext | None = None) -> int:
    _, _, method, path = CALLS[group]
    body = stand_in.BODY if group == "inference" else b"{}" if method == "POST" else None
    return http_status(url, method, path, body, headers, context)


# --- keys ---


@pytest.fixture(scope="module", params=[None, pytest.param(Limits(8), marks=needs_nginx)], ids=["bare", "nginx"])
def usual(stand_ins: Path, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    with TritonServer(stand_ins, device="cpu", limits=request.param) as server:
        yield server


@pytest.fixture(scope="module")
def closed(stand_ins: Path) -> Iterator[TritonServer]:
    """With two keys for each group."""
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    keys = {group: [key, OTHER_KEY] for group, key in KEYS.items()}
    with TritonServer(stand_ins, device="cpu", limits=Limits(8), keys=keys) as server:
        yield server


def assert_open(server: TritonServer, group: str, key: str | None = None) -> None:
    with InferenceServerClient(server.grpc_url) as triton:
        assert call_grpc(triton, group, {GRPC_KEY_HEADER: key} if key else {})
    assert status(server.http_url, group, {KEY_HEADER: key} if key else {}) == 200


def assert_closed(server: TritonServer, group: str, *keys: str | None) -> None:
    for key in keys:
        with InferenceServerClient(server.grpc_url) as triton, pytest.raises(InferenceServerException):
            call_grpc(triton, group, {} if key is None else {GRPC_KEY_HEADER: key})
        assert status(server.http_url, group, {} if key is None else {KEY_HEADER: key}) == 403


@pytest.mark.parametrize("group", GROUPS)
def test_groups_for_operators_are_closed(group: str, usual: TritonServer) -> None:
    assert set(GROUPS) == set(CALLS)
    if group in ADMIN:
        assert_closed(usual, group, None, "", "a guess", KEYS[group])
    else:
        assert_open(usual, group)


@pytest.mark.parametrize("group", GROUPS)
def test_a_key_opens_its_group_alone(group: str, closed: TritonServer) -> None:
    wrong = KEYS[GROUPS[GROUPS.index(group) - 1]], KEYS[group][:-1], KEYS[group].lower(), KEYS[group] + "x"
    assert_closed(closed, group, None, *wrong)
    assert_open(closed, group, KEYS[group])
    assert_open(closed, group, OTHER_KEY)


def test_keys_are_in_no_process_list_and_wrong_ones_are_counted(closed: TritonServer) -> None:
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if OTHER_KEY in command]
    with urlopen(closed.gateway_metrics_url) as reply:
        counts = reply.read().decode()
    for api in "grpc", "http":
        assert re.search(rf'gateway_requests_total{{api="{api}",result="key"}} [1-9]', counts)


@needs_nginx
def test_every_call_of_the_client_carries_its_key(repository: Path, clip: np.ndarray) -> None:
    groups = "metadata", "inference", "model-config", "statistics", "health"
    keys = dict.fromkeys(groups, [KEYS["inference"]])
    with TritonServer(repository, device="cpu", limits=Limits(8), keys=keys) as server:
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
    several = {group: ["y" * 16, key] for group, key in keys.items()}
    with pytest.raises(ServerError, match=next(iter(keys))):
        TritonServer(stand_ins, device="cpu", limits=Limits(8), keys=several).start()
    with pytest.raises(ServerError, match="keys need nginx"):
        TritonServer(stand_ins, device="cpu", keys=several).start()


# --- TLS ---


@pytest.fixture(scope="module", params=[False, True], ids=["tls", "mutual"])
def encrypted(stand_ins: Path, files: SimpleNamespace, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    if gateway.find() is None:
        pytest.skip("nginx is not installed")
    tls = gateway.Tls(files.server, files.server_key, files.ca if request.param else None)
    with TritonServer(stand_ins, device="cpu", limits=Limits(8), tls=tls) as server:
        yield server


def ask_grpc(url: str, ca: Path, certificate: Path | None = None, key: Path | None = None) -> float:
    files = {"root_certificates": ca, "certificate_chain": certificate, "private_key": key}
    paths = {name: str(path) for name, path in files.items() if path}
    with InferenceServerClient(url, ssl=True, **paths) as triton:
        return float(triton.infer("sums", stand_in.inputs(CLIP), client_timeout=10).as_numpy("sum")[0, 0])


def ask_http(url: str, ca: Path, certificate: Path | None = None, key: Path | None = None) -> int:
    context = ssl.create_default_context(cafile=ca)
    if certificate:
        context.load_cert_chain(certificate, key)
    return status(url, "inference", {}, context)


def test_clients_with_and_without_a_certificate(encrypted: TritonServer, files: SimpleNamespace) -> None:
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
        triton.infer("sums", stand_in.inputs(CLIP), client_timeout=10)
    assert status(encrypted.http_url, "health", {}) == 400  # a plain request to a TLS port


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_protocols_are_rejected(encrypted: TritonServer, files: SimpleNamespace) -> None:
    context = ssl.create_default_context(cafile=files.ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        status(encrypted.http_url, "health", {}, context)


@needs_nginx
def test_the_launcher_and_the_client_with_all_of_it(
    repository: Path, files: SimpleNamespace, clip: np.ndarray, tmp_path: Path
) -> None:
    secret = KEYS["inference"]
    of_client = Tls(files.ca, files.client, files.client_key)
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
            with SpeakerClient(url_, tls=replace(of_client, name=name), api_key=secret) as client:
                assert client.embed(clip).shape == (192,)
        other_ca = Tls(files.others_ca, files.client, files.client_key)
        for url_, tls, api_key, error in (
            (several, of_client, secret, ConnectError),  # which name its certificate has, is not known
            (url, of_client, None, KeyRefusedError),
            (url, Tls(files.ca), secret, ConnectError),
            (url, other_ca, secret, ConnectError),
            (url, None, secret, ConnectError),
            (address, None, secret, ConnectError),
        ):
            with SpeakerClient(url_, tls=tls, api_key=api_key, retries=0) as client, pytest.raises(error):
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
        *(([option], option.split("=")[1]) for option in ("--max-requests=0", "--max-requests=²", "--threads=-1")),
        *(([option], option.split("=")[1]) for option in ("--max-request-mb=x", "--gpus=0,")),
        (["--device=cpu", "--gpus=0"], "--gpus"),
        (["--tls-cert=x"], "--tls-key"),
        (["--tls-client-ca=x"], "--tls-cert"),
        (["--tls-cert=x", "--tls-key=x", "--gateway=off"], "--gateway off"),
        (["--max-requests=1", "--gateway=off"], "--gateway off"),
        (["--key-file=inference={key}", "--gateway=off"], "--gateway off"),
        (["--gateway=only"], "--sockets"),
        (["--sockets=x"], "--gateway"),
        (["--key-file=inference"], "--key-file"),
        (["--key-file=inference={binary}"], "inference"),
        (["--key-file=inference=/nowhere"], "inference"),
        (["--key-file=doors={key}"], "'doors'"),
        (["--key-file=inference={short}"], "16 to 1024"),
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
    for name, value in ("KEY", "x" * 20), ("BLANK", " "):
        monkeypatch.setenv(name, value)
    files = {name: tmp_path / name for name in ("key", "short", "binary")}
    with pytest.raises(SystemExit, match="2"):
        __main__.main([option.format_map(files) for option in options])
    message = capsys.readouterr().err
    assert fact in message.splitlines()[-1] and "x" * 20 not in message


@needs_nginx
@pytest.mark.parametrize(
    "certificate, key, fact",
    [("server", "encrypted", "encrypted"), ("a$b", "server_key", "b"), ("x", "x", "x"), ("key", "key", "key")],
)
def test_wrong_certificates(
    certificate: str, key: str, fact: str, files: SimpleNamespace, stand_ins: Path, tmp_path: Path
) -> None:
    for name in "server", "server_key":
        shutil.copy(getattr(files, name), tmp_path / name)
    shutil.copy(files.server, tmp_path / "a$b")
    (tmp_path / "key").write_text("x" * 20)
    command = ["openssl", "pkcs8", "-topk8", "-in", files.server_key, "-out", tmp_path / "encrypted", "-passout"]
    subprocess.run([*command, "pass:secret"], check=True)
    tls = gateway.Tls(tmp_path / certificate, tmp_path / key)
    with pytest.raises(ServerError, match=fact):
        TritonServer(stand_ins, device="cpu", limits=Limits(1), tls=tls).start()


@pytest.mark.parametrize(
    "tls, reason", [(Tls(ca="/nowhere"), "/nowhere: No such file"), (Tls(certificate="x"), "go together")]
)
def test_wrong_files_of_the_client(tls: Tls, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        SpeakerClient(tls=tls)
