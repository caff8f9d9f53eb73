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
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import containers
import pytest
import yaml
from conftest import ROOT
from containers import Process, change, free_ports, needs_curl, needs_nginx, replace, succeeds
from ecapa_triton import KeyRefusedError, SpeakerClient, Tls, TrustError

from server.preflight import cuda_gpus

FILES = ["docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.monitoring.yml"]
TEXT = "\n".join((ROOT / name).read_text() for name in FILES)
MANUAL = (ROOT / ".env.example").read_text()
DOCKERFILES = ["server/Dockerfile", "export/Dockerfile", "loadtest/Dockerfile"]
KEY = "a-key:of=more,than/16"
CLIP = ROOT / "samples/anna_1.flac"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
Service = dict[str, Any]
VARIABLE = re.compile(r"\$\$|\$\{(\w+):([-+?])((?:[^{}]|\$\{\w+(?::-)?\})*)\}|\$\{(\w+)\}")


class Loader(yaml.SafeLoader):
    """With Compose's tag for what replaces a base file's node."""


Loader.add_constructor("!override", lambda loader, node: loader.construct_mapping(node, deep=True))


def read(*files: str, **variables: str) -> dict[str, Service]:
    """The services of the files, the base alone by default, with their variables filled in."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        set_to = variables.get(found[1] or found[4], "")
        if found[2] == "+":
            return VARIABLE.sub(value, found[3]) if set_to else ""
        return set_to or ("x" if found[2] == "?" else found[3] or "")

    services: dict[str, Service] = {}
    for name in files or FILES[:1]:
        for service, parts in yaml.load((ROOT / name).read_text(), Loader)["services"].items():
            services[service] = services.get(service, {}) | change(parts, lambda text: VARIABLE.sub(value, text))
    return services


SERVICES = read(*FILES)
OURS = ["triton", "gateway", "export", "locust"]


# --- the files ---


def has_compose() -> bool:
    """Compose 2.24.4 or newer, which knows `!override`."""
    if shutil.which(COMPOSE[0]) is None:
        return False
    run = subprocess.run([*COMPOSE, "version", "--short"], capture_output=True, text=True)
    found = re.findall(r"\d+", run.stdout)
    return run.returncode == 0 and [int(one) for one in found[:3]] >= [2, 24, 4]


def compose_config(env_file: Path, *files: str, **variables: str) -> dict[str, Any]:
    chosen = [f"--file={name}" for name in files]
    command = [*COMPOSE, f"--project-directory={ROOT}", f"--env-file={env_file}", *chosen, "--profile=*", "config"]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | variables
    run = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return yaml.safe_load(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(not has_compose(), reason="Compose 2.24.4 or newer is missing")
@pytest.mark.parametrize("files", [FILES[:1], FILES[:2], FILES[::2], FILES])
def test_manual_gives_the_defaults_and_compose_reads_as_these_tests_do(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    given = {"GRAFANA_PASSWORD": "x"}
    config = compose_config(tmp_path / "env", *files, **given)
    assert config == compose_config(ROOT / ".env.example", *files, **given)
    services = read(*files)
    assert config["services"].keys() == services.keys()
    for name, service in config["services"].items():
        for part in "environment", "entrypoint", "command", "image", "networks":
            seen = json.loads(json.dumps(service.get(part)).replace("$$", "$"))
            expected = services[name].get(part)
            if part == "networks" and isinstance(expected, list):
                expected = dict.fromkeys(expected)
            assert seen == expected, (name, part)


@pytest.mark.skipif(not has_compose(), reason="Compose 2.24.4 or newer is missing")
def test_monitoring_needs_a_password(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("GRAFANA_PASSWORD=\n")
    with pytest.raises(AssertionError, match=r"GRAFANA_PASSWORD.*set it in \.env"):
        compose_config(tmp_path / "env", *FILES[::2])


def test_env_example_is_the_manual() -> None:
    lines = dict(re.findall(r"^#? ?([A-Z_]+)=(.*)$", MANUAL, re.MULTILINE))
    used = {found[1]: found[3] for found in VARIABLE.finditer(TEXT) if found[2] in ("-", "?", "+")}
    used |= {found[1]: found[3] for found in VARIABLE.finditer(TEXT) if found[2] == "-"}
    assert lines.keys() - {"COMPOSE_FILE"} == used.keys()
    plain = dict(re.findall(r"^([A-Z_]+)=(.*)$", MANUAL, re.MULTILINE))
    assert all(default in ("", used[name]) for name, default in plain.items() if name != "COMPOSE_FILE")
    assert all(block.startswith("#") for block in re.split(r"\n\n+", MANUAL))  # an explanation above each group
    names = re.findall(r"[\w.-]+\.yml", " ".join(re.findall(r"^#? ?COMPOSE_FILE=(.*)$", MANUAL, re.MULTILINE)))
    assert set(names) == set(FILES)


@pytest.mark.parametrize("name", SERVICES)
def test_service_keeps_to_the_policy(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert not {"cap_add", "privileged", "pid", "ipc", "network_mode", "devices"} & service.keys()
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"]) and int(service["ulimits"]["nofile"]) >= 65536
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["restart"] == ("no" if name == "export" else "unless-stopped")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if name in OURS:
        assert service["build"]["dockerfile"] in DOCKERFILES and ":" not in service["image"]
        assert service["pull_policy"] == "build"
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", service["image"])
    writable = {"/downloads", "/sockets", "/prometheus", "/var/lib/grafana"} | (
        {"/models"} if name == "export" else set()
    )
    for source, target, *mode in (mount.split(":") for mount in service.get("volumes", [])):
        assert mode == ["ro"] or target in writable
        assert not source.startswith(".") or (ROOT / source).exists()
    # Commands, not programs; health checks that only read.
    probe, *check = service.get("healthcheck", {}).get("test", ["CMD", "curl"])
    assert probe == "CMD" and check[0] in ("curl", "wget")
    words = [*service.get("entrypoint", []), *service.get("command", [])]
    assert not {"sh", "/bin/sh", "bash", "-c=", "-e"} & set(words) and "\n" not in "".join(words)


def test_networks_and_keys() -> None:
    """Triton has no port on the host and no way out; keys are in the gateway alone, and not on its command line."""
    assert yaml.safe_load((ROOT / FILES[0]).read_text())["networks"]["inside"] == {"internal": True}
    for files in FILES[:1], FILES[:2]:
        services = read(*files, INFERENCE_KEY=KEY, ADMIN_KEY=KEY * 2)
        for name, service in services.items():
            assert (KEY in json.dumps(service)) == (name == "gateway")
            assert KEY not in json.dumps(service.get("command"))
        assert "ports" not in services["triton"] and services["triton"]["networks"].keys() == {"inside"}
    ports = read(ADDRESS="10.0.0.5")["gateway"]["ports"]
    assert ports == ["10.0.0.5:8000:8000", "10.0.0.5:8001:8001"]


# --- the server's flags ---


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the server's image."""
    return containers.build("server/Dockerfile", tmp_path_factory.mktemp("image"))


@dataclass
class Host:
    """The services' commands as processes of this machine."""

    image: Path
    repository: Path
    folder: Path
    tls: Path = Path("/dev/null")

    def __post_init__(self) -> None:
        self.ports = free_ports(["http", "grpc", "metrics", "gateway-metrics"])
        self.sockets = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path is short

    def start(self, name: str, service: Service, *apis: str) -> Process:
        service = self.here(service)
        flags = [f"--{api}-port={self.ports[api]}" for api in apis]
        command = [*service["entrypoint"], *service["command"], *flags]
        return Process(command, service.get("environment", {}), self.folder / f"{name}.log", self.image)

    def triton(self, service: Service) -> Process:
        return self.start("triton", service, "metrics")

    def gateway(self, service: Service) -> Process:
        return self.start("gateway", service, "http", "grpc", "gateway-metrics")

    def here(self, service: Service) -> Service:
        places = {"=0.0.0.0": "=127.0.0.1", "=/models": f"={self.repository}", "=/tls": f"={self.tls}"}
        places |= {"/sockets": str(self.sockets), ":8003": f":{self.ports['gateway-metrics']}"}
        return replace(service, places)  # type: ignore[no-any-return]

    def is_healthy(self, service: Service) -> bool:
        return succeeds(self.here(service)["healthcheck"]["test"][1:])


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
        ("triton", {"MODELS": "ecapa,ecapa_torchscript"}, 1, "ecapa_torchscript"),  # not exported
        ("triton", {"MODEL_REPOSITORY": "damaged"}, 1, "model.onnx"),
        ("triton", {"START_TIMEOUT": "0"}, 1, "0 s"),
        ("gateway", {"INFERENCE_KEY": "x" * 15}, 2, "15"),
        ("gateway", {"ADMIN_KEY": f"{KEY} {KEY}"}, 2, "key"),
        ("gateway", {"CLIENT_CA": "clients.pem"}, 2, "--tls-cert"),  # or clients without certificate would be accepted
        ("gateway", {"TLS_FOLDER": "empty"}, 1, "cert.pem"),
        ("gpu", {}, 1, "gpu"),  # this machine has none, or a runtime that cannot use it
        ("gpu", {"GPUS": "one"}, 2, "one"),
        ("gpu", {"PRECISION": "half"}, 2, "half"),
    ],
)
@needs_nginx
def test_launcher_rejects(
    name: str, variables: dict[str, str], exit_status: int, reason: str, image: Path, repository: Path, tmp_path: Path
) -> None:
    if exit_status == 1 and name == "gpu" and cuda_gpus()[0]:
        pytest.skip("this machine has a GPU")
    if "MODEL_REPOSITORY" in variables:
        repository = damage(repository, tmp_path)
    host = Host(image, repository, tmp_path, tmp_path)
    services = read(*FILES[: 2 if name == "gpu" else 1], **variables)
    process = host.gateway(services[name]) if name == "gateway" else host.triton(services["triton"])
    with process:
        assert process.process.wait(60) == exit_status
    assert reason in process.text() and KEY not in process.text()


def test_image_with_models_needs_a_whole_one(image: Path, repository: Path, tmp_path: Path) -> None:
    (command,) = (json.loads(line) for line in containers.instruction("server/Dockerfile", "RUN") if "/models" in line)
    for models, built in (repository, True), (damage(repository, tmp_path), False), (ROOT / "samples", False):
        words = [word.replace("/models", str(models)) for word in command]
        assert (python(image, *words[1:]).returncode == 0) == built


# --- the server and its gateway, running ---


@needs_nginx
@needs_curl
def test_through_the_gateway(image: Path, repository: Path, tmp_path: Path) -> None:
    tls = containers.write_certificates(tmp_path / "tls")
    services = read(INFERENCE_KEY=KEY, TLS_FOLDER="x", CLIENT_CA="clients.pem")
    host = Host(image, repository, tmp_path, tls)
    with host.gateway(services["gateway"]) as front:
        front.wait_until(lambda: "ready" in front.text())
        assert not host.is_healthy(services["gateway"])
        with host.triton(services["triton"]) as triton:
            triton.wait_until(lambda: host.is_healthy(services["triton"]))
            assert host.is_healthy(services["gateway"])
            url = f"grpcs://127.0.0.1:{host.ports['grpc']}"
            ours = Tls(tls / "clients.pem", tls / "client.pem", tls / "client_key.pem")
            with SpeakerClient(url, tls=ours, api_key=KEY) as client:
                assert client.verify(CLIP, ROOT / "samples/anna_2.flac").same
            with SpeakerClient(url, tls=ours) as client, pytest.raises(KeyRefusedError):
                client.embed(CLIP)
            with SpeakerClient(url, tls=Tls(tls / "clients.pem"), api_key=KEY) as client, pytest.raises(TrustError):
                client.embed(CLIP)
            assert triton.stop() == 0, triton.text()[-2000:]
        assert not host.is_healthy(services["gateway"]) and not host.is_healthy(services["triton"])
        assert front.stop() == 0


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
