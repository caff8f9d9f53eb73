"""Many clips in one call: order, limits of memory and of requests in flight, and errors among them."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from clients import OTHER, SECOND, Make, meanwhile, noise
from ecapa_triton import AsyncSpeakerClient, SpeakerClient, Utterance, errors
from fake_triton import MODEL, FakeTriton, fingerprint, good, held, refuse


def test_utterances(fake: FakeTriton, client: SpeakerClient) -> None:
    one, error, long = client.utterances([noise(1), b"no audio", noise(31)], long="truncate")
    assert isinstance(one, Utterance) and isinstance(long, Utterance) and isinstance(error, errors.NotAudioError)
    assert (one.seconds, one.model, one.threshold) == (1, MODEL, 0.45)
    assert long.seconds == 30 and long.embedding[0] == 30 * SECOND
    np.testing.assert_array_equal(client.utterance(noise(1)).embedding, one.embedding)


@pytest.mark.parametrize("return_exceptions", [False, True])
def test_embeddings_of_two_models_are_not_returned_together(
    fake: FakeTriton, client: SpeakerClient, return_exceptions: bool
) -> None:
    models = iter([MODEL] * 3)
    fake.model = lambda fake: next(models, OTHER)
    with pytest.raises(errors.ModelMismatchError) as caught:
        client.embed_many([noise(0.1, i) for i in range(6)], return_exceptions=return_exceptions)
    assert MODEL in str(caught.value) and OTHER in str(caught.value)


@pytest.mark.parametrize(("seconds", "kind"), [(31, errors.TooLongError), (29, errors.RejectedError)])
def test_errors_hold_no_clips(
    fake: FakeTriton, client: SpeakerClient, seconds: int, kind: type[errors.EcapaError]
) -> None:
    client.embed(noise(1))
    fake.otherwise = refuse(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape")
    tracemalloc.start()
    try:
        outcomes = list(client.utterances(noise(seconds, i) for i in range(20)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(outcome, kind) for outcome in outcomes)
    assert held < seconds * SECOND * 4 * 3  # bytes of a few of the clips


def test_an_asynchronous_generator_of_clips(fake: FakeTriton) -> None:
    async def clips() -> AsyncIterator[np.ndarray]:
        for i in range(20):
            await asyncio.sleep(0)
            yield noise(0.1, i)

    async def embed() -> list[np.ndarray]:
        async with AsyncSpeakerClient(fake.url) as client:
            return await client.embed_many(clips())

    np.testing.assert_array_equal(asyncio.run(embed()), [fingerprint(noise(0.1, i)) for i in range(20)])


def test_embed_many_keeps_the_order(fake: FakeTriton, client: SpeakerClient) -> None:
    def last_first(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
        fake.wait_until(lambda fake: len(fake.lengths) >= 8)
        if len(waveform) == 1600:  # the first clip
            fake.wait_until(lambda fake: fake.busy == 1)
        return good(fake, waveform)

    fake.answers = [last_first] * 8
    clips = [noise(0.1 + 0.05 * (i % 7), seed=i) for i in range(40)]
    clips[7] = noise(2)
    embeddings = client.embed_many(iter(clips))
    np.testing.assert_array_equal(np.stack(embeddings), np.stack([fingerprint(clip) for clip in clips]))


def test_clips_in_flight_and_drawn_ahead_are_bounded(make: Make, fake: FakeTriton) -> None:
    client, drawn, ahead, done = make(fake.url, max_in_flight=4), 0, 0, 0
    fake.otherwise = lambda fake, waveform: (good if len(waveform) == 2 * SECOND else held)(fake, waveform)

    def clips() -> Iterator[np.ndarray]:
        nonlocal drawn, ahead
        for i in range(40):
            drawn += 1
            ahead = max(ahead, drawn - done)
            yield noise(0.1, i)

    def look() -> None:
        try:
            fake.wait_until(lambda fake: fake.busy == 4)
            while drawn < 9:
                time.sleep(0.01)
            client.embed(noise(2))  # would arrive after any further request of the other call
            assert len(fake.lengths) == 4 + 1
        finally:
            fake.gate.set()

    with meanwhile(look):
        for _ in client.utterances(clips()):
            done += 1
    assert done == 40 and ahead <= 2 * 4 + 1


def test_outcomes_do_not_wait_for_the_last_clip(fake: FakeTriton, make: Make) -> None:
    seen: list[object] = []

    def clips() -> Iterator[np.ndarray]:
        for i in itertools.takewhile(lambda _: not seen, itertools.count()):
            yield noise(0.1, i)
            time.sleep(0.01)

    for outcome in make(fake.url, max_in_flight=10_000).utterances(clips()):
        seen.append(outcome)
    assert all(isinstance(outcome, Utterance) for outcome in seen)


def test_one_bad_clip_does_not_lose_the_others(fake: FakeTriton, client: SpeakerClient) -> None:
    clips = [noise(1), b"no audio", noise(31), "/none.wav", noise(0), noise(2)]
    outcomes = client.embed_many(clips, return_exceptions=True)
    kinds = [type(outcome) for outcome in outcomes]
    long, short = errors.TooLongError, errors.TooShortError
    assert kinds == [np.ndarray, errors.NotAudioError, long, errors.AudioFileError, short, np.ndarray]
    sent = fake.lengths.count(2 * SECOND)
    with pytest.raises(errors.NotAudioError):  # the first, when all are done
        client.embed_many(clips)
    assert fake.lengths.count(2 * SECOND) == sent + 1


def test_embed_many_of_nothing_and_of_a_single_clip(client: SpeakerClient) -> None:
    assert client.embed_many([]) == []
    for single in (
        "clip.wav",
        b"RIFF",
        bytearray(b"RIFF"),
        Path("clip.wav"),
        noise(1),
        io.BytesIO(b"RIFF"),
        torch.zeros(9),
    ):
        with pytest.raises(TypeError, match=type(single).__name__):
            client.embed_many(single)


def test_an_error_of_the_callers_generator_is_raised(fake: FakeTriton, client: SpeakerClient) -> None:
    def clips() -> Iterator[np.ndarray]:
        yield noise(0.1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.embed_many(clips())


def test_threads_get_their_own_replies(client: SpeakerClient) -> None:
    clips = [noise(0.05, seed=i) for i in range(200)]
    with ThreadPoolExecutor(16) as pool:
        embeddings = list(pool.map(client.embed, clips))
    np.testing.assert_array_equal(np.stack(embeddings), np.stack([fingerprint(clip) for clip in clips]))
