"""Error rates with known answers, trial lists good and bad, and the served model beside SpeechBrain."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import grpc
import numpy as np
import pytest
import soundfile
import torch
from ecapa_triton import AudioFileError, ConnectError, EcapaError, OverloadedError, SpeakerClient, TooLongError, score
from ecapa_triton import _evaluate as evaluate
from ecapa_triton._evaluate import Curve
from ecapa_triton.errors import EvaluationError
from fake_triton import MODEL, SIZE, FakeTriton, fake_triton, good, nan, refuse
from hypothesis import given
from hypothesis import strategies as st

from server.triton import TritonServer

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples"
MINI = ROOT / "export/mini"
PHI = NormalDist().cdf

# In steps of a quarter, so that many are equal.
some = st.lists(st.integers(-4, 4).map(lambda n: n / 4), min_size=1, max_size=12)


def trials_of(targets: Sequence[float], nontargets: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels in mixed order."""
    order = np.random.default_rng(0).permutation(len(targets) + len(nontargets))
    same = np.repeat([True, False], [len(targets), len(nontargets)])
    return np.array([*targets, *nontargets], np.float64)[order], same[order]


def curve_of(targets: Sequence[float], nontargets: Sequence[float]) -> Curve:
    return evaluate.error_curve(*trials_of(targets, nontargets))


# --- numbers ---


@pytest.mark.parametrize(
    ("targets", "nontargets", "rate", "threshold"),
    [
        ([0.9, 0.8], [0.2, 0.1], 0, 0.5),  # separated: midway
        ([0.1, 0.2], [0.8, 0.9], 1, 0.5),  # the wrong way round
        ([0.5, 0.5], [0.5], 0.5, 0.5),  # all equal: a coin
        ([0.9, 0.3], [0.5, 0.1], 0.5, 0.4),  # a point with equal rates: midway to the next score
        ([0.9, 0.5], [0.5, 0.1], 0.25, 0.5),  # a tie at the crossing: half of it accepted
        ([0.9, 0.8, 0.4], [0.7, 0.3, 0.2, 0.1], 0.25, 0.4),  # misses fall from 1/3 to 0 at 1/4 false accepts
        ([0.9, 0.5, 0.5, 0.5], [0.5, 0.1], 0.3, 0.5),  # from (0, 3/4) to (1/2, 0): x = 3/4 - 3x/2
    ],
)
def test_equal_error_by_hand(targets: list[float], nontargets: list[float], rate: float, threshold: float) -> None:
    assert evaluate.equal_error(curve_of(targets, nontargets)) == pytest.approx((rate, threshold))


@given(targets=some, nontargets=some)
def test_equal_error_is_that_of_counting_at_every_threshold(targets: list[float], nontargets: list[float]) -> None:
    points = [(Fraction(0), Fraction(1))]
    for threshold in sorted({*targets, *nontargets}, reverse=True):
        accepted = Fraction(sum(x >= threshold for x in nontargets), len(nontargets))
        missed = Fraction(sum(x < threshold for x in targets), len(targets))
        points.append((accepted, missed))
    crossings = []
    for (x0, y0), (x1, y1) in pairwise(points):
        before, after = x0 - y0, x1 - y1
        if before <= 0 <= after:
            crossings.append(x0 + (x1 - x0) * before / (before - after))
    assert len(set(crossings)) == 1
    assert evaluate.equal_error(curve_of(targets, nontargets))[0] == pytest.approx(float(crossings[0]), abs=1e-12)


@given(targets=some, nontargets=some)
def test_the_curve_counts_as_verify_decides(targets: list[float], nontargets: list[float]) -> None:
    curve = curve_of(targets, nontargets)
    assert len(curve.thresholds) == len({*targets, *nontargets}) + 1
    for threshold, accepted, missed in zip(curve.thresholds, curve.false_accepts, curve.misses, strict=True):
        assert accepted == pytest.approx(np.mean(np.array(nontargets) > threshold))
        assert missed == pytest.approx(np.mean(np.array(targets) <= threshold))


def test_neighbouring_numbers_have_a_threshold_between_them() -> None:
    low = np.nextafter(0.5, 1)
    high = np.nextafter(low, 1)  # and midway rounds up
    threshold = evaluate.equal_error(curve_of([high], [low]))[1]
    assert low <= threshold < high


@given(targets=some, nontargets=some, p_target=st.sampled_from([0.01, 0.05, 0.5, 0.9]))
def test_least_cost_is_that_of_trying_every_threshold(
    targets: list[float], nontargets: list[float], p_target: float
) -> None:
    def cost(threshold: float) -> float:
        missed = sum(x <= threshold for x in targets) / len(targets)
        accepted = sum(x > threshold for x in nontargets) / len(nontargets)
        return (p_target * missed + (1 - p_target) * accepted) / min(p_target, 1 - p_target)

    found = evaluate.least_cost(curve_of(targets, nontargets), p_target)
    assert found.cost == pytest.approx(min(cost(threshold) for threshold in [-math.inf, *targets, *nontargets]))
    assert found.cost == pytest.approx(cost(found.threshold))
    assert found.misses == pytest.approx(np.mean(np.array(targets) <= found.threshold))
    assert found.false_accepts == pytest.approx(np.mean(np.array(nontargets) > found.threshold))


def test_least_cost_by_hand() -> None:
    # One false accept among 200 costs 0.99 / 0.01 / 200 = 0.495 at 0.01, and 0.95 / 0.05 / 200 = 0.095 at 0.05.
    targets, nontargets = [0.9, 0.8, 0.6, 0.2], [0.7, *[0.1] * 199]
    curve = curve_of(targets, nontargets)
    rare, frequent = evaluate.least_cost(curve, 0.01), evaluate.least_cost(curve, 0.05)
    assert (rare.cost, rare.threshold, rare.false_accepts, rare.misses) == pytest.approx((0.495, 0.15, 0.005, 0))
    assert (frequent.cost, frequent.threshold) == pytest.approx((0.095, 0.15))
    useless = evaluate.least_cost(curve_of([0.1], [0.9]), 0.01)
    assert (useless.cost, useless.threshold, useless.misses) == (1, 0.9, 1)


def test_the_highest_of_equally_cheap_thresholds_is_taken() -> None:
    # Accepting the lower target and the lower stranger together changes nothing at even odds.
    found = evaluate.least_cost(curve_of([0.9, 0.3], [0.5, 0.1]), 0.5)
    assert found.threshold == pytest.approx(0.7) and found.false_accepts == 0


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0])
def test_gaussians(distance: float) -> None:
    rng, count = np.random.default_rng(1), 200_000
    scores = np.concatenate([rng.normal(distance, 1, count), rng.normal(0, 1, count)])
    same = np.repeat([True, False], count)
    result, _ = evaluate.summarise(scores, same, distance / 2)
    expected = PHI(-distance / 2)
    deviation = math.sqrt(expected * (1 - expected) / count)
    assert result.eer == pytest.approx(expected, abs=4 * deviation)
    assert result.eer_threshold == pytest.approx(distance / 2, abs=0.02)
    assert result.decisions is not None
    assert result.decisions.false_accept_rate == pytest.approx(expected, abs=4 * deviation)
    for cost in result.min_dcf:
        prior = cost.p_target
        threshold = distance / 2 + math.log((1 - prior) / prior) / distance  # where the likelihood ratio is the odds
        least = PHI(threshold - distance) + (1 - prior) / prior * PHI(-threshold)
        assert cost.cost == pytest.approx(least, abs=0.03)


def test_decisions_count_strangers_and_misses() -> None:
    scores, same = trials_of([0.9, 0.5, 0.3], [0.6, 0.5, 0.1, 0.0])
    decisions = evaluate.decide_trials(scores, same, 0.5)  # what equals the threshold is refused
    assert (decisions.false_accepts, decisions.misses) == (1, 2)
    assert (decisions.false_accept_rate, decisions.miss_rate) == pytest.approx((1 / 4, 2 / 3))


def test_trials_are_scored_as_pairs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CHUNK", 3)
    rng = np.random.default_rng(2)
    embeddings = rng.standard_normal((5, SIZE)).astype(np.float32)
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    a, b = rng.integers(0, 5, (2, 10), dtype=np.int32)
    expected = [score(embeddings[i], embeddings[j]) for i, j in zip(a, b, strict=True)]
    np.testing.assert_allclose(evaluate.score_trials(units, a, b), expected, atol=1e-6)


# --- trial lists ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcd":
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "1 a b\n0 c a\n0 b d\n",
        "\ufefftarget a b\r\n\r\nnontarget c a\r\n \nnontarget b d",
        "a b target\nc a nontarget\nb\t d  0\n",
    ],
)
def test_trial_lists(folder: Path, text: str) -> None:
    (folder / "list").write_bytes(text.encode())
    trials = evaluate.read_trials(folder / "list", folder)
    assert trials.names == ["a", "b", "c", "d"]
    assert trials.same.tolist() == [True, False, False]
    assert (trials.a.tolist(), trials.b.tolist()) == ([0, 2, 1], [1, 0, 3])
    assert trials.a.dtype == trials.b.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 a b\n2 a b\n", "line 2: '2 a b': expected `LABEL A B` or `A B LABEL`"),
        ("1 a b\n\n0 a\n", "line 3: '0 a': expected"),
        ("1 a b c\n", "line 1: '1 a b c': expected"),
        ("a,b,1\n", "line 1: 'a,b,1': expected"),
        ("\x00\xff\x01 zip\n", "line 1: '\\\\x00.*': expected"),
        (
            "1 a b\n0 a nowhere\n0 gone a\n",
            "line 2: .*nowhere is no file \\(2 of 4 utterances are none\\): pass the folder",
        ),
        ("\n1 gone b\n0 a b\n", "line 2: .*gone is no file"),
        ("1 a b\n0 a .\n", r"line 2: .* is no file \(1 of 3 "),
        ("1 a b\n1 a c\n", "2 target and 0 nontarget trials: expected some of both"),
        ("0 a b\n", "0 target and 1 nontarget trials: expected some of both"),
        ("", "0 target and 0 nontarget trials: expected some of both"),
    ],
)
def test_bad_trial_lists(folder: Path, text: str, words: str) -> None:
    (folder / "list").write_text(text, "latin-1")
    with pytest.raises(EvaluationError, match=f"list:? {words}" if "line" in words else f"list: {words}") as caught:
        evaluate.read_trials(folder / "list", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [("none", "No such file"), ("", "Is a directory"), ("a\0", "null byte")])
def test_a_trial_list_that_is_none(folder: Path, name: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=f"cannot be read .*{words}"):
        evaluate.read_trials(folder / name, folder)


# --- the command ---


ANGLES = 0, 0.1, 0.4, 0.9, 1.1  # radians, of the trials' utterances


def angled(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    """The embedding has ten times the angle that the samples say."""
    embedding = np.zeros((1, SIZE), np.float32)
    embedding[0, :2] = 7 * math.cos(10 * waveform[0]), 7 * math.sin(10 * waveform[0])
    return good(fake, waveform) | {"embedding": embedding}


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        fake.otherwise = angled
        yield fake


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    """Of utterances at known angles: those between target ones are 0.1, 0.3, 0.5, 0, between others 0.2, 0.4, 0.8."""
    for number, angle in enumerate(ANGLES):
        soundfile.write(tmp_path / f"{number}.wav", np.full(16_000, angle / 10), 16_000, subtype="FLOAT")
    lines = [(1, 0, 1), (1, 1, 2), (1, 2, 3), (1, 3, 3), (0, 3, 4), (0, 0, 2), (0, 1, 3)]
    path = tmp_path / "trials.txt"
    path.write_text("".join(f"{label} {a}.wav {b}.wav\n" for label, a, b in lines))
    return path


def run(url: str, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--long", default="error")
    evaluate.add_arguments(parser)
    parsed = parser.parse_args([str(one) for one in arguments])
    with SpeakerClient(url, max_in_flight=parsed.in_flight, retries=0) as client:
        return evaluate.run(client, parsed)


def test_the_report(fake: FakeTriton, trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.info = (0.97, 30.0, 640.0)  # between cos 0.2 and cos 0.3
    assert run(fake.url, trials) == 0
    out = capsys.readouterr().out
    assert f"7 trials (4 target, 3 nontarget) of 5 utterances, model {MODEL}\n" in out
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines()[1:])
    assert rows["EER"] == "33.333 %"  # at the angle 0.3 misses fall from 2/4 to 1/4
    assert rows["minDCF, P_target 0.01"] == rows["minDCF, P_target 0.05"] == "0.5000"
    assert rows["at threshold"] == f"{(math.cos(0.1) + math.cos(0.2)) / 2:.4f}"  # the last of them
    assert rows["model's threshold"] == "0.97"
    assert rows["false accepts"] == "1 of 3 (33.333 %)"
    assert rows["misses"] == "2 of 4 (50.000 %)"
    assert len(fake.lengths) == 5  # once each


def test_json_and_scores(fake: FakeTriton, trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = trials.with_name("scores.txt")
    assert run(fake.url, trials, "--json", "--scores", written) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["trials"], shown["targets"], shown["nontargets"], shown["utterances"]) == (7, 4, 3, 5)
    assert (shown["model"], shown["failed_utterances"], shown["left_out_trials"]) == (MODEL, 0, 0)
    served = shown["served"]
    assert served["eer"] == pytest.approx(1 / 3) and served["eer_threshold"] == pytest.approx(math.cos(0.3))
    assert [cost["p_target"] for cost in served["min_dcf"]] == [0.01, 0.05]
    assert served["decisions"]["false_accepts"] == 3 and served["decisions"]["threshold"] == 0.45
    lines = [line.split() for line in written.read_text().splitlines()]
    assert [line[1:] for line in lines] == [line.split() for line in trials.read_text().splitlines()]
    angles = [ANGLES[int(a[0])] - ANGLES[int(b[0])] for _, _, a, b in lines]
    np.testing.assert_allclose([float(line[0]) for line in lines], np.cos(angles), atol=1e-6)


def test_a_model_without_threshold(fake: FakeTriton, trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.info = (math.nan, 30.0, 640.0)
    picture = trials.with_name("det.png")
    assert run(fake.url, trials, "--det", picture) == 0
    assert re.search("model's threshold +none\n", capsys.readouterr().out) and picture.stat().st_size > 10_000
    assert run(fake.url, trials, "--json") == 0
    assert json.loads(capsys.readouterr().out)["served"]["decisions"] is None


def test_root(fake: FakeTriton, trials: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "lists/copy.txt"
    elsewhere.parent.mkdir()
    trials.rename(elsewhere)
    with pytest.raises(EvaluationError, match=r"copy.txt line 1: .*lists/0.wav is no file \(5 of 5"):
        run(fake.url, elsewhere)
    assert not fake.lengths  # nothing was asked before the list was checked
    assert run(fake.url, elsewhere, "--root", tmp_path) == 0


def test_in_flight(fake: FakeTriton, trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fake.url, trials, "--in-flight", 1) == 0
    assert fake.most_busy == 1
    with pytest.raises(SystemExit):
        run(fake.url, trials, "--in-flight", 0)
    assert "'0': expected a whole number, 1 or more" in capsys.readouterr().err


def test_a_failed_utterance_ends_the_run(fake: FakeTriton, trials: Path) -> None:
    trials.with_name("3.wav").write_bytes(b"")
    with pytest.raises(EcapaError, match=r"3\.wav: is empty"):
        run(fake.url, trials)


def test_failed_utterances_are_left_out(fake: FakeTriton, trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials.with_name("3.wav").write_bytes(b"")
    written = trials.with_name("scores.txt")
    assert run(fake.url, trials, "--skip-failed", "--scores", written) == 0
    out, err = capsys.readouterr()
    assert "3 trials (2 target, 1 nontarget) of 3 utterances" in out
    assert "left out: 4 trials of 1 utterances that failed" in out
    assert err.count("\n") == 1 and re.match(r"ecapa-triton: .*3\.wav: is empty", err)
    assert "3.wav" not in written.read_text() and written.read_text().count("\n") == 3
    assert re.search(r"EER +0.000 %", out)
    trials.with_name("0.wav").write_bytes(b"")
    with pytest.raises(EvaluationError, match="without the 2 utterances that failed: 1 target and 0 nontarget"):
        run(fake.url, trials, "--skip-failed")


def test_a_servers_failure_names_the_utterance(
    fake: FakeTriton, trials: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    fake.answers = [angled, angled, angled, angled, busy]
    assert run(fake.url, trials, "--skip-failed", "--in-flight", 1) == 0
    assert re.match(r"ecapa-triton: .*4\.wav: the server at .* has too many", capsys.readouterr().err)
    fake.answers = [busy]
    with pytest.raises(OverloadedError):
        run(fake.url, trials)


def test_without_a_server_nothing_is_skipped(trials: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConnectError):
        run(url, trials, "--skip-failed")
    assert capsys.readouterr().err == ""


def test_no_utterance_at_all(fake: FakeTriton, trials: Path) -> None:
    fake.otherwise = nan
    with pytest.raises(EvaluationError, match="none of 5 utterances could be embedded"):
        run(fake.url, trials, "--skip-failed")


def test_two_models_do_not_mix(fake: FakeTriton, trials: Path) -> None:
    other = "f" * 24
    fake.model = lambda fake: MODEL if len(fake.lengths) < 4 else other
    with pytest.raises(EvaluationError, match=rf"3\.wav: embedded by the model {other} .* before it by {MODEL} "):
        run(fake.url, trials, "--in-flight", 1)


@pytest.mark.parametrize("option", ["--scores", "--det"])
def test_outputs_are_checked_before_the_work(fake: FakeTriton, trials: Path, tmp_path: Path, option: str) -> None:
    for bad in tmp_path, tmp_path / "none/file":
        with pytest.raises(EcapaError, match="expected the path of a file to write"):
            run(fake.url, trials, option, bad)
    assert not fake.lengths


@pytest.mark.parametrize(
    ("missing", "options", "words"),
    [
        ("sklearn", [], r"scikit-learn is not installed: pip install 'ecapa-triton\[evaluate\]'"),
        ("matplotlib", ["--det", "det.png"], r"matplotlib is not installed: pip install 'ecapa-triton\[evaluate\]'"),
        ("torch", ["--speechbrain", str(MINI)], r"pip install speechbrain torch torchaudio"),
        ("speechbrain.inference.classifiers", ["--speechbrain", str(MINI)], r"pip install speechbrain torch"),
    ],
)
def test_what_is_not_installed_is_told_before_the_work(
    fake: FakeTriton, trials: Path, monkeypatch: pytest.MonkeyPatch, missing: str, options: list[str], words: str
) -> None:
    monkeypatch.chdir(trials.parent)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EvaluationError, match=words):
        run(fake.url, trials, *options)
    assert not fake.lengths


@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "a/b/c", "~/nowhere"])
def test_no_such_checkpoint(fake: FakeTriton, trials: Path, source: str) -> None:
    with pytest.raises(EvaluationError, match=f"--speechbrain {source}: is no folder: expected one with hyperparams"):
        run(fake.url, trials, "--speechbrain", source)
    assert not fake.lengths


def test_a_folder_that_is_no_checkpoint(fake: FakeTriton, trials: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot be loaded \(.*hyperparams.yaml.*\): expected a folder with"):
        run(fake.url, trials, "--speechbrain", trials.parent)


# --- the picture ---


def size_of(picture: Path) -> tuple[int, int]:
    start = picture.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", start[16:])
    return width, height


@pytest.mark.parametrize(
    ("targets", "nontargets"),
    [([0.9, 0.8, 0.4], [0.7, 0.3, 0.2, 0.1]), ([0.9], [0.1]), ([0.1], [0.9]), ([0.5, 0.5], [0.5])],
)
def test_det_curves(tmp_path: Path, targets: list[float], nontargets: list[float]) -> None:
    scores, same = trials_of(targets, nontargets)
    result, curve = evaluate.summarise(scores, same, 0.45)
    picture = tmp_path / "det.png"
    names = "served", "SpeechBrain"
    title = "no formula: $\\frac$"
    evaluate.draw_det(picture, dict.fromkeys(names, result), dict.fromkeys(names, curve), same, title)
    assert min(size_of(picture)) >= 1000


def test_the_det_curve_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format: figures.append(figure))
    rng = np.random.default_rng(3)
    scores, same = trials_of(rng.normal(0.6, 0.15, 400), rng.normal(0.1, 0.15, 1000))
    result, curve = evaluate.summarise(scores, same, 0.45)
    evaluate.draw_det(tmp_path / "det.png", {"served": result}, {"served": curve}, same, "DET curve")
    axes = figures[0].axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert result.decisions is not None
    marked = {
        f"EER {100 * result.eer:.2f} %": (result.eer, result.eer),
        "model's threshold 0.45": (result.decisions.false_accept_rate, result.decisions.miss_rate),
    }
    for cost in result.min_dcf:
        marked[f"minDCF {cost.cost:.3f}, P_target {cost.p_target}"] = cost.false_accepts, cost.misses
    for label, rates in marked.items():
        x, y = (PHI(float(values[0])) for values in lines[label].get_data())  # back from deviates
        assert (x, y) == pytest.approx([max(rate, 0.5 / 1000) for rate in rates], rel=1e-6)
    x, y = (np.vectorize(PHI)(values) for values in lines["served"].get_data())
    np.testing.assert_allclose(x[1:-1], curve.false_accepts[1:-1].clip(0.5 / 1000), rtol=1e-6)
    np.testing.assert_allclose(y[1:-1], curve.misses[1:-1].clip(0.5 / 1000), rtol=1e-6)
    ticks = [
        (PHI(place), label.get_text()) for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    ]
    assert all(100 * rate == pytest.approx(float(label)) for rate, label in ticks[1:]) and len(ticks) > 6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("False acceptance rate, %", "Miss rate, %")


# --- the real server, beside SpeechBrain ---


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    """All pairs of the six samples."""
    names = sorted(path.name for path in SAMPLES.iterdir() if path.suffix in (".flac", ".wav"))
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    path = tmp_path / "voices.txt"
    path.write_text("".join(f"{int(a[:4] == b[:4])} {a} {b}\n" for a, b in pairs))
    return path


def test_the_deployment_lost_nothing(
    server: TritonServer, voices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--root", SAMPLES, "--speechbrain", MINI, "--det", tmp_path / "det.png"]
    assert run(server.grpc_url, voices, *options, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["targets"], shown["nontargets"]) == (3, 12)
    for system in "served", "speechbrain":
        assert shown[system]["eer"] == 0 and shown[system]["decisions"]["false_accepts"] == 0
    assert 0 < shown["difference"]["score"] < 1e-4 and shown["difference"]["cosine"] > 0.999999  # two computations
    assert shown["difference"]["decisions"] == 0
    assert min(size_of(tmp_path / "det.png")) >= 1000
    assert run(server.grpc_url, voices, *options[:-2]) == 0
    out = capsys.readouterr().out
    assert re.search(r"served +SpeechBrain\nEER +0\.000 % +0\.000 %\n", out)
    assert re.search(r"decisions that differ +0 of 15\n", out)


def test_another_checkpoint_is_told(
    server: TritonServer, voices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(MINI, tmp_path / "other"))
    weights = torch.load(other / "embedding_model.ckpt", weights_only=True)
    weights["fc.conv.weight"] = weights["fc.conv.weight"].roll(1, 0) * torch.linspace(0.5, 2, 192)[:, None, None]
    torch.save(weights, other / "embedding_model.ckpt")
    # As published folders do, it names the hub as the place of its weights.
    yaml = (other / "hyperparams.yaml").read_text()
    yaml += "    paths:\n        embedding_model: !ref <pretrained_path>/embedding_model.ckpt\n"
    (other / "hyperparams.yaml").write_text(yaml + "pretrained_path: nobody/nothing\n")
    assert run(server.grpc_url, voices, "--root", SAMPLES, "--speechbrain", other) == 1
    assert re.search(r"a score differs from SpeechBrain's by .* expected 0.001 at most", capsys.readouterr().err)


def test_speechbrain_hears_as_much_as_the_server(
    server: TritonServer,
    reference: Callable[[np.ndarray], np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = [soundfile.read(SAMPLES / f"{name}_1.flac", dtype="float32")[0] for name in ("anna", "berta")]
    anna, berta = (np.resize(part, 16_000 * 20) for part in parts)
    soundfile.write(tmp_path / "both.wav", np.concatenate([anna, berta]), 16_000)  # anna for 20 s, berta up to 40 s
    soundfile.write(tmp_path / "anna.wav", anna, 16_000)
    soundfile.write(tmp_path / "berta.wav", berta, 16_000)
    (tmp_path / "list.txt").write_text("1 anna.wav both.wav\n0 berta.wav both.wav\n")
    options = [tmp_path / "list.txt", "--speechbrain", MINI, "--json"]
    with pytest.raises(TooLongError, match="both.wav: 40.0 s long"):
        run(server.grpc_url, *options)
    assert run(server.grpc_url, *options, "--long", "truncate") == 0
    assert json.loads(capsys.readouterr().out)["difference"]["score"] < 1e-4
    # In windows the server averages two embeddings; SpeechBrain hears the recording whole.
    assert run(server.grpc_url, *options, "--long", "windows", "--scores", tmp_path / "scores.txt") == 1
    whole = reference(np.concatenate([anna, berta]))
    served = [float(line.split()[0]) for line in (tmp_path / "scores.txt").read_text().splitlines()]
    expected = max(
        abs(score(reference(clip), whole) - cosine) for clip, cosine in zip((anna, berta), served, strict=True)
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["difference"]["score"] == pytest.approx(expected, abs=1e-3)


def test_a_file_that_went_away_meanwhile(tmp_path: Path) -> None:
    embedded = evaluate.Embedded(np.ones((1, SIZE), np.float32), np.ones(1), MODEL, None)
    with pytest.raises(AudioFileError, match="gone.wav: cannot be opened"):
        evaluate.embed_by_speechbrain(None, [str(tmp_path / "gone.wav")], embedded)
