"""docker-compose.yml, .env.example and the Dockerfiles.

The commands and health checks of the server and its gateway run here as they stand in the files, with other paths and
ports, on the tritonserver of the wheel and an installed nginx. Images are built as far as that needs no container.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import containers
import pytest
import trustme
import yaml
from conftest import ROOT, entry_point
from containers import Process, change, free_ports, needs_curl, needs_nginx, replace, status, succeeds
from ecapa_triton import KeyRefusedError, SpeakerClient
from ecapa_triton.protocol import KEY_HEADER
from launcher import wait_until

from server.preflight import cuda_gpus

TEXT = (ROOT / "docker-compose.yml").read_text()
MANUAL = (ROOT / ".env.example").read_text()
PROFILES = ["gpu", "cpu", "monitoring", "load", "export"]
DOCKERFILES = ["server/Dockerfile", "export/Dockerfile", "loadtest/Dockerfile"]
KEY = "a-key:of=more,than/16"
CLIP = ROOT / "samples/anna_1.flac"
APIS = ["http", "grpc", "metrics", "gateway http", "gateway grpc", "health", "counter"]
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
Service = dict[str, Any]


def read(**variables: str) -> dict[str, Service]:
    """The services, with `${NAME:-default}` filled in."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1]) or found[2]

    services: dict[str, Service] = yaml.safe_load(TEXT)["services"]
    return {
        name: change(service, lambda text: re.sub(r"\$\$|\$\{(\w+):-([^}]*)\}", value, text))
        for name, service in services.items()
    }


SERVICES = read()
TRITONS = ["triton-gpu", "triton-cpu"]
GATEWAYS = ["gateway-gpu", "gateway-cpu"]


# --- the file ---


HAS_COMPOSE = bool(shutil.which(COMPOSE[0])) and succeeds([*COMPOSE, "version"])


def compose_config(env_file: Path, *profiles: str) -> dict[str, Any]:
    chosen = [f"--profile={profile}" for profile in profiles]
    command = [*COMPOSE, "--project-directory", str(ROOT), "--env-file", str(env_file), *chosen, "config"]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    run = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return yaml.safe_load(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(not HAS_COMPOSE, reason="Compose is missing: apt install docker-compose")
def test_manual_gives_the_defaults_and_compose_reads_as_these_tests_do(tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    config = compose_config(tmp_path / "env", *PROFILES)
    assert config == compose_config(ROOT / ".env.example", *PROFILES)
    assert config["services"].keys() == SERVICES.keys()
    for name, service in config["services"].items():
        for part in "environment", "entrypoint", "command", "image":
            seen = json.loads(json.dumps(service.get(part)).replace("$$", "$"))
            assert seen == SERVICES[name].get(part), (name, part)
    for profile in PROFILES:
        compose_config(tmp_path / "env", profile)  # each by itself: no service depends on one of another profile


def test_env_example_is_the_manual() -> None:
    lines = dict(re.findall(r"^([A-Z_]+)=(.*)$", MANUAL, re.MULTILINE))
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    assert lines.keys() - {"COMPOSE_PROFILES"} == used.keys()
    assert all(default in ("", used[name]) for name, default in lines.items() if name in used)
    assert all(block.startswith("#") for block in re.split(r"\n\n+", MANUAL))  # an explanation above each group


@pytest.mark.parametrize("name", SERVICES)
def test_service_keeps_to_the_policy(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert not {"cap_add", "privileged", "pid", "ipc", "network_mode", "devices"} & service.keys()
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"]) and service["ulimits"]["nofile"] >= 65536
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["restart"] == ("no" if name == "export" else "unless-stopped")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if "build" in service:
        assert service["build"]["dockerfile"] in DOCKERFILES and ":" not in service["image"]
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", service["image"])
    writable = {"/models", "/downloads"} if name == "export" else {"/prometheus", "/var/lib/grafana", "/run/requests"}
    for source, target, *mode in (mount.split(":") for mount in service.get("volumes", [])):
        assert mode == ["ro"] or target in writable
        assert not source.startswith(".") or (ROOT / source).exists()
    # Commands, not programs; health checks that only read.
    probe, *check = service.get("healthcheck", {}).get("test", ["CMD", "curl"])
    assert probe == "CMD" and check[0] in ("curl", "wget")
    words = [*service.get("entrypoint", []), *service.get("command", [])]
    assert not {"sh", "/bin/sh", "bash", "-c=", "-e"} & set(words) and "\n" not in "".join(words)


def test_networks_and_keys() -> None:
    """Triton has no port on the host and no way out; its keys are in no other container."""
    assert yaml.safe_load(TEXT)["networks"]["inside"] == {"internal": True}
    services = read(INFERENCE_KEY=KEY, ADMIN_KEY=KEY * 2)
    for name, service in services.items():
        assert (KEY in json.dumps(service)) == (name in TRITONS)
        if name in TRITONS:
            assert "ports" not in service and service["networks"].keys() == {"inside"}
    ports = {port for name in GATEWAYS for port in read(ADDRESS="10.0.0.5")[name]["ports"]}
    assert ports == {"10.0.0.5:8000:8000", "10.0.0.5:8001:8001"}


# --- the server's flags ---


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the server's image."""
    return containers.build("server/Dockerfile", tmp_path_factory.mktemp("image"))


def serve(service: Service, image: Path, repository: Path, folder: Path, ports: Mapping[str, int]) -> Process:
    """The server by its service's command, on loopback ports."""
    service = replace(service, {"/models": str(repository), "0.0.0.0": "127.0.0.1"})
    flags = [f"--{api}-port={ports[api]}" for api in ("http", "grpc", "metrics")]
    command = [*service["entrypoint"], *service["command"], *flags]
    return Process(command, service.get("environment", {}), folder / "triton.log", image)


def server_is_ready(ports: Mapping[str, int]) -> bool:
    """By the image's health check."""
    (text,) = containers.instruction("server/Dockerfile", "HEALTHCHECK")
    return succeeds(replace(json.loads(text.partition("CMD ")[2]), {":8000": f":{ports['http']}"}))


def damage(repository: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(repository, folder / "damaged"))
    file = copy / "ecapa/1/model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return copy


@pytest.mark.parametrize(
    "name, variables, exit_status, reason",
    [
        ("triton-cpu", {"MODELS": "ecapa,ecapa_torchscript"}, 1, "ecapa_torchscript"),  # not exported
        ("triton-cpu", {"MODEL_REPOSITORY": "damaged"}, 1, "model.onnx"),
        ("triton-cpu", {"INFERENCE_KEY": "x" * 15}, 2, "15"),
        ("triton-cpu", {"ADMIN_KEY": f"{KEY} {KEY}"}, 2, "key"),
        ("triton-cpu", {"START_TIMEOUT": "0"}, 1, "0 s"),
        ("triton-gpu", {}, 1, "gpu"),  # this machine has none, or a runtime that cannot use it
        ("triton-gpu", {"GPUS": "one"}, 2, "one"),
        ("triton-gpu", {"PRECISION": "half"}, 2, "half"),
    ],
)
def test_launcher_rejects(
    name: str, variables: dict[str, str], exit_status: int, reason: str, image: Path, repository: Path, tmp_path: Path
) -> None:
    if exit_status == 1 and name == "triton-gpu" and cuda_gpus()[0]:
        pytest.skip("this machine has a GPU")
    if "MODEL_REPOSITORY" in variables:
        repository = damage(repository, tmp_path)
    process = serve(read(**variables)[name], image, repository, tmp_path, free_ports(APIS))
    assert process.process.wait(60) == exit_status
    assert reason in process.text() and KEY not in process.text()


def test_image_with_models_needs_a_whole_one(image: Path, repository: Path, tmp_path: Path) -> None:
    (command,) = (json.loads(line) for line in containers.instruction("server/Dockerfile", "RUN") if "/models" in line)
    for models, built in (repository, True), (damage(repository, tmp_path), False), (ROOT / "samples", False):
        words = [word.replace("/models", str(models)) for word in command]
        assert (python(image, *words[1:]).returncode == 0) == built


# --- the server and its gateway, running ---


def render(service: Service, folder: Path, ports: Mapping[str, int], tls: Path | None = None) -> Service:
    """The gateway's service in the places of this machine, with its templates filled in."""
    output = folder / "gateway"
    output.mkdir()
    behind = {f"triton:{port} resolve": f"127.0.0.1:{ports[api]}" for port, api in ((8000, "http"), (8001, "grpc"))}
    places = behind | {
        "/run/gateway": str(output),
        "0.0.0.0:8000": f"127.0.0.1:{ports['gateway http']}",
        "0.0.0.0:8001": f"127.0.0.1:{ports['gateway grpc']}",
        "127.0.0.1:8080": f"127.0.0.1:{ports['health']}",
        "/run/requests": str(folder),
        "/etc/nginx/tls": str(tls),
    }
    service = replace(service, places)
    for source, target in (mount.split(":")[:2] for mount in service["volumes"]):
        if target.startswith("/etc/nginx/templates/"):
            text = entry_point((ROOT / source).read_text(), service["environment"])
            (output / Path(target).stem).write_text(text)
        elif target.startswith(str(output)):
            Path(target).symlink_to(source)
    assert not re.search(r"\$\{\w+\}", (output / "nginx.conf").read_text())
    return service


def nginx(service: Service) -> list[str]:
    program, option, configuration = service["command"]
    assert (program, option) == ("nginx", "-c")
    return containers.nginx(Path(configuration))


def healthy(service: Service) -> bool:
    return succeeds(service["healthcheck"]["test"][1:])


def counter(folder: Path, port: int) -> Process:
    (script, _), (_, target) = (mount.split(":")[:2] for mount in SERVICES["counter"]["volumes"])
    places = {"0.0.0.0": "127.0.0.1", f"/{Path(script).name}": str(ROOT / script), target: str(folder)}
    command = replace(SERVICES["counter"]["command"], places)
    return Process([*command, f"--port={port}"], {}, folder / "counter.log")


@needs_nginx
@needs_curl
def test_through_the_gateway(image: Path, repository: Path, tmp_path: Path) -> None:
    ports = free_ports(APIS)
    services = read(MAX_REQUEST_MB="1", INFERENCE_KEY=KEY)
    gateway = render(services["gateway-cpu"], tmp_path, ports)
    with (
        counter(tmp_path, ports["counter"]) as counting,
        serve(services["triton-cpu"], image, repository, tmp_path, ports) as triton,
        Process(nginx(gateway), {}, tmp_path / "nginx.log") as front,
    ):
        triton.wait_until(lambda: server_is_ready(ports))
        front.wait_until(lambda: healthy(gateway))
        url = f"127.0.0.1:{ports['gateway grpc']}"
        with SpeakerClient(url, api_key=KEY) as client:
            assert client.verify(CLIP, ROOT / "samples/anna_2.flac").same
        with SpeakerClient(url) as client, pytest.raises(KeyRefusedError):
            client.embed(CLIP)
        counted = 'gateway_requests_total{api="grpc",result="ok"} 2'
        wait_until(lambda: counted in urlopen(f"http://127.0.0.1:{ports['counter']}/metrics").read().decode())
        assert counting.stop() == 0  # nginx does without the counter
        # Administrators' APIs have no key, so they are closed to every key.
        path = "/v2/repository/models/ecapa/unload"
        found = [status(ports["gateway http"], "POST", path, {KEY_HEADER: key}) for key in ("", KEY)]
        assert found == [403, 403]
        assert healthy(gateway)
        assert triton.stop() == 0, triton.text()[-2000:]
        assert not healthy(gateway) and not server_is_ready(ports)


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    """A folder as TLS_FOLDER."""
    authority, folder = trustme.CA(), tmp_path / "tls"
    folder.mkdir()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "clients.pem")
    return folder


@needs_nginx
@pytest.mark.parametrize(
    "ssl, verify, starts",
    [
        ("", "off", True),
        ("ssl", "on", True),
        ("", "on", False),  # or clients without certificate would be accepted
        ("yes", "off", False),
        ("ssl", "yes", False),
    ],
)
def test_nginx_takes_only_what_encrypts(ssl: str, verify: str, starts: bool, tls: Path, tmp_path: Path) -> None:
    service = render(read(SSL=ssl, VERIFY_CLIENT=verify)["gateway-gpu"], tmp_path, free_ports(APIS), tls)
    assert succeeds([*nginx(service), "-t"]) == starts
    if ssl:
        shutil.rmtree(tls)
        assert not succeeds([*nginx(service), "-t"])


# --- images ---


def python(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


def test_contexts_have_no_secrets_and_no_tests() -> None:
    assert not [file for file in containers.context() if re.search(r"__pycache__|results/|\.env|\.git/|tests/", file)]


@pytest.mark.parametrize("dockerfile, option", list(zip(DOCKERFILES, ["--help", "--help", "--list"], strict=True)))
def test_command_finds_its_modules_in_its_image(dockerfile: str, option: str, tmp_path: Path) -> None:
    folder = containers.build(dockerfile, tmp_path)
    (entry,) = map(json.loads, containers.instruction(dockerfile, "ENTRYPOINT"))
    arguments = entry[1:] if entry[0].startswith("python") else ["-m", *entry]
    command = SERVICES["locust"]["command"][:2] if option == "--list" else []
    run = python(folder, *arguments, *command, option)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_image_can_be_installed(dockerfile: str, tmp_path: Path) -> None:
    """pip resolves what the image installs; the server's is small enough to be installed, and runs on that alone."""
    if not succeeds(
        [sys.executable, "-m", "pip", "download", "--retries=0", "--no-deps", f"--dest={tmp_path}", "cycler"]
    ):
        pytest.skip("no package index can be reached: connect, or set PIP_INDEX_URL")
    folder = containers.build(dockerfile, tmp_path / "image")
    lines = containers.instruction(dockerfile, "RUN")
    (line,) = (line for line in lines if "pip install" in line)
    options = line.replace("'", "").partition("pip install ")[2].split()
    small = dockerfile == "server/Dockerfile"
    how = [f"--target={tmp_path / 'site'}"] if small else ["--dry-run", "--ignore-installed"]
    run = python(folder, "-m", "pip", "install", *how, *options)
    assert run.returncode == 0, run.stderr
    if small:
        site = str(tmp_path / "site")
        run = python(folder, "-S", "-m", "server", "--repository=models", "--device=cpu", PYTHONPATH=site)
        assert run.returncode == 1 and "model.onnx is missing" in run.stderr, run.stderr
