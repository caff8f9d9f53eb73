"""Reads a path, the bytes of a file, a file object or an array as a mono waveform at 16 kHz, in bounded memory."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .errors import AudioFileError, AudioFormatError, NotAudioError, NotFiniteError


class _Readable(Protocol):
    def read(self) -> bytes: ...


class _ArrayLike(Protocol):
    def __array__(self) -> Any: ...


class _DLPack(Protocol):
    def __dlpack__(self) -> Any: ...


Plain: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[Any]
"""A path, the bytes of an audio file, or an array of samples."""

Audio: TypeAlias = Plain | _Readable | _ArrayLike | _DLPack
"""Also a binary file object, and an array or a CPU tensor of another library, by `__array__` or `__dlpack__`."""

Waveform: TypeAlias = NDArray[np.float32]

PLAIN = str, os.PathLike, bytes, bytearray, memoryview, np.ndarray  # the types of Plain

SAMPLE_RATE = 16_000
"""Hz, of the model's training data and of every waveform that is sent."""

MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz; other rates come from broken headers
MAX_AMPLITUDE = 1e4  # full scale is 1; beyond this the model answers NaN
MAX_CHANNELS = 32  # of an array; one with more is likely transposed
# Samples per second of a file, all channels together: a few bytes can encode seconds of silence in 255 channels.
# With this limit, 30 s of the slowest coding (Opus, 5 million samples decoded per second) take a minute.
MAX_FLOW = 10_000_000
INT16_SCALE = np.float32(1 / 32768)
# First bytes of the formats passed to libsndfile: WAV, RF64, W64, FLAC, OGG, MP3, AIFF, AU, CAF, SPHERE.
# Its parsers of rarer formats print to the terminal and are less tested.
MAGIC = (b"RIFF", b"RF64", b"riff", b"fLaC", b"OggS", b"ID3", b"\xff", b"FORM", b".snd", b"caff", b"NIST")
UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2^63 - 1 if a stream's header gives no length
MAX_MISSING = 0.5  # s by which a file may be shorter than its header says: MP3 counts are estimates
MAX_CHUNKS = 1_000  # of a WAV file, searched for its samples
BLOCK = 1 << 18  # samples decoded at a time, all channels together: 1 MiB of float32


@dataclass(frozen=True)
class Clip:
    """The beginning of a clip, or all of it.

    Attributes:
        name: Its name in error messages.
        waveform: float32 [samples], mono, 16 kHz, finite.
        cut: Whether the source continues after `waveform`.
        source_seconds: Length of the source in seconds; for a file the length in its header, 0 if that gives none.
    """

    name: str
    waveform: Waveform
    cut: bool
    source_seconds: float

    @property
    def seconds(self) -> float:
        """Length of `waveform` in seconds."""
        return len(self.waveform) / SAMPLE_RATE


def read(audio: Audio, sample_rate: float | None = None, *, max_samples: int) -> Clip:
    """Read at most `max_samples` samples at 16 kHz, and decode no more of the source than needed.

    Args:
        audio: A path, the bytes of an audio file (formats: see `MAGIC`) or a file object of it, or float or int16
            samples `[samples]`, `[samples, channels]` or `[1, samples]`. Channels are averaged; int16 is divided by
            32768.
        sample_rate: Hz, of an array (None: 16000). A file has its own; a different value here is an error.
        max_samples: Samples at 16 kHz.

    Raises:
        AudioError: Any but `TooShortError` and `TooLongError`; the caller checks the length.
    """
    audio = plain(audio)
    name = describe(audio)
    if isinstance(audio, np.ndarray):
        rate = SAMPLE_RATE if sample_rate is None else sample_rate
        _check_rate(name, rate)
        audio = audio[0] if audio.ndim == 2 and len(audio) == 1 else audio
        _check_array(name, audio)
        return _collect(name, _array_blocks(audio), rate, len(audio) / rate, max_samples)
    import soundfile  # only needed for files

    try:
        with _open(name, audio) as (file, frames, raw):
            rate = file.samplerate
            _check_rate(name, rate)
            if rate * file.channels > MAX_FLOW:
                raise AudioFormatError(
                    f"{name}: {file.channels} channels at {rate} Hz, expected at most {MAX_FLOW} samples a second "
                    "in total: pass fewer channels or a lower rate"
                )
            if sample_rate not in (None, rate):
                raise AudioFormatError(
                    f"{name}: the file is at {rate} Hz, sample_rate says {sample_rate}: "
                    "omit sample_rate for files, they are resampled as needed"
                )
            source_seconds = frames / rate if file.frames < UNKNOWN_FRAMES else 0.0
            return _collect(name, _file_blocks(name, file, frames, raw), rate, source_seconds, max_samples)
    except OSError as exc:
        raise AudioFileError(f"{name}: cannot be read ({exc.strerror}): get a whole copy") from exc
    except soundfile.SoundFileError as exc:
        reason = getattr(exc, "error_string", str(exc)).rstrip(".")
        raise NotAudioError(
            f"{name}: cannot be read as audio ({reason}): expected a whole WAV, FLAC, OGG or MP3 file"
        ) from exc


def plain(audio: Audio) -> Plain:
    """Read a file object to its end, from where it stands; take a tensor as an array, without a copy where it can be.

    Raises:
        AudioFileError: The file object cannot be read.
        AudioFormatError: It gives no bytes, the tensor is not in the CPU's memory, or it is another type.
    """
    if isinstance(audio, PLAIN):
        return audio
    name, given = describe(audio), cast(Any, audio)
    try:
        if hasattr(given, "__array__"):
            return np.asarray(given)
        if hasattr(given, "__dlpack__"):
            return np.from_dlpack(given)
    except Exception as exc:  # each library has its own
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise AudioFormatError(f"{name}: gives no array ({reason}): pass its samples as a NumPy array") from exc
    if not hasattr(given, "read"):
        raise AudioFormatError(
            f"audio is a {name}: expected a path, the bytes of an audio file, a binary file object, or an array of "
            "samples"
        )
    try:
        data = given.read()
    except (OSError, ValueError) as exc:  # ValueError: closed, or text that cannot be decoded
        reason = getattr(exc, "strerror", None) or str(exc)
        raise AudioFileError(f"{name}: cannot be read ({reason}): pass a file object opened with 'rb'") from exc
    if not isinstance(data, bytes):
        raise AudioFormatError(f"{name}: read() gives {type(data).__name__}, expected bytes: open the file with 'rb'")
    return data


def describe(audio: object) -> str:
    """A short printable name for error messages."""
    if isinstance(audio, np.ndarray):
        return f"array {audio.dtype}{list(audio.shape)}"
    if isinstance(audio, bytes | bytearray | memoryview):
        return f"{len(audio)} bytes"
    if isinstance(audio, str | os.PathLike):
        path = str(audio)
        return path if path.isprintable() and path else repr(path)
    return type(audio).__name__


def counted(number: int, noun: str) -> str:
    """The number and the noun, in its plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def windows(samples: int, size: int) -> list[slice]:
    """The fewest windows of `size` samples that cover `samples`, evenly spaced."""
    count = -(-samples // size)
    starts = np.linspace(0, max(samples - size, 0), count).round().astype(int)
    return [slice(int(start), int(start) + size) for start in starts]


def _check_rate(name: str, rate: float) -> None:
    if not (isinstance(rate, Real) and MIN_RATE <= rate <= MAX_RATE):
        raise AudioFormatError(
            f"{name}: sample rate is {rate!r}, expected {MIN_RATE} to {MAX_RATE} Hz: pass the true rate"
        )


def _collect(name: str, blocks: Iterator[Waveform], rate: float, source_seconds: float, max_samples: int) -> Clip:
    parts, samples = [np.empty(0, np.float32)], 0
    for block in _resample(blocks, rate):
        parts.append(block)
        samples += len(block)
        if samples > max_samples:
            break
    waveform = np.concatenate(parts)[:max_samples]
    if len(waveform) and not -MAX_AMPLITUDE <= waveform.min() <= waveform.max() <= MAX_AMPLITUDE:  # NaN too
        first = int((~(np.abs(waveform) <= MAX_AMPLITUDE)).argmax())
        raise NotFiniteError(
            f"{name}: the sample at {first / SAMPLE_RATE:.3f} s is {waveform[first]:g}, "
            "expected samples in [-1, 1]: repair the recording, or divide by full scale (32768 for 16 bits)"
        )
    return Clip(name, waveform, samples > max_samples, source_seconds)


def _resample(blocks: Iterator[Waveform], rate: float) -> Iterator[Waveform]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    import soxr  # only needed for other rates

    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _check_array(name: str, array: NDArray[Any]) -> None:
    if array.ndim not in (1, 2) or array.ndim == 2 and not 1 <= array.shape[1] <= MAX_CHANNELS:
        raise AudioFormatError(
            f"{name}: expected shape [samples], [1, samples] or [samples, channels] with 1 to {MAX_CHANNELS} "
            "channels: transpose a [channels, samples] array, pass the clips of a batch one by one"
        )
    if not issubclass(array.dtype.type, np.int16 | np.floating):
        raise AudioFormatError(f"{name}: expected float samples in [-1, 1] or int16: convert them")
    if isinstance(array, np.ma.MaskedArray):
        raise AudioFormatError(f"{name}: has a mask, expected a plain array: pass its filled() samples")


def _array_blocks(array: NDArray[Any]) -> Iterator[Waveform]:
    """Mono float32 blocks of an array `[samples]` or `[samples, channels]`."""
    samples = array[:, None] if array.ndim == 1 else array
    step = BLOCK // samples.shape[1]
    for start in range(0, len(samples), step):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is rejected
            block = samples[start : start + step].astype(np.float32)
        yield _mono(block * INT16_SCALE if array.dtype.type is np.int16 else block)


@cache
def _forward() -> type[Any]:
    """A file without seeks: soundfile would seek after every read, which resets an MP3 decoder."""
    import soundfile

    class Forward(soundfile.SoundFile):  # type: ignore[misc]
        def seekable(self) -> bool:
            return False

    return Forward


class _Bytes(io.BytesIO):
    """Bytes in which a seek to before the start, as damaged headers cause, has no effect."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.getbuffer().nbytes}[whence]
        return super().seek(start + offset) if start + offset >= 0 else self.tell()


@contextmanager
def _open(
    name: str, audio: str | os.PathLike[str] | bytes | bytearray | memoryview
) -> Iterator[tuple[Any, int, _Bytes | io.FileIO]]:
    """Yield the file, the number of frames in its header, and the object that libsndfile reads."""
    with _open_path(name, audio) if isinstance(audio, str | os.PathLike) else _Bytes(audio) as raw:
        if not (start := raw.read(4)).startswith(MAGIC):
            found = f"starts with {start!r}" if start else "is empty (0 bytes)"
            raise NotAudioError(f"{name}: {found}: expected a WAV, FLAC, OGG or MP3 file")
        times = _claimed(raw)
        raw.seek(0)
        # A descriptor avoids the RAW format by suffix and encoding of the name, and gives the system's errors.
        with _forward()(raw.fileno() if isinstance(raw, io.FileIO) else raw, closefd=False) as file:
            yield file, round(file.frames * times) if times > 1 else file.frames, raw


def _claimed(raw: io.BytesIO | io.FileIO) -> float:
    """The samples in a WAV header as a multiple of those in the file, to which libsndfile lowers its count."""
    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    place = 12 if raw.read(4) in (b"RIFF", b"RF64") else size
    long_length = 0
    for _ in range(MAX_CHUNKS):
        raw.seek(place)
        head = raw.read(24)
        place += 8
        if place >= size:
            break
        kind, length = head[:4], int.from_bytes(head[4:8], "little")
        if kind == b"ds64":
            long_length = int.from_bytes(head[16:24], "little")
        elif kind == b"data":
            # A program that writes into a pipe does not know the length, and writes 0 or about the largest.
            if length == 0xFFFFFFFF and long_length < UNKNOWN_FRAMES:
                length = long_length
            elif length | 0xFFF in (0x7FFFFFFF, 0x80000FFF, 0xFFFFFFFF):
                length = 0
            return max(1.0, length / (size - place))
        place += length + length % 2
    return 1.0


def _open_path(name: str, path: str | os.PathLike[str]) -> io.FileIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could block for ever
            kind = "a directory" if os.path.isdir(path) else "not a regular file"
            raise AudioFileError(f"{name}: is {kind}: pass the path of an audio file, or the bytes of one")
        return io.FileIO(path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        reason = getattr(exc, "strerror", None) or str(exc)
        raise AudioFileError(
            f"{name}: cannot be opened ({reason}): expected the path of a readable audio file"
        ) from exc


def _file_blocks(name: str, file: Any, frames: int, raw: _Bytes | io.FileIO) -> Iterator[Waveform]:
    """Mono float32 blocks of a file; raises if it is shorter or longer than its header says."""
    step = max(1, BLOCK // file.channels)
    done, start = 0, raw.tell()
    while len(block := file.read(step, dtype="float32", always_2d=True)):
        done += len(block)
        yield _mono(block)
    missing = frames - done
    if file.frames < UNKNOWN_FRAMES and missing > MAX_MISSING * file.samplerate:
        raise NotAudioError(
            f"{name}: ends after {done / file.samplerate:.2f} s, expected "
            f"{frames / file.samplerate:.2f} s as its header says: get a whole copy"
        )
    # libsndfile reads an MP3 up to its count, which without a header is a guess from the first frame's bit rate.
    place, following = raw.tell(), raw.read(2)
    if file.format == "MP3" and following[:1] == b"\xff" and following[1:] >= b"\xe0":
        seconds = done / file.samplerate
        left = (raw.seek(0, os.SEEK_END) - place) * seconds / max(place - start, 1)
        if left > MAX_MISSING:
            raise NotAudioError(
                f"{name}: continues after {seconds:.2f} s, expected its end there: several MP3 files in one, or one "
                "without a length in its header; convert it to FLAC or WAV"
            )


def _mono(block: Waveform) -> Waveform:
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite are rejected later
        return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
