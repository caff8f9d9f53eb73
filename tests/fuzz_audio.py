"""Damaged audio against the client's reader: a waveform or an error of ours, in bounded time and memory.

    python -m tests.fuzz_audio --seconds 300 --seed 1

File N of a seed is always the same one; --first N --files 1 reads it again. A child process reads the files, so that a
crash, a hang or a greedy allocation in libsndfile is one more failure to report and not the end. What fails is saved.
"""

from __future__ import annotations

import argparse
import collections
import functools
import io
import multiprocessing
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
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import soundfile
from ecapa_triton import AudioError
from ecapa_triton.audio import MAGIC, read

SECOND = 16_000
LIMITS = (0, 1, SECOND, 30 * SECOND)  # samples; what a caller may ask for
CPU_SECONDS = 10  # of one file; processor time, so a busy machine does not matter
WALL_SECONDS = 120  # of one file; a child that sleeps for ever
MEMORY = 96 << 20  # bytes that reading one file may take: 30 s are 2 MB, a block 1 MB, twice that for resampling
ADDRESS_SPACE = 512 << 20  # bytes that the child may reserve beyond what it has at the start
# What libmpg123 prints about damaged files: libsndfile does not silence it, and the reader cannot.
MPG123 = re.compile(rb"Note: |Warning: |\[src/libmpg123/|$")
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
    """By name: each container and coding that the reader takes, with tags, and some that decode to far more."""
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
                    except soundfile.SoundFileError:  # a rate that this coding does not have
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
    """A file as it should not be: one of `whole_files` after some changes, or noise that begins like a file."""
    if random.randrange(20) == 0:
        return random.choice(MAGIC) + random.randbytes(random.randrange(300))
    files = list(whole_files().values())
    data = bytearray(random.choice(files))
    for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5, 8))):
        random.choice(CHANGES)(data, random)
    if data.startswith(b"OggS") and random.randrange(4):
        _mend_checksums(data)  # or the decoder would never see what was changed
    return bytes(data)


def _place(data: bytearray, random: random.Random) -> int:
    """Where to change something: in the header more often than elsewhere."""
    return random.randrange(min(len(data), random.choice((16, 64, 256, 1 << 30))) + 1)


def _flip(data: bytearray, random: random.Random) -> None:
    for _ in range(random.choice((1, 1, 2, 20))):
        if data:
            data[min(_place(data, random), len(data) - 1)] ^= 1 << random.randrange(8)


def _integer(random: random.Random, near: int) -> bytes:
    """An integer that a parser may trip over, in one of the sizes and byte orders that headers have."""
    size = random.choice((1, 2, 3, 4, 8))
    value = random.choice((*EXTREMES, near - 1, near, near + 1, random.getrandbits(8 * size)))
    return (value % (1 << 8 * size)).to_bytes(size, random.choice(("little", "big")))


def _set(data: bytearray, random: random.Random) -> None:
    place = _place(data, random)
    new = _integer(random, len(data) - place)
    data[place : place + len(new)] = new


def _set_size(data: bytearray, random: random.Random) -> None:
    """The size or the first field of a chunk, by what looks like its name; of chunks in a chunk too."""
    names = [found.end() for found in re.finditer(rb"[A-Za-z][A-Za-z0-9 ]{3}", data[:4096])]
    if names:
        place = random.choice(names) + random.choice((0, 0, 4, 8, 12, 16, 20))
        new = _integer(random, len(data) - place)
        data[place : place + len(new)] = new


def _insert(data: bytearray, random: random.Random) -> None:
    place = _place(data, random)
    data[place:place] = random.randbytes(random.randrange(1, 40))


def _delete(data: bytearray, random: random.Random) -> None:
    place = _place(data, random)
    del data[place : place + random.randrange(1, 200)]


def _cut(data: bytearray, random: random.Random) -> None:
    del data[_place(data, random) :]


def _repeat(data: bytearray, random: random.Random) -> None:
    start = _place(data, random)
    part = data[start : start + random.choice((4, 8, 24, 100, 1000))]
    data[start:start] = part * random.choice((1, 2, 50))


def _splice(data: bytearray, random: random.Random) -> None:
    other = random.choice(list(whole_files().values()))
    start = random.randrange(len(other))
    place = _place(data, random)
    data[place:] = other[start : start + 10_000]


CHANGES = (_flip, _flip, _set, _set, _set_size, _set_size, _insert, _delete, _cut, _repeat, _splice)


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


def _mend_checksums(data: bytearray) -> None:
    """Give the Ogg pages the checksum of what they hold now."""
    table = _crc_table()
    starts = [found.start() for found in re.finditer(b"OggS", data)]
    for start in starts[:20]:
        segments = data[start + 27 : start + 27 + data[start + 26]] if start + 26 < len(data) else b""
        end = start + 27 + len(segments) + sum(segments)
        if segments and end <= len(data):
            data[start + 22 : start + 26] = bytes(4)
            value = 0
            for byte in data[start:end]:
                value = (value << 8 & 0xFFFFFFFF) ^ table[value >> 24 ^ byte]
            data[start + 22 : start + 26] = value.to_bytes(4, "little")


def check(audio: bytes | Path, max_samples: int) -> str:
    """Read it; the kind of the outcome: `waveform`, or the name of our error."""
    try:
        clip = read(audio, max_samples=max_samples)
    except AudioError as error:
        assert str(error).isprintable(), f"message {str(error)!r}"
        return type(error).__name__
    assert clip.waveform.dtype == np.float32 and clip.waveform.ndim == 1, f"{clip.waveform.dtype}{clip.waveform.shape}"
    assert len(clip.waveform) <= max_samples, f"{len(clip.waveform)} samples, at most {max_samples} were asked for"
    assert np.isfinite(clip.waveform).all(), "not finite"
    assert 0 <= clip.source_seconds < np.inf, f"source_seconds is {clip.source_seconds}"
    return "waveform"


@dataclass
class Result:
    """What became of one file: `outcome` is that of `check`, or what went wrong."""

    number: int
    outcome: str
    failed: bool = False
    seconds: float = 0.0  # of processor time
    memory: int = 0  # bytes, at the most, beyond those before


def make(seed: int, number: int) -> tuple[bytes, int, bool]:
    """File `number` of a seed, the most samples to read of it, and whether as a file rather than as bytes."""
    source = random.Random(f"{seed}/{number}")
    return damaged(source), source.choice(LIMITS), source.randrange(4) == 0


def _read_one(seed: int, number: int, path: Path, output: io.FileIO) -> Result:
    data, max_samples, as_file = make(seed, number)
    if as_file:
        path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, printed, begun = _memory("VmHWM"), output.seek(0, os.SEEK_END), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    failed = True
    try:
        outcome = check(path if as_file else data, max_samples)
        failed = False
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    signal.setitimer(signal.ITIMER_PROF, 0)
    result = Result(number, outcome, failed, time.process_time() - begun, _memory("VmHWM") - before)
    if not failed and result.memory > MEMORY:
        result.outcome, result.failed = f"took {result.memory >> 20} MiB, allowed are {MEMORY >> 20}", True
    output.seek(printed)
    lines = [line for line in output.read(10_000).splitlines() if not MPG123.match(line)]
    if not failed and lines:
        result.outcome, result.failed = f"printed {lines[0]!r}", True
    return result


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def _child(seed: int, first: int, folder: str, results: Connection) -> None:
    """Reads file after file until it is killed; says what it is at, so that a death can be put down to a file."""
    whole_files()
    with open(Path(folder, "output"), "w+b", buffering=0) as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        limit = _memory("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = first
        while True:
            results.send(number)
            results.send(_read_one(seed, number, Path(folder, "clip"), output))
            number += 1


@dataclass
class Summary:
    """Of all files so far."""

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[Result] = field(default_factory=list)
    slowest: Result = field(default_factory=lambda: Result(-1, ""))
    greediest: Result = field(default_factory=lambda: Result(-1, ""))

    def add(self, result: Result) -> None:
        self.kinds["FAILED" if result.failed else result.outcome] += 1
        self.slowest = max(self.slowest, result, key=lambda one: one.seconds)
        self.greediest = max(self.greediest, result, key=lambda one: one.memory)
        if result.failed:
            self.failures.append(result)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items(), key=lambda item: -item[1]))
        return (
            f"{self.kinds.total()} files: {kinds}; slowest {self.slowest.seconds:.2f} s (file {self.slowest.number}), "
            f"most memory {self.greediest.memory / (1 << 20):.1f} MiB (file {self.greediest.number})"
        )


def run(seed: int, first: int, wanted: Callable[[int], bool], say: Callable[[str], object]) -> Summary:
    """Read the files from `first` on while `wanted(files so far)`."""
    with tempfile.TemporaryDirectory() as folder:  # of this process: the others are killed
        return _run(seed, first, folder, wanted, say)


def _run(seed: int, first: int, folder: str, wanted: Callable[[int], bool], say: Callable[[str], object]) -> Summary:
    summary = Summary()
    context = multiprocessing.get_context("fork")
    number = first
    told = time.monotonic()
    while wanted(number - first):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(seed, number, folder, sender), daemon=True)
        child.start()
        sender.close()
        try:
            while wanted(number - first):
                if not receiver.poll(WALL_SECONDS):
                    child.kill()
                message = receiver.recv()
                if isinstance(message, Result):
                    _note(summary, message, seed, say)
                    number = message.number + 1
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    say(str(summary))
        except EOFError:
            child.join()
            reason = signal.Signals(-child.exitcode).name if (child.exitcode or 0) < 0 else f"exit {child.exitcode}"
            _note(summary, Result(number, f"the process died: {reason}", failed=True), seed, say)
            number += 1
        finally:
            child.kill()
            child.join()
    return summary


def _note(summary: Summary, result: Result, seed: int, say: Callable[[str], object]) -> None:
    summary.add(result)
    if result.failed:
        data, max_samples, as_file = make(seed, result.number)
        path = Path(tempfile.gettempdir(), f"fuzz_audio_{seed}_{result.number}")
        path.write_bytes(data)
        how = "as a file" if as_file else "as bytes"
        say(f"FAILED {path} ({how}, {len(data)} bytes, max_samples={max_samples}): {result.outcome}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--files", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--seed", type=int, default=None, help="of the files; without it one is drawn")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    say = functools.partial(print, flush=True)
    say(f"seed {seed}, {len(whole_files())} whole files to begin with")
    end = time.monotonic() + args.seconds
    summary = run(seed, args.first, lambda done: done < args.files and time.monotonic() < end, say)
    say(str(summary))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
