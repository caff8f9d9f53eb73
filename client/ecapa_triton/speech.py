"""How much speech a clip holds, judged by voicing, pitch, spectrum and level, without a model.

Voices have harmonics whose spacing, the pitch, glides; meanwhile the formants change the spectrum, and syllables and
pauses the level. Noise has no harmonics, a tone has one, and those of hum, buzzes and pulses keep the pitch, the
spectrum or the level.

A frame is voiced if the autocorrelation of its amplitude spectrum peaks at a pitch period, and the spectrum is wider
than that of a tone or two. A voiced frame is speech if, within a second, pitch and spectrum change in enough of the
voiced frames and the level changes. All that is within 0.4 s of speech frames counts as speech, so that consonants and
short pauses do.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .audio import SAMPLE_RATE, Waveform

HOP = 320  # samples, 20 ms
FRAME = 2 * HOP
FFT = 1024  # bins of 15.6 Hz
BLOCK = 256  # frames in memory at a time, 5 s

PITCH = 70, 400  # Hz, of voices
VOICING_BAND = 100, 2000  # Hz; has the strongest harmonics, and a telephone transmits most of it
MIN_VOICING = 0.35  # of 1, exactly periodic, at high pitch, and about half as much at low pitch; noise has up to 0.3
PEAK_RANGE = 0.05  # of the highest amplitude, 26 dB down
MIN_BINS = 14  # within it: a tone takes 6, two take 12, a voice usually more than 20
SPECTRUM_EDGES = 100, 400, 900, 1650, 2900, 4200  # Hz; bands so wide follow formants, not single harmonics
SPECTRUM_RANGE = 30  # dB; what is weaker than the strongest band by more is taken for noise

MAX_JUMP = 0.09  # of the pitch in 20 ms, relative; peaks of noise jump
MIN_GLIDE = 0.01  # of the pitch in 40 ms, relative; hum under noise of its level rarely moves that much
MIN_CHANGE = 1.2  # dB in 40 ms, mean over the bands, without the change of the level
MIN_SHARE = 1 / 3  # of voiced frames that must glide, and that must change; speech has 0.5 and more, hum 0.15
MIN_FRAMES = 2  # that must glide, and that must change
MIN_RANGE = 10  # dB between the lowest and the highest level; speech in noise of -10 dB has 15, beating tones have 7
CONTEXT = 50  # frames to each side, 1 s, in which these are judged
REACH = 20  # frames to each side, 0.4 s, that count as speech beside a speech frame

_LAGS = np.arange(SAMPLE_RATE // PITCH[1] - 1, SAMPLE_RATE // PITCH[0] + 2)  # samples, and one more at each end
_EDGES = [round(edge * FFT / SAMPLE_RATE) for edge in SPECTRUM_EDGES]  # bins
_VOICING = np.arange(*(round(edge * FFT / SAMPLE_RATE) for edge in VOICING_BAND))  # bins
_COSINES = np.cos(2 * np.pi / FFT * np.outer(_VOICING, _LAGS))
_WINDOW = np.hanning(FRAME)
_PERIODIC = np.fft.irfft(np.abs(np.fft.rfft(_WINDOW, FFT)))  # autocorrelation of a periodic frame at its period
_THRESHOLD = MIN_VOICING * (1 + _PERIODIC[_LAGS] / _PERIODIC[0]) / 2
_DIFFERENCE = (2 * np.sin(np.pi / FFT * np.maximum(np.arange(_EDGES[-1]), 1))) ** 2  # gain of a second difference
_TINY = np.finfo(np.float64).tiny


def speech_seconds(waveform: Waveform) -> float:
    """Seconds of speech in a clip, short pauses included.

    Continuous speech has nearly the length of the clip, at any level; silence, noise, tones, hum and clicks have about
    0. Whispering does not count. Music and other sounds with moving harmonics may count.

    Args:
        waveform: float32 `[samples]`, mono, 16 kHz, finite.
    """
    starts = range(0, len(waveform) - FRAME + 1, BLOCK * HOP)
    if not starts:
        return 0.0
    blocks = [_analyse(waveform[start : start + (BLOCK - 1) * HOP + FRAME]) for start in starts]
    voiced, pitch, spectrum, level = (np.concatenate(parts) for parts in zip(*blocks, strict=True))

    run, glides, changes = np.zeros((3, len(voiced)), bool)  # run: between two voiced frames of about the same pitch
    pair = voiced[1:] & voiced[:-1] & (np.abs(np.diff(pitch)) < MAX_JUMP)
    run[1:-1] = pair[1:] & pair[:-1]
    glides[1:-1] = run[1:-1] & (np.abs(pitch[2:] - pitch[:-2]) > MIN_GLIDE)
    changes[1:-1] = run[1:-1] & (np.abs(spectrum[2:] - spectrum[:-2]).mean(axis=1) > MIN_CHANGE)

    least = np.maximum(MIN_FRAMES, MIN_SHARE * _near(run, CONTEXT))
    levels = sliding_window_view(np.pad(level, CONTEXT, mode="edge"), 2 * CONTEXT + 1)
    speech = voiced & (_near(voiced, 1) > 1) & (_near(glides, CONTEXT) >= least) & (_near(changes, CONTEXT) >= least)
    speech &= levels.max(axis=1) - levels.min(axis=1) > MIN_RANGE
    return float((_near(speech, REACH) > 0).mean() * len(waveform) / SAMPLE_RATE)


def _analyse(
    waveform: Waveform,
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Whether each frame is voiced, the log of its pitch period, its spectrum `[frames, 5]` in dB, its level in dB."""
    # The second difference keeps rumble below the bands from leaking into them.
    frames = sliding_window_view(np.diff(waveform, 2, prepend=waveform[:1].repeat(2)), FRAME)[::HOP]
    magnitude = np.abs(np.fft.rfft(frames * _WINDOW, FFT)[:, : _EDGES[-1]]) / _DIFFERENCE
    amplitude = magnitude[:, _VOICING]
    total = amplitude.sum(axis=1)
    correlation = amplitude @ _COSINES / np.maximum(total, _TINY)[:, None]

    peak = correlation.argmax(axis=1)
    inside = (peak > 0) & (peak < len(_LAGS) - 1)
    peak = peak.clip(1, len(_LAGS) - 2)
    before, at, after = (correlation[np.arange(len(peak)), peak + step] for step in (-1, 0, 1))
    vertex = (after - before) / np.maximum(2 * (2 * at - before - after), _TINY)  # of the parabola through the three
    period = _LAGS[peak] + vertex.clip(-0.5, 0.5)
    wide = (amplitude > PEAK_RANGE * amplitude.max(axis=1, keepdims=True)).sum(axis=1) >= MIN_BINS
    voiced = inside & wide & (at > _THRESHOLD[peak])

    power = np.maximum(np.add.reduceat(magnitude**2, _EDGES[:-1], axis=1), _TINY)
    spectrum = 10 * np.log10(power)
    spectrum = np.maximum(spectrum, spectrum.max(axis=1, keepdims=True) - SPECTRUM_RANGE)
    return voiced, np.log(period), spectrum - spectrum.mean(axis=1, keepdims=True), 10 * np.log10(power.sum(axis=1))


def _near(flags: NDArray[np.bool_], reach: int) -> NDArray[np.int64]:
    """For each frame, how many flags are set up to `reach` frames before and after it."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    place = np.arange(len(flags))
    counts: NDArray[np.int64] = sums[np.minimum(place + reach + 1, len(flags))] - sums[np.maximum(place - reach, 0)]
    return counts
