"""Speaker embeddings of all recordings in a folder, as NumPy arrays in one file.

    python examples/embed.py 127.0.0.1:8001 samples embeddings.npz

Many requests are in flight at a time, few clips in memory. Files that cannot be embedded are listed and left out.
`ecapa-triton embed` does the same with a progress bar, and resumes an interrupted run.
"""

import sys
from pathlib import Path

import numpy as np
from ecapa_triton import EcapaError, SpeakerClient

if len(sys.argv) != 4:
    sys.exit("usage: python examples/embed.py URL FOLDER OUT.npz")
url, folder, out = sys.argv[1:]
paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
files, embeddings, models = [], [], set()
with SpeakerClient(url, max_in_flight=16) as client:
    for path, outcome in zip(paths, client.utterances(paths), strict=True):
        if isinstance(outcome, EcapaError):
            print(outcome, file=sys.stderr)
        else:
            files.append(str(path))
            embeddings.append(outcome.embedding)  # float32 [192]
            models.add(outcome.model)  # embeddings of two models do not compare
np.savez(out, files=np.array(files, str), embeddings=np.array(embeddings, np.float32), models=np.array([*models], str))
print(f"{out}: {len(files)} of {len(paths)} files")
sys.exit(len(files) < len(paths))
