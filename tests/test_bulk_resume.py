"""Later runs of `ecapa-triton embed` on one output: changed files, damage, interruptions, locks."""

from __future__ import annotations

import errno
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
from bulk import Run, check_embeddings, left, many, names, one_error, requested, rows, write
from fake_triton import MODEL, PATIENCE, SIZE, FakeTriton, good, refuse
from launcher import wait_until

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

OTHER = "00000000000000000000beef"
COMMAND = [sys.executable, "-c", "import sys; from ecapa_triton._cli import main; sys.exit(main())", "embed"]


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
    assert status == 2 and err.count("a.wav") == 1 and "1 of 2 files embedded, 2 named again, 1 failed" in out
    assert names(tmp_path / "out.npz") == ["c.wav", "a.wav"]


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


def test_spellings_of_a_path_are_one_row(
    run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "list.txt").write_text("./a.wav\nb/../a.wav\nb//c.wav\n")
    assert run("a.wav", "./a.wav", ".", "list.txt", "-o", output)[0] == 0
    assert [row["path"] for row in rows(output)] == ["a.wav", "b/c.wav", "b/d.wav"] and requested(fake) == [1, 2, 3]
    assert "2 of 2 files embedded, 0 new, 1 kept" in run("b/../a.wav", "./b/c.wav", "-o", output)[1]
    assert [row["path"] for row in rows(output)] == ["a.wav", "b/c.wav", "b/d.wav"] and requested(fake) == []


def test_dots_behind_a_link_are_kept(run: Run, fake: FakeTriton, folder: Path, tmp_path: Path, output: Path) -> None:
    """`link/..` is the folder above the link's target, not the one of the link."""
    (folder / "link").symlink_to(write(tmp_path / "other/b/x.wav", 9).parent)
    write(tmp_path / "other/a.wav", 8)
    spelled = f"{folder}/link/../a.wav"
    assert run(spelled, folder / "a.wav", "-o", output)[0] == 0
    assert [row["path"] for row in rows(output)] == [spelled, f"{folder}/a.wav"] and requested(fake) == [1, 8]


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
    assert status == 0 and "3 of 3 files embedded, 2 named again, 1 new" in out and requested(fake) == [3]
    assert names(output) == ["c.wav", "d.wav", "a.wav"] and left(tmp_path) == [output.name]
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
    monkeypatch.chdir(many(tmp_path / "clips", 80))
    for number in range(80):
        Path(f"{number:03}.wav").rename(write(Path(f"{number % 2}/{number:03}.wav")))
    run("0", "-o", output)
    requested(fake)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # bytes: enough for 40 rows, not for 80
    try:
        one_error(run("0", "1", "-o", output), os.strerror(errno.EFBIG), "40 embeddings", f"{output}.parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == [output.name, f"{output.name}.parts"] and len(requested(fake)) == 40
    assert run("0", "1", "-o", output)[0] == 0 and requested(fake) == [] and len(rows(output)) == 80


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
    wait_until(lambda: list(parts.glob("*.parquet")), PATIENCE)
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
    fake.wait_until(lambda fake: len(fake.lengths) == 8)  # the last of the six replies may not have been read yet
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
    fake.wait_until(lambda fake: len(fake.lengths) == 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "") and left(tmp_path) == []


def test_two_runs_at_once(run: Run, fake: FakeTriton, hold: Any, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    gate = hold(after=0)
    process = start(fake, folder, "-o", output)
    fake.wait_until(lambda fake: len(fake.lengths) == 3)
    for options in [], ["--replace"]:
        one_error(run(folder, "-o", output, *options), output, "another run")
    gate.set()
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(rows(output)) == 3 and left(tmp_path) == ["out.npz"]
