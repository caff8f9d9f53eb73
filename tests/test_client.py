"""Requests, results, errors and retries: against a server that misbehaves on purpose, then the real one."""

from __future__ import annotations

import io
import math
import socketserver
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ecapa_triton
import grpc
import numpy as np
import pytest
import soundfile
import torch
from clients import OTHER, OVERLOAD, SAMPLE, SECOND, Make, meanwhile, noise, voice
from ecapa_triton import ModelInfo, SpeakerClient, Utterance, errors, score
from ecapa_triton._async_client import pause
from ecapa_triton.protocol import Deployment
from fake_triton import MODEL, SIZE, Answer, FakeTriton, fingerprint, held, model_info, nan, outputs, refuse

from export import checkpoint

Status = grpc.StatusCode
AWAY = refuse(Status.UNAVAILABLE, "Socket closed")
UNLOADED = refuse(Status.NOT_FOUND, "Request for unknown model: 'ecapa' has no available versions")


def info(*limits: float) -> Answer:
    return outputs(model_info=model_info(*limits))


# --- one clip ---


@pytest.mark.parametrize("seconds", [1, 30])
def test_embed_is_one_request(fake: FakeTriton, client: SpeakerClient, seconds: float) -> None:
    embedding = client.embed(noise(seconds))
    np.testing.assert_array_equal(embedding, fingerprint(noise(seconds)))
    assert embedding.shape == (SIZE,) and embedding.dtype == np.float32 and embedding.flags.writeable
    assert fake.lengths == [seconds * SECOND]


def test_too_short(fake: FakeTriton, client: SpeakerClient) -> None:
    for _ in range(2):  # with the limits guessed, then known
        for samples in 0, 1, 639:
            with pytest.raises(errors.TooShortError, match=rf"array float32\[{samples}\]"):
                client.embed(noise(1)[:samples])
        client.embed(noise(1)[:640])
    assert set(fake.lengths) == {640}
    fake.info = (0.45, 30.0, 320.0)
    client.embed(noise(1))
    assert client.embed(noise(0.03))[0] == 480
    fake.info = (0.45, 30.0, 1600.0)
    fake.otherwise = nan
    with pytest.raises(errors.TooShortError, match=r"50.0 ms .*100 ms"):
        client.embed(noise(0.05))


def test_too_long(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, max_duration=60)
    for clip, fact in (noise(31), ": 31 s .* 30 s"), (np.append(noise(30), np.float32(0)), r": 30\.0001 s .* 30 s"):
        with pytest.raises(errors.TooLongError, match=fact):
            client.embed(clip)
    assert max(fake.lengths) == 640  # only a clip of silence, for the limits
    np.testing.assert_array_equal(client.embed(noise(31), long="truncate"), fingerprint(noise(31)[: 30 * SECOND]))
    with pytest.raises(errors.TooLongError, match=r"60 s .*max_duration"):
        client.embed(noise(61), long="windows")
    fake.info = (0.45, 60.0, 640.0)  # a larger limit is learned
    client.embed(noise(1))
    assert client.embed(noise(45))[0] == 45 * SECOND


def test_windows(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 2.0, 640.0)
    waveform = noise(5)
    client.embed(waveform[:SECOND])  # the limits
    fake.otherwise = held
    with meanwhile(lambda: (fake.wait_until(lambda fake: fake.busy == 3), fake.gate.set())):  # all in flight at once
        outcomes = list(client.utterances([waveform, *(noise(5, i) for i in range(3))], long="windows"))
    assert all(isinstance(outcome, Utterance) for outcome in outcomes)
    assert fake.most_busy == 3  # one clip at a time: memory is bounded by `max_duration`
    starts = [0, 1.5, 3]
    parts = [fingerprint(waveform[int(s * SECOND) : int((s + 2) * SECOND)]) for s in starts]
    mean = np.mean([p / np.linalg.norm(p) for p in parts], axis=0)
    np.testing.assert_allclose(outcomes[0].embedding, mean, atol=1e-6)
    assert outcomes[0].embedding.dtype == np.float32 and outcomes[0].seconds == 5
    short = client.embed(waveform[:SECOND], long="windows")
    np.testing.assert_array_equal(short, fingerprint(waveform[:SECOND]))


def test_a_smaller_limit_in_the_reply_counts(fake: FakeTriton, client: SpeakerClient) -> None:
    """The reply of a model that cut the clip says so: an embedding of a part never passes for one of the whole."""
    fake.info = (0.45, 2.0, 640.0)
    with pytest.raises(errors.TooLongError, match=" 2 s"):
        client.embed(noise(5))
    assert client.embed(noise(5), long="truncate")[0] == 2 * SECOND
    fake.info = (0.45, 1.0, 640.0)
    assert client.embed(noise(5), long="windows").shape == (SIZE,)
    assert fake.lengths[-5:] == [SECOND] * 5


def test_limits_that_keep_changing_end(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.otherwise = lambda fake, waveform: info(0.45, len(waveform) / SECOND / 2, 640)(fake, waveform)
    with pytest.raises(errors.ModelNotReadyError, match="limits"):
        client.embed(noise(29), long="windows")


def test_models_are_not_mixed_in_windows(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    models = iter([MODEL] * 2)
    fake.model = lambda fake: next(models, OTHER)
    assert client.utterance(noise(3), long="windows").model == OTHER
    assert fake.lengths[-3:] == [SECOND] * 3 and len(fake.lengths) >= 6


def test_long_is_checked(client: SpeakerClient) -> None:
    for call in client.embed, client.utterance, lambda clip, long: client.verify(clip, clip, long=long):
        with pytest.raises(ValueError, match="long is 'cut'"):
            call(noise(1), long="cut")
    with pytest.raises(ValueError, match="long is 'cut'"):
        client.utterances([], long="cut")  # type: ignore[arg-type]


# --- errors of the server ---


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        (Status.UNAVAILABLE, "Request for unknown model: 'ecapa' has no available versions", errors.ModelNotReadyError),
        (Status.UNAVAILABLE, "Exceeds maximum queue size", errors.OverloadedError),
        (Status.UNAVAILABLE, "Server is stopping, scheduler for", errors.ConnectError),
        (Status.UNAVAILABLE, "Request timeout expired", errors.OverloadedError),
        (Status.UNAVAILABLE, "Socket closed", errors.ConnectError),
        (Status.INTERNAL, "Received RST_STREAM with error code 2", errors.ConnectError),
        (Status.ABORTED, "by a proxy", errors.ConnectError),
        (Status.CANCELLED, "CANCELLED", errors.ConnectError),
        (Status.NOT_FOUND, "Request for unknown model: 'ecapa' has no available versions", errors.ModelNotReadyError),
        (Status.NOT_FOUND, "Request for unknown model: 'ecapa' is not found", errors.ModelNotFoundError),
        (Status.UNIMPLEMENTED, "Received http2 header with status: 404", errors.AddressError),
        (Status.UNAUTHENTICATED, "Received http2 header with status: 401", errors.KeyRefusedError),
        (Status.PERMISSION_DENIED, "no", errors.KeyRefusedError),
        (Status.UNAUTHENTICATED, "A certificate is asked for", errors.TrustError),
        (Status.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (2 vs. 1)", errors.ProtocolError),
        (Status.INVALID_ARGUMENT, "unexpected shape", errors.RejectedError),
        (Status.INTERNAL, "onnx runtime\nerror", errors.ServerError),
    ],
)
def test_server_errors(
    fake: FakeTriton, make: Make, status: Status, detail: str, kind: type[errors.EcapaError]
) -> None:
    client = make(fake.url, retries=1)
    fake.answers = [refuse(status, detail)] * 2
    with pytest.raises(kind) as caught:
        client.embed(noise(1))
    assert type(caught.value) is kind
    assert fake.url in str(caught.value) and f"{' '.join(detail.split())})" in str(caught.value)
    assert len(fake.lengths) == (2 if kind.transient else 1)
    fake.answers.clear()
    assert client.embed(noise(1)).shape == (SIZE,)  # the client stays usable


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        (outputs(embedding=None), ["embedding"]),
        (outputs(model_info=None), ["model_info"]),
        (outputs(embedding=np.zeros((2, SIZE), np.float32)), ["embedding", "float32 [2, 192]"]),
        (outputs(embedding=np.zeros(SIZE, np.float32)), ["embedding", "float32 [192]"]),
        (outputs(embedding=np.zeros((1, 0), np.float32)), ["embedding", "float32 [1, 0]"]),
        (outputs(embedding=np.zeros((1, SIZE))), ["embedding", "float64 [1, 192]"]),
        (outputs(model_info=np.zeros((1, 2), np.float32)), ["model_info", "float32 [1, 2]", "float32 [1, 7]"]),
        (info(0.45, math.nan, 640), ["model_info", "nan"]),
        (info(0.45, 30, math.nan), ["model_info", "nan"]),
        (outputs(model_info=model_info(0.45, 30, 640) + 0.5), ["model_info", "24 bits"]),
    ],
)
def test_replies_of_another_model(fake: FakeTriton, client: SpeakerClient, answer: Answer, facts: list[str]) -> None:
    fake.answers = [answer]
    with pytest.raises(errors.ProtocolError) as caught:
        client.embed(noise(1))
    assert all(fact in str(caught.value) for fact in facts)
    assert client.embed(noise(1)).shape == (SIZE,)


def test_server_away(make: Make, tmp_path: Path) -> None:
    client = make("127.0.0.1:9", timeout=1)
    with pytest.raises(errors.ConnectError, match=r"127\.0\.0\.1:9: .*8001"):
        client.embed(noise(1))
    with pytest.raises(errors.AudioFileError):  # the clip is read before anything is sent
        client.embed(tmp_path / "none.wav")


def test_a_connection_lost_in_the_handshake_is_no_matter_of_trust(make: Make) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:  # closes at once
        with meanwhile(server.serve_forever):
            try:
                with pytest.raises(errors.ConnectError) as caught:
                    make(f"grpcs://127.0.0.1:{server.server_address[1]}", retries=0).embed(noise(1))
            finally:
                server.shutdown()
    assert type(caught.value) is errors.ConnectError and caught.value.transient


def test_model_missing(make: Make, fake: FakeTriton) -> None:
    client = make(fake.url, model="other")
    for call in (lambda: client.embed(noise(1)), client.status):
        with pytest.raises(errors.ModelNotFoundError, match=f"{fake.url}: .*'other'"):
            call()


# --- options ---


@pytest.mark.parametrize(
    "url",
    "http://127.0.0.1:8000 https://host grpc:// host 127.0.0.1 host:0 host:99999".split()
    + ["", "a b:1", "host:1\n", "dns:///a b"],
)
def test_wrong_urls(make: Make, url: str) -> None:
    with pytest.raises(errors.AddressError, match="HOST:PORT"):
        make(url)


@pytest.mark.parametrize(
    ("option", "values", "error"),
    [
        ("timeout", [0, -1, math.nan, math.inf, 1e10, 1e300], ValueError),
        ("max_in_flight", [0], ValueError),
        ("max_duration", [0, -1, math.nan, math.inf, 86_401], ValueError),
        ("retries", [-1], ValueError),
        ("metadata", [{name: "1"} for name in ("Upper", "", "\u00e9", "x-bin", "grpc-timeout")], ValueError),
        ("metadata", [{"name": "\u00e9"}], errors.TrustError),
        ("api_key", ["ke\ny"], errors.TrustError),
    ],
)
def test_wrong_options(make: Make, option: str, values: list[Any], error: type[Exception]) -> None:
    for value in values:
        with pytest.raises(error, match=option):
            make(**{option: value})


def test_no_proxy_sees_the_clips(make: Make, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make(fake.url).embed(noise(1)).shape == (SIZE,)


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:{}", "dns:///localhost:{}", "ipv4:127.0.0.1:{}"])
def test_forms_of_urls(make: Make, fake: FakeTriton, url: str) -> None:
    client = make(url.format(fake.url.rpartition(":")[2]), timeout=1e6, max_duration=86_400)  # the longest times
    assert client.embed(noise(1)).shape == (SIZE,)


def test_key_and_metadata_go_with_every_call(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url, api_key="secret", metadata={"x-tenant": "calls", "a.b_c": "1"})
    client.embed(noise(1))
    client.status()
    assert len(fake.metadata) > 5
    for metadata in fake.metadata:
        assert metadata["x-tenant"] == "calls" and metadata["triton-grpc-protocol-api-key"] == "secret"


# --- retries ---


def test_transient_failures_are_retried_with_backoff_within_one_timeout(fake: FakeTriton, make: Make) -> None:
    fake.answers = [OVERLOAD, AWAY, nan, OVERLOAD]
    np.testing.assert_array_equal(make(fake.url, timeout=9).embed(noise(1)), fingerprint(noise(1)))
    assert len(fake.lengths) == 5
    assert (np.diff(fake.times) > [0.05, 0.1, 0.2, 0.4]).all()
    assert fake.deadlines[4] < 9 - 0.75 + 0.3  # s, and what gRPC rounds up


@pytest.mark.parametrize("answer", [AWAY, UNLOADED, refuse(Status.CANCELLED, "CANCELLED")])
def test_a_server_that_restarts_is_retried_until_the_timeout(fake: FakeTriton, make: Make, answer: Answer) -> None:
    fake.answers = [answer] * 8
    client = make(fake.url)  # with the default settings, and not connected before
    np.testing.assert_array_equal(client.embed(noise(1)), fingerprint(noise(1)))
    assert len(fake.lengths) == 9


def test_pauses_double_up_to_a_limit_and_have_jitter() -> None:
    for attempt, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 2, 2]):
        assert longest / 2 <= pause(attempt, 2) <= longest
    assert len({pause(1100, 2) for _ in range(20)}) == 20 and 1 <= pause(1100, 2) <= 2


def test_a_timeout_names_the_failure_before_it(fake: FakeTriton, make: Make) -> None:
    fake.answers = [OVERLOAD]
    fake.otherwise = held
    with pytest.raises(errors.DeadlineError, match=r" in 2 s.*Exceeds maximum queue size"):
        make(fake.url, timeout=2).embed(noise(1))


def test_retries_end(fake: FakeTriton, make: Make) -> None:
    fake.otherwise = nan
    with pytest.raises(errors.EmbeddingError, match=r"NaN 3 times for 1.00 s"):
        make(fake.url, retries=2).embed(noise(1))
    assert len(fake.lengths) == 3
    fake.otherwise = OVERLOAD
    with pytest.raises((errors.OverloadedError, errors.DeadlineError), match="Exceeds maximum queue size"):
        make(fake.url, timeout=1, retries=10**9).embed(noise(1))  # no pause beyond the timeout


def test_windows_are_retried_one_by_one(fake: FakeTriton, client: SpeakerClient) -> None:
    fake.info = (0.45, 1.0, 640.0)
    expected = client.embed(noise(3), long="windows")
    fake.lengths.clear()
    fake.answers = [OVERLOAD, AWAY, nan]
    np.testing.assert_array_equal(client.embed(noise(3), long="windows"), expected)
    assert len(fake.lengths) == 6


# --- two clips ---


def test_verify(fake: FakeTriton, client: SpeakerClient) -> None:
    a, b = voice(1), voice(1.5, seed=1)
    for threshold in 45, -1.01, math.nan, "x":
        with pytest.raises(errors.ThresholdError, match=f"{threshold}"):
            client.verify(a, b, threshold)
    assert fake.lengths == []
    verification = client.verify(a, b)
    assert verification.score == pytest.approx(score(fingerprint(a), fingerprint(b)))
    assert verification.threshold == 0.45  # not 0.44999998807907104
    assert client.verify(a, a).same
    assert client.verify(a, a).score == pytest.approx(1)
    assert not client.verify(a, -a).same
    assert not client.verify(a, a, threshold=1.0).same
    assert client.verify(a, b, threshold=-1.0).same
    with pytest.raises(errors.NotAudioError):
        client.verify(a, b"no audio")
    fake.info = (math.nan, 30.0, 640.0)
    with pytest.raises(errors.ThresholdError):
        client.verify(a, a)
    assert client.verify(a, a, 0.9).same
    models = iter((MODEL, OTHER))
    fake.model = lambda fake: next(models)
    with pytest.raises(errors.ModelMismatchError) as caught:
        client.verify(a, a)
    assert MODEL in str(caught.value) and OTHER in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b"),
    [([1.0, 0.0], [1.0]), ([[1.0]], [[1.0]]), ([0.0, 0.0], [1.0, 0.0]), ([math.nan, 1.0], [1.0, 0.0])],
)
def test_score_rejects(a: list[float], b: list[float]) -> None:
    with pytest.raises(errors.EmbeddingError):
        score(np.array(a), np.array(b))


def test_a_file_object_is_read_once(fake: FakeTriton, client: SpeakerClient) -> None:
    """Also where the clip is read again: in windows, and before the model's limits are known."""
    long, buffer = noise(45), io.BytesIO()
    soundfile.write(buffer, long, SECOND, format="WAV", subtype="FLOAT")
    expected = client.embed(long, long="windows")
    for _ in range(2):
        buffer.seek(0)
        np.testing.assert_array_equal(client.embed(buffer, long="windows"), expected)
        client.status()
    with pytest.raises(errors.NotAudioError, match="0 bytes"):
        client.embed(buffer)  # it stands at its end


# --- status ---


def test_status(fake: FakeTriton, client: SpeakerClient) -> None:
    status = client.status()
    assert (status.server_version, status.live, status.ready) == ("2.51.0", True, True)
    assert status.model_versions == ("1", "2")
    assert status.info == ModelInfo(threshold=0.45, max_seconds=30.0, min_samples=640, id=MODEL)
    assert status.deployment == Deployment(
        "onnxruntime", "model_fp16.onnx", ("2 on GPU 0", "2 on GPU 1", "1 on the CPU"), "fp16", 3
    )
    statistics = status.statistics
    assert (statistics.requests, statistics.failures, statistics.executions) == (20, 2, 8)
    assert (statistics.mean_batch, statistics.queue_ms, statistics.compute_ms) == (3.0, 3.0, 11.0)


def test_status_waits_for_a_server_that_is_away(fake: FakeTriton, make: Make) -> None:
    fake.away = 8
    assert make(fake.url).status().live
    assert fake.away == 0


def test_status_of_a_server_in_trouble(fake: FakeTriton, make: Make) -> None:
    client = make(fake.url)
    fake.otherwise = OVERLOAD
    status = client.status()
    assert status.info is None and status.ready and status.statistics
    assert len(fake.lengths) == 1  # it is shown as it is
    fake.ready = False
    status = client.status()
    assert (status.live, status.ready, status.model_versions) == (True, False, ())
    assert (status.deployment, status.info, status.statistics) == (None, None, None)


# --- the package ---


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    lines = [line for line in (ecapa_triton.errors.__doc__ or "").splitlines() if line.startswith("    ")]
    parents: list[str] = []
    for line in lines:
        names, depth = line.strip().split(", "), (len(line) - len(line.lstrip())) // 4 - 1
        for name in names:
            base = getattr(ecapa_triton, name).__bases__[0].__name__
            assert base == (parents[depth - 1] if depth else "Exception")
        parents[depth:] = names
    assert {n for line in lines for n in line.strip().split(", ")} == {
        n for n in ecapa_triton.__all__ if n.endswith("Error")
    }


# --- the real server ---

Reference = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def served(server, make: Make) -> SpeakerClient:  # type: ignore[no-untyped-def]
    return make(server.grpc_url, timeout=60)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b))


def test_served_files_bytes_arrays_and_mixed_lengths(served: SpeakerClient, reference: Reference) -> None:
    floats, rate = soundfile.read(SAMPLE, dtype="float32")
    ints, _ = soundfile.read(SAMPLE, dtype="int16")
    assert rate == SECOND
    expected = reference(floats)
    arrays = floats, ints, floats[:, None], floats[None], torch.from_numpy(floats), np.stack([floats] * 2, axis=1)
    for clip in (SAMPLE, str(SAMPLE), SAMPLE.read_bytes(), io.BytesIO(SAMPLE.read_bytes()), *arrays):
        assert close(served.embed(clip), expected)
    clips = [noise(s, seed=i) for i, s in enumerate([0.04, 2.5, 0.3, 7, 1, 0.11, 4, 0.04])]
    for embedding, clip in zip(served.embed_many(clips), clips, strict=True):
        assert close(embedding, reference(clip))


def test_served_long_clips(served: SpeakerClient, reference: Reference) -> None:
    clip = noise(40)
    with pytest.raises(errors.TooLongError, match="40 s .* 30 s"):
        served.embed(clip)
    first, last = reference(clip[: 30 * SECOND]), reference(clip[10 * SECOND :])
    assert close(served.embed(clip, long="truncate"), first)
    mean = (first / np.linalg.norm(first) + last / np.linalg.norm(last)) / 2
    assert close(served.embed(clip, long="windows"), mean)


def test_served_status(served: SpeakerClient, mini: checkpoint.Checkpoint) -> None:
    before = served.status()
    served.embed_many([noise(0.5, seed=i) for i in range(8)])
    after = served.status()
    while after.statistics.requests < before.statistics.requests + 9:  # Triton counts a request after it has replied
        after = served.status()
    assert before.server_version == after.server_version != ""
    assert after.live and after.ready and after.model_versions
    assert after.info == ModelInfo(threshold=0.45, max_seconds=30.0, min_samples=640, id=mini.sha256[:24])
    assert after.statistics.executions > before.statistics.executions and after.statistics.compute_ms > 0


def test_served_unknown_model_and_wrong_version(make: Make, server) -> None:  # type: ignore[no-untyped-def]
    for options in ({"model": "other"}, {"model_version": "999"}):
        client = make(server.grpc_url, retries=1, **options)
        for call in (lambda client=client: client.embed(noise(1)), client.status):
            with pytest.raises((errors.ModelNotFoundError, errors.ModelNotReadyError)):
                call()
