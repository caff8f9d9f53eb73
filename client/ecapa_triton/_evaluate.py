"""How well a served model tells speakers apart: trial lists, error rates, DET curves."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import logging
import os
import sys
import tempfile
import types
import warnings
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _scoring, audio
from ._base import Long
from ._client import SpeakerClient
from ._commands import DONE, at_least, complain, named
from ._files import check_output, replacing
from .audio import SAMPLE_RATE, describe
from .errors import HOPELESS, EcapaError, EvaluationError, OutputError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
T = TypeVar("T")

DIFFERS = 1  # exit status; an error is raised
P_TARGETS = 0.01, 0.05  # how likely a trial is a target one, where NIST SRE and VoxSRC state the detection cost
MAX_DIFFERENCE = 1e-3  # of a score to SpeechBrain's
MIN_COSINE = 0.9999  # of an embedding to SpeechBrain's, which float16 keeps
LABELS = {"1": True, "target": True, "0": False, "nontarget": False}
CHUNK = 8192  # trials scored at a time: 6 MB an operand
TICKS = 0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 90, 95, 98, 99, 99.5, 99.9  # % on a DET curve's axes


# --- trial lists ---


@dataclass(frozen=True, eq=False)
class Trials:
    """Pairs of utterances.

    Attributes:
        names: The utterances as the list has them, each once, in order of appearance.
        same: bool `[trials]`: a target trial, both utterances of one speaker.
        a: int32 `[trials]`, place of the first utterance in `names`.
        b: int32 `[trials]`, of the second.
    """

    names: list[str]
    same: Bools
    a: NDArray[np.int32]
    b: NDArray[np.int32]


def read_trials(path: Path, root: Path) -> Trials:
    """Read a trial list: `LABEL A B` (VoxCeleb) or `A B LABEL` (Kaldi) a line.

    Args:
        path: The list. A label is 1 or target, 0 or nontarget; blank lines are skipped.
        root: Folder that the paths in it start from.

    Raises:
        EvaluationError: A line is none, an utterance is not there, or the list has no trial of one of the two kinds.
    """
    places: dict[str, int] = {}
    lines = array("i")  # where each utterance appears first
    same, a, b = bytearray(), array("i"), array("i")
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                fields = line.split()
                if not fields:
                    continue
                label, *pair = fields if fields[0] in LABELS else [fields[-1], *fields[:-1]]
                if label not in LABELS or len(pair) != 2:
                    raise EvaluationError(
                        f"{describe(path)} line {number}: {line.strip()[:80]!r}: expected `LABEL A B` or `A B LABEL`, "
                        "a label of 1, 0, target or nontarget and two paths without spaces"
                    )
                same.append(LABELS[label])
                for name, column in zip(pair, (a, b), strict=True):
                    place = places.setdefault(name, len(places))
                    if place == len(lines):
                        lines.append(number)
                    column.append(place)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        reason = getattr(exc, "strerror", None) or str(exc)
        raise EvaluationError(f"{describe(path)}: cannot be read ({reason}): expected a trial list") from exc
    trials = Trials(list(places), np.array(same, np.bool_), np.array(a, np.int32), np.array(b, np.int32))
    _check_kinds(trials, describe(path))
    missing = [place for place, name in enumerate(trials.names) if not os.path.isfile(os.path.join(root, name))]
    if missing:
        first = missing[0]
        raise EvaluationError(
            f"{describe(path)} line {lines[first]}: {describe(root / trials.names[first])} is no file "
            f"({len(missing)} of {len(trials.names)} utterances are none): "
            "pass the folder that the paths of the list start from (--root)"
        )
    return trials


def _check_kinds(trials: Trials, name: str) -> None:
    targets = int(trials.same.sum())
    if not 0 < targets < len(trials.same):
        raise EvaluationError(
            f"{name}: {targets} target and {len(trials.same) - targets} nontarget trials: expected some of both"
        )


# --- numbers ---


@dataclass(frozen=True, eq=False)
class Curve:
    """What may become of the trials, from the threshold that accepts none to the one that accepts all.

    Trials of equal score are accepted or refused together, so one point follows on another by one value of the score.

    Attributes:
        false_accepts: float64 `[points]`, share of the nontarget trials that are accepted, rising from 0 to 1.
        misses: float64 `[points]`, share of the target trials that are refused, falling from 1 to 0.
        thresholds: float64 `[points]`, of which `score > threshold` accepts: midway between two scores, the highest
            score at the first point, minus infinity at the last.
        scores: float64 `[points - 1]`, the value that is accepted at one point and was not at the one before.
    """

    false_accepts: Floats
    misses: Floats
    thresholds: Floats
    scores: Floats


@dataclass(frozen=True)
class Cost:
    """The least detection cost.

    Attributes:
        p_target: How likely a trial is a target one.
        cost: `(p_target misses + (1 - p_target) false_accepts) / min(p_target, 1 - p_target)`: both errors cost 1,
            and 1 is the cost of deciding without listening.
        threshold: Where it is reached.
        false_accepts: Share of the nontarget trials there.
        misses: Share of the target trials there.
    """

    p_target: float
    cost: float
    threshold: float
    false_accepts: float
    misses: float


@dataclass(frozen=True)
class Decisions:
    """What a threshold decides; `score > threshold` accepts.

    Attributes:
        threshold: A cosine.
        false_accepts: Nontarget trials accepted: strangers let in.
        misses: Target trials refused.
        false_accept_rate: Their share of the nontarget trials, 0 to 1.
        miss_rate: Their share of the target trials, 0 to 1.
    """

    threshold: float
    false_accepts: int
    misses: int
    false_accept_rate: float
    miss_rate: float


@dataclass(frozen=True)
class Result:
    """How well scores tell speakers apart.

    Attributes:
        eer: Equal error rate, 0 to 1.
        eer_threshold: Where misses and false accepts become equal.
        min_dcf: The least detection costs, one for each of `P_TARGETS`.
        decisions: At the model's own threshold; None where it has none.
    """

    eer: float
    eer_threshold: float
    min_dcf: tuple[Cost, ...]
    decisions: Decisions | None


def score_trials(units: NDArray[np.float32], a: NDArray[np.int32], b: NDArray[np.int32]) -> Floats:
    """Cosines of pairs, float64 `[trials]`.

    Args:
        units: float32 `[utterances, dims]`, embeddings at length 1.
        a: int32 `[trials]`, row of the first utterance.
        b: int32 `[trials]`, row of the second.
    """
    scores = np.empty(len(a))
    for start in range(0, len(a), CHUNK):
        part = slice(start, start + CHUNK)
        np.einsum("td,td->t", units[a[part]], units[b[part]], dtype=np.float64, out=scores[part])
    return scores.clip(-1, 1, out=scores)


def error_curve(scores: Floats, same: Bools) -> Curve:
    """Error rates at every threshold.

    Args:
        scores: float `[trials]`, finite.
        same: bool `[trials]`, the target trials; some, but not all.

    Raises:
        EvaluationError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import roc_curve
    except ImportError as exc:
        raise _extra("scikit-learn") from exc
    false_accepts, hits, accepted_from = roc_curve(same, scores, drop_intermediate=False)
    values: Floats = np.asarray(accepted_from[1:], np.float64)  # the first is infinity
    upper, lower = values[:-1], values[1:]
    between = np.minimum(lower + (upper - lower) / 2, np.nextafter(upper, -np.inf))
    return Curve(false_accepts, 1 - hits, np.concatenate([values[:1], between, [-np.inf]]), values)


def equal_error(curve: Curve) -> tuple[float, float]:
    """Equal error rate (0 to 1) and its threshold.

    Between the two points of the curve around the crossing the rate is interpolated linearly, as if of the trials
    that tie there any share could be accepted; the threshold is then their score. Where a point has equal rates itself,
    the threshold is midway to the next scores.
    """
    excess = curve.false_accepts - curve.misses  # rises from -1 to 1
    after = int(np.argmax(excess > -1e-14))  # 0 but for rounding: else two shares of under 1e7 trials differ by more
    if excess[after] < 1e-14:
        return float(curve.false_accepts[after]), float(curve.thresholds[after])
    weight = excess[after] / (excess[after] - excess[after - 1])
    rate = weight * curve.false_accepts[after - 1] + (1 - weight) * curve.false_accepts[after]
    return float(rate), float(curve.scores[after - 1])


def least_cost(curve: Curve, p_target: float) -> Cost:
    """The least detection cost where a share `p_target` of the trials are target ones.

    Of several thresholds that reach it the highest is taken: the fewest false accepts.
    """
    costs = p_target * curve.misses + (1 - p_target) * curve.false_accepts
    at = int(np.argmin(costs))
    return Cost(
        p_target,
        float(costs[at] / min(p_target, 1 - p_target)),
        float(curve.thresholds[at]),
        float(curve.false_accepts[at]),
        float(curve.misses[at]),
    )


def decide_trials(scores: Floats, same: Bools, threshold: float) -> Decisions:
    """Count the errors at `threshold`. Scores are float `[trials]`, `same` is bool `[trials]`."""
    accepted = scores > threshold
    strangers, missed = int((accepted & ~same).sum()), int((~accepted & same).sum())
    return Decisions(
        threshold, strangers, missed, strangers / max(1, int((~same).sum())), missed / max(1, int(same.sum()))
    )


def summarise(scores: Floats, same: Bools, threshold: float | None) -> tuple[Result, Curve]:
    """All numbers for the scores of one system, and the curve that they are of.

    Args:
        scores: float `[trials]`, finite.
        same: bool `[trials]`, the target trials; some, but not all.
        threshold: The model's own, None where it has none.
    """
    curve = error_curve(scores, same)
    costs = tuple(least_cost(curve, p_target) for p_target in P_TARGETS)
    decisions = None if threshold is None else decide_trials(scores, same, threshold)
    return Result(*equal_error(curve), costs, decisions), curve


# --- embeddings ---


@dataclass(frozen=True, eq=False)
class Embedded:
    """The utterances of a trial list.

    Attributes:
        units: float32 `[utterances, dims]`, at length 1; zeros where there is none.
        seconds: float64 `[utterances]`, of audio that each stands for; 0 where there is none.
        model: Whose they are.
        threshold: The model's own, None where it has none.
    """

    units: NDArray[np.float32]
    seconds: Floats
    model: str
    threshold: float | None


def embed_served(client: SpeakerClient, paths: list[str], long: Long, skip_failed: bool) -> Embedded:
    """Embed each file once by the server.

    Args:
        client: Of the server; its `max_in_flight` says how many are under way at once.
        paths: The files.
        long: As for `SpeakerClient.embed`.
        skip_failed: Tell of an utterance that fails and go on. Where the server is gone there is no going on.

    Raises:
        EcapaError: An utterance failed, or the utterances are of several models.
    """
    first = None
    seconds = np.zeros(len(paths))
    units = np.zeros((0, 0), np.float32)
    outcomes = _progress(client.utterances(paths, long=long), len(paths), "embedding")
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, EcapaError):
            if not skip_failed or isinstance(outcome, HOPELESS):
                raise outcome
            complain(str(named(paths[place], outcome)))
            continue
        if first is None:
            first = outcome
            units = np.zeros((len(paths), len(outcome.embedding)), np.float32)
        if (outcome.model, outcome.threshold) != (first.model, first.threshold):
            raise EvaluationError(
                f"{describe(paths[place])}: embedded by the model {outcome.model} (threshold {outcome.threshold}), "
                f"those before it by {first.model} ({first.threshold}), and they do not compare: serve one model, "
                "then try again"
            )
        units[place] = _scoring.unit(outcome.embedding)
        seconds[place] = outcome.seconds
    if first is None:
        raise EvaluationError(f"none of {len(paths)} utterances could be embedded: see the errors above")
    return Embedded(units, seconds, first.model, first.threshold)


def load_speechbrain(source: str) -> Any:
    """SpeechBrain's `EncoderClassifier` on the CPU. The source's hyperparams.yaml may construct, and so run, anything.

    Args:
        source: A folder, which is loaded without network, or a hub id.

    Raises:
        EvaluationError: SpeechBrain is not installed, or cannot load it.
    """
    local = Path(source).is_dir()
    if not local and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise EvaluationError(
            f"--speechbrain {source}: is no folder: expected one with hyperparams.yaml and the weights that it names, "
            "or a hub id such as speechbrain/spkrec-ecapa-voxceleb"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch

            _without_torchaudio_extension(torch.version.cuda)
            logging.getLogger("speechbrain").setLevel(logging.ERROR)
            from speechbrain.inference.classifiers import EncoderClassifier
    except (ImportError, OSError) as exc:  # OSError: a torchaudio built for another torch
        raise EvaluationError(
            f"SpeechBrain cannot be imported ({' '.join(str(exc).split())}): pip install speechbrain torch torchaudio"
        ) from exc
    folder = str(Path(source).resolve())
    # Published folders name the hub as the place of their weights.
    overrides = {"overrides": {"pretrained_path": folder}, "overrides_must_match": False} if local else {}
    try:
        with tempfile.TemporaryDirectory() as links:
            return EncoderClassifier.from_hparams(
                folder if local else source, savedir=links, run_opts={"device": "cpu"}, **overrides
            )
    except Exception as exc:  # a yaml may construct anything, and the hub's client raises a dozen types
        reason = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise EvaluationError(
            f"--speechbrain {source}: cannot be loaded ({reason}): expected a folder with hyperparams.yaml and the "
            "weights that it names, or a hub id such as speechbrain/spkrec-ecapa-voxceleb"
        ) from exc


def _without_torchaudio_extension(cuda: str | None) -> None:
    """A stub for the compiled part of torchaudio, which is built for CUDA and does not load beside a CPU torch.

    SpeechBrain imports torchaudio and uses nothing of it here. The export does the same, and is not there where only
    the client is installed; nor can it call this, where there is only the export.
    """
    if cuda is not None or "torchaudio._extension" in sys.modules:
        return
    stub = types.ModuleType("torchaudio._extension")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio._extension", None)
    vars(stub).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_RIR_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        lazy_import_sox_ext=lambda: None,
        fail_if_no_align=lambda function: function,
    )
    sys.modules["torchaudio._extension"] = stub


def embed_by_speechbrain(classifier: Any, paths: list[str], served: Embedded) -> NDArray[np.float32]:
    """The utterances that were embedded, by SpeechBrain: one at a time, unpadded, whole, from the same samples.

    Args:
        classifier: From `load_speechbrain`.
        paths: The files.
        served: What the server gave, to hear as much of each.

    Returns:
        float32 `[utterances, dims]`, at length 1; zeros where the server gave none.
    """
    import torch

    units = np.zeros_like(served.units)
    places = np.flatnonzero(served.seconds)
    for place in _progress(places, len(places), "SpeechBrain"):
        samples = round(float(served.seconds[place]) * SAMPLE_RATE)
        clip = audio.read(paths[place], max_samples=samples)
        with torch.inference_mode():
            embedding = classifier.encode_batch(torch.from_numpy(clip.waveform)[None]).flatten().numpy()
        if len(embedding) != units.shape[1]:
            raise EvaluationError(
                f"SpeechBrain's embeddings have {len(embedding)} numbers, the server's {units.shape[1]}: pass the "
                "checkpoint that was exported (--speechbrain)"
            )
        units[place] = _scoring.unit(embedding)
    return units


@dataclass(frozen=True)
class Difference:
    """The served embeddings beside SpeechBrain's.

    Attributes:
        score: The largest difference of a score.
        cosine: The smallest cosine of an embedding to SpeechBrain's of the same utterance.
        decisions: Trials decided otherwise at the model's threshold; None where it has none.
    """

    score: float
    cosine: float
    decisions: int | None


def _progress(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show how far it is, where somebody watches and rich is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True), transient=True)


def _extra(package: str) -> EvaluationError:
    return EvaluationError(f"{package} is not installed: pip install 'ecapa-triton[evaluate]'")


# --- the command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes; `--long` and `--json` are the caller's."""
    parser.add_argument(
        "trials", type=Path, metavar="TRIALS", help="a trial list: `1 a.flac b.flac` or `a.flac b.flac target` a line"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="where its paths start from (default: its folder)")
    parser.add_argument(
        "--in-flight",
        type=at_least(1),
        default=8,
        metavar="N",
        help="requests under way at a time (%(default)s)",
    )
    parser.add_argument(
        "--skip-failed", action="store_true", help="leave out utterances that cannot be embedded, and their trials"
    )
    parser.add_argument("--scores", type=Path, metavar="FILE", help="write `SCORE LABEL A B` lines")
    parser.add_argument("--det", type=Path, metavar="FILE.png", help="draw the DET curve")
    parser.add_argument(
        "--speechbrain",
        metavar="SOURCE",
        help="compare with SpeechBrain itself: the folder or hub id of the checkpoint, one that you trust; "
        f"exit status 1 if a score differs by more than {MAX_DIFFERENCE:g}, or an embedding's cosine is below "
        f"{MIN_COSINE:g}, as it will where --long windows averages",
    )


def run(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    """Evaluate a trial list, print what came out and return the exit status: 0, or 1 where SpeechBrain differs.

    Args:
        client: With `max_in_flight=arguments.in_flight`.
        arguments: Those of `add_arguments`, `long` and `json`.

    Raises:
        EcapaError: It cannot be evaluated, or one of its utterances cannot be embedded.
    """
    for path in filter(None, (arguments.scores, arguments.det)):
        check_output(path)
    for package, name, needed in ("scikit-learn", "sklearn", True), ("matplotlib", "matplotlib", arguments.det):
        if needed and importlib.util.find_spec(name) is None:
            raise _extra(package)
    root = arguments.root or arguments.trials.parent
    trials = read_trials(arguments.trials, root)
    _check_outputs(arguments, {os.path.realpath(os.path.join(root, name)) for name in trials.names})
    classifier = load_speechbrain(arguments.speechbrain) if arguments.speechbrain else None
    paths = [os.path.join(root, name) for name in trials.names]

    served = embed_served(client, paths, arguments.long, arguments.skip_failed)
    listed, there = len(trials.same), served.seconds > 0
    keep = there[trials.a] & there[trials.b]
    trials = Trials(trials.names, trials.same[keep], trials.a[keep], trials.b[keep])
    left_out = "" if there.all() else f" without the {np.count_nonzero(~there)} utterances that failed"
    _check_kinds(trials, describe(arguments.trials) + left_out)
    scores = score_trials(served.units, trials.a, trials.b)
    result, curve = summarise(scores, trials.same, served.threshold)
    results, curves, difference = {"served": result}, {"served": curve}, None
    if classifier is not None:
        units = embed_by_speechbrain(classifier, paths, served)
        others = score_trials(units, trials.a, trials.b)
        results["SpeechBrain"], curves["SpeechBrain"] = summarise(others, trials.same, served.threshold)
        difference = _difference(served, units, scores, others)

    counted = {
        "trials": len(trials.same),
        "targets": int(trials.same.sum()),
        "nontargets": int((~trials.same).sum()),
        "utterances": len(np.union1d(trials.a, trials.b)),
        "failed_utterances": int((~there).sum()),
        "left_out_trials": listed - len(trials.same),
        "model": served.model,
    }
    if arguments.scores is not None:
        _write_scores(arguments.scores, trials, scores)
    if arguments.det is not None:
        title = (
            f"DET curve of {describe(arguments.trials.name)}\n{counted['targets']:,} target and "
            f"{counted['nontargets']:,} nontarget trials, model {served.model}"
        )
        draw_det(arguments.det, results, curves, trials.same, title)
    if arguments.json:
        shown = {name.lower(): asdict(one) for name, one in results.items()}
        print(json.dumps(counted | shown | ({} if difference is None else {"difference": asdict(difference)})))
    else:
        print("\n".join(_report(counted, results, difference)))
    if difference is not None and not (difference.score <= MAX_DIFFERENCE and difference.cosine >= MIN_COSINE):
        complain(
            f"a score differs from SpeechBrain's by {difference.score:.1e}, expected {MAX_DIFFERENCE:g} at most, or an "
            f"embedding has cosine {difference.cosine:.6f} to SpeechBrain's, expected {MIN_COSINE:g} at least: "
            f"is {describe(arguments.speechbrain)} the checkpoint that was exported?"
        )
        return DIFFERS
    return DONE


def _check_outputs(arguments: argparse.Namespace, utterances: set[str]) -> None:
    """Refuse to write over what is read."""
    outputs = [os.path.realpath(path) for path in (arguments.scores, arguments.det) if path is not None]
    for path in outputs:
        if path in utterances or path == os.path.realpath(arguments.trials) or outputs.count(path) > 1:
            raise OutputError(
                f"{describe(path)}: is the trial list, one of its utterances or asked for twice: choose another"
            )
    if arguments.det is not None and arguments.det.suffix.lower() != ".png":
        raise OutputError(f"{describe(arguments.det)}: expected a name that ends in .png")


def _difference(served: Embedded, units: NDArray[np.float32], scores: Floats, others: Floats) -> Difference:
    cosines = np.einsum("ud,ud->u", served.units, units, dtype=np.float64)[served.seconds > 0]
    decisions = None
    if served.threshold is not None:
        decisions = int(((scores > served.threshold) != (others > served.threshold)).sum())
    return Difference(float(np.abs(scores - others).max()), float(cosines.min().clip(-1, 1)), decisions)


def _report(counted: Mapping[str, Any], results: Mapping[str, Result], difference: Difference | None) -> Iterable[str]:
    yield (
        f"{counted['trials']:,} trials ({counted['targets']:,} target, {counted['nontargets']:,} nontarget) "
        f"of {counted['utterances']:,} utterances, model {counted['model']}"
    )
    if counted["failed_utterances"]:
        failed = counted["failed_utterances"]
        yield f"left out: {counted['left_out_trials']:,} trials of {failed:,} utterances that failed"
    rows = [["", *results]] if len(results) > 1 else []
    rows.append(["EER", *(f"{100 * one.eer:.3f} %" for one in results.values())])
    rows.append(["  at threshold", *(f"{one.eer_threshold:.4f}" for one in results.values())])
    for number, p_target in enumerate(P_TARGETS):
        costs = [one.min_dcf[number] for one in results.values()]
        rows.append([f"minDCF, P_target {p_target}", *(f"{cost.cost:.4f}" for cost in costs)])
        rows.append(["  at threshold", *(f"{cost.threshold:.4f}" for cost in costs)])
    decisions = [one.decisions for one in results.values() if one.decisions is not None]
    if decisions:
        rows.append(["model's threshold", *(f"{one.threshold:g}" for one in decisions)])
        strangers, targets = counted["nontargets"], counted["targets"]
        accepts = [f"{one.false_accepts:,} of {strangers:,} ({100 * one.false_accept_rate:.3f} %)" for one in decisions]
        rows.append(["  false accepts", *accepts])
        misses = [f"{one.misses:,} of {targets:,} ({100 * one.miss_rate:.3f} %)" for one in decisions]
        rows.append(["  misses", *misses])
    else:
        rows.append(["model's threshold", "none"])
    if difference is not None:
        rows.append(["largest difference of a score", f"{difference.score:.1e}"])
        rows.append(["smallest cosine of two embeddings", f"{difference.cosine:.7f}"])
        if difference.decisions is not None:
            rows.append(["decisions that differ", f"{difference.decisions:,} of {counted['trials']:,}"])
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _write_scores(path: Path, trials: Trials, scores: Floats) -> None:
    with replacing(path) as file:
        for score, same, a, b in zip(scores, trials.same, trials.a, trials.b, strict=True):
            line = f"{score:.7f} {int(same)} {trials.names[a]} {trials.names[b]}\n"
            file.write(line.encode(errors="surrogateescape"))


# --- the DET curve ---


def draw_det(
    path: Path, results: Mapping[str, Result], curves: Mapping[str, Curve], same: Bools, title: str = "DET curve"
) -> None:
    """Draw the detection error tradeoff of one or two systems on normal-deviate axes, as a PNG.

    Marked are the equal error rate, the least costs and the model's own threshold.

    Args:
        path: The file to write.
        results: By name of the system.
        curves: By name of the system.
        same: bool `[trials]`, the target trials.
        title: Above it.

    Raises:
        EvaluationError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise _extra("matplotlib") from exc

    targets = int(same.sum())
    drawn = {name: (curves[name], _marks(result)) for name, result in results.items()}
    rates = [rate for _, points in drawn.values() for _, _, *place in points for rate in place if rate < 1]
    # On the borders are the rates of 0 and 1.
    floor, top = min(0.5 / targets, 0.5 / (len(same) - targets), 0.05), min(0.999, max(0.45, *rates) * 1.1)
    deviate = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])
    figure = Figure(figsize=(7, 7), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # The second system is drawn on the first: where they agree, both are to be seen.
    styles: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"color": "#7fb0dd", "linewidth": 2.5 if len(results) == 1 else 4.5}, {"color": "#14507f", "markersize": 8}),
        (
            {"color": "#b8322a", "linewidth": 1.3, "linestyle": (0, (5, 3))},
            {"color": "#b8322a", "markersize": 13, "markerfacecolor": "none"},
        ),
    )
    for (name, (curve, points)), (line, mark) in zip(drawn.items(), styles, strict=False):
        x, y = (deviate(rate.clip(floor, 1 - 1e-9)) for rate in (curve.false_accepts, curve.misses))
        axes.plot(x, y, label=name, **line)
        for label, shape, *place in points:
            axes.plot(*deviate(np.clip(place, floor, top)), shape, label=label, clip_on=False, zorder=3, **mark)
    limits = deviate([floor, top])
    shown = [tick for tick in TICKS if 1.5 * floor < tick / 100 < top]
    places, labels = [limits[0], *deviate(np.array(shown) / 100)], ["0", *(f"{tick:g}" for tick in shown)]
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="False acceptance rate, %", ylabel="Miss rate, %", xlim=limits, ylim=limits)
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    axes.set_aspect("equal")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axline((0, 0), slope=1, color="0.75", linewidth=0.8, zorder=0)
    axes.legend(loc="upper right", fontsize="small", markerscale=0.75, labelspacing=0.7, framealpha=0.95)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _marks(result: Result) -> list[tuple[str, str, float, float]]:
    """Label, shape, false accepts and misses of the points to mark."""
    points = [(f"EER {100 * result.eer:.2f} %", "o", result.eer, result.eer)]
    for cost, shape in zip(result.min_dcf, "^v", strict=True):
        label = f"minDCF {cost.cost:.3f}, P_target {cost.p_target:g}"
        points.append((label, shape, cost.false_accepts, cost.misses))
    if (ours := result.decisions) is not None:
        points.append((f"model's threshold {ours.threshold:g}", "D", ours.false_accept_rate, ours.miss_rate))
    return points
