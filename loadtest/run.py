"""Compare servers under load: CPU and GPU instances, ours and the baselines, in every scenario.

Contenders take turns within each level and round, so that a noisy machine treats them alike. Every reply is compared
with SpeechBrain's embedding of the clip alone or, where the server was not started here, with its own first reply to
that clip alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import load, machine, report, scenarios
from .clips import MAX_ERROR, Array, Clips, compare, speech
from .gpu_page import reason
from .load import LoadError, Round, Timing
from .scenarios import Level
from .target import BASELINES, OURS, Target, TargetError, reach

IN_PROCESS = "in process"
ROUNDS_OF_GOALS = 3  # of the levels that the goals speak of, at least
MODEL = "ecapa"  # of ours, on a server that was not started here
PACKAGES = "locust", "grpcio", "tritonclient", "nvidia-pytriton", "onnxruntime", "onnxruntime-gpu", "torch"


@dataclass(frozen=True)
class Contender:
    """Somebody who takes part: a model on a target, or the model in process beside a target."""

    target: Target
    model: str
    name: str
    max_error: float


@dataclass
class Turn:
    """A contender at a level.

    Attributes:
        contender: who.
        target: the server, in the open loop perhaps not its usual one.
        rate: clips per second that arrive, in the open loop.
        rounds: what was measured.
        failed: why there is nothing to measure, or no more.
    """

    contender: Contender
    target: Target
    rate: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    failed: str = ""


class Session:
    """A run: what takes part, what was measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.timing = Timing(options.seconds, options.warm_up, options.processes)
        self.targets: list[Target] = []
        self.contenders: list[Contender] = []
        self.not_measured: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.agreement: list[dict[str, Any]] = []
        self.raw: list[list[Any]] = []
        self.decks: dict[float | None, list[Array]] = {}
        self.local: Any = None  # the servers that were started here
        self.interrupted = False
        self._about: dict[str, dict[str, Any]] = {}
        self._total = self._done = 0
        self._begun = 0.0

    def chosen(self) -> list[Level]:
        """Every level of the scenarios that were asked for."""
        levels = [level for scenario in self.options.scenario for level in scenarios.levels(scenario)]
        return [level for level in levels if level.users is None or level.users <= self.options.max_clients]

    def rounds(self, level: Level) -> int:
        """How often a level is measured."""
        of_goals = level.scenario == "mixed" or (level.scenario, level.seconds) == ("single", 5.0)
        return max(self.options.rounds, ROUNDS_OF_GOALS) if of_goals else int(self.options.rounds)

    def taking_part(self, level: Level) -> list[Contender]:
        """Who is measured at a level."""
        if level.scenario in ("arrivals", "ramp"):
            return [one for one in self.contenders if one.name == OURS]
        if level.scenario in ("single", "mixed"):
            return self.contenders
        return [one for one in self.contenders if one.name != IN_PROCESS]

    def prepare_clips(self) -> None:
        """Cut what is sent: a deck for each length, and one of the mix."""
        wanted: dict[float | None, int] = {}
        for level in self.chosen():
            wanted[level.seconds] = max(level.batch, wanted.get(level.seconds, 1))
        if "arrivals" in self.options.scenario:
            wanted.setdefault(None, 1)  # the mix tells the capacity
        for number, (seconds, batch) in enumerate(wanted.items()):
            self.decks[seconds] = speech(scenarios.lengths(seconds, batch), seed=number)

    def agree(self) -> None:
        """Ask every target for each clip alone; write its decks with what must come back."""
        every = [clip for deck in self.decks.values() for clip in deck]
        reference = first = None
        if self.local and self.local.targets:
            print("SpeechBrain's embeddings of the clips ...", flush=True)
            reference = self.local.reference(every)
            first = "SpeechBrain", reference
        for one in [one for one in self.contenders if one.name == OURS]:
            name = f"{one.target.name}/{one.model}"
            print(f"{name}: each clip alone ...", flush=True)
            alone = first_replies(one.target, one.model, every)
            if first is None:
                first = name, alone
            elif alone.shape != first[1].shape:
                sizes = f"{alone.shape[1]} dimensions, {first[0]} of {first[1].shape[1]}"
                raise TargetError(f"{name} has embeddings of {sizes}")
            else:
                agreed = {"a": name, "b": first[0], "clips": len(alone), **compare(alone, first[1])}
                self.agreement.append(agreed)
            expected = reference if one.target.local and reference is not None else alone
            ends = np.cumsum([len(deck) for deck in self.decks.values()])[:-1]
            for (seconds, deck), rows in zip(self.decks.items(), np.split(expected, ends), strict=True):
                clips = Clips(deck, rows)
                if not clips.apart() > 2 * one.max_error:
                    raise TargetError(
                        f"{name}: two clips have so much the same embedding that an exchange would not be seen"
                    )
                clips.save(self._deck(one.target, seconds))

    def _deck(self, target: Target, seconds: float | None) -> Path:
        return self.folder / f"{target.name}-{seconds}.npz"

    def measure(self) -> None:
        """Every level, every round, every contender in turn."""
        levels = self.chosen()
        self._total = sum(self.rounds(level) * len(self.taking_part(level)) for level in levels)
        self._begun = time.monotonic()
        for level in levels:
            with contextlib.ExitStack() as stack:
                turns = [self._turn(level, one, stack) for one in self.taking_part(level)]
                try:
                    for number in range(self.rounds(level)):
                        first = number % len(turns)  # nobody always runs behind the same other
                        for turn in turns[first:] + turns[:first]:
                            self._take(level, turn)
                finally:  # also what was measured before Ctrl-C
                    for turn in turns:
                        self._add(level, turn)

    def _turn(self, level: Level, one: Contender, stack: contextlib.ExitStack) -> Turn:
        """Where and how a contender is measured at a level; servers that this needs end with `stack`."""
        turn = Turn(one, one.target)
        most = self._about[one.target.name]["models"][one.model]["max_batch"]
        if one.name != IN_PROCESS and level.batch > most:
            turn.failed = f"{level.batch} clips in a request, its config takes {most}"
        if level.share is not None:
            try:
                capacity = self._capacity(one)
                turn.rate = capacity * level.share
                if self.local and one.target.local:
                    turn.target = self.local.open_loop(one.target, one.model, capacity, stack)
            except (LoadError, TargetError) as error:  # a server that is gone costs its own rows only
                turn.failed = str(error)
        return turn

    def _capacity(self, one: Contender) -> float:
        """Clips of the mix per second that a contender can do."""
        if self.options.capacity:
            return float(self.options.capacity)
        (mixed,) = scenarios.levels("mixed")
        for row in self.rows:
            known = row["target"], row["model"], row["contender"], row["scenario"]
            if known == (one.target.name, one.model, one.name, mixed.scenario) and "clips_per_s" in row:
                return float(row["clips_per_s"]) or 1.0  # where all were wrong
        print(f"{one.target.name}: how many clips of the mix a second it can do ...", flush=True)
        turn = Turn(one, one.target)
        self._total += 1
        self._take(mixed, turn)
        self._add(mixed, turn)
        if turn.failed:
            raise LoadError(turn.failed)
        return float(self.rows[-1]["clips_per_s"]) or 1.0

    def _take(self, level: Level, turn: Turn) -> None:
        """Measure a contender once, and say what came of it."""
        self._done += 1
        if turn.failed:
            return
        one = turn.contender
        deck = self._deck(one.target, level.seconds)
        try:
            if one.name == IN_PROCESS:
                batch = self.local.batch if level.seconds is None else 1
                found = load.in_process(self.local.embed, Clips.load(deck), batch, self.timing)
            else:
                found = load.drive(
                    level, turn.target, one.model, one.max_error, deck, self.timing, self.folder, turn.rate
                )
            turn.rounds.append(found)
            told = _in_short(load.figures(level, [found]))
        except (LoadError, TargetError) as error:
            turn.failed = told = str(error)
        left = (time.monotonic() - self._begun) / self._done * (self._total - self._done) / 60
        progress = f"[{self._done:3d}/{self._total}, {left:.0f} min left]"
        print(f"{progress} {one.target.name}, {one.name}: {level}: {told}", flush=True)

    def _add(self, level: Level, turn: Turn) -> None:
        """The row of what a contender did at a level, and the requests themselves."""
        one = turn.contender
        row: dict[str, Any] = {"target": one.target.name, "model": one.model, "contender": one.name, **asdict(level)}
        row["offered"] = turn.rate or None
        limits = turn.target.local.limits if turn.target.local else None
        row["max_requests"] = limits.requests if limits and one.name != IN_PROCESS else None
        if turn.rounds:
            row |= load.figures(level, turn.rounds)
        elif turn.failed:
            row |= {"loop": "closed" if level.share is None else "open", "failed": turn.failed}
        else:  # interrupted before its turn
            return
        self.rows.append(row)
        for number, found in enumerate(turn.rounds, 1):
            for sent in found.requests:
                about = [one.target.name, one.model, one.name, str(level), number]
                counted = int(found.begin <= sent.start < found.end)
                what = [round(sent.latency * 1e3, 2), sent.clips, round(sent.audio, 3), sent.users, sent.result]
                self.raw.append([*about, round(sent.start - found.begin, 4), counted, *what])

    def result(self, took: float) -> dict[str, Any]:
        """All of it, as `python -m loadtest report` reads it."""
        return {
            "kind": "load",
            **machine.describe(
                machine.installed(*PACKAGES, "speechbrain", "numpy"),
                commit=machine.commit(),
                command=" ".join(["python -m loadtest", *map(shlex.quote, self.options.words)]),
                took_s=took,
                interrupted=self.interrupted,
            ),
            "conditions": {
                "source": self.local.source if self.local else None,
                "references": "SpeechBrain" if self.local and self.local.targets else "first replies",
                "clips": ", ".join(
                    f"{len(deck)} of {'the mix' if seconds is None else f'{seconds:g} s'}"
                    for seconds, deck in self.decks.items()
                )
                + "; speech of samples/ under faint noise",
                "mix": {f"{seconds:g}": count for seconds, count in scenarios.MIX.items()},
                "warm_up_s": self.timing.warm_up,
                "seconds": self.timing.seconds,
                "rounds": self.options.rounds,
                "processes": self.timing.processes,
                "bound": MAX_ERROR,
            },
            "targets": list(self._about.values()),
            "not_measured": self.not_measured,
            "rows": self.rows,
            "agreement": self.agreement,
        }

    def describe(self) -> None:
        """Ask the targets about themselves, while they are there."""
        self._about = {
            target.name: target.describe(self.local.sha256 if target.local else {}) for target in self.targets
        }


def run(options: argparse.Namespace) -> None:
    """Measure, write `NAME.json`, `NAME.csv` and the report, say what is most worth knowing.

    Raises:
        TargetError: nothing can be measured.
        LoadError: a reply of ours was wrong.
    """
    if not options.target and not options.local:
        raise TargetError("nothing to load: give --local cpu, --local gpu or --target NAME=grpc://HOST:PORT")
    begun = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out).close()  # a bad path costs nobody minutes of load
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        session = Session(options, Path(folder))
        try:
            session.prepare_clips()
            _assemble(session, stack)
            session.agree()
            session.describe()
            session.measure()
        except KeyboardInterrupt:
            if not session.rows:
                raise
            session.interrupted = True
            print("interrupted: the report has what was measured", file=sys.stderr)
        data = session.result(time.monotonic() - begun)
    name = options.name or f"{data['date'][:10]}-{'-'.join(target.name for target in session.targets)}-load"
    paths = [options.out / f"{name}.json", options.out / f"{name}.csv"]
    paths[0].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    _write_raw(paths[1], session.raw)
    paths += report.write([data], options.out, name)
    print(f"\n{report.summary([data])}\n\n" + "\n".join(map(str, paths)))
    if wrong := sum(row.get("wrong", 0) for row in data["rows"] if row["contender"] == OURS):
        raise LoadError(f"{wrong} replies were WRONG: see {paths[0]}")


def _assemble(session: Session, stack: contextlib.ExitStack) -> None:
    """Find or start every target."""
    options = session.options
    for name, url in options.target:
        session.targets.append(reach(name, url, options.model or MODEL, dict(options.metrics).get(name, "")))
    if options.local:
        try:
            from .local import Local
        except ModuleNotFoundError as error:
            raise TargetError(f"--local: {reason(error)}: pip install -e '.[export,server,loadtest]'") from error

        session.local = Local(options, session.folder, stack)
        session.targets += session.local.targets
        session.not_measured = session.local.not_measured
    if not session.targets:
        raise TargetError("; ".join(f"{name}: {why}" for name, why in session.not_measured.items()))
    names = [target.name for target in session.targets]
    if len(set(names)) < len(names):
        raise TargetError(f"two targets have one name: {', '.join(names)}")
    for target in session.targets:
        for model, served in target.models().items():
            name = target.contenders[model]
            # Padding moves embeddings, however right the baseline is served.
            padded = name == BASELINES["speechbrain_padded"]
            max_error = math.inf if padded else MAX_ERROR["fp16" if served.precision == "fp16" else "fp32"]
            session.contenders.append(Contender(target, model, name, max_error))
        if target.local and target.name == "cpu" and session.local and session.local.embed:
            session.contenders.append(Contender(target, MODEL, IN_PROCESS, MAX_ERROR["fp32"]))


def first_replies(target: Target, model: str, clips: list[Array]) -> Array:
    """The embedding of each clip, float32 `[n, E]`, sent alone and one after another."""
    from ecapa_triton.protocol import CHANNEL_ARGS
    from tritonclient.grpc import InferenceServerClient, InferInput

    rows = []
    with InferenceServerClient(target.address, channel_args=CHANNEL_ARGS) as triton:
        for clip in clips:
            tensor = InferInput("waveform", [1, len(clip)], "FP32")
            tensor.set_data_from_numpy(clip[np.newaxis].astype(np.float32))
            try:
                rows.append(triton.infer(model, [tensor], client_timeout=60.0).as_numpy("embedding")[0])
            except Exception as error:
                raise TargetError(f"target {target.name}: {model} does not embed a clip: {reason(error)}") from error
    if not np.isfinite(rows).all():
        raise TargetError(f"target {target.name}: {model} answers good speech with NaN")
    return np.stack(rows)


def _in_short(figures: dict[str, Any]) -> str:
    words = [f"{figures['clips_per_s']:.1f} clips/s"]
    if figures["p95_ms"] is not None:
        words.append(f"p95 {figures['p95_ms']:,.0f} ms")
    if figures["refused"]:
        words.append(f"{figures['refused']} refused")
    words += [f"{count} times {error}" for error, count in figures["errors"].items()]
    if figures["wrong"]:
        words.append(f"{figures['wrong']} WRONG")
    return ", ".join(words)


def _write_raw(path: Path, rows: list[list[Any]]) -> None:
    header = ["target", "model", "contender", "level", "round", "start_s", "counted", "latency_ms", "clips", "audio_s"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, "users", "result"])
        writer.writerows(rows)
