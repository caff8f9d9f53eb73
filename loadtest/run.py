"""Compare servers under load: CPU and GPU, our model and the baselines, in every scenario.

Contenders take turns within each level and round, so that a noisy machine treats them alike. Every reply is compared
with SpeechBrain's embedding of the clip alone or, where the server was not started here, with the server's own first
reply to that clip alone.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from ecapa_triton.audio import SAMPLE_RATE

from . import figures, load, machine, plan
from .arguments import count, positive
from .clips import MAX_ERROR, Array, Clips, compare, speech
from .infer import first_replies
from .load import Round
from .machine import MeasureError
from .plan import Loaded, Plan
from .scenarios import MIX, MODEL, OURS, REPEATED, SCENARIOS, Level, lengths
from .servers import Local, Server, reach

PACKAGES = "locust", "grpcio", "tritonclient", "nvidia-pytriton", "onnxruntime", "onnxruntime-gpu", "torch"
COLUMNS = ["server", "contender", "level", "round", "start_s", "latency_ms", "clips", "audio_s", "users", "result"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m loadtest run`."""
    add = parser.add_argument
    pair: dict[str, Any] = {"action": "append", "type": _pair, "default": [], "metavar": "NAME=URL"}
    add("--local", action="append", choices=["cpu", "gpu"], default=[], help="start a server here, with the baselines")
    add("--target", **pair, help="measure a running server at this gRPC address, such as cpu=grpc://HOST:8001")
    add("--metrics", **pair, help="the page of metrics of the target NAME (default: its host, port 8002)")
    add(
        "--scenario",
        type=_scenarios,
        default=list(SCENARIOS),
        metavar="NAMES",
        help=f"some of {','.join(SCENARIOS)} (default: all)",
    )
    add(
        "--model",
        help="name of our model (default: ecapa; locally ecapa_torchscript on a GPU that ONNX Runtime cannot use)",
    )
    add("--source", default="random", help="checkpoint of --local, as for python -m export (default: %(default)s)")
    channels = "channels of the convolutions, with --source random (default: %(default)s)"
    add("--channels", type=int, default=1024, metavar="N", help=channels)
    add("--repository", type=Path, metavar="DIR", help="--local serves the model exported there, not --source")
    add(
        "--precision",
        choices=["fp32", "fp16", "int8"],
        default="fp32",
        help="model files: fp16 with --local gpu, int8 with --local cpu (default: %(default)s)",
    )
    add("--no-baselines", dest="baselines", action="store_false", help="measure our model alone")
    seconds = "seconds that a level is measured; arrivals and ramp take four times as long (default: %(default)g)"
    add("--seconds", type=positive, default=3.0, metavar="S", help=seconds)
    warm_up = "seconds at the start of a level whose latencies do not count (default: %(default)g)"
    add("--warm-up", type=positive, default=0.4, metavar="S", help=warm_up)
    rounds = f"rounds of each level (default: %(default)s); mixed and 5 s have {REPEATED} or more"
    add("--rounds", type=count, default=1, metavar="N", help=rounds)
    capacity = "clips per second that the rates in arrivals are shares of (default: as measured in mixed)"
    add("--capacity", type=positive, metavar="RATE", help=capacity)
    add("--processes", type=count, default=1, metavar="N", help="processes of Locust (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("loadtest/results"),
        metavar="FOLDER",
        help="folder of the results (default: %(default)s)",
    )
    add("--name", help="name of the result's files (default: date and servers)")


def _pair(text: str) -> tuple[str, str]:
    name, value = text.split("=", 1)
    return name, value


def _scenarios(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(SCENARIOS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected {','.join(SCENARIOS)}")
    return text.split(",")


def run(options: argparse.Namespace) -> None:
    """Measure; write `NAME.json`, `NAME.csv`, the page and its plots; print the findings.

    Raises:
        MeasureError: nothing can be measured, or a reply of our model was wrong.
    """
    names = [*dict(options.target), *options.local]
    if not names:
        raise MeasureError("nothing to load: give --local cpu, --local gpu or --target NAME=grpc://HOST:PORT")
    options.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out).close()  # fail before minutes of load if it cannot be written
    stem = options.out / (options.name or f"{date.today()}-{'-'.join(names)}-load")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        session = Session(options, Path(folder), stack)
        try:
            session.measure()
        except KeyboardInterrupt:
            if not session.rows:
                raise
            session.interrupted = True
            print("interrupted: the report has the figures so far", file=sys.stderr)
        result = session.result()
    figures.save(result, Path(f"{stem}.json"))
    with open(f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *session.raw])
    paths = [f"{stem}.json", f"{stem}.csv", *figures.write([figures.read(Path(f"{stem}.json"))], stem)]
    print(f"\n{figures.summary(figures.Results.of([result]))}\n", *paths, sep="\n")
    if wrong := sum(row.get("wrong", 0) for row in result["rows"] if row["contender"] == OURS):
        raise MeasureError(f"{wrong} replies were WRONG: see {stem}.json")


@dataclass
class Turn:
    """A contender at a level."""

    server: Server
    contender: str
    loaded: Server  # the server itself; in the open loop another one like it
    rate: float | None = None  # clips/s that arrive, in the open loop
    rounds: list[Round] = field(default_factory=list)
    failed: str = ""  # why there are no rounds, or no more


class Session:
    """A run: its servers, clips and figures."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        """Reach or start every server, and write the clips for each with the expected embeddings into a folder."""
        self.options, self.folder = options, folder
        self.begun = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.raw: list[list[Any]] = []
        self.agreement: list[dict[str, Any]] = []
        self.interrupted = False
        names = {*options.scenario}
        if "arrivals" in names and not options.capacity:
            names.add("mixed")  # its throughput is the capacity
        self.levels = [level for name in SCENARIOS if name in names for level in SCENARIOS[name].levels]
        largest = {level.seconds: level.batch for level in sorted(self.levels, key=lambda level: level.batch)}
        self.clips = {  # by length in seconds, None is the mix
            seconds: speech(lengths(seconds, batch), seed) for seed, (seconds, batch) in enumerate(largest.items())
        }
        metrics = dict(options.metrics)
        self.servers = [reach(name, url, options.model or MODEL, metrics.get(name, "")) for name, url in options.target]
        for server in self.servers:
            server.describe(None)
        self.local = Local(options) if options.local else None
        every = [*(server.name for server in self.servers), *(self.local.models if self.local else [])]
        if len({*every}) < len(every):
            raise MeasureError(f"two servers have one name: {', '.join(every)}")
        self.plan = self._plan()
        if self.local:
            self.servers += self.local.start(folder / "repository", stack)
        self._expect()

    def _plan(self) -> Plan:
        """Plan the measurements, and say how long the run takes."""
        options = self.options
        cpu = plan.cpu_speed() * (plan.MINI if options.source == "mini" else 1)
        speed = {"CPU": cpu, "GPU": plan.GPU}
        loaded = [Loaded(s.name, one, speed[s.about["device"]], False) for s in self.servers for one in s.models]
        if self.local:
            every = (OURS, *self.local.baselines)
            loaded += [Loaded(name, one, speed[name.upper()], True) for name in self.local.models for one in every]
        audio = sum(len(clip) for deck in self.clips.values() for clip in deck) / SAMPLE_RATE
        found = Plan(self.levels, loaded, seconds=options.seconds, warm_up=options.warm_up, rounds=options.rounds)
        print(found.describe(plan.setup(audio, cpu, bool(self.local))), flush=True)
        return found

    def _expect(self) -> None:
        """Compare the servers' replies to each clip alone, and write the expected embeddings."""
        every = [clip for deck in self.clips.values() for clip in deck]
        first: tuple[str, Array, float] | None = None  # what the others are compared with
        if self.local:
            print("SpeechBrain's embeddings of the clips ...", flush=True)
            first = "SpeechBrain", self.local.reference(every), 0.0
        for server in self.servers:
            model, bound = server.models[OURS], server.max_error(OURS)
            name = f"{server.name}/{model}"
            print(f"{name}: each clip alone ...", flush=True)
            alone = first_replies(server.url, model, every)
            if first:
                other, expected, other_bound = first
                if alone.shape != expected.shape:
                    raise MeasureError(f"{name} and {other} have embeddings of other sizes: load servers of one model")
                agreed = {"clips": len(alone), **compare(alone, expected), "bound": max(bound, other_bound)}
                self.agreement.append({"a": name, "b": other, **agreed})
            first = first or (name, alone, bound)
            right = first[1] if server.local else alone
            ends = np.cumsum([len(deck) for deck in self.clips.values()])[:-1]
            for (seconds, deck), rows in zip(self.clips.items(), np.split(right, ends), strict=True):
                clips = Clips(deck, rows)
                if not clips.apart() > 2 * bound:
                    raise MeasureError(f"{name}: two clips have too similar embeddings to notice an exchange")
                clips.save(self._deck(server.name, seconds))

    def _deck(self, name: str, seconds: float | None) -> Path:
        return self.folder / f"{name}-{seconds}.npz"

    def measure(self) -> None:
        """Every level, every round, every contender in turn."""
        pairs = [(server, contender) for server in self.servers for contender in server.models]
        self.plan.begin([server.name for server in self.servers])
        for level in self.levels:
            with ExitStack() as stack:
                turns = [self._turn(level, *pair, stack) for pair in pairs if pair[1] == OURS or not level.long]
                try:
                    for first in range(max(level.rounds, self.options.rounds)):
                        first %= len(turns)  # no contender always follows the same other
                        for turn in turns[first:] + turns[:first]:
                            text = self._take(level, turn)
                            progress = self.plan.advance(turn.server.name, turn.contender, level)
                            print(f"{progress} {turn.server.name}, {turn.contender}: {level}: {text}", flush=True)
                finally:  # also the figures before Ctrl-C
                    for turn in turns:
                        self._add(level, turn)

    def _turn(self, level: Level, server: Server, contender: str, stack: ExitStack) -> Turn:
        """A contender at a level; `stack` stops a server that the level needs."""
        turn = Turn(server, contender, server)
        if level.share is not None:
            of = {"server": server.name, "contender": OURS, "scenario": "mixed"}
            capacity = self.options.capacity or next(
                (r.get("clips_per_s", 0.0) for r in self.rows if of.items() <= r.items()), 0.0
            )
            if not capacity:
                turn.failed = "mixed has no throughput to take shares of"
                return turn
            turn.rate = capacity * level.share
            if self.local and server.local and server.local.limits:
                try:
                    turn.loaded = stack.enter_context(self.local.open_loop(server, capacity))
                except MeasureError as error:
                    turn.failed = str(error)
        return turn

    def _take(self, level: Level, turn: Turn) -> str:
        """Measure a contender once; the figures in a line."""
        if turn.failed:
            return turn.failed
        options = self.options
        try:
            found = load.drive(
                level,
                turn.loaded,
                turn.server.models[turn.contender],
                self._deck(turn.server.name, level.seconds),
                seconds=options.seconds,
                warm_up=options.warm_up,
                processes=options.processes,
                max_error=turn.server.max_error(turn.contender),
                rate=turn.rate or 0.0,
            )
        except MeasureError as error:  # costs the rows of this server only
            turn.failed = str(error)
            return turn.failed
        turn.rounds.append(found)
        row = load.measured(level, [found])
        p95 = row["p95_ms"] or float("nan")
        failed = sum(row["errors"].values())
        text = f"{row['clips_per_s']:.1f} clips/s, p95 {p95:,.0f} ms, {row['rejected']} rejected, {failed} failed"
        return f"{text}, {row['wrong']} wrong"

    def _add(self, level: Level, turn: Turn) -> None:
        """Keep the figures of a contender at a level, and the requests themselves."""
        row = {
            "server": turn.server.name,
            "contender": turn.contender,
            "model": turn.server.models[turn.contender],
            **{key: getattr(level, key) for key in figures.LEVEL},
            "offered": turn.rate,
            "max_requests": turn.loaded.max_requests,
        }
        if turn.rounds:
            row |= load.measured(level, turn.rounds)
            row["errors"] |= {turn.failed: 1} if turn.failed else {}
        elif turn.failed:
            row["failed"] = turn.failed
        else:  # interrupted before its turn
            return
        self.rows.append(figures.shorten(row))
        for number, found in enumerate(turn.rounds, 1):
            for sent in found.requests:
                times = [round(sent.start - found.begin, 4), round(sent.latency * 1e3, 2)]
                sizes = [sent.clips, round(sent.audio, 3), sent.users]
                self.raw.append([turn.server.name, turn.contender, str(level), number, *times, *sizes, sent.result])

    def result(self) -> dict[str, Any]:
        """The result, as `python -m loadtest report` reads it."""
        decks = ", ".join(f"{len(d)} of {'the mix' if s is None else f'{s:g} s'}" for s, d in self.clips.items())
        return {
            "kind": figures.KIND,
            **machine.describe(
                (*PACKAGES, "speechbrain", "numpy"),
                commit=machine.commit(),
                command=shlex.join(["python", "-m", "loadtest", *self.options.words]),
                took_s=round(time.monotonic() - self.begun, 1),
                interrupted=self.interrupted,
            ),
            "conditions": {
                "source": self.local.checkpoint.source if self.local else None,
                "references": "SpeechBrain" if self.local else "first replies",
                "clips": f"{decks}; speech of samples/ under faint noise",
                "mix": {f"{seconds:g}": number for seconds, number in MIX.items()},
                "warm_up_s": self.options.warm_up,
                "processes": self.options.processes,
                "bound": MAX_ERROR,
            },
            "servers": [server.about for server in self.servers],
            "missing": self.local.missing if self.local else {},
            "rows": self.rows,
            "agreement": self.agreement,
        }
