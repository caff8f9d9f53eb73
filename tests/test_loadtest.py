"""The measurements run and count right; no time is asserted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import artifacts, checkpoint
from export.packed import PackedEcapa
from loadtest import model, soak
from loadtest.__main__ import main


@pytest.fixture(autouse=True)
def written_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model of these tests is exported by the first that needs it."""

    def write(packed: PackedEcapa, loaded: checkpoint.Checkpoint, path: Path) -> None:
        kept = tmp_path_factory.getbasetemp() / f"{loaded.sha256}.onnx"
        if not kept.exists():
            artifacts.write_onnx(packed, loaded, kept)
        shutil.copy(kept, path)

    monkeypatch.setattr(model, "write", write)
    monkeypatch.setattr(soak, "write", write)


def test_products_of_the_published_size_are_counted() -> None:
    loaded = checkpoint.load("random", channels=1024)
    packed = PackedEcapa(loaded).eval()
    clips = [np.zeros(n, np.float32) for n in (640, 16000)]
    products = model.count_products(packed, clips)
    frames = 5 + 101
    c, hidden = 1024, 128
    assert products == {
        (frames, 5 * 80, c): 1,  # first layer
        (frames, c, c): 6,  # two in each of three blocks
        (frames, 3 * c // 8, c // 8): 21,  # seven in each block
        (frames, 3 * c, 512): 6,  # aggregation, in groups of channels
        (frames, 512, hidden): 6,  # attention
        (frames, hidden, 512): 6,
        (frames, 400, 402): 1,  # Fourier transform
        (frames, 402, 80): 1,  # mel filterbank
    }


@pytest.mark.slow
def test_the_model_benchmark_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "ROWS", {"two": [0.2, 0.5]})
    monkeypatch.setattr(model, "SHORTEST", 0.0)
    path = tmp_path / "figures.json"
    assert main(["model", "--channels", "32", "--rounds", "2", "--threads", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    (row,) = report["rows"]
    assert row["name"] == "two"
    times = row["all_ms"]
    assert row["ratio"] == pytest.approx(np.median(np.divide(times[row["better"]], times["ours"])), rel=1e-2)
    best = times[str(tuple(row["best_product"]))]
    rate = np.prod(row["best_product"]) / 1e9 / np.median(np.divide(best, times["ours"]))
    assert row["fraction"] == pytest.approx(row["gmac"] / rate, rel=1e-2)
    assert report["cpu"] in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "ROWS", {"one": [0.2]})
    monkeypatch.setattr(model, "difference", lambda got, expected: (0.1, 1.0))
    with pytest.raises(RuntimeError, match="wrong results"):
        main(["model", "--channels", "32", "--rounds", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("exported", [True, False])
def test_the_soak_runs(
    exported: bool,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(soak, "LENGTHS", 12)
    figures, drawn = tmp_path / "new" / "figures.json", tmp_path / "new" / "memory.png"
    served = ["--repository", str(repository)] if exported else ["--source", "random", "--channels", "32"]
    load = ["--minutes", "0.1", "--clients", "3", "--hostile", "0.4"]
    assert main(["soak", *served, *load, "--json", str(figures), "--plot", str(drawn)]) == 0
    report = json.loads(figures.read_text())
    assert report["counts"]["requests"] > report["counts"]["hostile"] > 0
    assert report["counts"]["right"] > 0
    assert report["wrong"] == [] and report["errors"] == {}
    assert report["levels_off"] is None  # so short
    assert report["largest_bytes"] >= report["ready_bytes"] > 1e7
    for sample in report["samples"]:
        assert sample["bytes"] == sample["tritonserver"] + sample["model"] + sample["shared"]
    assert drawn.read_bytes().startswith(b"\x89PNG\r\n")
    said = capsys.readouterr().out
    assert "0 wrong" in said and "too short to judge" in said and str(drawn) in said


def test_another_clips_embedding_is_wrong(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = soak.make_clips

    def exchanged(*arguments: Any) -> list[soak.Clips]:
        clips = right(*arguments)
        behind = [*clips[1:], clips[0]]
        return [
            soak.Clips(a.waveforms, b.embeddings[[0] * len(a.waveforms)]) for a, b in zip(clips, behind, strict=True)
        ]

    monkeypatch.setattr(soak, "LENGTHS", 8)
    monkeypatch.setattr(soak, "make_clips", exchanged)
    path = tmp_path / "figures.json"
    load = ["--minutes", "0.05", "--clients", "1", "--hostile", "0", "--json", str(path)]
    assert main(["soak", "--repository", str(repository), *load]) == 1
    assert "embeddings were wrong (in a request)" in capsys.readouterr().err
    assert json.loads(path.read_text())["counts"].keys() == {"requests", "hostile", "wrong"}


@pytest.mark.parametrize("wrong", ["--clients=0", "--clients=2.5", "--hostile=5", "--hostile=nan", "--minutes=abc"])
def test_wrong_options(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["soak", wrong])
    assert f"{wrong.partition('=')[2]}: expected " in capsys.readouterr().err


def test_a_soak_that_could_not_write_does_not_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", "--json", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


MB = 1e6


@pytest.mark.parametrize(
    ("what", "bytes_at", "levels_off"),
    [
        ("level at once", lambda at: 300 * MB, True),
        ("rises, then level", lambda at: min(100 + at, 300) * MB, True),
        ("sinks", lambda at: (900 - at) * MB, True),
        ("a leak of 10 MB a minute", lambda at: (300 + at / 6) * MB, False),
        ("a leak that is small beside 2 GB", lambda at: (2000 + at / 6) * MB, True),
        ("large batches now and then", lambda at: (800 if at % 10 == 0 else 300) * MB, True),
        ("one step up at the end", lambda at: (300 if at < 595 else 900) * MB, True),
        ("a step up that stays", lambda at: (300 if at < 450 else 330) * MB, False),
    ],
)
def test_the_verdict_on_memory(what: str, bytes_at: Callable[[float], float], levels_off: bool) -> None:
    verdict = soak.judge([(float(at), bytes_at(at)) for at in range(0, 601, 2)])
    assert verdict.levels_off is levels_off, verdict
    assert ("GROWS" in str(verdict)) is not levels_off


def test_a_short_run_is_not_judged() -> None:
    verdict = soak.judge([(float(at), (100 + at) * MB) for at in range(0, 179, 2)])
    assert verdict.levels_off is None
    assert "too short to judge" in str(verdict)
