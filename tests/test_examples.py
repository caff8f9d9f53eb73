"""Each example runs as its docstring says, against the real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from ecapa_triton import SpeakerClient

from server.triton import TritonServer

SAMPLES = ROOT / "samples"
Run = Callable[..., tuple[int, list[str], str]]
# Ray in little memory and on loopback; its processes end with it.
RAY = """
import runpy, sys, ray
folder, *sys.argv = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, _node_ip_address="127.0.0.1",
         _temp_dir=folder)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def sample(name: str) -> str:
    (path,) = SAMPLES.glob(f"{name}.*")
    return str(path)


@pytest.fixture
def run(server: TritonServer, tmp_path: Path) -> Run:
    """Runs an example in an empty folder; returns its exit status, the lines it prints, and its errors."""

    def run(name: str, *arguments: object) -> tuple[int, list[str], str]:
        command = [sys.executable, ROOT / "examples" / name, server.grpc_url, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.stem != "demo"))
def test_without_arguments_the_usage_is_shown(name: str) -> None:
    if name.startswith("ray"):
        pytest.importorskip("ray", reason="pip install 'ecapa-triton[ray]'")
    done = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"usage: python examples/{name} URL [^\n]+\n", done.stderr)


def test_embed(run: Run, reference: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(SAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    status, printed, errors = run("embed.py", "clips", "out.npz")
    assert (status, printed, errors) == (0, ["out.npz: 6 of 6 files"], "")
    with np.load(tmp_path / "out.npz") as arrays:
        files, embeddings = arrays["files"], arrays["embeddings"]
    assert embeddings.dtype == np.float32 and embeddings.shape == (6, 192)
    for file, embedding in zip(files, embeddings, strict=True):
        waveform, rate = soundfile.read(tmp_path / file, dtype="float32")
        if rate == 16_000 and waveform.ndim == 1:
            np.testing.assert_allclose(embedding, reference(waveform), atol=1e-3)
    (folder / "broken.wav").write_text("no sound")
    status, printed, errors = run("embed.py", "clips", "out.npz")
    assert (status, printed) == (1, ["out.npz: 6 of 7 files"])
    assert "broken.wav" in errors
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_allclose(arrays["embeddings"], embeddings, atol=1e-4)


def test_login(run: Run) -> None:
    status, printed, _ = run("login.py", "voices.npz", "enrol", "anna", sample("anna_1"), sample("anna_2"))
    assert (status, printed) == (0, ["anna: enrolled with 2 clips"])
    assert run("login.py", "voices.npz", "enrol", "berta", sample("berta_1"))[0] == 0
    status, printed, _ = run("login.py", "voices.npz", "verify", "berta", sample("berta_2"))
    assert status == 0 and re.fullmatch(r"berta: welcome \(0\.[5-9]\d of 0\.45\)", printed[0])
    status, printed, _ = run("login.py", "voices.npz", "verify", "anna", sample("berta_2"))
    assert status == 1 and re.fullmatch(r"anna: refused \(-?0\.[0-3]\d of 0\.45\)", printed[0])
    for file, name, fact in ("voices.npz", "otto", "otto"), ("none.npz", "anna", "none.npz"):
        status, printed, errors = run("login.py", file, "verify", name, sample("anna_1"))
        assert status == 1 and printed == [] and re.match(rf"{name}: .*{fact}", errors)


def test_identify(run: Run) -> None:
    voices = [f"{name}={sample(f'{name}_1')}" for name in ("anna", "berta")]
    clips = [sample(f"{name}_2") for name in ("anna", "berta", "carl")]
    status, printed, errors = run("identify.py", *voices, *clips, SAMPLES / "README.md")
    assert (status, errors) == (0, "")
    score = r"-?\d\.\d\d"
    expected = [
        rf"anna \(anna {score}, berta {score}; threshold 0\.45\)",
        rf"berta \(berta {score}, anna {score}; threshold 0\.45\)",
        rf"unknown \((anna|berta) {score}, (anna|berta) {score}; threshold 0\.45\)",
        r".*README\.md.*",
    ]
    for clip, line, pattern in zip([*clips, SAMPLES / "README.md"], printed, expected, strict=True):
        assert re.fullmatch(rf"{re.escape(str(clip))}: {pattern}", line)


def test_clean(run: Run, tmp_path: Path) -> None:
    listed = [(name, sample(f"{name}_{i}")) for name in ("anna", "berta", "carl") for i in (1, 2)]
    speakers = tmp_path / "speakers.txt"
    speakers.write_text("".join(f"{name} {path}\n" for name, path in listed))
    assert run("clean.py", speakers) == (0, [], "")
    waveform, rate = soundfile.read(sample("anna_1"))
    soundfile.write(tmp_path / "again.wav", waveform / 2, rate)
    speakers.write_text(speakers.read_text() + "berta again.wav\n")
    status, printed, _ = run("clean.py", speakers)
    assert status == 0 and len(printed) == 2
    assert re.fullmatch(rf"twice: {re.escape(sample('anna_1'))} again\.wav \((0\.99\d|1\.000)\)", printed[0])
    assert re.fullmatch(r"not berta\? again\.wav \(-?0\.[0-3]\d; anna 0\.\d\d\)", printed[1])


@pytest.fixture
def port(run: Run, server: TritonServer, tmp_path: Path) -> Iterator[int]:
    """Where `async_service.py` listens, with the voices of Anna and Berta."""
    for name in "anna", "berta":
        assert run("login.py", "voices.npz", "enrol", name, sample(f"{name}_1"))[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples/async_service.py", server.grpc_url, "voices.npz", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as service:
        try:
            end = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert service.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            yield port
        finally:
            service.kill()


def ask(port: int, audio: bytes) -> str:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as caller:
        caller.sendall(audio)
        caller.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: caller.recv(4096), b"")).decode()


def test_async_service(port: int) -> None:
    clips = [Path(sample(f"{name}_2")).read_bytes() for name in ("anna", "berta", "carl")] * 4
    with ThreadPoolExecutor(len(clips)) as callers:
        answers = list(callers.map(lambda clip: ask(port, clip), clips))
    assert answers == ["anna\n", "berta\n", "unknown\n"] * 4
    assert re.fullmatch(r"NotAudioError: 8 bytes.*\n", ask(port, b"no sound"))


@pytest.mark.slow
def test_ray_embed(server: TritonServer, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'ecapa-triton[ray]'")
    from pyarrow import parquet

    paths = [sample(f"{name}_{i}") for name in ("anna", "berta", "carl") for i in (1, 2)]
    broken = tmp_path / "broken.wav"
    broken.write_text("no sound")
    (tmp_path / "paths.txt").write_text("\n".join([*paths, str(broken)]))
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # sockets in it: a long path is none of theirs
        quiet = {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        arguments = [ROOT / "examples/ray_embed.py", server.grpc_url, "paths.txt", "out", "2"]
        command = [sys.executable, "-c", RAY, folder, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | quiet, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / "out")
    assert table.schema.names == ["path", "seconds", "embedding", "model", "error"]
    rows = {row.pop("path"): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows and set(rows) == {*paths, str(broken)}
    bad = rows.pop(str(broken))
    assert "broken.wav" in bad.pop("error") and not any(bad.values())
    with SpeakerClient(server.grpc_url) as client:
        for path, row in rows.items():
            np.testing.assert_allclose(row["embedding"], client.embed(path), atol=1e-3)
            assert row["error"] is None and row["seconds"] > 1 and re.fullmatch("[0-9a-f]{24}", row["model"])
    assert len({row["model"] for row in rows.values()}) == 1
