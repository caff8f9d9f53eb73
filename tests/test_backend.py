"""The Python-based `onnxruntime` backend, on a real tritonserver, with a model that tells its rows apart."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import stand_in
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from server import TritonServer
from server.triton import find_installed

pytestmark = pytest.mark.skipif(find_installed() is not None, reason="this Triton has its own backend")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    # A queue delay makes requests that come together travel together.
    stand_in.write(repository / "sums", version=3, filename="other.onnx", delay=300_000)
    stand_in.write(repository / "wrong_rows", rows=1, delay=300_000, intra=5)
    with TritonServer(repository, device="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def triton(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as client:
        yield client


def ask(triton: InferenceServerClient, clips: np.ndarray, scale: float, model: str = "sums") -> np.ndarray:
    """Sends clips [items, samples]; returns rows [items, 2] of sum and length."""
    inputs = [InferInput("clip", clips.shape, "FP32"), InferInput("scale", (len(clips), 1), "FP32")]
    inputs[0].set_data_from_numpy(clips)
    inputs[1].set_data_from_numpy(np.full((len(clips), 1), scale, np.float32))
    result = triton.infer(model, inputs, client_timeout=20)
    return np.hstack([result.as_numpy("sum"), result.as_numpy("length")])


def together(calls: list[tuple[object, ...]]) -> list[np.ndarray | InferenceServerException]:
    def call(arguments: tuple[object, ...]) -> np.ndarray | InferenceServerException:
        try:
            return ask(*arguments)  # type: ignore[arg-type]
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def clips(number: int, items: int = 1, samples: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(number)
    length = rng.integers(1, 900) if samples is None else samples
    return rng.integers(-9, 9, (items, length)).astype(np.float32)


def expected(waveforms: np.ndarray, scale: float) -> np.ndarray:
    return np.array([[clip.sum() * scale, len(clip)] for clip in waveforms], np.float32)


def executions(triton: InferenceServerClient, model: str) -> tuple[int, int]:
    time.sleep(0.5)  # Triton counts a request just after it has replied
    statistics = triton.get_inference_statistics(model).model_stats[0]
    return statistics.inference_count, statistics.execution_count


def test_requests_of_many_lengths_share_executions_and_get_their_own_rows(triton: InferenceServerClient) -> None:
    items_before, executions_before = executions(triton, "sums")
    sent = [clips(number, samples=7 + 100 * (number % 6)) for number in range(24)]
    replies = together([(triton, sent[number], number) for number in range(24)])
    for number, reply in enumerate(replies):
        np.testing.assert_array_equal(reply, expected(sent[number], number))
    items_after, executions_after = executions(triton, "sums")
    assert items_after - items_before == 24
    assert executions_after - executions_before <= 12


def test_a_request_of_several_clips_gets_a_row_for_each(triton: InferenceServerClient) -> None:
    sent = [clips(0), clips(1, items=2), clips(2, items=3), clips(3)]
    replies = together([(triton, waveforms, 3) for waveforms in sent])
    for waveforms, reply in zip(sent, replies, strict=True):
        np.testing.assert_array_equal(reply, expected(waveforms, 3))


def test_an_empty_clip_shifts_no_row(triton: InferenceServerClient) -> None:
    sent = [clips(0), clips(1, samples=0), clips(2)]
    replies = together([(triton, waveforms, 1) for waveforms in sent])
    for waveforms, reply in zip(sent, replies, strict=True):
        np.testing.assert_array_equal(reply, expected(waveforms, 1))


def test_one_failing_request_leaves_its_batch_alone(triton: InferenceServerClient) -> None:
    sent = [clips(number) for number in range(5)]
    sent[2] = clips(2, samples=stand_in.LONGEST + 1)
    replies = together([(triton, waveforms, 1) for waveforms in sent])
    assert isinstance(replies[2], InferenceServerException)
    assert "out of data bounds" in str(replies[2])
    for number in 0, 1, 3, 4:
        np.testing.assert_array_equal(replies[number], expected(sent[number], 1))


def test_a_batch_with_too_few_rows_is_an_error_for_all(triton: InferenceServerClient) -> None:
    replies = together([(triton, clips(number), 1, "wrong_rows") for number in range(4)])
    failed = [str(reply) for reply in replies if isinstance(reply, InferenceServerException)]
    assert len(failed) >= 2  # any that travelled alone is right
    assert all("output sum has shape [1, 1], expected" in message for message in failed)
    for number, reply in enumerate(replies):
        if not isinstance(reply, InferenceServerException):
            np.testing.assert_array_equal(reply, expected(clips(number), 1))


def test_thread_parameter_is_obeyed(server: TritonServer) -> None:
    threads = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            if str(server.repository) in command and "triton_python_backend_stub" in command:
                model = "sums" if "/sums/" in command else "wrong_rows"
                threads[model] = len(list((process / "task").iterdir()))
        except OSError:
            continue
    assert threads["wrong_rows"] - threads["sums"] == 5 - 1


def test_real_model_batches_mixed_lengths(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    rng = np.random.default_rng(0)
    sent = [0.1 * rng.standard_normal((1, 4000 * (1 + number % 6))).astype(np.float32) for number in range(24)]

    def embed(clip: np.ndarray) -> np.ndarray:
        waveform = InferInput("waveform", clip.shape, "FP32")
        waveform.set_data_from_numpy(clip)
        return triton.infer("ecapa", [waveform], client_timeout=20).as_numpy("embedding")

    with (
        TritonServer(tmp_path / "repository", device="cpu") as server,
        InferenceServerClient(server.grpc_url) as triton,
        ThreadPoolExecutor(len(sent)) as pool,
    ):
        alone = [embed(clip) for clip in sent]
        items_before, executions_before = executions(triton, "ecapa")
        batched = list(pool.map(embed, sent))
        items_after, executions_after = executions(triton, "ecapa")
    assert items_after - items_before == 24
    assert executions_after - executions_before < 24
    for one, other in zip(alone, batched, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())
