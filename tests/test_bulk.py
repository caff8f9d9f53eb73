"""Bulk embedding: what is asked of the server, what is in the output, and what is left after a run that ends early."""

from __future__ import annotations

import argparse
import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
from ecapa_triton import EcapaError, SpeakerClient, _bulk, _tables, _workfile, audio
from fake_triton import MODEL, SIZE, FakeTriton, fingerprint, good, nan, refuse, slow

SAMPLES = Path(__file__).parents[1] / "samples"
FORMATS = "npz", "parquet"
OTHER = "00000000000000000000beef"
MAIN = """
import argparse, sys
from ecapa_triton import SpeakerClient, _bulk

parser = argparse.ArgumentParser()
_bulk.add_arguments(parser)
parser.set_defaults(long="error", json=False)
arguments = parser.parse_args(sys.argv[2:])
with SpeakerClient(sys.argv[1], max_in_flight=arguments.in_flight) as client:
    sys.exit(_bulk.run(client, arguments))
"""
STUB = """
import resource, sys
import numpy as np
from ecapa_triton import Utterance, _bulk, _workfile

class Client:
    def utterances(self, audios, *, long):
        for audio in audios:
            yield Utterance(np.ones(192, np.float32), 1.0, "model", None)

_workfile.CACHE = 512
for _ in range(2):
    _bulk.embed_files(Client(), [sys.argv[1]], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips whose lengths, 1001 to 1003 samples, tell which of them were asked for."""
    for number, name in enumerate(["a.wav", "b/c.wav", "b/d.wav"], 1):
        write(tmp_path / "clips" / name, number)
    return tmp_path / "clips"


def write(path: Path, number: int = 0, samples: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).uniform(-0.5, 0.5, samples or 1000 + number).astype(np.float32)
    with path.open("wb") as file:
        soundfile.write(file, noise, 16_000, subtype="FLOAT", format="WAV")
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command on the fake server: exit status, standard output, standard error."""

    def run(*given: object, url: str = "") -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        _bulk.add_arguments(parser)
        parser.add_argument("--long", default="error")
        parser.add_argument("--json", action="store_true")
        arguments = parser.parse_args([str(one) for one in given])
        with SpeakerClient(url or fake.url, max_in_flight=arguments.in_flight, retries=0) as client:
            try:
                status = _bulk.run(client, arguments)
            except EcapaError as exc:
                status = 2
                print(f"ecapa-triton: {exc}", file=sys.stderr)
        return status, *capsys.readouterr()

    return run


def asked(fake: FakeTriton) -> list[int]:
    """Which clips were asked for since the last time."""
    numbers = sorted(length - 1000 for length in fake.lengths if length != 640)  # that is silence, for the limits
    fake.lengths.clear()
    return numbers


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of an output of either format, under the names of Parquet's columns."""
    if output.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        found: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
        return [row | {"embedding": np.array(row["embedding"], np.float32)} for row in found]
    with np.load(output, allow_pickle=False) as arrays:
        names = {"path": "files", "seconds": "seconds", "embedding": "embeddings"}
        names |= {"size": "sizes", "stamp": "stamps"}
        columns = [arrays[name] for name in names.values()]
        return [
            dict(zip(names, row, strict=True)) | {"model": str(arrays["model"])} for row in zip(*columns, strict=True)
        ]


def paths(output: Path) -> list[str]:
    return [row["path"] for row in rows(output)]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "clips")


# --- what is in the output ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_are_those_of_the_inputs_in_order(run: Run, folder: Path, tmp_path: Path, suffix: str) -> None:
    last, output = write(tmp_path / "z.wav", 4), tmp_path / f"out.{suffix}"
    status, out, err = run(last, folder, last, "-o", output)
    assert (status, err) == (0, "") and "5 of 5 files embedded, 4 new, 0.3 s of audio in " in out
    a, c, d = folder / "a.wav", folder / "b/c.wav", folder / "b/d.wav"
    assert paths(output) == [str(path) for path in (last, a, c, d, last)]
    for row in rows(output):
        samples, _ = soundfile.read(row["path"], dtype="float32")
        np.testing.assert_array_equal(row["embedding"], fingerprint(samples))
        assert _workfile.stat_of(row["path"]) == _workfile.Stat(row["size"], row["stamp"])
        assert row["seconds"] == pytest.approx(len(samples) / 16_000) and row["model"] == MODEL
    assert left(tmp_path) == [output.name, "z.wav"]


def test_a_file_named_twice_is_asked_for_once(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    run(folder / "a.wav", folder, "-o", tmp_path / "out.npz")
    assert asked(fake) == [1, 2, 3] and len(rows(tmp_path / "out.npz")) == 4


def test_npz_arrays(run: Run, folder: Path, tmp_path: Path) -> None:
    run(folder, "-o", tmp_path / "out.npz", "--long", "windows")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        shapes = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        assert str(arrays["long"]) == "windows"
    longest = len(str(folder / "b/c.wav"))
    assert shapes == {
        "files": (f"<U{longest}", (3,)),
        "seconds": ("<f4", (3,)),
        "embeddings": ("<f4", (3, SIZE)),
        "sizes": ("<i8", (3,)),
        "stamps": ("<i8", (3,)),
        "model": ("<U24", ()),
        "long": ("<U7", ()),
        "folder": ("<U1", ()),  # empty: the paths are absolute
    }


def test_parquet_schema(run: Run, folder: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    run(folder, "-o", tmp_path / "out.parquet")
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert schema.remove_metadata() == pa.schema(
        {
            "path": pa.string(),
            "seconds": pa.float32(),
            "embedding": pa.list_(pa.float32(), SIZE),
            "model": pa.string(),
            "size": pa.int64(),
            "stamp": pa.int64(),
        }
    )
    assert schema.metadata == {b"model": MODEL.encode(), b"long": b"error", b"folder": b""}


def test_parquet_without_pyarrow(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, out, err = run(folder, "-o", tmp_path / "out.parquet")
    assert (status, out) == (2, "") and "pip install 'ecapa-triton[bulk]'" in err
    assert (asked(fake), left(tmp_path)) == ([], [])


def test_more_rows_than_a_batch(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in _tables, _workfile:
        monkeypatch.setattr(module, "BATCH", 2)
    for suffix in FORMATS:
        output = tmp_path / f"out.{suffix}"
        for _ in range(2):
            assert run(folder, folder, "-o", output)[0] == 0
            assert paths(output) == [str(folder / name) for name in ("a.wav", "b/c.wav", "b/d.wav")] * 2
            for row in rows(output):
                expected = fingerprint(soundfile.read(row["path"], dtype="float32")[0])
                np.testing.assert_array_equal(row["embedding"], expected)


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_that_are_not_utf_8(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, suffix: str) -> None:
    odd = write(folder / os.fsdecode(b"caf\xe9 \xc3\xa9.wav"), 4)
    escaped = write(folder / "caf\\xe9.wav", 5)
    output = tmp_path / f"out.{suffix}"
    for again in range(3):
        assert run(folder, "-o", output)[0] == 0
        assert asked(fake) == ([] if again else [1, 2, 3, 4, 5])
        shown = str(odd) if suffix == "npz" else os.fsencode(odd).decode(errors="backslashreplace")
        assert sorted(paths(output))[3:] == sorted([shown, str(escaped)])


# --- what is asked of the server ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_second_run_asks_only_for_what_is_new_or_changed(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"out.{suffix}"
    run(folder, "-o", output)
    before = rows(output)
    asked(fake)
    assert "3 of 3 files embedded, 0 new\n" in run(folder, "-o", output)[1]
    assert asked(fake) == []
    for one, two in zip(rows(output), before, strict=True):
        np.testing.assert_equal(one, two)
    write(folder / "b/c.wav", 7)
    write(folder / "0.wav", 8)
    status, out, _ = run(folder, "-o", output)
    assert (status, asked(fake)) == (0, [7, 8]) and "4 of 4 files embedded, 2 new" in out
    assert [Path(path).name for path in paths(output)] == ["0.wav", "a.wav", "c.wav", "d.wav"]
    assert rows(output)[2]["embedding"][0] == 1007


def test_the_same_size_and_another_time_is_a_change(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    run(folder, "-o", tmp_path / "out.npz")
    asked(fake)
    os.utime(folder / "a.wav", ns=(0, os.stat(folder / "a.wav").st_mtime_ns + 1))
    run(folder, "-o", tmp_path / "out.npz")
    assert asked(fake) == [1]


@pytest.mark.parametrize("moved", ["files", "folders"])
def test_files_that_change_places_are_a_change(run: Run, fake: FakeTriton, tmp_path: Path, moved: str) -> None:
    """Of one size, and with the same times: as an archive leaves clips of one length."""
    one, two = write(tmp_path / "one/a.wav", 1, 2000), write(tmp_path / "two/a.wav", 2, 2000)
    for path in one, two:
        os.utime(path, ns=(0, 10**18))
    output = tmp_path / "out.npz"
    run(one, two, "-o", output)
    a, b = (one, two) if moved == "files" else (one.parent, two.parent)
    a.rename(tmp_path / "aside")
    b.rename(a)
    (tmp_path / "aside").rename(b)
    assert "2 of 2 files embedded, 2 new" in run(one, two, "-o", output)[1]
    for row in rows(output):
        np.testing.assert_array_equal(row["embedding"], fingerprint(soundfile.read(row["path"], dtype="float32")[0]))


@pytest.mark.parametrize("suffix", FORMATS)
def test_relative_paths_mean_nothing_elsewhere(
    run: Run, fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    output = tmp_path / f"out.{suffix}"
    for number, name in enumerate(("one", "two"), 1):
        write(tmp_path / name / "a.wav", number)
        monkeypatch.chdir(tmp_path / name)
        status, _, err = run("a.wav", "-o", output)
        assert status == (0 if name == "one" else 2)
    assert f"the paths in it start from {tmp_path / 'one'}, now they would from {tmp_path / 'two'}: run this" in err
    assert asked(fake) == [1] and paths(output) == ["a.wav"]
    assert run(tmp_path / "two/a.wav", "-o", output)[0] == 0  # an absolute one goes with them
    assert paths(output) == [str(tmp_path / "two/a.wav"), "a.wav"]


@pytest.mark.parametrize("wrong", [np.zeros((3, 10), np.float32), np.full((3, SIZE), np.nan, np.float32)])
def test_an_output_with_embeddings_that_are_none_is_refused(
    run: Run, folder: Path, tmp_path: Path, wrong: np.ndarray
) -> None:
    output = tmp_path / "out.npz"
    run(folder, "-o", output)
    with np.load(output) as arrays:
        damaged = dict(arrays) | {"embeddings": wrong}
    np.savez(output, **damaged)
    before = output.read_bytes()
    status, _, err = run(write(tmp_path / "z.wav", 4), "-o", output)
    assert status == 2 and "embed" in err and output.read_bytes() == before


def test_a_folder_in_the_way_is_named(run: Run, folder: Path, tmp_path: Path) -> None:
    for suffix, words in (".failed.tsv", "cannot be replaced"), (".partial", "cannot be used"):
        (tmp_path / f"out.npz{suffix}").mkdir()
        status, _, err = run(folder, "-o", tmp_path / "out.npz")
        assert status == 2 and f"out.npz{suffix}: {words}" in err and err.count("\n") == 1
        (tmp_path / f"out.npz{suffix}").rmdir()
    assert left(tmp_path) == []


def test_a_server_that_hangs_ends_the_run(run: Run, fake: FakeTriton, tmp_path: Path, monkeypatch: Any) -> None:
    fake.otherwise = refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "late")
    monkeypatch.setattr(_bulk, "MOST_UNANSWERED", 5)
    for number in range(30):
        write(tmp_path / f"clips/{number}.wav", number)
    status, _, err = run(tmp_path / "clips", "-o", tmp_path / "out.npz", "--in-flight", 2)
    assert status == 2 and err.count("no reply from") == 5 and len(fake.lengths) < 15


def test_rows_that_were_not_asked_for_are_kept_at_the_end(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(folder, "-o", output)
    status, out, _ = run(write(tmp_path / "z.wav", 4), folder / "b", "-o", output)
    assert status == 0 and "3 of 3 files embedded, 1 new, 1 kept of earlier runs" in out
    assert [Path(path).name for path in paths(output)] == ["z.wav", "c.wav", "d.wav", "a.wav"]


def test_a_file_that_is_gone_keeps_its_row(run: Run, folder: Path, tmp_path: Path) -> None:
    """A disk that is not mounted must not empty the output."""
    output = tmp_path / "out.npz"
    files = [folder / "a.wav", folder / "b/c.wav"]
    run(*files, "-o", output)
    files[0].unlink()
    status, out, err = run(*files, "-o", output)
    assert status == 2 and "a.wav: is gone" in err and "1 of 2 files embedded, 1 failed" in out
    assert [Path(path).name for path in paths(output)] == ["c.wav", "a.wav"]


def test_a_changed_file_that_fails_loses_its_row(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(folder, "-o", output)
    (folder / "a.wav").write_text("no audio")
    assert run(folder, "-o", output)[0] == 2
    assert [Path(path).name for path in paths(output)] == ["c.wav", "d.wav"]


def test_a_file_that_changes_while_it_is_embedded(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    def rewrite(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        if len(waveform) == 1001:
            write(folder / "a.wav", 9)
        return good(fake, waveform)

    fake.otherwise = rewrite
    status, out, err = run(folder, "-o", tmp_path / "out.npz")
    assert status == 2 and "a.wav: changed while it was embedded" in err and "2 of 3" in out
    asked(fake)
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 0
    assert asked(fake) == [9] and rows(tmp_path / "out.npz")[0]["embedding"][0] == 1009


# --- one output, one model ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_another_model_is_refused(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    run(folder / "b", "-o", output)
    before = output.read_bytes()
    fake.model = lambda fake: OTHER
    status, out, err = run(folder, "-o", output)
    assert (status, out) == (2, "") and err.count("\n") == 1
    for word in (MODEL, OTHER, "choose another output, or start anew with --replace"):
        assert word in err
    assert output.read_bytes() == before and left(tmp_path) == [output.name]
    assert run(folder, "-o", output, "--replace")[0] == 0
    assert {row["model"] for row in rows(output)} == {OTHER} and len(rows(output)) == 3


def test_a_model_that_changes_during_the_run(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    fake.model = lambda fake: MODEL if len(fake.lengths) < 3 else OTHER
    status, out, err = run(folder, "-o", tmp_path / "out.npz", "--in-flight", 1)
    assert (status, out) == (2, "") and MODEL in err and OTHER in err and "2 finished files are kept in" in err
    asked(fake)
    fake.model = lambda fake: MODEL
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 0
    assert asked(fake) == [3] and {row["model"] for row in rows(tmp_path / "out.npz")} == {MODEL}


def test_replacing_goes_on_without_replace(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(folder, "-o", output)
    fake.model = lambda fake: OTHER
    fake.answers = [good, good, refuse(grpc.StatusCode.UNAVAILABLE, "gone")]
    status, _, err = run(folder, "-o", output, "--replace", "--in-flight", 1)
    assert status == 2 and "and the same command goes on without --replace" in err
    asked(fake)
    assert run(folder, "-o", output)[0] == 0
    assert asked(fake) == [3] and {row["model"] for row in rows(output)} == {OTHER}


@pytest.mark.parametrize("suffix", FORMATS)
def test_ways_of_embedding_long_clips_do_not_mix(run: Run, folder: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    long = write(folder / "long.wav", samples=31 * 16_000)
    assert run(folder, "-o", output)[0] == 2
    assert run(folder, "-o", output, "--long", "windows")[0] == 0  # there was none yet
    for other in "error", "truncate":
        status, _, err = run(folder, "-o", output, "--long", other)
        assert status == 2 and f"embedded with long=windows, now it is {other}" in err
    assert str(long) in paths(output) and left(tmp_path) == [output.name]


@pytest.mark.parametrize(
    "name", ["notes.txt", "other.npz", "cut.npz", "old.npz", "wide.npz", "uneven.npz", "other.parquet", "cut.parquet"]
)
def test_an_output_of_something_else_is_refused(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, name: str
) -> None:
    output = tmp_path / name
    if name.startswith("cut"):
        run(folder, "-o", output)
        output.write_bytes(output.read_bytes()[:-40])
    elif name == "old.npz":
        np.savez(output, files=["a"], seconds=np.ones(1, np.float32), embeddings=np.ones((1, SIZE), np.float32))
    elif name in ("wide.npz", "uneven.npz"):
        run(folder, "-o", output)
        arrays = dict(np.load(output))
        changed = {"wide.npz": arrays["embeddings"].astype(np.float64), "uneven.npz": arrays["embeddings"][:2]}
        np.savez(output, **(arrays | {"embeddings": changed[name]}))
    elif name == "other.parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table({"a": [1]}), output)
    else:
        output.write_text("important")
    before = output.read_bytes()
    asked(fake)
    status, out, err = run(folder, "-o", output)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "is there, and not what this command writes" in err
    assert (output.read_bytes(), asked(fake), left(tmp_path)) == (before, [], [name])
    assert run(folder, "-o", output, "--replace")[0] == 0 and len(rows(output)) == 3


# --- what fails ---


def test_failures_are_listed_and_tried_again(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    (folder / "b/bad\t.wav").write_text("no audio")
    write(folder / "short.wav", samples=100)
    output = tmp_path / "out.npz"
    fake.answers = [refuse(grpc.StatusCode.INTERNAL, "for once")]
    status, out, err = run(folder, "-o", output, "--in-flight", 1)
    assert status == 2 and f"2 of 5 files embedded, 3 failed ({output}.failed.tsv), 2 new" in out
    assert err.count("ecapa-triton: ") == err.count("\n") == 3
    with open(f"{output}.failed.tsv", newline="") as file:
        listed = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [line[:2] for line in listed] == [
        ["path", "error"],
        [str(folder / "a.wav"), "ServerError"],
        [str(folder / "b/bad\\t.wav"), "NotAudioError"],
        [str(folder / "short.wav"), "TooShortError"],
    ]
    assert listed[0][2] == "reason" and "for once" in listed[1][2] and listed[2][2].startswith("starts with b'no a'")
    asked(fake)
    assert "3 of 5 files embedded, 2 failed" in run(folder, "-o", output)[1]
    assert asked(fake) == [1]
    (folder / "b/bad\t.wav").unlink()
    (folder / "short.wav").unlink()
    assert run(folder, "-o", output)[0] == 0 and left(tmp_path) == ["out.npz"]


def test_nothing_embedded_is_no_output(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    fake.otherwise = nan
    status, out, _ = run(folder, "-o", tmp_path / "out.npz")
    assert status == 2 and "0 of 3 files embedded, 3 failed" in out
    assert left(tmp_path) == ["out.npz.failed.tsv"]


def test_a_server_away_stops_the_run_with_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    status, out, err = run(folder, "-o", tmp_path / "out.npz", url="127.0.0.1:9")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "no Triton answers at 127.0.0.1:9" in err
    assert left(tmp_path) == []


def test_a_server_that_goes_away_loses_nothing(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    fake.answers = [good, good, refuse(grpc.StatusCode.UNAVAILABLE, "gone")]
    status, out, err = run(folder, "-o", tmp_path / "out.npz", "--in-flight", 1)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"2 finished files are kept in {tmp_path}/out.npz.partial, and the same command goes on" in err
    asked(fake)
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 0
    assert asked(fake) == [3] and left(tmp_path) == ["out.npz"]


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(_bulk, "write_npz", full)
        status, out, err = run(folder, "-o", tmp_path / "out.npz")
    assert (status, out) == (2, "") and "No space left on device" in err and "3 finished files are kept" in err
    assert left(tmp_path) == ["out.npz.partial"]
    asked(fake)
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 0 and asked(fake) == []


def test_a_damaged_work_file_is_told(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.npz.partial").write_bytes(b"no database" * 1000)
    status, _, err = run(folder, "-o", tmp_path / "out.npz")
    assert status == 2 and err.count("\n") == 1 and "out.npz.partial: cannot be used" in err


# --- runs that end early ---


def start(fake: FakeTriton, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, fake.url, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hold_back(fake: FakeTriton, after: int) -> None:
    """Answer for the clips before this number, not for a while for those from it."""
    fake.otherwise = lambda fake, waveform: (good if len(waveform) - 1000 < after else slow(20))(fake, waveform)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def many(folder: Path, count: int) -> Path:
    for number in range(count):
        write(folder / f"{number:03}.wav", number)
    return folder


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed(run: Run, fake: FakeTriton, tmp_path: Path, suffix: str) -> None:
    """What was done more than a second before is not asked for again."""
    folder, output = many(tmp_path / "clips", 40), tmp_path / f"out.{suffix}"
    hold_back(fake, after=30)
    process = start(fake, folder, "-o", output, "--in-flight", 4)
    wait_for(lambda: len(fake.lengths) == 34)
    time.sleep(2 * _workfile.COMMIT_EVERY)
    process.kill()
    process.communicate()
    assert not output.exists() and (tmp_path / f"{output.name}.partial").exists()
    fake.otherwise = good
    asked(fake)
    status, out, err = run(folder, "-o", output)
    assert (status, err) == (0, "") and "40 of 40 files embedded, 10 new" in out
    assert asked(fake) == list(range(30, 40)) and left(tmp_path) == [output.name]
    assert [row["embedding"][0] for row in rows(output)] == [1000 + number for number in range(40)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(run: Run, fake: FakeTriton, tmp_path: Path, number: signal.Signals, status: int) -> None:
    folder, output = many(tmp_path / "clips", 12), tmp_path / "out.npz"
    hold_back(fake, after=6)
    process = start(fake, folder, "-o", output, "--in-flight", 2)
    wait_for(lambda: len(fake.lengths) == 8)
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    kept = f"6 finished files are kept in {output}.partial, and the same command goes on"
    assert (process.returncode, out, err) == (status, "", f"ecapa-triton: interrupted: {kept}\n")
    fake.otherwise = good
    asked(fake)
    assert run(folder, "-o", output)[0] == 0 and asked(fake) == list(range(6, 12))


def test_interrupted_before_the_first_is_quiet(fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    hold_back(fake, after=0)
    process = start(fake, folder, "-o", tmp_path / "out.npz")
    wait_for(lambda: len(fake.lengths) == 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (130, "", "") and left(tmp_path) == []


def test_two_runs_at_once(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    fake.otherwise = slow(1.5)
    process = start(fake, folder, "-o", output)
    wait_for(lambda: len(fake.lengths) == 3)
    for options in [], ["--replace"]:
        status, out, err = run(folder, "-o", output, *options)
        assert (status, out) == (2, "") and err.count("\n") == 1 and "another run is at work on it" in err
    assert process.wait(20) == 0 and len(rows(output)) == 3 and left(tmp_path) == ["out.npz"]
    process.communicate()


# --- memory ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, suffix: str) -> None:
    """The embeddings of 7,000 files alone would take 5 MB."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    allocators = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}  # that give back what is freed
    peaks = []
    for count in 3_000, 10_000:
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.mknod(folder / f"{number}.wav")
        command = [sys.executable, "-c", STUB, str(folder), str(tmp_path / f"{count}.{suffix}")]
        peaks.append(float(subprocess.check_output(command, env=os.environ | allocators).splitlines()[-1]))
    assert peaks[1] - peaks[0] < 4.5  # MB


# --- what is given ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "\ufeffa.wav\r\n\n# b/x.wav\nb/c.wav"),
        ("list.LST", "a.wav\nb/c.wav\n"),
        ("list.csv", 'ID,wav,start\n1,a.wav,0\n"2, so",b/c.wav,0.0\n'),
        ("list.tsv", 'client\tpath\tsentence\n1\ta.wav\t"an open quote\n2\tb/c.wav\tnone\n'),
        ("list.jsonl", '{"audio_filepath": "a.wav", "offset": 0}\n\n{"audio_filepath": "b/c.wav"}\n'),
        ("list.json", '{"filename": "a.wav"}\n{"file": "b/c.wav"}\n'),
    ],
)
def test_lists(run: Run, folder: Path, tmp_path: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert run(folder / name, "-o", tmp_path / "out.npz")[0] == 0
    assert paths(tmp_path / "out.npz") == [str(folder / "a.wav"), str(folder / "b/c.wav")]
    moved = tmp_path / name
    (folder / name).rename(moved)
    assert run(moved, "--root", folder, "-o", tmp_path / "out.npz")[1].count("2 of 2 files embedded, 0 new") == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("list.csv", "id,sound\n1,a.wav\n", "list.csv:1: has id, sound: expected one of path, file, wav"),
        ("list.csv", "", "list.csv:1: has nothing"),
        ("list.csv", "id,path\n1,a.wav\n\n2\n", "list.csv:4: has 1 columns, expected 2"),
        ("list.csv", "id,path\n1,\n", "list.csv:2: '' is no path"),
        ("list.csv", 'id,path\n1,"a.wav"b\n', "list.csv: cannot be read"),
        ("list.jsonl", '{"path": "a.wav"}\n["a.wav"]\n', "list.jsonl:2: is a list: expected an object"),
        ("list.jsonl", '{"path": "a.wav"}\na.wav\n', "list.jsonl:2: is not JSON"),
        ("list.jsonl", '{"path": 1}', "list.jsonl:1: the path is 1: expected a string"),
        ("list.jsonl", '{"path": "a\\u0000b"}', "list.jsonl:1: 'a\\x00b' is no path"),
        ("list.jsonl", '{"path": "a\\ud800"}', "list.jsonl:1: 'a\\ud800' is no path"),
        ("list.jsonl", '{"path": "a.wav", "offset": 1.5}', "offset is 1.5, a segment of a file"),
        ("list.txt", None, "list.txt: cannot be read (No such file or directory)"),
        ("list.txt", "# nothing\n", "no audio files were given"),
    ],
)
def test_wrong_lists(run: Run, fake: FakeTriton, tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    (tmp_path / "results").mkdir()
    status, out, err = run(tmp_path / name, "-o", tmp_path / "results/out.npz")
    assert (status, out) == (2, "") and err.count("\n") == 1 and words in err
    assert fake.lengths == [] and left(tmp_path / "results") == []


@pytest.mark.parametrize(("end", "options"), [(b"\n", []), (b"\r\n", []), (b"\0", ["--null"])])
def test_standard_input(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, options: list[str]
) -> None:
    line_break = write(folder / "two\nlines.wav", 4)
    given = [folder / "b/c.wav", folder / "a.wav", *[line_break] * bool(options)]
    with (tmp_path / "given").open("w+b") as file:
        file.write(end.join(map(os.fsencode, given)))
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert run("-", "-o", tmp_path / "out.npz", *options)[0] == 0
    assert paths(tmp_path / "out.npz") == [str(path) for path in given]


def test_folders(run: Run, folder: Path, tmp_path: Path) -> None:
    for name in ".hidden.wav", ".hidden/e.wav", "notes.txt", "b/c.wav.bak":
        write(folder / name)
    write(folder / "b.wav", 5)
    write(folder / "E.FLAC", 6)
    write(tmp_path / "elsewhere/f.opus", 7)
    (folder / "b/link").symlink_to(tmp_path / "elsewhere")
    (folder / "b/up").symlink_to(folder)
    (folder / "b/gone.wav").symlink_to(tmp_path / "nothing")
    output = tmp_path / "out.npz"
    status, out, err = run(folder, "-o", output)
    assert status == 2 and err.count("\n") == 1 and "gone.wav: cannot be opened" in err
    names = [os.path.relpath(path, folder) for path in paths(output)]
    assert names == ["E.FLAC", "a.wav", "b.wav", "b/c.wav", "b/d.wav", "b/link/f.opus"]
    assert (
        run(folder)[1].splitlines() != []
        and [os.path.relpath(line.split("  ")[0], folder) for line in run(folder)[1].splitlines()] == names
    )


def test_a_folder_that_cannot_be_listed(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: str) -> Any:
        if path.endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path)

    really = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    status, out, err = run(folder, "-o", tmp_path / "out.npz")
    assert (
        status == 2 and "/b: cannot be listed (Permission denied)" in err and "1 of 1 files embedded, 1 failed" in out
    )


# --- what is shown ---


def test_lines_without_an_output(run: Run, fake: FakeTriton, folder: Path) -> None:
    (folder / "b/c.wav").write_text("no audio")
    fake.answers = [refuse(grpc.StatusCode.INTERNAL, "for once")]
    status, out, err = run(folder, folder / "a.wav", "--json", "--in-flight", 1)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [line["file"] for line in lines] == [str(folder / "b/d.wav"), str(folder / "a.wav")]
    assert lines[1]["model"] == MODEL and lines[1]["embedding"][0] == 1001
    first, second = err.splitlines()
    assert first.startswith(f"ecapa-triton: {folder}/a.wav: the server") and "c.wav: starts with" in second
    assert f"{folder}/a.wav  0.06 s  192 dims  norm" in run(folder / "a.wav")[1]


def test_the_summary_as_json(run: Run, folder: Path, tmp_path: Path) -> None:
    summary = json.loads(run(folder, "-o", tmp_path / "out.npz", "--json")[1])
    assert 0 < summary.pop("elapsed") < 20 and summary.pop("audio") == pytest.approx(3006 / 16_000)
    counts = {"files": 3, "embedded": 3, "failed": 0, "new": 3, "kept": 0}
    assert summary == {"output": str(tmp_path / "out.npz"), **counts}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_on_a_terminal(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_rich: bool
) -> None:
    if with_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(_bulk, "REFRESH_EVERY", 0)
    run(folder / "a.wav", "-o", tmp_path / "out.npz")
    monkeypatch.setattr(sys, "stderr", Terminal())
    (folder / "b/cc [x].wav").write_text("no audio")
    fake.otherwise = slow(0.2)
    assert run(folder, "-o", tmp_path / "out.npz", "--in-flight", 1)[0] == 2
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "4 of 4 files, 1 failed, " in shown and ("2 of 4 files, 0 failed, " in shown or with_rich)
    assert " files/s, " in shown and "s of audio a second, 0:00:00 left" in shown
    assert ("━" in shown) == with_rich
    [failure] = re.findall(r"(?:^|[\r\n]|\x1b\[2K)(ecapa-triton: .*?)\r?\n", shown)
    assert failure.startswith(f"ecapa-triton: {folder}/b/cc [x].wav: starts with")


def test_progress_elsewhere_is_a_line_now_and_then(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, "-o", tmp_path / "out.npz")[2] == ""
    monkeypatch.setattr(_bulk, "REPORT_EVERY", 0)
    lines = run(folder, "-o", tmp_path / "out.npz", "--replace")[2].splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"ecapa-triton: {tmp_path}/out.npz: 2 of 3 files, 0 failed, ")


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_wrong_in_flight(run: Run, folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        run(folder, "--in-flight", text)
    assert f"'{text}': expected a whole number, 1 or more" in capsys.readouterr().err


# --- the real server ---


@pytest.mark.parametrize("suffix", FORMATS)
def test_served(
    run: Run, server: Any, reference: Callable[[np.ndarray], np.ndarray], tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"out.{suffix}"
    status, out, err = run(SAMPLES, "-o", output, url=server.grpc_url)
    assert (status, err) == (0, "") and "6 of 6 files embedded, 6 new" in out
    for row in rows(output):
        expected = reference(audio.read(row["path"], max_samples=30 * 16_000).waveform)
        assert np.linalg.norm(row["embedding"] - expected) <= 1e-4 * np.linalg.norm(expected)
    assert "6 of 6 files embedded, 0 new" in run(SAMPLES, "-o", output, url=server.grpc_url)[1]
