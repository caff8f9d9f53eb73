"""Trial lists and error rates of speaker verification; the rates need scikit-learn (extra `evaluate`).

```python
listed = trials.read(Path("trials.txt"), root=Path("clips"))
curve = trials.curve(trials.cosines(embeddings, listed.pairs), listed.same)
print(curve.figures(threshold=0.45).eer)
```
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .audio import describe
from .errors import EvaluationError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

P_TARGETS = 0.01, 0.05  # prior probabilities of a target trial in the detection costs of NIST SRE and VoxSRC
LABELS = {"1": True, "target": True, "0": False, "nontarget": False}
CHUNK = 8192  # trials scored at a time: 6 MB an operand


@dataclass(frozen=True, eq=False)
class Trials:
    """Pairs of clips.

    Attributes:
        names: The clips as the list names them, each once, in order of appearance.
        paths: The same clips, with the root before each name.
        same: bool `[trials]`, true for a target trial: both clips are of one speaker.
        pairs: int32 `[trials, 2]`, places in `names`.
    """

    names: list[str]
    paths: list[str]
    same: Bools
    pairs: NDArray[np.int32]


def read(path: Path, root: Path) -> Trials:
    """Read a trial list with one trial a line, `LABEL A B` (VoxCeleb) or `A B LABEL` (Kaldi).

    Args:
        path: The list. A label is 1 or target, 0 or nontarget; blank lines are skipped.
        root: Folder that its paths start from.

    Raises:
        EvaluationError: A line is not a trial, a clip is missing, or all trials are of one kind.
    """
    places: dict[str, int] = {}
    same: list[bool] = []
    pairs: list[list[int]] = []
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
                pairs.append([places.setdefault(name, len(places)) for name in pair])
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        reason = getattr(exc, "strerror", None) or exc
        raise EvaluationError(f"{describe(path)}: cannot be read ({reason}): expected a trial list") from exc
    _check_kinds(np.array(same, np.bool_), f"{describe(path)}: ")
    paths = [os.path.join(root, name) for name in places]
    missing = [file for file in paths if not os.path.isfile(file)]
    if missing:
        raise EvaluationError(
            f"{describe(path)}: {describe(missing[0])} is not a file ({len(missing)} of {len(paths)} clips are "
            "missing): pass the folder that the paths start from (--root)"
        )
    return Trials(list(places), paths, np.array(same, np.bool_), np.array(pairs, np.int32))


def cosines(embeddings: NDArray[np.float32], pairs: NDArray[np.int32]) -> Floats:
    """Scores of trials, float64 `[trials]`, -1 to 1.

    Args:
        embeddings: float32 `[clips, dims]`; they need not be of unit length.
        pairs: int32 `[trials, 2]`, rows of `embeddings`.
    """
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = np.empty(len(pairs))
    for start in range(0, len(pairs), CHUNK):
        a, b = pairs[start : start + CHUNK].T
        np.einsum("td,td->t", units[a], units[b], dtype=np.float64, out=scores[start : start + CHUNK])
    return scores.clip(-1, 1)


@dataclass(frozen=True)
class Cost:
    """The smallest detection cost at a prior probability of target trials.

    Attributes:
        p_target: The prior probability.
        cost: `(p_target misses + (1 - p_target) false_accepts) / min(p_target, 1 - p_target)`; 1 without any audio.
        threshold: Cosine at which it is reached.
        false_accepts: Share of the nontarget trials accepted there.
        misses: Share of the target trials rejected there.
    """

    p_target: float
    cost: float
    threshold: float
    false_accepts: float
    misses: float


@dataclass(frozen=True)
class Decisions:
    """Errors at a threshold, a cosine; `score > threshold` accepts. Rates are 0 to 1, of the trials of that kind."""

    threshold: float
    false_accepts: int
    misses: int
    false_accept_rate: float
    miss_rate: float


@dataclass(frozen=True)
class Figures:
    """Equal error rate (0 to 1), costs at each of `P_TARGETS`, errors at the model's own threshold (None: has none)."""

    eer: float
    eer_threshold: float
    min_dcf: tuple[Cost, ...]
    decisions: Decisions | None


@dataclass(frozen=True, eq=False)
class Curve:
    """Error rates from the threshold that rejects every trial to the one that accepts every trial.

    Trials of equal score are accepted together, so consecutive points differ by one value of the score.

    Attributes:
        targets: Number of target trials.
        nontargets: Number of nontarget trials.
        scores: float64 `[points - 1]`, falling: the value that each point accepts and the one before it rejects.
        false_accepts: float64 `[points]`, share of the nontarget trials accepted, rising from 0 to 1.
        misses: float64 `[points]`, share of the target trials rejected, falling from 1 to 0.
    """

    targets: int
    nontargets: int
    scores: Floats
    false_accepts: Floats
    misses: Floats

    def threshold(self, point: int) -> float:
        """The threshold of a point, midway between two scores; the highest score at the first, -inf at the last."""
        if point in (0, len(self.scores)):
            return -np.inf if point else float(self.scores[0])
        upper, lower = self.scores[point - 1], self.scores[point]
        return float(min(lower + (upper - lower) / 2, np.nextafter(upper, -np.inf)))

    def equal_error(self) -> tuple[float, float]:
        """Equal error rate (0 to 1) and its threshold, interpolated linearly between the points beside the crossing."""
        excess = self.false_accepts - self.misses  # rises from -1 to 1
        at = int(np.argmax(excess > -1e-14))  # rounding apart; unequal shares of under 1e7 trials differ by more
        threshold = self.threshold(at) if excess[at] < 1e-14 else float(self.scores[at - 1])
        return float(np.interp(0, excess, self.false_accepts)), threshold

    def least_cost(self, p_target: float) -> Cost:
        """The smallest detection cost at a prior, at the highest threshold that reaches it."""
        costs = p_target * self.misses + (1 - p_target) * self.false_accepts
        at = int(np.argmin(costs))
        cost = float(costs[at] / min(p_target, 1 - p_target))
        return Cost(p_target, cost, self.threshold(at), float(self.false_accepts[at]), float(self.misses[at]))

    def decide(self, threshold: float) -> Decisions:
        """The errors at a threshold."""
        at = np.count_nonzero(self.scores > threshold)
        accepts, misses = float(self.false_accepts[at]), float(self.misses[at])
        return Decisions(threshold, round(accepts * self.nontargets), round(misses * self.targets), accepts, misses)

    def figures(self, threshold: float | None) -> Figures:
        """All figures; `threshold` is the model's own, None where it has none."""
        costs = tuple(map(self.least_cost, P_TARGETS))
        return Figures(*self.equal_error(), costs, None if threshold is None else self.decide(threshold))


def curve(scores: Floats, same: Bools) -> Curve:
    """Error rates at every threshold.

    Args:
        scores: float `[trials]`, finite.
        same: bool `[trials]`, true for target trials.

    Raises:
        EvaluationError: All trials are of one kind, or scikit-learn is not installed.
    """
    _check_kinds(same)
    roc_curve = require("sklearn.metrics").roc_curve
    false_accepts, hits, accepted_from = roc_curve(same, scores, drop_intermediate=False)
    targets = np.count_nonzero(same)
    # Its first threshold, infinity, is no score.
    return Curve(targets, len(same) - targets, accepted_from[1:].astype(np.float64), false_accepts, 1 - hits)


def require(module: str) -> Any:
    """Import a module that the extra `evaluate` installs.

    Raises:
        EvaluationError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise EvaluationError(f"{exc}: pip install 'ecapa-triton[evaluate]'") from exc


def _check_kinds(same: Bools, name: str = "") -> None:
    targets = np.count_nonzero(same)
    if targets in (0, len(same)):
        raise EvaluationError(
            f"{name}{targets} target and {len(same) - targets} nontarget trials: expected some of both"
        )
