"""Speaker identification: enrol a few voices, then name the nearest three for each further clip, or none.

    python examples/identify.py 127.0.0.1:8001 anna=samples/anna_1.flac berta=samples/berta_1.flac samples/*_2.*

`NAME=FILE` enrols a clip; a name may have several clips. All other arguments are clips to identify.
"""

import sys

from ecapa_triton import EcapaError, Gallery, SpeakerClient

if len(sys.argv) < 3:
    sys.exit("usage: python examples/identify.py URL NAME=FILE ... FILE ...")
url, *arguments = sys.argv[1:]
clips = [argument for argument in arguments if "=" not in argument]
gallery = Gallery()
with SpeakerClient(url) as client:
    for name, _, clip in (argument.partition("=") for argument in arguments if "=" in argument):
        gallery.enrol(name, client.utterance(clip))
    for clip, found in zip(clips, gallery.identify_many(client.utterances(clips), top=3), strict=True):
        if isinstance(found, EcapaError):
            print(f"{clip}: {found}")
        else:
            nearest = ", ".join(f"{candidate.name} {candidate.score:.2f}" for candidate in found.candidates)
            print(f"{clip}: {found.name or 'unknown'} ({nearest}; threshold {found.threshold:.2f})")
