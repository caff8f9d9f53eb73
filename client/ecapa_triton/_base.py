"""What both clients take and return."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ._scoring import Utterance
from .errors import EcapaError, ModelMismatchError
from .protocol import Deployment, ModelInfo, Statistics

Embedding: TypeAlias = NDArray[np.float32]
"""An embedding, float32 `[192]`, not of unit length."""

Long: TypeAlias = Literal["error", "truncate", "windows"]
"""How to embed a clip above the model's limit; see `SpeakerClient.embed`."""


@dataclass(frozen=True)
class Status:
    """State of the server and of the model.

    Attributes:
        url: Address of the server.
        server_version: Version of Triton.
        live: The server runs.
        ready: The server and the model take requests.
        model: Name of the model.
        model_versions: Versions of the model that are loaded.
        deployment: How the model is served; None where it is not ready.
        info: Constants of the model; None where it gave no reply.
        statistics: Triton's counters of the model; None where it is not ready.
    """

    url: str
    server_version: str
    live: bool
    ready: bool
    model: str
    model_versions: tuple[str, ...]
    deployment: Deployment | None
    info: ModelInfo | None
    statistics: Statistics | None


def check_many(audios: object, long: Long) -> None:
    """Reject a single clip in place of a list, and an unknown `long`."""
    single = isinstance(audios, str | bytes | bytearray | memoryview | os.PathLike)
    if single or (isinstance(audios, np.ndarray) and audios.ndim < 2):
        raise TypeError(f"audios is a single {type(audios).__name__}: expected a list of clips")
    check_long(long)


def check_long(long: Long) -> None:
    """Reject an unknown `long`."""
    if long not in get_args(Long):
        raise ValueError(f"long is {long!r}: expected one of {', '.join(get_args(Long))}")


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
