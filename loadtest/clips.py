"""The clips of the load tests: speech of `samples/`, cut to any length, and the embedding expected of each.

Needs numpy alone, and for `speech` soundfile: a GPU host may have little more than torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
T = TypeVar("T")

SAMPLES = Path(__file__).parent.parent / "samples"
# Relative L2 distance of a right embedding from the expected one, as in export.verify.
MAX_ERROR = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.1}


@dataclass(frozen=True)
class Clips:
    """Waveforms, float32 `[samples]` at 16 kHz, and the expected embedding of each, float32 `[n, E]`."""

    waveforms: list[Array]
    embeddings: Array

    def apart(self) -> float:
        """Relative L2 distance of the two nearest embeddings: a bound above half of it could miss an exchange."""
        every = self.embeddings.astype(np.float64)
        nearest = np.linalg.norm(every[:, None] - every, axis=2) / np.linalg.norm(every, axis=1)
        return float(np.min(nearest + np.diag(np.full(len(every), np.inf))))

    def save(self, path: Path) -> None:
        """Write them to an NPZ file."""
        lengths = [len(waveform) for waveform in self.waveforms]
        np.savez(path, samples=np.concatenate(self.waveforms), lengths=lengths, embeddings=self.embeddings)

    @classmethod
    def load(cls, path: Path) -> Clips:
        """Read a file of `save`."""
        with np.load(path) as file:
            return cls(np.split(file["samples"], np.cumsum(file["lengths"])[:-1]), file["embeddings"])


class Deck(Generic[T]):
    """Items in random order, each drawn as often as any other, so that a short measurement sees the whole mix."""

    def __init__(self, items: Sequence[T], seed: int | None = None) -> None:
        self._items = list(items)
        self._random = random.Random(seed)
        self._left: list[T] = []

    def __len__(self) -> int:
        return len(self._items)

    def draw(self) -> T:
        """The next item."""
        if not self._left:
            self._left = self._random.sample(self._items, len(self._items))
        return self._left.pop()


def compare(got: Array, expected: Array) -> dict[str, float]:
    """The least "cosine" and the largest relative L2 "error" of embeddings `[n, E]`; NaN where one is not finite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {"cosine": float(cosine.min()), "error": float(distances(got, expected).max())}


def distances(got: Array, expected: Array) -> NDArray[np.float64]:
    """Relative L2 distance `[n]` of each embedding `[n, E]` from the expected one."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    found: NDArray[np.float64] = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return found


def speech(seconds: Sequence[float], seed: int = 0) -> list[Array]:
    """Cut a clip of each length from the speech of `samples/`, at a random place and under faint noise: no two equal.

    Args:
        seconds: of each clip.
        seed: of the places and of the noise.

    Returns:
        Waveforms, float32 `[samples]` at 16 kHz in [-1, 1].
    """
    import soundfile
    from ecapa_triton.audio import SAMPLE_RATE

    generator = np.random.default_rng(seed)
    files = sorted(path for path in SAMPLES.iterdir() if path.suffix in (".flac", ".wav"))
    voice = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in files])
    clips = []
    for samples in (round(s * SAMPLE_RATE) for s in seconds):
        clip = np.take(voice, np.arange(samples) + generator.integers(len(voice)), mode="wrap")
        noise = generator.standard_normal(samples) * 10 ** generator.uniform(-4, -2)
        clips.append(np.clip(clip + noise, -1, 1).astype(np.float32))
    return clips
