"""Enrolled voices and speaker identification, without server or audio."""

from __future__ import annotations

import math
import os
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._files import replacing
from ._scoring import MIN_SPEECH, Utterance, Verification, check_speech, check_threshold, decide, unit
from .audio import counted, describe
from .errors import EcapaError, EmbeddingError, GalleryError, GalleryFileError, ModelMismatchError, UnknownVoiceError

MAX_NAME = 128  # characters
FORMAT = 1  # version of the files
ARRAYS = {"model": "U0", "threshold": "f0", "names": "U1", "clips": "i1", "sums": "f2"}  # kind and dimensions
SHORTEST_MEAN = 1e-6  # of unit vectors; below it, rounding decides the direction


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


class _Voice(NamedTuple):
    total: NDArray[np.float64]  # [dims], the sum of its utterances at length 1
    clips: int  # their number


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
    numbers takes 2.7 kB of memory and 1.6 kB in a file; identification among 100,000 voices takes about 10 ms on one
    core, and longer at the first time after a change.

    Threads may read a gallery at the same time (identify, verify, scores, save). Changes (enrol, remove) need a lock
    of the caller's.
    """

    def __init__(self) -> None:
        self._model: str | None = None
        self._threshold: float | None = None
        self._voices: dict[str, _Voice] = {}  # in the order of enrolment
        self._found: tuple[list[str], NDArray[np.float32]] | None = None  # of `_index`, until the next change

    @property
    def model(self) -> str | None:
        """Identity of the model of all voices, as `Utterance.model`; None while the gallery is empty."""
        return self._model

    @property
    def threshold(self) -> float | None:
        """The model's threshold, of the latest utterance enrolled that had one; None if none had."""
        return self._threshold

    def __len__(self) -> int:
        return len(self._voices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._voices)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _composed(name) in self._voices

    def __repr__(self) -> str:
        return f"<Gallery of {counted(len(self), 'voice')}, model {self._model}>"

    def clips(self, name: str) -> int:
        """Number of utterances of a voice.

        Raises:
            UnknownVoiceError: No voice of this name is enrolled.
        """
        return self._voice(name).clips

    def enrol(
        self,
        name: str,
        utterances: Utterance | Iterable[Utterance | EcapaError],
        *,
        min_speech: float = MIN_SPEECH,
    ) -> None:
        """Add utterances to a new or an enrolled voice, in which all its utterances have equal weight.

        Either all utterances are added or, if an error is raised, none.

        Args:
            name: Name of the voice: up to 128 printable characters, without spaces around them.
            utterances: One, or several as `client.utterances(...)` yields them.
            min_speech: Seconds of speech that each must have; 0: no check.

        Raises:
            GalleryError: The name is not valid, or there is no utterance.
            TooLittleSpeechError: An utterance has less speech than `min_speech`.
            ModelMismatchError: An utterance is of another model than the gallery or those before it.
            EmbeddingError: An embedding has no direction or another size, or all of them cancel out.
            EcapaError: The first error among `utterances`.
        """
        name = _checked(name)
        items = [utterances] if isinstance(utterances, Utterance | EcapaError) else list(utterances)
        directions = self._directions(items, min_speech)
        if not directions:
            raise GalleryError(f"no utterance for {name!r}: pass one or more")
        before = [self._voices[name].total] if name in self._voices else []
        voice = _Voice(np.sum(before + directions, axis=0), len(items) + (self.clips(name) if before else 0))
        if not _lengths(voice.total) >= SHORTEST_MEAN * voice.clips:
            raise EmbeddingError(f"the utterances of {name!r} cancel each other out: enrol others, of one speaker")
        self._voices[name], self._found = voice, None
        for one in map(_good, items):
            self._model = one.model
            self._threshold = self._learned(one)

    def remove(self, name: str) -> None:
        """Remove a voice, and with the last one the gallery's model.

        Raises:
            UnknownVoiceError: No voice of this name is enrolled.
        """
        self._voice(name)
        del self._voices[_composed(name)]
        self._found = None
        if not self._voices:
            self._model = self._threshold = None

    def identify(
        self, utterance: Utterance, top: int = 5, threshold: float | None = None, *, min_speech: float = MIN_SPEECH
    ) -> Identification:
        """Find the voice of an utterance.

        Args:
            utterance: The probe.
            top: Largest number of candidates.
            threshold: Cosine above which the nearest voice is named; None: the model's, from the utterance.
            min_speech: Seconds of speech that the utterance must have; 0: no check.

        Raises:
            TooLittleSpeechError: The utterance has less speech than `min_speech`.
            ModelMismatchError: The utterance is of another model than the gallery.
            ThresholdError: No threshold is given and the model has none, or it is not a cosine.
            EmbeddingError: The embedding has no direction, or another size.
            ValueError: `top` is below 1.
        """
        _check_options(top, threshold)
        (direction,) = self._directions([utterance], min_speech)
        candidates = self._best(direction, top) if self._voices else ()
        verdict = decide(candidates[0].score if candidates else -1.0, threshold, self._learned(utterance))
        name = candidates[0].name if verdict.same else None
        return Identification(name, verdict.score, verdict.threshold, candidates)

    def identify_many(
        self,
        utterances: Iterable[Utterance | EcapaError],
        top: int = 5,
        threshold: float | None = None,
        *,
        min_speech: float = MIN_SPEECH,
    ) -> Iterator[Identification | EcapaError]:
        """Find the voices of many utterances.

        Args:
            utterances: As `client.utterances(...)` yields them; may be a generator.
            top: As for `identify`.
            threshold: As for `identify`.
            min_speech: As for `identify`.

        Returns:
            The results in order. Errors among `utterances`, and those that `identify` would raise, take the place of
            their results.

        Raises:
            ThresholdError: The threshold given is not a cosine.
            ValueError: `top` is below 1.
        """
        _check_options(top, threshold)

        def outcome(item: Utterance | EcapaError) -> Identification | EcapaError:
            try:
                return self.identify(_good(item), top, threshold, min_speech=min_speech)
            except EcapaError as exc:
                return exc

        return map(outcome, utterances)

    def scores(self, utterances: Iterable[Utterance]) -> NDArray[np.float32]:
        """Cosines of utterances to all voices, whatever speech the utterances have.

        Returns:
            float32 `[utterances, voices]`, -1 to 1, the voices in the order of iteration.

        Raises:
            ModelMismatchError: An utterance is of another model than the gallery or those before it.
            EmbeddingError: An embedding has no direction, or another size.
        """
        directions, (names, units) = self._directions(utterances), self._index()
        if not directions or not names:
            return np.empty((len(directions), len(names)), np.float32)
        scores: NDArray[np.float32] = np.array(directions, np.float32) @ units.T
        return np.clip(scores, -1, 1, out=scores)

    def verify(
        self, name: str, utterance: Utterance, threshold: float | None = None, *, min_speech: float = MIN_SPEECH
    ) -> Verification:
        """Decide whether an utterance is of a voice.

        Args:
            name: Name of the voice.
            utterance: The probe.
            threshold: Cosine above which it is the same speaker; None: the model's, from the utterance.
            min_speech: Seconds of speech that the utterance must have; 0: no check.

        Raises:
            TooLittleSpeechError: The utterance has less speech than `min_speech`.
            UnknownVoiceError: No voice of this name is enrolled.
            ModelMismatchError: The utterance is of another model than the gallery.
            ThresholdError: No threshold is given and the model has none, or it is not a cosine.
            EmbeddingError: The embedding has no direction, or another size.
        """
        voice = self._voice(name)
        (direction,) = self._directions([utterance], min_speech)
        return decide(_cosines([voice], direction)[0], threshold, self._learned(utterance))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery to an npz file, whole or not at all, in place of an existing file.

        Programs that enrol into one file must lock it from loading to saving, as `ecapa-triton enrol` does.

        Voices identify people: restrict who can read the file. It keeps the permissions of the file it replaces; a
        new file gets the usual ones.

        Raises:
            OutputError: It cannot be written.
        """
        voices = self._voices.values()
        with replacing(path) as file:
            np.savez(
                file,
                format=np.array(FORMAT, "<i8"),
                model=np.array(self._model or ""),
                threshold=np.array(math.nan if self._threshold is None else self._threshold, "<f8"),
                names=np.array(list(self._voices), str),
                clips=np.array([voice.clips for voice in voices], "<i8"),
                sums=np.array([voice.total for voice in voices], "<f8").reshape(len(voices), self._dims or 0),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gallery:
        """Read a gallery that `save` wrote, exact to the last bit.

        No code in the file is run, and the memory taken is bounded by its size.

        Raises:
            GalleryFileError: The file cannot be read, holds no gallery, or is damaged.
        """
        name = describe(path)
        gallery = cls()
        try:
            if not Path(path).is_file():
                os.stat(path)
                raise OSError("not a regular file")
            gallery._restore(**_read(path))
        except OSError as exc:
            raise GalleryFileError(
                f"{name}: cannot be read ({exc.strerror or exc}): expected a gallery, as enrol writes it"
            ) from exc
        except Exception as exc:  # zipfile and numpy raise many types for damaged files
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise GalleryFileError(
                f"{name}: not a gallery of format {FORMAT}, or damaged ({reason}): pass a file that Gallery.save of "
                "this version wrote, or enrol again"
            ) from exc
        return gallery

    def _restore(self, model: Any, threshold: Any, names: Any, clips: Any, sums: Any) -> None:
        self._model = model.item() or None
        self._threshold = None if math.isnan(threshold) else threshold.item()
        check_threshold(self._threshold)
        found = {_checked(name) for name in names.tolist()}
        if found != set(names.tolist()) or not len(found) == len(names) == len(clips) == len(sums):
            raise ValueError(f"{len(found)} names in NFC, {len(clips)} counts of clips, {len(sums)} sums")
        if bool(found) != bool(self._model):
            raise ValueError("voices without a model, or a model without voices")
        sums, lengths = sums.astype(np.float64), _lengths(sums)
        if not np.all((clips >= 1) & (lengths >= SHORTEST_MEAN * clips) & (lengths <= clips * (1 + 1e-6))):
            raise ValueError("a voice is not a sum of as many unit vectors as it has clips")
        self._voices = dict(zip(names.tolist(), map(_Voice, sums, clips.tolist()), strict=True))

    @property
    def _dims(self) -> int | None:
        return next((len(voice.total) for voice in self._voices.values()), None)

    def _voice(self, name: str) -> _Voice:
        voice = self._voices.get(_composed(name))
        if voice is None:
            raise UnknownVoiceError(
                f"no voice of the name {name[:MAX_NAME]!r} is enrolled: enrol it, or pass "
                f"another name ({counted(len(self), 'voice')})"
            )
        return voice

    def _learned(self, utterance: Utterance) -> float | None:
        return self._threshold if utterance.threshold is None else utterance.threshold

    def _directions(self, items: Iterable[Utterance | EcapaError], min_speech: float = 0) -> list[NDArray[np.float64]]:
        """The embeddings `[dims]` at length 1, checked to be of one model and size, the gallery's if it has one."""
        model, dims, directions = self._model, self._dims, []
        for item in items:
            utterance = _good(item)
            check_speech(utterance, min_speech)
            if not utterance.model:
                raise ModelMismatchError("the utterance has no model identity: embed it again")
            if model not in (None, utterance.model):
                raise ModelMismatchError(
                    f"the utterance is of model {utterance.model}, expected the gallery's, {model}: enrol again with "
                    "one model"
                )
            shape = np.shape(utterance.embedding)
            if len(shape) != 1 or dims not in (None, *shape):
                raise EmbeddingError(f"an embedding of shape {list(shape)}: expected {[dims or 192]}")
            model, dims = utterance.model, shape[0]
            directions.append(unit(utterance.embedding))
        return directions

    def _index(self) -> tuple[list[str], NDArray[np.float32]]:
        """The names, and the voices `[voices, dims]` at length 1."""
        found = self._found
        if found is None:
            sums = np.array([voice.total for voice in self._voices.values()]).reshape(len(self), self._dims or 0)
            found = self._found = list(self._voices), (sums / _lengths(sums)[:, None]).astype(np.float32)
        return found

    def _best(self, direction: NDArray[np.float64], top: int) -> tuple[Candidate, ...]:
        """The best candidates. Voices within rounding of them are scored again, exactly."""
        names, units = self._index()
        scores = units @ direction.astype(np.float32)
        least = np.partition(scores, -top)[-top] if top < len(names) else -np.inf
        rounding = 2 * len(direction) * np.finfo(np.float32).eps
        near = [names[row] for row in np.flatnonzero(scores >= least - rounding)]
        exact = _cosines([self._voices[name] for name in near], direction)
        return tuple(sorted(map(Candidate, near, exact), key=lambda one: (-one.score, one.name))[:top])


def _composed(name: str) -> str:
    if not isinstance(name, str):
        raise GalleryError(f"the name is {name!r}, of {type(name).__name__}: expected a str")
    return unicodedata.normalize("NFC", name)


def _checked(name: str) -> str:
    """The composed name of a voice to enrol."""
    name = _composed(name)
    if not (name.isprintable() and 0 < len(name.strip()) == len(name) <= MAX_NAME):
        raise GalleryError(
            f"the name {name[:MAX_NAME]!r} of {len(name)} characters: expected 1 to {MAX_NAME} printable characters, "
            "without spaces around them"
        )
    return name


def _good(item: Utterance | EcapaError) -> Utterance:
    if isinstance(item, EcapaError):
        raise item
    if not isinstance(item, Utterance):
        raise TypeError(f"{describe(item)}: expected an Utterance, as SpeakerClient.utterance returns it")
    return item


def _check_options(top: int, threshold: float | None) -> None:
    if top < 1:
        raise ValueError(f"top is {top}: expected 1 or more")
    check_threshold(threshold)


def _lengths(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths of the rows, each independent of the others, so that a saved gallery scores as before."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths: NDArray[np.float64] = np.sqrt((sums * sums).sum(axis=-1))
    return lengths


def _cosines(voices: Sequence[_Voice], direction: NDArray[np.float64]) -> list[float]:
    sums = np.array([voice.total for voice in voices])
    cosines: list[float] = np.clip((sums * direction).sum(axis=1) / _lengths(sums), -1, 1).tolist()
    return cosines


def _read(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The arrays of a gallery's file, with checksums, dtypes and dimensions checked."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("an array is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    with np.load(path, allow_pickle=False) as file:
        if file["format"] != FORMAT:
            raise ValueError(f"format {file['format']}")
        arrays = {name: file[name] for name in ARRAYS}
    for name, expected in ARRAYS.items():
        if (found := f"{arrays[name].dtype.kind}{arrays[name].ndim}") != expected:
            raise ValueError(f"{name} is {found}: expected {expected}")
    return arrays
