"""Enrolled voices against plain arithmetic, their file against damage, and one round with the real server."""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ecapa_triton import SpeakerClient
from ecapa_triton._files import check_output, replacing
from ecapa_triton._gallery import (
    BLOCK,
    Candidate,
    Gallery,
    GalleryError,
    GalleryFileError,
    Identification,
    ModelMismatchError,
    UnknownVoiceError,
)
from ecapa_triton._scoring import Utterance, mean_direction, score
from ecapa_triton.errors import AudioError, EcapaError, EmbeddingError, OutputError, ThresholdError
from hypothesis import given
from hypothesis import strategies as st

from server.triton import TritonServer

SAMPLES = Path(__file__).parents[1] / "samples"
MODEL, OTHER = "1a2b3c4d" * 3, "0f" * 12


def vector(seed: int, size: int = 192) -> np.ndarray:
    return (30 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def utterance(of: int | list[float] | np.ndarray, model: str = MODEL, threshold: float | None = 0.45) -> Utterance:
    embedding = vector(of) if isinstance(of, int) else np.asarray(of, np.float32)
    return Utterance(embedding, 1.0, model, threshold)


def gallery_of(voices: dict[str, list[float]]) -> Gallery:
    gallery = Gallery()
    for name, embedding in voices.items():
        gallery.enrol(name, utterance(embedding))
    return gallery


def contents(gallery: Gallery) -> tuple[Any, ...]:
    rows = [(name, gallery.clips(name), gallery._rows[name]) for name in gallery]
    voices = [(name, clips, gallery._sums[row].tobytes(), gallery._units[row].tobytes()) for name, clips, row in rows]
    return gallery.model, gallery.threshold, voices


@pytest.fixture
def gallery() -> Gallery:
    gallery = Gallery()
    gallery.enrol("anna", [utterance(1), utterance(2)])
    gallery.enrol("berta", utterance(3))
    return gallery


# --- enrolling ---


def test_enrolled_voices_are_there_in_order(gallery: Gallery) -> None:
    assert list(gallery) == ["anna", "berta"] and len(gallery) == 2
    assert "anna" in gallery and "carl" not in gallery and None not in gallery
    assert (gallery.clips("anna"), gallery.clips("berta")) == (2, 1)
    assert (gallery.model, gallery.threshold) == (MODEL, 0.45)
    assert "2 voices" in repr(gallery) and "anna" not in repr(gallery)


@pytest.mark.parametrize("order", list(permutations([1, 2, 3])))
def test_each_clip_counts_the_same_whenever_it_came(order: tuple[int, ...]) -> None:
    gallery, asked = Gallery(), utterance(9)
    gallery.enrol("anna", [utterance(1000 * vector(order[0])), utterance(order[1])])
    gallery.enrol("berta", utterance(7))
    gallery.enrol("anna", (utterance(seed) for seed in order[2:]))
    expected = score(mean_direction([vector(seed) for seed in (1, 2, 3)]), asked.embedding)
    assert gallery.verify("anna", asked).score == pytest.approx(expected, abs=1e-6)
    assert (
        gallery.identify(asked, top=2).candidates[0].score
        == gallery.verify(gallery.identify(asked).candidates[0].name, asked).score
    )
    assert gallery.clips("anna") == 3 and list(gallery) == ["anna", "berta"]


@pytest.mark.parametrize("name", ["anna", "carl"])
@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (AudioError("x.wav: no audio"), AudioError, "x.wav"),
        (utterance(5, OTHER), ModelMismatchError, f"of model {MODEL}, the utterance of {OTHER}: enrol again"),
        (utterance(5, ""), ModelMismatchError, "does not say what model"),
        (utterance(np.full(192, np.nan)), EmbeddingError, "length nan"),
        (utterance(np.full(192, np.inf)), EmbeddingError, "length inf"),
        (utterance(np.zeros(192)), EmbeddingError, "length 0"),
        (utterance(np.ones(191)), EmbeddingError, r"shape \[191\]: expected \[192\]"),
        (utterance(np.ones((1, 192))), EmbeddingError, r"shape \[1, 192\]: expected \[192\]"),
        (vector(1), TypeError, r"array float32\[192\]: expected an Utterance"),
    ],
)
def test_all_of_a_call_is_enrolled_or_nothing(
    gallery: Gallery, name: str, bad: Any, kind: type[Exception], words: str
) -> None:
    before = contents(gallery)
    for items in [utterance(4), bad], [bad, utterance(4)]:
        with pytest.raises(kind, match=words) as caught:
            gallery.enrol(name, items)
        assert type(caught.value) is kind and "\n" not in str(caught.value)
        assert contents(gallery) == before


def test_a_first_enrolment_that_fails_leaves_no_model() -> None:
    gallery = Gallery()
    with pytest.raises(ModelMismatchError, match=f"of model {MODEL}, the utterance of {OTHER}"):
        gallery.enrol("anna", [utterance(1), utterance(2, OTHER)])
    assert (gallery.model, gallery.threshold, len(gallery)) == (None, None, 0)
    gallery.enrol("anna", utterance(2, OTHER))
    assert gallery.model == OTHER


def test_no_utterance_is_refused(gallery: Gallery) -> None:
    for items in [], iter(()):
        with pytest.raises(GalleryError, match="no utterance for 'carl': pass one or more"):
            gallery.enrol("carl", items)
    assert "carl" not in gallery


def test_utterances_that_cancel_out_are_refused(gallery: Gallery) -> None:
    with pytest.raises(EmbeddingError, match="'carl' cancel each other out"):
        gallery.enrol("carl", [utterance(4), utterance(-vector(4))])
    with pytest.raises(EmbeddingError, match="'berta' cancel"):
        gallery.enrol("berta", utterance(-vector(3)))
    assert list(gallery) == ["anna", "berta"] and gallery.clips("berta") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "'' is empty"),
        (" anna", "spaces around"),
        ("anna ", "spaces around"),
        ("an\nna", r"'an\\nna' has characters that cannot be seen"),
        ("an\0na", "cannot be seen"),
        ("an\u202ena", "cannot be seen"),
        ("an\udc80na", "cannot be seen"),
        ("a" * 129, "has 129 characters: expected up to 128"),
        (7, "the name is 7, of int: expected a str"),
    ],
)
def test_names_that_cannot_be_one(gallery: Gallery, name: Any, words: str) -> None:
    def never() -> Iterator[Utterance]:
        raise AssertionError("asked for before the name was looked at")
        yield

    with pytest.raises(GalleryError, match=words) as caught:
        gallery.enrol(name, never())
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    assert list(gallery) == ["anna", "berta"] and name not in gallery


def test_names_of_all_the_world(tmp_path: Path) -> None:
    names = ["Zoë", "山田 太郎", "Ольга", "محمد", "𝒜nna", "a" * 128]
    gallery = Gallery()
    for seed, name in enumerate(names):
        gallery.enrol(name, utterance(seed))
    gallery.save(tmp_path / "g.npz")
    assert list(Gallery.load(tmp_path / "g.npz")) == names
    decomposed = unicodedata.normalize("NFD", "Zoë")
    assert decomposed != "Zoë" and decomposed in gallery
    gallery.enrol(decomposed, utterance(0))
    assert len(gallery) == len(names) and gallery.clips("Zoë") == 2
    assert gallery.verify(decomposed, utterance(0)).same
    gallery.remove(decomposed)
    assert "Zoë" not in gallery


def test_removing(gallery: Gallery) -> None:
    gallery.enrol("carl", utterance(4))
    gallery.remove("anna")
    assert list(gallery) == ["berta", "carl"] and "anna" not in gallery
    assert gallery.identify(utterance(4)).name == "carl" and gallery.identify(utterance(3)).name == "berta"
    assert gallery.identify(utterance(1)).name is None
    np.testing.assert_allclose(gallery.scores([utterance(3), utterance(4)]).diagonal(), 1, atol=1e-6)
    for name in "anna", "nobody":
        with pytest.raises(UnknownVoiceError, match=f"nobody of the name '{name}' is enrolled"):
            gallery.remove(name)


def test_an_emptied_gallery_takes_another_model(gallery: Gallery) -> None:
    gallery.remove("anna")
    gallery.remove("berta")
    assert (len(gallery), gallery.model, gallery.threshold) == (0, None, None)
    gallery.enrol("anna", utterance([3, 4], OTHER, None))
    assert (gallery.model, gallery.threshold) == (OTHER, None)
    assert gallery.verify("anna", utterance([3, 4], OTHER)).score == pytest.approx(1)


def test_enrolling_one_by_one_seldom_copies() -> None:
    gallery, arrays = Gallery(), []
    for seed in range(1000):
        gallery.enrol(f"voice {seed}", utterance([1, seed]))
        if not arrays or arrays[-1] is not gallery._sums:
            arrays.append(gallery._sums)
    assert len(arrays) <= 9 and len(gallery.scores([utterance([1, 0])])[0]) == 1000


# --- telling who speaks ---


def test_identify(gallery: Gallery) -> None:
    asked = utterance(vector(3) + 0.3 * vector(8))
    found = gallery.identify(asked)
    expected = score(vector(3), asked.embedding)
    assert found.name == "berta" and found.threshold == 0.45
    assert found.score == found.candidates[0].score == pytest.approx(expected, abs=1e-9)
    assert [name for name, _ in found.candidates] == ["berta", "anna"]


def test_unknown_is_nobody_above_the_threshold() -> None:
    gallery = gallery_of({"anna": [1, 0], "berta": [0, 1]})
    asked = utterance([4, 3])
    assert gallery.identify(asked, threshold=0.79).name == "anna"
    at = gallery.identify(asked, threshold=0.8)
    assert (at.name, at.threshold) == (None, 0.8)
    assert at.score == pytest.approx(0.8) and [name for name, _ in at.candidates] == ["anna", "berta"]
    verification = gallery.verify("berta", asked, threshold=0.6)
    assert not verification.same and verification.score == pytest.approx(0.6)
    assert gallery.verify("berta", asked, threshold=0.59).same


def test_the_threshold_is_the_one_given_else_the_utterances_else_the_gallerys() -> None:
    gallery = gallery_of({"anna": [1, 0]})
    for asked, given_, used in [(0.7, 0.2, 0.2), (0.7, None, 0.7), (None, None, 0.45), (0.7, 0.0, 0.0)]:
        one = utterance([1, 1], threshold=asked)
        assert gallery.identify(one, threshold=given_).threshold == used
        assert gallery.verify("anna", one, given_).threshold == used
    gallery.enrol("berta", utterance([0, 1], threshold=0.5))
    gallery.enrol("carl", utterance([1, -1], threshold=None))
    assert gallery.threshold == 0.5


def test_without_a_threshold_nothing_is_decided() -> None:
    gallery, asked = Gallery(), utterance([1, 0], threshold=None)
    for _ in range(2):
        with pytest.raises(ThresholdError, match="no threshold of its own: pass threshold"):
            gallery.identify(asked)
        (outcome,) = gallery.identify_many([asked])
        assert isinstance(outcome, ThresholdError)
        gallery.enrol("anna", asked)
    with pytest.raises(ThresholdError, match="no threshold of its own"):
        gallery.verify("anna", asked)
    assert gallery.identify(asked, threshold=0.3).name == "anna"


@pytest.mark.parametrize("threshold", [1.1, -1.1, math.nan, math.inf])
def test_a_threshold_is_a_cosine(gallery: Gallery, threshold: float) -> None:
    for refuse in (
        lambda: gallery.identify(utterance(1), threshold=threshold),
        lambda: gallery.identify_many([], threshold=threshold),
        lambda: gallery.verify("anna", utterance(1), threshold),
        lambda: Gallery().identify(utterance(1), threshold=threshold),
    ):
        with pytest.raises(ThresholdError, match="expected a cosine"):
            refuse()


def test_nobody_is_known_to_an_empty_gallery() -> None:
    gallery = Gallery()
    assert gallery.identify(utterance(1)) == Identification(None, -1.0, 0.45, ())
    assert gallery.identify(utterance(1), threshold=-1.0).name is None
    assert gallery.scores([utterance(1), utterance(2)]).shape == (2, 0)
    with pytest.raises(UnknownVoiceError, match="nobody of the name 'anna' is enrolled"):
        gallery.verify("anna", utterance(1))
    with pytest.raises(EmbeddingError):
        gallery.identify(utterance(np.zeros(192)))


def test_one_voice_alone_is_not_everybody() -> None:
    gallery = gallery_of({"anna": vector(1).tolist()})
    assert gallery.identify(utterance(2)).name is None
    assert gallery.identify(utterance(1)).name == "anna"


@pytest.mark.parametrize(("top", "count"), [(1, 1), (2, 2), (3, 3), (99, 3)])
def test_top_is_the_most_that_are_named(top: int, count: int) -> None:
    gallery = gallery_of({"low": [0, 1], "high": [1, 0], "middle": [1, 1]})
    found = gallery.identify(utterance([5, 1]), top=top)
    assert [name for name, _ in found.candidates] == ["high", "middle", "low"][:count]


@pytest.mark.parametrize("top", [0, -1])
def test_top_is_at_least_one(gallery: Gallery, top: int) -> None:
    for refuse in (lambda: gallery.identify(utterance(1), top), lambda: gallery.identify_many([], top)):
        with pytest.raises(ValueError, match=f"top is {top}: expected 1 or more"):
            refuse()


def test_equal_scores_go_by_name_whatever_the_order_of_enrolment() -> None:
    same, better = vector(1), vector(1) + 0.1 * vector(2)
    for names in (f"{i:02}" for i in range(40)), (f"{i:02}" for i in reversed(range(40))):
        gallery = Gallery()
        for name in names:
            gallery.enrol(name, utterance(same))
        gallery.enrol("z", utterance(better))
        found = gallery.identify(utterance(vector(1) + 0.2 * vector(2)), top=4)
        assert [name for name, _ in found.candidates] == ["z", "00", "01", "02"]
        assert len({score for _, score in found.candidates[1:]}) == 1


def test_the_best_are_told_apart_below_the_rounding_of_float32() -> None:
    random = np.random.default_rng(0)
    near = {f"voice {i}": vector(1) + 1e-2 * random.standard_normal(192).astype(np.float32) for i in range(2000)}
    gallery = Gallery()
    for name, embedding in near.items():
        gallery.enrol(name, utterance(embedding))
    asked = utterance(1)
    exact = sorted(((-score(embedding, asked.embedding), name) for name, embedding in near.items()))
    found = gallery.identify(asked, top=20).candidates
    assert [name for name, _ in found] == [name for _, name in exact[:20]]


def test_an_utterance_of_another_model_is_refused_everywhere(gallery: Gallery) -> None:
    other = utterance(1, OTHER)
    for refuse in (
        lambda: gallery.identify(other),
        lambda: gallery.verify("anna", other),
        lambda: gallery.scores([utterance(1), other]),
        lambda: Gallery().scores([utterance(1), other]),
    ):
        with pytest.raises(ModelMismatchError, match=f"of model {MODEL}, the utterance of {OTHER}: enrol again"):
            refuse()


@pytest.mark.parametrize("bad", [np.full(192, np.nan), np.zeros(192), np.ones(191), np.ones((1, 192)), np.float32(1)])
def test_an_embedding_without_a_direction_is_refused_everywhere(gallery: Gallery, bad: np.ndarray) -> None:
    one = Utterance(bad, 1.0, MODEL, 0.45)
    for refuse in (
        lambda: gallery.identify(one),
        lambda: gallery.verify("anna", one),
        lambda: gallery.scores([utterance(1), one]),
    ):
        with pytest.raises(EmbeddingError, match="expected"):
            refuse()


def test_what_is_no_utterance_is_refused(gallery: Gallery) -> None:
    error = AudioError("x.wav: no audio")
    for refuse in (lambda one: gallery.identify(one), lambda one: gallery.verify("anna", one)):
        with pytest.raises(TypeError, match=r"array float32\[192\]: expected an Utterance"):
            refuse(vector(1))
        with pytest.raises(AudioError) as caught:  # as client.utterances yields one
            refuse(error)
        assert caught.value is error


def test_many_in_order_with_their_errors(gallery: Gallery) -> None:
    error = AudioError("x.wav: no audio")
    items = [utterance(1), error, utterance(3, OTHER), utterance(np.zeros(192)), *map(utterance, range(2 * BLOCK))]
    outcomes = list(gallery.identify_many(iter(items), top=1))
    assert outcomes[1] is error
    assert isinstance(outcomes[2], ModelMismatchError) and isinstance(outcomes[3], EmbeddingError)
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, Identification):
            assert outcome == gallery.identify(item, top=1)  # type: ignore[arg-type]
    assert sum(isinstance(outcome, Identification) for outcome in outcomes) == 1 + 2 * BLOCK


def test_many_are_taken_a_block_at_a_time(gallery: Gallery) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Utterance]:
        while True:
            taken.append(1)
            yield utterance(1)

    outcomes = gallery.identify_many(endless())
    assert not taken
    next(outcomes)
    assert len(taken) == BLOCK


def test_scores_are_cosines_in_the_order_of_the_voices() -> None:
    gallery = Gallery()
    for seed in range(9):
        gallery.enrol(f"voice {seed}", utterance(seed))
    gallery.remove("voice 2")
    asked = [utterance(seed) for seed in (20, 5, 21)]
    scores = gallery.scores(iter(asked))
    expected = [[score(one.embedding, vector(int(name[-1]))) for name in gallery] for one in asked]
    assert scores.shape == (3, 8) and scores.dtype == np.float32 and list(gallery)[2] == "voice 3"
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    own = np.abs(gallery.scores([utterance(scale * vector(3)) for scale in range(-50, 50) if scale]))
    assert own.max() == 1  # and no more, by float32's rounding
    assert gallery.scores([]).shape == (0, 8)


def test_a_voice_that_nobody_has_cannot_be_claimed(gallery: Gallery) -> None:
    with pytest.raises(UnknownVoiceError, match="nobody of the name 'carl' is enrolled: .* 2 names"):
        gallery.verify("carl", utterance(1))
    with pytest.raises(UnknownVoiceError, match="'carl'"):
        gallery.clips("carl")


def test_threads_may_read_at_once(gallery: Gallery) -> None:
    for seed in range(10, 200):
        gallery.enrol(f"voice {seed}", utterance(seed))
    asked = [utterance(vector(seed % 190 + 10) + vector(3)) for seed in range(200)]
    alone = [gallery.identify(one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(gallery.identify, asked)) == alone


# --- anything at all, against plain arithmetic ---

names = st.sampled_from(["anna", "berta", "carl", "Zoë"]) | st.text("abc", min_size=1, max_size=2)
small = st.lists(st.integers(-3, 3), min_size=4, max_size=4).filter(any)
enrolments = st.tuples(names, st.lists(small, min_size=1, max_size=3))
removals = st.tuples(names, st.just([]))


def by_hand(voices: dict[str, list[list[float]]], asked: list[float]) -> dict[str, float]:
    directions = {name: sum(np.array(one) / math.hypot(*one) for one in clips) for name, clips in voices.items()}
    cosine: Callable[[np.ndarray], float] = lambda a: float(a @ asked) / math.hypot(*a) / math.hypot(*asked)  # noqa: E731
    return {name: cosine(direction) for name, direction in directions.items()}


@given(steps=st.lists(enrolments | enrolments | removals, max_size=40), asked=small, top=st.integers(1, 12))
def test_any_history_scores_as_by_hand(
    steps: list[tuple[str, list[list[float]]]], asked: list[float], top: int
) -> None:
    gallery, voices = Gallery(), dict[str, list[list[float]]]()
    for name, clips in steps:
        if not clips:
            if voices.pop(name, None) is not None:
                gallery.remove(name)
            continue
        try:
            gallery.enrol(name, [utterance(clip) for clip in clips])
        except EmbeddingError:
            total = sum(np.array(one) / math.hypot(*one) for one in [*voices.get(name, []), *clips])
            assert math.hypot(*total) < 1e-5
        else:
            voices[name] = [*voices.get(name, []), *clips]
    expected = by_hand(voices, asked)
    assert list(gallery) == list(voices) and [gallery.clips(name) for name in gallery] == [*map(len, voices.values())]
    np.testing.assert_allclose(gallery.scores([utterance(asked)])[0], list(expected.values()), atol=1e-6)
    found = gallery.identify(utterance(asked), top, threshold=0.5)
    best = sorted(expected.values(), reverse=True)[:top]
    np.testing.assert_allclose([score for _, score in found.candidates], best, atol=1e-12)
    assert len({name for name, _ in found.candidates}) == len(best)
    for name, its in found.candidates:
        assert its == pytest.approx(expected[name], abs=1e-12) == gallery.verify(name, utterance(asked)).score
    assert list(found.candidates) == sorted(found.candidates, key=lambda one: (-one.score, one.name))
    assert found.name == (found.candidates[0].name if best and found.score > 0.5 else None)


@given(clips=st.lists(st.tuples(names, st.integers(0, 99)), min_size=1, max_size=20), data=st.data())
def test_the_order_of_enrolment_does_not_matter(clips: list[tuple[str, int]], data: st.DataObject) -> None:
    one, other = Gallery(), Gallery()
    for gallery, order in (one, clips), (other, data.draw(st.permutations(clips))):
        for name, seed in order:
            gallery.enrol(name, utterance(seed))
    asked = utterance(100)
    for name in one:
        assert one.verify(name, asked).score == pytest.approx(other.verify(name, asked).score, abs=1e-6)
    assert set(one) == set(other) and all(one.clips(name) == other.clips(name) for name in one)


# --- the file ---


def test_a_saved_gallery_is_the_same(gallery: Gallery, tmp_path: Path) -> None:
    for seed in range(10, 60):
        gallery.enrol(f"voice {seed}", [utterance(seed + i) for i in range(seed % 3 + 1)])
    gallery.remove("anna")
    path = tmp_path / "voices.npz"
    gallery.save(path)
    loaded = Gallery.load(str(path))
    assert contents(loaded) == contents(gallery)
    asked = [utterance(seed) for seed in range(100)]
    assert list(loaded.identify_many(asked)) == list(gallery.identify_many(asked))
    for each in gallery, loaded:  # and goes on as it would have
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


def test_saving_fails_as_a_whole(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g.npz"
    gallery.save(path)
    gallery.enrol("carl", utterance(4))
    for error, kind in [
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ]:

        def fail(file: io.BufferedWriter, error: BaseException = error, **arrays: Any) -> None:
            file.write(b"some of it")
            raise error

        with monkeypatch.context() as patch, pytest.raises(kind) as caught:
            patch.setattr(np, "savez", fail)
            gallery.save(path)
        if kind is OutputError:
            assert str(caught.value) == f"{path}: cannot be written (No space left on device): choose another place"
        assert [p.name for p in tmp_path.iterdir()] == ["g.npz"] and len(Gallery.load(path)) == 2
    gallery.save(path)
    assert len(Gallery.load(path)) == 3


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
    ("others", "words"),
    [
        ({"sums": None}, r"expected the arrays format, .*sums"),
        ({"format": None}, "no gallery, or a damaged one"),
        ({"more": 1}, "expected the arrays"),
        ({"format": 2}, "a gallery of format 2, this version reads 1: upgrade"),
        ({"format": 2, "more": 1}, "a gallery of format 2"),
        ({"format": 1.0}, "format is <f8"),
        ({"model": ""}, "without a model's identity"),
        ({"names": np.zeros(0, str), "clips": np.zeros(0, int), "sums": np.zeros((0, 3))}, "one without voices"),
        ({"model": "a\nb"}, "model's identity"),
        ({"model": b"bytes"}, r"model is \|S5 \[\]"),
        ({"threshold": 7.0}, "threshold 7"),
        ({"threshold": math.inf}, "threshold inf"),
        ({"threshold": [0.4]}, r"threshold is <f8 \[1\]: expected <f8 of 0 dim"),
        ({"names": ["anna"]}, "1 names, 2 counts of clips and 2 voices"),
        ({"names": ["anna", "anna"]}, "a name that comes twice"),
        ({"names": ["anna", "an\nna"]}, r"'an\\nna' has characters"),
        ({"names": ["anna", ""]}, "is empty"),
        ({"names": ["anna", "Zoe\u0308"]}, "not in NFC"),
        ({"names": ["anna", "b" * 129]}, "names is <U129"),
        ({"names": [["anna", "berta"]]}, r"names is <U5 \[1, 2\]"),
        ({"names": np.array([1, 2])}, "names is <i8"),
        ({"clips": [2.0, 1.0]}, "clips is <f8"),
        ({"clips": [0, 1]}, "no sum of unit vectors"),
        ({"clips": [0, 1], "sums": np.array([[0, 0, 0], [0, 0.6, 0.8]])}, "no sum of unit vectors"),
        ({"clips": [-2, 1]}, "no sum of unit vectors"),
        ({"clips": [1, 1]}, "no sum of unit vectors"),
        ({"clips": [2, 1, 1]}, "3 counts of clips"),
        ({"sums": np.zeros((2, 3))}, "no sum of unit vectors"),
        ({"sums": np.zeros((2, 0))}, "no sum of unit vectors"),
        ({"sums": np.array([[1.0, np.nan], [0, 1]])}, "no sum of unit vectors"),
        ({"sums": np.array([[1.0, np.inf], [0, 1]])}, "no sum of unit vectors"),
        ({"sums": np.array([[1.0, 1e300], [0, 1]])}, "no sum of unit vectors"),
        ({"sums": np.eye(2, 3, dtype=np.float32)}, "sums is <f4"),
        ({"sums": np.eye(2, 3).astype(">f8")}, "sums is >f8"),
        ({"sums": np.asfortranarray(np.eye(2, 3))}, "sums is <f8"),
        ({"sums": np.ones(2)}, r"sums is <f8 \[2\]"),
        ({"sums": np.eye(3)}, "3 voices"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path: Path, others: dict[str, Any], words: str) -> None:
    path = written(tmp_path / "g.npz", **others)
    with pytest.raises(GalleryFileError, match=rf"^{path}: .*{words}") as caught:
        Gallery.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("anna 0.1 0.2")
    np.save(tmp_path / "one.npy", np.ones(3))
    for name, words in [
        ("missing", r"cannot be read \(No such file or directory\): pass a file that Gallery.save wrote"),
        (".", r"cannot be read \(not a regular file\)"),
        ("/dev/zero", r"cannot be read \(not a regular file\)"),
        ("empty", "no gallery, or a damaged one .*: pass a file that Gallery.save wrote, or enrol again"),
        ("text", "no gallery"),
        ("one.npy", "no gallery"),
    ]:
        with pytest.raises(GalleryFileError, match=words):
            Gallery.load(tmp_path / name)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["names", "sums", "format"])
def test_nothing_in_a_file_is_run(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "run"
    path = written(tmp_path / "g.npz", **{name: np.array([Payload(trap)] * 2, object)})
    with pytest.raises(GalleryFileError, match=rf"{name} is \|O"):
        Gallery.load(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()  # so it would have been seen


def test_a_member_that_is_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    trap, path = tmp_path / "run", written(tmp_path / "g.npz", sums=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sums.npy", pickle.dumps(Payload(trap)))
    with pytest.raises(GalleryFileError, match="no gallery, or a damaged one"):
        Gallery.load(path)
    assert not trap.exists()


@pytest.mark.parametrize("shape", [(10**12, 192), (2, 10**15), (3, 3), (1, 3), (-2, -3), (0, 0)])
def test_a_shape_that_the_file_does_not_hold_is_not_believed(tmp_path: Path, shape: tuple[int, int]) -> None:
    path, header = written(tmp_path / "g.npz", sums=None), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sums.npy", header.getvalue() + np.eye(2, 3).tobytes())
    with pytest.raises(GalleryFileError, match="not those that its shape calls for|of 2 dimensions"):
        Gallery.load(path)


def test_a_compressed_member_is_not_unpacked(tmp_path: Path) -> None:
    """Ten megabytes in ten kilobytes here; it could be ten terabytes."""
    np.savez_compressed(tmp_path / "g.npz", **arrays_of(sums=np.zeros((2, 650_000))))
    assert (tmp_path / "g.npz").stat().st_size < 20_000
    with pytest.raises(GalleryFileError, match="is compressed"):
        Gallery.load(tmp_path / "g.npz")


def test_a_size_that_the_file_does_not_have_is_not_believed(tmp_path: Path) -> None:
    path = written(tmp_path / "g.npz")
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"sums.npy"))
    whole[entry + 20 : entry + 28] = (0x7FFFFFFF).to_bytes(4, "little") * 2  # compressed size, size
    path.write_bytes(whole)
    with pytest.raises(GalleryFileError, match="no gallery, or a damaged one"):
        Gallery.load(path)


@given(cut=st.integers(0, 5000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.npz"
    whole = written(path).read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(GalleryFileError, match="no gallery, or a damaged one"):
        Gallery.load(path)


@given(changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_changed_file_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    whole = bytearray(written(path).read_bytes())
    before = contents(Gallery.load(path))
    for at, by in changes:
        whole[at % len(whole)] ^= by
    path.write_bytes(whole)
    try:
        loaded = Gallery.load(path)
    except GalleryFileError as exc:
        assert "\n" not in str(exc)
    else:
        assert contents(loaded) == before  # dates and permissions in the archive


# --- files that are written whole or not at all ---


def test_a_new_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "new") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_replaced_file_leaves_its_permissions_and_its_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "file", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    with replacing(link) as file:
        file.write(b"new")
        assert real.read_bytes() == b"old"
        assert {stat.S_IMODE(p.stat().st_mode) for p in real.parent.iterdir()} == {0o600}
    assert link.is_symlink() and real.read_bytes() == b"new" and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert [p.name for p in real.parent.iterdir()] == ["file"]


def test_what_was_written_is_on_the_disk_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def seen_fsync(number: int) -> None:
        folder = stat.S_ISDIR(os.fstat(number).st_mode)
        done.append("folder" if folder else f"{os.fstat(number).st_size} bytes")
        fsync(number)

    def seen_replace(*paths: Any) -> None:
        done.append("name")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    with replacing(tmp_path / "file") as file:
        file.write(b"1234")
    assert done == ["4 bytes", "name", "folder"]


def test_impossible_outputs(tmp_path: Path, gallery: Gallery) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in [
        (tmp_path, "is there and not a regular file"),
        (tmp_path / "pipe", "is there and not a regular file"),
        (tmp_path / "none" / "g.npz", f"there is no directory {tmp_path / 'none'}"),
    ]:
        for refuse in check_output, gallery.save:
            with pytest.raises(OutputError, match=rf"^{path}: {words}.*: expected the path of a file to write$"):
                refuse(path)
    assert check_output(tmp_path / "new") == tmp_path / "new" and [p.name for p in tmp_path.iterdir()] == ["pipe"]
    longest = tmp_path / ("é" * 127)  # 254 bytes; a name may have 255
    gallery.save(longest)
    assert len(Gallery.load(longest)) == 2


def test_an_error_of_the_writer_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(EcapaError, match="^mine$") as caught, replacing(tmp_path / "file") as file:
        file.write(b"new")
        raise GalleryError("mine")
    assert type(caught.value) is GalleryError
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


# --- the real server ---


def test_who_speaks(server: TritonServer, tmp_path: Path) -> None:
    gallery = Gallery()
    with SpeakerClient(server.grpc_url) as client:
        gallery.enrol("anna", client.utterances([SAMPLES / "anna_1.flac"]))
        gallery.enrol("berta", client.utterance(SAMPLES / "berta_1.flac"))
        with pytest.raises(AudioError, match="none.wav"):
            gallery.enrol("carl", client.utterances([SAMPLES / "carl_1.flac", tmp_path / "none.wav"]))
        paths = [SAMPLES / name for name in ("anna_2.flac", "none.wav", "berta_2.flac", "carl_1.flac", "carl_2.wav")]
        asked = list(client.utterances(paths))
        cosine = client.verify(SAMPLES / "anna_1.flac", paths[0])
    gallery.save(tmp_path / "voices.npz")
    anna, none, *others = Gallery.load(tmp_path / "voices.npz").identify_many(asked)
    assert isinstance(anna, Identification) and isinstance(none, AudioError)
    assert (anna.name, anna.threshold) == ("anna", cosine.threshold)
    assert anna.score == pytest.approx(cosine.score, abs=1e-5)
    found = [other.name for other in others if isinstance(other, Identification)]
    assert found == ["berta", None, None]
