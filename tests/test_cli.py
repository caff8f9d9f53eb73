"""The command line: exit statuses, one line per error, and what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NoReturn
from urllib.request import OpenerDirector

import grpc
import numpy as np
import pytest
import soundfile
from ecapa_triton import Gallery, _cli
from fake_triton import MODEL, SIZE, FakeTriton, fingerprint, nan, refuse, slow

COMMAND = [sys.executable, "-c", "import sys; from ecapa_triton._cli import main; sys.exit(main())"]
SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write(tmp_path / "clip.wav", 0)


def write(path: Path, seed: int, seconds: float = 1.0) -> Path:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * 16_000)).astype(np.float32)
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    return path


def run(*arguments: object, **options: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        **options,  # type: ignore[call-overload]
    )
    return done.returncode, done.stdout, done.stderr


def one_line(error: str, *words: str) -> None:
    assert error.startswith("ecapa-triton: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


def test_embed_prints_a_line_per_file(fake: FakeTriton, clip: Path) -> None:
    status, out, err = run("embed", clip, clip, "--url", fake.url)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 2 and f"{clip}  1.00 s  {SIZE} dims  norm" in out


def test_embed_json(fake: FakeTriton, clip: Path) -> None:
    status, out, _ = run("embed", clip, "--url", fake.url, "--json")
    line = json.loads(out)
    assert status == 0 and line["file"] == str(clip) and line["seconds"] == 1
    expected = fingerprint(soundfile.read(clip, dtype="float32")[0])
    np.testing.assert_array_equal(np.array(line["embedding"], np.float32), expected)


def test_long(fake: FakeTriton, tmp_path: Path) -> None:
    long = write(tmp_path / "long.wav", 0, seconds=45)
    assert "45.00 s" in run("embed", long, "--url", fake.url, "--long", "windows")[1]
    assert "30.00 s" in run("embed", long, "--url", fake.url, "--long", "truncate")[1]


def test_a_server_away_stops_the_list_with_one_line(clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    status, out, err = run("embed", *[clip] * 5, "--url", "127.0.0.1:9", "-o", output)
    assert (status, out) == (2, "") and not output.exists()
    one_line(err, "no Triton answers at 127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "other"], "model 'other' is not on the server"),
        (["--timeout", "0.1"], "no reply from"),
        (["--url", "http://127.0.0.1:8000"], "expected HOST:PORT"),
    ],
)
def test_server_errors_are_one_line(fake: FakeTriton, clip: Path, arguments: list[str], words: str) -> None:
    fake.otherwise = slow(0.5)
    for command in (["embed", clip], ["verify", clip, clip]):
        status, out, err = run(*command, "--url", fake.url, *arguments)
        assert (status, out) == (2, "")
        one_line(err, words)


def test_nan_is_one_line(fake: FakeTriton, clip: Path) -> None:
    fake.otherwise = nan
    status, _, err = run("embed", clip, "--url", fake.url, "--retries", 2)
    assert status == 2
    one_line(err, "clip.wav", "NaN 3 times")


def test_verify_exit_status(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.wav", 1)
    url = ["--url", fake.url]
    assert run("verify", clip, clip, *url) == (0, "same speaker  score 1.0000  threshold 0.4500\n", "")
    status, out, err = run("verify", clip, other, *url)
    assert (status, err) == (1, "") and out.startswith("different speakers  score ")
    assert run("verify", clip, other, *url, "--threshold", "-1")[0] == 0
    status, out, _ = run("verify", clip, other, *url, "--json")
    assert status == 1 and json.loads(out).keys() == {"score", "threshold", "same"}
    status, out, err = run("verify", clip, tmp_path / "none.wav", *url)
    assert (status, out) == (2, "")
    one_line(err, "none.wav", "No such file")
    status, _, err = run("verify", clip, clip, *url, "--threshold", "45")
    assert status == 2
    one_line(err, "expected a cosine")


def test_verify_without_a_threshold(fake: FakeTriton, clip: Path) -> None:
    fake.info = (float("nan"), 30.0, 640.0)
    status, _, err = run("verify", clip, clip, "--url", fake.url)
    assert status == 2
    one_line(err, "pass threshold")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(fake: FakeTriton, clip: Path, tmp_path: Path, closed: str) -> None:
    def run_closed(*arguments: object) -> tuple[int, str, str]:
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *map(str, arguments), "--url", fake.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout, done.stderr

    same = "" if ">&-" in closed.split() else "same speaker  score 1.0000  threshold 0.4500\n"
    assert run_closed("verify", clip, clip) == (0, same, "")
    assert run_closed("verify", clip, write(tmp_path / "other.wav", 1))[0] == 1
    status, out, err = run_closed("embed", tmp_path / "none.wav")
    assert (status, out) == (2, "") and ("No such file" in err) == ("2>&-" not in closed)
    status, out, err = run_closed("embed", clip, "-o", tmp_path / "out.npz", "--timeout", "x")
    assert (status, out) == (2, "") and ("expected seconds" in err) == ("2>&-" not in closed)
    assert run_closed("embed", clip, "-o", tmp_path / "out.npz")[0] == 0
    assert np.load(tmp_path / "out.npz")["files"].tolist() == [str(clip)]


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "1e300", "soon"])
def test_wrong_timeouts(clip: Path, timeout: str) -> None:
    status, out, err = run("embed", clip, "--timeout", timeout)
    assert (status, out) == (2, "")
    assert f"argument --timeout: '{timeout}': expected seconds above 0 and up to 1000000\n" in err


def test_status(fake: FakeTriton) -> None:
    status, out, err = run("status", "--url", fake.url)
    assert (status, err) == (0, "")
    for words in ("Triton 2.51.0", "ready", "ecapa, version 1, 2", "40 ms to 30 s", "0.45", "20 in 8 executions"):
        assert words in out
    for words in ("model_fp16.onnx by onnxruntime, fp16; instances: 2 on GPU 0, 2 on GPU 1, 1 on", "up to 3 clips"):
        assert words in out
    facts = json.loads(run("status", "--url", fake.url, "--json")[1])
    assert facts["gpus"] == [] and facts["deployment"]["precision"] == "fp16"
    assert facts["info"] == {"threshold": 0.45, "max_seconds": 30.0, "min_samples": 640, "id": MODEL}
    assert facts["statistics"]["mean_batch"] == 3.0
    fake.answers = [refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")]
    assert run("status", "--url", fake.url)[0] == 0


METRICS = """
nv_gpu_utilization{gpu_uuid="GPU-b"} 0.25
nv_gpu_memory_total_bytes{gpu_uuid="GPU-b"} 80000000000.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-b"} 2.5e9
nv_gpu_utilization{gpu_uuid="GPU-a"} 1
nv_cpu_utilization 0.5
"""


def test_status_of_gpus(fake: FakeTriton) -> None:
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
        status, out, err = run("status", "--url", fake.url, "--metrics", page)
        assert (status, err) == (0, "")
        assert out.endswith(
            "gpu         GPU-a: nan of nan GB in use, 100% busy\ngpu         GPU-b: 2.5 of 80.0 GB in use, 25% busy\n"
        )
        facts = json.loads(run("status", "--url", fake.url, "--metrics", page, "--json")[1])
        assert facts["gpus"][1] == {"uuid": "GPU-b", "memory_used": 2.5e9, "memory_total": 8e10, "utilization": 0.25}
        assert facts["gpus"][0]["memory_used"] is None
        server.shutdown()
    for wrong in page, "nonsense":
        status, _, err = run("status", "--url", fake.url, "--metrics", wrong)
        assert status == 2
        one_line(err, "cannot be read")


def test_status_of_a_server_away() -> None:
    status, _, err = run("status", "--url", "127.0.0.1:9")
    assert status == 2
    one_line(err, "no Triton answers")


def test_wrong_outputs_are_refused_before_the_work(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    for output, words in [
        (tmp_path, "not a regular file"),
        (tmp_path / "none" / "out.npz", "there is no directory"),
        ("/dev/null", "not a regular file"),
    ]:
        status, _, err = run("embed", clip, "--url", fake.url, "-o", output)
        assert status == 2
        one_line(err, words)
    assert fake.lengths == []


def test_a_full_disk_is_one_line(fake: FakeTriton, clip: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "embed", clip, "--url", fake.url], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert done.returncode == 2
    one_line(done.stderr, "No space left")


def test_a_closed_pipe_is_quiet(fake: FakeTriton, clip: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "embed", *[clip] * 20, "--url", fake.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr is not None and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("how", ["once", "twice", "in another thread"])
def test_interrupt_is_quiet_and_quick(how: str, fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    """Also when it does not wake the main thread, as when it comes just before that waits."""
    fake.otherwise = slow(3)
    output = tmp_path / "out.npz"
    code = """
import os, signal, sys, threading
from ecapa_triton._cli import main

def interrupt():
    if os.read(0, 1):
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "embed", *[clip] * 20, "--url", fake.url, "-o", output],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not fake.lengths and process.poll() is None:
        time.sleep(0.01)
    start = time.monotonic()
    for _ in range({"once": 1, "twice": 2}.get(how, 0)):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    out, err = process.communicate(b"\n" if how == "in another thread" else b"", timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert time.monotonic() - start < 2
    assert [p.name for p in tmp_path.iterdir()] == ["clip.wav"]


@pytest.mark.parametrize("url", ["host.example:8001", "grpc://host.example:8001", "dns:///host.example:8001"])
def test_the_usual_page_of_metrics(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []

    def refuse(opener: OpenerDirector, page: str, timeout: float) -> NoReturn:
        pages.append(page)
        raise OSError

    monkeypatch.setattr(OpenerDirector, "open", refuse)
    assert _cli._gpus(None, url, 1) == [] and pages == ["http://host.example:8002/metrics"]


def test_two_that_enrol_at_once_take_turns(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    gallery, names = tmp_path / "voices.npz", [f"voice {i}" for i in range(6)]
    command = [*COMMAND, "enrol", "--url", fake.url, str(gallery)]
    started = [subprocess.Popen([*command, name, str(clip)], stdout=subprocess.DEVNULL) for name in names]
    assert [process.wait(60) for process in started] == [0] * 6
    assert sorted(Gallery.load(gallery)) == names


def test_enrol_and_identify(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    gallery, other = tmp_path / "voices.npz", write(tmp_path / "other.wav", 1)
    status, out, err = run("enrol", gallery, "anna", clip, clip, "--url", fake.url)
    assert (status, out, err) == (0, f"anna: 2 clips; {gallery}: 1 voices\n", "")
    assert json.loads(run("enrol", gallery, "berta", other, "--url", fake.url, "--json")[1])["voices"] == 2
    status, out, err = run("identify", gallery, clip, tmp_path / "none.wav", other, "--url", fake.url)
    assert status == 2 and [line.split("  ")[1] for line in out.splitlines()] == ["anna", "berta"]
    one_line(err, "none.wav", "No such file")
    found = json.loads(run("identify", gallery, clip, "--url", fake.url, "--json", "--top", 1)[1])
    assert (found["name"], len(found["candidates"])) == ("anna", 1)
    assert "unknown" in run("identify", gallery, clip, "--url", fake.url, "--threshold", 1)[1]
    asked = len(fake.lengths)
    one_line(run("identify", gallery, clip, "--url", fake.url, "--threshold", "nan")[2], "expected a cosine")
    assert len(fake.lengths) == asked


def test_names_that_no_terminal_can_show(fake: FakeTriton, clip: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9.wav")
    odd.write_bytes(clip.read_bytes())
    output = tmp_path / "out.npz"
    ascii_only = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    assert run("embed", odd, "--url", fake.url, **ascii_only)[0] == 0
    assert run("embed", odd, "--url", fake.url, "-o", output, **ascii_only)[0] == 0
    assert np.load(output)["files"].tolist() == [str(odd)]


def test_the_mp3_decoder_keeps_quiet(fake: FakeTriton, tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp3"
    soundfile.write(whole, np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * 3), 44_100)
    cut = tmp_path / "cut.mp3"
    cut.write_bytes(whole.read_bytes()[:20_000])
    status, out, err = run("embed", cut, "--url", fake.url)
    assert (status, out) == (2, "")
    one_line(err, "cut.mp3", "3.00 s")


def test_a_bug_does_not_exit_as_different_speakers(
    fake: FakeTriton, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_cli.SpeakerClient, "verify", lambda *args, **options: 1 / 0)
    assert _cli.main(["verify", str(clip), str(clip), "--url", fake.url]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_served(server) -> None:  # type: ignore[no-untyped-def]
    url = ["--url", server.grpc_url, "--timeout", "60"]
    anna, again, carl = SAMPLES / "anna_1.flac", SAMPLES / "anna_2.flac", SAMPLES / "carl_2.wav"
    assert run("verify", anna, again, *url)[0] == 0
    assert run("verify", anna, carl, *url)[0] == 1
    status, out, err = run("embed", anna, again, carl, *url, "--json")
    assert (status, err) == (0, "") and len(out.splitlines()) == 3
    status, out, _ = run("status", *url)
    assert status == 0 and "threshold   0.45" in out
