"""The file of a gallery: what it holds, how it is written, and damage to it."""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ecapa_triton import Candidate, Gallery, GalleryFileError, OutputError
from galleries import MODEL, contents, utterance, vector
from hypothesis import given
from hypothesis import strategies as st


def test_a_saved_gallery_is_the_same(gallery: Gallery, tmp_path: Path) -> None:
    for seed in range(10, 60):
        gallery.enrol(f"voice {seed}", [utterance(seed + i) for i in range(seed % 3 + 1)])
    gallery.remove("anna")
    path = tmp_path / "voices.npz"
    gallery.save(path)
    loaded = Gallery.load(str(path))
    assert contents(loaded) == contents(gallery)
    probe = [utterance(seed) for seed in range(100)]
    assert list(loaded.identify_many(probe)) == list(gallery.identify_many(probe))
    for each in gallery, loaded:
        each.enrol("voice 10", utterance(70))
        each.enrol("new", utterance(71))
        each.remove("voice 11")
    assert contents(loaded) == contents(gallery)
    assert [p.name for p in tmp_path.iterdir()] == ["voices.npz"]


@pytest.mark.parametrize("threshold", [None, 0.1, -1.0])
def test_an_empty_gallery_and_one_without_a_threshold(tmp_path: Path, threshold: float | None) -> None:
    gallery = Gallery()
    gallery.save(tmp_path / "g")
    gallery = Gallery.load(tmp_path / "g")
    assert (len(gallery), gallery.model, gallery.threshold) == (0, None, None)
    gallery.enrol("anna", utterance(1, threshold=threshold))
    gallery.save(tmp_path / "g")
    assert Gallery.load(tmp_path / "g").threshold == threshold


def test_others_can_read_the_file(gallery: Gallery, tmp_path: Path) -> None:
    gallery.save(tmp_path / "g.npz")
    with np.load(tmp_path / "g.npz", allow_pickle=False) as arrays:
        assert (arrays["model"], arrays["threshold"], arrays["format"]) == (MODEL, 0.45, 1)
        assert arrays["names"].tolist() == ["anna", "berta"] and arrays["clips"].tolist() == [2, 1]
        expected = sum(vector(seed) / np.linalg.norm(vector(seed)) for seed in (1, 2))
        np.testing.assert_allclose(arrays["sums"][0], expected, atol=1e-6)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_saving_that_fails_keeps_the_old_file(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(file: io.BufferedWriter, **arrays: Any) -> None:
        file.write(b"some of it")
        raise error

    path = tmp_path / "g.npz"
    gallery.save(path)
    gallery.enrol("carl", utterance(4))
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        gallery.save(path)
    assert isinstance(error, KeyboardInterrupt) or (str(path) in str(caught.value) and "No space" in str(caught.value))
    assert [p.name for p in tmp_path.iterdir()] == ["g.npz"] and len(Gallery.load(path)) == 2


def arrays_of(**others: Any) -> dict[str, Any]:
    sums = np.array([[2.0, 0, 0], [0, 0.6, 0.8]])
    good = {"format": 1, "model": MODEL, "threshold": 0.45, "names": ["anna", "berta"], "clips": [2, 1], "sums": sums}
    return {name: array for name, array in (good | others).items() if array is not None}


def written(path: Path, **others: Any) -> Path:
    np.savez(path, **arrays_of(**others))
    return path


def test_a_file_made_by_hand_is_good(tmp_path: Path) -> None:
    gallery = Gallery.load(written(tmp_path / "g.npz"))
    assert gallery.identify(utterance([0, 3, 4])).candidates == (Candidate("berta", 1.0), Candidate("anna", 0.0))


@pytest.mark.parametrize(
    ("others", "fact"),
    [
        ({"sums": None}, "sums"),
        ({"format": None}, "format"),
        ({"format": 2}, "format 2"),
        ({"model": ""}, "model"),
        ({"names": np.zeros(0, str), "clips": np.zeros(0, int), "sums": np.zeros((0, 3))}, "model"),
        ({"model": b"bytes"}, "model"),
        ({"threshold": 7.0}, "threshold is 7"),
        ({"threshold": math.inf}, "threshold is inf"),
        ({"threshold": [0.4]}, "threshold"),
        ({"names": ["anna"]}, "1 names"),
        ({"names": ["anna", "anna"]}, "1 names"),
        ({"names": ["anna", "an\nna"]}, r"'an\\nna'"),
        ({"names": ["anna", ""]}, "''"),
        ({"names": ["anna", "Zoe\u0308"]}, "NFC"),
        ({"names": ["anna", "b" * 129]}, "129"),
        ({"names": [["anna", "berta"]]}, "names"),
        ({"names": np.array([1, 2])}, "names"),
        ({"clips": [2.0, 1.0]}, "clips"),
        ({"clips": [2, 1, 1]}, "3 counts"),
        ({"sums": np.ones(2)}, "sums"),
        ({"sums": np.eye(3)}, "3 sums"),
        # sums of unit vectors are at most as long as there are clips, and not of length 0
        *[({"clips": clips}, "sum") for clips in ([0, 1], [-2, 1], [1, 1])],
        ({"clips": [0, 1], "sums": np.array([[0, 0, 0], [0, 0.6, 0.8]])}, "sum"),
        *[({"sums": np.array([[1.0, value], [0, 1]])}, "sum") for value in (np.nan, np.inf, 1e300)],
        *[({"sums": np.zeros((2, size))}, "sum") for size in (0, 3)],
    ],
)
def test_files_with_wrong_arrays(tmp_path: Path, others: dict[str, Any], fact: str) -> None:
    path = written(tmp_path / "g.npz", **others)
    with pytest.raises(GalleryFileError, match=rf"^{path}: .*{fact}") as caught:
        Gallery.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_galleries(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("anna 0.1 0.2")
    np.save(tmp_path / "one.npy", np.ones(3))
    for name in "missing", ".", "/dev/zero", "empty", "text", "one.npy":
        with pytest.raises(GalleryFileError, match=str(tmp_path / name)):
            Gallery.load(tmp_path / name)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["names", "sums", "format", "a bare pickle"])
def test_nothing_in_a_file_is_run(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "run"
    path = written(tmp_path / "g.npz", **{name: np.array([Payload(trap)] * 2, object)})
    if name == "a bare pickle":
        written(path, sums=None)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("sums.npy", pickle.dumps(Payload(trap)))
    with pytest.raises(GalleryFileError):
        Gallery.load(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()  # so it would have been seen


@pytest.mark.parametrize("shape", [(10**12, 192), (2, 10**15), (3, 3), (1, 3), (-2, -3)])
def test_a_shape_that_the_file_does_not_hold_is_not_believed(tmp_path: Path, shape: tuple[int, int]) -> None:
    path, header = written(tmp_path / "g.npz", sums=None), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sums.npy", header.getvalue() + np.eye(2, 3).tobytes())
    with pytest.raises(GalleryFileError, match=str(path)):
        Gallery.load(path)


def test_a_compressed_member_is_not_unpacked(tmp_path: Path) -> None:
    """Ten megabytes in ten kilobytes here; it could be ten terabytes."""
    np.savez_compressed(tmp_path / "g.npz", **arrays_of(sums=np.zeros((2, 650_000))))
    assert (tmp_path / "g.npz").stat().st_size < 20_000
    with pytest.raises(GalleryFileError, match="array is compressed"):
        Gallery.load(tmp_path / "g.npz")


def test_a_changed_shape_is_noticed(tmp_path: Path) -> None:
    """Less of the array would be read, without the end where its checksum is compared."""
    path = written(tmp_path / "g.npz", names=["anna"], clips=[1], sums=np.insert(np.zeros((1, 20_000)), 0, 1, axis=1))
    path.write_bytes(path.read_bytes().replace(b"(1, 20001)", b"(1, 10001)"))
    with pytest.raises(GalleryFileError):
        Gallery.load(path)


@given(cut=st.integers(0, 5000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.npz"
    whole = written(path).read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(GalleryFileError):
        Gallery.load(path)


@given(changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_changed_file_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    whole = bytearray(written(path).read_bytes())
    before = contents(Gallery.load(path), 3)
    for at, by in changes:
        whole[at % len(whole)] ^= by
    path.write_bytes(whole)
    try:
        loaded = Gallery.load(path)
    except GalleryFileError as exc:
        assert "\n" not in str(exc)
    else:
        assert contents(loaded, 3) == before  # dates and permissions in the archive


def test_permissions_and_links(gallery: Gallery, tmp_path: Path) -> None:
    """A new file gets the usual permissions, a replaced one keeps its own, and a link to it stays a link."""
    old = os.umask(0o027)
    try:
        gallery.save(tmp_path / "new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there/file", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    gallery.save(link)
    assert link.is_symlink() and len(Gallery.load(real)) == 2 and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert [p.name for p in real.parent.iterdir()] == ["file"]


def test_a_file_is_on_the_disk_before_it_is_renamed(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def seen_fsync(number: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else f"{os.fstat(number).st_size} bytes")
        fsync(number)

    def seen_replace(*paths: Any) -> None:
        done.append("name")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    gallery.save(tmp_path / "file")
    assert done == [f"{(tmp_path / 'file').stat().st_size} bytes", "name", "folder"]


def test_paths_that_cannot_be_written(gallery: Gallery, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path, tmp_path / "pipe", tmp_path / "none/g.npz":
        with pytest.raises(OutputError, match=str(path)):
            gallery.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    longest = tmp_path / ("é" * 127)  # 254 bytes; a name may have 255
    gallery.save(longest)
    assert len(Gallery.load(longest)) == 2
