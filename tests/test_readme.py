"""Every block of README.md runs: Python against the server, shell lines in a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from loadtest import client
from loadtest import load_report as report
from server.triton import TritonServer

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [
    # Exports are tested by themselves, too.
    pytest.param(line, marks=[pytest.mark.slow] if line.startswith("python -m export") else [])
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.strip()
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The checkout with the exported model in it, to run commands in."""
    folder = tmp_path_factory.mktemp("checkout") / "ecapa-triton"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__", "*.onnx", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(repository / "ecapa/1/model.onnx", folder / "model_repository/ecapa/1")
    return folder


LOADS = {  # scenario, seconds, clips a request, clients
    "one client, 1 s": ("single", 1, 1, 1),
    "one client, 5 s": ("single", 5, 1, 1),
    "one client, 10 s": ("single", 10, 1, 1),
    "one client, `[8, 2 s]`": ("batch", 2, 8, 1),
    "16 clients, 1 to 20 s": ("mixed", None, 1, 16),
    "64 clients, 2 s": ("clients", 2, 1, 64),
}


def test_figures_are_those_of_the_report() -> None:
    (name,) = re.findall(r"\[report\]\((\S+-load)\.md\)", README)
    result = json.loads((ROOT / f"{name}.json").read_text())
    contenders = "ours", "one at a time", "padded batches", "in process"
    keys = "scenario", "seconds", "batch", "users", "contender"
    rows = {tuple(row[key] for key in keys): row for row in result["rows"]}
    lines = [re.sub(" *\\| *", "|", line) for line in README.splitlines()]
    for load, level in LOADS.items():
        of = [rows.get((*level, contender)) for contender in contenders]
        speeds = [f"{row['audio_per_s']:.1f}" if row else "" for row in of]
        latencies = ", ".join(f"{row['p95_ms']:,.0f}" for row in of[:3] if row)
        assert f"|{'|'.join([load, *speeds, latencies])}|" in lines

    def ratio(load: str, base: str) -> float:
        found = report.ratio(rows[(*LOADS[load], "ours")], rows[(*LOADS[load], base)])
        assert found is not None
        return found

    text = " ".join(README.split())
    one, many = "one client, 5 s", "16 clients, 1 to 20 s"
    assert f"clips of 5 s ({ratio(one, 'one at a time'):.2f})" in text
    assert f"with 16 clients ({ratio(many, 'one at a time'):.2f})" in text
    assert f"three times its padded batches ({ratio(many, 'padded batches'):.1f})" in text
    assert f"({ratio(one, 'in process'):.2f} and {ratio(many, 'in process'):.2f})" in text
    assert f"ours is {ratio('one client, 10 s', 'one at a time'):.1f} times as fast" in text
    assert f"and {ratio('one client, 10 s', 'in process'):.2f} of the speed in process" in text
    requests, wrong = (sum(row[what] for row in result["rows"]) for what in ("requests", "wrong"))
    assert wrong == 0 and f"none of {requests:,} replies wrong" in README


def test_figures_of_the_client_are_those_of_its_report() -> None:
    (name,) = re.findall(r"\[report\]\((\S+-client)\.md\)", README)
    page = (ROOT / f"{name}.md").read_text()
    assert page == client.markdown(json.loads((ROOT / f"{name}.json").read_text()))
    text = " ".join(README.split())

    def found(pattern: str) -> list[str]:
        (one,) = re.findall(pattern, page)
        return [one] if isinstance(one, str) else list(one)

    (compared,) = found(r"([\d,]+) replies compared with SpeechBrain, none wrong")
    assert f"{compared} replies compared, none wrong" in text
    cpu, ratio, least, most = found(r"start of Python included .* ([\d.]+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|")
    assert f"reaches {ratio} of the throughput" in text and f"({least} to {most} in three rounds)" in text
    assert f"the client's own {float(cpu):.0f} ms a clip" in text
    assert f"would save {found('transport alone, saves .*, ([0-9.]+) ')[0]} % of a request" in text
    assert f"int16 on the wire {found('save at most .*, ([0-9.]+) ')[0]} % at most" in text
    assert found("with the model, saves (-?)") == ["-"] and "shared memory was slower" in text


def environment() -> dict[str, str]:
    return dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_there_is_something_to_run() -> None:
    assert {language for language, _ in BLOCKS} <= {"python", "sh", "text"}
    assert len(LINES) > 5
    assert README.index("make demo") < README.index("make test") < 2000


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_block(code: str, checkout: Path, server: TritonServer) -> None:
    code = code.replace("127.0.0.1:8001", server.grpc_url)
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("line", LINES)
def test_shell_line(line: str, checkout: Path, server: TritonServer) -> None:
    command = line.partition("  #")[0].strip()
    if command.startswith("make "):
        # What the targets do is tested by itself; here, that they exist.
        command = command.replace("make ", "make -n ", 1)
    elif command.startswith("python -m server"):
        return serve(command, checkout)
    elif command.startswith("python -m loadtest"):
        command = re.sub(r"(loadtest \w+).*", r"\1 --help", command)
    elif command.startswith("locust"):
        command = f"locust --headless --users 1 --run-time 5s --scenario single --host grpc://{server.grpc_url}"
    elif command.startswith("python -m export --source"):
        command += " --no-fp16"  # whose files are made and tested elsewhere
    elif command.startswith("ecapa-triton"):
        command = re.sub(r"^(ecapa-triton \w+)", rf"\1 --url {server.grpc_url}", command)
    run = subprocess.run(
        command, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == (1 if "anna_1.flac samples/berta" in command else 0), run.stderr


def serve(command: str, checkout: Path) -> None:
    """Start the server as the README says, on free ports, and stop it again."""
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
