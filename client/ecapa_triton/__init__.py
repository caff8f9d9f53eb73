"""Speaker embeddings from SpeechBrain's ECAPA-TDNN on a Triton server.

```python
from ecapa_triton import SpeakerClient

with SpeakerClient("127.0.0.1:8001") as client:
    embedding = client.embed("anna.flac")                    # float32 [192]
    print(client.verify("anna.flac", "unknown.mp3").same)    # True or False
```
"""

from ._async_client import AsyncSpeakerClient
from ._base import Embedding, Long, Status
from ._client import SpeakerClient
from ._connection import State, Tls
from ._gallery import Candidate, Gallery, Identification
from ._scoring import Utterance, Verification, score
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
    TooLongError,
    TooShortError,
    TrustError,
    UnknownVoiceError,
)
from .protocol import Deployment, ModelInfo, Statistics

__all__ = [
    "SAMPLE_RATE",
    "AddressError",
    "AsyncSpeakerClient",
    "Audio",
    "AudioError",
    "AudioFileError",
    "AudioFormatError",
    "Candidate",
    "ClosedError",
    "ConnectError",
    "DeadlineError",
    "Deployment",
    "EcapaError",
    "Embedding",
    "EmbeddingError",
    "EvaluationError",
    "Gallery",
    "GalleryError",
    "GalleryFileError",
    "Identification",
    "KeyRefusedError",
    "Long",
    "ManifestError",
    "ModelInfo",
    "ModelMismatchError",
    "ModelNotFoundError",
    "ModelNotReadyError",
    "NotAudioError",
    "NotFiniteError",
    "OutputError",
    "OverloadedError",
    "ProtocolError",
    "RejectedError",
    "ServerError",
    "SpeakerClient",
    "State",
    "Statistics",
    "Status",
    "ThresholdError",
    "Tls",
    "TooLongError",
    "TooShortError",
    "TrustError",
    "UnknownVoiceError",
    "Utterance",
    "Verification",
    "score",
]
