"""Data cleaning: find the clips of a data set that occur twice, and those that sound like another speaker.

    python examples/clean.py 127.0.0.1:8001 speakers.txt   # lines of SPEAKER PATH

A speaker needs two clips or more. All scores are in memory at once, 4 bytes each: 400 MB for 10,000 clips. Listen
before you delete: a score is a hint.
"""

import sys
from pathlib import Path

import numpy as np
from ecapa_triton import SpeakerClient

TWICE = 0.99  # cosine; two recordings of one speaker rarely reach it

if len(sys.argv) != 3:
    sys.exit("usage: python examples/clean.py URL LIST")
speakers, paths = zip(*(line.split(maxsplit=1) for line in Path(sys.argv[2]).read_text().splitlines()), strict=True)
with SpeakerClient(sys.argv[1]) as client:
    embeddings = np.stack(client.embed_many(paths))  # float32 [clips, 192]
embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
scores = embeddings @ embeddings.T
np.fill_diagonal(scores, 0)
for a, b in np.argwhere(np.triu(scores) > TWICE):
    print(f"twice: {paths[a]} {paths[b]} ({scores[a, b]:.3f})")
names, label = np.unique(speakers, return_inverse=True)
member = np.eye(len(names), dtype=np.float32)[label]  # [clips, speakers]
means = scores @ member / np.maximum(member.sum(0) - member, 1)  # to the other clips of each speaker
for i, near in enumerate(means.argmax(1)):
    if near != label[i]:
        print(f"not {speakers[i]}? {paths[i]} ({means[i, label[i]]:.2f}; {names[near]} {means[i, near]:.2f})")
