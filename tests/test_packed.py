"""The packed model against SpeechBrain itself, in torch, for many architectures and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import checkpoint
from export.packed import PackedEcapa, UnsupportedModel

YAML = """
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: {n_mels}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: {n_mels}
    channels: {channels}
    kernel_sizes: {kernel_sizes}
    dilations: {dilations}
    attention_channels: {attention}
    res2net_scale: {scale}
    se_channels: 16
    lin_neurons: {size}
    {more}
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: {size}
    out_neurons: 1
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
"""
USUAL: dict[str, Any] = {
    "n_mels": 80,
    "channels": [32, 32, 32, 32, 96],
    "kernel_sizes": [5, 3, 3, 3, 1],
    "dilations": [1, 2, 3, 4, 1],
    "attention": 16,
    "scale": 8,
    "size": 192,
    "more": "",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "published, narrow": {},
    "channels that change": {"channels": [32, 32, 64, 48, 80]},
    "wide kernels": {"kernel_sizes": [7, 5, 3, 7, 3], "dilations": [2, 1, 5, 2, 3]},
    "two blocks, scale 4, 96 dimensions": {
        "channels": [32, 32, 32, 64],
        "kernel_sizes": [5, 3, 3, 1],
        "dilations": [1, 2, 3, 1],
        "scale": 4,
        "size": 96,
    },
    "40 mels": {"n_mels": 40},
}


def make_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A SpeechBrain folder with random weights whose batch norms are far from the identity, gains of both signs."""
    folder.mkdir(exist_ok=True)
    (folder / "hyperparams.yaml").write_text(YAML.format(**(USUAL | changes)))
    hparams = checkpoint._read_hyperparams(folder / "hyperparams.yaml")
    model = hparams["embedding_model"]
    random = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = torch.rand(value.shape, generator=random) + 0.2
        elif value.is_floating_point():
            state[name] = torch.randn(value.shape, generator=random) * (0.7 if ".norm." in name else 0.1)
    torch.save(state, folder / "embedding_model.ckpt")
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    return checkpoint.load(str(make_folder(tmp_path_factory.mktemp("source"), **ARCHITECTURES[request.param])))


@pytest.fixture(scope="module")
def packed(loaded: checkpoint.Checkpoint) -> PackedEcapa:
    return PackedEcapa(loaded, max_seconds=2, group=36).eval()


def embed(packed: PackedEcapa, clips: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([[len(clip)] for clip in clips], dtype=torch.int32).reshape(-1, 1)
    with torch.inference_mode():
        return packed(torch.cat(clips), lengths)[0]


def noise(*samples: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=random) * 0.1 for n in samples]


def alone(loaded: checkpoint.Checkpoint, clip: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = loaded.classifier.encode_batch(clip[None])[0, 0]
    return result


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_each_clip_of_a_batch_is_as_alone(loaded: checkpoint.Checkpoint, packed: PackedEcapa) -> None:
    shortest = packed.min_samples
    clips = noise(16000, shortest, 7999, shortest + 1, shortest + 159, 32000, shortest + 160, 12345)
    clips += [torch.zeros(5000), torch.full((5000,), 0.5), noise(8000)[0] * 1e-6]
    for clip, row in zip(clips, embed(packed, clips), strict=True):
        assert error(row, alone(loaded, clip)) < 1e-4


def test_gains_of_both_signs_were_among_them(loaded: checkpoint.Checkpoint) -> None:
    norms = [m for m in loaded.classifier.mods.embedding_model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert all((norm.weight < 0).any() and (norm.weight > 0).any() for norm in norms if len(norm.weight) > 8)


def test_the_shortest_clip_is_speechbrains(loaded: checkpoint.Checkpoint, packed: PackedEcapa) -> None:
    (clip,) = noise(packed.min_samples - 1)
    with pytest.raises(RuntimeError):
        alone(loaded, clip)
    assert embed(packed, [clip]).isnan().all()
    assert embed(packed, noise(packed.min_samples)).isfinite().all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -2e4])
@pytest.mark.parametrize("at", [0, 639, 640, 3999])
def test_a_spoiled_clip_is_nan_and_its_neighbours_are_not_touched(packed: PackedEcapa, value: float, at: int) -> None:
    before, bad, after = noise(3000, 4000, 5000)
    expected = embed(packed, [before, noise(4000, seed=1)[0], after])
    bad[at] = value
    got = embed(packed, [before, bad, after])
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_an_empty_clip_and_all_behind_it_are_nan(packed: PackedEcapa) -> None:
    first, second, third = noise(3000, 4000, 5000)
    empty = torch.zeros(0)
    got = embed(packed, [first, second, empty, third])
    assert torch.equal(got[:2].isfinite(), torch.ones(2, got.shape[1], dtype=torch.bool))
    assert error(got[0], embed(packed, [first])[0]) < 1e-5
    assert got[2:].isnan().all()
    assert embed(packed, [empty]).isnan().all()
    assert embed(packed, [empty, empty]).isnan().all()


def test_lengths_of_other_samples_are_nan(packed: PackedEcapa) -> None:
    """What a server would hand over that stopped copying: samples and lengths that do not add up."""
    lengths = torch.tensor([[4000], [4000]], dtype=torch.int32)
    with torch.inference_mode():
        assert packed(noise(7999)[0], lengths)[0].isnan().all()
        assert packed(noise(8001)[0], lengths)[0].isnan().all()


def test_only_the_first_max_seconds_are_heard(loaded: checkpoint.Checkpoint, packed: PackedEcapa) -> None:
    before, long, after = noise(3000, 5 * 16000 + 7, 4000)
    long[2 * 16000 :] = np.nan
    got = embed(packed, [before, long, after])
    for row, clip in zip(got, [before, long[: 2 * 16000], after], strict=True):
        assert error(row, alone(loaded, clip)) < 1e-4


def test_work_is_bounded_by_the_clips_not_by_their_length(packed: PackedEcapa) -> None:
    rows = []
    handle = packed.pooling.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    embed(packed, noise(100 * 16000, 640))
    handle.remove()
    assert rows == [2 * packed.max_frames]


def test_model_info(loaded: checkpoint.Checkpoint, packed: PackedEcapa) -> None:
    with torch.inference_mode():
        _, info = packed(torch.cat(noise(3000, 4000)), torch.tensor([[3000], [4000]], dtype=torch.int32))
    limits, identity = info.numpy()[:, :3], info.numpy()[:, 3:]
    assert limits.tolist() == [[loaded.threshold, 2.0, packed.min_samples]] * 2
    assert ["".join(f"{int(number):06x}" for number in row) for row in identity] == [loaded.sha256[:24]] * 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"more": "global_context: False"}, "global context"),
        ({"more": "activation: !name:torch.nn.LeakyReLU"}, "other than ReLU"),
        ({"more": "groups: [1, 2, 1, 1, 1]"}, "grouped"),
    ],
)
def test_what_is_not_reproduced_is_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    loaded = checkpoint.load(str(make_folder(tmp_path / "source", **changes)))
    with pytest.raises(UnsupportedModel, match=what):
        PackedEcapa(loaded)


def test_an_attention_that_could_overflow_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source")
    state = torch.load(folder / "embedding_model.ckpt", weights_only=True)
    state["asp.conv.conv.weight"] *= 100
    torch.save(state, folder / "embedding_model.ckpt")
    loaded = checkpoint.load(str(folder))
    with pytest.raises(UnsupportedModel, match="60"):
        PackedEcapa(loaded)
