"""Speaker embeddings from SpeechBrain's ECAPA-TDNN on a Triton server.

```python
from ecapa_triton import SpeakerClient

with SpeakerClient("127.0.0.1:8001") as client:
    embedding = client.embed("anna.flac")                    # float32 [192]
    print(client.verify("anna.flac", "unknown.mp3").same)    # True or False
```
"""

from ._audio import SAMPLE_RATE, Audio
from ._client import SpeakerClient, Status, Tls
from ._errors import (
    AudioError,
    AudioFileError,
    AudioFormatError,
    ClosedError,
    ConnectError,
    DeadlineError,
    EcapaError,
    EmbeddingError,
    KeyRefusedError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAudioError,
    NotFiniteError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    ServerError,
    ThresholdError,
    TooLongError,
    TooShortError,
)
from ._scoring import Verification, cosine
from ._wire import Limits, Statistics

__all__ = [
    "SAMPLE_RATE",
    "Audio",
    "AudioError",
    "AudioFileError",
    "AudioFormatError",
    "ClosedError",
    "ConnectError",
    "DeadlineError",
    "EcapaError",
    "EmbeddingError",
    "KeyRefusedError",
    "Limits",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "NotAudioError",
    "NotFiniteError",
    "OverloadedError",
    "ProtocolError",
    "RejectedError",
    "ServerError",
    "SpeakerClient",
    "Statistics",
    "Status",
    "ThresholdError",
    "Tls",
    "TooLongError",
    "TooShortError",
    "Verification",
    "cosine",
]
