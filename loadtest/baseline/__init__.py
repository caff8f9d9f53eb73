"""What people have today, to compare with: SpeechBrain behind Triton's python backend.

Two models with the contract of `ecapa` (waveform FP32 `[n, samples]` to embedding FP32 `[n, 192]`), for the same
tritonserver under the same load. They are no part of `model_repository/`: `install` puts them where they are measured.

    speechbrain         `encode_batch`, one request at a time; `[n, samples]` is one batch of n clips
    speechbrain_padded  dynamic batching: what waits is padded with zeros to the longest and given to one `encode_batch`
                        with `wav_lens`; on a GPU up to 32 clips, on a CPU eight

They are as fast as SpeechBrain is without changes to it: eval and inference mode, all cores or the GPU, warm when
ready, one copy of the samples. Float32; where `python -m server` runs them on a GPU it turns TF32 off, as for `ecapa`,
and `--precision fp16` does not change them.

What they answer is not the same. `speechbrain` gives SpeechBrain's embedding of the clip alone. `speechbrain_padded`
gives that of the padded batch, which **depends on the clips beside it**: frames near a clip's end see the padding where
alone they see the clip reflected, more so the shorter the clip is beside the others. So its embeddings are not to be
checked against SpeechBrain alone, only a request that travels alone or among clips of its own length is equal.

A clip that SpeechBrain cannot take, empty or shorter than 40 ms, is an error for its request only. Padded beside a
longer one even 1 ms gets an embedding, as from SpeechBrain. None of the other guards of `ecapa` is here: no longest
clip, no check of the samples.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from google.protobuf import text_format

from export import configs

MODELS = ["speechbrain", "speechbrain_padded"]
_FOLDER = Path(__file__).parent
_CHECKOUT = _FOLDER.parents[1]


def install(repository: Path, origin: str) -> list[str]:
    """Puts the baselines into a model repository, beside what is there.

    Args:
        repository: The folder; made where it is missing.
        origin: Of the checkpoint, as an exported model has it in its metadata, such as `--source mini`.

    Returns:
        The models' names.
    """
    parameters = {"origin": origin, "checkout": str(_CHECKOUT)}
    for model in MODELS:
        (repository / model / "1").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_FOLDER / "speechbrain_model.py", repository / model / "1" / "model.py")
        for path in configs.config_files(_FOLDER / model):
            config = configs.read(path)
            for key, value in parameters.items():
                config.parameters[key].string_value = value
            target = repository / model / path.relative_to(_FOLDER / model)
            target.parent.mkdir(exist_ok=True)
            target.write_text(text_format.MessageToString(config), encoding="utf-8")
    return MODELS
