"""The contenders and scenarios of the load tests. To add a scenario, add it to SCENARIOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Contenders: our model, by its usual name on a server, and the baselines, by the names of their models.
OURS, MODEL = "packed", "ecapa"
BASELINES = ("speechbrain", "speechbrain_padded")
PADDED = BASELINES[1]

# Length in seconds to number of clips in twenty: commands, sentences, a few monologues; mean 5.35 s.
MIX: dict[float, int] = {1: 3, 2: 4, 3: 4, 5: 3, 7: 2, 10: 2, 15: 1, 20: 1}
MIXED_USERS = 16
RAMP_USERS = 64
REPEATED = 3  # rounds, at least, of the levels that summaries quote


@dataclass(frozen=True)
class Level:
    """One measurement of a scenario."""

    scenario: str
    seconds: float | None  # length of each clip; None is the mix
    batch: int = 1  # clips in a request
    users: int | None = 1  # clients, each sends its next request after the last reply; None in an open loop
    share: float | None = None  # of the capacity that arrives, in an open loop
    rounds: int = 1  # repetitions, at least
    long: bool = False  # our model is measured without the baselines, four times as long

    def __str__(self) -> str:
        clips = "mix" if self.seconds is None else f"{self.seconds:g} s"
        if self.batch > 1:
            clips = f"{self.batch} x {clips}"
        if self.share is not None:
            return f"{self.scenario}, {clips}, {self.share:.0%} of the capacity"
        return f"{self.scenario}, {clips}, {self.users} client{'s' * (self.users != 1)}"


class Scenario(NamedTuple):
    """What clients do, in words, and the levels at which it is measured."""

    text: str
    levels: Sequence[Level]


SCENARIOS = {
    "single": Scenario(
        "one client, one clip per request",
        [Level("single", seconds, rounds=REPEATED if seconds == 5 else 1) for seconds in (1.0, 5.0, 10.0)],
    ),
    "batch": Scenario(
        "one client, several clips of one length per request [n, samples]",
        [Level("batch", 2.0, batch) for batch in (1, 8, 16, 32)],
    ),
    "mixed": Scenario(
        f"{MIXED_USERS} clients, clips of {min(MIX):g} to {max(MIX):g} s",
        [Level("mixed", None, users=MIXED_USERS, rounds=REPEATED)],
    ),
    "clients": Scenario(
        "more and more clients, clips of one length",
        [Level("clients", 2.0, users=users) for users in (1, 4, 16, 64, 200)],
    ),
    "arrivals": Scenario(
        "clips of the mix at a constant rate, independent of replies (open loop)",
        [Level("arrivals", None, users=None, share=share, long=True) for share in (0.5, 0.8, 0.95, 1.2)],
    ),
    "ramp": Scenario(
        f"clips of the mix, from 1 to {RAMP_USERS} clients",
        [Level("ramp", None, users=RAMP_USERS, long=True)],
    ),
}


def lengths(seconds: float | None, batch: int = 1) -> Sequence[float]:
    """Seconds of each clip that clients draw from: the mix, or enough clips of one length to fill requests."""
    if seconds is None:
        return [length for length, count in MIX.items() for _ in range(count)]
    return [seconds] * max(batch, 8)
