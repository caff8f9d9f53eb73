"""Runs the commands of containers as processes of this machine, with other paths and ports and the wheel's Triton."""

from __future__ import annotations

import functools
import getpass
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from server import gateway
from server.preflight import choose_ports

needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is missing: apt install nginx-light")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing: apt install curl")


def free_ports(names: Iterable[str]) -> dict[str, int]:
    return {name: port for name, (_, port) in choose_ports(dict.fromkeys(names, ("127.0.0.1", 0))).items()}


def replace(node: Any, places: Mapping[str, str]) -> Any:
    """A part of a YAML file with the places of this machine in place of those in the containers."""
    if isinstance(node, dict):
        return {key: replace(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [replace(value, places) for value in node]
    pattern = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
    return re.sub(pattern, lambda found: places[found[0]], node) if isinstance(node, str) else node


class Process:
    """A container's command in the background."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, folder: Path = ROOT) -> None:
        self.log = log
        command = [sys.executable if command[0].startswith("python") else command[0], *command[1:]]
        variables = {"PATH": f"/usr/sbin:{os.environ['PATH']}", "HOME": os.environ["HOME"], **environment}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=file, stderr=file, start_new_session=True
            )

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns the exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(40)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)  # nginx's worker, too
            except ProcessLookupError:
                pass
            self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def nginx(configuration: Path) -> list[str]:
    """nginx's command; in the image its user is not root."""
    return [gateway.find() or "nginx", "-c", str(configuration), "-g", f"user {getpass.getuser()};"]


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def status(port: int, method: str, path: str, headers: Mapping[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, "{}" if method == "POST" else None, dict(headers or {}))
        return connection.getresponse().status
    finally:
        connection.close()


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
