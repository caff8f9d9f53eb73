"""The expected time of a load test, against one that was measured."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from loadtest import plan
from loadtest.plan import Loaded, Plan
from loadtest.scenarios import BASELINES, OURS, SCENARIOS, Level

LEVELS = [level for scenario in SCENARIOS.values() for level in scenario.levels]
SECONDS = {"s": 1, "min": 60}


def read(text: str) -> list[float]:
    """The times in a text, in seconds."""
    return [float(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+) (s|min)\b", text)]


def make_plan(*contenders: str, speed: float = 30.0, rounds: int = 1, levels: list[Level] = LEVELS) -> Plan:
    loaded = [Loaded("cpu", one, speed, True) for one in contenders]
    return Plan(levels, loaded, seconds=3.0, warm_up=0.4, rounds=rounds)


def test_the_estimate_is_that_of_a_run_that_was_measured() -> None:
    result = json.loads((ROOT / "loadtest/results/2026-11-23-cpu-load.json").read_text())
    (speed,) = (r["audio_per_s"] for r in result["rows"] if (r["scenario"], r["contender"]) == ("mixed", OURS))
    whole, before, *scenarios = read(make_plan(OURS, *BASELINES, speed=speed).describe(60.0))
    assert whole == pytest.approx(result["took_s"], rel=1 / 3) and before == 60
    assert len(scenarios) == len(SCENARIOS) and sum(scenarios) + before == pytest.approx(whole, rel=0.1)


def test_the_time_left_counts_every_round_of_every_contender() -> None:
    levels = [Level("single", 1.0, rounds=3), Level("ramp", None, users=64, long=True)]
    found = make_plan(OURS, *BASELINES, levels=levels)
    assert " 10 measurements" in found.describe(0.0)  # three rounds of three contenders, the ramp of ours alone
    assert " 16 measurements" in make_plan(OURS, *BASELINES, levels=levels, rounds=4).describe(0.0)
    found.begin(["cpu"])
    lines = [found.advance("cpu", one, levels[0]) for one in (OURS, *BASELINES) for _ in range(3)]
    lines.append(found.advance("cpu", OURS, levels[1]))
    assert [line.partition(",")[0] for line in lines] == [f"[{n}/10" for n in range(1, 11)]
    assert read(lines[-1]) == [0]


def test_a_server_that_did_not_start_takes_no_time() -> None:
    loaded = [Loaded(name, OURS, 30.0, True) for name in ("cpu", "gpu")]
    found = Plan(LEVELS[:1], loaded, seconds=3.0, warm_up=0.4, rounds=1)
    found.begin(["cpu"])
    assert found.advance("cpu", OURS, LEVELS[0]) == "[1/1, 0 s left]"


def test_a_slow_machine_takes_longer() -> None:
    slow, fast = (read(make_plan(OURS, *BASELINES, speed=speed).describe(0.0))[0] for speed in (10.0, 100.0))
    assert slow > fast > 56 * 3
    assert plan.setup(300.0, 10.0, local=True) > plan.setup(300.0, 100.0, local=True) > plan.setup(300.0, 100.0, False)
    assert plan.cpu_speed() > 0
