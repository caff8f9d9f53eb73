"""docker-compose.yml, .env.example and the Dockerfiles: read, run as far as that needs no container, and built in part.

The commands and health checks of Triton and its gateway run here as they stand in the file, with other paths and ports,
against the tritonserver of the wheel and an installed nginx.
"""

from __future__ import annotations

import functools
import getpass
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import stand_in
import trustme
import yaml
from conftest import ROOT, entry_point
from ecapa_triton import KeyRefusedError, SpeakerClient, Tls
from ecapa_triton.protocol import KEY_HEADER

from export import seal
from server import ServerError, TritonServer, child, gateway
from server.options import ADMIN
from server.triton import assemble_wheel, choose_ports, find_installed

TEXT = (ROOT / "docker-compose.yml").read_text()
MANUAL = (ROOT / ".env.example").read_text()
PROFILES = ["gpu", "cpu", "monitoring", "load", "export"]
KEY = "a-key:of=more,than/16"
CLIP = ROOT / "samples/anna_1.flac"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
Service = dict[str, Any]


def read(**variables: str) -> dict[str, Service]:
    """The services, with `${NAME:-default}` filled in."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1]) or found[2]

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(below) for key, below in node.items()}
        if isinstance(node, list):
            return [fill(below) for below in node]
        return re.sub(r"\$\$|\$\{(\w+):-([^}]*)\}", value, node) if isinstance(node, str) else node

    return fill(yaml.safe_load(TEXT)["services"])  # type: ignore[no-any-return]


SERVICES = read()
TRITONS = ["triton-gpu", "triton-cpu"]


@functools.cache
def has_compose() -> bool:
    return bool(shutil.which(COMPOSE[0])) and subprocess.run([*COMPOSE, "version"], capture_output=True).returncode == 0


needs_compose = pytest.mark.skipif(not has_compose(), reason="Compose is missing: apt install docker-compose")
needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is missing: apt install nginx-light")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing: apt install curl")


# --- what the file says ---


def compose_config(env_file: Path, *profiles: str) -> subprocess.CompletedProcess[str]:
    chosen = [f"--profile={profile}" for profile in profiles]
    command = [*COMPOSE, "--project-directory", str(ROOT), "--env-file", str(env_file), *chosen, "config"]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)


@needs_compose
@pytest.mark.parametrize("profile", PROFILES)
def test_compose_takes_each_profile(profile: str, tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    config = compose_config(tmp_path / "env", profile)
    assert (config.returncode, config.stderr) == (0, "")


@needs_compose
def test_manual_gives_the_defaults_and_compose_reads_as_these_tests_do(tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    bare, manual = (compose_config(path, *PROFILES) for path in (tmp_path / "env", ROOT / ".env.example"))
    assert (bare.returncode, bare.stderr) == (0, "")
    assert manual.stdout == bare.stdout
    services = yaml.safe_load(bare.stdout)["services"]
    assert services.keys() == SERVICES.keys()
    for name, service in services.items():
        for part in "environment", "entrypoint", "command", "image", "mem_limit":
            seen = json.loads(json.dumps(service.get(part)).replace("$$", "$"))
            assert seen == SERVICES[name].get(part), (name, part)


def test_env_example_is_the_manual() -> None:
    lines = dict(re.findall(r"^([A-Z_]+)=(.*)$", MANUAL, re.MULTILINE))
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT.replace("$${", "")))
    assert lines.keys() - {"COMPOSE_PROFILES"} == used.keys()
    assert re.findall(r"\$\{\w+\}|\$\w", TEXT.partition("services:")[2].replace("$$", "")) == []
    for name, default in lines.items():
        assert name == "COMPOSE_PROFILES" or default in ("", used[name])
    # An explanation above each, or above the lines that it stands with.
    blocks = re.split(r"\n\n+", MANUAL)
    assert all(block.startswith("#") for block in blocks)
    assert set(lines) == set(re.findall(r"^(\w+)=", "\n".join(block for block in blocks if " " in block), re.MULTILINE))


def test_profiles() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items()} == {
        "export": ["export"],
        "triton-gpu": ["gpu"],
        "triton-cpu": ["cpu"],
        "gateway-gpu": ["gpu"],
        "gateway-cpu": ["cpu"],
        "counter": ["gpu", "cpu"],
        "prometheus": ["monitoring"],
        "blackbox": ["monitoring"],
        "grafana": ["monitoring"],
        "locust": ["load"],
    }


def test_images_are_pinned() -> None:
    built = {"export": "export/Dockerfile", "locust": "loadtest/Dockerfile"}
    for name, service in SERVICES.items():
        if name in built:
            assert service["build"]["dockerfile"] == built[name]
            assert "latest" not in service["image"]
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", service["image"]), name
    tag = SERVICES["triton-cpu"]["image"].rpartition(":")[2]
    assert tag in (ROOT / "server/Dockerfile").read_text()
    bases = [re.findall(r"^FROM (.*)", (ROOT / path).read_text(), re.MULTILINE) for path in built.values()]
    assert bases == [[SERVICES["counter"]["image"]]] * 2


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert service["restart"] == ("no" if name == "export" else "unless-stopped")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
    assert {"pid", "ipc", "network_mode", "devices"} & service.keys() == set()


def test_triton_is_reached_through_the_gateway_alone() -> None:
    networks = yaml.safe_load(TEXT)["networks"]
    for name in TRITONS:
        assert "ports" not in SERVICES[name] and SERVICES[name]["networks"] == {"inside": {"aliases": ["triton"]}}
    assert networks["inside"] == {"internal": True}
    ports = {port for name in ("gateway-gpu", "gateway-cpu") for port in SERVICES[name]["ports"]}
    assert ports == {"127.0.0.1:8000:8000", "127.0.0.1:8001:8001"}
    assert read(ADDRESS="10.0.0.5")["gateway-cpu"]["ports"][0] == "10.0.0.5:8000:8000"


def test_mounts() -> None:
    writable = {("export", "/models"), ("export", "/downloads"), ("prometheus", "/prometheus")}
    writable |= {("grafana", "/var/lib/grafana"), ("counter", "/run/requests")}
    writable |= {(name, "/run/requests") for name in ("gateway-gpu", "gateway-cpu")}
    for name, service in SERVICES.items():
        for place in service["tmpfs"]:  # a restarted container has it as root's alone unless told otherwise
            assert re.fullmatch(r"/tmp:mode=1777|\S+:uid=\d+,gid=\d+,mode=0700", place)
        for mount in service.get("volumes", []):
            source, target, *mode = mount.split(":")
            assert (mode == ["ro"]) == ((name, target) not in writable), mount
            if source[0] in "./":
                assert (ROOT / source).exists(), mount
            else:
                assert source in yaml.safe_load(TEXT)["volumes"]
    here = "./model_repository:/models"
    assert here in SERVICES["export"]["volumes"] and all(f"{here}:ro" in SERVICES[name]["volumes"] for name in TRITONS)


def test_health_and_order() -> None:
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"export"}
    waits = {name: service["depends_on"] for name, service in SERVICES.items() if "depends_on" in service}
    healthy = {"condition": "service_healthy"}
    assert waits == {
        "gateway-gpu": {"triton-gpu": healthy},
        "gateway-cpu": {"triton-cpu": healthy},
        "grafana": {"prometheus": healthy},
    }
    for name in TRITONS:
        timeout = re.search(r"--exit-timeout-secs=(\d+)", script(SERVICES[name]))
        assert timeout and int(SERVICES[name]["stop_grace_period"][:-1]) > int(timeout[1])
        assert int(SERVICES[name]["healthcheck"]["start_period"][:-1]) >= 60
    timeout = re.search(r"worker_shutdown_timeout (\d+)s;", (ROOT / "server/nginx.conf.template").read_text())
    for name in "gateway-gpu", "gateway-cpu":
        assert timeout and int(SERVICES[name]["stop_grace_period"][:-1]) > int(timeout[1])


def test_gpus() -> None:
    reserved = SERVICES["triton-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["triton-gpu"]
    assert read(GPUS="0,2")["triton-gpu"]["environment"]["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert SERVICES["triton-gpu"]["environment"]["NVIDIA_TF32_OVERRIDE"] == "0"
    for precision in "gpu", "gpu_fp16":
        assert re.search(rf"\b{precision}:", MANUAL)
        config = read(PRECISION=precision)["triton-gpu"]["environment"]["CONFIG"]
        assert len(list(ROOT.glob(f"model_repository/*/configs/{config}.pbtxt"))) == 2


# --- Triton's command ---

CHECK = {"/check": str(ROOT / "export")}  # where the mount puts seal.py


def script(service: Service) -> str:
    assert service["entrypoint"] == ["/bin/sh", "-euc"]
    return str(service["command"][0])


def started(service: Service) -> list[str]:
    """The command that a container starts."""
    return [*service.get("entrypoint", []), *service["command"]]


def environment(service: Service, path: Path | None = None) -> dict[str, str]:
    """The container's, with `path` first on PATH."""
    folders = [*([str(path)] if path else []), "/usr/sbin", os.environ["PATH"]]
    return {"PATH": os.pathsep.join(folders)} | service.get("environment", {})


@pytest.fixture
def told(tmp_path: Path) -> Callable[[Service], list[str]]:
    """What a service's command tells tritonserver; an empty list where it refuses to start it."""
    binary = tmp_path / "bin/tritonserver"
    binary.parent.mkdir()
    binary.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    binary.chmod(0o755)

    def tell(service: Service) -> list[str]:
        service = replace(service, CHECK)
        run = subprocess.run(started(service), env=environment(service, binary.parent), capture_output=True, text=True)
        assert (run.returncode == 0) == bool(run.stdout) == (not run.stderr)
        assert run.stdout or re.search(r"\A(the key of .+ has|error: .+ export again).*\n\Z", run.stderr)
        return json.loads(run.stdout or "[]")  # type: ignore[no-any-return]

    return tell


def restricted(flags: list[str]) -> dict[str, set[str]]:
    """The keys of each group, which must be the same ones for both APIs."""
    keys: dict[str, dict[str, set[str]]] = {"http-restricted-api": {}, "grpc-restricted-protocol": {}}
    for flag in flags:
        name, _, value = flag[2:].partition("=")
        if name in keys:
            group, _, header = value.partition(":")
            assert header.startswith(f"{KEY_HEADER}=")
            keys[name].setdefault(group, set()).add(header.removeprefix(f"{KEY_HEADER}="))
    assert keys["http-restricted-api"] == keys["grpc-restricted-protocol"]
    return keys["http-restricted-api"]


def others(flags: list[str]) -> dict[str, str]:
    pairs = (flag.removeprefix("--").partition("=")[::2] for flag in flags)
    return {name: value for name, value in pairs if "restricted" not in name}


@pytest.mark.parametrize("name", TRITONS)
def test_options_are_those_of_the_server(
    name: str, told: Callable[[Service], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[list[str]] = []

    def launch(command: list[str], *_: object) -> None:
        launched.append(command[1:])
        raise OSError(0, "")

    stand_in.write(tmp_path / "repository/ecapa")
    monkeypatch.setattr(child, "start", launch)
    monkeypatch.setattr("server.triton.cuda_gpus", lambda: (["a GPU"], ""))
    monkeypatch.setattr("server.triton.package_without_cuda", lambda models: "")
    with pytest.raises(ServerError, match="cannot run"):
        TritonServer(tmp_path / "repository", device="gpu" if name == "triton-gpu" else "cpu").start()
    server, flags = others(launched[0]), told(SERVICES[name])
    elsewhere = {"model-repository", "backend-directory", "backend-config", "model-control-mode"}
    elsewhere |= {f"{api}-{what}" for api in ("http", "grpc", "metrics") for what in ("address", "port")}
    assert {key: value for key, value in server.items() if key not in elsewhere} == {
        key: value for key, value in others(flags).items() if key not in {*elsewhere, "load-model"}
    }
    assert others(flags)["model-control-mode"] == "explicit" and others(flags)["load-model"] == "ecapa"
    assert restricted(flags).keys() == restricted(launched[0]).keys() == set(ADMIN)


def test_what_administrators_need_is_closed_without_a_key(told: Callable[[Service], list[str]]) -> None:
    keys = [key for _ in range(2) for key in restricted(told(SERVICES["triton-cpu"])).values()]
    assert all(len(key) == 1 for key in keys)  # no second one that would be taken too
    first, second = keys[0].pop(), keys[-1].pop()
    assert first != second and len(first) == len(second) == 32


def test_keys(told: Callable[[Service], list[str]]) -> None:
    keys = restricted(told(read(ADMIN_KEY=KEY * 2, INFERENCE_KEY=KEY)["triton-gpu"]))
    asked = dict.fromkeys(("inference", "metadata", "model-config", "statistics"), {KEY})
    assert keys == dict.fromkeys(ADMIN, {KEY * 2}) | asked
    for bad in "x" * 15, f"{KEY} {KEY}", f"{KEY}é", f"{KEY}\n":
        assert told(read(INFERENCE_KEY=bad)["triton-cpu"]) == told(read(ADMIN_KEY=bad)["triton-cpu"]) == []


def test_models(told: Callable[[Service], list[str]]) -> None:
    flags = told(read(MODELS="ecapa ecapa_torchscript")["triton-cpu"])
    assert [flag for flag in flags if "load-model" in flag] == ["--load-model=ecapa", "--load-model=ecapa_torchscript"]


@pytest.mark.parametrize("name", ["model.onnx", "model_fp16.onnx", "model.pt"])
def test_damaged_model_is_not_served(name: str, told: Callable[[Service], list[str]], tmp_path: Path) -> None:
    stand_in.write(tmp_path / "models/ecapa", version=2)
    file = (tmp_path / "models/ecapa/2/model.onnx").rename(tmp_path / "models/ecapa/2" / name)
    if name.endswith(".pt"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a", "b")
    seal.seal(file)
    service = replace(SERVICES["triton-cpu"], {"/models": str(tmp_path / "models")})
    assert "--load-model=ecapa" in told(service)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2 - 40] ^= 1
    file.write_bytes(damaged)
    assert told(service) == []
    assert f"./export/seal.py:{next(iter(CHECK))}/seal.py:ro" in SERVICES["triton-cpu"]["volumes"]


def test_image_with_the_models_has_the_same_command(told: Callable[[Service], list[str]]) -> None:
    text = (ROOT / "server/Dockerfile").read_text()
    command = text.partition("\nCMD ")[2].replace("\\\n", "")
    variables = dict(pair.split("=") for pair in re.findall(r"^ENV (.*)", text, re.MULTILINE)[0].split())
    assert "\nENTRYPOINT []\n" in text
    baked = {"command": ["/bin/sh", "-c", command], "environment": variables}
    assert others(told(baked)) == others(told(SERVICES["triton-gpu"]))
    for keys in {}, {"ADMIN_KEY": KEY}, {"INFERENCE_KEY": KEY}, {"ADMIN_KEY": "short"}:
        mine = restricted(told({**baked, "environment": variables | keys}))
        theirs = restricted(told(read(**keys)["triton-gpu"]))
        assert mine.keys() == theirs.keys()
        assert all(mine[group] == theirs[group] for group in mine if KEY in theirs[group])
    assert (
        re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])", text, re.MULTILINE)[1]
        == json.dumps(  # type: ignore[index]
            ["CMD", *SERVICES["triton-gpu"]["healthcheck"]["test"][1:]][1:]
        )
    )
    user = re.search(r"^USER (.*)", text, re.MULTILINE)
    assert user and user[1] == SERVICES["triton-gpu"]["user"]


# --- Triton and its gateway, running ---


def replace(node: Any, places: Mapping[str, str]) -> Any:
    """With what is elsewhere here than in the containers."""
    if isinstance(node, dict):
        return {key: replace(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [replace(value, places) for value in node]
    pattern = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
    return re.sub(pattern, lambda found: places[found[0]], node) if isinstance(node, str) else node


def healthy(service: Service) -> bool:
    kind, *command = service["healthcheck"]["test"]
    command = ["/bin/sh", "-c", *command] if kind == "CMD-SHELL" else command
    return subprocess.run(command, env=environment(service), capture_output=True, timeout=30).returncode == 0


class Running:
    """A service's command in the background, until the end of the `with` block."""

    def __init__(self, service: Service, variables: dict[str, str], log: Path) -> None:
        self.service, self.log = service, log
        command = started(service)
        command[0] = shutil.which(command[0], path=variables["PATH"]) or command[0]
        with log.open("wb") as file:
            self.process = child.start(command, file, variables)

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 60
        while not healthy(self.service):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(40)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()


@contextmanager
def triton(service: Service, repository: Path, ports: Mapping[str, int]) -> Iterator[Running]:
    """Triton by its service's command, on loopback ports; the health check is the service's own."""
    with tempfile.TemporaryDirectory(prefix="compose-test-") as name:
        folder = Path(name)
        places = CHECK | {"/models": str(repository), "127.0.0.1:8000": f"127.0.0.1:{ports['http']}"}
        places |= {f"-{api}-port={usual}": f"-{api}-port={ports[api]}" for api, usual in USUAL_PORTS.items()}
        service = replace(service, places)
        variables = environment(service, folder / "bin")
        options = [f"--{api}-address=127.0.0.1" for api in USUAL_PORTS]
        binary = find_installed()
        if binary is None:
            binary, backends = assemble_wheel(folder, variables)
            variables["PATH"] = os.pathsep.join([str(folder / "bin"), variables["PATH"]])
            options += [
                f"--backend-directory={backends}",
                f"--backend-config=python,shm-region-prefix-name={folder.name}-",
            ]
        wrapper = folder / "bin/tritonserver"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {binary} "$@" {" ".join(options)}\n')
        wrapper.chmod(0o755)
        running = Running(service, variables, folder / "log")
        try:
            running.wait_until_healthy()
            yield running
        finally:
            running.stop()
            for segment in Path("/dev/shm").glob(f"{folder.name}-*"):
                segment.unlink(missing_ok=True)


USUAL_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
APIS = [*USUAL_PORTS, "gateway http", "gateway grpc", "health", "counter"]


def free_ports() -> dict[str, int]:
    return {api: port for api, (_, port) in choose_ports(dict.fromkeys(APIS, ("127.0.0.1", 0))).items()}


@contextmanager
def nginx(service: Service, folder: Path, ports: Mapping[str, int], tls: Path | None = None) -> Iterator[Running]:
    """The gateway by its service's command, behind what its image's entry point does first."""
    output = folder / "run"
    output.mkdir()
    places = {
        "/run/gateway": str(output),
        "0.0.0.0:8000": f"127.0.0.1:{ports['gateway http']}",
        "0.0.0.0:8001": f"127.0.0.1:{ports['gateway grpc']}",
        "127.0.0.1:8080": f"127.0.0.1:{ports['health']}",
        "triton:8000": f"127.0.0.1:{ports['http']}",
        "triton:8001": f"127.0.0.1:{ports['grpc']}",
        "/run/requests": str(folder),
        "/etc/nginx/tls": str(tls),
        # As in the image, where nobody is root.
        "/docker-entrypoint.sh nginx -c": f"{gateway.find()} -g 'user {getpass.getuser()};' -c",
    }
    mounts = [mount.split(":")[:2] for mount in service["volumes"]]
    service = replace(service, places)
    variables = environment(service)
    for source, target in mounts:
        name = re.fullmatch(r"/etc/nginx/templates/(.+)\.template", target)
        if name:
            text = entry_point((ROOT / source).read_text(), variables)
            (Path(variables["NGINX_ENVSUBST_OUTPUT_DIR"]) / name[1]).write_text(text)
    running = Running(service, variables, folder / "nginx.log")
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def counter(folder: Path, port: int) -> Iterator[Running]:
    """What counts the gateway's requests, by its service's command."""
    (script, _), (_, target) = (mount.split(":")[:2] for mount in SERVICES["counter"]["volumes"])
    places = {"0.0.0.0": "127.0.0.1", ":9514": f":{port}", f"/{Path(script).name}": str(ROOT / script)}
    service = replace(SERVICES["counter"], places | {target: str(folder)})
    service["command"].append(f"--port={port}")
    running = Running(service, environment(service), folder / "counter.log")
    try:
        running.wait_until_healthy()
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize("name", ["gateway-gpu", "gateway-cpu"])
@pytest.mark.parametrize("ssl, verify", [("", "on"), ("yes", "off"), ("ssl", "yes")])
def test_certificates_are_not_asked_for_in_the_clear(name: str, ssl: str, verify: str) -> None:
    service = read(SSL=ssl, VERIFY_CLIENT=verify)[name]
    run = subprocess.run(started(service), env=environment(service), capture_output=True, text=True)
    assert run.returncode == 1 and "expected SSL= or ssl, and on only with ssl" in run.stderr


@needs_curl
@pytest.mark.parametrize("name", TRITONS)
def test_tritonserver_takes_the_options(name: str, tmp_path: Path) -> None:
    stand_in.write(tmp_path / "ecapa")
    seal.seal(tmp_path / "ecapa/1/model.onnx")
    (tmp_path / "not_exported").mkdir()
    (tmp_path / "not_exported/config.pbtxt").write_text('name: "not_exported"\nbackend: "onnxruntime"\n')
    ports = free_ports()
    with triton(read(INFERENCE_KEY=KEY, ADMIN_KEY=KEY * 2)[name], tmp_path, ports) as running:
        wait_until_reached(ports["metrics"])  # which Triton opens last
        assert status(ports["metrics"], "GET", "/metrics") == 200
        # Without a key, with the other's key, with its own.
        for method, path, key, other in (
            ("GET", "/v2/models/ecapa/config", KEY, KEY * 2),
            ("POST", "/v2/repository/index", KEY * 2, KEY),
        ):
            found = [status(ports["http"], method, path, {KEY_HEADER: sent}) for sent in ("", other, key)]
            assert found == [403, 403, 200]
        assert healthy(running.service)
    assert not healthy(running.service)


def wait_until_reached(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def status(port: int, method: str, path: str, headers: Mapping[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, "{}" if method == "POST" else None, dict(headers or {}))
        return connection.getresponse().status
    finally:
        connection.close()


def get(port: int, path: str) -> str:
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as reply:
        return str(reply.read().decode())


@needs_nginx
@needs_curl
def test_through_the_gateway(repository: Path, tmp_path: Path) -> None:
    ports = free_ports()
    services = read(MAX_REQUEST_MB="1")
    with ExitStack() as stack:
        counting = stack.enter_context(counter(tmp_path, ports["counter"]))
        before = stack.enter_context(triton(services["triton-cpu"], repository, ports))
        front = stack.enter_context(nginx(services["gateway-cpu"], tmp_path, ports))
        front.wait_until_healthy()
        with SpeakerClient(f"127.0.0.1:{ports['gateway grpc']}") as client:
            assert client.verify(CLIP, ROOT / "samples/anna_2.flac").same
        answered = 'gateway_requests_total{api="grpc",result="ok"} 2'
        until = time.monotonic() + 20
        while answered not in get(ports["counter"], "/metrics"):
            assert time.monotonic() < until
            time.sleep(0.1)
        counting.stop()
        assert not healthy(counting.service)
        assert status(ports["gateway http"], "GET", "/v2/health/ready") == 200  # also without what counts
        assert status(ports["gateway http"], "POST", "/v2/repository/models/ecapa/unload") == 403
        filled_in = (tmp_path / "run/nginx.conf").read_text()
        assert "client_max_body_size 1m;" in filled_in and not re.search(r"\$\{\w+\}", filled_in)

        # Healthy means every model, and a Triton that answers.
        assert not healthy(front.service | {"environment": front.service["environment"] | {"MODELS": "ecapa missing"}})
        before.stop()
        assert not healthy(front.service)

        # One that comes back elsewhere is found: a line of nginx's configuration stands in for its name's new address.
        elsewhere = free_ports()
        for api in "http", "grpc":
            filled_in = filled_in.replace(f"server 127.0.0.1:{ports[api]};", f"server 127.0.0.1:{elsewhere[api]};")
        (tmp_path / "run/nginx.conf").write_text(filled_in)
        stack.enter_context(triton(services["triton-cpu"], repository, elsewhere))
        front.wait_until_healthy()
        with SpeakerClient(f"127.0.0.1:{ports['gateway grpc']}") as client:
            client.embed(CLIP)


@needs_nginx
@needs_curl
def test_with_certificates_and_a_key(repository: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    tls = tmp_path / "tls"
    tls.mkdir()
    for names, certificate in {
        ("cert", "key"): authority.issue_cert("127.0.0.1"),
        ("client", "client-key"): authority.issue_cert("client@example.org"),
    }.items():
        certificate.cert_chain_pems[0].write_to_path(tls / f"{names[0]}.pem")
        certificate.private_key_pem.write_to_path(tls / f"{names[1]}.pem")
    authority.cert_pem.write_to_path(tls / "clients.pem")
    ports = free_ports()
    services = read(SSL="ssl", TLS_FOLDER=str(tls), VERIFY_CLIENT="on", INFERENCE_KEY=KEY)
    assert f"{tls}:/etc/nginx/tls:ro" in services["gateway-cpu"]["volumes"]
    url = f"grpcs://127.0.0.1:{ports['gateway grpc']}"
    known = Tls(str(tls / "clients.pem"), str(tls / "client.pem"), str(tls / "client-key.pem"))
    with (
        triton(services["triton-cpu"], repository, ports),
        nginx(services["gateway-cpu"], tmp_path, ports, tls) as front,
    ):
        front.wait_until_healthy()
        with SpeakerClient(url, tls=known, api_key=KEY) as client:
            client.embed(CLIP)
        with SpeakerClient(url, tls=known) as client, pytest.raises(KeyRefusedError):
            client.embed(CLIP)
        assert status(ports["gateway http"], "GET", "/v2/health/ready") == 400  # nginx: plain HTTP at a port for HTTPS
        url = f"https://127.0.0.1:{ports['gateway http']}/v2/health/ready"
        strangers = subprocess.run(["curl", "-skw", "%{http_code}", "-o", "/dev/null", url], stdout=subprocess.PIPE)
        assert strangers.stdout == b"403"  # for want of a certificate: what is healthy asks for no key


@needs_nginx
@pytest.mark.parametrize("ssl", ["ssl", "on"])
def test_gateway_that_cannot_encrypt_does_not_start(ssl: str, tmp_path: Path) -> None:
    with nginx(read(SSL=ssl)["gateway-cpu"], tmp_path, free_ports(), tmp_path / "nothing") as front:
        assert front.process.wait(20) != 0


def test_grafana_needs_a_password(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho runs\n")
    (tmp_path / "run.sh").chmod(0o755)

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        service = replace(read(**variables)["grafana"], {"/run.sh": str(tmp_path / "run.sh")})
        return subprocess.run(started(service), env=environment(service), capture_output=True, text=True)

    assert run(GRAFANA_PASSWORD="a password").stdout == "runs\n"
    refused = run()
    assert refused.stdout == "" and "set GRAFANA_PASSWORD in .env" in refused.stderr and refused.returncode != 0


# --- images ---


def shut_out(path: str) -> bool:
    """By .dockerignore, whose last pattern that matches the path or a folder above it holds."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{pattern}(/.*)?", path):
                result = not line.startswith("!")
    return result


@functools.cache
def context() -> list[str]:
    """The files that an image is built from in the checkout's root, build folders of the checkout apart."""
    tracked = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [
        str(path) for path in tracked if path.parts[0] not in (".git", ".venv", "build") and not shut_out(str(path))
    ]


def copies(dockerfile: str) -> list[tuple[str, str]]:
    """What it copies, and where to."""
    found = []
    for line in re.findall(r"^COPY (?:--\S+ )*(.*)", (ROOT / dockerfile).read_text(), re.MULTILINE):
        *sources, target = line.split()
        found += [(source, target) for source in sources]
    return found


def build(dockerfile: str, folder: Path) -> None:
    """Does the image's copying into its working folder."""
    for source, target in copies(dockerfile):
        files = [file for file in context() if file == source or file.startswith(f"{source}/")]
        assert files, f"{dockerfile} copies {source}, which .dockerignore shuts out or which is not there"
        for file in files:
            end = folder / (target if target != "./" else "") / os.path.relpath(file, source if file != source else "")
            end.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, end)


def python(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True, timeout=200
    )


def test_contexts_are_small() -> None:
    assert sum((ROOT / file).stat().st_size for file in context()) < 5e6
    assert not any(
        word in file for file in context() for word in ("__pycache__", "results/", ".env", "model_repository")
    )
    # That of server/Dockerfile is the model repository, of which it takes everything.
    assert copies("server/Dockerfile") == [(".", "/models")]
    assert "server/Dockerfile -t ecapa-triton:1 model_repository" in (ROOT / "server/Dockerfile").read_text()


def test_export_runs_on_what_its_image_has(tmp_path: Path) -> None:
    build("export/Dockerfile", tmp_path)
    repository = shutil.copytree(
        ROOT / "model_repository", tmp_path / "models", ignore=shutil.ignore_patterns("model*.onnx", "model*.pt")
    )
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)", (ROOT / "export/Dockerfile").read_text(), re.MULTILINE)[0])
    command = replace(
        entry + read(SOURCE="mini", FORMAT="torchscript", MAX_SECONDS="2")["export"]["command"],
        {"/models": str(repository)},
    )
    assert command.pop(0) == "python"
    run = python(tmp_path, *command, "--no-fp16")
    assert run.returncode == 0, run.stderr
    assert re.search(r"samples/ +[1-9]\d* clips", run.stdout)  # which it was verified on
    assert (tmp_path / "models/ecapa_torchscript/1/model.pt").exists()


@needs_curl
def test_locust_runs_on_what_its_image_has(repository: Path, tmp_path: Path) -> None:
    build("loadtest/Dockerfile", tmp_path)
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)", (ROOT / "loadtest/Dockerfile").read_text(), re.MULTILINE)[0])
    ports = free_ports()
    command = replace(SERVICES["locust"]["command"], {"gateway:8001": f"127.0.0.1:{ports['grpc']}"})
    with triton(SERVICES["triton-cpu"], repository, ports):
        run = python(tmp_path, "-m", *entry, *command, "--headless", "--run-time=2s", "--json", "--scenario=single")
    assert run.returncode == 0, run.stderr
    sent = json.loads(run.stdout)
    assert sum(line["num_requests"] for line in sent) > 0 == sum(line["num_failures"] for line in sent)


@functools.cache
def has_index() -> bool:
    line = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    return subprocess.run([*line, "--retries=0", "--timeout=5", "cycler"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("dockerfile", ["export/Dockerfile", "loadtest/Dockerfile"])
def test_what_is_installed_can_be(dockerfile: str, tmp_path: Path) -> None:
    if not has_index():
        pytest.skip("no package index can be reached: connect, or set PIP_INDEX_URL")
    build(dockerfile, tmp_path)
    (line,) = re.findall(r"^RUN (pip install .*)", (ROOT / dockerfile).read_text(), re.MULTILINE)
    options = line.replace("'", "").split()[2:]
    run = python(tmp_path, "-m", "pip", "install", "--dry-run", "--ignore-installed", *options)
    assert run.returncode == 0, run.stderr
    assert "Would install" in run.stdout
