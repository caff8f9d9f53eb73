"""`python -m loadtest run` and the locustfile: every scenario, shortly, on a real tritonserver; no time is asserted."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from export.verify import BOUNDS
from loadtest import load, scenarios
from loadtest import run as load_run
from loadtest.__main__ import main
from loadtest.clips import MAX_ERROR, Clips, Deck, compare, speech
from loadtest.load import Round, Sent, Timing
from loadtest.scenarios import Level
from server import gateway
from server.triton import TritonServer

LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py")]
SHORT = ["--seconds=1", "--warm-up=0.3"]


def sent(start: float, latency: float, result: str = "right", clips: int = 1, users: int = 1) -> Sent:
    return Sent(start, latency, clips, 2.0 * clips, users, result, 1e-6)


def test_clips_are_speech_of_the_asked_length_and_differ() -> None:
    clips = speech([1, 0.5, 2, 2], seed=3)
    assert [len(clip) for clip in clips] == [16000, 8000, 32000, 32000]
    assert all(clip.dtype == np.float32 and 0.01 < np.abs(clip).max() <= 1 for clip in clips)
    assert not np.allclose(clips[2], clips[3], atol=1e-2)
    assert all((a == b).all() for a, b in zip(clips, speech([1, 0.5, 2, 2], seed=3), strict=True))


def test_clips_come_back_from_their_file(tmp_path: Path) -> None:
    clips = Clips(speech([0.1, 0.3]), np.eye(2, 4, dtype=np.float32))
    assert clips.apart() == pytest.approx(2**0.5)
    clips.save(tmp_path / "clips.npz")
    again = Clips.load(tmp_path / "clips.npz")
    assert [len(clip) for clip in again.waveforms] == [1600, 4800] and (again.embeddings == clips.embeddings).all()
    assert (again.waveforms[1] == clips.waveforms[1]).all()


def test_embeddings_are_compared() -> None:
    a = np.array([[1, 0], [0, 2.02]], np.float32)
    b = np.array([[1, 0], [0, 2]], np.float32)
    assert compare(a, b) == {"cosine": pytest.approx(1), "error": pytest.approx(0.01, rel=1e-4)}
    assert compare(a[::-1], b) == {"cosine": pytest.approx(0), "error": pytest.approx(np.hypot(2.02, 1), rel=1e-4)}


def test_what_is_right_is_what_the_export_allows() -> None:
    assert MAX_ERROR == {precision: bound.max_error for precision, bound in BOUNDS.items()}


def test_a_deck_deals_everything_before_it_repeats() -> None:
    deck = Deck("abcde", seed=1)
    rounds = ["".join(deck.draw() for _ in range(5)) for _ in range(4)]
    assert all(sorted(one) == list("abcde") for one in rounds) and len(set(rounds)) > 1


def test_the_mix_is_what_is_said() -> None:
    assert Counter(scenarios.lengths(None)) == scenarios.MIX
    assert len(scenarios.lengths(2.0, 32)) == 32


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS)
def test_every_level_is_named_differently(scenario: str) -> None:
    names = [str(level) for level in scenarios.levels(scenario)]
    assert names and len(set(names)) == len(names)


def test_closed_loop_counts_all_from_the_first_request_to_the_last_reply() -> None:
    # One client, requests of 2 s from -1 s on; measured from 0 to 10.
    one = Round(0, 10, [sent(-1 + 2 * n, 2) for n in range(6)])
    assert load.rates(Level("single", 2.0), one) == (pytest.approx(0.5), pytest.approx(1.0))
    assert load.latencies(one) == [pytest.approx(2000)] * 5
    # Ten clients at once before a server that takes one clip a second, one after another.
    queued = [sent(0, n + 1) for n in range(10)] + [sent(n, 10) for n in range(1, 5)]
    assert load.rates(Level("clients", 2.0, users=10), Round(1, 5, queued))[0] == pytest.approx(1)
    refused = [sent(0, 0.1, "Refused: full"), sent(0, 4, clips=8), sent(4, 4, clips=8)]
    assert load.rates(Level("batch", 2.0, 8), Round(0, 5, refused))[0] == pytest.approx(2)
    assert load.rates(Level("single", 2.0), Round(0, 5, refused[:1])) == (0, 0)


def test_open_loop_counts_replies_that_came_inside() -> None:
    one = Round(0, 10, [sent(n - 0.5, 1) for n in range(12)] + [sent(5, 0.1, "Refused: full")])
    assert load.rates(Level("arrivals", None, users=None, share=0.5), one)[0] == pytest.approx(1.0)
    assert len(load.latencies(one)) == 10


def test_requests_longer_than_the_measurement_still_have_a_latency() -> None:
    assert load.latencies(Round(0, 1, [sent(-1, 5), sent(-3, 1)])) == [pytest.approx(5000)]


def test_figures_of_several_rounds() -> None:
    slow = Round(
        0, 4, [sent(n, 1) for n in range(4)], Counter(inferences=4, executions=2, requests=4, queue_ns=8_000_000)
    )
    fast = Round(10, 14, [sent(10 + n / 2, 0.5) for n in range(8)], Counter(inferences=8, executions=2, requests=8))
    fast.requests += [
        sent(11, 0.1, "WrongReply: the embedding is not the clip's own"),
        sent(11, 0.1, "Refused: full"),
        sent(12, 0.1, "CallFailed: INTERNAL: broken"),
        sent(20, 0.1, "CallFailed: INTERNAL: after the end"),
        sent(20, 0.1, "WrongReply: the embedding is not finite"),  # counts whenever it came
    ]
    fast.busy, fast.samples = 0.95, [{"t": 1.0, "gpu": 0.5}]
    row = load.figures(Level("mixed", None, users=1), [slow, fast])
    assert row["clips_per_s"] == pytest.approx(1.5) and row["audio_per_s"] == pytest.approx(3)
    assert [one["clips_per_s"] for one in row["per_round"]] == [pytest.approx(1), pytest.approx(2)]
    assert (row["p50_ms"], row["p99_ms"], row["max_ms"]) == (
        pytest.approx(500),
        pytest.approx(1000),
        pytest.approx(1000),
    )
    assert (row["wrong"], row["refused"], row["generator_cpu"]) == (2, 1, 0.95)
    assert row["errors"] == {"INTERNAL: broken": 1}
    assert (row["mean_batch"], row["queue_ms"]) == (3, pytest.approx(8 / 12))
    assert row["samples"] == [{"t": 5.0, "gpu": 0.5}]


def test_a_ramp_over_time() -> None:
    one = Round(0, 4, [sent(0.5, 0.5, users=1), sent(2.5, 1, users=2), sent(3, 0.5, "Refused: full", users=3)])
    windows = load.windows(one)
    assert [w["users"] for w in windows] == [1, 3] and [w["clips_per_s"] for w in windows] == [0.5, 0.5]
    assert windows[1]["p95_ms"] == pytest.approx(1000)


def test_in_process_rounds_compare_too() -> None:
    clips = Clips(speech([0.1, 0.2]), np.eye(2, dtype=np.float32))

    def embed(waveforms: list[Any]) -> Any:
        time.sleep(0.01)
        return np.stack([clips.embeddings[len(waveform) // 3200] * np.float32(1.001) for waveform in waveforms])

    one = load.in_process(embed, clips, 2, Timing(0.2, 0.1))
    assert {request.audio for request in one.requests} == {0.1, 0.2}
    assert all(request.error == pytest.approx(1e-3, rel=1e-3) for request in one.requests)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to load: give --local cpu"),
        (["--target=x=http://127.0.0.1:1"], "expected grpc://HOST:PORT"),
        (["--target=x=grpc://127.0.0.1:99999"], "expected grpc://HOST:PORT"),
        (["--target=x=grpc://127.0.0.1:9"], "does not answer"),
        (["--local=cpu", "--model=nope"], "model is nope, a local server has ecapa, ecapa_torchscript"),
        (["--local=cpu", "--repository=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_run(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--scenario=nope"], ["--target=grpc://x:1"], ["--seconds=0"], ["--rounds=0"], ["--warm-up=-1"], ["--name=a/b"]],
)
def test_options_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", *arguments])
    assert "expected" in capsys.readouterr().err


@pytest.fixture
def first_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One level of each scenario instead of all."""
    every = scenarios.levels
    monkeypatch.setattr(scenarios, "levels", lambda scenario: every(scenario)[:1])


@pytest.mark.slow
def test_every_scenario_against_a_running_server(
    server: TritonServer, first_levels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", f"there=grpc://{server.grpc_url}", "--metrics", f"there={server.metrics_url}"]
    assert main(["run", *target, *SHORT, "--out", str(tmp_path), "--name=x"]) == 0
    told = capsys.readouterr().out
    data = json.loads((tmp_path / "x.json").read_text())
    rows = {row["scenario"]: row for row in data["rows"]}
    assert list(rows) == list(scenarios.SCENARIOS)
    assert len(rows["mixed"]["per_round"]) == 3
    for row in rows.values():
        assert row["wrong"] == 0 and not row["errors"] and row["requests"] > 0, row
        assert 0 <= row["worst_error"] < 1e-4 and row["clips_per_s"] > 0
        assert row["mean_batch"] >= 1 and row["generator_cpu"] > 0 and row["compute_ms"] > 0
    assert rows["arrivals"]["offered"] == pytest.approx(rows["mixed"]["clips_per_s"] * scenarios.ARRIVALS[0])
    users = [window["users"] for window in rows["ramp"]["windows"]]
    assert users and users[0] < scenarios.RAMP_USERS
    assert any("cpu" in sample for row in rows.values() for sample in row["samples"])
    assert data["conditions"]["references"] == "first replies" and data["agreement"] == []
    (about,) = data["targets"]
    assert about["server_version"].startswith("2.") and about["models"]["ecapa"]["precision"] == "fp32"
    with (tmp_path / "x.csv").open() as lines:
        raw = list(csv.DictReader(lines))
    assert sum(int(line["clips"]) for line in raw if line["counted"] == "1") > 10
    assert {line["result"] for line in raw} == {"right"}
    assert "x.html" in told and "left]" in told and (tmp_path / "x.html").exists() and (tmp_path / "x.md").exists()


def test_a_wrong_reply_fails_the_run_and_is_in_the_report(
    server: TritonServer,
    first_levels: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = load_run.first_replies
    monkeypatch.setattr(load_run, "first_replies", lambda *about: np.roll(right(*about), 1, axis=0))
    command = ["run", "--target", f"a=grpc://{server.grpc_url}", "--scenario=single", *SHORT]
    assert main([*command, "--out", str(tmp_path), "--name=x"]) == 1
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert row["wrong"] > 0 and row["requests"] == 0 and row["clips_per_s"] == 0 and row["p50_ms"] is None
    assert f"{row['wrong']} replies were WRONG" in capsys.readouterr().err
    assert "WRONG" in (tmp_path / "x.html").read_text() and "WrongReply" in (tmp_path / "x.csv").read_text()


@pytest.mark.slow
def test_a_local_server_and_its_baselines(
    repository: Path, first_levels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = ["--local=cpu", "--local=gpu", "--repository", str(repository), "--scenario=single,arrivals"]
    assert main(["run", *local, *SHORT, "--out", str(tmp_path), "--name=x", "--capacity=8"]) == 0
    data = json.loads((tmp_path / "x.json").read_text())
    rows = data["rows"]
    single = {row["contender"]: row for row in rows if row["scenario"] == "single" and row["target"] == "cpu"}
    assert set(single) == {"ours", "one at a time", "padded batches", "in process"}
    (arrivals,) = (row for row in rows if row["scenario"] == "arrivals" and row["target"] == "cpu")
    assert (arrivals["contender"], arrivals["offered"]) == ("ours", 4)
    assert arrivals["max_requests"] == (8 if gateway.find() else None)  # a second of work
    assert sum(row["wrong"] for row in rows) == 0
    assert all(row["worst_error"] < 1e-4 for row in single.values())  # nothing is padded where one clip is sent
    (agreed,) = (one for one in data["agreement"] if one["a"] == "cpu/ecapa")
    assert agreed["b"] == "SpeechBrain" and agreed["error"] < 1e-4 and agreed["cosine"] > 0.99999
    if "gpu" not in {row["target"] for row in rows}:
        assert "driver" in data["not_measured"]["gpu"] and "gpu: not measured" in capsys.readouterr().out
    assert data["targets"][0]["models"]["ecapa"]["sha256"]
    assert data["conditions"]["source"] == "mini"


def test_ctrl_c_still_writes_the_report(server: TritonServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "run", "--target", f"a=grpc://{server.grpc_url}", "--scenario=single"]
    command += [*SHORT, "--rounds=20", "--out", str(tmp_path), "--name=x"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[  2/"):
            break
    time.sleep(1.5)  # Locust runs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "interrupted: the report has what was measured" in err and "x.html" in out
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["interrupted"] and len(data["rows"]) == 1 and len(data["rows"][0]["per_round"]) >= 2
    assert not any(str(server.grpc_url) in line for line in _commands("locust"))


def test_a_server_that_dies_costs_its_own_rows_only(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, device="cpu") as dying:
        command = [sys.executable, "-m", "loadtest", "run", "--target", f"a=grpc://{dying.grpc_url}"]
        command += [*SHORT, "--scenario=single", "--out", str(tmp_path), "--name=x"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[  1/"):
                break
        os.kill(dying.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "x.html" in out, err
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows[0]["requests"] > 0 and "does not answer" in rows[-1]["failed"]
    assert "Failed: a, ours" in (tmp_path / "x.md").read_text()


def _commands(word: str) -> list[str]:
    """The command lines of all processes that have the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


@pytest.fixture
def clips(server: TritonServer, tmp_path: Path, reference: Any) -> Clips:
    waveforms = speech([1.0, 1.0, 2.0])
    return Clips(waveforms, np.stack([reference(waveform) for waveform in waveforms]))


def locust(server: TritonServer, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*LOCUST, "--headless", "--only-summary", f"--host=grpc://{server.grpc_url}", "--stop-timeout=20"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd="/")


def test_locust_by_itself_makes_its_own_clips(server: TritonServer) -> None:
    result = locust(server, "--scenario=single", "--seconds=1", "--users=2", "--run-time=6s")
    assert result.returncode == 0, result.stderr
    told = result.stdout + result.stderr
    assert "single, 1 s" in told and "0(0.00%)" in told


def test_locust_counts_wrong_replies(server: TritonServer, clips: Clips, tmp_path: Path) -> None:
    """The right embeddings pass; another clip's do not, and neither do those of another size."""
    path = tmp_path / "clips.npz"
    for embeddings, right in (
        (clips.embeddings, True),
        (np.roll(clips.embeddings, 1, axis=0), False),
        (clips.embeddings[:, :5], False),
    ):
        Clips(clips.waveforms, embeddings).save(path)
        log = tmp_path / "log"
        result = locust(server, "--clips", path, "--users=1", "--run-time=2s", "--requests", log)
        (file,) = tmp_path.glob("log.*")
        requests, busy = load.read_requests([file])
        file.unlink()
        assert requests and busy and all(one.right == right for one in requests)
        assert result.returncode == (0 if right else 1)
        assert right or "WrongReply" in result.stderr + result.stdout


@pytest.mark.skipif(gateway.find() is None, reason="nginx, which refuses, is not installed")
def test_a_reply_is_read_though_many_others_are_awaited(
    repository: Path, tmp_path: Path, reference: Callable[[np.ndarray], np.ndarray]
) -> None:
    """With more users than gevent has threads by default, what is refused at once comes back before what is in work."""
    waveforms = speech([8.0, 8.0])
    Clips(waveforms, np.stack([reference(waveform) for waveform in waveforms])).save(tmp_path / "clips.npz")
    with TritonServer(repository, device="cpu", limits=gateway.Limits(requests=12, request_mb=64)) as limited:
        words = ["--clips", tmp_path / "clips.npz", "--requests", tmp_path / "log"]
        locust(limited, *words, "--users=24", "--spawn-rate=24", "--run-time=4s")
    (file,) = tmp_path.glob("log.*")
    requests, _ = load.read_requests([file])
    refused, right = (
        np.median([one.latency for one in requests if one.result.startswith(words)]) for words in ("Refused", "right")
    )
    assert refused < 0.2 * right


def test_locust_in_several_processes(server: TritonServer, clips: Clips, tmp_path: Path) -> None:
    clips.save(tmp_path / "clips.npz")
    words = ["--clips", tmp_path / "clips.npz", "--requests", tmp_path / "log", "--users=2", "--run-time=3s"]
    result = locust(server, *words, "--processes=2")
    assert result.returncode == 0, result.stderr
    files = list(tmp_path.glob("log.*"))
    requests, _ = load.read_requests(files)
    assert len(files) == 2 and requests and all(one.right for one in requests)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model=nope"], "unknown model"),
        (["--clips=/nowhere.npz"], "holds no clips"),
    ],
)
def test_locust_says_what_is_wrong(server: TritonServer, arguments: list[str], words: str) -> None:
    result = locust(server, "--users=1", "--run-time=600s", *arguments)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_the_web_page_has_the_scenarios_and_starts_one(server: TritonServer, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*LOCUST, f"--host=grpc://{server.grpc_url}", "--web-host=127.0.0.1", f"--web-port={port}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        page = ""
        deadline = time.monotonic() + 30
        while not page:
            try:
                page = urllib.request.urlopen(url, timeout=5).read().decode()
            except urllib.error.URLError:
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        assert all(name in page for name in scenarios.SCENARIOS) and "clips per second of each user" in page
        form = {"user_count": 2, "spawn_rate": 2, "host": f"grpc://{server.grpc_url}", "scenario": "batch", "batch": 4}
        body = urllib.parse.urlencode(form | {"seconds": 1.0}).encode()
        assert json.loads(urllib.request.urlopen(f"{url}/swarm", body, timeout=30).read())["success"]
        while True:
            stats = json.loads(urllib.request.urlopen(f"{url}/stats/requests", timeout=5).read())
            named = {one["name"]: one for one in stats["stats"]}
            if named.get("batch, 4 x 1 s", {}).get("num_requests"):
                break
            assert time.monotonic() < deadline + 30, stats
            time.sleep(0.2)
        assert stats["fail_ratio"] == 0
        urllib.request.urlopen(f"{url}/stop", b"", timeout=30)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
