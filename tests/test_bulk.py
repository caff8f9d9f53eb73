"""Bulk embedding, `ecapa-triton embed`: requests, output, and what a run that ends early leaves to the next one."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
from ecapa_triton import audio
from ecapa_triton._cli import main
from fake_triton import MODEL, SIZE, FakeTriton, fingerprint, good, nan, refuse

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SAMPLES = Path(__file__).parents[1] / "samples"
OTHER = "00000000000000000000beef"
COMMAND = [sys.executable, "-c", "import sys; from ecapa_triton._cli import main; sys.exit(main())", "embed"]
FAST = """
import resource, sys
import numpy as np
from ecapa_triton import SpeakerClient, Utterance, _cli

class Client(SpeakerClient):
    def utterances(self, audios, *, long):
        for audio in audios:
            yield Utterance(np.ones(192, np.float32), 1.0, "model", None)

_cli.SpeakerClient = Client
for _ in range(2):
    assert _cli.main(["embed", *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

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


# --- the output ---


def test_rows_are_those_of_the_inputs_in_order(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path
) -> None:
    last = write(tmp_path / "z.wav", 4)
    status, out, err = run(last, folder, last, "-o", output)
    assert (status, err) == (0, "") and "5 of 5 files embedded, 4 new, 0.3 s of audio in " in out
    assert requested(fake) == [1, 2, 3, 4]
    a, c, d = folder / "a.wav", folder / "b/c.wav", folder / "b/d.wav"
    assert [row["path"] for row in rows(output)] == [str(path) for path in (last, a, c, d, last)]
    check_embeddings(output)
    for row in rows(output):
        assert row["size"] == os.stat(row["path"]).st_size and row["model"] == MODEL
        assert row["seconds"] == pytest.approx(soundfile.info(row["path"]).duration)
    assert left(tmp_path) == [output.name, "z.wav"]


def test_npz_arrays(run: Run, folder: Path, tmp_path: Path) -> None:
    run(folder, "-o", tmp_path / "out.npz", "--long", "windows")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        shapes = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        assert str(arrays["long"]) == "windows"
    assert shapes == {
        "files": (f"<U{len(str(folder / 'b/c.wav'))}", (3,)),
        "seconds": ("<f4", (3,)),
        "embeddings": ("<f4", (3, SIZE)),
        "sizes": ("<i8", (3,)),
        "stamps": ("<i8", (3,)),
        "model": ("<U24", ()),
        "long": ("<U7", ()),
        "folder": ("<U1", ()),  # empty: the paths are absolute
    }


def test_parquet_schema(run: Run, folder: Path, tmp_path: Path) -> None:
    run(folder, "-o", tmp_path / "out.parquet")
    schema = parquet.read_schema(tmp_path / "out.parquet")
    columns = {
        "path": pyarrow.string(),
        "seconds": pyarrow.float32(),
        "embedding": pyarrow.list_(pyarrow.float32(), SIZE),
        "model": pyarrow.string(),
        "size": pyarrow.int64(),
        "stamp": pyarrow.int64(),
    }
    assert schema.remove_metadata() == pyarrow.schema(columns)
    assert schema.metadata == {b"model": MODEL.encode(), b"long": b"error", b"folder": b""}


def test_an_output_needs_pyarrow(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    one_error(run(folder, "-o", output), "pip install 'ecapa-triton[bulk]'")
    assert (requested(fake), left(tmp_path)) == ([], [])
    assert run(folder)[0] == 0


def test_thousands_of_rows(run: Run, folder: Path, output: Path) -> None:
    """More than are written at a time, and in another order the second time."""
    for inputs in [folder] * 800, [folder / "b/d.wav", *[folder] * 800]:
        assert run(*inputs, "-o", output)[0] == 0
        assert names(output)[-2400:] == ["a.wav", "c.wav", "d.wav"] * 800
        check_embeddings(output)
    assert len(rows(output)) == 2401


def test_names_that_are_not_utf_8(run: Run, fake: FakeTriton, folder: Path, output: Path) -> None:
    odd = write(folder / os.fsdecode(b"caf\xe9 \xc3\xa9.wav"), 4)
    shown = str(odd).encode(errors="backslashreplace").decode()
    for again in range(3):
        assert run(folder, "-o", output)[0] == 0
        assert requested(fake) == ([] if again else [1, 2, 3, 4])
        assert rows(output)[-1]["path"] == shown


# --- what a later run requests ---


def test_a_second_run_embeds_what_is_new_or_changed(run: Run, fake: FakeTriton, folder: Path, output: Path) -> None:
    run(folder, "-o", output)
    before = rows(output)
    requested(fake)
    assert "3 of 3 files embedded, 0 new\n" in run(folder, "-o", output)[1] and requested(fake) == []
    for one, two in zip(rows(output), before, strict=True):
        np.testing.assert_equal(one, two)
    write(folder / "b/c.wav", 7)
    write(folder / "0.wav", 8)
    status, out, _ = run(folder, "-o", output)
    assert (status, requested(fake)) == (0, [7, 8]) and "4 of 4 files embedded, 2 new" in out
    assert names(output) == ["0.wav", "a.wav", "c.wav", "d.wav"]
    check_embeddings(output)


@pytest.mark.parametrize("moved", ["files", "folders", "neither"])
def test_files_that_change_places_are_a_change(run: Run, tmp_path: Path, moved: str) -> None:
    """They have one size and one time, as an archive leaves clips of one length."""
    one, two = write(tmp_path / "one/a.wav", 1, 2000), write(tmp_path / "two/a.wav", 2, 2000)
    for path in one, two:
        os.utime(path, ns=(0, 10**18))
    output = tmp_path / "out.npz"
    run(one, two, "-o", output)
    if moved == "neither":
        for path in one, two:
            os.utime(path, ns=(0, 10**18 + 1))
    else:
        a, b = (one, two) if moved == "files" else (one.parent, two.parent)
        a.rename(tmp_path / "aside")
        b.rename(a)
        (tmp_path / "aside").rename(b)
    assert "2 of 2 files embedded, 2 new" in run(one, two, "-o", output)[1]
    check_embeddings(output)


def test_rows_that_were_not_given_again_are_kept_at_the_end(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(folder, "-o", output)
    status, out, _ = run(write(tmp_path / "z.wav", 4), folder / "b", "-o", output)
    assert status == 0 and "3 of 3 files embedded, 1 new, 1 kept of earlier runs" in out
    assert names(output) == ["z.wav", "c.wav", "d.wav", "a.wav"]


def test_a_file_that_is_gone_keeps_its_row(run: Run, folder: Path, tmp_path: Path) -> None:
    """A disk that is not mounted must not empty the output."""
    files = [folder / "a.wav", folder / "b/c.wav"]
    run(*files, "-o", tmp_path / "out.npz")
    files[0].unlink()
    status, out, err = run(*files, *files, "-o", tmp_path / "out.npz")
    assert status == 2 and err.count("a.wav") == 1 and "2 of 4 files embedded, 1 failed" in out
    assert names(tmp_path / "out.npz") == ["c.wav", "c.wav", "a.wav"]


def test_a_changed_file_that_fails_loses_its_row(run: Run, folder: Path, tmp_path: Path) -> None:
    run(folder, "-o", tmp_path / "out.npz")
    (folder / "a.wav").write_text("no audio")
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 2
    assert names(tmp_path / "out.npz") == ["c.wav", "d.wav"]


def test_a_file_that_changes_while_it_is_embedded(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    def rewrite(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        if len(waveform) == 1001:
            write(folder / "a.wav", 9)
        return good(fake, waveform)

    fake.otherwise = rewrite
    status, out, err = run(folder, "-o", tmp_path / "out.npz")
    assert status == 2 and "a.wav: changed" in err and "2 of 3" in out
    requested(fake)
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 0 and requested(fake) == [9]
    check_embeddings(tmp_path / "out.npz")


# --- one output: one model, one way with long clips, one folder of relative paths ---


def test_another_model_is_rejected(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path) -> None:
    run(folder / "b", "-o", output)
    before = output.read_bytes()
    fake.model = lambda fake: OTHER
    one_error(run(folder, "-o", output), MODEL, OTHER, "--replace")
    assert output.read_bytes() == before and left(tmp_path) == [output.name]
    assert run(folder, "-o", output, "--replace")[0] == 0
    assert {row["model"] for row in rows(output)} == {OTHER} and len(rows(output)) == 3


def test_a_model_that_changes_during_the_run(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    fake.model = lambda fake: MODEL if len(fake.lengths) < 3 else OTHER
    one_error(run(folder, "-o", tmp_path / "out.npz", "--in-flight", 1), MODEL, OTHER, "2 embeddings", "out.npz.parts")
    requested(fake)
    fake.model = lambda fake: MODEL
    assert run(folder, "-o", tmp_path / "out.npz")[0] == 0
    assert requested(fake) == [3] and {row["model"] for row in rows(tmp_path / "out.npz")} == {MODEL}


def test_ways_of_embedding_long_clips_do_not_mix(run: Run, folder: Path, tmp_path: Path, output: Path) -> None:
    write(folder / "long.wav", samples=31 * 16_000)
    assert run(folder, "-o", output)[0] == 2
    assert run(folder, "-o", output, "--long", "windows")[0] == 0  # the output held no long clip
    for other in "error", "truncate":
        one_error(run(folder, "-o", output, "--long", other), "windows", other)
    assert "long.wav" in names(output) and left(tmp_path) == [output.name]


def test_relative_paths_belong_to_one_folder(
    run: Run, fake: FakeTriton, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for number, folder in enumerate((one, two), 1):
        write(folder / "a.wav", number)
    monkeypatch.chdir(one)
    assert run("a.wav", "-o", output)[0] == 0
    monkeypatch.chdir(two)
    one_error(run("a.wav", "-o", output), one, two)
    assert requested(fake) == [1] and [row["path"] for row in rows(output)] == ["a.wav"]
    assert run(two / "a.wav", "-o", output)[0] == 0  # an absolute path is allowed
    assert [row["path"] for row in rows(output)] == [str(two / "a.wav"), "a.wav"]


@pytest.mark.parametrize("damage", ["foreign", "other", "cut", "flipped"])
def test_an_output_that_is_foreign_or_damaged_is_rejected(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path, damage: str
) -> None:
    run(folder, "-o", output)
    if damage == "foreign":
        output.write_text("important")
    elif damage == "cut":
        output.write_bytes(output.read_bytes()[:-40])
    elif damage == "flipped":
        flip(output)
    elif output.suffix == ".npz":
        np.savez(output, embeddings=np.ones((3, SIZE), np.float32))
    else:
        parquet.write_table(pyarrow.table({"a": [1]}), output)
    before = output.read_bytes()
    requested(fake)
    one_error(run(folder, "-o", output), output.name, "--replace")
    assert output.read_bytes() == before and left(tmp_path) == [output.name] and requested(fake) == []
    assert run(folder, "-o", output, "--replace")[0] == 0 and len(rows(output)) == 3


def flip(path: Path) -> None:
    """Change a byte of the first embedding, which begins with its clip's length."""
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(1001).tobytes()) + 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".failed.tsv", ".parts"])
def test_a_path_in_the_way_is_named(run: Run, folder: Path, tmp_path: Path, suffix: str) -> None:
    blocked = tmp_path / f"out.npz{suffix}"
    blocked.mkdir() if suffix == ".failed.tsv" else blocked.write_text("a file")
    one_error(run(folder, "-o", tmp_path / "out.npz"), blocked)
    assert left(tmp_path) == [blocked.name]


# --- failures ---


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
    assert listed[0][2] == "reason" and "for once" in listed[1][2] and "no a" in listed[2][2]
    requested(fake)
    assert "3 of 5 files embedded, 2 failed" in run(folder, "-o", output)[1] and requested(fake) == [1]
    (folder / "b/bad\t.wav").unlink()
    (folder / "short.wav").unlink()
    assert run(folder, "-o", output)[0] == 0 and left(tmp_path) == ["out.npz"]


def test_nothing_embedded_is_no_output(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    fake.otherwise = nan
    status, out, _ = run(folder, "-o", tmp_path / "out.npz")
    assert status == 2 and "0 of 3 files embedded, 3 failed" in out
    assert left(tmp_path) == ["out.npz.failed.tsv"]


@pytest.mark.parametrize("options", [[], ["-o", "out.npz"]])
def test_a_server_that_is_away_or_hangs_stops_the_run(
    run: Run, fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = many(tmp_path / "clips", 100)
    one_error(run(folder, *options, url="127.0.0.1:9"), "127.0.0.1:9")
    assert left(tmp_path) == []
    fake.otherwise = refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "late")
    status, out, err = run(folder, *options, "--in-flight", 2)
    assert (status, out) == (2, "") and err.count("\n") == 32 and len(requested(fake)) < 50


# --- runs that end early ---


def interrupt(run: Run, fake: FakeTriton, folder: Path, output: Path, *options: str) -> None:
    """A run whose server goes away after two clips."""
    fake.answers = [good, good, refuse(grpc.StatusCode.UNAVAILABLE, "gone")]
    one_error(run(folder, "-o", output, "--in-flight", 1, *options), "2 embeddings", f"{output}.parts")
    requested(fake)


def test_a_server_that_goes_away_loses_nothing(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path
) -> None:
    interrupt(run, fake, folder, output)
    assert left(tmp_path) == [f"{output.name}.parts"]
    status, out, _ = run(folder / "b", folder, "-o", output)
    assert status == 0 and "5 of 5 files embedded, 1 new" in out and requested(fake) == [3]
    assert names(output) == ["c.wav", "d.wav", "a.wav", "c.wav", "d.wav"] and left(tmp_path) == [output.name]
    check_embeddings(output)


def test_an_output_and_parts_together(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path) -> None:
    """Changed files have rows in both. The parts of a run that was killed at its very end repeat the output."""
    parts = output.with_name(f"{output.name}.parts")
    run(folder, "-o", output)
    for number, name in enumerate(["a.wav", "b/c.wav", "b/d.wav"], 4):
        write(folder / name, number)
    interrupt(run, fake, folder, output)
    assert run(folder / "b/d.wav", "-o", output)[0] == 0 and requested(fake) == [6]
    assert names(output) == ["d.wav", "a.wav", "c.wav"]
    check_embeddings(output)
    for number, name in enumerate(["a.wav", "b/c.wav", "b/d.wav"], 7):
        write(folder / name, number)
    interrupt(run, fake, folder, output)
    shutil.copytree(parts, tmp_path / "aside")
    assert run(folder, "-o", output)[0] == 0 and requested(fake) == [9]
    (tmp_path / "aside").rename(parts)
    assert run(folder, "-o", output)[0] == 0 and requested(fake) == []
    check_embeddings(output)
    assert left(tmp_path) == [output.name]


def test_replacing_resumes_without_replace(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    run(folder, "-o", output)
    fake.model = lambda fake: OTHER
    interrupt(run, fake, folder, output, "--replace")
    assert run(folder, "-o", output)[0] == 0
    assert requested(fake) == [3] and {row["model"] for row in rows(output)} == {OTHER}


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_files_of_a_damaged_part_are_embedded_again(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "out.npz"
    interrupt(run, fake, folder, output)
    [part] = (tmp_path / "out.npz.parts").glob("*.parquet")
    if damage == "flipped":
        flip(part)
    else:
        part.write_bytes(part.read_bytes()[:-40] if damage == "cut" else b"")
    status, _, err = run(folder, "-o", output)
    assert status == 0 and err.count("\n") == 1 and part.name in err and requested(fake) == [1, 2, 3]
    check_embeddings(output)
    assert left(tmp_path) == ["out.npz"]


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        one_error(run(*["clips"] * 800, "-o", output), os.strerror(errno.EFBIG), "3 embeddings", f"{output}.parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == [f"{output.name}.parts"]
    requested(fake)
    assert run("clips", "-o", output)[0] == 0 and requested(fake) == [] and len(rows(output)) == 3


def start(fake: FakeTriton, *arguments: object) -> subprocess.Popen[str]:
    command = [*COMMAND, "--url", fake.url, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def hold(fake: FakeTriton) -> Iterator[Callable[[int], threading.Event]]:
    """Let the server answer for the clips before a number, and for the others only once the event is set."""
    gate = threading.Event()

    def hold(after: int) -> threading.Event:
        def answer(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
            if len(waveform) >= 1000 + after:
                gate.wait(60)
            return good(fake, waveform)

        fake.otherwise = answer
        return gate

    yield hold
    gate.set()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed(run: Run, fake: FakeTriton, hold: Any, tmp_path: Path) -> None:
    """The results of the parts that were written are not requested again."""
    folder, output, parts = many(tmp_path / "clips", 300), tmp_path / "out.npz", tmp_path / "out.npz.parts"
    hold(after=250)
    held = fake.otherwise

    def steady(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.1)
        return held(fake, waveform)

    fake.otherwise = steady
    process = start(fake, folder, "-o", output, "--in-flight", 4)
    wait_for(lambda: list(parts.glob("*.parquet")) != [])
    process.kill()
    process.communicate()
    kept = sum(parquet.read_metadata(part).num_rows for part in parts.glob("*.parquet"))
    (parts / ".torn.part").write_bytes(b"PAR1")
    assert not output.exists() and 0 < kept <= 250
    fake.otherwise = good
    requested(fake)
    status, out, err = run(folder, "-o", output)
    assert (status, err) == (0, "") and f"300 of 300 files embedded, {300 - kept} new" in out
    assert requested(fake) == list(range(kept, 300)) and left(tmp_path) == [output.name]
    assert [row["embedding"][0] for row in rows(output)] == [1000 + number for number in range(300)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(
    run: Run, fake: FakeTriton, hold: Any, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    folder, output = many(tmp_path / "clips", 12), tmp_path / "out.npz"
    hold(after=6)
    process = start(fake, folder, "-o", output, "--in-flight", 2)
    wait_for(lambda: len(fake.lengths) == 8)  # the last of the six replies may not have been read yet
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (status, "", 1) and f"{output}.parts" in err
    [kept] = map(int, re.findall(r"(\d+) embeddings", err))
    assert 4 <= kept <= 6
    fake.otherwise = good
    requested(fake)
    assert run(folder, "-o", output)[0] == 0 and requested(fake) == list(range(kept, 12))


def test_interrupted_before_the_first_is_quiet(fake: FakeTriton, hold: Any, folder: Path, tmp_path: Path) -> None:
    hold(after=0)
    process = start(fake, folder, "-o", tmp_path / "out.npz")
    wait_for(lambda: len(fake.lengths) == 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "") and left(tmp_path) == []


def test_two_runs_at_once(run: Run, fake: FakeTriton, hold: Any, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    gate = hold(after=0)
    process = start(fake, folder, "-o", output)
    wait_for(lambda: len(fake.lengths) == 3)
    for options in [], ["--replace"]:
        one_error(run(folder, "-o", output, *options), output, "another run")
    gate.set()
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(rows(output)) == 3 and left(tmp_path) == ["out.npz"]


# --- memory ---


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, output: Path) -> None:
    """It grows by some 350 bytes a file; the embeddings of 32,000 files alone take 25 MB."""
    allocators = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}  # that give back what is freed
    peaks = []
    for count in 8_000, 40_000:
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.mknod(folder / f"{number}.wav")
        command = [sys.executable, "-c", FAST, str(folder), "-o", f"{output.parent}/{count}{output.suffix}"]
        peaks.append(float(subprocess.check_output(command, env=os.environ | allocators).splitlines()[-1]))
    assert peaks[1] - peaks[0] < 20  # MB


# --- inputs ---


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
    assert [row["path"] for row in rows(tmp_path / "out.npz")] == [str(folder / "a.wav"), str(folder / "b/c.wav")]
    moved = (folder / name).rename(tmp_path / name)
    assert "2 of 2 files embedded, 0 new" in run(moved, "--root", folder, "-o", tmp_path / "out.npz")[1]


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("list.csv", "id,sound\n1,a.wav\n", "list.csv:2: has id, sound"),
        ("list.csv", "", "out.npz: no audio files"),
        ("list.csv", "id,path\n1,a.wav\n\n2\n", "list.csv:4: expected 2"),
        ("list.csv", "id,path\n1,\n", "list.csv:2: the path is ''"),
        ("list.csv", 'id,path\n1,"a.wav"b\n', "list.csv: "),
        ("list.jsonl", '{"path": "a.wav"}\n["a.wav"]\n', "list.jsonl:2: is a list"),
        ("list.jsonl", '{"path": "a.wav"}\na.wav\n', "list.jsonl:2: "),
        ("list.jsonl", '{"path": 1}', "list.jsonl:1: the path is 1"),
        ("list.jsonl", '{"path": "a.wav", "offset": 1.5}', "offset is 1.5"),
        ("list.txt", None, os.strerror(errno.ENOENT)),
        ("list.txt", "# nothing\n", "out.npz: no audio files"),
    ],
)
def test_wrong_lists(run: Run, fake: FakeTriton, tmp_path: Path, name: str, text: str | None, fact: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    (tmp_path / "results").mkdir()
    one_error(run(tmp_path / name, "-o", tmp_path / "results/out.npz"), fact)
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
    assert [row["path"] for row in rows(tmp_path / "out.npz")] == [str(path) for path in given]


def test_folders(run: Run, folder: Path, tmp_path: Path) -> None:
    for name in ".hidden.wav", ".hidden/e.wav", "notes.txt", "b/c.wav.bak":
        write(folder / name)
    for number, name in enumerate(["b.wav", "b0.wav", "E.FLAC"], 5):
        write(folder / name, number)
    write(tmp_path / "elsewhere/f.opus", 8)
    (folder / "b/link").symlink_to(tmp_path / "elsewhere")
    (folder / "b/up").symlink_to(folder)
    (folder / "b/gone.wav").symlink_to(tmp_path / "nothing")
    output = tmp_path / "out.npz"
    status, out, err = run(folder, "-o", output)
    assert status == 2 and err.count("\n") == 1 and "gone.wav" in err
    found = [os.path.relpath(row["path"], folder) for row in rows(output)]
    assert found == ["E.FLAC", "a.wav", "b.wav", "b/c.wav", "b/d.wav", "b/link/f.opus", "b0.wav"]
    lines = run(folder)[1].splitlines()
    assert [os.path.relpath(line.split("  ")[0], folder) for line in lines] == found


def test_a_folder_that_cannot_be_listed(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path)

    really = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    status, out, err = run(folder, "-o", tmp_path / "out.npz")
    assert status == 2 and f"{folder}/b: " in err and "1 of 1 files embedded, 1 failed" in out


# --- what the user sees ---


def test_lines_without_an_output(run: Run, fake: FakeTriton, folder: Path) -> None:
    (folder / "b/c.wav").write_text("no audio")
    fake.answers = [refuse(grpc.StatusCode.INTERNAL, "for once")]
    status, out, err = run(folder, folder / "a.wav", "--json", "--in-flight", 1)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [line["file"] for line in lines] == [str(folder / "b/d.wav"), str(folder / "a.wav")]
    assert lines[1]["model"] == MODEL and lines[1]["embedding"][0] == 1001
    assert [line.split(": ")[1] for line in err.splitlines()] == [f"{folder}/a.wav", f"{folder}/b/c.wav"]
    assert run(folder / "a.wav")[1].startswith(f"{folder}/a.wav  0.06 s  192 dims  norm")


def test_the_summary_as_json(run: Run, folder: Path, tmp_path: Path) -> None:
    summary = json.loads(run(folder, "-o", tmp_path / "out.npz", "--json")[1])
    assert summary.pop("elapsed") > 0 and summary.pop("audio") == pytest.approx(3006 / 16_000)
    counts = {"files": 3, "embedded": 3, "failed": 0, "new": 3, "kept": 0}
    assert summary == {"output": str(tmp_path / "out.npz"), **counts}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")

    def slow(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(0.2)  # the bar is drawn every 0.1 s
        return good(fake, waveform)

    run(folder / "a.wav", "-o", tmp_path / "out.npz")
    monkeypatch.setattr(sys, "stderr", Terminal())
    (folder / "b/cc [x].wav").write_text("no audio")
    fake.otherwise = slow
    assert run(folder, "-o", tmp_path / "out.npz", "--in-flight", 1)[0] == 2
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "━" in shown and "4 of 4 files, 1 failed, " in shown
    [failure] = re.findall(r"(?:^|[\r\n]|\x1b\[2K)(ecapa-triton: .*?)\r?\n", shown)
    assert failure.startswith(f"ecapa-triton: {folder}/b/cc [x].wav: ")


# --- the real server ---


def test_served(run: Run, server: Any, reference: Callable[[np.ndarray], np.ndarray], output: Path) -> None:
    status, out, err = run(SAMPLES, "-o", output, url=server.grpc_url)
    assert (status, err) == (0, "") and "6 of 6 files embedded, 6 new" in out
    for row in rows(output):
        expected = reference(audio.read(row["path"], max_samples=30 * 16_000).waveform)
        assert np.linalg.norm(row["embedding"] - expected) <= 1e-4 * np.linalg.norm(expected)
    assert "6 of 6 files embedded, 0 new" in run(SAMPLES, "-o", output, url=server.grpc_url)[1]
