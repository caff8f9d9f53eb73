"""`ecapa-triton evaluate`: how well the served model tells speakers apart."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import Long, SpeakerClient, Utterance, trials
from ._commands import DONE, at_least, complain, named
from ._files import check_output, replacing
from .audio import counted, describe
from .errors import HOPELESS, EcapaError, EvaluationError, OutputError
from .trials import Curve, Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
# Rates on the axes of a DET plot; smaller and larger ones are drawn at its borders.
TICKS = 1e-4, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run` but `--long` and `--json`."""
    add = parser.add_argument
    add("trials", type=Path, metavar="TRIALS", help="list: `1 a.flac b.flac` or `a.flac b.flac target` a line")
    add("--root", type=Path, metavar="DIR", help="folder its paths start from (default: the list's)")
    add("--in-flight", type=at_least(1), default=8, metavar="N", help="requests in flight at a time (%(default)s)")
    add("--skip-failed", action="store_true", help="leave out clips that cannot be embedded, and their trials")
    add("--scores", type=Path, metavar="FILE", help="write `SCORE LABEL A B` lines")
    add("--det", type=Path, metavar="FILE.png", help="draw the DET curve")


def run(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    """Evaluate a trial list, print the figures and return the exit status.

    Raises:
        EcapaError: The list or an output is unusable, or a clip cannot be embedded.
    """
    trials.require("sklearn.metrics")
    if arguments.det is not None:
        trials.require("matplotlib.figure")
    listed = trials.read(arguments.trials, arguments.root or arguments.trials.parent)
    _check_outputs(arguments, listed.paths)

    embeddings, one = _embed(client, listed.paths, arguments.long, arguments.skip_failed)
    failed = np.isnan(embeddings[:, 0])
    keep = ~failed[listed.pairs].any(axis=1)
    same, pairs = listed.same[keep], listed.pairs[keep]
    scores = trials.cosines(embeddings, pairs)
    curve = trials.curve(scores, same)
    figures = curve.figures(one.threshold)

    facts = {
        "trials": len(same),
        "targets": curve.targets,
        "nontargets": curve.nontargets,
        "utterances": len(np.unique(pairs)),
        "failed_utterances": int(failed.sum()),
        "left_out_trials": int((~keep).sum()),
        "model": one.model,
    }
    if arguments.scores is not None:
        with replacing(arguments.scores) as file:
            for score, label, (a, b) in zip(scores, same, pairs, strict=True):
                line = f"{score:.7f} {label:d} {listed.names[a]} {listed.names[b]}\n"
                file.write(line.encode(errors="surrogateescape"))
    if arguments.det is not None:
        counts = f"{curve.targets:,} target and {curve.nontargets:,} nontarget trials, model {one.model}"
        title = f"DET curve of {describe(arguments.trials.name)}\n{counts}"
        with replacing(arguments.det) as file:
            _plot(curve, figures, title).savefig(file, format="png")
    print(json.dumps(facts | {"served": asdict(figures)}) if arguments.json else "\n".join(_report(facts, figures)))
    return DONE


def _check_outputs(arguments: argparse.Namespace, inputs: list[str]) -> None:
    """Reject outputs that cannot be written, and those that would replace an input or each other."""
    taken = {os.path.realpath(path) for path in (arguments.trials, *inputs)}
    for path, *endings in (arguments.scores,), (arguments.det, ".png"):
        if path is None:
            continue
        if str(check_output(path, *endings)) in taken:
            raise OutputError(f"{describe(path)}: is an input or the other output: choose another path")
        taken.add(os.path.realpath(path))


def _embed(
    client: SpeakerClient, paths: list[str], long: Long, skip_failed: bool
) -> tuple[NDArray[np.float32], Utterance]:
    """Embeddings float32 `[clips, dims]`, rows of NaN for failed clips, and the first utterance."""
    first: Utterance | None = None
    embeddings = np.empty((0, 0), np.float32)
    outcomes = _progress(client.utterances(paths, long=long), len(paths))
    for place, (path, outcome) in enumerate(zip(paths, outcomes, strict=True)):
        if isinstance(outcome, EcapaError):
            error = named(path, outcome)
            if isinstance(error, HOPELESS) or not skip_failed:
                raise error
            complain(str(error))
            continue
        if first is None:
            first = outcome
            embeddings = np.full((len(paths), len(outcome.embedding)), np.nan, np.float32)
        if outcome.model != first.model:
            models = f"by model {outcome.model}, earlier clips by {first.model}"
            raise EvaluationError(f"{describe(path)}: embedded {models}: serve one model, then run again")
        embeddings[place] = outcome.embedding
    if first is None:
        raise EvaluationError(f"none of {counted(len(paths), 'clip')} could be embedded: see the errors above")
    return embeddings, first


def _progress(items: Iterable[T], total: int) -> Iterable[T]:
    """Show a progress bar on a terminal, where rich is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, "embedding", total, console=Console(stderr=True), transient=True)


def _report(facts: dict[str, Any], figures: Figures) -> Iterator[str]:
    yield (
        f"{counted(facts['trials'], 'trial')} ({facts['targets']:,} target, {facts['nontargets']:,} nontarget) "
        f"of {counted(facts['utterances'], 'utterance')}, model {facts['model']}"
    )
    if failed := facts["failed_utterances"]:
        yield f"left out: {counted(facts['left_out_trials'], 'trial')} of {counted(failed, 'utterance')} that failed"
    rows = [("EER", f"{100 * figures.eer:.3f} %"), ("  at threshold", f"{figures.eer_threshold:.4f}")]
    for cost in figures.min_dcf:
        rows.append((f"minDCF, P_target {cost.p_target}", f"{cost.cost:.4f}"))
        rows.append(("  at threshold", f"{cost.threshold:.4f}"))
    if (own := figures.decisions) is None:
        rows.append(("model's threshold", "none"))
    else:
        accepts = f"{own.false_accepts:,} of {facts['nontargets']:,} ({100 * own.false_accept_rate:.3f} %)"
        misses = f"{own.misses:,} of {facts['targets']:,} ({100 * own.miss_rate:.3f} %)"
        rows += [("model's threshold", f"{own.threshold:g}"), ("  false accepts", accepts), ("  misses", misses)]
    for label, value in rows:
        yield f"{label:21}  {value}"


def _plot(curve: Curve, figures: Figures, title: str) -> Figure:
    """The DET curve on normal-deviate axes, with its EER, smallest costs and the model's own threshold marked."""
    points = [(f"EER {100 * figures.eer:.2f} %", "o", figures.eer, figures.eer)]
    for cost, shape in zip(figures.min_dcf, "^v", strict=True):
        label = f"minDCF {cost.cost:.3f}, P_target {cost.p_target:g}"
        points.append((label, shape, cost.false_accepts, cost.misses))
    if (own := figures.decisions) is not None:
        points.append((f"model's threshold {own.threshold:g}", "D", own.false_accept_rate, own.miss_rate))

    def place(rates: ArrayLike) -> NDArray[np.float64]:
        return np.array([NormalDist().inv_cdf(rate) for rate in np.atleast_1d(np.clip(rates, TICKS[0], TICKS[-1]))])

    figure: Figure = trials.require("matplotlib.figure").Figure(figsize=(7, 7), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="False acceptance rate, %", ylabel="Miss rate, %", aspect="equal")
    axes.plot(place(curve.false_accepts), place(curve.misses), color="#7fb0dd", linewidth=2.5)
    for label, shape, x, y in points:
        axes.plot(place(x), place(y), shape, label=label, color="#14507f", markersize=8, clip_on=False, zorder=3)
    ticks, labels = place(TICKS), [f"{100 * tick:g}" for tick in TICKS]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.set(xlim=ticks[[0, -1]], ylim=ticks[[0, -1]])
    axes.set_title(title, parse_math=False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.legend(loc="upper right", fontsize="small")
    return figure
