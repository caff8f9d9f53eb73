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
from loadtest.scenarios import MIX, SINGLE
from server import TritonServer

SINGLE_FILES = {f"single_{seconds:g}s.json": seconds for seconds in SINGLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("payload") / "new"
    assert main(["payload", "--out", str(path)]) == 0
    return path


def clips_in(path: Path) -> list[np.ndarray]:
    """The clips that perf_analyzer would send: each entry is one request, as in its documentation."""
    content = json.loads(path.read_text())
    assert list(content) == ["data"]
    clips = []
    for entry in content["data"]:
        assert list(entry) == ["waveform"] and set(entry["waveform"]) == {"content", "shape"}
        clip = np.frombuffer(base64.b64decode(entry["waveform"]["content"]["b64"], validate=True), "<f4")
        assert entry["waveform"]["shape"] == [len(clip)]
        clips.append(clip)
    return clips


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_single_clips(folder: Path, name: str) -> None:
    found = clips_in(folder / name)
    assert len(found) > 1
    for clip, expected in zip(found, speech([SINGLE_FILES[name]] * len(found)), strict=True):
        np.testing.assert_array_equal(clip, expected)


def test_the_mix_has_as_many_clips_of_each_length_as_its_weight(folder: Path) -> None:
    found = clips_in(folder / "mixed.json")
    seconds = [len(clip) / SAMPLE_RATE for clip in found]
    assert Counter(seconds) == MIX
    assert seconds != sorted(seconds)
    for clip, expected in zip(found, speech(seconds), strict=True):
        np.testing.assert_array_equal(clip, expected)
    assert len({clip.tobytes()[-4000:] for clip in found}) == len(found)


def test_the_commands_send_every_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "commands.sh").read_text().splitlines()
    sent = Counter(re.findall(r"--input-data=(\S+)", "\n".join(lines)))
    assert set(sent) == {path.name for path in folder.iterdir()} - {"commands.sh"}
    main(["payload", "--out", str(folder)])
    assert set(lines) <= set(capsys.readouterr().out.splitlines())
    subprocess.run(["sh", "-n", folder / "commands.sh"], check=True)


@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="perf_analyzer is not installed")
@pytest.mark.parametrize(
    "load", ["single_1s.json --concurrency", "mixed.json --concurrency", "mixed.json --request-rate"]
)
def test_perf_analyzer_takes_it(folder: Path, server: TritonServer, load: str) -> None:
    lines = [line for line in payload.commands(server.grpc_url, rounds=1) if f"--input-data={load}" in line]
    result = subprocess.run(shlex.split(lines[-1]), cwd=folder, capture_output=True, text=True, timeout=120)
    assert "Request count: 20\n" in result.stdout and "Throughput: " in result.stdout, result.stdout + result.stderr
