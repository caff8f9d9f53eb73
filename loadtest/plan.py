"""How long a load test takes: known before it starts, and corrected as it goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from .load import LONG
from .scenarios import MIX, OURS, PADDED, Level

SETUP = 50.0  # s, to write the model and to start the servers of this machine
VERIFIED = 2  # times the audio of the clips that the verification of an export embeds
OPEN_LOOP = 6.0  # s, to start a server with the limit of an open loop
LOCUST = 2.2  # s, for Locust to start and to end
WORK = 2.3e9  # multiply-accumulates for a second of audio at the published size, with all that is done beside them
MINI = 5  # times as fast as the published size
GPU = 1000.0  # s of audio/s; any large number does: speed counts at the end of a measurement only
BASELINE = 0.6  # speed of SpeechBrain where ours is 1
PADDING = 4  # times as slow are batches padded to the longest clip of the mix
MOST = 128  # requests in flight, the limit of a server on a CPU
MEAN = sum(seconds * number for seconds, number in MIX.items()) / sum(MIX.values())  # s, of a clip of the mix


def cpu_speed() -> float:
    """Seconds of audio per second that the published size embeds on this CPU, judged by matrix products."""
    square = np.ones((1024, 1024), np.float32)
    begun, products, passed = time.perf_counter(), 0, 0.0
    while passed < 0.5:
        square @ square
        products, passed = products + 1, time.perf_counter() - begun
    return products * 1024**3 / passed / WORK


class Loaded(NamedTuple):
    """A contender on a server."""

    server: str
    contender: str
    speed: float  # s of audio per second, of our model there
    local: bool  # the server is started here


class Plan:
    """The measurements of a run and the seconds that each takes."""

    def __init__(
        self, levels: Sequence[Level], contenders: Sequence[Loaded], *, seconds: float, warm_up: float, rounds: int
    ) -> None:
        """Expect every level with every contender; the other arguments are those of `python -m loadtest run`."""
        self._expected = {
            (one.server, one.contender, level): _expect(level, one, seconds, warm_up)
            for level in levels
            for one in contenders
            if one.contender == OURS or not level.long
        }
        self._rounds = {level: max(level.rounds, rounds) for level in levels}
        self._done, self._passed, self._begun = 0, 0.0, 0.0

    @property
    def _number(self) -> int:
        return sum(self._rounds[level] for _, _, level in self._expected)

    @property
    def _seconds(self) -> float:
        return sum(self._rounds[level] * seconds for (_, _, level), seconds in self._expected.items())

    def describe(self, setup: float) -> str:
        """The expected time in all and of each scenario, in a line; `setup` is that of the seconds before the load."""
        scenarios: dict[str, float] = defaultdict(float)
        for (_, _, level), seconds in self._expected.items():
            scenarios[level.scenario] += self._rounds[level] * seconds
        parts = ", ".join(f"{name} {_text(seconds)}" for name, seconds in scenarios.items())
        return (
            f"this takes about {_text(setup + self._seconds)}: {_text(setup)} until the load starts, then "
            f"{self._number} measurements ({parts})"
        )

    def begin(self, servers: Collection[str]) -> None:
        """The load starts, on these servers only."""
        self._expected = {key: seconds for key, seconds in self._expected.items() if key[0] in servers}
        self._begun = time.monotonic()

    def advance(self, server: str, contender: str, level: Level) -> str:
        """A measurement is done; the progress, with the time left by the pace so far."""
        self._done += 1
        self._passed += self._expected[server, contender, level]
        left = (self._seconds - self._passed) * (time.monotonic() - self._begun) / self._passed
        return f"[{self._done}/{self._number}, {_text(max(0.0, left))} left]"


def setup(audio: float, speed: float, local: bool) -> float:
    """Seconds until the load starts.

    Args:
        audio: seconds of all clips together.
        speed: seconds of audio per second of our model on the CPU.
        local: a model is exported and served here, and SpeechBrain embeds the clips too.
    """
    return SETUP + (1 + VERIFIED) * audio * (1 + 1 / BASELINE) / speed if local else audio / speed


def _expect(level: Level, one: Loaded, seconds: float, warm_up: float) -> float:
    """Seconds of a measurement, from the start of Locust to the last reply."""
    expected = LOCUST + warm_up + seconds * (LONG if level.long else 1)
    if level.users is None:  # at most a second of work is in flight at the end
        return expected + 1 + OPEN_LOOP * one.local
    speed = one.speed * (1 if one.contender == OURS else BASELINE)
    if one.contender == PADDED and level.seconds is None:
        speed /= PADDING
    return expected + min(level.users, MOST) * level.batch * (level.seconds or MEAN) / speed


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
