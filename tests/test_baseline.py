"""The baselines on a real tritonserver: SpeechBrain's own embeddings, of a clip alone or of a padded batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from export import checkpoint, configs
from export.verify import clip_groups, difference
from loadtest import baseline
from loadtest.scenarios import BASELINES
from server import TritonServer
from server.preflight import check_repository

ALONE, PADDED = BASELINES
PAIRS = "pairs"  # the padded baseline with another batcher: it waits for a second request
SECOND = 16000  # samples


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("baselines")
    baseline.install(repository, "--source mini")
    shutil.copytree(repository / PADDED, repository / PAIRS)
    for path in configs.config_files(repository / PAIRS):
        config = configs.read(path)
        config.name = PAIRS
        config.dynamic_batching.preferred_batch_size[:] = [2]
        config.dynamic_batching.max_queue_delay_microseconds = 60_000_000
        path.write_text(text_format.MessageToString(config))
    with TritonServer(repository, device="cpu") as running:
        yield running


@pytest.fixture
def triton(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    """Two clips that end in the middle of speech, float32 `[samples]`."""
    first, second, *_ = clip_groups(640, 10 * SECOND, seed=0)["samples/"].values()
    return [first[SECOND // 2 :][:8000], second[SECOND // 2 :][:30000]]


def embed(triton: InferenceServerClient, model: str, waveform: np.ndarray) -> np.ndarray:
    """Waveform `[n, samples]` to embedding `[n, 192]`."""
    tensor = InferInput("waveform", list(waveform.shape), "FP32")
    tensor.set_data_from_numpy(waveform)
    return np.asarray(triton.infer(model, [tensor], client_timeout=120).as_numpy("embedding"))


def encode(mini: checkpoint.Checkpoint, clips: list[np.ndarray]) -> np.ndarray:
    """SpeechBrain's embeddings `[n, 192]` of clips in one batch, padded by its own convention."""
    longest = max(map(len, clips))
    batch = torch.from_numpy(np.stack([np.pad(clip, (0, longest - len(clip))) for clip in clips]))
    with torch.inference_mode():
        embeddings = mini.classifier.encode_batch(batch, torch.tensor([len(clip) / longest for clip in clips]))
    return np.asarray(embeddings[:, 0])


def noise(*shape: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(shape).standard_normal(shape)).astype(np.float32)


def embed_together(
    server: TritonServer, clips: list[np.ndarray]
) -> tuple[list[np.ndarray | InferenceServerException], int]:
    """The reply to each of two clips in requests of their own that share an execution; executions until then."""

    def send(clip: np.ndarray) -> np.ndarray | InferenceServerException:
        with InferenceServerClient(server.grpc_url) as own:
            try:
                return embed(own, PAIRS, clip[None])[0]
            except InferenceServerException as error:
                return error

    with InferenceServerClient(server.grpc_url) as triton:

        def counts() -> tuple[int, int]:
            (found,) = triton.get_inference_statistics(PAIRS).model_stats
            stats = found.inference_stats
            return stats.success.count + stats.fail.count, found.execution_count

        requests, executions = counts()
        with ThreadPoolExecutor(len(clips)) as pool:
            replies = list(pool.map(send, clips))
        deadline = time.monotonic() + 30  # Triton counts a request just after its reply
        while counts()[0] < requests + len(clips) and time.monotonic() < deadline:
            time.sleep(0.05)
        return replies, counts()[1] - executions


@pytest.mark.parametrize("model", BASELINES)
@pytest.mark.parametrize("shape", [(1, 640), (1, SECOND), (1, 33333), (1, 5 * SECOND), (3, 20001)])
def test_a_request_alone_is_speechbrain(
    triton: InferenceServerClient, mini: checkpoint.Checkpoint, model: str, shape: tuple[int, int]
) -> None:
    clips = noise(*shape)
    rows = embed(triton, model, clips)
    assert rows.shape == (shape[0], 192) and rows.dtype == np.float32
    for row, expected in zip(rows, encode(mini, list(clips)), strict=True):
        assert difference(row, expected)[0] < 1e-5


def test_requests_of_several_lengths_are_speechbrains_padded_batch(
    server: TritonServer, mini: checkpoint.Checkpoint, speech: list[np.ndarray]
) -> None:
    rows, executions = embed_together(server, speech)
    assert executions == 1
    for row, padded in zip(rows, encode(mini, speech), strict=True):
        assert isinstance(row, np.ndarray)
        assert difference(row, padded)[0] < 1e-5
    # And so it differs by far from the embedding of the short clip alone.
    assert difference(np.asarray(rows[0]), encode(mini, speech[:1])[0])[0] > 1e-3


@pytest.mark.parametrize("model", BASELINES)
@pytest.mark.parametrize("samples", [0, 1, 639])
def test_a_clip_that_speechbrain_cannot_embed_is_an_error(
    triton: InferenceServerClient, mini: checkpoint.Checkpoint, model: str, samples: int
) -> None:
    with pytest.raises(InferenceServerException):
        embed(triton, model, noise(1, samples))
    clip = noise(SECOND)
    assert difference(embed(triton, model, clip[None])[0], encode(mini, [clip])[0])[0] < 1e-5


def test_an_empty_clip_fails_no_other_request(server: TritonServer, mini: checkpoint.Checkpoint) -> None:
    clip = noise(SECOND)
    (row, empty), _ = embed_together(server, [clip, noise(0)])
    assert isinstance(empty, InferenceServerException) and "empty" in str(empty)
    assert isinstance(row, np.ndarray)
    assert difference(row, encode(mini, [clip])[0])[0] < 1e-5


def test_install_writes_configs_that_can_be_served(tmp_path: Path) -> None:
    origin = "--source random --seed 3 --channels 64"
    for _ in range(2):  # the second time over the first
        baseline.install(tmp_path / "repository", origin)
    for model in BASELINES:
        for path in configs.config_files(tmp_path / "repository" / model):
            parameters = {key: value.string_value for key, value in configs.read(path).parameters.items()}
            assert parameters == {"origin": origin, "checkout": str(ROOT)}
    for name in "cpu", "gpu", "gpu_fp16":
        assert check_repository(tmp_path / "repository", name) == dict.fromkeys(BASELINES, "python")
