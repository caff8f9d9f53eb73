"""The stand-in `onnxruntime` backend, on a real tritonserver, with a model whose rows tell clips apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import stand_in
from launcher import batches, new_batches
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from server import TritonServer
from server.wheel import find_installed

pytestmark = pytest.mark.skipif(find_installed() is not None, reason="this Triton has its own backend")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    # A queue delay makes concurrent requests share a batch.
    stand_in.write(repository / "sums", version=3, filename="other.onnx", delay=300_000)
    stand_in.write(repository / "wrong_rows", rows=1, delay=300_000, intra=5)
    with TritonServer(repository, device="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def triton(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as client:
        yield client


Reply = np.ndarray | InferenceServerException


def together(
    triton: InferenceServerClient, requests: Sequence[np.ndarray], scales: Sequence[float], model: str = "sums"
) -> list[Reply]:
    """The replies to concurrent requests, each of clips [items, samples]."""

    def call(clips: np.ndarray, scale: float) -> Reply:
        try:
            return stand_in.ask(triton, clips, scale, model)
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(call, requests, scales))


def clips(seed: int, items: int = 1, samples: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 900) if samples is None else samples
    return rng.integers(-9, 9, (items, length)).astype(np.float32)


def assert_right(reply: Reply, waveforms: np.ndarray, scale: float) -> None:
    np.testing.assert_array_equal(reply, np.array([[clip.sum() * scale, len(clip)] for clip in waveforms], np.float32))


@pytest.mark.parametrize(
    "requests",
    [
        [clips(seed, samples=7 + 100 * (seed % 6)) for seed in range(24)],
        [clips(0), clips(1, items=2), clips(2, items=3), clips(3)],
        [clips(0), clips(1, samples=0), clips(2)],
    ],
    ids=["six lengths", "several clips in a request", "an empty clip"],
)
def test_each_request_gets_its_own_rows(triton: InferenceServerClient, requests: list[np.ndarray]) -> None:
    before = batches(triton, "sums")
    replies = together(triton, requests, range(1, len(requests) + 1))
    for scale, (reply, waveforms) in enumerate(zip(replies, requests, strict=True), 1):
        assert_right(reply, waveforms, scale)
    items = sum(len(waveforms) for waveforms in requests)
    assert new_batches(triton, "sums", before, items).total() < len(requests)


def test_one_failing_request_leaves_its_batch_alone(triton: InferenceServerClient) -> None:
    requests = [clips(seed) for seed in range(5)]
    requests[2] = clips(2, samples=stand_in.LONGEST + 1)
    replies = together(triton, requests, [1] * 5)
    assert isinstance(replies.pop(2), InferenceServerException)
    requests.pop(2)
    for reply, waveforms in zip(replies, requests, strict=True):
        assert_right(reply, waveforms, 1)


def test_a_batch_with_too_few_rows_is_an_error_for_all(triton: InferenceServerClient) -> None:
    requests = [clips(seed) for seed in range(4)]
    failed = 0
    for reply, waveforms in zip(together(triton, requests, [1] * 4, "wrong_rows"), requests, strict=True):
        if isinstance(reply, InferenceServerException):
            assert "output sum has shape [1, 1]" in str(reply)
            failed += 1
        else:  # alone in its batch, it gets the one row that is its own
            assert_right(reply, waveforms, 1)
    assert failed >= 2


def test_thread_parameter_is_obeyed(server: TritonServer) -> None:
    stubs = psutil.Process(server.pid).children()
    threads = {"/sums/" in " ".join(stub.cmdline()): stub.num_threads() for stub in stubs}
    assert threads[False] - threads[True] == 5 - 1
