"""`python -m loadtest run` and the locustfile: every scenario, shortly, on a real tritonserver; no time is asserted."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from conftest import ROOT
from tritonclient.grpc import service_pb2, service_pb2_grpc

from export.verify import BOUNDS
from loadtest import load, scenarios, servers
from loadtest import run as load_run
from loadtest.__main__ import main
from loadtest.clips import MAX_ERROR, Clips, Deck, compare, speech
from loadtest.infer import Sent
from loadtest.scenarios import BASELINES, OURS, PADDED, REPEATED, SCENARIOS, Level
from server import TritonServer, gateway

LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py")]
SHORT = ["--seconds=1", "--warm-up=0.3"]


def test_clips_are_speech_of_the_given_length_and_differ() -> None:
    clips = speech([1, 0.5, 2, 2], seed=3)
    assert [len(clip) for clip in clips] == [16000, 8000, 32000, 32000]
    assert all(clip.dtype == np.float32 and 0.01 < np.abs(clip).max() <= 1 for clip in clips)
    assert not np.allclose(clips[2], clips[3], atol=1e-2)
    assert all((a == b).all() for a, b in zip(clips, speech([1, 0.5, 2, 2], seed=3), strict=True))


def test_embeddings_are_compared() -> None:
    a = np.array([[1, 0], [0, 2.02]], np.float32)
    b = np.array([[1, 0], [0, 2]], np.float32)
    assert compare(a, b) == {"cosine": pytest.approx(1), "error": pytest.approx(0.01, rel=1e-4)}
    assert compare(a[::-1], b) == {"cosine": pytest.approx(0), "error": pytest.approx(np.hypot(2.02, 1), rel=1e-4)}


def test_the_bounds_are_those_of_the_export() -> None:
    assert MAX_ERROR == {precision: bound.max_error for precision, bound in BOUNDS.items()}


def test_a_deck_deals_every_item_before_it_repeats() -> None:
    deck = Deck("abcde", seed=1)
    rounds = ["".join(deck.draw() for _ in range(5)) for _ in range(4)]
    assert all(sorted(one) == list("abcde") for one in rounds) and len(set(rounds)) > 1


@pytest.mark.parametrize(
    "arguments, fact",
    [
        ([], "--local"),
        (["--target=x=http://127.0.0.1:1"], "grpc://HOST:PORT"),
        (["--target=x=grpc://127.0.0.1:9"], "grpc://127.0.0.1:9"),
        (["--local=cpu", "--model=nope"], "ecapa, ecapa_torchscript"),
        (["--local=cpu", "--repository=/nowhere"], "/nowhere"),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(
    arguments: list[str], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "--source=mini", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and fact in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argument",
    ["--scenario=nope", "--target=grpc://x:1", "--seconds=0", "--seconds=nan", "--rounds=0", "--rounds=2.5"],
)
def test_options_are_checked(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", argument])
    assert argument.rpartition("=")[2] in capsys.readouterr().err


@pytest.fixture
def first_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One level of each scenario instead of all."""
    for name, scenario in SCENARIOS.items():
        monkeypatch.setitem(SCENARIOS, name, scenario._replace(levels=scenario.levels[:1]))


@pytest.mark.slow
def test_every_scenario_against_a_running_server(server: TritonServer, first_levels: None, tmp_path: Path) -> None:
    target = ["--target", f"there=grpc://{server.grpc_url}", "--metrics", f"there={server.metrics_url}"]
    assert main(["run", *target, *SHORT, "--out", str(tmp_path), "--name=x"]) == 0
    data = json.loads((tmp_path / "x.json").read_text())
    rows = {row["scenario"]: row for row in data["rows"]}
    assert list(rows) == list(SCENARIOS)
    assert len(rows["mixed"]["audio_per_round"]) == REPEATED
    for row in rows.values():
        assert row["wrong"] == 0 and not row["errors"] and row["requests"] > 0, row
        assert 0 <= row["worst_error"] < 1e-4 and row["clips_per_s"] > 0
        assert row["mean_batch"] >= 1 and row["generator_cpu"] > 0 and row["compute_ms"] > 0
    expected = rows["mixed"]["clips_per_s"] * 0.5
    assert rows["arrivals"]["offered"] == pytest.approx(expected, rel=1e-4)
    users = [window["users"] for window in rows["ramp"]["windows"]]
    assert users and users[0] < scenarios.RAMP_USERS
    assert any(0 < row.get("cpu", 0) <= 1 for row in rows.values())
    assert data["conditions"]["references"] == "first replies" and data["agreement"] == []
    (about,) = data["servers"]
    assert about["version"].startswith("2.") and about["models"]["ecapa"]["precision"] == "fp32"
    with (tmp_path / "x.csv").open() as lines:
        raw = list(csv.DictReader(lines))
    assert sum(int(line["clips"]) for line in raw) > 10 and {line["result"] for line in raw} == {"right"}
    assert (tmp_path / "x.html").exists() and (tmp_path / "x-clients.png").exists()


def test_a_wrong_reply_fails_the_run_and_is_in_the_report(
    server: TritonServer,
    first_levels: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = load_run.first_replies
    monkeypatch.setattr(load_run, "first_replies", lambda *about: np.roll(right(*about), 1, axis=0))
    words = ["run", "--target", f"a=grpc://{server.grpc_url}", "--scenario=single", *SHORT]
    assert main([*words, "--out", str(tmp_path), "--name=x"]) == 1
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert row["wrong"] > 0 and row["requests"] == 0 and row["clips_per_s"] == 0 and row["p50_ms"] is None
    assert f"{row['wrong']} replies" in capsys.readouterr().err
    assert f"**{row['wrong']}**" in (tmp_path / "x.md").read_text() and "WrongReply" in (tmp_path / "x.csv").read_text()


@pytest.mark.slow
def test_a_local_server_and_its_baselines(
    repository: Path, first_levels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = ["--local=cpu", "--local=gpu", "--repository", str(repository), "--scenario=single,arrivals"]
    assert main(["run", *local, *SHORT, "--out", str(tmp_path), "--name=x", "--capacity=8"]) == 0
    data = json.loads((tmp_path / "x.json").read_text())
    rows = data["rows"]
    single = {row["contender"]: row for row in rows if row["scenario"] == "single" and row["server"] == "cpu"}
    assert list(single) == [OURS, *BASELINES]
    (arrivals,) = (row for row in rows if row["scenario"] == "arrivals" and row["server"] == "cpu")
    assert (arrivals["contender"], arrivals["offered"]) == (OURS, 4)
    assert arrivals["max_requests"] == (8 if gateway.find() else None)  # a second of work
    assert sum(row["wrong"] for row in rows) == 0
    assert single[PADDED]["worst_error"] < 1e-4  # one clip at a time needs no padding
    (agreed,) = (one for one in data["agreement"] if one["a"] == "cpu/ecapa")
    assert agreed["b"] == "SpeechBrain" and agreed["error"] < agreed["bound"] == 1e-4 and agreed["cosine"] > 0.99999
    if "gpu" not in {row["server"] for row in rows}:
        assert "driver" in data["missing"]["gpu"] and data["missing"]["gpu"] in capsys.readouterr().out
    assert data["servers"][0]["models"]["ecapa"]["sha256"]
    assert data["conditions"]["source"] == "mini"


def start_run(url: str, folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], Callable[[str], None]]:
    """A run in a process of its own, and a function that waits for a line of its output with a prefix."""
    words = [sys.executable, "-m", "loadtest", "run", "--target", f"a=grpc://{url}", "--scenario=single", *SHORT]
    words += ["--out", str(folder), "--name=x", *arguments]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(prefix: str) -> None:
        assert process.stdout is not None
        assert any(line.startswith(prefix) for line in process.stdout)

    return process, wait_for


def locust_runs(url: str) -> bool:
    """Whether a process of Locust loads the server."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return any("locustfile" in line and url in line for line in lines)


def test_ctrl_c_still_writes_the_report(server: TritonServer, tmp_path: Path) -> None:
    process, wait_for = start_run(server.grpc_url, tmp_path, "--rounds=20")
    wait_for("[1/")
    while not locust_runs(server.grpc_url):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "interrupted" in err and str(tmp_path / "x.html") in out, err
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["interrupted"] and len(data["rows"]) == 1 and len(data["rows"][0]["audio_per_round"]) >= 1
    assert not locust_runs(server.grpc_url)


def test_a_server_that_dies_costs_its_own_rows_only(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, device="cpu") as dying:
        process, wait_for = start_run(dying.grpc_url, tmp_path)
        wait_for("[1/")
        os.kill(dying.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "x.html").exists(), err
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows[0]["requests"] > 0 and rows[-1]["failed"]
    assert rows[-1]["failed"][:40] in (tmp_path / "x.md").read_text()


@pytest.fixture
def clips(server: TritonServer, reference: Any) -> Clips:
    waveforms = speech([1.0, 1.0, 2.0])
    return Clips(waveforms, np.stack([reference(waveform) for waveform in waveforms]))


def command(url: str, *arguments: object) -> list[str]:
    options = ["--headless", "--only-summary", f"--host=grpc://{url}", "--stop-timeout=20"]
    return [*LOCUST, *options, *map(str, arguments)]


def locust(url: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(url, *arguments), capture_output=True, text=True, timeout=120, cwd="/")


def read_logs(folder: Path) -> list[Sent]:
    """The requests in the logs of Locust's processes, which are removed."""
    logs = list(folder.glob("log.*"))
    requests = [sent for log in logs for sent in load.read_log(log)]
    for log in logs:
        log.unlink()
    return requests


def test_locust_alone_cuts_its_own_clips(server: TritonServer, tmp_path: Path) -> None:
    words = ["--scenario=single", "--seconds=1", "--users=2", "--run-time=6s", "--log", tmp_path / "log"]
    result = locust(server.grpc_url, *words)
    assert result.returncode == 0, result.stderr
    requests = read_logs(tmp_path)
    assert requests and all(one.right and one.audio == 1 for one in requests)


def test_locust_counts_wrong_replies(server: TritonServer, clips: Clips, tmp_path: Path) -> None:
    """The right embeddings pass; those of another clip or of another size do not."""
    path = tmp_path / "clips.npz"
    for embeddings, right in (
        (clips.embeddings, True),
        (np.roll(clips.embeddings, 1, axis=0), False),
        (clips.embeddings[:, :5], False),
    ):
        Clips(clips.waveforms, embeddings).save(path)
        result = locust(server.grpc_url, "--clips", path, "--users=1", "--run-time=2s", "--log", tmp_path / "log")
        requests = read_logs(tmp_path)
        assert requests and all(one.result.startswith("right" if right else "WrongReply") for one in requests)
        assert result.returncode == (0 if right else 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_measured_time_begins_with_the_load_and_ends_within_it(
    server: TritonServer, clips: Clips, tmp_path: Path, processes: int
) -> None:
    clips.save(tmp_path / "clips.npz")
    reached = servers.reach("a", f"grpc://{server.grpc_url}", "ecapa", server.metrics_url)
    level, deck = Level("single", 1.0, users=2), tmp_path / "clips.npz"
    one = load.drive(level, reached, "ecapa", deck, seconds=1.0, warm_up=0.2, processes=processes, max_error=1e-4)
    assert 0 < one.end - one.begin <= 1 and min(sent.start for sent in one.requests) == one.begin - 0.2
    assert max(sent.end for sent in one.requests) > one.end
    assert all(sent.right for sent in one.requests) and one.busy
    assert one.counts["requests"] == one.counts["inferences"] == len(one.requests)


HELD = 12  # more requests than gevent's usual ten threads


class Gate(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Holds the first HELD requests until the gate opens and rejects the others, as Triton does at its limit."""

    def __init__(self) -> None:
        self.lock, self.open = threading.Lock(), threading.Event()
        self.held = self.rejected = 0

    def ModelInfer(self, request: Any, context: Any) -> Any:
        with self.lock:
            hold = self.held < HELD
            self.held, self.rejected = self.held + hold, self.rejected + (not hold)
        if not hold:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        self.open.wait(60)
        reply = service_pb2.ModelInferResponse()
        reply.outputs.add(name="embedding", datatype="FP32", shape=[1, 2])
        reply.raw_output_contents.append(np.ones(2, np.float32).tobytes())
        return reply


@pytest.fixture
def gate() -> Iterator[tuple[Gate, str]]:
    gate, server = Gate(), grpc.server(ThreadPoolExecutor(40))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(gate, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield gate, f"127.0.0.1:{port}"
    gate.open.set()
    server.stop(grace=None).wait()


def test_rejections_are_read_while_more_requests_are_in_flight_than_threads(
    gate: tuple[Gate, str], tmp_path: Path
) -> None:
    held, url = gate
    Clips(speech([0.5, 0.5]), np.ones((2, 2), np.float32)).save(tmp_path / "clips.npz")
    words = ["--clips", tmp_path / "clips.npz", "--log", tmp_path / "log", "--users=24", "--spawn-rate=24"]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command(url, *words, "--run-time=200s"), stdout=output, stderr=output, cwd="/")
    try:
        while held.rejected <= 24:  # a client sends again only after it has read its rejection
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
    finally:
        held.open.set()
        process.terminate()
        process.wait(60)
    assert {one.result.partition(":")[0] for one in read_logs(tmp_path)} == {"right", "Rejected"}


def test_locust_names_what_is_wrong(server: TritonServer) -> None:
    result = locust(server.grpc_url, "--users=1", "--run-time=600s", "--model=nope")
    assert result.returncode == 1 and "nope" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which no server listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    "host, fact",
    [
        (["--host=grpc://{nobody}"], "grpc://{nobody} does not answer"),
        (["--host=http://{nobody}"], "expected grpc://HOST:PORT"),
        ([], "expected grpc://HOST:PORT"),
    ],
)
def test_locust_needs_a_host_that_answers(host: list[str], fact: str, nobody: str) -> None:
    words = [*LOCUST, "--headless", "--run-time=600s", *(word.format(nobody=nobody) for word in host)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd="/")
    (line,) = (line for line in (result.stdout + result.stderr).splitlines() if "INFO" not in line)
    assert result.returncode == 1 and line.startswith("error: ") and fact.format(nobody=nobody) in line


def test_several_processes_of_locust_need_a_host_that_answers(nobody: str) -> None:
    result = locust(nobody, "--processes=2", "--users=2", "--run-time=600s")
    assert result.returncode == 1 and f"grpc://{nobody} does not answer" in result.stderr


def test_the_web_page_starts_a_scenario(server: TritonServer, nobody: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, host = f"http://127.0.0.1:{port}", f"grpc://{server.grpc_url}"
    words = [*LOCUST, f"--host=grpc://{nobody}", "--web-host=127.0.0.1", f"--web-port={port}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)

    def ask(path: str, form: dict[str, object] | None = None) -> Any:
        """The page's reply, once it listens."""
        body = urllib.parse.urlencode(form).encode() if form else None
        while True:
            try:
                return json.load(urllib.request.urlopen(url + path, body, timeout=30))
            except urllib.error.URLError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)

    try:
        form = {"user_count": 2, "spawn_rate": 2, "scenario": "batch", "batch": 4, "seconds": 1.0}
        ask("/swarm", form)
        while not (errors := ask("/stats/requests")["errors"]) or ask("/stats/requests")["state"] != "stopped":
            time.sleep(0.2)
        assert f"{nobody} does not answer" in errors[0]["error"]
        form["host"] = host
        assert ask("/swarm", form)["success"]
        while not any(row["name"] == "batch, 4 x 1 s" for row in ask("/stats/requests")["stats"]):
            time.sleep(0.2)
        assert ask("/stats/requests")["fail_ratio"] == 0
    finally:
        process.terminate()
        process.wait(30)
