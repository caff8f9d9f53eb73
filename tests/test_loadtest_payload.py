"""Input data and commands for perf_analyzer; where that is installed, it takes both."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ecapa_triton.audio import SAMPLE_RATE

from loadtest import payload
from loadtest.__main__ import main
from loadtest.clips import speech
from loadtest.scenarios import MIX
from server import TritonServer

FILES = {"single_1s.json": {1: 8}, "single_5s.json": {5: 8}, "single_10s.json": {10: 8}, "mixed.json": MIX}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("payload") / "new"
    assert main(["payload", "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_files_hold_the_clips_of_the_load_test(folder: Path, name: str) -> None:
    (entries,) = json.loads((folder / name).read_text()).values()
    clips = []
    for entry in entries:  # each is one request, as in perf_analyzer's documentation
        clips.append(np.frombuffer(base64.b64decode(entry["waveform"]["content"]["b64"], validate=True), "<f4"))
        assert entry["waveform"]["shape"] == [len(clips[-1])]
    seconds = [len(clip) / SAMPLE_RATE for clip in clips]
    assert Counter(seconds) == FILES[name]
    for clip, expected in zip(clips, speech(seconds), strict=True):
        np.testing.assert_array_equal(clip, expected)


def test_the_commands_send_every_file(folder: Path) -> None:
    sent = re.findall(r"--input-data=(\S+)", (folder / "commands.sh").read_text())
    assert Counter(sent) == dict.fromkeys(FILES, 2)
    subprocess.run(["sh", "-n", folder / "commands.sh"], check=True)


@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="perf_analyzer is not installed")
@pytest.mark.parametrize("name", FILES)
def test_perf_analyzer_takes_it(folder: Path, server: TritonServer, name: str) -> None:
    words = shlex.split(payload.command(name, 2, server.grpc_url, seconds=6))
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    found = re.search(r"Throughput: ([\d.]+) infer/sec.*Avg gRPC time: (\d+) usec", result.stdout, re.DOTALL)
    assert found, result.stdout + result.stderr
    rate, latency = float(found[1]), int(found[2]) * 1e-6  # s
    assert rate * latency == pytest.approx(2, rel=0.15)  # two clients, always one request of each in flight
