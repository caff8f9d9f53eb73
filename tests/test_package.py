"""The installed client: alone, typed, quick to import, and documented."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ecapa_triton
import pytest
from conftest import ROOT

# Needed neither to import the client nor to send an array at 16 kHz.
UNUSED = (
    "soundfile soxr rich pyarrow sklearn scipy matplotlib pandas ray torch onnxruntime sqlite3 argparse urllib.request "
    "tritonclient.http ecapa_triton._cli"
).split()

USER = """
from ecapa_triton import AsyncSpeakerClient, EcapaError, SpeakerClient, Utterance, score

def near(url: str, paths: list[str]) -> list[float]:
    with SpeakerClient(url, timeout=5.0, max_in_flight=16) as client:
        first = client.embed(paths[0])
        outcomes: list[Utterance | EcapaError] = list(client.utterances(paths))
        same: bool = client.verify(paths[0], paths[1]).same
        return [score(first, one.embedding) for one in outcomes if same and isinstance(one, Utterance)]

async def seconds(url: str, path: bytes) -> float:
    async with AsyncSpeakerClient(url) as client:
        return (await client.utterance(path)).seconds
"""
WRONG = {
    'SpeakerClient().embed({"path": "anna.flac"})': "arg-type",
    'SpeakerClient().embed("anna.flac", long="cut")': "arg-type",
    "SpeakerClient().embed_many(['anna.flac']).embedding": "attr-defined",
    "x: str = SpeakerClient().verify('a.flac', 'b.flac').score": "assignment",
    "y: float = AsyncSpeakerClient().embed('a.flac')": "assignment",
}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = () if command[0] == sys.executable else ("PYTHONPATH", "PYTHONHOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def loaded(code: str, python: Path | str, cwd: Path) -> set[str]:
    done = run(python, "-X", "importtime", "-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_import_loads_only_what_it_needs(tmp_path: Path) -> None:
    modules = loaded("import ecapa_triton", sys.executable, tmp_path)
    assert "ecapa_triton" in modules
    assert not modules & set(UNUSED)


# --- in an empty environment ---


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the package and its dependencies, and nothing else."""
    index = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries=0", "--timeout=5", "cycler"]
    if subprocess.run([*index, "--dest", tmp_path_factory.mktemp("index")], capture_output=True).returncode != 0:
        pytest.skip("no package index can be reached: connect, or set PIP_INDEX_URL")
    folder = tmp_path_factory.mktemp("empty")
    for name in "pyproject.toml", "README.md", "LICENSE", "constraints.txt":
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "client", folder / "client", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    python = folder / "env/bin/python"
    for command in (
        [sys.executable, "-m", "venv", folder / "env"],
        [python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "."],
    ):
        done = run(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_little_is_installed(installed: Path) -> None:
    listed = run(installed, "-m", "pip", "list", "--format=json", cwd=installed.parent)
    names = {package["name"].lower().replace("_", "-") for package in json.loads(listed.stdout)}
    names -= {"pip", "setuptools", "wheel"}
    direct = {"ecapa-triton", "tritonclient", "numpy", "soundfile", "soxr"}
    grpc = {"grpcio", "protobuf", "python-rapidjson", "urllib3", "typing-extensions", "packaging", "ml-dtypes"}
    assert direct <= names <= direct | grpc | {"cffi", "pycparser"}
    (package,) = (installed.parents[1] / "lib").glob("python3*/site-packages/ecapa_triton")
    assert (package / "py.typed").is_file()
    assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < 1e6
    assert run(installed, "-m", "pip", "check", cwd=installed.parent).returncode == 0


@pytest.mark.slow
def test_it_works_alone(installed: Path, tmp_path: Path) -> None:
    assert not loaded("import ecapa_triton", installed, tmp_path) & set(UNUSED)
    sample = ROOT / "samples/anna_1.flac"
    away = run(
        installed.parent / "ecapa-triton", "embed", sample, "--url", "127.0.0.1:9", "--retries", "0", cwd=tmp_path
    )
    assert away.returncode == 2 and "127.0.0.1:9" in away.stderr


@pytest.mark.slow
def test_types_reach_callers(installed: Path, tmp_path: Path) -> None:
    def complaints(source: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "user.py").write_text(source)
        return run(sys.executable, "-m", "mypy", "--strict", "--python-executable", installed, "user.py", cwd=tmp_path)

    done = complaints(USER)
    assert done.returncode == 0, done.stdout
    done = complaints(USER + "\n".join(WRONG))
    found = re.findall(r"user\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)
    first = USER.count("\n") + 1
    assert found == [(str(first + i), code) for i, code in enumerate(WRONG.values())], done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.13", "3.14"])
def test_newer_pythons(installed: Path, version: str, tmp_path: Path) -> None:
    """Only the client: the wheel of tritonserver and the pinned environment end with 3.12."""
    options = [f"--python-version={version}", "--only-binary=:all:", f"--dest={tmp_path}"]
    done = run(installed, "-m", "pip", "download", *options, ".", cwd=installed.parents[2])
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("tritonclient-*.whl")) and list(
        tmp_path.glob(f"numpy-*-cp{version.replace('.', '')}-*.whl")
    )


# --- the reference ---


def test_reference(tmp_path: Path) -> None:
    done = run(sys.executable, "-W", "error", "docs/api.py", tmp_path / "api", cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "api/index.html").read_text()
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)(?=<section id=|</main>)', page, re.DOTALL))
    assert set(sections) == set(ecapa_triton.__all__)
    for name, section in sections.items():
        told = re.search(r'<div class="docstring"><p>(.*?)</p>', section, re.DOTALL)
        assert told and len(told[1].split()) >= 3, name
    assert "Args:" not in page and "```" not in page  # else a section or an example was not understood
