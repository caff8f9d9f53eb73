"""The baselines: SpeechBrain behind Triton's Python backend.

Two models with the contract of `ecapa` (waveform FP32 `[n, samples]` to embedding FP32 `[n, 192]`), for the same
tritonserver under the same load. `install` puts them into a model repository.

    speechbrain         `encode_batch`, one request at a time; `[n, samples]` is one batch of n clips
    speechbrain_padded  dynamic batches: waiting requests are padded with zeros to the longest and passed to one
                        `encode_batch` with `wav_lens`; up to 32 clips on a GPU, eight on a CPU

They are as fast as unchanged SpeechBrain allows: eval and inference mode, all cores or the GPU, warmed up when ready,
one copy of the samples. They compute in float32: on a GPU `python -m server` turns TF32 off, as for `ecapa`, and
`--precision fp16` does not change them.

`speechbrain` gives SpeechBrain's embedding of the clip alone. An embedding of `speechbrain_padded` **depends on the
clips in its batch**: frames near the end of a clip see padding where alone they see the clip reflected. Only a request
that travels alone or among clips of its own length has the embedding of the clip alone.

A clip that SpeechBrain rejects, empty or shorter than 40 ms, fails its own request. Beside a longer clip, even 1 ms
gets an embedding, as in SpeechBrain. The baselines have no other guard of `ecapa`: no longest clip, no sample checks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..scenarios import BASELINES

_FOLDER = Path(__file__).parent


def install(repository: Path, origin: str) -> None:
    """Put the baselines into a model repository, which is made where it is missing.

    Args:
        repository: the folder.
        origin: of the checkpoint, as in the metadata of an exported model, such as `--source mini`.
    """
    for model in BASELINES:
        shutil.copytree(_FOLDER / model, repository / model, dirs_exist_ok=True)
        (repository / model / "1").mkdir(exist_ok=True)
        shutil.copyfile(_FOLDER / "speechbrain_model.py", repository / model / "1" / "model.py")
        cpu = repository / model / "configs/cpu.pbtxt"
        if cpu.exists():  # beside our model in int8 too
            shutil.copyfile(cpu, cpu.with_name("cpu_int8.pbtxt"))
        for config in (repository / model).rglob("*.pbtxt"):
            with config.open("a", encoding="utf-8") as file:
                for key, value in ("origin", origin), ("checkout", str(_FOLDER.parents[1])):
                    file.write(f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(value)} }} }}\n')
