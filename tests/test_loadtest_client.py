"""`python -m loadtest client` on real tritonservers, shortly; no time is asserted."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tritonclient.utils import InferenceServerException

from loadtest import client
from loadtest.__main__ import main
from loadtest.local import Local
from loadtest.target import Target
from server import gateway
from server.triton import TritonServer

SHORT = ["--clips=9", "--rounds=1", "--seconds=0.1", "--in-flight=3"]
WAYS = [client.NGINX] * bool(gateway.find()) + [client.DIRECT, client.SHARED]
LEVELS = "640 kB", "320 kB", "one", "eight"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SHORTEST", 0.5)


def read(folder: Path) -> tuple[Any, str]:
    (figures,), (page,) = folder.glob("*-client.json"), folder.glob("*-client.md")
    return json.loads(figures.read_text()), page.read_text()


def ways(data: Any) -> Iterator[tuple[str, str, Any]]:
    for one in [data["ways"]["warm_up"], *data["ways"]["rounds"]]:
        yield from ((level, way, row) for level, rows in one.items() for way, row in rows.items())


@pytest.mark.slow
def test_both_questions_are_answered(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "--repository", str(repository), *SHORT, "--out", str(tmp_path)]) == 0
    data, page = read(tmp_path)
    bulk = data["bulk"]
    assert (bulk["clips"], bulk["files"], bulk["in_flight"]) == (9, 6, 3)
    (one,) = bulk["rounds"]
    assert one["command"]["compared"] == 9 and one["generator"]["compared"] > 0
    assert one["command"]["started_clips_per_s"] > one["command"]["clips_per_s"] > 0 < one["command"]["start_s"]
    assert one["command"]["audio_per_s"] / one["command"]["clips_per_s"] == pytest.approx(bulk["audio_s"] / 9)
    for row in one.values():
        assert 1 <= row["mean_batch"] <= 3 and row["cpu_ms_per_clip"] > 0.1
    assert [(level, way) for level, way, _ in ways(data)] == 2 * list(product(LEVELS, WAYS))
    for level, _, row in ways(data):
        assert row["wrong"] == 0 and row["compared"] >= (client.CLIENTS if level == "eight" else 1)
        assert row["clips_per_s"] > 0
    assert all(row["p50_ms"] > 0 for level in data["ways"]["rounds"][0].values() for row in level.values())
    compared = 9 + sum(row["compared"] for row in [*one.values(), *(row for _, _, row in ways(data))])
    assert f"{compared:,} replies compared with SpeechBrain, none wrong" in page and page in capsys.readouterr().out

    rounds = {"audio_per_s": (80.0, 45.0, 99.0), "started_audio_per_s": (94.0, 48.0, 99.0)}  # a machine with two speeds
    bulk["rounds"] = [deepcopy(one) for _ in range(3)]
    for number, changed in enumerate(bulk["rounds"]):
        changed["command"] |= {name: values[number] for name, values in rounds.items()}
        changed["generator"]["audio_per_s"] = (100.0, 50.0, 100.0)[number]
    page = client.markdown(data)
    assert "| 0.90 [0.80, 0.99] |" in page and "| 0.96 [0.94, 0.99] |" in page and ": reached." in page
    for changed in bulk["rounds"]:
        changed["command"]["started_audio_per_s"] *= 0.98
    assert ": not reached." in client.markdown(data)


@pytest.mark.slow
def test_wrong_replies_are_seen_on_every_way_and_fail_the_run(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = Local.reference
    monkeypatch.setattr(Local, "reference", lambda *about: np.roll(right(*about), 1, axis=0))
    monkeypatch.setattr(client.shm, "set_shared_memory_region", lambda *about: None)  # what was there is sent: zeros
    assert main(["client", "--repository", str(repository), *SHORT, "--out", str(tmp_path)]) == 1
    data, page = read(tmp_path)
    rows = [row for one in [data["bulk"]["warm_up"], *data["bulk"]["rounds"]] for row in one.values()]
    assert len(rows) == 3 and all(row["wrong"] == row["compared"] > 0 for row in rows)
    for level, way, row in ways(data):
        assert row["wrong"] == (0 if "kB" in level and way != client.SHARED else row["compared"]), (level, way)
    total = sum(row["wrong"] for row in [*rows, *(row for _, _, row in ways(data))])
    assert f"**{total:,} WRONG**" in page and "clips/s" not in page
    assert f"error: {total} replies were WRONG" in capsys.readouterr().err


def test_a_server_that_is_there_is_compared_with_its_own_replies(server: TritonServer, tmp_path: Path) -> None:
    target = ["--target", f"grpc://{server.grpc_url}"]
    assert main(["client", *target, *SHORT, "--clips=2", "--out", str(tmp_path)]) == 0
    data, page = read(tmp_path)
    assert data["bulk"]["files"] == data["bulk"]["clips"] == 2 and data["ways"] is None
    assert data["references"] == "the first replies" and "## Ways" not in page and server.grpc_url in page


@pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")
def test_the_way_through_nginx_is_one(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Callable[[Any], Any]
) -> None:
    one = gateway.Limits(requests=1)
    monkeypatch.setattr(gateway, "Limits", lambda requests: one)
    options = Namespace(seconds=0.1, rounds=1)
    target = Target("here", f"grpc://{server.grpc_url}", "", local=server)
    with pytest.raises(InferenceServerException, match="1 requests are in flight"):  # eight clients are too many for it
        client.measure_ways(options, tmp_path, target, "ecapa", 1e-4, lambda clips: np.stack([*map(reference, clips)]))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--target=grpc://127.0.0.1:9"], "does not answer"),
        (["--target=http://127.0.0.1:9"], "expected grpc://HOST:PORT"),
        (["--repository=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_run(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["client", *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_audio_that_cannot_be_used(server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    command = ["client", "--target", f"grpc://{server.grpc_url}", *SHORT, "--audio", str(audio)]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "has no audio files" in capsys.readouterr().err
    (audio / "a.wav").write_bytes(b"no audio")
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "a.wav: starts with b'no a'" in capsys.readouterr().err
    soundfile.write(audio / "a.wav", np.random.default_rng(0).normal(scale=0.1, size=31 * 16_000), 16_000)
    assert main([*command, "--clips=1", "--out", str(tmp_path)]) == 1
    assert "000000-a.wav: 31.0 s long" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-client.*"))
