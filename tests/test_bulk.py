"""Bulk embedding, `ecapa-triton embed`: inputs, output, failures, memory, and what the user sees."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
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
from bulk import Run, check_embeddings, left, many, names, one_error, requested, rows, write
from ecapa_triton import audio
from fake_triton import MODEL, SIZE, FakeTriton, good, nan, refuse

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SAMPLES = Path(__file__).parents[1] / "samples"
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


# --- the output ---


def test_rows_are_those_of_the_inputs_in_order(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path
) -> None:
    last = write(tmp_path / "z.wav", 4)
    status, out, err = run(last, folder, last, "-o", output)
    assert (status, err) == (0, "") and "4 of 4 files embedded, 1 named again, 4 new, 0.3 s of audio in " in out
    assert requested(fake) == [1, 2, 3, 4]
    a, c, d = folder / "a.wav", folder / "b/c.wav", folder / "b/d.wav"
    assert [row["path"] for row in rows(output)] == [str(path) for path in (last, a, c, d)]
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


def test_thousands_of_rows(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path) -> None:
    """More than are written at a time, and in another order than they were."""
    parquet = pytest.importorskip("pyarrow.parquet")
    clips = [folder / "a.wav", folder / "b/c.wav", folder / "b/d.wav"]
    links = [tmp_path / f"links/{number:04}.wav" for number in range(2400)]
    links[0].parent.mkdir()
    for number, link in enumerate(links):
        os.link(clips[number % 3], link)
    run(*links[:3], "-o", output)  # the other links have the same sizes and stamps
    if output.suffix == ".parquet":
        table = parquet.read_table(output).take(list(range(3)) * 800)
        table = table.set_column(0, table.schema.field(0), [list(map(str, links))])
        parquet.write_table(table, output, row_group_size=1000, write_page_checksum=True)
    else:
        with np.load(output) as arrays:
            tiled = {name: np.concatenate([array] * 800) if array.ndim else array for name, array in arrays.items()}
        np.savez(output, **tiled | {"files": np.array(list(map(str, links)))})
    requested(fake)
    assert run(links[1500], links[0].parent, "-o", output)[0] == 0 and requested(fake) == []
    assert names(output) == [link.name for link in (links[1500], *links[:1500], *links[1501:])]
    check_embeddings(output)


def test_names_that_are_not_utf_8(run: Run, fake: FakeTriton, folder: Path, output: Path) -> None:
    odd = write(folder / os.fsdecode(b"caf\xe9 \xc3\xa9.wav"), 4)
    shown = str(odd).encode(errors="backslashreplace").decode()
    for again in range(3):
        assert run(folder, "-o", output)[0] == 0
        assert requested(fake) == ([] if again else [1, 2, 3, 4])
        assert rows(output)[-1]["path"] == shown


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
        ("list.csv", 'ID,wav,start\n1,a.wav,\n"2, so",b/c.wav,""\n'),
        ("list.tsv", 'client\tpath\tsentence\n1\ta.wav\t"an open quote\n2\tb/c.wav\tnone\n'),
        ("list.jsonl", '{"audio_filepath": "a.wav", "duration": 9, "offset": null}\n\n{"audio_filepath": "b/c.wav"}\n'),
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
        ("list.json", '{"audio_filepath": "a.wav", "offset": 0, "duration": 1.5}', "list.json:1: offset is 0"),
        ("list.csv", "ID,duration,wav,start,stop\n1,1,a.wav,0,16000\n", "list.csv:2: start is 0"),
        ("list.tsv", "path\tend\na.wav\t1.5\n", "list.tsv:2: end is 1.5"),
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


def test_an_empty_folder_is_an_error(run: Run, tmp_path: Path) -> None:
    one_error(run(tmp_path), "no audio files")


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
    assert status == 2 and f"{folder}/b: " in err and "1 of 1 file embedded, 1 failed" in out


# --- what the user sees ---


def test_lines_without_an_output(run: Run, fake: FakeTriton, folder: Path) -> None:
    (folder / "b/c.wav").write_text("no audio")
    fake.answers = [refuse(grpc.StatusCode.INTERNAL, "for once")]
    status, out, err = run(folder, folder / "a.wav", "--json", "--in-flight", 1)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [line["file"] for line in lines] == [str(folder / "b/d.wav"), str(folder / "a.wav")]
    assert lines[1]["model"] == MODEL and lines[1]["embedding"][0] == 1001
    assert [line.split(": ")[1] for line in err.splitlines()] == [f"{folder}/a.wav", f"{folder}/b/c.wav"]
    assert run(folder / "a.wav")[1].startswith(f"{folder}/a.wav  0.06 s, 0.00 s of speech  192 dims  norm")


def test_the_summary_as_json(run: Run, folder: Path, tmp_path: Path) -> None:
    summary = json.loads(run(folder, "-o", tmp_path / "out.npz", "--json")[1])
    assert summary.pop("elapsed") > 0 and summary.pop("audio") == pytest.approx(3006 / 16_000)
    counts = {"files": 3, "repeated": 0, "embedded": 3, "failed": 0, "new": 3, "little_speech": 3, "kept": 0}
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
