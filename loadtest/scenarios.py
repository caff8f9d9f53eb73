"""The contenders and scenarios of the load tests, and the levels of each scenario. To add a scenario, add it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Contenders: our model, by its usual name on a server, and the baselines, by the names of their models.
OURS, MODEL = "packed", "ecapa"
BASELINES = ("speechbrain", "speechbrain_padded")
PADDED = BASELINES[1]

SINGLE = (1.0, 5.0, 10.0)  # s
BATCH = (1, 8, 16, 32)  # clips in a request
CLIENTS = (1, 4, 16, 64, 200)
ARRIVALS = (0.5, 0.8, 0.95, 1.2)  # of the capacity
EQUAL = 2.0  # s, of each clip in `batch` and `clients`
# Length in seconds to number of clips in twenty: commands, sentences, a few monologues; mean 5.35 s.
MIX: dict[float, int] = {1: 3, 2: 4, 3: 4, 5: 3, 7: 2, 10: 2, 15: 1, 20: 1}
MIXED_USERS = 16
RAMP_USERS = 64
REPEATED = 3  # rounds, at least, of the levels that summaries quote

SCENARIOS = {
    "single": "one client, one clip per request",
    "batch": "one client, several clips of one length per request [n, samples]",
    "mixed": f"{MIXED_USERS} clients, clips of {min(MIX):g} to {max(MIX):g} s",
    "clients": "more and more clients, clips of one length",
    "arrivals": "clips of the mix at a constant rate, independent of replies (open loop)",
    "ramp": f"clips of the mix, from 1 to {RAMP_USERS} clients",
}
OPEN_LOOP = ("arrivals",)
MIXED = ("mixed", "arrivals", "ramp")  # clips of the mix


@dataclass(frozen=True)
class Level:
    """One measurement of a scenario.

    Attributes:
        scenario: one of SCENARIOS.
        seconds: length of each clip; None is the mix.
        batch: clips in a request.
        users: clients, each of which sends its next request after the last reply; None in an open loop.
        share: of the capacity that arrives, in an open loop.
        rounds: repetitions, at least.
    """

    scenario: str
    seconds: float | None
    batch: int = 1
    users: int | None = 1
    share: float | None = None
    rounds: int = 1

    @property
    def alone(self) -> bool:
        """Whether our model is measured alone, without the baselines."""
        return self.scenario in ("arrivals", "ramp")

    def __str__(self) -> str:
        clips = "mix" if self.seconds is None else f"{self.seconds:g} s"
        if self.batch > 1:
            clips = f"{self.batch} x {clips}"
        if self.share is not None:
            return f"{self.scenario}, {clips}, {self.share:.0%} of the capacity"
        return f"{self.scenario}, {clips}, {self.users} client{'s' * (self.users != 1)}"


def levels(scenario: str) -> list[Level]:
    """Every level of a scenario."""
    return {
        "single": [Level("single", seconds, rounds=REPEATED if seconds == 5 else 1) for seconds in SINGLE],
        "batch": [Level("batch", EQUAL, batch) for batch in BATCH],
        "mixed": [Level("mixed", None, users=MIXED_USERS, rounds=REPEATED)],
        "clients": [Level("clients", EQUAL, users=users) for users in CLIENTS],
        "arrivals": [Level("arrivals", None, users=None, share=share) for share in ARRIVALS],
        "ramp": [Level("ramp", None, users=RAMP_USERS)],
    }[scenario]


def lengths(seconds: float | None, batch: int = 1) -> Sequence[float]:
    """Seconds of each clip that clients draw from: the mix, or enough clips of one length to fill requests."""
    if seconds is None:
        return [length for length, count in MIX.items() for _ in range(count)]
    return [seconds] * max(batch, 8)
