"""Scores of embeddings: no server, no audio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import EcapaError, EmbeddingError, ModelMismatchError, ThresholdError, TooLittleSpeechError

Embedding: TypeAlias = NDArray[np.float32]
"""An embedding, float32 `[192]`, not of unit length."""

MIN_SPEECH = 1.0  # s; below it, embeddings tell little of the speaker


@dataclass(frozen=True, eq=False)
class Utterance:
    """The result for one clip: its embedding and facts about it.

    Attributes:
        embedding: float32 `[192]`, not of unit length.
        seconds: Seconds of audio that were embedded.
        model: Model identity: the first 24 hexadecimal digits of the SHA-256 of the weights. Embeddings of two models
            do not compare.
        threshold: The model's threshold: cosine above which two utterances are of one speaker; None where it has none.
        speech: Seconds of speech in the clip, as `ecapa_triton.speech` counts them.
        name: Name of the clip in error messages.
    """

    embedding: Embedding
    seconds: float
    model: str
    threshold: float | None
    speech: float = 0.0
    name: str = "utterance"


@dataclass(frozen=True)
class Verification:
    """Whether two clips are of one speaker.

    Attributes:
        score: Cosine of the two embeddings, -1 to 1.
        threshold: The threshold of this decision.
        same: `score > threshold`, as SpeechBrain decides.
    """

    score: float
    threshold: float
    same: bool


def score(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Cosine of two embeddings `[dims]`, -1 to 1; they need not be of unit length.

    Raises:
        EmbeddingError: The shapes differ or are not `[dims]`, or one is zero or not finite.
    """
    if np.ndim(a) != 1 or np.shape(a) != np.shape(b):
        raise EmbeddingError(f"shapes {np.shape(a)} and {np.shape(b)}: expected two embeddings of one model")
    return float(np.clip(unit(a) @ unit(b), -1.0, 1.0))


def unit(embedding: NDArray[Any]) -> NDArray[np.float64]:
    """The embedding `[dims]` scaled to length 1."""
    vector = np.asarray(embedding, np.float64)
    length = float(np.linalg.norm(vector))
    if not 0 < length < math.inf:
        raise EmbeddingError(f"an embedding of length {length} has no direction: expected a finite one above 0")
    return vector / length


def mean_direction(embeddings: Sequence[Embedding]) -> Embedding:
    """Mean of the embeddings `[dims]`, each scaled to length 1 for equal weight."""
    mean: NDArray[np.float64] = np.mean([unit(embedding) for embedding in embeddings], axis=0)
    return mean.astype(np.float32)


def check_threshold(threshold: float | None) -> None:
    """Reject a threshold that is not a cosine; None stands for the model's own."""
    if threshold is not None and not (isinstance(threshold, Real) and -1 <= threshold <= 1):
        raise ThresholdError(f"threshold is {threshold!r}: expected a cosine, -1 to 1")


def check_speech(utterance: Utterance, min_speech: float) -> None:
    """Reject an utterance with less than `min_speech` seconds of speech."""
    if not (min_speech <= 0 or utterance.speech >= min_speech):
        raise TooLittleSpeechError(
            f"{utterance.name}: {utterance.speech:.3g} s of speech, expected {min_speech:g} s or more: pass a clip "
            "with more speech, or a lower min_speech, 0 for no check (command line: --min-speech)"
        )


def decide(score: float, given: float | None, learned: float | None) -> Verification:
    """Compare a score with the given threshold or, where it is None, with the model's own."""
    threshold = learned if given is None else given
    if threshold is None:
        raise ThresholdError("the model has no threshold of its own: pass threshold, a cosine")
    check_threshold(threshold)
    return Verification(score, float(threshold), score > threshold)


def agreeing(outcomes: Iterable[Utterance | EcapaError]) -> list[Utterance]:
    """The outcomes, all of one model; raises the first error among them."""
    utterances: list[Utterance] = []
    for outcome in outcomes:
        if isinstance(outcome, EcapaError):
            raise outcome
        utterances.append(outcome)
    models = dict.fromkeys(utterance.model for utterance in utterances)
    if len(models) > 1:
        raise ModelMismatchError(
            f"the model was replaced between these clips ({', then '.join(models)}), and embeddings of two models "
            "do not compare: try again"
        )
    return utterances


def embeddings(outcomes: list[Utterance | EcapaError], return_exceptions: bool) -> list[Embedding | EcapaError]:
    """The embeddings of one model, with the errors in their places or the first one raised."""
    agreeing(outcome for outcome in outcomes if not (return_exceptions and isinstance(outcome, EcapaError)))
    return [outcome if isinstance(outcome, EcapaError) else outcome.embedding for outcome in outcomes]
