"""Load SpeechBrain checkpoints: from a hub id, a local folder, the shipped small model, or random from a seed.

The loaded classifier is exported, and the export is verified against it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import itertools
import logging
import math
import re
import shlex
import sys
import textwrap
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from ecapa_triton.audio import SAMPLE_RATE

HUB_ID = "speechbrain/spkrec-ecapa-voxceleb"
HUB_REVISION = "0f99f2d0ebe89ac095bcc5903c4dd8f72b367286"
MINI = Path(__file__).parent / "mini"
SPEECHBRAIN_THRESHOLD = 0.25  # cosine; default of SpeechBrain's SpeakerRecognition.verify_batch
WEIGHTS = "embedding_model.ckpt"
HYPERPARAMS = "hyperparams.yaml"
MAX_YAML = 50_000  # characters of its values, with references resolved; that of the published model has some thousand

# Classes that a hyperparams.yaml may construct. HyperPyYAML calls any name, and a module's name leads to all that it
# imports, so each class is listed in full.
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
    """A source cannot be loaded; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded ECAPA-TDNN with its provenance.

    Attributes:
        classifier: SpeechBrain's ``EncoderClassifier`` in eval mode on the CPU, float32.
        source: its name: hub id, folder name, ``mini``, or ``random`` with its seed and size.
        origin: arguments that load it again, such as ``--source mini``.
        revision: of the hub, or an empty string.
        sha256: of the weights file; for ``random``, of the weights.
        threshold: cosine above which two embeddings are of one speaker; NaN for ``random``.
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
        revision: of the hub; the pinned one for the default source.
        seed: of the weights, for ``random``.
        channels: of the convolution layers, for ``random``; the published model has 1024.

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
            f"or a hub id such as {HUB_ID}"
        )
    revision = revision or (HUB_REVISION if source == HUB_ID else "main")
    origin = shlex.join(["--source", source, "--revision", revision])
    return _from_folder(_download(source, revision), source, origin, revision)


def load_again(origin: str) -> Checkpoint:
    """Load a checkpoint from its ``origin``."""
    words = shlex.split(origin)
    options = dict(zip(words[::2], words[1::2], strict=True))
    numbers = {name: int(options[f"--{name}"]) for name in ("seed", "channels") if f"--{name}" in options}
    return load(options["--source"], options.get("--revision"), **numbers)


def _download(hub_id: str, revision: str) -> Path:
    """The folder of a hub snapshot: from the local cache where it is complete, else downloaded."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(local_files_only: bool) -> Path:
        for name in (HYPERPARAMS, WEIGHTS):
            path = hf_hub_download(hub_id, name, revision=revision, local_files_only=local_files_only)
        return Path(path).parent

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        try:
            return fetch(local_files_only=True)
        except LocalEntryNotFoundError:
            # This request fails at once without a network; a download would retry for half a minute.
            get_hf_file_metadata(hf_hub_url(hub_id, HYPERPARAMS, revision=revision), timeout=10)
            return fetch(local_files_only=False)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise CheckpointError(
            f"cannot get {hub_id} at revision {revision[:12]} from the Hugging Face hub: "
            f"{_line(error.__cause__ or error)}: use --source FOLDER with a copy of it, or --source mini, the small "
            "model that is shipped (for trying out, not for access control)"
        ) from error


def _speechbrain() -> Any:
    """SpeechBrain with the modules of an ECAPA-TDNN, importable beside a CPU build of torch.

    torchaudio from PyPI is built for CUDA, and its extension does not load beside a CPU build. SpeechBrain imports
    torchaudio but does not use the extension here, so a stub replaces it.
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
        import speechbrain.inference.classifiers
        import speechbrain.lobes.features
        import speechbrain.lobes.models.ECAPA_TDNN
        import speechbrain.processing.features
    return speechbrain


def _from_folder(folder: Path, source: str, origin: str, revision: str) -> Checkpoint:
    """Load a SpeechBrain folder without network access, even if its yaml names the hub."""
    from hyperpyyaml import load_hyperpyyaml

    yaml_file, weights_file = folder / HYPERPARAMS, folder / WEIGHTS
    for path in (yaml_file, weights_file):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: a source folder needs {HYPERPARAMS} and {WEIGHTS}")
    sb = _speechbrain()
    try:
        text = yaml_file.read_text(encoding="utf-8")
        _check_tags(text)
        _check_size(text)
        hparams = load_hyperpyyaml(text)
        threshold = float(hparams.get("verification_threshold", SPEECHBRAIN_THRESHOLD))
        if not -1 <= threshold <= 1:
            raise ValueError(f"verification_threshold is {threshold:g}, expected a cosine in [-1, 1]")
        classifier = _classifier(sb, hparams["modules"], hparams)
        model = classifier.mods.embedding_model
        if not isinstance(model, sb.lobes.models.ECAPA_TDNN.ECAPA_TDNN):
            raise TypeError(f"embedding_model is a {type(model).__name__}, expected an ECAPA_TDNN")
        classifier.encode_batch(torch.zeros(1, SAMPLE_RATE))
    except Exception as error:  # the classes of the yaml may raise anything
        raise CheckpointError(f"{yaml_file} builds no ECAPA-TDNN that embeds: {_line(error)}") from error
    try:
        model.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:  # pickle, zip and torch errors alike
        raise CheckpointError(f"{weights_file} does not fit the model of its {HYPERPARAMS}: {_line(error)}") from error
    if bad := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise CheckpointError(f"{weights_file}: {bad[0]} has values that are not finite")
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    return Checkpoint(classifier, source, origin, revision, digest, threshold)


def _line(error: BaseException) -> str:
    """The message of an error in one line, cut where it lists hundreds of layers."""
    return textwrap.shorten(str(error), 800) or type(error).__name__


def _check_tags(text: str) -> None:
    """Reject a yaml whose loading would do more than build the model."""
    for token in yaml.scan(text):
        line = token.start_mark.line + 1
        if isinstance(token, yaml.DirectiveToken):
            raise ValueError(f"line {line} has a % directive, expected plain YAML: remove it")
        if isinstance(token, yaml.TagToken):
            tag = "".join(part or "" for part in token.value)
            if tag not in _ALLOWED_TAGS:
                raise ValueError(
                    f"line {line} has the tag {tag}, which may run code: expected !ref, !copy, !tuple, or !new and "
                    "!name of an ECAPA-TDNN's classes; remove the line if embedding does not need it"
                )
        if isinstance(token, yaml.ScalarToken) and "**" in token.value:  # HyperPyYAML computes it
            raise ValueError(f"line {line} has the power {token.value!r}, which may never end: write the number")


def _check_size(text: str) -> None:
    """Reject a yaml that is large, or whose aliases and references multiply: a few lines of them fill the memory."""
    root = yaml.compose(text)
    named = {key.value: value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    sizes: dict[Any, float] = {}

    def size(node: Any) -> float:
        if node not in sizes:
            sizes[node] = math.inf  # of a node within itself
            if isinstance(node, yaml.ScalarNode):
                names = re.findall(r"<([^>\[.]*)", node.value)  # HyperPyYAML's <name>, <name[key]> and <name.attribute>
                sizes[node] = len(node.value) + 1 + sum(size(named[name]) for name in names if name in named)
            else:
                pairs = isinstance(node, yaml.MappingNode)
                sizes[node] = 1 + sum(map(size, itertools.chain(*node.value) if pairs else node.value))
        return sizes[node]

    if (found := size(root)) > MAX_YAML:
        raise ValueError(
            f"its values have {found:.1e} characters with aliases and references resolved, expected at most "
            f"{MAX_YAML}: remove what embedding does not need"
        )


def _random(seed: int, channels: int) -> Checkpoint:
    """The published architecture with random weights, and batch norms far from the identity."""
    if channels % 8 or not 8 <= channels <= 4096:
        raise CheckpointError(f"--channels {channels}: expected a multiple of 8 (the Res2Net scale) from 8 to 4096")
    if not 0 <= seed < 2**63:
        raise CheckpointError(f"--seed {seed}: expected a whole number from 0 to 2^63 - 1")
    sb = _speechbrain()
    ecapa = sb.lobes.models.ECAPA_TDNN
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = ecapa.ECAPA_TDNN(80, lin_neurons=192, channels=[channels] * 4 + [3 * channels])
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                size = module.weight.shape
                module.weight.copy_(torch.randn(size) * 0.2 + 0.6)
                module.bias.copy_(torch.randn(size) * 0.2)
                module.running_mean.copy_(torch.rand(size) * 0.3)  # type: ignore[union-attr]
                module.running_var.copy_(torch.rand(size) * 0.5 + 0.3)  # type: ignore[union-attr]
    modules = {
        "compute_features": sb.lobes.features.Fbank(n_mels=80),
        "mean_var_norm": sb.processing.features.InputNormalization(norm_type="sentence", std_norm=False),
        "embedding_model": model,
        "classifier": ecapa.Classifier(192, out_neurons=1),  # required by SpeechBrain, not used to embed
    }
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return Checkpoint(
        _classifier(sb, modules, {}),
        source=f"random (seed {seed}, channels {channels})",
        origin=f"--source random --seed {seed} --channels {channels}",
        revision="",
        sha256=digest.hexdigest(),
        threshold=math.nan,  # random weights do not separate speakers
    )


def _classifier(sb: Any, modules: dict[str, Any], hparams: dict[str, Any]) -> Any:
    classifier = sb.inference.classifiers.EncoderClassifier(
        modules=modules, hparams={"label_encoder": None, **hparams}, run_opts={"device": "cpu"}
    )
    return classifier.eval().requires_grad_(False)
