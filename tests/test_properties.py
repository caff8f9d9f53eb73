"""For any batch, a clip has its own embedding or NaN, and a request has its own rows or its own error.

The packed model runs as exported, the stand-in backends run in process. `--hypothesis-profile=more` draws many more
batches.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in
import torch
from ecapa_triton.audio import MAX_AMPLITUDE, SAMPLE_RATE, read
from google.protobuf import json_format, text_format
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from export import artifacts, quantize
from export.artifacts import ExportedModel
from export.checkpoint import Checkpoint
from export.packed import PackedEcapa
from export.verify import MAX_ERROR, SAMPLES, difference

HOP = 160  # samples from one frame to the next
SHORTEST = 640  # samples that a clip needs
LIMIT = 20_011  # samples of a clip that the model under test embeds: not a whole number of frames
INT32 = 1 << 31
ROOT = Path(__file__).parent.parent
Reference = Callable[[np.ndarray], np.ndarray]


@cache
def material() -> dict[str, np.ndarray]:
    """Samples to cut clips from, by kind: float32, longer than any clip."""
    random = np.random.default_rng(0)
    size = 2 * LIMIT + HOP
    noise = random.standard_normal(size)
    step = np.where(np.arange(size) < 3_000, 0.0, 0.5)
    tone = np.sin(2 * np.pi * 440 / SAMPLE_RATE * np.arange(size))
    made = {
        "noise": 0.1 * noise,
        "other noise": 0.1 * random.standard_normal(size),
        "loud noise": 1000 * noise,
        "quiet noise": 1e-6 * noise,
        "denormal noise": 1e-40 * noise,
        "silence": np.zeros(size),
        "constant": np.full(size, 0.5),
        "step": step,
        "tone": tone,
        "clipped tone": np.clip(100 * tone, -1, 1),
    }
    for name in ("anna_1.flac", "berta_2.flac", "carl_2.wav"):
        made[name] = np.resize(read(SAMPLES / name, max_samples=size).waveform, size)
    return {name: samples.astype(np.float32) for name, samples in made.items()}


@dataclass(frozen=True)
class Cut:
    """A clip from a kind of material, with one sample replaced if `at` is given."""

    kind: str
    samples: int
    at: int | None = None
    value: float = 0.0

    @property
    def clip(self) -> np.ndarray:
        clip = material()[self.kind][: self.samples].copy()
        if self.at is not None:
            clip[self.at] = self.value
        return clip

    @property
    def good(self) -> bool:
        """Whether it has an embedding, if no empty clip is before it."""
        bad = self.at is not None and self.at < LIMIT and not abs(self.value) <= MAX_AMPLITUDE
        return self.samples >= SHORTEST and not bad


EDGES = [1, 2, HOP, SHORTEST - 1, SHORTEST, SHORTEST + 1, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + HOP, 2 * LIMIT]
EDGES += [HOP * frames + more for frames in (5, 6, 50, LIMIT // HOP) for more in (-1, 0, 1)]
lengths = st.sampled_from(EDGES) | st.integers(1, SHORTEST) | st.integers(SHORTEST, LIMIT)
VALUES = [np.nan, np.inf, -np.inf, 1e30, -1e30, 1.001e4, 1e-45, 1.0, MAX_AMPLITUDE, -MAX_AMPLITUDE]


@st.composite
def cuts(draw: st.DrawFn, samples: st.SearchStrategy[int] = lengths) -> Cut:
    cut = Cut(draw(st.sampled_from(sorted(material()))), draw(samples))
    if cut.samples and draw(st.integers(0, 3)) == 0:
        places = [0, cut.samples - 1, cut.samples // 2, *(n for n in (LIMIT - 1, LIMIT) if n < cut.samples)]
        at = draw(st.sampled_from(places) | st.integers(0, cut.samples - 1))
        return replace(cut, at=at, value=draw(st.sampled_from(VALUES)))
    return cut


batches = st.lists(cuts(), min_size=1, max_size=8)
batches_with_empty = st.lists(cuts() | cuts() | st.just(Cut("noise", 0)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def model(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """The small trained model, exported to embed LIMIT samples of a clip."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    artifacts.write_onnx(PackedEcapa(mini, LIMIT / SAMPLE_RATE).eval(), mini, path)
    model = ExportedModel(path)
    assert (model.min_samples, model.max_samples) == (SHORTEST, LIMIT)
    return model


def run(model: ExportedModel, waveform: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Embeddings [B, 192], after a check of the other output."""
    embedding, info = model.run(waveform, np.array(lengths, np.int32).reshape(-1, 1))
    identity = [int(model.metadata["weights_sha256"][i : i + 6], 16) for i in (0, 6, 12, 18)]
    expected = np.array([0.45, LIMIT / SAMPLE_RATE, SHORTEST, *identity], np.float32)
    np.testing.assert_array_equal(info, np.tile(expected, (len(lengths), 1)))
    assert embedding.shape == (len(lengths), 192) and embedding.dtype == np.float32
    return embedding


def embed(model: ExportedModel, batch: list[Cut]) -> np.ndarray:
    clips = [cut.clip for cut in batch]
    return run(model, np.concatenate(clips), [len(clip) for clip in clips])


def defined(batch: list[Cut]) -> list[bool]:
    """Which clips of a batch have an embedding."""
    return [cut.good and all(before.samples for before in batch[:n]) for n, cut in enumerate(batch)]


@given(batch=batches_with_empty)
@example(batch=[Cut("noise", n) for n in EDGES])
@example(batch=[Cut("anna_1.flac", n) for n in reversed(EDGES)])
@example(batch=[Cut(kind, 5_000) for kind in sorted(material())])
@example(batch=[Cut("noise", n) for n in (3_000, 0, 3_000)])
@example(batch=[Cut("noise", 0)])
def test_each_clip_is_as_alone_in_speechbrain_or_nan(
    model: ExportedModel, reference: Reference, batch: list[Cut]
) -> None:
    for cut, is_defined, row in zip(batch, defined(batch), embed(model, batch), strict=True):
        if is_defined:
            error, _ = difference(row, reference(cut.clip[:LIMIT]))
            assert error <= MAX_ERROR, cut
        else:
            assert np.isnan(row).all(), cut


@pytest.fixture(scope="module")
def int8(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    path = tmp_path_factory.mktemp("model") / "model_int8.onnx"
    model = PackedEcapa(mini, LIMIT / SAMPLE_RATE, exact=True).eval()
    quantize.write(model, mini, path, quantize.Calibration())
    return ExportedModel(path)


ALONE: dict[Cut, np.ndarray] = {}


@settings(max_examples=30)
@given(batch=batches_with_empty)
@example(batch=[Cut(kind, n) for kind in sorted(material()) for n in (LIMIT, 5_000)])
@example(batch=[Cut(name, n) for name in ("carl_2.wav", "anna_1.flac") for n in EDGES])
def test_in_int8_too_each_clip_is_as_alone_or_nan(int8: ExportedModel, batch: list[Cut]) -> None:
    """Eight bits round alone what they round in a batch: the means before them are exact."""
    for cut, is_defined, row in zip(batch, defined(batch), embed(int8, batch), strict=True):
        if is_defined:
            if cut not in ALONE:
                ALONE[cut] = embed(int8, [cut])[0]
            assert difference(row, ALONE[cut])[0] <= MAX_ERROR, cut
        else:
            assert np.isnan(row).all(), cut


@given(batch=batches, data=st.data())
def test_neighbours_change_no_bit(model: ExportedModel, batch: list[Cut], data: st.DataObject) -> None:
    mine = data.draw(st.integers(0, len(batch) - 1))
    others = [cut if n == mine else data.draw(cuts(st.just(cut.samples))) for n, cut in enumerate(batch)]
    np.testing.assert_array_equal(embed(model, others)[mine], embed(model, batch)[mine])


@given(batch=batches, data=st.data())
def test_order_and_other_clips_do_not_matter(model: ExportedModel, batch: list[Cut], data: st.DataObject) -> None:
    rows = embed(model, batch)
    largest = np.nan_to_num(np.abs(rows)).max()
    order = data.draw(st.permutations(range(len(batch))))
    more = data.draw(batches)
    shuffled = embed(model, more + [batch[n] for n in order] + [Cut("noise", 0)] + more)
    np.testing.assert_allclose(shuffled[len(more) : len(more) + len(batch)], rows[order], atol=1e-5 * largest)


@st.composite
def torn(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Samples of a waveform and lengths that no request has, but that a faulty server could hand over."""
    total = draw(st.sampled_from([0, 1, 3 * LIMIT, HOP * 50]) | st.integers(0, 3 * LIMIT))
    huge = st.integers(-3, 3).flatmap(lambda n: st.sampled_from([INT32 - 4 + n, n - INT32 + 3, INT32 // 2 + n]))
    some = st.integers(0, LIMIT) | st.integers(-LIMIT, -1) | huge | st.sampled_from([total, -total, total // 2])
    given = draw(st.lists(some, min_size=1, max_size=6))
    if draw(st.booleans()):  # make the sum right: in 32 bits at least
        last = (total - sum(given)) % (2 * INT32)
        given.append(last - 2 * INT32 if last >= INT32 else last)
    return total, given


@given(case=torn())
@example(case=(4_000, [1_600, 2_401]))
@example(case=(4_000, [1_600, 2_399]))
@example(case=(4_000, [5_000, -1_000]))
@example(case=(4_000, [INT32 - 1, INT32 - 1, 4_002]))  # 4000 in 32 bits
@example(case=(3 * LIMIT, [INT32 - 1, INT32 - 1]))  # the start of the second + one hop is beyond 32 bits
def test_lengths_that_do_not_fit_the_samples_give_nan_and_no_crash(
    model: ExportedModel, case: tuple[int, list[int]]
) -> None:
    total, given = case
    rows = run(model, np.resize(material()["noise"], total), given)
    fitting = total == sum(given) and min(given) >= 0
    expected = [fitting and min(given[: n + 1]) > 0 and length >= SHORTEST for n, length in enumerate(given)]
    assert np.isnan(rows).all(1).tolist() == [not ok for ok in expected]
    assert np.isfinite(rows).all(1).tolist() == expected


class Tensor:
    """In place of the C++ class that Triton's Python backend gives its models, as are the next three."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        assert type(name) is str and type(array) is np.ndarray and array.dtype in (np.float32, np.int32)
        self._name, self._array = name, np.ascontiguousarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array

    def shape(self) -> list[int]:
        return list(self._array.shape)


@dataclass
class Request:
    tensors: dict[str, np.ndarray]

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.tensors.items()]


@dataclass(frozen=True)
class Error:
    text: str

    def message(self) -> str:
        return self.text


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Error | None = None) -> None:
        assert all(type(tensor) is Tensor for tensor in output_tensors or []) and isinstance(error, Error | None)
        self.error = error
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        assert type(message) is str


def _utils() -> types.ModuleType:
    """`triton_python_backend_utils` as models import it: its Python half from the wheel, its C++ half from here."""
    pytriton = importlib.util.find_spec("pytriton")
    if pytriton is None or pytriton.origin is None:
        pytest.skip("this Triton has its own backend")
    path = Path(pytriton.origin).parent / "tritonserver/backends/python/triton_python_backend_utils.py"
    utils = _load("triton_python_backend_utils", path)
    error = type("TritonModelException", (Exception,), {})
    vars(utils).update(
        Tensor=Tensor, InferenceResponse=Response, TritonError=Error, TritonModelException=error, Logger=Logger
    )
    return utils


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, types.ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", _utils())
        shared = _load("ragged_batch", ROOT / "server/backends/python/ragged_batch.py")
        patch.setitem(sys.modules, "ragged_batch", shared)
        names = "onnxruntime", "pytorch"
        yield {name: _load(f"{name}_backend", ROOT / f"server/backends/{name}/model.py") for name in names}


def load(backends: dict[str, types.ModuleType], folder: Path, config: str = "config.pbtxt") -> Any:
    """The backend with a model of a repository, initialised as Triton does."""
    message = text_format.Parse((folder / config).read_text(), model_config_pb2.ModelConfig())
    as_dict = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    loaded = backends[message.backend].TritonPythonModel()
    loaded.initialize(
        {
            "model_config": json.dumps({"optimization": {}} | as_dict),
            "model_repository": str(folder),
            "model_version": max(path.name for path in folder.iterdir() if path.name.isdecimal()),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    return loaded


def execute(model: Any, requests: list[dict[str, np.ndarray]]) -> list[Any]:
    responses = model.execute([Request(tensors) for tensors in requests])
    assert len(responses) == len(requests) and all(isinstance(response, Response) for response in responses)
    return list(responses)


@dataclass(frozen=True)
class Sums:
    """A request to the stand-in model, whose rows differ from those of any other request."""

    items: int
    samples: int
    seed: int

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(self.seed)
        clips = random.integers(-9, 9, (self.items, self.samples)).astype(np.float32)
        return {"clip": clips, "scale": random.integers(1, 99, (self.items, 1)).astype(np.float32)}

    def check(self, response: Response) -> None:
        assert response.error is None, response.error
        tensors = self.tensors
        sums = tensors["clip"].sum(1, keepdims=True) * tensors["scale"]
        np.testing.assert_array_equal(response.tensors["sum"], sums)
        np.testing.assert_array_equal(response.tensors["length"], np.full((self.items, 1), self.samples, np.float32))


LONGEST = stand_in.LONGEST
some_samples = st.sampled_from([0, 1, LONGEST - 1, LONGEST]) | st.integers(1, LONGEST)
good = st.builds(Sums, st.integers(1, 4), some_samples, st.integers(0, 1 << 30))
failing = st.builds(Sums, st.integers(1, 4), st.integers(LONGEST + 1, 2 * LONGEST), st.integers(0, 1 << 30))


def sums_of(samples: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The sum of each clip, [B, 1]."""
    ends = torch.cumsum(lengths, 0)
    sums = torch.cat([torch.zeros(1), torch.cumsum(samples, 0)])
    return (sums[ends] - sums[ends - lengths])[:, None]


class TorchSums(torch.nn.Module):
    """The stand-in model in TorchScript."""

    def forward(
        self, scale: torch.Tensor, samples: torch.Tensor, clip: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if bool((samples > 1000).any()):
            raise ValueError(f"{int(samples.max())} samples are too many")
        return sums_of(clip, samples[:, 0]) * scale, samples.float()


def write_torch_sums(folder: Path) -> None:
    """The stand-in model for the PyTorch backend."""
    stand_in.write(folder)
    torch.jit.save(torch.jit.script(TorchSums()), folder / "1/model.onnx")  # as its config calls it
    config = (folder / "config.pbtxt").read_text().replace("onnxruntime", "pytorch")
    (folder / "config.pbtxt").write_text(config)


@pytest.fixture(scope="module", params=["onnxruntime", "pytorch"])
def sums(request: pytest.FixtureRequest, backends: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("repository") / "sums"
    if request.param == "pytorch":
        write_torch_sums(folder)
    else:
        stand_in.write(folder, version=3, filename="other.onnx")
    return load(backends, folder)


@given(requests=st.lists(good | good | failing, min_size=1, max_size=12))
@example(requests=[Sums(1, 0, 1), Sums(2, 5, 2), Sums(3, 0, 3), Sums(1, 7, 4)])
@example(requests=[Sums(2, 5, 1), Sums(1, LONGEST + 1, 2), Sums(1, 7, 3), Sums(1, LONGEST + 2, 4)])
def test_each_request_gets_its_own_rows_or_its_own_error(sums: Any, requests: list[Sums]) -> None:
    for request, response in zip(requests, execute(sums, [one.tensors for one in requests]), strict=True):
        if request.samples <= LONGEST:
            request.check(response)
        else:
            assert response.error is not None and not response.tensors
            assert str(request.samples) in response.error.message()


@given(requests=st.lists(good, min_size=1, max_size=6))
def test_a_model_with_too_few_rows_is_an_error_for_all(wrong_rows: Any, requests: list[Sums]) -> None:
    responses = execute(wrong_rows, [one.tensors for one in requests])
    items = sum(one.items for one in requests)
    for request, response in zip(requests, responses, strict=True):
        if items == 1:
            request.check(response)
        else:
            assert response.error is not None and not response.tensors
            assert f"{items} rows" in response.error.message()


@pytest.fixture(scope="module")
def wrong_rows(backends: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("repository") / "wrong_rows"
    stand_in.write(folder, rows=1)
    return load(backends, folder)


class Sections(torch.nn.Module):
    """Two ragged inputs, one of them of rows of two, and a plain one."""

    def forward(
        self, a: torch.Tensor, a_shape: torch.Tensor, b: torch.Tensor, b_shape: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return c, sums_of(a, a_shape[:, 0]), sums_of(b, b_shape.prod(1).int()), b_shape


SECTIONS_CONFIG = """
name: "sections" backend: "pytorch" max_batch_size: 8
input { name: "a" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
input { name: "c" data_type: TYPE_FP32 dims: [ 3 ] }
input { name: "b" data_type: TYPE_FP32 dims: [ -1, 2 ] allow_ragged_batch: true }
batch_input { kind: BATCH_ITEM_SHAPE target_name: "a_shape" data_type: TYPE_INT32 source_input: "a" }
batch_input { kind: BATCH_ITEM_SHAPE target_name: "b_shape" data_type: TYPE_FP32 source_input: "b" }
output { name: "plain" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "a_sum" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "b_sum" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "b_dims" data_type: TYPE_FP32 dims: [ 2 ] }
"""


@pytest.fixture(scope="module")
def sections(backends: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("repository") / "sections"
    (folder / "1").mkdir(parents=True)
    torch.jit.save(torch.jit.script(Sections()), folder / "1/model.pt")
    (folder / "config.pbtxt").write_text(SECTIONS_CONFIG)
    return load(backends, folder)


shapes = st.tuples(st.integers(1, 4), st.integers(0, 40), st.integers(0, 40))


@given(shapes=st.lists(shapes, min_size=1, max_size=8), seed=st.integers(0, 1 << 30))
def test_several_inputs_stay_together(sections: Any, shapes: list[tuple[int, int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    requests = [
        {
            name: random.integers(-99, 99, shape).astype(np.float32)
            for name, shape in (("a", (items, a)), ("b", (items, b, 2)), ("c", (items, 3)))
        }
        for items, a, b in shapes
    ]
    for request, response in zip(requests, execute(sections, requests), strict=True):
        assert response.error is None, response.error
        b = request["b"]
        np.testing.assert_array_equal(response.tensors["a_sum"], request["a"].sum(1, keepdims=True))
        np.testing.assert_array_equal(response.tensors["b_sum"], b.sum((1, 2))[:, None])
        np.testing.assert_array_equal(response.tensors["b_dims"], np.tile(np.float32(b.shape[1:]), (len(b), 1)))
        np.testing.assert_array_equal(response.tensors["plain"], request["c"])


@pytest.fixture(scope="module")
def ecapa(backends: dict[str, Any], repository: Path) -> Any:
    return load(backends, repository / "ecapa", "configs/cpu.pbtxt")


@settings(max_examples=20)
@given(requests=st.lists(st.tuples(st.integers(1, 2), cuts(lengths | st.just(0))), min_size=1, max_size=6))
@example(requests=[(1, Cut("noise", 3_000)), (1, Cut("noise", 0)), (1, Cut("tone", 2_000))])
def test_the_real_model_in_the_backend(ecapa: Any, reference: Reference, requests: list[tuple[int, Cut]]) -> None:
    """It embeds 30 s, so a bad sample always counts. An empty clip affects no other request here."""
    tensors = [{"waveform": np.tile(cut.clip, (items, 1))} for items, cut in requests]
    for (items, cut), response in zip(requests, execute(ecapa, tensors), strict=True):
        note(f"{cut}")
        assert response.error is None, response.error
        rows = response.tensors["embedding"]
        assert rows.shape == (items, 192) and response.tensors["model_info"].shape == (items, 7)
        if np.abs(cut.clip).max(initial=0) <= MAX_AMPLITUDE and cut.samples >= SHORTEST:
            assert all(difference(row, reference(cut.clip))[0] <= MAX_ERROR for row in rows)
        else:
            assert np.isnan(rows).all()
