"""Helpers and fixtures of the gallery's tests: utterances and galleries made without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ecapa_triton import Gallery, Utterance

MODEL = "1a2b3c4d" * 3


def vector(seed: int, size: int = 192) -> np.ndarray:
    return (30 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def utterance(of: int | list[float] | np.ndarray, model: str = MODEL, threshold: float | None = 0.45) -> Utterance:
    embedding = vector(of) if isinstance(of, int) else np.asarray(of, np.float32)
    return Utterance(embedding, 1.0, model, threshold, speech=1.0)


def contents(gallery: Gallery, size: int = 192) -> tuple[Any, ...]:
    """The facts of a gallery and how exactly its voices score."""
    probe = utterance(vector(99, size), gallery.model or MODEL)
    voices = [(name, gallery.clips(name), gallery.verify(name, probe).score) for name in gallery]
    return gallery.model, gallery.threshold, voices, gallery.scores([probe]).tobytes()


@pytest.fixture
def gallery() -> Gallery:
    gallery = Gallery()
    gallery.enrol("anna", [utterance(1), utterance(2)])
    gallery.enrol("berta", utterance(3))
    return gallery
