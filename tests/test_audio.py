"""Reading audio: formats, rates and arrays, bounded memory, and no errors but ours."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_audio
import numpy as np
import pytest
import soundfile
from ecapa_triton import (
    AudioFileError,
    AudioFormatError,
    NotAudioError,
    NotFiniteError,
)
from ecapa_triton.audio import BLOCK, read, windows
from fuzz_audio import encoded
from hypothesis import given, settings
from hypothesis import strategies as st

SECOND = 16_000
LIMIT = 30 * SECOND
ROOT = Path(__file__).parent.parent


def tone(seconds: float, rate: int = SECOND, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.05),
        ("OGG", "OPUS", 0.05),
        ("MP3", None, 0.05),
        ("AIFF", "PCM_16", 1e-4),
    ],
)
def test_formats(container: str, subtype: str | None, tolerance: float, tmp_path: Path) -> None:
    data = encoded(tone(1), SECOND, container, subtype)
    path = tmp_path / "clip.raw"  # the suffix does not matter
    path.write_bytes(data)
    from_bytes = read(data, max_samples=LIMIT)
    from_path = read(path, max_samples=LIMIT)
    np.testing.assert_array_equal(from_bytes.waveform, from_path.waveform)
    assert from_path.waveform.dtype == np.float32 and not from_path.cut
    middle = slice(2_000, 14_000)  # codecs differ at the edges
    np.testing.assert_allclose(from_bytes.waveform[middle], tone(1)[middle], atol=tolerance)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000])
def test_rates(rate: int) -> None:
    clip = read(encoded(tone(2, rate), rate, "WAV", "FLOAT"), max_samples=LIMIT)
    assert len(clip.waveform) == 2 * SECOND
    middle = slice(1_000, -1_000)
    np.testing.assert_allclose(clip.waveform[middle], tone(2)[middle], atol=1e-3)
    np.testing.assert_array_equal(read(tone(2, rate), rate, max_samples=LIMIT).waveform, clip.waveform)


def test_frequencies_above_8_khz_do_not_alias() -> None:
    clip = read(tone(1, 48_000, hertz=12_000), 48_000, max_samples=LIMIT)
    assert np.abs(clip.waveform[1_000:-1_000]).max() < 1e-3


def test_channels_are_averaged() -> None:
    left, right = tone(1), tone(1, hertz=1_000)
    stereo = np.stack([left, right], axis=1)
    np.testing.assert_allclose(read(stereo, max_samples=LIMIT).waveform, (left + right) / 2, atol=1e-7)
    file = encoded(stereo, SECOND, "WAV", "FLOAT")
    np.testing.assert_allclose(read(file, max_samples=LIMIT).waveform, (left + right) / 2, atol=1e-7)
    wide = encoded(np.repeat(left[:, None], 200, axis=1), SECOND, "WAV", "FLOAT")
    np.testing.assert_allclose(read(wide, max_samples=LIMIT).waveform, left, atol=1e-6)


def test_int16_is_divided_by_full_scale() -> None:
    samples = np.array([-32768, -1, 0, 1, 16384, 32767], np.int16)
    np.testing.assert_array_equal(read(samples, max_samples=LIMIT).waveform, (samples / 32768).astype(np.float32))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_float_arrays(kind: type) -> None:
    samples = tone(0.1).astype(kind)
    np.testing.assert_array_equal(read(samples, max_samples=LIMIT).waveform, samples.astype(np.float32))


@dataclass
class ByArray:
    """An array of another library, which NumPy takes by one protocol."""

    array: np.ndarray

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        return self.array


@dataclass
class ByDlpack:
    """Likewise."""

    array: np.ndarray

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_arrays_of_other_libraries() -> None:
    torch = pytest.importorskip("torch")
    samples = tone(0.1)
    integers = (samples * 32767).astype(np.int16)
    expected = integers.astype(np.float32) / 32768
    for audio in torch.from_numpy(integers), torch.from_numpy(integers)[None], torch.from_numpy(integers)[:, None]:
        np.testing.assert_array_equal(read(audio, max_samples=LIMIT).waveform, expected)
    for audio in ByArray(samples), ByDlpack(samples), samples[None], torch.from_numpy(samples)[None]:
        np.testing.assert_array_equal(read(audio, max_samples=LIMIT).waveform, samples)
    assert len(read(tone(2, 8_000)[None], 8_000, max_samples=LIMIT).waveform) == 2 * SECOND


def test_wrong_tensors() -> None:
    torch = pytest.importorskip("torch")
    for audio, fact in [
        (torch.zeros(SECOND, requires_grad=True), "Tensor: .*grad"),
        (torch.zeros(SECOND, device="meta"), "Tensor: "),
        (torch.zeros(SECOND, dtype=torch.bfloat16), "Tensor: .*BFloat16"),
        (torch.zeros(2, SECOND), r"float32\[2, 16000\].*transpose"),
    ]:
        with pytest.raises(AudioFormatError, match=fact):
            read(audio, max_samples=LIMIT)


def test_file_objects(tmp_path: Path) -> None:
    data = encoded(tone(1), SECOND, "FLAC")
    expected = read(data, max_samples=LIMIT).waveform
    path = tmp_path / "clip.flac"
    path.write_bytes(data)
    behind = io.BytesIO(b"head" + data)
    behind.seek(4)
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        for audio in io.BytesIO(data), behind, file, raw:
            np.testing.assert_array_equal(read(audio, max_samples=LIMIT).waveform, expected)
    with path.open("rb") as closed:
        pass
    with pytest.raises(AudioFileError, match="BufferedReader: .*closed"):
        read(closed, max_samples=LIMIT)
    with path.open(encoding="latin-1") as text, pytest.raises(AudioFormatError, match="str.*'rb'"):
        read(text, max_samples=LIMIT)  # type: ignore[arg-type]
    with path.open(encoding="ascii") as text, pytest.raises(AudioFileError, match="decode.*'rb'"):
        read(text, max_samples=LIMIT)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [SECOND, 44_100])
def test_a_cut_clip_is_the_beginning_of_the_whole(rate: int) -> None:
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.5, 0.5, 3 * rate + BLOCK).astype(np.float32)
    whole = read(samples, rate, max_samples=10**9)
    assert not whole.cut
    for limit in (1, SECOND, len(whole.waveform) - 1, len(whole.waveform)):
        clip = read(samples, rate, max_samples=limit)
        assert clip.cut == (limit < len(whole.waveform))
        np.testing.assert_array_equal(clip.waveform, whole.waveform[:limit])


@pytest.mark.parametrize(
    ("array", "rate", "fact"),
    [
        (np.zeros((2, 16_000), np.float32), None, r"float32\[2, 16000\]"),
        (np.zeros((1, 1, 16_000), np.float32), None, r"\[1, 1, 16000\]"),
        (np.array(0, np.float32), None, r"\[\]"),
        (np.zeros((16_000, 0), np.float32), None, r"\[16000, 0\]"),
        (np.zeros(16_000, np.int32), None, "int32"),
        (np.zeros(16_000, np.complex64), None, "complex64"),
        (np.zeros(16_000, np.float32), 0, "is 0, expected 4000 to 768000 Hz"),
        (np.zeros(16_000, np.float32), float("nan"), "nan"),
        (np.zeros(16_000, np.float32), "16k", "'16k'"),
        ([0.0] * 16_000, None, "list"),
        (None, None, "NoneType"),
    ],
)
def test_wrong_arrays(array: object, rate: object, fact: str) -> None:
    with pytest.raises(AudioFormatError, match=fact):
        read(array, rate, max_samples=LIMIT)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e4, -1e300])
@pytest.mark.parametrize("rate", [SECOND, 8_000])
def test_not_finite(value: float, rate: int) -> None:
    samples = np.zeros(rate)
    samples[rate // 2] = value
    with pytest.raises(NotFiniteError, match=r"float64\[\d+\].* 0\.\d+ s"):
        read(samples, rate, max_samples=LIMIT)
    with pytest.raises(NotFiniteError):
        read(encoded(samples, rate, "WAV", "DOUBLE"), max_samples=LIMIT)


def test_not_finite_behind_the_limit_does_not_matter() -> None:
    samples = np.zeros(2 * SECOND)
    samples[-1] = np.nan
    assert read(samples, max_samples=SECOND).cut


def test_wrong_files(tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("hello")
    empty = tmp_path / "empty.wav"
    empty.touch()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    flac = encoded(tone(5), SECOND, "FLAC")
    mp3 = encoded(tone(5), SECOND, "MP3")
    for audio, kind, fact in [
        (tmp_path / "none.wav", AudioFileError, r"none\.wav.*No such file"),
        (tmp_path, AudioFileError, str(tmp_path)),
        (pipe, AudioFileError, "pipe"),
        ("", AudioFileError, "''"),
        ("a\0b", AudioFileError, r"'a\\x00b'"),
        ("two\nlines", AudioFileError, r"'two\\nlines'"),
        (text, NotAudioError, r"text\.wav: .*b'hell'"),
        (empty, NotAudioError, r"empty\.wav: .*0 bytes"),
        (b"", NotAudioError, "0 bytes"),
        (b"RIFF", NotAudioError, "4 bytes"),
        (flac[: len(flac) // 2], NotAudioError, "bytes"),
        (mp3[: len(mp3) // 2], NotAudioError, r"2\.\d+ s, .* 5\.\d+ s"),
    ]:
        with pytest.raises(kind, match=fact):
            read(audio, max_samples=LIMIT)


def with_length(data: bytes, length: int) -> bytes:
    """A WAV file whose header gives this length in bytes to its samples."""
    place = data.index(b"data") + 4
    return data[:place] + length.to_bytes(4, "little") + data[place + 4 :]


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("RF64", "FLOAT")],
)
def test_a_wav_file_cut_off(container: str, subtype: str, tmp_path: Path) -> None:
    data = encoded(np.stack([tone(5)] * 2, axis=1), SECOND, container, subtype)
    path = tmp_path / "cut.wav"
    for share, fact in [
        (0.5, r"2\.\d+ s, .* 5\.\d+ s"),
        (0.89, r"4\.[45]\d s"),
    ]:
        path.write_bytes(data[: round(share * len(data))])
        for audio in (path, path.read_bytes()):
            with pytest.raises(NotAudioError, match=fact):
                read(audio, max_samples=LIMIT)
            assert read(audio, max_samples=SECOND).cut  # the part before the cut is good
    assert len(read(data[: round(0.95 * len(data))], max_samples=LIMIT).waveform) > 4.6 * SECOND
    assert len(read(data, max_samples=LIMIT).waveform) == pytest.approx(5 * SECOND, abs=2_000)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFFF00, 0x80000000])
def test_a_wav_stream_of_unknown_length(length: int) -> None:
    data = encoded(tone(1), SECOND, "WAV", "PCM_16")
    np.testing.assert_array_equal(
        read(with_length(data, length), max_samples=LIMIT).waveform, read(data, max_samples=LIMIT).waveform
    )


def test_a_wav_header_with_other_chunks_and_none() -> None:
    data = encoded(tone(1), SECOND, "WAV", "PCM_16")
    odd = b"LIST" + (5).to_bytes(4, "little") + b"data\xff\0"
    assert len(read(data[:36] + odd + data[36:], max_samples=LIMIT).waveform) == SECOND
    with pytest.raises(NotAudioError, match=r"0\.50 s, .* 1\.50 s"):
        cut = with_length(data, 3 * SECOND)[: 44 + SECOND]
        read(cut[:36] + odd + cut[36:], max_samples=LIMIT)
    with pytest.raises(NotAudioError):
        read(b"RIFF" + bytes(1_000_000), max_samples=LIMIT)


def test_the_rate_of_a_file_is_its_own() -> None:
    data = encoded(tone(1, 8_000), 8_000, "WAV")
    assert len(read(data, 8_000, max_samples=LIMIT).waveform) == SECOND
    with pytest.raises(AudioFormatError, match="8000 Hz.* 16000"):
        read(data, 16_000, max_samples=LIMIT)


def test_a_rate_out_of_range_in_a_header() -> None:
    with pytest.raises(AudioFormatError, match="rate is 1,"):
        read(encoded(tone(1), 1, "WAV"), max_samples=LIMIT)


def test_an_hour_of_silence_in_a_small_file_takes_little_memory() -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SECOND, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(60 * SECOND, np.int16))
    data = buffer.getvalue()
    assert len(data) < 1e6
    tracemalloc.start()
    clip = read(data, max_samples=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert clip.cut and clip.source_seconds == 3_600
    assert peak < 5 * LIMIT * 4


def test_a_header_that_claims_ten_hours() -> None:
    """FLAC keeps the number of samples in 36 bits at byte 21 of the file."""
    data = bytearray(encoded(tone(1), SECOND, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = (36_000 * SECOND).to_bytes(4, "big")
    tracemalloc.start()
    with pytest.raises(NotAudioError):
        read(bytes(data), max_samples=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * LIMIT * 4


def with_field(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def test_a_file_of_too_many_samples_a_second() -> None:
    """255 channels of Opus: a second of silence is 50 kB and takes two seconds to decode."""
    data = encoded(np.zeros((4_800, 255), np.float32), 48_000, "OGG", "OPUS")
    with pytest.raises(AudioFormatError, match="255 channels at 48000 Hz.* 10000000"):
        read(data, max_samples=LIMIT)


def test_a_flac_stream_of_unknown_length() -> None:
    """Its header says 0 samples, which libsndfile makes 2^63 - 1."""
    whole = encoded(tone(2), SECOND, "FLAC")
    stream = with_field(whole, 21, bytes([whole[21] & 0xF0, 0, 0, 0, 0]))
    clip = read(stream, max_samples=SECOND)
    assert clip.cut and clip.source_seconds == 0
    expected = read(whole, max_samples=LIMIT).waveform
    np.testing.assert_array_equal(read(stream, max_samples=LIMIT).waveform, expected)


def test_an_mp3_that_goes_on_behind_its_count(tmp_path: Path) -> None:
    """libsndfile would leave out the rest in silence."""
    quiet_then_loud = np.concatenate([tone(10) * 1e-4, np.random.default_rng(0).uniform(-0.5, 0.5, 10 * SECOND)])
    data = encoded(quiet_then_loud, SECOND, "MP3")
    assert len(read(data + b"TAG" + bytes(125), max_samples=LIMIT).waveform) == pytest.approx(20 * SECOND, abs=2_000)
    without_header = data[data.index(data[:2], 4) :]  # the first frame tells how many there are
    path = tmp_path / "clip.mp3"
    for damaged_data in (without_header, data + data):
        path.write_bytes(damaged_data)
        for audio in (damaged_data, path):
            with pytest.raises(NotAudioError, match=r"\d+\.\d\d s"):
                read(audio, max_samples=3 * LIMIT)
            assert read(audio, max_samples=SECOND).cut


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), st.sampled_from(fuzz_audio.LIMITS))
def test_damaged_bytes_give_a_finite_waveform_or_our_error(random: Random, max_samples: int) -> None:
    fuzz_audio.check(fuzz_audio.damaged(random), max_samples)


def test_thousands_of_damaged_files_in_bounded_time_and_memory() -> None:
    command = [sys.executable, "-m", "tests.fuzz_audio", "--seed", "0", "--files", "1500"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    counts = {kind: int(count) for kind, count in re.findall(r"(\w+) (\d+)[,\n]", run.stdout)}
    assert counts["waveform"] > 150 and counts["NotAudioError"] > 150 and counts["NotFiniteError"] > 1, run.stdout


@given(st.integers(1, 10**6), st.integers(1, 10**6).filter(lambda size: size > 1_000))
def test_windows_cover_evenly(samples: int, size: int) -> None:
    spans = windows(samples, size)
    assert len(spans) == -(-samples // size)
    assert spans[0].start == 0 and all(span.stop - span.start == size for span in spans)
    steps = np.diff([span.start for span in spans])
    if len(spans) > 1:
        assert spans[-1].stop == samples
        assert steps.max() - steps.min() <= 1 and steps.max() <= size
