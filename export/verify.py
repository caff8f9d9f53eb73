"""Proof that an exported model gives SpeechBrain's embedding of each clip alone, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ecapa_triton.audio import SAMPLE_RATE
from numpy.typing import NDArray

from .artifacts import ExportedModel


class Bounds(NamedTuple):
    """What an embedding may differ by: relative L2 distance to SpeechBrain's, and cosine."""

    max_error: float
    min_cosine: float


BOUNDS = {"fp32": Bounds(1e-4, 0.99999), "fp16": Bounds(5e-3, 0.9999)}
MAX_ERROR = BOUNDS["fp32"].max_error
Array = NDArray[Any]
SAMPLES = Path(__file__).parent.parent / "samples"


class VerificationError(Exception):
    """The exported model differs from SpeechBrain, or a guard does not hold."""


@dataclass
class Group:
    """The largest difference over some clips."""

    name: str
    bounds: Bounds
    clips: int = 0
    error: float = 0.0
    cosine: float = 1.0
    worst: str = ""

    def add(self, label: str, got: Array, expected: Array) -> None:
        """Take in one embedding ``[E]`` and its reference ``[E]``."""
        error, cosine = difference(got, expected)
        self.clips += 1
        if self.error == self.error and not error <= self.error:  # a NaN is the worst, and stays
            self.error, self.worst = error, label
        self.cosine = min(self.cosine, cosine) if cosine == cosine else cosine

    @property
    def passed(self) -> bool:
        """Within both bounds; NaN is not."""
        return self.error <= self.bounds.max_error and self.cosine >= self.bounds.min_cosine

    def __str__(self) -> str:
        verdict = "ok" if self.passed else f"REFUSED (worst: {self.worst})"
        return f"{self.name:28s} {self.clips:4d} clips   error {self.error:.1e}   cosine {self.cosine:.7f}   {verdict}"


def difference(got: Array, expected: Array) -> tuple[float, float]:
    """Relative L2 error and cosine of two embeddings ``[E]``, computed in float64."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    norm = np.linalg.norm(b)
    with np.errstate(divide="ignore", invalid="ignore"):  # an embedding of zeros differs from any: NaN, refused
        return float(np.linalg.norm(a - b) / norm), float(a @ b / (np.linalg.norm(a) * norm))


@dataclass
class Reference:
    """SpeechBrain's ``encode_batch`` of one clip alone, remembered by label."""

    classifier: Any
    known: dict[str, Array] = field(default_factory=dict)

    def __call__(self, label: str, clip: Array) -> Array:
        """The embedding ``[E]`` of a float32 16 kHz clip ``[samples]``."""
        if label not in self.known:
            with torch.inference_mode():
                self.known[label] = self.classifier.encode_batch(torch.from_numpy(clip)[None])[0, 0].numpy()
        return self.known[label]


def verify(model: ExportedModel, classifier: Any, *, seed: int = 0) -> Iterator[Group]:
    """Compare group by group, yielding each as it is done.

    Raises:
        VerificationError: after the groups, when one is out of bounds; at once when a guard does not hold.
    """
    reference = Reference(classifier)
    bounds = BOUNDS[model.metadata["precision"]]
    # Float16 is slow on a CPU, and what takes long clips apart is the same in both.
    longest = model.max_samples if bounds is BOUNDS["fp32"] else min(model.max_samples, 10 * SAMPLE_RATE)
    groups = clip_groups(model.min_samples, longest, seed)
    refused = []
    for name, clips in groups.items():
        group = Group(name, bounds)
        for label, clip in clips.items():
            group.add(label, model.embed([clip])[0], reference(label, clip))
        refused += [] if group.passed else [group]
        yield group
    for group in (_batches(model, groups, reference, seed), _guards(model, groups, reference, seed)):
        refused += [] if group.passed else [group]
        yield group
    if refused:
        worst = max(refused, key=lambda group: group.error if group.error == group.error else np.inf)
        raise VerificationError(
            f"{worst.name}: {worst.worst} is {worst.error:.1e} away from SpeechBrain (cosine {worst.cosine:.6f}), "
            f"allowed are {bounds.max_error:.0e} and {bounds.min_cosine}: the model is not used"
        )


def clip_groups(min_samples: int, max_samples: int, seed: int) -> dict[str, dict[str, Array]]:
    """Clips by group and label: float32 ``[samples]``, 16 kHz, shortest and longest that the model takes."""
    random = np.random.default_rng(seed)
    shortest, second = min_samples, SAMPLE_RATE
    edges = [shortest, shortest + 1, shortest + 159, shortest + 160, 1599, 1600, 7999, second, second + 1]
    lengths = [
        n for n in (*edges, 3 * second - 1, 5 * second, 10 * second, max_samples) if shortest <= n <= max_samples
    ]

    def noise(samples: int, amplitude: float) -> Array:
        return (random.standard_normal(samples) * amplitude).astype(np.float32)

    some = [n for n in (shortest, 7999, second, 5 * second) if shortest <= n <= max_samples]
    tone = np.sin(2 * np.pi * 440 / SAMPLE_RATE * np.arange(min(2 * second, max_samples))).astype(np.float32)
    step = np.where(np.arange(len(tone)) < len(tone) // 2, 0.0, 0.5).astype(np.float32)
    return {
        "samples/": {path.name: clip[:max_samples] for path, clip in _speech()},
        "noise": {f"{n} samples of noise": noise(n, 0.1) for n in lengths},
        "silence": {f"{n} samples of silence": np.zeros(n, np.float32) for n in some},
        "near-silence": {f"{n} samples at {a:g}": noise(n, a) for n in some for a in (1e-3, 1e-5, 1e-7, 1e-40)},
        "tone, step, constant, clipped": {
            "tone": tone,
            "step": step,
            "constant": np.full_like(tone, 0.5),
            "clipped": np.clip(100 * tone, -1, 1),
            "loud": noise(second, 1000.0),
        },
    }


def _speech() -> Iterator[tuple[Path, Array]]:
    from ecapa_triton.audio import read

    for path in sorted(SAMPLES.glob("*")):
        if path.suffix in {".flac", ".wav", ".ogg", ".mp3"}:
            yield path, read(path, max_samples=600 * SAMPLE_RATE).waveform


def _batches(model: ExportedModel, groups: dict[str, dict[str, Array]], reference: Reference, seed: int) -> Group:
    """Every clip again, in batches of mixed lengths and shuffled order."""
    random = np.random.default_rng(seed)
    group = Group("mixed lengths, shuffled", BOUNDS[model.metadata["precision"]])
    clips = [item for members in groups.values() for item in members.items()]
    for size in (len(clips), 2, 7, 16):
        order = random.permutation(len(clips))
        for start in range(0, len(order), size):
            batch = [clips[i] for i in order[start : start + size]]
            for (label, clip), row in zip(batch, model.embed([clip for _, clip in batch]), strict=True):
                group.add(f"{label} in a batch of {len(batch)}", row, reference(label, clip))
    return group


def _guards(model: ExportedModel, groups: dict[str, dict[str, Array]], reference: Reference, seed: int) -> Group:
    """Clips that must come back as NaN, between good ones that must not notice; and a clip over the limit."""
    second = SAMPLE_RATE
    neighbours = [item for item in groups["noise"].items() if len(item[1]) <= 3 * second][-4:]
    group = Group("guards: neighbours, limit", BOUNDS[model.metadata["precision"]])

    def spoiled(value: float, at: int) -> Array:
        clip = np.full(second, 0.1, np.float32)
        clip[at] = value
        return clip

    bad = {
        "NaN first": spoiled(np.nan, 0),
        "NaN last": spoiled(np.nan, -1),
        "Inf": spoiled(np.inf, second // 2),
        "-Inf": spoiled(-np.inf, 7),
        "1e30": spoiled(1e30, 100),
        "too short": np.full(model.min_samples - 1, 0.1, np.float32),
        "one sample": np.full(min(1, model.min_samples - 1), 0.1, np.float32),
    }
    for label, clip in bad.items():
        if not len(clip):
            continue  # nothing is too short for this model but the empty clip, which comes below
        batch = [neighbours[0], (label, clip), neighbours[1], (label, clip), neighbours[2]]
        rows = model.embed([clip for _, clip in batch])
        for (name, clip), row in zip(batch, rows, strict=True):
            if name != label:
                group.add(f"{name} beside a clip with {label}", row, reference(name, clip))
            elif not np.isnan(row).all():
                raise VerificationError(f"a clip with {label} got an embedding, expected NaN: the model is not used")
    (before, *behind) = neighbours
    rows = model.embed([before[1], np.zeros(0, np.float32), *(clip for _, clip in behind)])
    group.add(f"{before[0]} before an empty clip", rows[0], reference(*before))
    if not np.isnan(rows[1:]).all():
        raise VerificationError("an empty clip or one behind it got an embedding, expected NaN: the model is not used")
    if not np.isnan(model.embed([np.zeros(0, np.float32)])).all():
        raise VerificationError("a lone empty clip got an embedding, expected NaN: the model is not used")

    torn = np.concatenate([before[1], behind[0][1]])
    for lost in 1, len(behind[0][1]):  # what a server hands over that stopped copying
        if not np.isnan(model.run(torn[:-lost], np.array([[len(before[1])], [len(behind[0][1])]], np.int32))).all():
            raise VerificationError(
                "clips of which samples are missing got an embedding, expected NaN: the model is not used"
            )

    random = np.random.default_rng(seed)
    long = (random.standard_normal(2 * model.max_samples + 777) * 0.1).astype(np.float32)
    rows = model.embed([before[1], long, behind[0][1]])
    group.add("a clip over the limit", rows[1], reference("limit", long[: model.max_samples]))
    group.add("before a clip over the limit", rows[0], reference(*before))
    group.add("behind a clip over the limit", rows[2], reference(*behind[0]))
    return group
