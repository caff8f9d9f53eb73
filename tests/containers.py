"""Runs the commands of containers as processes of this machine, with other paths and ports and the wheel's Triton."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import ROOT
from launcher import http_status, wait_until

from server import gateway
from server.preflight import choose_ports

needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is missing: apt install nginx-light")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing: apt install curl")


def free_ports(names: Iterable[str]) -> dict[str, int]:
    return {name: port for name, (_, port) in choose_ports(dict.fromkeys(names, ("127.0.0.1", 0))).items()}


def change(node: Any, text: Callable[[str], str]) -> Any:
    """A part of a YAML file with each of its strings changed."""
    if isinstance(node, dict):
        return {key: change(value, text) for key, value in node.items()}
    if isinstance(node, list):
        return [change(value, text) for value in node]
    return text(node) if isinstance(node, str) else node


def replace(node: Any, places: Mapping[str, str]) -> Any:
    """A part of a YAML file with the places of this machine in place of those in the containers."""
    pattern = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
    return change(node, lambda text: re.sub(pattern, lambda found: places[found[0]], text))


class Process(AbstractContextManager["Process"]):
    """A container's command in the background, killed after a `with` block."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, folder: Path = ROOT) -> None:
        self.log = log
        command = [sys.executable if command[0].startswith("python") else command[0], *command[1:]]
        variables = {"PATH": f"/usr/sbin:{os.environ['PATH']}", "HOME": os.environ["HOME"], **environment}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=file, stderr=file, start_new_session=True
            )

    def wait_until(self, holds: Callable[[], bool]) -> None:
        def holds_or_ended() -> bool:
            assert self.process.poll() is None, self.text()[-2000:]
            return holds()

        wait_until(holds_or_ended, 90)

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns the exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(40)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # nginx's worker, too
            self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def status(port: int, method: str, path: str, headers: Mapping[str, str] | None = None) -> int:
    return http_status(f"127.0.0.1:{port}", method, path, b"{}" if method == "POST" else None, headers)


def write_certificates(folder: Path) -> Path:
    """Makes a folder as TLS_FOLDER, whose authority (clients.pem) signs the client's certificate too."""
    authority = trustme.CA()
    folder.mkdir()
    for name, certificate in ("cert", authority.issue_cert("127.0.0.1")), ("client", authority.issue_cert("a@b.org")):
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        certificate.private_key_pem.write_to_path(folder / ("key.pem" if name == "cert" else "client_key.pem"))
    authority.cert_pem.write_to_path(folder / "clients.pem")
    return folder


# --- images ---


def ignored(path: str) -> bool:
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
    """The files that an image is built from, without the folders that only a used checkout has."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [str(file) for file in files if file.parts[0] not in (".git", ".venv", "build") and not ignored(str(file))]


def instruction(dockerfile: str, name: str) -> list[str]:
    """The arguments of each instruction of that name."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)", text, re.MULTILINE)


def build(dockerfile: str, folder: Path) -> Path:
    """Does the image's copying; its working folder is `folder`."""
    for line in instruction(dockerfile, "COPY"):
        *sources, target = line.split()
        for source in sources:
            files = [file for file in context() if file == source or file.startswith(f"{source}/")]
            assert files, f"{dockerfile} copies {source}, which is missing or in .dockerignore"
            for file in files:
                inside = os.path.relpath(file, source) if file != source else Path(file).name
                end = folder / target.lstrip("/")
                end = end / inside if target.endswith("/") or file != source else end
                end.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, end)
    return folder
