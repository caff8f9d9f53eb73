"""The engine, base images, and the deployment of docker-compose.yml and docker-compose.monitoring.yml on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, copy_configs
from containers import write_certificates

from loadtest.clips import speech
from server.preflight import choose_ports
from tests.faults.judge import Clip, Tally, check_apart

from . import stand_ins

USER = "1000:1000" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"
FILES = "docker-compose.yml", "docker-compose.monitoring.yml"
SERVICES = ["triton", "gateway", "prometheus", "blackbox"]
PORTS = "HTTP_PORT", "GRPC_PORT", "LOCUST_PORT", "GRAFANA_PORT", "PROMETHEUS_PORT"
SECONDS = [0.04, 0.1, 0.5, 1, 1, 1, 2, 3.3, 5]  # of clips


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def engine() -> Iterator[str]:
    """A Docker engine with Compose, in words; one that is installed and does not run is run here."""
    with contextlib.ExitStack() as stack:
        if not answers("docker", "info") and os.geteuid() == 0 and shutil.which("dockerd"):
            stack.enter_context(daemon())
        missing = "" if answers("docker", "info") else "a Docker engine that answers `docker info`"
        version = output("docker", "compose", "version", "--short") if not missing else ""
        if not missing and [int(one) for one in re.findall(r"\d+", version)[:3]] < [2, 24, 4]:
            missing = f"Compose 2.24.4 or newer, `docker compose version` gives {version or 'nothing'}"
        if missing:
            pytest.exit(f"tests of containers need {missing}", 2)
        yield f"Docker {output('docker', 'info', '--format={{.ServerVersion}}')}, Compose {version}"


@contextlib.contextmanager
def daemon() -> Iterator[None]:
    """Runs dockerd; the last lines of its log are printed if it does not answer."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(["dockerd"], stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 30
            while not answers("docker", "info") and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            if not answers("docker", "info"):
                log.seek(0)
                print(*log.readlines()[-5:], sep="", file=sys.stderr)
            yield
        finally:
            process.terminate()
            process.wait(60)


def answers(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


class Deployment:
    """The project's services, under a project name of their own.

    Attributes:
        variables: Those of .env.
        ports: On this host, by variable.
    """

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._files = files
        self.name = f"ecapa-test-{os.getpid()}"
        self._env = folder / "env"
        names = choose_ports(dict.fromkeys(PORTS, ("127.0.0.1", 0)))
        self.ports = {name: port for name, (_, port) in names.items()}
        # This machine may not allow as many open files as the default.
        files = min(65536, int(output("sh", "-c", "ulimit -Hn").replace("unlimited", "65536")))
        self.variables = {
            "RUN_AS": USER,
            "SOURCE": "mini",
            "MODEL_REPOSITORY": str(folder / "model_repository"),
            "GRAFANA_PASSWORD": "for-the-tests",
            "NOFILE": str(files),
            **{name: str(port) for name, port in self.ports.items()},
        }

    def __call__(self, *arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs `docker compose` with these arguments, and with further variables."""
        self._env.write_text("".join(f"{name}={value}\n" for name, value in (self.variables | variables).items()))
        command = ["docker", "compose", "-p", self.name, f"--project-directory={ROOT}", f"--env-file={self._env}"]
        command += [f"--file={path}" for path in self._files]
        clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        run = subprocess.run(
            [*command, *arguments], env=clean, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if check and run.returncode:
            print(self("logs", "--no-color", "--tail=20", check=False).stdout)
            pytest.fail(f"docker compose {' '.join(arguments)}: {run.stdout[-3000:]}{run.stderr[-3000:]}")
        return run

    def up(self, *services: str, **variables: str) -> None:
        """Starts services with these variables and waits until all are healthy."""
        self("up", "-d", "--wait", "--quiet-pull", *(services or SERVICES), **variables)

    def inspect(self, service: str) -> Any:
        identifier = self("ps", "-a", "-q", service).stdout.strip()
        return json.loads(output("docker", "inspect", identifier))[0]

    def is_healthy(self, service: str) -> bool:
        state = self.inspect(service)["State"]
        return bool(state["Running"] and state.get("Health", {}).get("Status", "healthy") == "healthy")

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        return self("exec", "-T", service, *command, check=False)

    def logs(self, service: str) -> str:
        return self("logs", "--no-color", service).stdout

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['GRPC_PORT']}"

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports['HTTP_PORT']}"


@pytest.fixture(scope="session")
def images(engine: str, pytestconfig: pytest.Config) -> dict[str, str]:
    """How each base image came here."""
    text = "\n".join((ROOT / name).read_text() for name in FILES)
    tags = dict(re.findall(r"^([A-Z]+_TAG)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    found = [
        f"nvcr.io/nvidia/tritonserver:{tags['TRITON_TAG']}",
        f"python:{tags['PYTHON_TAG']}",
        *(f"{name}:{tags[tag]}" for name, tag in re.findall(r"image: (\S+):\$\{([A-Z]+_TAG):-", text)),
    ]
    provided = stand_ins.provide(found)
    pytestconfig.stash[SUMMARY] = [engine, *(f"{how:>9}  {image}" for image, how in provided.items())]
    return provided


SUMMARY = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := terminalreporter.config.stash.get(SUMMARY, None):
        terminalreporter.section("containers")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def folder(engine: str) -> Iterator[Path]:
    """Of the model repository and certificates, which the containers' user reads and writes."""
    path = Path(tempfile.mkdtemp(prefix="ecapa-engine-"))
    path.chmod(0o755)
    copy_configs(path)
    write_certificates(path / "tls")
    give(path)
    yield path
    shutil.rmtree(path)


def give(folder: Path) -> None:
    """Makes the containers' user the owner of everything in the folder."""
    if os.geteuid() == 0:
        for path in folder, *folder.rglob("*"):
            os.chown(path, *map(int, USER.split(":")))


@pytest.fixture(scope="session")
def deployment(images: dict[str, str], folder: Path) -> Iterator[Deployment]:
    """All images are built, the model is exported, and the services are up."""
    files = [ROOT / name for name in FILES]
    if stand_ins.of_triton(images):
        files.append(Path(__file__).parent / "stand-ins.yml")
    deployment = Deployment(folder, files)
    try:
        print("build the images ...", file=sys.stderr, flush=True)
        deployment("--profile=*", "build", "-q", *SERVICES[:2], "export", "locust")
        print("export the model ...", file=sys.stderr, flush=True)
        deployment("run", "--rm", "-T", "export")
        deployment.up()
        yield deployment
    finally:
        deployment("--profile=*", "down", "-v", "--timeout=5", check=False)


@pytest.fixture(scope="session")
def clips(reference: Callable[[np.ndarray], np.ndarray]) -> list[Clip]:
    waveforms = speech(SECONDS)
    clips = [Clip(f"clip {n} of {len(clip)} samples", clip, reference(clip)) for n, clip in enumerate(waveforms)]
    check_apart(clips)
    return clips


@pytest.fixture
def tally(clips: list[Clip]) -> Iterator[Tally]:
    """Judges every reply; a wrong one fails the test."""
    tally = Tally(clips)
    yield tally
    assert tally.wrong == []
