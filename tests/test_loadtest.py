"""The measurements run and count right; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export import checkpoint
from export.packed import PackedEcapa
from loadtest import model
from loadtest.__main__ import main


def test_products_of_the_published_size_are_counted() -> None:
    loaded = checkpoint.load("random", channels=1024)
    packed = PackedEcapa(loaded.classifier, loaded.threshold).eval()
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


def test_the_memory_measurement_runs(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert main(["memory", "--source", "mini", "--seconds", "2", "--clients", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["clips"] > 0
    assert report["largest_bytes"] >= report["after_load_bytes"] > 1e7
