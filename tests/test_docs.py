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
EXPORT = "python -m export --source"  # takes its time: in `make test-slow`


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each code block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The lines of a shell block, without their remarks."""
    return [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip()]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, checkout: Path, server: TritonServer) -> None:
    for language, block in blocks(page):
        if language == "python":
            code = block.replace("127.0.0.1:8001", server.grpc_url)
            done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stderr}"
        elif language == "sh":
            for command in commands(block):
                if not command.startswith(EXPORT):
                    run(command, checkout, server)
        else:
            assert language == "text"


@pytest.mark.slow
def test_exports_run(checkout: Path, server: TritonServer) -> None:
    found = {line for page in PAGES for kind, block in blocks(page) if kind == "sh" for line in commands(block)}
    for command in sorted(line for line in found if line.startswith(EXPORT)):
        run(f"{command} --no-fp16", checkout, server)  # whose files are made and tested elsewhere


def run(command: str, checkout: Path, server: TritonServer) -> None:
    if command.startswith("python -m server"):
        return serve(command, checkout)
    adapted = command.replace("http://127.0.0.1:8000", f"http://{server.http_url}")
    if command.startswith("make "):  # the targets have tests of their own: here, that they exist
        adapted = command.replace("make ", "make -n ", 1)
    elif command.startswith("python -m loadtest"):
        adapted = re.sub(r"(loadtest \w+).*", r"\1 --help", command)
    elif command.startswith("locust"):
        adapted = f"locust --headless --users 1 --run-time 5s --scenario single --host grpc://{server.grpc_url}"
    else:
        adapted = re.sub(r"(ecapa-triton \w+)\b", rf"\1 --url {server.grpc_url}", adapted)
    done = subprocess.run(adapted, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True)
    different = command == "ecapa-triton verify samples/anna_1.flac samples/berta_1.flac"
    assert done.returncode == (1 if different else 0), f"{command}\n{done.stderr}"


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
