"""Compare servers under load: CPU and GPU, our model and the baselines, in every scenario.

Contenders take turns within each level and round, so that a noisy machine treats them alike. Every reply is compared
with SpeechBrain's embedding of the clip alone or, where the server was not started here, with the server's own first
reply to that clip alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import figures, load, machine, scenarios
from .arguments import count, not_negative, positive
from .clips import MAX_ERROR, Array, Clips, compare, speech
from .infer import CallFailed, Rejected, WrongReply, first_replies
from .load import Round, Timing
from .machine import MeasureError
from .scenarios import MODEL, OURS, PADDED, SCENARIOS, Level
from .servers import Local, Server, reach

PACKAGES = "locust", "grpcio", "tritonclient", "nvidia-pytriton", "onnxruntime", "onnxruntime-gpu", "torch"
COLUMNS = ["server", "contender", "level", "round", "start_s", "latency_ms", "clips", "audio_s", "users", "result"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m loadtest run`."""
    add = parser.add_argument
    add("--local", action="append", choices=["cpu", "gpu"], default=[], help="start a server here, with the baselines")
    add("--target", action="append", type=_pair, default=[], metavar="NAME=URL", help="load cpu=grpc://HOST:8001")
    add(
        "--metrics",
        action="append",
        type=_pair,
        default=[],
        metavar="NAME=URL",
        help="of a target (default: port 8002)",
    )
    add("--scenario", type=_scenarios, default=list(SCENARIOS), metavar="NAMES", help=f"{','.join(SCENARIOS)} (all)")
    add("--model", help="ours (default: ecapa; locally ecapa_torchscript on a GPU that ONNX Runtime cannot use)")
    add("--source", default="random", help="of --local, as for python -m export (default: %(default)s)")
    add("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
    add("--repository", type=Path, metavar="DIR", help="--local serves the model exported there, not --source")
    add("--precision", choices=["fp32", "fp16"], default="fp32", help="of --local gpu (default: %(default)s)")
    add("--no-baselines", dest="baselines", action="store_false", help="measure our model alone")
    add(
        "--seconds",
        type=positive,
        default=3.0,
        help="per level, four times in arrivals and ramp (default: %(default)g)",
    )
    add("--warm-up", type=not_negative, default=0.4, help="seconds whose latencies do not count (default: %(default)g)")
    add("--rounds", type=count, default=1, help=f"of each level; mixed and 5 s at least {scenarios.REPEATED}")
    add("--max-clients", type=count, default=200, help="leave out levels with more (default: %(default)s)")
    add("--capacity", type=positive, help="clips/s that arrivals are shares of (default: as measured in mixed)")
    add("--processes", type=count, default=1, help="of Locust (default: %(default)s)")
    add("--out", type=Path, default=Path("loadtest/results"), metavar="FOLDER", help="default: %(default)s")
    add("--name", type=_name, help="of the files (default: date and servers)")


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not value:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=URL, such as cpu=grpc://127.0.0.1:8001")
    return name, value


def _name(text: str) -> str:
    if not re.fullmatch(r"\w[\w. -]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, '.', '-' and '_'")
    return text


def _scenarios(text: str) -> list[str]:
    names = set(text.split(","))
    if unknown := names - set(SCENARIOS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected {','.join(SCENARIOS)}")
    return [name for name in SCENARIOS if name in names]


def run(options: argparse.Namespace) -> None:
    """Measure; write `NAME.json`, `NAME.csv`, the page and its plots; print the findings.

    Raises:
        MeasureError: nothing can be measured, or a reply of our model was wrong.
    """
    if not options.target and not options.local:
        raise MeasureError("nothing to load: give --local cpu, --local gpu or --target NAME=grpc://HOST:PORT")
    begun = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out).close()  # fail before minutes of load if it cannot be written
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        session = Session(options, Path(folder))
        try:
            session.prepare(stack)
            session.measure()
        except KeyboardInterrupt:
            if not session.rows:
                raise
            session.interrupted = True
            print("interrupted: the report has the figures so far", file=sys.stderr)
        result = session.result(time.monotonic() - begun)
    name = options.name or f"{result['date'][:10]}-{'-'.join(server.name for server in session.servers)}-load"
    paths = [options.out / f"{name}.json", options.out / f"{name}.csv"]
    figures.save(result, paths[0])
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *session.raw])
    paths += figures.write([figures.read(paths[0])], options.out, name)
    print(f"\n{figures.summary(figures.Results.of([result]))}\n\n" + "\n".join(map(str, paths)))
    if wrong := sum(row.get("wrong", 0) for row in result["rows"] if row["contender"] == OURS):
        raise MeasureError(f"{wrong} replies were WRONG: see {paths[0]}")


@dataclass
class Turn:
    """A contender at a level.

    Attributes:
        name: of its server in the report.
        contender: its name in the report.
        model: its name on the server.
        server: to load; in the open loop perhaps not the usual one.
        rate: clips per second that arrive, in the open loop.
        rounds: the measurements.
        failed: why there are none, or no more.
    """

    name: str
    contender: str
    model: str
    server: Server
    rate: float | None = None
    rounds: list[Round] = field(default_factory=list)
    failed: str = ""


class Session:
    """A run: its servers, clips and figures."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.timing = Timing(options.seconds, options.warm_up, options.processes)
        self.servers: list[Server] = []
        self.local: Local | None = None
        self.rows: list[dict[str, Any]] = []
        self.raw: list[list[Any]] = []
        self.agreement: list[dict[str, Any]] = []
        self.interrupted = False
        names = options.scenario
        if "arrivals" in names and "mixed" not in names and not options.capacity:
            names = ["mixed", *names]  # its throughput is the capacity
        every = [level for scenario in names for level in scenarios.levels(scenario)]
        self.levels = [level for level in every if (level.users or 0) <= options.max_clients]
        if not self.levels:
            raise MeasureError(f"no level of {','.join(names)} has at most {options.max_clients} clients")
        batches: dict[float | None, int] = {}
        for level in self.levels:
            batches[level.seconds] = max(level.batch, batches.get(level.seconds, 1))
        self.clips = {  # by length in seconds, None is the mix
            seconds: speech(scenarios.lengths(seconds, batch), seed=number)
            for number, (seconds, batch) in enumerate(batches.items())
        }
        self._about: dict[str, dict[str, Any]] = {}  # by server

    def prepare(self, stack: ExitStack) -> None:
        """Reach or start every server, and write the clips for each with the expected embeddings."""
        options = self.options
        for name, url in options.target:
            self.servers.append(reach(name, url, options.model or MODEL, dict(options.metrics).get(name, "")))
        if options.local:
            self.local = Local(options, self.folder, stack)
            self.servers += self.local.servers
        names = [server.name for server in self.servers]
        if not names and self.local:
            raise MeasureError("; ".join(f"{name}: {why}" for name, why in self.local.missing.items()))
        if len(set(names)) < len(names):
            raise MeasureError(f"two servers have one name: {', '.join(names)}")
        loaded = self.local.checkpoint if self.local else None
        for server in self.servers:
            self._about[server.name] = server.describe(loaded.sha256 if loaded and server.local else None)
        self._expect()

    def _bound(self, server: str, model: str) -> float:
        """Largest relative L2 error of a right embedding."""
        about = self._about[server]["models"][model]
        if about["contender"] == PADDED:  # padding changes embeddings
            return math.inf
        return MAX_ERROR["fp16" if about["precision"] == "fp16" else "fp32"]

    def _expect(self) -> None:
        """Compare the servers' replies to each clip alone, and write the expected embeddings."""
        every = [clip for deck in self.clips.values() for clip in deck]
        reference = None
        known: list[tuple[str, Array, float]] = []  # the first is what the others are compared with
        if self.local and self.local.servers:
            print("SpeechBrain's embeddings of the clips ...", flush=True)
            reference = self.local.reference(every)
            known.append(("SpeechBrain", reference, 0.0))
        for server in self.servers:
            model = server.models[OURS]
            name, bound = f"{server.name}/{model}", self._bound(server.name, model)
            print(f"{name}: each clip alone ...", flush=True)
            try:
                alone = first_replies(server.url, model, every)
            except (CallFailed, Rejected, WrongReply) as error:
                raise MeasureError(f"server {server.name}: {model} does not embed a clip: {error}") from error
            if known:
                other, expected, other_bound = known[0]
                if alone.shape != expected.shape:
                    sizes = f"{alone.shape[1]} dimensions, {other} of {expected.shape[1]}"
                    raise MeasureError(f"{name} has embeddings of {sizes}: load servers of one model")
                agreed = {"clips": len(alone), **compare(alone, expected), "bound": max(bound, other_bound)}
                self.agreement.append({"a": name, "b": other, **agreed})
            known.append((name, alone, bound))
            right = reference if server.local and reference is not None else alone
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
        rounds = {level: max(level.rounds, self.options.rounds) for level in self.levels}
        every = [(server, name) for server in self.servers for name in server.models]
        pairs = {level: [one for one in every if one[1] == OURS or not level.alone] for level in self.levels}
        total = sum(rounds[level] * len(pairs[level]) for level in self.levels)
        done, begun = 0, time.monotonic()
        for level in self.levels:
            with ExitStack() as stack:
                turns = [self._turn(level, server, name, stack) for server, name in pairs[level]]
                try:
                    for number in range(rounds[level]):
                        first = number % len(turns)  # no contender always follows the same other
                        for turn in turns[first:] + turns[:first]:
                            text = self._take(level, turn)
                            done += 1
                            left = (time.monotonic() - begun) / done * (total - done) / 60
                            about = f"{turn.name}, {turn.contender}: {level}: {text}"
                            print(f"[{done:3d}/{total}, {left:.0f} min left] {about}", flush=True)
                finally:  # also the figures before Ctrl-C
                    for turn in turns:
                        self._add(level, turn)

    def _turn(self, level: Level, server: Server, contender: str, stack: ExitStack) -> Turn:
        """A contender at a level; `stack` stops a server that the level needs."""
        turn = Turn(server.name, contender, server.models[contender], server)
        most = self._about[server.name]["models"][turn.model]["max_batch"]
        if level.batch > most:
            turn.failed = f"{level.batch} clips in a request, its config takes {most}"
        if level.share is not None:
            mixed = [
                r for r in self.rows if (r["server"], r["contender"], r["scenario"]) == (server.name, OURS, "mixed")
            ]
            capacity = self.options.capacity or (mixed[0].get("clips_per_s") if mixed else None)
            if not capacity:
                turn.failed = "mixed has no throughput to take shares of"
                return turn
            turn.rate = capacity * level.share
            if self.local and server.local:
                try:
                    turn.server = stack.enter_context(self.local.open_loop(server, capacity))
                except MeasureError as error:
                    turn.failed = str(error)
        return turn

    def _take(self, level: Level, turn: Turn) -> str:
        """Measure a contender once; the figures in a line."""
        if not turn.failed:
            bound, deck = self._bound(turn.name, turn.model), self._deck(turn.name, level.seconds)
            try:
                found = load.drive(level, turn.server, turn.model, bound, deck, self.timing, turn.rate or 0.0)
            except MeasureError as error:  # costs the rows of this server only
                turn.failed = str(error)
            else:
                turn.rounds.append(found)
                row = load.measured(level, [found])
                p95 = f"p95 {row['p95_ms']:,.0f} ms, " if row["p95_ms"] is not None else ""
                failed = sum(row["errors"].values())
                return f"{row['clips_per_s']:.1f} clips/s, {p95}{row['rejected']} rejected, {failed} failed, " + (
                    f"{row['wrong']} WRONG" if row["wrong"] else "0 wrong"
                )
        return turn.failed

    def _add(self, level: Level, turn: Turn) -> None:
        """Keep the figures of a contender at a level, and the requests themselves."""
        about = {"server": turn.name, "contender": turn.contender, "model": turn.model, **asdict(level)}
        del about["rounds"]
        row = about | {"offered": turn.rate, "max_requests": turn.server.max_requests}
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
                self.raw.append([turn.name, turn.contender, str(level), number, *times, *sizes, sent.result])

    def result(self, took: float) -> dict[str, Any]:
        """The result, as `python -m loadtest report` reads it."""
        checkpoint = self.local.checkpoint if self.local else None
        decks = ", ".join(f"{len(d)} of {'the mix' if s is None else f'{s:g} s'}" for s, d in self.clips.items())
        return {
            "kind": figures.KIND,
            **machine.describe(
                machine.installed(*PACKAGES, "speechbrain", "numpy"),
                commit=machine.commit(),
                command=shlex.join(["python", "-m", "loadtest", *self.options.words]),
                took_s=round(took, 1),
                interrupted=self.interrupted,
            ),
            "conditions": {
                "source": checkpoint.source if checkpoint else None,
                "references": "SpeechBrain" if self.local and self.local.servers else "first replies",
                "clips": f"{decks}; speech of samples/ under faint noise",
                "mix": {f"{seconds:g}": number for seconds, number in scenarios.MIX.items()},
                "warm_up_s": self.timing.warm_up,
                "processes": self.timing.processes,
                "bound": MAX_ERROR,
            },
            "servers": list(self._about.values()),
            "missing": self.local.missing if self.local else {},
            "rows": self.rows,
            "agreement": self.agreement,
        }
