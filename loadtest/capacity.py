"""How many replicas a number of clips a day needs, from the speed that a load test measured."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from . import load_report as report

Row = dict[str, Any]

DAY = 86_400  # s
BYTES = 4 * 16_000  # of a second of audio in a request: float32 at 16 kHz
SPARE = 1  # replica, for one that fails or is being replaced


@dataclass(frozen=True)
class Demand:
    """What clients send.

    Attributes:
        clips: A day.
        seconds: Of a clip, in the mean.
        peak: How many times the day's mean the busiest minutes have.
    """

    clips: float
    seconds: float
    peak: float

    @property
    def clips_per_s(self) -> float:
        """At the peak."""
        return self.clips * self.peak / DAY

    @property
    def audio_per_s(self) -> float:
        """Seconds of audio that arrive in a second, at the peak."""
        return self.clips_per_s * self.seconds


def replicas(demand: Demand, speed: float, utilization: float) -> int:
    """How many replicas keep to a utilization at the peak, without the spare one.

    Args:
        demand: What clients send.
        speed: Seconds of audio that one replica embeds in a second.
        utilization: Share of that which the peak may take.
    """
    return math.ceil(demand.audio_per_s / (speed * utilization))


def run(options: argparse.Namespace) -> None:
    """Print what was measured and what follows from it.

    Raises:
        ReportError: the result has no such measurement.
    """
    result = report.read(options.result)
    demand = Demand(options.clips_per_day, options.mean_seconds, options.peak_factor)
    print(
        f"At the peak {demand.clips_per_s:,.1f} clips/s arrive: {demand.audio_per_s:,.0f} s of audio/s, "
        f"{demand.audio_per_s * BYTES / 1e6:,.0f} MB/s."
    )
    speeds = {row["target"]: row for row in _ours(result, "mixed")}
    if not speeds:
        raise report.ReportError(f"{options.result}: the scenario mixed was not measured: run it")
    for target, row in speeds.items():
        speed = row["audio_per_s"]
        if not (speed and math.isfinite(speed)):
            raise report.ReportError(
                f"{options.result}: {target} embedded nothing in the scenario mixed: run it longer"
            )
        needed = replicas(demand, speed, options.utilization)
        print(
            f"{target}: {needed} replicas at {options.utilization:.0%} of {speed:.1f} s of audio/s each, "
            f"and {SPARE} to spare: {needed + SPARE}."
        )
        for level in _ours(result, "arrivals"):
            if level["target"] == target and level["queue_ms"] is not None:
                print(f"{target} at {_level(level, speed)}")


def _ours(result: Row, scenario: str) -> list[Row]:
    return [row for row in result["rows"] if row["contender"] == "ours" and row["scenario"] == scenario]


def _level(row: Row, speed: float) -> str:
    in_work = row["clips_per_s"] * (row["queue_ms"] + row["compute_ms"]) / 1000  # Little's law
    return (
        f"{row['audio_per_s'] / speed:.0%}: p50 {row['p50_ms']:,.0f} ms, p95 {row['p95_ms']:,.0f} ms, "
        f"mean time in the queue {row['queue_ms']:.0f} ms, {in_work:.1f} requests in work, "
        f"{row['refused']} of {row['requests'] + row['refused']} refused"
    )
