"""The promise, on a real tritonserver: a clip gets SpeechBrain's embedding of it alone, whatever shares its batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from launcher import batches, new_batches
from tritonclient.grpc import InferenceServerClient, InferInput

from export.verify import difference
from server import TritonServer
from server.wheel import find_installed

Reference = Callable[[np.ndarray], np.ndarray]
LENGTHS = [640, 5000, 16000, 33333, 48000, 80000]  # samples


@pytest.fixture(params=["ecapa", "ecapa_torchscript"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def triton(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as client:
        yield client


def ask(triton: InferenceServerClient, model: str, waveform: np.ndarray) -> np.ndarray:
    """The raw protocol: waveform [n, samples] to embedding [n, 192]."""
    tensor = InferInput("waveform", list(waveform.shape), "FP32")
    tensor.set_data_from_numpy(waveform)
    return np.asarray(triton.infer(model, [tensor], client_timeout=60).as_numpy("embedding"))


def ask_together(server: TritonServer, model: str, clips: list[np.ndarray]) -> list[np.ndarray]:
    """The embeddings [192] of clips that as many clients send at once."""

    def send(clip: np.ndarray) -> np.ndarray:
        with InferenceServerClient(server.grpc_url) as client:
            return ask(client, model, clip[None])[0]

    with ThreadPoolExecutor(len(clips)) as pool:
        return list(pool.map(send, clips))


def noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * 0.1


def test_requests_of_six_lengths_share_batches_and_are_each_as_alone(
    server: TritonServer, triton: InferenceServerClient, model: str, reference: Reference
) -> None:
    clips = [noise(LENGTHS[i % 6], i) for i in range(24)]
    before = batches(triton, model)
    rows = ask_together(server, model, clips)
    sizes = new_batches(triton, model, before, 24)
    preferred = triton.get_model_config(model).config.dynamic_batching.preferred_batch_size
    assert sizes.total() < 24 and (not preferred or max(sizes) <= max(preferred))
    for clip, row in zip(clips, rows, strict=True):
        error, cosine = difference(row, reference(clip))
        assert error < 1e-4 and cosine > 0.99999


def test_a_request_with_several_clips(triton: InferenceServerClient, model: str, reference: Reference) -> None:
    """As many as the config allows, in one batch."""
    most = triton.get_model_config(model).config.max_batch_size
    clips = np.stack([noise(8000, seed) for seed in range(most)])
    before = batches(triton, model)
    for clip, row in zip(clips, ask(triton, model, clips), strict=True):
        assert difference(row, reference(clip))[0] < 1e-4
    assert new_batches(triton, model, before, most) == {most: 1}


BAD = {
    "empty": np.zeros(0, np.float32),
    "one sample": noise(1, 0),
    "639 samples": noise(639, 0),
    "NaN": np.full(5000, np.nan, np.float32),
    "Inf": np.full(5000, np.inf, np.float32),
    "1e30": np.full(5000, 1e30, np.float32),
    "a minute": noise(60 * 16000, 0),
}


@pytest.mark.parametrize("bad", BAD)
def test_hostile_neighbours(server: TritonServer, model: str, reference: Reference, bad: str) -> None:
    """A neighbour gets the right embedding; with a C++ backend, NaN behind an empty request, never a wrong one."""
    good = [noise(LENGTHS[i % 5], 100 + i) for i in range(6)]
    clips = [clip for pair in zip(good, [BAD[bad]] * 6, strict=True) for clip in pair] * 2
    right = 0
    for clip, row in zip(clips, ask_together(server, model, clips), strict=True):
        if clip is not BAD[bad]:
            if bad == "empty" and find_installed() is not None and np.isnan(row).all():
                continue  # Triton's C++ backend does not put the empty clip last
            assert difference(row, reference(clip))[0] < 1e-4
            right += 1
        elif bad == "a minute":
            assert difference(row, reference(clip[: 30 * 16000]))[0] < 1e-4
        else:
            assert np.isnan(row).all()
    assert right == 12 if bad != "empty" or find_installed() is None else right >= 1


def test_the_demo(repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--repository", str(repository)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "15 of 15 right" in run.stdout
