"""Helpers and fixtures of the tests of `ecapa-triton embed`: files to embed, runs on the fake server, rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from ecapa_triton._cli import main
from fake_triton import FakeTriton, fingerprint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips whose lengths, 1001 to 1003 samples, tell which of them were requested."""
    for number, name in enumerate(["a.wav", "b/c.wav", "b/d.wav"], 1):
        write(tmp_path / "clips" / name, number)
    return tmp_path / "clips"


@pytest.fixture(params=["npz", "parquet"])
def output(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An output in each format."""
    return tmp_path / f"out.{request.param}"


def write(path: Path, number: int = 0, samples: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).uniform(-0.5, 0.5, samples or 1000 + number).astype(np.float32)
    with path.open("wb") as file:
        soundfile.write(file, noise, 16_000, subtype="FLOAT", format="WAV")
    return path


def many(folder: Path, count: int) -> Path:
    for number in range(count):
        write(folder / f"{number:03}.wav", number)
    return folder


@pytest.fixture
def run(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command on the fake server: exit status, standard output, standard error."""

    def run(*given: object, url: str = "") -> tuple[int, str, str]:
        status = main(["embed", *map(str, given), "--url", url or fake.url, "--retries", "0"])
        return status, *capsys.readouterr()

    return run


def requested(fake: FakeTriton) -> list[int]:
    """The numbers of the clips that were requested since the last time."""
    numbers = sorted(length - 1000 for length in fake.lengths if length != 640)  # that is silence, for the limits
    fake.lengths.clear()
    return numbers


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of an output of either format, under the names of Parquet's columns."""
    if output.suffix == ".parquet":
        from pyarrow import parquet  # only where it is installed

        found: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
        return [row | {"embedding": np.array(row["embedding"], np.float32)} for row in found]
    with np.load(output, allow_pickle=False) as arrays:
        names = {"path": "files", "seconds": "seconds", "embedding": "embeddings", "size": "sizes", "stamp": "stamps"}
        columns = [arrays[name] for name in names.values()]
        return [
            dict(zip(names, row, strict=True)) | {"model": str(arrays["model"])} for row in zip(*columns, strict=True)
        ]


def names(output: Path) -> list[str]:
    return [Path(row["path"]).name for row in rows(output)]


def check_embeddings(output: Path) -> None:
    expected: dict[str, np.ndarray] = {}
    for row in rows(output):
        path = row["path"]
        if path not in expected:
            expected[path] = fingerprint(soundfile.read(path, dtype="float32")[0])
        np.testing.assert_array_equal(row["embedding"], expected[path])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "clips")


def one_error(result: tuple[int, str, str], *facts: object) -> None:
    status, out, err = result
    assert (status, out) == (2, "") and err.startswith("ecapa-triton: ") and err.count("\n") == 1, result
    for fact in facts:
        assert str(fact) in err
