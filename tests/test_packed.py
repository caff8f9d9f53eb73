"""The packed model against SpeechBrain itself, in torch, for many architectures and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from export import checkpoint
from export.packed import PARTS, Clips, PackedEcapa, UnsupportedModel

YAML = """
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: {n_mels}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: {std_norm}
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
    "std_norm": False,
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
    checkpoint.load("random", channels=8)  # SpeechBrain can be imported from here on
    state = load_hyperpyyaml((folder / "hyperparams.yaml").read_text())["embedding_model"].state_dict()
    random = torch.Generator().manual_seed(seed)
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
    long, bad, *clips = noise(5 * 16000 + 7, 4000, 16000, shortest, 7999, shortest + 1, shortest + 159, 32000, 12345)
    clips += [torch.zeros(5000), torch.full((5000,), 0.5), noise(8000)[0] * 1e-4, noise(8000)[0] * 1e4]
    long[2 * 16000 :] = torch.nan  # past max_seconds
    bad[640] = torch.nan
    *rows, nan = embed(packed, [long, *clips, bad])
    assert nan.isnan().all()
    for clip, row in zip([long[: 2 * 16000], *clips], rows, strict=True):
        assert error(row, alone(loaded, clip)) < 1e-4


def test_the_shortest_clip_is_speechbrains(loaded: checkpoint.Checkpoint, packed: PackedEcapa) -> None:
    (clip,) = noise(packed.min_samples - 1)
    with pytest.raises(RuntimeError):
        alone(loaded, clip)
    assert embed(packed, [clip]).isnan().all()
    assert embed(packed, noise(packed.min_samples)).isfinite().all()


def test_work_is_bounded_by_the_clips_not_by_their_length(packed: PackedEcapa) -> None:
    rows = []
    handle = packed.pooling.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    embed(packed, noise(100 * 16000, 640))
    handle.remove()
    assert [n // PARTS for n in rows] == [-(-2 * packed.max_frames // PARTS)]


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"more": "global_context: False"}, "global context"),
        ({"more": "activation: !name:torch.nn.LeakyReLU"}, "activation"),
        ({"more": "groups: [1, 2, 1, 1, 1]"}, "grouped"),
        ({"std_norm": True}, "std_norm"),
    ],
)
def test_an_unsupported_feature_is_named(tmp_path: Path, changes: dict[str, Any], feature: str) -> None:
    loaded = checkpoint.load(str(make_folder(tmp_path / "source", **changes)))
    with pytest.raises(UnsupportedModel, match=feature):
        PackedEcapa(loaded)


def test_an_attention_that_could_overflow_is_not_supported(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source")
    state = torch.load(folder / "embedding_model.ckpt", weights_only=True)
    weight = state["asp.conv.conv.weight"]
    for largest, supported in (59.9, True), (60.1, False):
        state["asp.conv.conv.weight"] = weight * largest / weight.abs().sum(1).max()
        torch.save(state, folder / "embedding_model.ckpt")
        loaded = checkpoint.load(str(folder))
        if supported:
            (clip,) = noise(8000)
            assert error(embed(PackedEcapa(loaded), [clip])[0], alone(loaded, clip)) < 1e-4
        else:
            with pytest.raises(UnsupportedModel, match=f"{largest}"):
                PackedEcapa(loaded)


def test_the_mean_of_a_long_clip_keeps_its_digits() -> None:
    rows = (torch.arange(80) / 80 + 0.5).repeat(3004, 1)  # a steady sound of 30 s
    clips = Clips(torch.arange(3004, dtype=torch.int32), torch.tensor([3004], dtype=torch.int32))
    torch.testing.assert_close(clips.mean(rows), rows[:1], rtol=1.5e-5, atol=0)
