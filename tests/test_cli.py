"""The command line: exit statuses, one line per error, and the files left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile
from clients import voice
from conftest import ROOT
from ecapa_triton import Gallery, SpeakerClient, _cli
from fake_triton import MODEL, SIZE, FakeTriton, fingerprint, good, held, nan, refuse

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as usual
COMMAND = [sys.executable, "-c", "import sys; from ecapa_triton._cli import main; sys.exit(main())"]
Run = Callable[..., tuple[int, str, str]]


def write(path: Path, seed: int, seconds: float = 1.0) -> Path:
    soundfile.write(path, voice(seconds, seed), 16_000, subtype="FLOAT")
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write(tmp_path / "clip.wav", 0)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write(tmp_path / "other.wav", 1)


@pytest.fixture
def run(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; `--url` of the fake server unless given. Status, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        url = [] if "--url" in arguments else ["--url", fake.url]
        try:
            status = _cli.main([*map(str, arguments), *url])
        except SystemExit as exc:  # of argparse
            status = int(exc.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def spawn(*arguments: object, prefix: Sequence[str] = (), **environment: str) -> tuple[int, str, str]:
    """Run a command in a process of its own."""
    command = [*prefix, *COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT | environment)
    return done.returncode, done.stdout, done.stderr


def one_line(error: str, *facts: object) -> None:
    assert error.startswith("ecapa-triton: ") and error.count("\n") == 1, error
    for fact in facts:
        assert str(fact) in error


# --- embed: the rest is in test_bulk.py ---


def test_embed_prints_a_line_per_file(fake: FakeTriton, run: Run, clip: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\ufeffsesame\r\n")
    status, out, err = run("embed", clip, other, "--key-file", tmp_path / "key")
    assert (status, err) == (0, "")
    assert any("sesame" in call.values() for call in fake.metadata)
    for path, line in zip((clip, other), out.splitlines(), strict=True):
        assert line.startswith(f"{path}  1.00 s, 1.00 s of speech  {SIZE} dims")
    status, out, _ = run("embed", clip, "--json")
    line = json.loads(out)
    assert (status, line["file"], line["seconds"], line["model"]) == (0, str(clip), 1, MODEL)
    expected = fingerprint(soundfile.read(clip, dtype="float32")[0])
    np.testing.assert_array_equal(np.array(line["embedding"], np.float32), expected)


def test_long(run: Run, tmp_path: Path) -> None:
    long = write(tmp_path / "long.wav", 0, seconds=45)
    assert "45.00 s" in run("embed", long, "--long", "windows")[1]
    assert "30.00 s" in run("embed", long, "--long", "truncate")[1]
    status, out, err = run("embed", long)
    assert (status, out) == (2, "")
    one_line(err, long, "45")


def test_an_absent_server_ends_a_list_with_one_line(run: Run, clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    for more in [], ["-o", output]:
        status, out, err = run("embed", *[clip] * 5, "--url", "127.0.0.1:9", "--retries", 0, *more)
        assert (status, out) == (2, "") and not output.exists()
        one_line(err, "127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--model", "absent"], "absent"),
        (["--timeout", "0.1"], "0.1 s"),
        (["--timeout", "0"], "timeout"),
        (["--timeout", "nan"], "timeout"),
        (["--url", "http://127.0.0.1:8000"], "http://127.0.0.1:8000"),
        (["--key-file", "no such file"], "no such file"),
        (["--key-file", "/dev/null"], "/dev/null"),
    ],
)
def test_errors_are_one_line(fake: FakeTriton, run: Run, clip: Path, arguments: list[str], fact: str) -> None:
    fake.otherwise = held
    for command in (["embed", clip], ["verify", clip, clip]):
        status, out, err = run(*command, *arguments)
        assert (status, out) == (2, "")
        one_line(err, fact)


def test_commands_retry_until_the_timeout(fake: FakeTriton, run: Run, clip: Path) -> None:
    fake.answers = [refuse(grpc.StatusCode.UNAVAILABLE, "Socket closed")] * 16  # of two clips
    assert run("verify", clip, clip)[0] == 0
    fake.away = 8
    assert run("status")[0] == 0


def test_nan_is_one_line(fake: FakeTriton, run: Run, clip: Path) -> None:
    fake.otherwise = nan
    status, _, err = run("embed", clip, "--retries", 2)
    assert status == 2 and len(fake.lengths) == 3
    one_line(err, "clip.wav", "NaN")


def test_impossible_outputs_are_rejected_before_the_work(
    fake: FakeTriton, run: Run, clip: Path, tmp_path: Path
) -> None:
    for output in tmp_path, tmp_path / "none/out.npz", Path("/dev/null"):
        status, _, err = run("embed", clip, "-o", output)
        assert status == 2
        one_line(err, output)
    for command in ["embed", clip, "-o", tmp_path / "out.csv"], ["enrol", tmp_path / "voices.json", "anna", clip]:
        status, _, err = run(*command)
        assert status == 2
        one_line(err, ".npz")
    assert fake.lengths == [] and [path.name for path in tmp_path.iterdir()] == ["clip.wav"]


def test_version(run: Run) -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert run("--version") == (0, f"{version}\n", "")


# --- verify, enrol, identify ---


def test_verify_exit_status(fake: FakeTriton, run: Run, clip: Path, other: Path, tmp_path: Path) -> None:
    status, out, err = run("verify", clip, clip)
    assert (status, err) == (0, "") and "1.0000" in out and "0.4500" in out
    status, out, err = run("verify", clip, other)
    assert (status, err, out.count("\n")) == (1, "", 1)
    assert run("verify", clip, other, "--threshold", -1)[0] == 0
    status, out, _ = run("verify", clip, other, "--json")
    facts = json.loads(out)
    assert (status, facts["threshold"], facts["same"]) == (1, 0.45, False) and facts["score"] < 0.45
    for arguments, fact in [([tmp_path / "none.wav"], "none.wav"), ([clip, "--threshold", 45], "45")]:
        status, out, err = run("verify", clip, *arguments)
        assert (status, out) == (2, "")
        one_line(err, fact)
    fake.info = (float("nan"), 30.0, 640.0)
    status, _, err = run("verify", clip, clip)
    assert status == 2
    one_line(err, "threshold")


def test_enrol_and_identify(fake: FakeTriton, run: Run, clip: Path, other: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "voices.npz"
    status, out, err = run("enrol", gallery, "anna", clip, clip)
    assert (status, out, err) == (0, f"anna: 2 clips; {gallery}: 1 voice\n", "")
    assert json.loads(run("enrol", gallery, "berta", other, "--json")[1]) == {"name": "berta", "clips": 1, "voices": 2}
    assert Gallery.load(gallery).clips("anna") == 2
    status, out, err = run("identify", gallery, clip, tmp_path / "none.wav", other)
    assert status == 2 and [line.split("  ")[1] for line in out.splitlines()] == ["anna", "berta"]
    one_line(err, "none.wav")
    found = json.loads(run("identify", gallery, clip, "--json", "--top", 1)[1])
    assert (found["file"], found["name"], len(found["candidates"])) == (str(clip), "anna", 1)
    assert json.loads(run("identify", gallery, clip, "--json", "--threshold", 1)[1])["name"] is None
    sent = len(fake.lengths)
    status, _, err = run("identify", gallery, clip, "--threshold", "nan")
    assert status == 2 and len(fake.lengths) == sent
    one_line(err, "nan")


def test_simultaneous_enrolments_take_turns(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    gallery, names = tmp_path / "voices.npz", [f"voice {i}" for i in range(5)]
    command = [*COMMAND, "enrol", "--url", fake.url, str(gallery)]
    started = [subprocess.Popen([*command, name, str(clip)], stdout=subprocess.DEVNULL) for name in names]
    assert [process.wait(120) for process in started] == [0] * 5
    assert sorted(Gallery.load(gallery)) == names


def test_a_bug_does_not_exit_as_different_speakers(run: Run, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeakerClient, "verify", lambda *args, **options: 1 / 0)
    status, _, err = run("verify", clip, clip)
    assert status == 2 and "ZeroDivisionError" in err


# --- status ---


def test_status(fake: FakeTriton, run: Run) -> None:
    status, out, err = run("status")
    assert (status, err) == (0, "")
    for fact in ("2.51.0", "version 1, 2", "model_fp16.onnx", "2 on GPU 0, 2 on GPU 1", "up to 3", "40 ms to 30 s"):
        assert fact in out
    facts = json.loads(run("status", "--json")[1])
    assert facts["gpus"] == [] and facts["deployment"]["precision"] == "fp16"
    assert facts["info"] == {"threshold": 0.45, "max_seconds": 30.0, "min_samples": 640, "id": MODEL}
    assert facts["statistics"]["mean_batch"] == 3.0
    fake.answers = [refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")]
    assert run("status")[0] == 0
    status, _, err = run("status", "--url", "127.0.0.1:9", "--retries", 0)
    assert status == 2
    one_line(err, "127.0.0.1:9")


METRICS = """
nv_gpu_utilization{gpu_uuid="GPU-b"} 0.25
nv_gpu_memory_total_bytes{gpu_uuid="GPU-b"} 80000000000.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-b"} 2.5e9
nv_gpu_utilization{gpu_uuid="GPU-a"} 1
nv_cpu_utilization 0.5
"""


def test_status_of_gpus(run: Run) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/metrics"
        status, out, err = run("status", "--metrics", page)
        assert (status, err) == (0, "")
        a, b = out.splitlines()[-2:]
        assert "GPU-a" in a and "100%" in a and "GPU-b: 2.5 of 80.0 GB" in b and "25%" in b
        facts = json.loads(run("status", "--metrics", page, "--json")[1])
        assert facts["gpus"][1] == {"uuid": "GPU-b", "memory_used": 2.5e9, "memory_total": 8e10, "utilization": 0.25}
        assert facts["gpus"][0]["memory_used"] is None
        server.shutdown()
    for unreadable in page, "nonsense":
        status, _, err = run("status", "--metrics", unreadable)
        assert status == 2
        one_line(err, unreadable)


# --- streams and signals ---


@pytest.mark.parametrize("command", ["embed", "verify"])
def test_a_full_disk_is_one_line(fake: FakeTriton, clip: Path, command: str) -> None:
    status, _, err = spawn(command, clip, clip, "--url", fake.url, prefix=["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    assert status == 2
    one_line(err)


def test_a_closed_pipe_is_quiet(fake: FakeTriton, clip: Path) -> None:
    fake.answers, fake.otherwise = [good], held
    command = [*COMMAND, "embed", *[str(clip)] * 5, "--in-flight", "1", "--url", fake.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        fake.gate.set()  # the second reply comes after the pipe is closed
        assert process.wait(120) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("how", ["once", "twice", "in another thread"])
def test_an_interrupt_is_quiet_and_waits_for_no_reply(how: str, fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    """Also a signal that does not wake the main thread, as one just before it waits."""
    code = """
import os, signal, sys, threading
from ecapa_triton._cli import main

def interrupt():
    if os.read(0, 1):
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
sys.exit(main())
"""
    fake.otherwise = held
    process = subprocess.Popen(
        [sys.executable, "-c", code, "embed", *[clip] * 20, "--url", fake.url, "-o", tmp_path / "out.npz"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    fake.wait_until(lambda fake: fake.busy)
    for _ in range({"once": 1, "twice": 2}.get(how, 0)):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    out, err = process.communicate(
        b"\n" if how == "in another thread" else b"", timeout=40
    )  # the server holds its replies
    assert (process.returncode, out, err) == (130, b"", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.wav"]


def test_names_that_the_terminal_cannot_show(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9.wav")
    odd.write_bytes(clip.read_bytes())
    output = tmp_path / "out.npz"
    for more in [], ["-o", output]:
        assert spawn("embed", odd, "--url", fake.url, *more, PYTHONIOENCODING="ascii")[0] == 0
    assert np.load(output)["files"].tolist() == [str(odd).encode(errors="backslashreplace").decode()]


def test_the_mp3_decoder_prints_nothing(fake: FakeTriton, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.mp3", tmp_path / "cut.mp3"
    soundfile.write(whole, np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * 3), 44_100)
    cut.write_bytes(whole.read_bytes()[:20_000])
    status, out, err = spawn("embed", cut, "--url", fake.url)
    assert (status, out) == (2, "")
    one_line(err, "cut.mp3")
