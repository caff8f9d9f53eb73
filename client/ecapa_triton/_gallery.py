"""Enrolled voices and speaker identification, without server or audio."""

from __future__ import annotations

import math
import os
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as numpy_format
from numpy.typing import NDArray

from ._files import replacing
from ._scoring import Utterance, Verification, check_threshold, decide, unit
from .audio import describe
from .errors import EcapaError, EmbeddingError, GalleryError, GalleryFileError, ModelMismatchError, UnknownVoiceError

MAX_NAME = 128  # characters
FORMAT = 1  # version of the files
MEMBERS = "format", "model", "threshold", "names", "clips", "sums"
BLOCK = 64  # utterances scored by one matrix product
SHORTEST_MEAN = 1e-6  # of unit vectors; below it, rounding decides the direction

_npy: Any = numpy_format  # not every numpy has types for it


class Candidate(NamedTuple):
    """A voice near to an utterance.

    Attributes:
        name: Name of the voice.
        score: Cosine to the utterance, -1 to 1.
    """

    name: str
    score: float


@dataclass(frozen=True)
class Identification:
    """The result of identification.

    Attributes:
        name: The nearest voice; None if no voice scores above the threshold.
        score: Cosine to the nearest voice, -1 to 1, above the threshold or not; -1 in an empty gallery.
        threshold: The threshold that was applied.
        candidates: The nearest voices, best first; equal scores are sorted by name.
    """

    name: str | None
    score: float
    threshold: float
    candidates: tuple[Candidate, ...]


class Gallery:
    """Enrolled voices, for identification and verification.

    A voice is the mean direction of one or more utterances of a person. All utterances are of one model, that of the
    first one enrolled; those of other models are rejected.

    ```python
    gallery = Gallery()
    gallery.enrol("anna", client.utterances(["anna_1.flac", "anna_2.flac"]))
    print(gallery.identify(client.utterance("unknown.flac")).name)    # anna, or None
    gallery.save("voices.npz")
    ```

    Names are stored in Unicode's composed form (NFC), so that names that look the same are the same. A voice of 192
    numbers takes 2.3 kB of memory and 1.6 kB in a file; identification among 100,000 voices takes about 10 ms on one
    core.

    Threads may read a gallery at the same time (identify, verify, scores, save). Changes (enrol, remove) need a lock
    of the caller's.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._model: str | None = None
        self._threshold: float | None = None
        self._rows: dict[str, int] = {}  # by name, in the order of enrolment
        self._names: list[str] = []  # by row
        self._clips: list[int] = []  # by row
        # Both have spare rows. Later enrolments add to the sums; the rows of length 1 serve to find the nearest.
        self._sums: NDArray[np.float64] = np.empty((0, 0))
        self._units: NDArray[np.float32] = np.empty((0, 0), np.float32)

    @property
    def model(self) -> str | None:
        """Identity of the model of all voices, as `Utterance.model`; None while the gallery is empty."""
        return self._model

    @property
    def threshold(self) -> float | None:
        """The model's threshold, of the latest utterance enrolled that had one; None if none had."""
        return self._threshold

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and unicodedata.normalize("NFC", name) in self._rows

    def __repr__(self) -> str:
        return f"<Gallery of {len(self)} voices, model {self._model}>"

    def clips(self, name: str) -> int:
        """Number of utterances of a voice.

        Raises:
            UnknownVoiceError: No voice of this name is enrolled.
        """
        return self._clips[self._row(name)]

    def enrol(self, name: str, utterances: Utterance | Iterable[Utterance | EcapaError]) -> None:
        """Add utterances to a new or an enrolled voice, in which all its utterances have equal weight.

        Either all utterances are added or, if an error is raised, none.

        Args:
            name: Name of the voice: up to 128 printable characters, without spaces around them.
            utterances: One, or several as `client.utterances(...)` yields them.

        Raises:
            GalleryError: The name is not valid, or there is no utterance.
            ModelMismatchError: An utterance is of another model than the gallery or those before it.
            EmbeddingError: An embedding has no direction or another size, or all of them cancel out.
            EcapaError: The first error among `utterances`.
        """
        name = _composed(name)
        if fault := _fault(name):
            raise GalleryError(f"the name {name[:MAX_NAME]!r} {fault}")
        items = [utterances] if isinstance(utterances, Utterance | EcapaError) else utterances
        total: NDArray[np.float64] | None = None
        count, model, threshold, dims = 0, self._model, self._threshold, self._dims
        for item in items:
            utterance = _good(item)
            direction = _direction(utterance, model, dims)
            total = direction if total is None else total + direction
            count, model, dims = count + 1, utterance.model, len(direction)
            threshold = threshold if utterance.threshold is None else utterance.threshold
        if total is None:
            raise GalleryError(f"no utterance for {name!r}: pass one or more")
        row = self._rows.get(name)
        if row is not None:
            total, count = total + self._sums[row], count + self._clips[row]
        lengths = _lengths(total[None])
        if not lengths[0] >= SHORTEST_MEAN * count:
            raise EmbeddingError(f"the utterances of {name!r} cancel each other out: enrol others, of one speaker")
        if row is None:
            row = len(self._names)
            self._make_room(row, len(total))
            self._rows[name] = row
            self._names.append(name)
            self._clips.append(count)
        self._sums[row], self._units[row], self._clips[row] = total, total / lengths[0], count
        self._model, self._threshold = model, threshold

    def remove(self, name: str) -> None:
        """Remove a voice, and with the last one the gallery's model.

        Raises:
            UnknownVoiceError: No voice of this name is enrolled.
        """
        row = self._row(name)
        del self._rows[self._names[row]]
        last, clips = self._names.pop(), self._clips.pop()
        if row < len(self._names):  # the last row takes its place
            self._rows[last], self._names[row], self._clips[row] = row, last, clips
            self._sums[row], self._units[row] = self._sums[len(self._names)], self._units[len(self._names)]
        if not self._names:
            self._clear()

    def identify(self, utterance: Utterance, top: int = 5, threshold: float | None = None) -> Identification:
        """Find the voice of an utterance.

        Args:
            utterance: The probe.
            top: Largest number of candidates.
            threshold: Cosine above which the nearest voice is named; None: the model's, from the utterance.

        Raises:
            ModelMismatchError: The utterance is of another model than the gallery.
            ThresholdError: No threshold is given and the model has none, or it is not a cosine.
            EmbeddingError: The embedding has no direction, or another size.
            ValueError: `top` is below 1.
        """
        _check_options(top, threshold)
        (outcome,) = self._identify([utterance], top, threshold)
        if isinstance(outcome, EcapaError):
            raise outcome
        return outcome

    def identify_many(
        self, utterances: Iterable[Utterance | EcapaError], top: int = 5, threshold: float | None = None
    ) -> Iterator[Identification | EcapaError]:
        """Find the voices of many utterances, 64 at a time; `identify` answers for one without waiting for more.

        Args:
            utterances: As `client.utterances(...)` yields them; may be a generator.
            top: As for `identify`.
            threshold: As for `identify`.

        Returns:
            The results in order. Errors among `utterances`, and those that `identify` would raise, take the place of
            their results.

        Raises:
            ThresholdError: The threshold given is not a cosine.
            ValueError: `top` is below 1.
        """
        _check_options(top, threshold)
        items = iter(utterances)
        blocks = iter(lambda: list(islice(items, BLOCK)), [])
        return (outcome for block in blocks for outcome in self._identify(block, top, threshold))

    def scores(self, utterances: Iterable[Utterance]) -> NDArray[np.float32]:
        """Cosines of utterances to all voices.

        Returns:
            float32 `[utterances, voices]`, -1 to 1, the voices in the order of iteration.

        Raises:
            ModelMismatchError: An utterance is of another model than the gallery or those before it.
            EmbeddingError: An embedding has no direction, or another size.
        """
        model, dims, directions = self._model, self._dims, []
        for utterance in utterances:
            directions.append(_direction(_good(utterance), model, dims))
            model, dims = utterance.model, len(directions[-1])
        scores = self._nearness(directions)[:, list(self._rows.values())]
        return np.clip(scores, -1, 1, out=scores)

    def verify(self, name: str, utterance: Utterance, threshold: float | None = None) -> Verification:
        """Decide whether an utterance is of a voice.

        Args:
            name: Name of the voice.
            utterance: The probe.
            threshold: Cosine above which it is the same speaker; None: the model's, from the utterance.

        Raises:
            UnknownVoiceError: No voice of this name is enrolled.
            ModelMismatchError: The utterance is of another model than the gallery.
            ThresholdError: No threshold is given and the model has none, or it is not a cosine.
            EmbeddingError: The embedding has no direction, or another size.
        """
        row = self._row(name)
        direction = _direction(_good(utterance), self._model, self._dims)
        return decide(self._exact([row], direction)[0], threshold, self._learned(utterance))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery to an npz file, whole or not at all, in place of an existing file.

        Programs that enrol into one file must lock it from loading to saving, as `ecapa-triton enrol` does.

        Voices identify people: restrict who can read the file. It keeps the permissions of the file it replaces; a
        new file gets the usual ones.

        Raises:
            OutputError: It cannot be written.
        """
        rows = list(self._rows.values())
        with replacing(path) as file:
            np.savez(
                file,
                format=np.array(FORMAT, "<i8"),
                model=np.array(self._model or ""),
                threshold=np.array(math.nan if self._threshold is None else self._threshold, "<f8"),
                names=np.array(list(self._rows), str),
                clips=np.array([self._clips[row] for row in rows], "<i8"),
                sums=self._sums[rows].astype("<f8", copy=False),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gallery:
        """Read a gallery that `save` wrote, exact to the last bit.

        No code in the file is run, and the memory taken is bounded by its size.

        Raises:
            GalleryFileError: The file cannot be read, holds no gallery, or is damaged.
        """
        name = describe(path)
        try:
            if not Path(path).is_file():
                os.stat(path)
                raise OSError("not a regular file")
            return cls._restored(_read(Path(path)))
        except OSError as exc:
            raise GalleryFileError(
                f"{name}: cannot be read ({exc.strerror or exc}): pass a file that Gallery.save wrote"
            ) from exc
        except GalleryFileError as exc:
            raise GalleryFileError(f"{name}: {exc}") from exc
        except Exception as exc:  # zipfile and numpy raise many types for damaged files
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise GalleryFileError(
                f"{name}: not a gallery, or damaged ({reason}): pass a file that Gallery.save wrote, or enrol again"
            ) from exc

    @classmethod
    def _restored(cls, arrays: dict[str, NDArray[Any]]) -> Gallery:
        gallery = cls()
        names: list[str] = arrays["names"].tolist()
        clips: list[int] = arrays["clips"].tolist()
        model, threshold, sums = arrays["model"].item(), arrays["threshold"].item(), arrays["sums"]
        if not len(names) == len(clips) == len(sums):
            raise ValueError(f"{len(names)} names, {len(clips)} counts of clips and {len(sums)} voices")
        if bool(names) != bool(model) or not model.isprintable():
            raise ValueError("voices without a model, or a model without voices")
        if not (math.isnan(threshold) or -1 <= threshold <= 1):
            raise ValueError(f"threshold {threshold}")
        for name in names:
            if fault := _fault(name):
                raise ValueError(f"the name {name!r} {fault}")
            if name != _composed(name):
                raise ValueError(f"the name {name!r} is not in NFC")
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice")
        if not names:
            return gallery
        lengths = _lengths(sums)
        counts = arrays["clips"]
        if not np.all((counts >= 1) & (lengths >= SHORTEST_MEAN * counts) & (lengths <= counts * (1 + 1e-6))):
            raise ValueError("a voice is not a sum of as many unit vectors as it has clips")
        gallery._model, gallery._threshold = model, None if math.isnan(threshold) else threshold
        gallery._names, gallery._clips = names, clips
        gallery._rows = {name: row for row, name in enumerate(names)}
        gallery._sums, gallery._units = sums, (sums / lengths[:, None]).astype(np.float32)
        return gallery

    @property
    def _dims(self) -> int | None:
        return self._sums.shape[1] or None

    def _row(self, name: str) -> int:
        row = self._rows.get(_composed(name))
        if row is None:
            raise UnknownVoiceError(
                f"no voice of the name {name[:MAX_NAME]!r} is enrolled: enrol it, or pass one of the {len(self)} names"
            )
        return row

    def _make_room(self, row: int, dims: int) -> None:
        if row == len(self._sums):  # twice as many, so that enrolling one by one does not copy each time
            sums, units = np.empty((max(8, 2 * row), dims)), np.empty((max(8, 2 * row), dims), np.float32)
            if row:
                sums[:row], units[:row] = self._sums, self._units
            self._sums, self._units = sums, units

    def _learned(self, utterance: Utterance) -> float | None:
        return self._threshold if utterance.threshold is None else utterance.threshold

    def _identify(
        self, block: Sequence[Utterance | EcapaError], top: int, threshold: float | None
    ) -> list[Identification | EcapaError]:
        asked: list[tuple[Utterance, NDArray[np.float64]] | EcapaError] = []
        for item in block:
            try:
                utterance = _good(item)
                asked.append((utterance, _direction(utterance, self._model, self._dims)))
            except EcapaError as exc:
                asked.append(exc)
        nearness = iter(self._nearness([one[1] for one in asked if not isinstance(one, EcapaError)]))
        outcomes: list[Identification | EcapaError] = []
        for one in asked:
            try:
                outcomes.append(
                    one if isinstance(one, EcapaError) else self._identification(*one, next(nearness), top, threshold)
                )
            except EcapaError as exc:
                outcomes.append(exc)
        return outcomes

    def _identification(
        self,
        utterance: Utterance,
        direction: NDArray[np.float64],
        nearness: NDArray[np.float32],
        top: int,
        threshold: float | None,
    ) -> Identification:
        candidates = self._best(nearness, direction, top) if self._names else ()
        score = candidates[0].score if candidates else -1.0
        verdict = decide(score, threshold, self._learned(utterance))
        return Identification(candidates[0].name if verdict.same else None, score, verdict.threshold, candidates)

    def _nearness(self, directions: list[NDArray[np.float64]]) -> NDArray[np.float32]:
        """Cosines `[directions, voices]` by row, to float32's rounding."""
        if not directions or not self._names:
            return np.empty((len(directions), len(self._names)), np.float32)
        found: NDArray[np.float32] = np.array(directions, np.float32) @ self._units[: len(self._names)].T
        return found

    def _best(self, nearness: NDArray[np.float32], direction: NDArray[np.float64], top: int) -> tuple[Candidate, ...]:
        """The best candidates. Rows within rounding of them are scored again, exactly."""
        voices = len(nearness)
        if top < voices:
            rounding = 2 * len(direction) * np.finfo(np.float32).eps
            rows = np.flatnonzero(nearness >= np.partition(nearness, voices - top)[voices - top] - rounding)
        else:
            rows = np.arange(voices)
        found = [
            Candidate(self._names[row], score) for row, score in zip(rows, self._exact(rows, direction), strict=True)
        ]
        return tuple(sorted(found, key=lambda one: (-one.score, one.name))[:top])

    def _exact(self, rows: list[int] | NDArray[np.intp], direction: NDArray[np.float64]) -> list[float]:
        sums = self._sums[rows]
        cosines: list[float] = np.clip((sums * direction).sum(axis=1) / _lengths(sums), -1, 1).tolist()
        return cosines


def _composed(name: str) -> str:
    if not isinstance(name, str):
        raise GalleryError(f"the name is {name!r}, of {type(name).__name__}: expected a str")
    return unicodedata.normalize("NFC", name)


def _fault(name: str) -> str | None:
    """Why a name is not valid; None if it is."""
    if not name or name != name.strip():
        return "is empty or has spaces around it: expected a name"
    if len(name) > MAX_NAME:
        return f"has {len(name)} characters: expected up to {MAX_NAME}"
    if not name.isprintable():
        return "has characters that are not printable: expected printable ones"
    return None


def _good(item: Utterance | EcapaError) -> Utterance:
    if isinstance(item, EcapaError):
        raise item
    if not isinstance(item, Utterance):
        raise TypeError(f"{describe(item)}: expected an Utterance, as SpeakerClient.utterance returns it")
    return item


def _direction(utterance: Utterance, model: str | None, dims: int | None) -> NDArray[np.float64]:
    """The embedding at length 1, checked to be of `model` and of size `dims`; None: any."""
    if not utterance.model:
        raise ModelMismatchError("the utterance has no model identity: embed it again")
    if model is not None and utterance.model != model:
        raise ModelMismatchError(
            f"the utterance is of model {utterance.model}, expected the gallery's, {model}: enrol again with one model"
        )
    shape = np.shape(utterance.embedding)
    if len(shape) != 1 or dims not in (None, shape[0]):
        raise EmbeddingError(f"an embedding of shape {list(shape)}: expected {[dims or 192]}, as the model gives it")
    return unit(utterance.embedding)


def _check_options(top: int, threshold: float | None) -> None:
    if top < 1:
        raise ValueError(f"top is {top}: expected 1 or more")
    check_threshold(threshold)


def _lengths(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths of the rows, each independent of the others, so that a saved gallery scores as before."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths: NDArray[np.float64] = np.sqrt((sums * sums).sum(axis=1))
    return lengths


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a gallery's file, with dtypes and dimensions checked."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        version = int(_array(archive, "format", size, "<i8", 0))
        if version != FORMAT:
            raise GalleryFileError(
                f"a gallery of format {version}, this version reads {FORMAT}: upgrade ecapa-triton, or enrol again"
            )
        if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in MEMBERS):
            raise ValueError(f"expected the arrays {', '.join(MEMBERS)}")
        kinds = {
            "model": ("<U", 0),
            "threshold": ("<f8", 0),
            "names": ("<U", 1),
            "clips": ("<i8", 1),
            "sums": ("<f8", 2),
        }
        return {name: _array(archive, name, size, *kind) for name, kind in kinds.items()}


def _array(archive: zipfile.ZipFile, name: str, size: int, dtype: str, dimensions: int) -> NDArray[Any]:
    """One array. Its header is checked first: the data must be in the file, which has `size` bytes."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size <= size:
        raise ValueError(f"{name} is compressed")
    with archive.open(info) as member:
        if _npy.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is of another version of npy")
        shape, fortran, found = _npy.read_array_header_1_0(member)
        header = member.tell()
    right = found.str.startswith("<U") and found.itemsize <= 4 * MAX_NAME if dtype == "<U" else found.str == dtype
    if not right or fortran or len(shape) != dimensions or min(shape, default=0) < 0:
        raise ValueError(f"{name} is {found.str[:20]} {list(shape)}: expected {dtype} of {dimensions} dimensions")
    if header + math.prod(shape) * found.itemsize != info.file_size:
        raise ValueError(f"{name} has {info.file_size} bytes, which does not match its shape")
    with archive.open(info) as member:
        array: NDArray[Any] = _npy.read_array(member, allow_pickle=False)
    return array
