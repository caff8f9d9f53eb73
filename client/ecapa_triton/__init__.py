"""Speaker embeddings from SpeechBrain's ECAPA-TDNN on a Triton server.

```python
from ecapa_triton import SpeakerClient

with SpeakerClient("127.0.0.1:8001") as client:
    embedding = client.embed("anna.flac")                    # float32 [192]
    print(client.verify("anna.flac", "unknown.mp3").same)    # True or False
```
"""

from ._async_client import AsyncSpeakerClient, Long
from ._client import SpeakerClient
from ._connection import State, Tls
from ._gallery import Candidate, Gallery, Identification
from ._scoring import Embedding, Utterance, Verification, score
from .audio import SAMPLE_RATE, Audio
from .errors import (
    AddressError,
    AudioError,
    AudioFileError,
    AudioFormatError,
    ClosedError,
    ConnectError,
    DeadlineError,
    EcapaError,
    EmbeddingError,
    EvaluationError,
    GalleryError,
    GalleryFileError,
    KeyRefusedError,
    ManifestError,
    ModelMismatchError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAudioError,
    NotFiniteError,
    OutputError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    ServerError,
    ThresholdError,
    TooLittleSpeechError,
    TooLongError,
    TooShortError,
    TrustError,
    UnknownVoiceError,
)
from .protocol import Deployment, ModelInfo, Statistics, Status

# fmt: off
__all__ = [
    "AsyncSpeakerClient", "SpeakerClient", "State", "Tls",
    "Audio", "Embedding", "Long", "SAMPLE_RATE",
    "Deployment", "ModelInfo", "Statistics", "Status", "Utterance", "Verification", "score",
    "Candidate", "Gallery", "Identification",
    "EcapaError",
    "AudioError", "AudioFileError", "AudioFormatError", "NotAudioError", "NotFiniteError", "TooLongError",
    "TooShortError",
    "ServerError", "AddressError", "ConnectError", "DeadlineError", "KeyRefusedError", "ModelNotFoundError",
    "ModelNotReadyError", "OverloadedError", "ProtocolError", "RejectedError", "TrustError",
    "ClosedError", "EmbeddingError", "ModelMismatchError", "ThresholdError", "TooLittleSpeechError",
    "GalleryError", "GalleryFileError", "UnknownVoiceError",
    "EvaluationError", "ManifestError", "OutputError",
]
