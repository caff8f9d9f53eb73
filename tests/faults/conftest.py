"""Fixtures of the fault tests: the pool of clips, the tally, servers that no test kills, and the summary."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtest.clips import speech
from server import Limits, TritonServer, gateway
from tests.faults.hostile import Hostile, requests
from tests.faults.judge import Clip, Tally, Urls, check_apart

from .harness import INSTALLED, LIMIT_MB, SECOND, Gate, assert_right, serving_with

SUMMARY = pytest.StashKey[Tally]()
LENGTHS = [640, 641, 1599, 1600, 5000, 7999, 8000, 16001, 33333, 48000, 80000, 160000]  # samples
SAME_LENGTH = 8  # clips of exactly one second, which no length tells apart


@pytest.fixture(scope="package", autouse=True)
def logs_go_with_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server that was killed leaves its log."""
    folder = str(tmp_path_factory.mktemp("logs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session")
def pool(reference: Callable[[np.ndarray], np.ndarray]) -> list[Clip]:
    """Good clips, each with SpeechBrain's embedding of it alone."""
    lengths = [*LENGTHS, *[SECOND] * SAME_LENGTH]
    waveforms = speech([samples / SECOND for samples in lengths])
    pool = [Clip(f"clip {n} of {len(clip)} samples", clip, reference(clip)) for n, clip in enumerate(waveforms)]
    check_apart(pool)
    return pool


@pytest.fixture(scope="session")
def short(pool: list[Clip]) -> list[Clip]:
    """Clips of at most a second."""
    return [clip for clip in pool if len(clip.waveform) <= SECOND]


@pytest.fixture(scope="session")
def tiny(short: list[Clip]) -> list[Clip]:
    """Clips of less than a second."""
    return [clip for clip in short if len(clip.waveform) < SECOND]


@pytest.fixture(scope="session")
def whole_run(request: pytest.FixtureRequest, pool: list[Clip]) -> Tally:
    request.config.stash[SUMMARY] = tally = Tally(pool)
    return tally


@pytest.fixture
def tally(whole_run: Tally) -> Iterator[Tally]:
    """Judges every reply; a wrong one fails the test that got it."""
    before = len(whole_run.wrong)
    yield whole_run
    assert whole_run.wrong[before:] == []


@pytest.fixture
def repository_copy(repository: Path, tmp_path: Path) -> Path:
    """The model repository, to be changed at will."""
    return Path(shutil.copytree(repository, tmp_path / "model_repository"))


@pytest.fixture(scope="session")
def served(repository: Path) -> Iterator[Urls]:
    """The server that no test kills, with the shipped config for a CPU."""
    with TritonServer(repository, device="cpu") as server:
        yield Urls.of(server)


@pytest.fixture(scope="session")
def hostile(reference: Callable[[np.ndarray], np.ndarray]) -> dict[str, Hostile]:
    return requests(reference)


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    if INSTALLED:
        pytest.skip("this Triton has its own backend, which cannot be held")
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="session")
def held(repository: Path, gate: Gate) -> Iterator[Urls]:
    """Like `served`, but the model waits while `gate.hold()` lasts."""
    with serving_with(gate.backends), TritonServer(repository, device="cpu") as server:
        yield Urls.of(server)


@pytest.fixture(scope="session")
def limited(repository: Path, gate: Gate) -> Iterator[Urls]:
    """Like `held`, with nginx in front."""
    if gateway.find() is None:
        pytest.skip("nginx, which sets the limits, is not installed")
    limits = Limits(requests=None, request_mb=LIMIT_MB)
    with serving_with(gate.backends), TritonServer(repository, device="cpu", limits=limits) as server:
        yield Urls.of(server)


@pytest.fixture
def still_right(served: Urls, short: list[Clip], tally: Tally) -> Iterator[None]:
    """Whatever the test did to the shared server: its queue drains, and replies are right."""
    yield
    assert_right(served, short[::7], tally)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tally = terminalreporter.config.stash.get(SUMMARY, None)
    if tally is not None:
        terminalreporter.section("replies under faults")
        terminalreporter.write_line(str(tally))
