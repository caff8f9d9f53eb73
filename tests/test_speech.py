"""Seconds of speech in speech and in everything else, and that clips without enough speech open no door."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from clients import SECOND, noise, voice
from ecapa_triton import Gallery, Identification, SpeakerClient, TooLittleSpeechError, Utterance, _cli
from ecapa_triton.audio import read
from ecapa_triton.speech import speech_seconds
from fake_triton import FakeTriton
from hypothesis import given
from hypothesis import strategies as st

SAMPLES = sorted((Path(__file__).parents[1] / "samples").glob("*_*.*"))
Random = np.random.Generator


def sample(path: Path) -> np.ndarray:
    return read(path, max_samples=10 * SECOND).waveform


# --- what is not speech ---


def colored(random: Random, time: np.ndarray, exponent: float) -> np.ndarray:
    """Noise of power 1 / f**exponent: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(random.standard_normal(len(time)))
    return np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** (exponent / 2), len(time))


def tones(random: Random, time: np.ndarray) -> np.ndarray:
    count = random.integers(1, 9)
    parts = zip(random.uniform(60, 4000, count), random.uniform(0.2, 1, count), strict=True)
    return np.sum([gain * np.sin(2 * np.pi * pitch * time) for pitch, gain in parts], axis=0)


def hum(random: Random, time: np.ndarray) -> np.ndarray:
    mains = random.choice([50, 60, 100, 120])
    harmonics = range(1, 25)
    phases, gains = random.uniform(0, 6, 24), random.uniform(0.05, 1, 24) / harmonics
    waves = zip(harmonics, phases, gains, strict=True)
    return np.sum([gain * np.sin(2 * np.pi * n * mains * time + phase) for n, phase, gain in waves], axis=0)


def keys(random: Random, time: np.ndarray) -> np.ndarray:
    """The tone pairs of telephone keys, 0.1 s each, with pauses as long."""
    low, high = (
        random.choice(pitches, len(time) // 3200 + 1) for pitches in ([697, 770, 852, 941], [1209, 1336, 1477])
    )
    pairs = (np.sin(2 * np.pi * np.repeat(pitches, 3200)[: len(time)] * time) for pitches in (low, high))
    return sum(pairs) * (time % 0.2 < 0.1)


def sweep(random: Random, time: np.ndarray) -> np.ndarray:
    low, high = np.sort(random.uniform(60, 6000, 2))
    period = random.uniform(0.5, 3)
    inside = time % period
    return np.sin(2 * np.pi * (low * inside + (high - low) * inside**2 / (2 * period)))


def clicks(random: Random, time: np.ndarray) -> np.ndarray:
    return (random.uniform(size=len(time)) < random.uniform(1, 300) / SECOND).astype(float)


def pulses(random: Random, time: np.ndarray) -> np.ndarray:
    return np.diff(np.floor(random.uniform(5, 300) * time), prepend=0)


def square(random: Random, time: np.ndarray) -> np.ndarray:
    return np.sign(np.sin(2 * np.pi * random.uniform(60, 400) * time))


SOUNDS: dict[str, Callable[[Random, np.ndarray], np.ndarray]] = {
    "silence": lambda random, time: 0 * time,
    "constant": lambda random, time: 1 + 0 * time,
    "dither": lambda random, time: np.round(random.triangular(-1, 0, 1, len(time))),
    "white": lambda random, time: colored(random, time, 0),
    "pink": lambda random, time: colored(random, time, 1),
    "brown": lambda random, time: colored(random, time, 2),
    "tones": tones,
    "hum": hum,
    "keys": keys,
    "sweep": sweep,
    "clicks": clicks,
    "pulses": pulses,
    "square": square,
}
ENVELOPES: dict[str, Callable[[Random, np.ndarray], np.ndarray]] = {
    "steady": lambda random, time: 1 + 0 * time,
    "modulated": lambda random, time: 1 + np.sin(2 * np.pi * random.uniform(0.5, 8) * time),
    "bursts": lambda random, time: np.repeat(random.uniform(size=len(time) // 1600 + 1) > 0.5, 1600)[: len(time)],
}


STEADY = "tones", "sweep"  # if they also fade in and out in noise, a few of a hundred count as speech


@pytest.mark.parametrize("sound", SOUNDS)
@given(
    seed=st.integers(0, 999),
    envelope=st.sampled_from(sorted(ENVELOPES)),
    seconds=st.sampled_from([1.5, 3, 8]),
    level=st.integers(-80, 0),
    floor=st.integers(40, 90),
)
def test_other_sounds_hold_no_second_of_speech(
    sound: str, seed: int, envelope: str, seconds: float, level: int, floor: int
) -> None:
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * SECOND)) / SECOND
    clip = SOUNDS[sound](random, time) * ENVELOPES["steady" if sound in STEADY else envelope](random, time)
    clip = clip / max(abs(clip).max(), 1) + 10 ** (-floor / 20) * random.standard_normal(len(time))  # noise, dB down
    assert speech_seconds((clip * 10 ** (level / 20)).astype(np.float32)) < 1


@given(path=st.sampled_from(SAMPLES), place=st.floats(0, 1))
def test_clips_of_40_ms_are_too_short(path: Path, place: float) -> None:
    clip = sample(path)
    start = round(place * (len(clip) - 640))
    assert speech_seconds(clip[start : start + 640]) <= 0.04
    assert speech_seconds(clip[start : start + 639]) == 0 == speech_seconds(clip[:0])


# --- speech ---


def telephone(clip: np.ndarray) -> np.ndarray:
    spectrum, pitch = np.fft.rfft(clip), np.fft.rfftfreq(len(clip), 1 / SECOND)
    return np.fft.irfft(spectrum * ((pitch > 300) & (pitch < 3400)), len(clip))


def narrow(clip: np.ndarray) -> np.ndarray:
    return soxr.resample(soxr.resample(clip, SECOND, 8000), 8000, SECOND)


CHANNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clean": lambda clip: clip,
    "quiet": lambda clip: 0.01 * clip,
    "telephone": telephone,
    "8 kHz": narrow,
    "white noise": lambda clip: (
        clip + np.sqrt(np.mean(clip**2) / 10) * np.random.default_rng(0).standard_normal(len(clip))
    ),
}


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_second_and_a_half_of_speech_is_enough(path: Path, channel: str) -> None:
    clip = CHANNELS[channel](sample(path)).astype(np.float32)
    for start in 0, (len(clip) - 24_000) // 2:
        assert speech_seconds(clip[start : start + 24_000]) >= 1


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
@pytest.mark.parametrize("name", ["en-us", "de", "en-us+f2", "en-us+m3", "en-us+klatt4"])
def test_other_synthetic_voices(name: str, tmp_path: Path) -> None:
    words = "Please call Stella and ask her to bring these things with her from the store."
    subprocess.run(["espeak-ng", "-v", name, "-w", tmp_path / "clip.wav", words], check=True)
    clip = sample(tmp_path / "clip.wav")
    assert speech_seconds(clip) > 0.8 * len(clip) / SECOND and speech_seconds(clip[:24_000]) >= 1


@pytest.mark.parametrize("seconds", [1, 1.5, 5, 70])
def test_continuous_speech_has_its_length(seconds: float) -> None:
    assert seconds - 0.3 <= speech_seconds(voice(seconds, seed=1)) <= seconds


def test_long_pauses_do_not_count() -> None:
    speech, pause = voice(2), np.zeros(5 * SECOND, np.float32)
    for rest in pause, noise(5), 0.01 * noise(5):
        clip = np.concatenate([speech, rest, speech, rest])
        assert 4 <= speech_seconds(clip) <= 4 + 3 * 0.5


# --- no door is opened ---


@pytest.fixture(params=["silence", "noise", "40 ms"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A clip without enough speech."""
    clips = {"silence": np.zeros(3 * SECOND), "noise": noise(3), "40 ms": voice(1)[:640]}
    return write(tmp_path / "other.wav", clips[request.param])


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    return write(tmp_path / "speech.wav", voice(2))


def write(path: Path, clip: np.ndarray) -> Path:
    soundfile.write(path, clip, SECOND, subtype="FLOAT")
    return path


def test_verify(client: SpeakerClient, speech: Path, other: Path) -> None:
    assert client.verify(speech, speech).same
    for a, b in (speech, other), (other, speech), (other, other):
        with pytest.raises(TooLittleSpeechError, match=r"other\.wav: 0(\.04)? s of speech.* 1 s .*min_speech"):
            client.verify(a, b)
        client.verify(a, b, min_speech=0)
    with pytest.raises(TooLittleSpeechError, match=r"speech\.wav: 2 s .* 2\.5 s"):
        client.verify(speech, speech, min_speech=2.5)


def test_embed_reports_and_never_refuses(client: SpeakerClient, speech: Path, other: Path) -> None:
    without, with_speech = client.utterances([other, speech])
    assert isinstance(without, Utterance) and isinstance(with_speech, Utterance)
    assert without.speech <= 0.04 and with_speech.speech == pytest.approx(2, abs=0.2)
    assert (without.name, with_speech.name) == (str(other), str(speech))
    np.testing.assert_array_equal(client.embed(other), without.embedding)


def test_gallery(client: SpeakerClient, speech: Path, other: Path) -> None:
    gallery, good, bad = Gallery(), client.utterance(speech), client.utterance(other)
    gallery.enrol("anna", good)
    for call in (
        lambda **options: gallery.enrol("carl", bad, **options),
        lambda **options: gallery.enrol("anna", [good, bad], **options),
        lambda **options: gallery.identify(bad, **options),
        lambda **options: gallery.verify("anna", bad, **options),
    ):
        with pytest.raises(TooLittleSpeechError, match=r"other\.wav"):
            call()
        assert list(gallery) == ["anna"] and gallery.clips("anna") == 1
    found, refused = gallery.identify_many([good, bad])
    assert isinstance(found, Identification) and found.name == "anna" and isinstance(refused, TooLittleSpeechError)
    assert isinstance(next(iter(gallery.identify_many([bad], min_speech=0))), Identification)
    assert gallery.scores([bad]).shape == (1, 1)  # a measure, no decision
    gallery.enrol("carl", bad, min_speech=0)
    assert gallery.identify(bad, min_speech=0).name == "carl" and gallery.verify("carl", bad, min_speech=0).same


def test_utterances_of_unknown_speech_are_refused() -> None:
    """As one that a program makes of a stored embedding."""
    stored = Utterance(np.ones(192, np.float32), 3.0, "f" * 24, 0.45)
    with pytest.raises(TooLittleSpeechError):
        Gallery().enrol("anna", stored)


def test_commands(
    fake: FakeTriton, speech: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voices = tmp_path / "voices.npz"

    def run(*arguments: object) -> tuple[int, str, str]:
        return _cli.main([*map(str, arguments), "--url", fake.url]), *capsys.readouterr()

    assert run("verify", speech, speech)[0] == run("enrol", voices, "anna", speech)[0] == 0
    before = voices.read_bytes()
    for arguments in ["verify", other, other], ["verify", speech, other], ["enrol", voices, "carl", speech, other]:
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"ecapa-triton: {other}: 0") and "--min-speech" in err
    assert voices.read_bytes() == before
    status, out, err = run("identify", voices, other, speech)
    assert status == 2 and out.startswith(f"{speech}  anna") and str(other) in err and err.count("\n") == 1
    assert run("verify", other, other, "--min-speech", 0)[0] == 0
    assert run("enrol", voices, "carl", other, "--min-speech", 0)[0] == 0
    assert run("identify", voices, other, "--min-speech", 0)[1].startswith(f"{other}  carl")
    assert run("verify", speech, speech, "--min-speech", 2.5)[0] == 2

    status, out, err = run("embed", other, speech, "--json")
    assert (status, err) == (0, "") and [json.loads(line)["speech"] >= 1 for line in out.splitlines()] == [False, True]
    status, out, err = run("embed", other, speech, "-o", tmp_path / "out.npz")
    assert (status, err) == (0, "") and "1 of the new with less than 1 s of speech" in out
