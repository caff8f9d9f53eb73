"""Helpers and fixtures of the client's tests: both clients behind one interface, and clips for them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ecapa_triton import AsyncSpeakerClient, SpeakerClient
from fake_triton import PATIENCE, FakeTriton, refuse

OVERLOAD = refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
OTHER = "f" * 24  # identity of another model
SECOND = 16_000
SAMPLE = Path(__file__).parents[1] / "samples/anna_1.flac"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * SECOND)).astype(np.float32)


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Continuous speech, crudely: pulses of gliding pitch through two moving formants, in syllables, and some noise."""
    rng = np.random.default_rng(seed)
    count = round(seconds * SECOND)
    time = np.arange(count) / SECOND

    def wander(low: float, high: float) -> np.ndarray:
        """A quantity with a new value every 0.15 s."""
        knots = rng.uniform(low, high, int(seconds / 0.15) + 3)
        return np.interp(time, 0.15 * np.arange(len(knots)), knots)

    pitch, formants = wander(90, 250), (wander(300, 800), wander(900, 2200))
    phase = np.cumsum(pitch) / SECOND + rng.uniform()
    sound = np.zeros(count)
    for harmonic in range(1, 25):
        gain = sum(np.exp(-(((harmonic * pitch - formant) / 200) ** 2)) for formant in formants) + 0.05
        sound += gain * np.sin(2 * np.pi * harmonic * phase)
    syllables = 0.05 + np.cos(np.pi * time / 0.2) ** 2
    return (0.1 * sound * syllables + 0.003 * rng.standard_normal(count)).astype(np.float32)


class Awaited:
    """`AsyncSpeakerClient` on an event loop in a thread, with the methods of `SpeakerClient`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = AsyncSpeakerClient(*args, **kwargs)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._loop.is_closed():
            self.close()
            self._wait(self._loop.shutdown_asyncgens())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            made = attribute(*args, **kwargs)
            return self._each(made) if isinstance(made, AsyncGenerator) else self._wait(made)

        return call

    def _wait(self, awaited: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    def _each(self, outcomes: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while True:
                yield self._wait(outcomes.__anext__())
        except StopAsyncIteration:
            pass
        finally:
            self._wait(outcomes.aclose())


Make = Callable[..., SpeakerClient]


@pytest.fixture(params=[SpeakerClient, Awaited], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes clients of either kind; they end with the test."""
    with contextlib.ExitStack() as made:
        yield lambda *args, **kwargs: made.enter_context(request.param(*args, **kwargs))


@pytest.fixture
def client(fake: FakeTriton, make: Make) -> SpeakerClient:
    return make(fake.url, timeout=PATIENCE)


@contextlib.contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Runs an action in another thread; its errors are raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
        done.result(PATIENCE)
