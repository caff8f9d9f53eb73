"""Enrolled voices and decisions, compared with plain arithmetic, and the real server."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ecapa_triton import (
    AudioError,
    EmbeddingError,
    Gallery,
    GalleryError,
    Identification,
    ModelMismatchError,
    SpeakerClient,
    ThresholdError,
    UnknownVoiceError,
    Utterance,
    score,
)
from galleries import MODEL, contents, utterance, vector
from hypothesis import given
from hypothesis import strategies as st

from server import TritonServer

SAMPLES = Path(__file__).parents[1] / "samples"
OTHER = "0f" * 12


def gallery_of(voices: dict[str, list[float]]) -> Gallery:
    gallery = Gallery()
    for name, embedding in voices.items():
        gallery.enrol(name, utterance(embedding))
    return gallery


# --- enrolling ---


def test_enrolled_voices_are_there_in_order(gallery: Gallery) -> None:
    assert list(gallery) == ["anna", "berta"] and len(gallery) == 2
    assert "anna" in gallery and "carl" not in gallery and None not in gallery
    assert (gallery.clips("anna"), gallery.clips("berta")) == (2, 1)
    assert (gallery.model, gallery.threshold) == (MODEL, 0.45)
    assert "2 voices" in repr(gallery) and "anna" not in repr(gallery)


BAD = [
    (AudioError("x.wav: no audio"), AudioError, "x.wav"),  # as client.utterances yields one
    (utterance(5, OTHER), ModelMismatchError, f"{OTHER}.*{MODEL}"),
    (utterance(5, ""), ModelMismatchError, "model"),
    (utterance(np.full(192, np.nan)), EmbeddingError, "nan"),
    (utterance(np.full(192, np.inf)), EmbeddingError, "inf"),
    (utterance(np.zeros(192)), EmbeddingError, "0"),
    (utterance(np.ones(191)), EmbeddingError, r"\[191\].*\[192\]"),
    (utterance(np.ones((1, 192))), EmbeddingError, r"\[1, 192\].*\[192\]"),
    (vector(1), TypeError, r"float32\[192\]"),
]


@pytest.mark.parametrize(("bad", "kind", "facts"), BAD)
def test_utterances_that_are_rejected(gallery: Gallery, bad: Any, kind: type[Exception], facts: str) -> None:
    """Nothing of a call that fails is enrolled."""
    before, empty = contents(gallery), Gallery()
    for call in (
        *(lambda name=name: gallery.enrol(name, [utterance(4), bad]) for name in ("anna", "carl")),
        lambda: gallery.enrol("anna", [bad, utterance(4)]),
        lambda: empty.enrol("anna", [utterance(4), bad]),
        lambda: gallery.identify(bad),
        lambda: gallery.verify("anna", bad),
        lambda: gallery.scores([utterance(1), bad]),
    ):
        with pytest.raises(kind, match=facts) as caught:
            call()
        assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert contents(gallery) == before and (empty.model, empty.threshold, len(empty)) == (None, None, 0)


@pytest.mark.parametrize(
    ("error", "name", "items"),
    [
        (GalleryError, "carl", []),
        (EmbeddingError, "carl", [utterance(4), utterance(-vector(4))]),  # they cancel each other out
        (EmbeddingError, "berta", [utterance(-vector(3))]),
    ],
)
def test_nothing_to_enrol(gallery: Gallery, error: type[Exception], name: str, items: list[Utterance]) -> None:
    before = contents(gallery)
    with pytest.raises(error, match=name):
        gallery.enrol(name, iter(items))
    assert contents(gallery) == before


@pytest.mark.parametrize("name", ["", " anna", "anna ", "an\nna", "an\0na", "an\u202ena", "an\udc80na", "a" * 129, 7])
def test_names_that_are_rejected(gallery: Gallery, name: Any) -> None:
    with pytest.raises(GalleryError) as caught:
        gallery.enrol(name, utterance(1))
    assert str(caught.value).isprintable() and repr(name)[:128] in str(caught.value)
    assert list(gallery) == ["anna", "berta"] and name not in gallery


def test_names_are_composed(gallery: Gallery) -> None:
    names = ["Zoë", "山田 太郎", "Ольга", "محمد", "𝒜nna", "a" * 128]
    for seed, name in enumerate(names):
        gallery.enrol(name, utterance(seed))
    assert list(gallery)[2:] == names
    decomposed = unicodedata.normalize("NFD", "Zoë")
    assert decomposed != "Zoë" and decomposed in gallery and gallery.verify(decomposed, utterance(0)).same
    gallery.enrol(decomposed, utterance(0))
    assert len(gallery) == 2 + len(names) and gallery.clips("Zoë") == 2
    gallery.remove(decomposed)
    assert "Zoë" not in gallery


def test_a_voice_that_is_not_enrolled(gallery: Gallery) -> None:
    for call in (
        lambda: gallery.verify("carl", utterance(1)),
        lambda: gallery.clips("carl"),
        lambda: gallery.remove("carl"),
    ):
        with pytest.raises(UnknownVoiceError, match="'carl'"):
            call()


def test_an_emptied_gallery_takes_another_model(gallery: Gallery) -> None:
    gallery.remove("anna")
    gallery.remove("berta")
    assert (len(gallery), gallery.model, gallery.threshold) == (0, None, None)
    gallery.enrol("anna", utterance([3, 4], OTHER, None))
    assert (gallery.model, gallery.threshold) == (OTHER, None)
    assert gallery.verify("anna", utterance([3, 4], OTHER)).score == pytest.approx(1)


# --- identification ---


def test_unknown_is_nobody_above_the_threshold() -> None:
    gallery = gallery_of({"anna": [1, 0], "berta": [0, 1]})
    probe = utterance([4, 3])
    assert gallery.identify(probe, threshold=0.79).name == "anna"
    at = gallery.identify(probe, threshold=0.8)
    assert (at.name, at.threshold) == (None, 0.8)
    assert at.score == pytest.approx(0.8) and [name for name, _ in at.candidates] == ["anna", "berta"]
    verification = gallery.verify("berta", probe, threshold=0.6)
    assert not verification.same and verification.score == pytest.approx(0.6)
    assert gallery.verify("berta", probe, threshold=0.59).same


def test_the_threshold_is_the_one_given_else_the_utterances_else_the_gallerys() -> None:
    gallery = gallery_of({"anna": [1, 0]})
    for probe, given_, used in [(0.7, 0.2, 0.2), (0.7, None, 0.7), (None, None, 0.45), (0.7, 0.0, 0.0)]:
        one = utterance([1, 1], threshold=probe)
        assert gallery.identify(one, threshold=given_).threshold == used
        assert gallery.verify("anna", one, given_).threshold == used
    gallery.enrol("berta", utterance([0, 1], threshold=0.5))
    gallery.enrol("carl", utterance([1, -1], threshold=None))
    assert gallery.threshold == 0.5


def test_without_a_threshold_there_is_no_decision() -> None:
    gallery, probe = Gallery(), utterance([1, 0], threshold=None)
    for _ in range(2):
        with pytest.raises(ThresholdError):
            gallery.identify(probe)
        (outcome,) = gallery.identify_many([probe])
        assert isinstance(outcome, ThresholdError)
        gallery.enrol("anna", probe)
    with pytest.raises(ThresholdError):
        gallery.verify("anna", probe)
    assert gallery.identify(probe, threshold=0.3).name == "anna"


def test_options_that_are_rejected(gallery: Gallery) -> None:
    """Also if there is nothing to identify."""
    for threshold in 1.1, -1.1, math.nan, math.inf, "x":
        for call in (
            lambda threshold=threshold: Gallery().identify(utterance(1), threshold=threshold),
            lambda threshold=threshold: gallery.identify_many([], threshold=threshold),
            lambda threshold=threshold: gallery.verify("anna", utterance(1), threshold),
        ):
            with pytest.raises(ThresholdError, match=str(threshold)):
                call()
    for call in (lambda: gallery.identify(utterance(1), 0), lambda: gallery.identify_many([], -1)):
        with pytest.raises(ValueError, match="top"):
            call()


def test_nobody_is_known_to_an_empty_gallery() -> None:
    gallery = Gallery()
    assert gallery.identify(utterance(1)) == Identification(None, -1.0, 0.45, ())
    assert gallery.identify(utterance(1), threshold=-1.0).name is None
    assert gallery.scores([utterance(1), utterance(2)]).shape == (2, 0)
    with pytest.raises(UnknownVoiceError, match="'anna'"):
        gallery.verify("anna", utterance(1))
    with pytest.raises(EmbeddingError):
        gallery.identify(utterance(np.zeros(192)))


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
    probe = utterance(1)
    exact = sorted(((-score(embedding, probe.embedding), name) for name, embedding in near.items()))
    found = gallery.identify(probe, top=20).candidates
    assert [name for name, _ in found] == [name for _, name in exact[:20]]


def test_many_in_order_with_their_errors(gallery: Gallery) -> None:
    error = AudioError("x.wav: no audio")
    items = [utterance(1), error, utterance(3, OTHER), utterance(np.zeros(192)), *map(utterance, range(9))]
    outcomes = list(gallery.identify_many(iter(items), top=1))
    assert outcomes[1] is error
    assert isinstance(outcomes[2], ModelMismatchError) and isinstance(outcomes[3], EmbeddingError)
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, Identification):
            assert outcome == gallery.identify(item, top=1)  # type: ignore[arg-type]
    assert sum(isinstance(outcome, Identification) for outcome in outcomes) == 1 + 9


def test_many_are_identified_as_they_are_taken(gallery: Gallery) -> None:
    taken: list[Utterance] = []
    outcomes = gallery.identify_many(taken.append(one) or one for one in map(utterance, count()))  # type: ignore[func-returns-value]
    assert not taken
    next(outcomes)
    assert len(taken) == 1


def test_no_score_is_above_one(gallery: Gallery) -> None:
    own = np.abs(gallery.scores([utterance(scale * vector(3)) for scale in range(-50, 50) if scale]))
    assert own.dtype == np.float32 and own.max() == 1  # and no more, by float32's rounding


def test_threads_may_read_at_once(gallery: Gallery) -> None:
    for seed in range(10, 200):
        gallery.enrol(f"voice {seed}", utterance(seed))
    probe = [utterance(vector(seed % 190 + 10) + vector(3)) for seed in range(200)]
    alone = [gallery.identify(one) for one in probe]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(gallery.identify, probe)) == alone


# --- anything at all, against plain arithmetic ---

names = st.sampled_from(["anna", "berta", "carl", "Zoë"]) | st.text("abc", min_size=1, max_size=2)
small = st.lists(st.integers(-3, 3), min_size=4, max_size=4).filter(any)
enrolments = st.tuples(names, st.lists(small, min_size=1, max_size=3))
removals = st.tuples(names, st.just([]))


def by_hand(voices: dict[str, list[list[float]]], probe: list[float]) -> dict[str, float]:
    directions = {name: sum(np.array(one) / math.hypot(*one) for one in clips) for name, clips in voices.items()}
    cosine: Callable[[np.ndarray], float] = lambda a: float(a @ probe) / math.hypot(*a) / math.hypot(*probe)  # noqa: E731
    return {name: cosine(direction) for name, direction in directions.items()}


@given(steps=st.lists(enrolments | enrolments | removals, max_size=40), probe=small, top=st.integers(1, 12))
def test_any_history_scores_as_by_hand(
    steps: list[tuple[str, list[list[float]]]], probe: list[float], top: int
) -> None:
    gallery, voices = Gallery(), dict[str, list[list[float]]]()
    for name, clips in steps:
        gallery.scores([utterance(probe)])  # a change after this must be seen
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
    expected = by_hand(voices, probe)
    assert list(gallery) == list(voices) and [gallery.clips(name) for name in gallery] == [*map(len, voices.values())]
    np.testing.assert_allclose(gallery.scores([utterance(probe)])[0], list(expected.values()), atol=1e-6)
    found = gallery.identify(utterance(probe), top, threshold=0.5)
    best = sorted(expected.values(), reverse=True)[:top]
    np.testing.assert_allclose([score for _, score in found.candidates], best, atol=1e-12)
    assert len({name for name, _ in found.candidates}) == len(best)
    for name, its in found.candidates:
        assert its == pytest.approx(expected[name], abs=1e-12) == gallery.verify(name, utterance(probe)).score
    assert list(found.candidates) == sorted(found.candidates, key=lambda one: (-one.score, one.name))
    assert found.name == (found.candidates[0].name if best and found.score > 0.5 else None)


# --- the real server ---


def test_served(server: TritonServer, tmp_path: Path) -> None:
    gallery = Gallery()
    with SpeakerClient(server.grpc_url) as client:
        gallery.enrol("anna", client.utterances([SAMPLES / "anna_1.flac"]))
        gallery.enrol("berta", client.utterance(SAMPLES / "berta_1.flac"))
        with pytest.raises(AudioError, match="none.wav"):
            gallery.enrol("carl", client.utterances([SAMPLES / "carl_1.flac", tmp_path / "none.wav"]))
        paths = [SAMPLES / name for name in ("anna_2.flac", "none.wav", "berta_2.flac", "carl_1.flac", "carl_2.wav")]
        probe = list(client.utterances(paths))
        cosine = client.verify(SAMPLES / "anna_1.flac", paths[0])
    gallery.save(tmp_path / "voices.npz")
    anna, none, *others = Gallery.load(tmp_path / "voices.npz").identify_many(probe)
    assert isinstance(anna, Identification) and isinstance(none, AudioError)
    assert (anna.name, anna.threshold) == ("anna", cosine.threshold)
    assert anna.score == pytest.approx(cosine.score, abs=1e-5)
    found = [other.name for other in others if isinstance(other, Identification)]
    assert found == ["berta", None, None]
