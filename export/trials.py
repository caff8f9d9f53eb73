"""An exported model beside SpeechBrain on a list of trials: `python -m export verify --trials LIST --root DIR`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ecapa_triton import trials
from ecapa_triton.audio import SAMPLE_RATE, Waveform, read
from ecapa_triton.trials import Figures, Trials

from .artifacts import ExportedModel
from .verify import Reference, VerificationError, difference

MAX_DIFFERENCE = 1e-3  # between the scores of a trial
MIN_COSINE = 0.9999  # between the embeddings of a clip; float16 keeps it too
INT8_MIN_COSINE = 0.98  # of int8, and how much its equal error rate may be above SpeechBrain's
INT8_MAX_EER_RISE = 0.003
BATCH = 60 * SAMPLE_RATE  # samples of a packed batch: 440 MB at 7.3 MB a second


class Comparison(NamedTuple):
    """Error rates of the exported model and of SpeechBrain, and how far the two are from each other."""

    exported: Figures
    speechbrain: Figures
    difference: float  # largest, between the scores of a trial
    cosine: float  # smallest, between the embeddings of a clip


def compare(model: ExportedModel, reference: Reference, listed: Trials) -> Comparison:
    """Embed each clip by the exported model, in packed batches, and by SpeechBrain, alone.

    Both embed the first ``max_seconds`` of a clip, as the model does when served.

    Raises:
        EcapaError: a clip cannot be read, or scikit-learn is not installed.
        VerificationError: a clip has no embedding.
    """
    trials.require("sklearn.metrics")
    ours, theirs = [], []
    for batch in _batches(listed.paths, model):
        for (path, clip), row in zip(batch.items(), model.embed(list(batch.values())), strict=True):
            if not np.isfinite(row).all():
                raise VerificationError(f"{path}: the exported model has no embedding for it (NaN)")
            ours.append(row)
            theirs.append(reference(f"{path} up to {model.max_samples}", clip))
    scores = [trials.cosines(np.stack(embeddings), listed.pairs) for embeddings in (ours, theirs)]
    exported, speechbrain = (trials.curve(one, listed.same).figures(None) for one in scores)
    cosine = min(difference(*pair)[1] for pair in zip(ours, theirs, strict=True))
    return Comparison(exported, speechbrain, float(np.abs(scores[0] - scores[1]).max()), cosine)


def verify(model: ExportedModel, reference: Reference, listed: Trials) -> Iterator[str]:
    """Compare on a list of trials, yielding lines of a report.

    Raises:
        EcapaError: as for :func:`compare`.
        VerificationError: after the lines, when a score or an embedding is out of bounds.
    """
    result = compare(model, reference, listed)
    targets = np.count_nonzero(listed.same)
    yield f"{targets} target and {len(listed.same) - targets} nontarget trials of {len(listed.names)} clips"
    yield f"{'':24}{'exported':>12}{'SpeechBrain':>14}"
    yield f"{'EER':24}{100 * result.exported.eer:10.3f} %{100 * result.speechbrain.eer:12.3f} %"
    for ours, theirs in zip(result.exported.min_dcf, result.speechbrain.min_dcf, strict=True):
        yield f"{f'minDCF, P_target {ours.p_target:g}':24}{ours.cost:12.4f}{theirs.cost:14.4f}"
    yield f"{'largest score difference':24}{result.difference:12.1e}"
    yield f"{'smallest cosine':24}{result.cosine:12.7f}"
    yield f"{'threshold at the EER':24}{result.exported.eer_threshold:12.4f}{result.speechbrain.eer_threshold:14.4f}"
    if model.metadata["precision"] == "int8":
        rise = result.exported.eer - result.speechbrain.eer
        if not (rise <= INT8_MAX_EER_RISE and result.cosine >= INT8_MIN_COSINE):
            raise VerificationError(
                f"the EER in int8 is {100 * rise:.2f} points above SpeechBrain's (allowed: "
                f"{100 * INT8_MAX_EER_RISE:g}), the smallest cosine {result.cosine:.4f} (at least "
                f"{INT8_MIN_COSINE:g}): serve float32"
            )
        return
    if not (result.difference <= MAX_DIFFERENCE and result.cosine >= MIN_COSINE):
        raise VerificationError(
            f"a score differs from SpeechBrain's by {result.difference:.1e} (allowed: {MAX_DIFFERENCE:g}) or an "
            f"embedding has cosine {result.cosine:.6f} to SpeechBrain's (at least {MIN_COSINE:g}): do not use the model"
        )


def _batches(paths: list[str], model: ExportedModel) -> Iterator[dict[str, Waveform]]:
    batch: dict[str, Waveform] = {}
    for path in paths:
        clip = read(path, max_samples=model.max_samples).waveform
        if len(clip) < model.min_samples:
            raise VerificationError(
                f"{path}: {len(clip)} samples at 16 kHz, the model takes {model.min_samples} or more: remove its trials"
            )
        batch[path] = clip
        if sum(map(len, batch.values())) >= BATCH:
            yield batch
            batch = {}
    if batch:
        yield batch
