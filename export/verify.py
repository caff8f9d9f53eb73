"""Proof that an exported model gives SpeechBrain's embedding of each clip alone, in any batch, and has its guards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ecapa_triton.audio import SAMPLE_RATE, read
from numpy.typing import NDArray

from .artifacts import ExportedModel

Array = NDArray[Any]
Clip = tuple[str, Array]  # label and waveform
Batch = tuple[str, list[Clip], set[int]]  # what is special, its clips, places of rows that must be NaN
SAMPLES = Path(__file__).parent.parent / "samples"
AUDIO = {".flac", ".wav", ".ogg", ".mp3"}  # suffixes of clips in a folder
MAX_SPEECH = 600  # s of a file in samples/ that are read


class Bounds(NamedTuple):
    """Largest difference of an embedding from SpeechBrain's: relative L2 distance, cosine, mean cosine of a group."""

    max_error: float
    min_cosine: float
    min_mean: float = -1.0


BOUNDS = {"fp32": Bounds(1e-4, 0.99999), "fp16": Bounds(5e-3, 0.9999), "int8": Bounds(0.1, 0.995, 0.999)}
MAX_ERROR = BOUNDS["fp32"].max_error
SPEECH = "samples/"  # the group
# Of int8 on noise, silence and tones, which hold no voice: its scales are found on speech, and leave their values less
# of the eight bits.
INT8_WITHOUT_SPEECH = Bounds(0.2, 0.98)


class VerificationError(Exception):
    """The exported model differs from SpeechBrain, or a guard does not hold."""


def difference(got: Array, expected: Array) -> tuple[float, float]:
    """Relative L2 error and cosine of two embeddings ``[E]``, in float64; NaN where ``expected`` is zero."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    norm = np.linalg.norm(b)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.linalg.norm(a - b) / norm), float(a @ b / (np.linalg.norm(a) * norm))


@dataclass
class Group:
    """Differences from SpeechBrain over some clips: relative L2 error, cosine and label of each."""

    name: str
    bounds: Bounds
    against: str = "SpeechBrain"
    differences: list[tuple[float, float, str]] = field(default_factory=list)

    def add(self, label: str, got: Array, expected: Array) -> None:
        """Compare one embedding ``[E]`` with its reference ``[E]``."""
        self.differences.append((*difference(got, expected), label))

    @property
    def passed(self) -> bool:
        """Whether every clip is within both bounds; NaN is not."""
        near = all(
            error <= self.bounds.max_error and cosine >= self.bounds.min_cosine for error, cosine, _ in self.differences
        )
        return near and bool(self.mean >= self.bounds.min_mean)

    @property
    def mean(self) -> float:
        """Mean cosine."""
        return float(np.mean([cosine for _, cosine, _ in self.differences]))

    @property
    def failure(self) -> str:
        """What is out of bounds, in words."""
        error, cosine, label = self.worst
        max_error, min_cosine, min_mean = self.bounds
        if error <= max_error and cosine >= min_cosine:
            return f"mean cosine to {self.against} {self.mean:.6f} over {self.name}, expected at least {min_mean}"
        found = f"{label}: {error:.1e} away from {self.against} (cosine {cosine:.6f})"
        return f"{found}, expected at most {max_error:.0e} and at least {min_cosine}"

    @property
    def worst(self) -> tuple[float, float, str]:
        """The largest difference; NaN is larger than any number."""
        return max(self.differences, key=lambda item: np.nan_to_num(item[0], nan=np.inf))

    def __str__(self) -> str:
        error, _, label = self.worst
        cosine = np.min([cosine for _, cosine, _ in self.differences])
        verdict = "ok" if self.passed else f"FAILED (worst: {label})"
        clips = len(self.differences)
        return f"{self.name:28s} {clips:4d} clips   error {error:.1e}   cosine {cosine:.7f}   {verdict}"


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
        VerificationError: after the groups, if one is out of bounds; at once if a guard does not hold.
    """
    precision = model.metadata["precision"]
    # Float16 is slow on a CPU, and the precisions differ in nothing that depends on a clip's length.
    longest = model.max_samples if precision == "fp32" else min(model.max_samples, 10 * SAMPLE_RATE)
    clips = clip_groups(model.min_samples, longest, seed, classifier.mods.compute_features.compute_STFT.hop_length)
    failed: list[Group] = []
    for group in _compare(model, clips, Reference(classifier), np.random.default_rng(seed)):
        failed += [] if group.passed else [group]
        yield group
    if failed:
        worst = max(failed, key=lambda group: np.nan_to_num(group.worst[0], nan=np.inf))
        raise VerificationError(f"{worst.failure}: the model is not used")


def clip_groups(
    min_samples: int, max_samples: int, seed: int, hop: int = SAMPLE_RATE // 100
) -> dict[str, dict[str, Array]]:
    """Clips to verify with, by group and label: float32 ``[samples]``, 16 kHz.

    Args:
        min_samples: shortest clip of the model.
        max_samples: longest clip.
        seed: of noise.
        hop: samples from one frame to the next; there are clips on both sides of where a frame begins.
    """
    random = np.random.default_rng(seed)
    second = SAMPLE_RATE
    some = [min_samples, 50 * hop - 1, second, 5 * second]
    edges = [min_samples + 1, min_samples + hop - 1, min_samples + hop, 10 * hop - 1, 10 * hop, second + 1]
    lengths = sorted({*some, *edges, 3 * second - 1, 10 * second, max_samples})
    some, lengths = ([n for n in those if min_samples <= n <= max_samples] for those in (some, lengths))

    def noise(samples: int, amplitude: float) -> Array:
        return (random.standard_normal(samples) * amplitude).astype(np.float32)

    tone = np.sin(2 * np.pi * 440 / SAMPLE_RATE * np.arange(min(2 * second, max_samples))).astype(np.float32)
    step = np.where(np.arange(len(tone)) < len(tone) // 2, 0.0, 0.5).astype(np.float32)
    files = [path for path in sorted(SAMPLES.glob("*")) if path.suffix in AUDIO]
    return {
        SPEECH: {path.name: read(path, max_samples=MAX_SPEECH * second).waveform[:max_samples] for path in files},
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


def _compare(
    model: ExportedModel,
    groups: dict[str, dict[str, Array]],
    reference: Reference,
    random: np.random.Generator,
) -> Iterator[Group]:
    precision = model.metadata["precision"]
    own: dict[str, Array] = {}  # int8: a clip's embedding alone, which its neighbours must not change
    batches: dict[str, list[Batch]] = {}
    for name, members in groups.items():
        batches[name] = [("alone", [clip], set()) for clip in members.items()]
    clips = [clip for members in groups.values() for clip in members.items()]
    mixed = batches["mixed lengths, shuffled"] = []
    for size in (len(clips), 2, 7, 16):
        order = random.permutation(len(clips))
        for start in range(0, len(order), size):
            batch = [clips[i] for i in order[start : start + size]]
            mixed.append((f"in a batch of {len(batch)}", batch, set()))
    neighbours = [clip for clip in groups["noise"].items() if len(clip[1]) <= 3 * SAMPLE_RATE][-3:]
    long = (random.standard_normal(2 * model.max_samples + 777) * 0.1).astype(np.float32)
    batches["guards: neighbours, limit"] = list(_guarded_batches(model.min_samples, neighbours, long))

    for name, given in batches.items():
        in_batches = precision == "int8" and name not in groups
        bounds = BOUNDS["fp32" if in_batches else precision]
        if precision == "int8" and name in groups and name != SPEECH:
            bounds = INT8_WITHOUT_SPEECH
        group = Group(name, bounds, "the clip alone" if in_batches else "SpeechBrain")
        for how, batch, nan in given:
            rows = model.embed([clip for _, clip in batch])
            for n, ((label, clip), row) in enumerate(zip(batch, rows, strict=True)):
                if n not in nan:
                    clip = clip[: model.max_samples]
                    if in_batches:
                        if label not in own:
                            own[label] = model.embed([clip])[0]
                        expected = own[label]
                    else:
                        expected = reference(label, clip)
                    group.add(f"{label}, {how}", row, expected)
                elif not np.isnan(row).all():
                    raise VerificationError(f"{label}, {how}: found an embedding, expected NaN: the model is not used")
        yield group

    (_, one), (_, other), _ = neighbours
    for lost in 1, len(other):  # as from a server that stopped copying
        rows, _ = model.run(np.concatenate([one, other])[:-lost], np.array([[len(one)], [len(other)]], np.int32))
        if not np.isnan(rows).all():
            raise VerificationError(f"{lost} samples are missing: expected NaN for all clips: the model is not used")


def _guarded_batches(min_samples: int, neighbours: list[Clip], long: Array) -> Iterator[Batch]:
    a, b, c = neighbours
    empty = ("empty", np.zeros(0, np.float32))
    for value, at in (np.nan, 0), (np.nan, -1), (np.inf, SAMPLE_RATE // 2), (-np.inf, 7), (1e30, 100):
        bad = np.full(SAMPLE_RATE, 0.1, np.float32)
        bad[at] = value
        yield f"with a sample {value}", [a, ("bad", bad), b, ("bad", bad), c], {1, 3}
    for samples in {min_samples - 1, 1} - {0, min_samples}:
        yield f"with a clip of {samples} samples", [a, ("short", np.full(samples, 0.1, np.float32)), b], {1}
    yield "with an empty clip before others", [a, empty, b, c], {1, 2, 3}
    yield "with an empty clip alone", [empty], {0}
    yield "with a clip over the limit", [a, ("long", long), b], set()
