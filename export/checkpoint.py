"""SpeechBrain checkpoints: from a hub id, a local folder, the shipped small model or a seed, to a loaded classifier.

The classifier is both what is exported and what the export is verified against.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import logging
import math
import shlex
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

HUB_ID = "speechbrain/spkrec-ecapa-voxceleb"
HUB_REVISION = "0f99f2d0ebe89ac095bcc5903c4dd8f72b367286"
MINI = Path(__file__).parent / "mini"
SPEECHBRAIN_THRESHOLD = 0.25  # cosine; the default of SpeechBrain's SpeakerRecognition.verify_batch
WEIGHTS = "embedding_model.ckpt"
HYPERPARAMS = "hyperparams.yaml"

# What a hyperparams.yaml may construct. HyperPyYAML calls whatever is named, and a name can lead from one module on to
# anything that it imports, so each is spelled out.
_CONSTRUCTED = (
    "speechbrain.lobes.features.Fbank",
    "speechbrain.processing.features.InputNormalization",
    "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
    "speechbrain.lobes.models.ECAPA_TDNN.Classifier",
    "speechbrain.dataio.encoder.CategoricalEncoder",
    "speechbrain.utils.parameter_transfer.Pretrainer",
    "torch.nn.ReLU",
    "torch.nn.LeakyReLU",
    "torch.nn.BatchNorm1d",
)
_ALLOWED_TAGS = {"!ref", "!copy", "!tuple", *(f"!{kind}:{name}" for kind in ("new", "name") for name in _CONSTRUCTED)}


class CheckpointError(Exception):
    """A source cannot be loaded; the message says what came, what was expected and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded ECAPA-TDNN with its provenance.

    Attributes:
        classifier: SpeechBrain's ``EncoderClassifier`` in eval mode on the CPU, float32.
        source: what it is, for people: hub id, folder name, ``mini`` or ``random`` with its seed and size.
        origin: the arguments that load it again, such as ``--source mini``.
        revision: the hub revision, or an empty string.
        sha256: of the weights file (of the weights themselves for ``random``).
        threshold: cosine above which two raw embeddings are of one speaker.
    """

    classifier: Any
    source: str
    origin: str
    revision: str
    sha256: str
    threshold: float


def load(source: str = HUB_ID, revision: str | None = None, *, seed: int = 0, channels: int = 1024) -> Checkpoint:
    """Load a checkpoint.

    Args:
        source: ``mini``, ``random``, a local SpeechBrain folder, or a Hugging Face hub id.
        revision: hub revision; the pinned one for the default source.
        seed: of the weights, for ``random``.
        channels: of the convolution layers, for ``random`` (1024 is the published model's).

    Raises:
        CheckpointError: the source is missing, unreachable or does not fit the architecture it names.
    """
    if source == "random":
        return _random(seed, channels)
    if source == "mini":
        return _from_folder(MINI, "mini", "--source mini", "")
    if Path(source).is_dir():
        folder = Path(source).resolve()
        return _from_folder(folder, folder.name, shlex.join(["--source", str(folder)]), "")
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"source {source!r} is not a folder: expected mini, random, a folder with {HYPERPARAMS} and {WEIGHTS}, "
            "or a hub id such as " + HUB_ID
        )
    revision = revision or (HUB_REVISION if source == HUB_ID else "main")
    origin = shlex.join(["--source", source, "--revision", revision])
    return _from_folder(_download(source, revision), source, origin, revision)


def load_again(origin: str) -> Checkpoint:
    """Load what a checkpoint's ``origin`` names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source")
    parser.add_argument("--revision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels", type=int, default=1024)
    return load(**vars(parser.parse_args(shlex.split(origin))))


def _download(hub_id: str, revision: str) -> Path:
    """The folder of a hub snapshot: from the local cache where it is complete, else downloaded."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        try:
            return _fetch(hub_id, revision, local_files_only=True)
        except LocalEntryNotFoundError:
            # Asked first because it fails at once where there is no network; downloads try again for half a minute.
            get_hf_file_metadata(hf_hub_url(hub_id, HYPERPARAMS, revision=revision), timeout=10)
            return _fetch(hub_id, revision, local_files_only=False)
    except Exception as error:  # the hub client raises a dozen unrelated types
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"cannot get {hub_id} at revision {revision[:12]} from the Hugging Face hub: {reason}. Ways out: "
            "--source FOLDER with a copy of it, or --source mini for the small model that is shipped "
            "(for trying out, not for deciding who gets in)"
        ) from error


def _fetch(hub_id: str, revision: str, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    for name in (HYPERPARAMS, WEIGHTS):
        path = hf_hub_download(hub_id, name, revision=revision, local_files_only=local_files_only)
    return Path(path).parent


def _speechbrain() -> types.SimpleNamespace:
    """SpeechBrain's classes, importable beside a CPU build of torch.

    torchaudio from PyPI is built for CUDA torch and its extension does not load beside a CPU build. SpeechBrain
    imports torchaudio but uses nothing of the extension here, so a stub stands in for it.
    """
    if torch.version.cuda is None and "torchaudio._extension" not in sys.modules:
        stub = types.ModuleType("torchaudio._extension")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio._extension", None)
        stub.__dict__.update(
            _IS_TORCHAUDIO_EXT_AVAILABLE=False,
            _IS_RIR_AVAILABLE=False,
            _IS_ALIGN_AVAILABLE=False,
            lazy_import_sox_ext=lambda: None,
            fail_if_no_align=lambda function: function,
        )
        sys.modules["torchaudio._extension"] = stub
    logging.getLogger("speechbrain").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from speechbrain.inference.classifiers import EncoderClassifier
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
        from speechbrain.processing.features import InputNormalization
    return types.SimpleNamespace(
        EncoderClassifier=EncoderClassifier,
        Fbank=Fbank,
        ECAPA_TDNN=ECAPA_TDNN,
        Classifier=Classifier,
        InputNormalization=InputNormalization,
    )


def _from_folder(folder: Path, source: str, origin: str, revision: str) -> Checkpoint:
    """Load a SpeechBrain folder without touching the network, whatever its yaml names."""
    yaml_file, weights_file = folder / HYPERPARAMS, folder / WEIGHTS
    for path in (yaml_file, weights_file):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: a source folder needs {HYPERPARAMS} and {WEIGHTS}")
    sb = _speechbrain()
    hparams = _read_hyperparams(yaml_file)
    modules = hparams.get("modules")
    needed = sb.EncoderClassifier.MODULES_NEEDED
    missing = [
        name for name in needed if not isinstance(modules, dict) or not isinstance(modules.get(name), torch.nn.Module)
    ]
    if missing:
        raise CheckpointError(
            f"{yaml_file} has no modules: {', '.join(missing)}; expected an ECAPA-TDNN recipe's {HYPERPARAMS}"
        )
    model = hparams["modules"]["embedding_model"]
    if not isinstance(model, sb.ECAPA_TDNN):
        raise CheckpointError(f"{yaml_file} builds a {type(model).__name__} as embedding_model, expected an ECAPA_TDNN")
    _load_weights(model, weights_file)
    classifier = _classifier(sb, hparams)
    try:
        classifier.encode_batch(torch.zeros(1, 16000))
    except Exception as error:  # a yaml can combine modules that do not fit, in any way
        raise CheckpointError(f"{folder}: SpeechBrain itself cannot embed with it: {error}") from error
    return Checkpoint(
        classifier,
        source,
        origin,
        revision,
        hashlib.sha256(weights_file.read_bytes()).hexdigest(),
        _threshold(hparams, yaml_file),
    )


def _read_hyperparams(path: Path) -> dict[str, Any]:
    from hyperpyyaml import load_hyperpyyaml

    _speechbrain()  # importable from here on
    try:
        text = path.read_text(encoding="utf-8")
        _check_tags(path, text)
        hparams = load_hyperpyyaml(text)
    except CheckpointError:
        raise
    except Exception as error:  # constructors of the yaml may raise anything
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(hparams, dict):
        raise CheckpointError(f"{path} holds a {type(hparams).__name__}, expected a mapping with modules")
    return hparams


def _check_tags(path: Path, text: str) -> None:
    """Refuse a yaml whose loading would do anything but build the model."""
    tag = ""
    for token in yaml.scan(text):
        line = token.start_mark.line + 1
        if isinstance(token, yaml.DirectiveToken):
            raise CheckpointError(f"{path} line {line} has a % directive, expected plain YAML: remove it")
        if isinstance(token, yaml.TagToken):
            tag = "".join(part or "" for part in token.value)
            if tag not in _ALLOWED_TAGS:
                raise CheckpointError(
                    f"{path} line {line} asks for {tag}, and a tag runs code: only !ref, !copy, !tuple, and !new and "
                    "!name of what an ECAPA-TDNN is made of are allowed; remove the line if embedding does not need it"
                )
            continue
        if tag == "!ref" and isinstance(token, yaml.ScalarToken) and "**" in token.value:
            raise CheckpointError(
                f"{path} line {line} computes {token.value!r}, which could take for ever: write it out"
            )
        tag = ""


def _threshold(hparams: dict[str, Any], path: Path) -> float:
    value = hparams.get("verification_threshold", SPEECHBRAIN_THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= 1:
        raise CheckpointError(f"{path}: verification_threshold is {value!r}, expected a cosine in [-1, 1]")
    return float(value)


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load strictly, with an error that names keys and shapes."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors alike
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not a readable weights file: {reason}") from error
    if not isinstance(state, dict) or not all(_is_plain(value) for value in state.values()):
        raise CheckpointError(f"{path} holds no dictionary of plain tensors, expected a state_dict")
    expected = model.state_dict()
    problems = [f"missing {key} {list(expected[key].shape)}" for key in expected if key not in state]
    problems += [f"unexpected {key} {list(state[key].shape)}" for key in state if key not in expected]
    problems += [
        f"{key} has shape {list(state[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems += [
        f"{key} has values that are not finite"
        for key, value in state.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path} does not fit the model of its {HYPERPARAMS}: {shown}")
    model.load_state_dict(state, strict=True)


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _random(seed: int, channels: int) -> Checkpoint:
    """The published architecture with seeded weights, its batch-norm statistics and gains spread, some negative."""
    if channels % 8 or not 8 <= channels <= 4096:
        raise CheckpointError(f"--channels {channels}: expected a multiple of 8 (the Res2Net scale) from 8 to 4096")
    if not 0 <= seed < 2**63:
        raise CheckpointError(f"--seed {seed}: expected a whole number from 0 to 2^63 - 1")
    sb = _speechbrain()
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = sb.ECAPA_TDNN(80, lin_neurons=192, channels=[channels] * 4 + [3 * channels])
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    size = module.weight.shape
                    module.weight.copy_(torch.randn(size) * 0.2 + 0.6)
                    module.bias.copy_(torch.randn(size) * 0.2)
                    module.running_mean.copy_(torch.rand(size) * 0.3)  # type: ignore[union-attr]
                    module.running_var.copy_(torch.rand(size) * 0.5 + 0.3)  # type: ignore[union-attr]
        classifier_head = sb.Classifier(192, out_neurons=1)
    finally:
        torch.set_rng_state(state)
    modules = {
        "compute_features": sb.Fbank(n_mels=80),
        "mean_var_norm": sb.InputNormalization(norm_type="sentence", std_norm=False),
        "embedding_model": model,
        "classifier": classifier_head,
    }
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    hparams = {"modules": modules, "label_encoder": None}
    # Random weights tell no two voices apart: no cosine is a threshold.
    return Checkpoint(
        _classifier(sb, hparams),
        f"random (seed {seed}, channels {channels})",
        f"--source random --seed {seed} --channels {channels}",
        "",
        digest.hexdigest(),
        math.nan,
    )


def _classifier(sb: types.SimpleNamespace, hparams: dict[str, Any]) -> Any:
    classifier = sb.EncoderClassifier(
        modules=hparams["modules"], hparams={"label_encoder": None, **hparams}, run_opts={"device": "cpu"}
    )
    return classifier.eval().requires_grad_(False)
