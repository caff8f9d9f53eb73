"""Damaged audio for the client's reader: it must return a waveform or raise our error, in bounded time and memory.

    python -m tests.fuzz_audio --seconds 300 --seed 1

File N of a seed is always the same; --first N --files 1 reads it again. Files that fail are saved. A crash or a hang in
libsndfile ends the program; the file that caused it is the one saved last.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import functools
import io
import itertools
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import soundfile
from ecapa_triton import AudioError
from ecapa_triton.audio import MAGIC, read

SECOND = 16_000
LIMITS = (0, 1, SECOND, 30 * SECOND)  # max_samples
CPU_SECONDS = 10  # for one file; processor time, because the machine may be busy
MEMORY = 96 << 20  # bytes for one file: 30 s are 2 MB, a block 1 MB, twice that for resampling
ADDRESS_SPACE = 512 << 20  # bytes that may be reserved beyond those at the start
# Output of libmpg123 about damaged files, which libsndfile does not silence.
MPG123 = re.compile(rb"Note: |Warning: |\[src/libmpg123/|$")
CHANGES = "flip", "flip", "set", "set", "set size", "set size", "insert", "delete", "cut", "repeat", "splice"
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte's bits in reverse
EXTREMES = sorted({0, 1, 3, 1000, *((1 << n) - d for n in (7, 8, 15, 16, 24, 31, 32, 62, 63, 64) for d in (0, 1, 2))})


def encoded(samples: np.ndarray, rate: int, container: str, subtype: str | None = None, title: str = "") -> bytes:
    buffer = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=container) as file:
        if title:
            file.title = title
        file.write(samples)
    return buffer.getvalue()


@functools.cache
def whole_files() -> dict[str, bytes]:
    """Each container and coding that the reader takes, with tags, and some that decode to far more; by name."""
    time_axis = np.arange(1_600) / SECOND
    tone = (0.5 * np.sin(2 * np.pi * 440 * time_axis)).astype(np.float32)
    stereo = np.stack([tone, tone[::-1]], axis=1)
    files = {}
    for container in ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST"):
        for subtype in soundfile.available_subtypes(container):
            one_channel = "NMS" in subtype or "G72" in subtype or subtype == "GSM610"
            for samples, rate, kind in ((tone, SECOND, "mono"), (stereo, 44_100, "stereo")):
                if kind == "mono" or not one_channel:
                    try:
                        files[f"{container} {subtype} {kind}"] = encoded(samples, rate, container, subtype)
                    except soundfile.SoundFileError:  # the coding does not have this rate
                        continue
    for container in ("WAV", "AIFF", "FLAC", "OGG", "CAF", "RF64"):
        files[f"{container} with a title"] = encoded(tone, SECOND, container, title="a title " * 9)
    mp3 = files["MP3 MPEG_LAYER_III mono"]
    text = b"TIT2" + struct.pack(">IH", 80, 0) + b"\x03" + b"t" * 79
    files["MP3 with ID3"] = b"ID3\x04\0\0" + bytes([0, 0, 0, len(text)]) + text + mp3 + b"TAG" + b"t" * 125
    wav = files["WAV PCM_16 mono"]
    chunks = [(b"bext", 602), (b"cue ", 28), (b"smpl", 60), (b"inst", 8), (b"acid", 24), (b"cart", 2048), (b"PEAK", 16)]
    extra = b"".join(name + struct.pack("<I", size) + bytes([1]) * size for name, size in chunks)
    files["WAV with many chunks"] = wav[:36] + extra + wav[36:]
    hour = np.zeros(3600 * 8_000, np.int8)
    files["FLAC of an hour"] = encoded(hour.astype(np.int16), 8_000, "FLAC")
    files["OGG OPUS of minutes"] = encoded(np.zeros(120 * 8_000, np.int16), 8_000, "OGG", "OPUS")
    files["OGG VORBIS of minutes"] = encoded(np.zeros((60 * 8_000, 16), np.int16), 8_000, "OGG", "VORBIS")
    files["MP3 of minutes"] = encoded(np.zeros(60 * 8_000, np.int16), 8_000, "MP3")
    return files


def damaged(random: random.Random) -> bytes:
    """One of `whole_files` after some changes, or noise that begins like an audio file."""
    if random.randrange(20) == 0:
        return random.choice(MAGIC) + random.randbytes(random.randrange(300))
    data = bytearray(random.choice(list(whole_files().values())))
    for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5, 8))):
        _change(data, random)
    if data.startswith(b"OggS") and random.randrange(4):
        _mend_checksums(data)  # the decoder rejects pages with wrong ones unread
    return bytes(data)


def _change(data: bytearray, random: random.Random) -> None:
    def some_place() -> int:  # in the header more often than elsewhere
        return random.randrange(min(len(data), random.choice((16, 64, 256, 1 << 30))) + 1)

    def set_integer(place: int) -> None:  # that a parser may trip over, in a size and byte order that headers have
        size, near = random.choice((1, 2, 3, 4, 8)), len(data) - place
        value = random.choice((*EXTREMES, near - 1, near, near + 1, random.getrandbits(8 * size)))
        data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, random.choice(("little", "big")))

    change, place = random.choice(CHANGES), some_place()
    if change == "flip" and data:
        for _ in range(random.choice((1, 1, 2, 20))):
            data[min(some_place(), len(data) - 1)] ^= 1 << random.randrange(8)
    elif change == "set":
        set_integer(place)
    elif change == "set size":  # or a field of a chunk, found by its name; also of chunks in a chunk
        if names := [found.end() for found in re.finditer(rb"[A-Za-z][A-Za-z0-9 ]{3}", data[:4096])]:
            set_integer(random.choice(names) + random.choice((0, 0, 4, 8, 12, 16, 20)))
    elif change == "insert":
        data[place:place] = random.randbytes(random.randrange(1, 40))
    elif change == "delete":
        del data[place : place + random.randrange(1, 200)]
    elif change == "cut":
        del data[place:]
    elif change == "repeat":
        data[place:place] = data[place : place + random.choice((4, 8, 24, 100, 1000))] * random.choice((1, 2, 50))
    elif change == "splice":
        other = random.choice(list(whole_files().values()))
        start = random.randrange(len(other))
        data[place:] = other[start : start + 10_000]


def _mend_checksums(data: bytearray) -> None:
    """Set the checksums of the Ogg pages: CRC-32 of the other bit order than zlib's, beginning with 0."""
    for start in [found.start() for found in re.finditer(b"OggS", data)][:20]:
        segments = data[start + 27 : start + 27 + data[start + 26]] if start + 26 < len(data) else b""
        end = start + 27 + len(segments) + sum(segments)
        if segments and end <= len(data):
            data[start + 22 : start + 26] = bytes(4)
            crc = zlib.crc32(data[start:end].translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
            data[start + 22 : start + 26] = crc.to_bytes(4, "big").translate(REVERSED)


def check(audio: bytes | Path, max_samples: int) -> str:
    """Read it and return the kind of the outcome: `waveform`, or the name of our error."""
    try:
        clip = read(audio, max_samples=max_samples)
    except AudioError as error:
        assert str(error).isprintable(), f"message {str(error)!r}"
        return type(error).__name__
    assert clip.waveform.dtype == np.float32 and clip.waveform.ndim == 1, f"{clip.waveform.dtype}{clip.waveform.shape}"
    assert len(clip.waveform) <= max_samples, f"{len(clip.waveform)} samples, expected at most {max_samples}"
    assert np.isfinite(clip.waveform).all(), "not finite"
    assert 0 <= clip.source_seconds < np.inf, f"source_seconds is {clip.source_seconds}"
    return "waveform"


def fault(seed: int, number: int, path: Path, output: io.FileIO) -> tuple[str, str]:
    """Read file `number` of a seed. Returns the kind of the outcome and, if it failed, how."""
    source = random.Random(f"{seed}/{number}")
    data, max_samples, as_file = damaged(source), source.choice(LIMITS), source.randrange(4) == 0
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, printed = _memory("VmHWM"), output.seek(0, os.SEEK_END)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        kind = check(path if as_file else data, max_samples)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "FAILED", f"{max_samples=}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (memory := _memory("VmHWM") - before) > MEMORY:
        return "FAILED", f"{max_samples=}: took {memory >> 20} MiB, allowed are {MEMORY >> 20}"
    output.seek(printed)
    if lines := [line for line in output.read(10_000).splitlines() if not MPG123.match(line)]:
        return "FAILED", f"{max_samples=}: printed {lines[0]!r}"
    return kind, ""


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--files", type=int, default=sys.maxsize, help="stop after so many files")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="default: random")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    args = parser.parse_args()
    report = os.fdopen(os.dup(1), "w", buffering=1)  # what libsndfile prints goes elsewhere
    print(f"seed {args.seed}, {len(whole_files())} whole files", file=report)
    faulthandler.enable(report)
    faulthandler.register(signal.SIGPROF, report, chain=True)  # of the timer; it ends the program
    limit = _memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kinds: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryFile(buffering=0) as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        for number in itertools.count(args.first):
            if kinds.total() >= args.files or time.monotonic() > end:
                break
            path = Path(tempfile.gettempdir(), f"fuzz_audio_{args.seed}_{number}")
            kind, how = fault(args.seed, number, path, output)
            kinds[kind] += 1
            if how:
                print(f"FAILED {path}: {how}", file=report)
            else:
                path.unlink()
    print(f"{kinds.total()} files:", ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()), file=report)
    return 1 if kinds["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
