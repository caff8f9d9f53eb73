"""The code blocks of README.md and docs/ run: Python and shell lines, in a copy of the checkout, against a server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from server import TritonServer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, language, block)
    for page in PAGES
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]
# Exports have tests of their own, too.
LINES = [
    pytest.param(line, marks=[pytest.mark.slow] if line.startswith("python -m export") else [], id=f"{page}: {line}")
    for page, line in dict.fromkeys(
        (page, line.partition("  #")[0].strip())
        for page, language, block in BLOCKS
        if language == "sh"
        for line in block.splitlines()
        if line.strip()
    )
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The checkout with the exported model in it, to run commands in."""
    folder = tmp_path_factory.mktemp("checkout") / "ecapa-triton"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__", "*.onnx", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(repository / "ecapa/1/model.onnx", folder / "model_repository/ecapa/1")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "code", [pytest.param(block, id=page) for page, language, block in BLOCKS if language == "python"]
)
def test_python_block(code: str, checkout: Path, server: TritonServer) -> None:
    code = code.replace("127.0.0.1:8001", server.grpc_url)
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", LINES)
def test_shell_line(command: str, checkout: Path, server: TritonServer) -> None:
    if command.startswith("python -m server"):
        return serve(command, checkout)
    if command.startswith("make "):  # the targets have tests of their own: here, that they exist
        command = command.replace("make ", "make -n ", 1)
    elif command.startswith("python -m loadtest"):
        command = re.sub(r"(loadtest \w+).*", r"\1 --help", command)
    elif command.startswith("locust"):
        command = f"locust --headless --users 1 --run-time 5s --scenario single --host grpc://{server.grpc_url}"
    elif command.startswith("python -m export --source"):
        command += " --no-fp16"  # whose files are made and tested elsewhere
    elif command.startswith("ecapa-triton"):
        command = re.sub(r"^(ecapa-triton \w+)", rf"\1 --url {server.grpc_url}", command)
    command = command.replace("http://127.0.0.1:8000", f"http://{server.http_url}")
    run = subprocess.run(
        command, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True, timeout=300
    )
    different = "verify samples/anna_1.flac samples/berta" in command.replace(f" --url {server.grpc_url}", "")
    assert run.returncode == (1 if different else 0), run.stderr


def environment() -> dict[str, str]:
    return dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def serve(command: str, checkout: Path) -> None:
    """Start the server as the page does, on free ports, and stop it again."""
    own, dashes, extra = command.partition(" -- ")
    command = f"exec {own} --http-port 0 --grpc-port 0 --metrics-port 0{dashes}{extra}"
    process = subprocess.Popen(
        command, shell=True, cwd=checkout, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.startswith("ready in"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
