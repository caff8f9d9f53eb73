"""Voice login: enrol a person once, with several clips, then verify a clip against the claimed name.

    python examples/login.py 127.0.0.1:8001 voices.npz enrol anna samples/anna_1.flac samples/anna_2.flac
    python examples/login.py 127.0.0.1:8001 voices.npz verify anna samples/berta_1.flac

The exit status of `verify` is 0 if the voice is the claimed one, else 1. A replayed recording passes, too: require a
second factor, or new words each time.
"""

import sys
from pathlib import Path

from ecapa_triton import EcapaError, Gallery, SpeakerClient

if len(sys.argv) < 6 or sys.argv[3] not in ("enrol", "verify"):
    sys.exit("usage: python examples/login.py URL GALLERY enrol|verify NAME FILE ...")
url, file, task, name, *clips = sys.argv[1:]
try:
    with SpeakerClient(url) as client:
        if task == "enrol":
            gallery = Gallery.load(file) if Path(file).exists() else Gallery()
            gallery.enrol(name, client.utterances(clips))
            gallery.save(file)
            print(f"{name}: enrolled with {len(clips)} clips")
        else:
            result = Gallery.load(file).verify(name, client.utterance(clips[0]))
            print(f"{name}: {'welcome' if result.same else 'refused'} ({result.score:.2f} of {result.threshold:.2f})")
            sys.exit(0 if result.same else 1)
except EcapaError as exc:
    sys.exit(f"{name}: {exc}")
