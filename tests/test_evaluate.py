"""Error rates against counting, trial lists good and bad, `ecapa-triton evaluate`, `export verify --trials`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import grpc
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from ecapa_triton import EvaluationError, NotAudioError, _cli, score, trials
from fake_triton import MODEL, SIZE, FakeTriton, good, nan, refuse
from hypothesis import given
from hypothesis import strategies as st

from export import checkpoint
from export.__main__ import main as export_main
from export.artifacts import ExportedModel
from export.trials import compare, verify
from export.verify import Reference, VerificationError
from server import TritonServer

SAMPLES = ROOT / "samples"
PHI = NormalDist().cdf

# In steps of a quarter, so that many are equal.
some = st.lists(st.integers(-4, 4).map(lambda n: n / 4), min_size=1, max_size=12)


def curve_of(targets: Sequence[float], nontargets: Sequence[float]) -> trials.Curve:
    order = np.random.default_rng(0).permutation(len(targets) + len(nontargets))
    same = np.repeat([True, False], [len(targets), len(nontargets)])
    return trials.curve(np.array([*targets, *nontargets], np.float64)[order], same[order])


def share(values: Sequence[float], threshold: float) -> float:
    """Of the values, how many are accepted."""
    return sum(value > threshold for value in values) / len(values)


# --- error rates ---


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
    assert curve_of(targets, nontargets).equal_error() == pytest.approx((rate, threshold))


@given(targets=some, nontargets=some)
def test_equal_error_by_counting(targets: list[float], nontargets: list[float]) -> None:
    points = [(Fraction(0), Fraction(1))]
    for threshold in sorted({*targets, *nontargets}, reverse=True):
        accepted = Fraction(sum(x >= threshold for x in nontargets), len(nontargets))
        missed = Fraction(sum(x < threshold for x in targets), len(targets))
        points.append((accepted, missed))
    crossings = set()
    for (x0, y0), (x1, y1) in pairwise(points):
        before, after = x0 - y0, x1 - y1
        if before <= 0 <= after:
            crossings.add(x0 + (x1 - x0) * before / (before - after))
    (rate,) = crossings
    assert curve_of(targets, nontargets).equal_error()[0] == pytest.approx(float(rate), abs=1e-12)


@given(targets=some, nontargets=some, threshold=st.integers(-9, 9).map(lambda n: n / 8))
def test_every_threshold_by_counting(targets: list[float], nontargets: list[float], threshold: float) -> None:
    """The curve, the decisions and the smallest cost, with `score > threshold` as in `SpeakerClient.verify`."""

    def cost(threshold: float) -> float:
        return (p_target * (1 - share(targets, threshold)) + (1 - p_target) * share(nontargets, threshold)) / p_target

    curve = curve_of(targets, nontargets)
    assert len(curve.misses) == len({*targets, *nontargets}) + 1
    for point, (accepted, missed) in enumerate(zip(curve.false_accepts, curve.misses, strict=True)):
        assert accepted == pytest.approx(share(nontargets, curve.threshold(point)))
        assert missed == pytest.approx(1 - share(targets, curve.threshold(point)))
    decided = curve.decide(threshold)
    assert decided.false_accepts == sum(x > threshold for x in nontargets)
    assert decided.misses == sum(x <= threshold for x in targets)
    assert decided.false_accept_rate == pytest.approx(share(nontargets, threshold))
    assert decided.miss_rate == pytest.approx(1 - share(targets, threshold))
    for p_target in 0.01, 0.05, 0.5:
        least = curve.least_cost(p_target)
        assert least.cost == pytest.approx(min(map(cost, [-math.inf, *targets, *nontargets])))
        assert least.cost == pytest.approx(cost(least.threshold))
        assert (least.false_accepts, 1 - least.misses) == pytest.approx(
            (share(nontargets, least.threshold), share(targets, least.threshold))
        )


def test_least_cost_by_hand() -> None:
    # One false accept among 200 costs 0.99 / 0.01 / 200 = 0.495 at 0.01, and 0.95 / 0.05 / 200 = 0.095 at 0.05.
    figures = curve_of([0.9, 0.8, 0.6, 0.2], [0.7, *[0.1] * 199]).figures(0.65)
    rare, frequent = figures.min_dcf
    assert (rare.cost, rare.threshold, rare.false_accepts, rare.misses) == pytest.approx((0.495, 0.15, 0.005, 0))
    assert (frequent.cost, frequent.threshold) == pytest.approx((0.095, 0.15))
    assert figures.decisions is not None and (figures.decisions.false_accepts, figures.decisions.misses) == (1, 2)
    useless = curve_of([0.1], [0.9]).least_cost(0.01)
    assert (useless.cost, useless.threshold, useless.misses) == (1, 0.9, 1)
    # At even odds, accepting the lower target and the higher nontarget together changes nothing: the highest threshold.
    assert curve_of([0.9, 0.3], [0.5, 0.1]).least_cost(0.5).threshold == pytest.approx(0.7)


def test_cosines_are_scores_of_pairs() -> None:
    rng = np.random.default_rng(2)
    embeddings = rng.standard_normal((5, SIZE)).astype(np.float32)
    pairs = rng.integers(0, 5, (20_000, 2), dtype=np.int32)  # in several chunks
    table = [[score(a, b) for b in embeddings] for a in embeddings]
    np.testing.assert_allclose(trials.cosines(embeddings, pairs), [table[a][b] for a, b in pairs], atol=1e-6)


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
    listed = trials.read(folder / "list", folder)
    assert listed.names == ["a", "b", "c", "d"] and listed.paths == [str(folder / name) for name in "abcd"]
    assert listed.same.tolist() == [True, False, False]
    assert listed.pairs.tolist() == [[0, 1], [2, 0], [1, 3]]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("1 a b\n2 a b\n", "line 2: '2 a b'"),
        ("1 a b\n\n0 a\n", "line 3: '0 a'"),
        ("1 a b c\n", "line 1: '1 a b c'"),
        ("a,b,1\n", "line 1: 'a,b,1'"),
        ("\x00\xff\x01 zip\n", "line 1: "),
        ("1 a b\n0 a nowhere\n0 gone a\n", ".*/nowhere .*2 of 4"),
        ("1 a b\n0 a .\n", r".*/\. .*1 of 3"),
        ("1 a b\n1 a c\n", "2 target and 0 nontarget"),
        ("0 a b\n", "0 target and 1 nontarget"),
        ("", "0 target and 0 nontarget"),
    ],
)
def test_bad_trial_lists(folder: Path, text: str, facts: str) -> None:
    (folder / "list").write_text(text, "latin-1")
    with pytest.raises(EvaluationError, match=f"/list:? {facts}") as caught:
        trials.read(folder / "list", folder)
    assert "\n" not in str(caught.value)
    for unreadable in "none", "", "a\0":
        with pytest.raises(EvaluationError):
            trials.read(folder / unreadable, folder)


# --- the command ---


ANGLES = 0, 0.1, 0.4, 0.9, 1.1  # radians, of the clips of the list below
Evaluate = Callable[..., tuple[int, str, str]]


def angled(fake: FakeTriton, waveform: np.ndarray) -> dict[str, np.ndarray]:
    """An embedding at ten times the angle that the samples name."""
    embedding = np.zeros((1, SIZE), np.float32)
    embedding[0, :2] = 7 * math.cos(10 * waveform[0]), 7 * math.sin(10 * waveform[0])
    return good(fake, waveform) | {"embedding": embedding}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Clips at known angles: those between target ones are 0.1, 0.3, 0.5, 0, between nontarget ones 0.2, 0.4, 0.8."""
    for number, angle in enumerate(ANGLES):
        soundfile.write(tmp_path / f"{number}.wav", np.full(16_000, angle / 10), 16_000, subtype="FLOAT")
    lines = [(1, 0, 1), (1, 1, 2), (1, 2, 3), (1, 3, 3), (0, 3, 4), (0, 0, 2), (0, 1, 3)]
    path = tmp_path / "trials.txt"
    path.write_text("".join(f"{label} {a}.wav {b}.wav\n" for label, a, b in lines))
    return path


@pytest.fixture
def evaluate(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    fake.otherwise = angled

    def evaluate(*arguments: object, url: str | None = None) -> tuple[int, str, str]:
        options = ["--url", url or fake.url, "--retries", "0", "--in-flight", "1"]
        status = _cli.main(["evaluate", *options, *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return evaluate


def test_the_report(fake: FakeTriton, evaluate: Evaluate, listed: Path) -> None:
    fake.info = (0.97, 30.0, 640.0)  # between cos 0.2 and cos 0.3
    status, out, _ = evaluate(listed)
    first, *lines = out.splitlines()
    assert status == 0 and MODEL in first and re.findall(r"\b\d+\b", first) == ["7", "4", "3", "5"]
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)
    assert rows["EER"] == "33.333 %"  # at the angle 0.3 misses fall from 2/4 to 1/4
    assert rows["minDCF, P_target 0.01"] == rows["minDCF, P_target 0.05"] == "0.5000"
    assert rows["at threshold"] == f"{(math.cos(0.1) + math.cos(0.2)) / 2:.4f}"  # the last of them
    assert rows["model's threshold"] == "0.97"
    assert rows["false accepts"] == "1 of 3 (33.333 %)"
    assert rows["misses"] == "2 of 4 (50.000 %)"
    assert len(fake.lengths) == 5 and fake.most_busy == 1  # once each


def test_json_and_scores(fake: FakeTriton, evaluate: Evaluate, listed: Path) -> None:
    written = listed.with_name("scores.txt")
    facts = json.loads(evaluate(listed, "--json", "--scores", written)[1])
    served = facts.pop("served")
    counts = {"trials": 7, "targets": 4, "nontargets": 3, "utterances": 5, "failed_utterances": 0, "left_out_trials": 0}
    assert facts == counts | {"model": MODEL}
    assert served["eer"] == pytest.approx(1 / 3) and served["eer_threshold"] == pytest.approx(math.cos(0.3))
    assert [cost["p_target"] for cost in served["min_dcf"]] == [0.01, 0.05]
    assert served["decisions"]["false_accepts"] == 3 and served["decisions"]["threshold"] == 0.45
    lines = [line.split() for line in written.read_text().splitlines()]
    assert [line[1:] for line in lines] == [line.split() for line in listed.read_text().splitlines()]
    angles = [ANGLES[int(a[0])] - ANGLES[int(b[0])] for _, _, a, b in lines]
    np.testing.assert_allclose([float(line[0]) for line in lines], np.cos(angles), atol=1e-6)
    fake.info = (math.nan, 30.0, 640.0)
    assert json.loads(evaluate(listed, "--json")[1])["served"]["decisions"] is None
    assert evaluate(listed)[0] == 0


def test_failed_clips(fake: FakeTriton, evaluate: Evaluate, listed: Path) -> None:
    listed.with_name("3.wav").write_bytes(b"")
    written = listed.with_name("scores.txt")
    status, out, err = evaluate(listed, "--scores", written)
    assert (status, out) == (2, "") and "3.wav" in err and not written.exists()
    status, out, err = evaluate(listed, "--skip-failed", "--json", "--scores", written)
    assert status == 0 and "3.wav" in err and err.count("\n") == 1
    assert "3.wav" not in written.read_text() and written.read_text().count("\n") == 3
    facts = json.loads(out)
    assert (facts["trials"], facts["left_out_trials"], facts["failed_utterances"]) == (3, 4, 1)
    assert (facts["targets"], facts["nontargets"], facts["utterances"], facts["served"]["eer"]) == (2, 1, 3, 0)


def test_failures_of_the_server(fake: FakeTriton, evaluate: Evaluate, listed: Path) -> None:
    busy = refuse(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    fake.answers = [angled, angled, angled, angled, busy]
    status, _, err = evaluate(listed, "--skip-failed")
    assert status == 0 and "4.wav" in err
    fake.answers = [busy]
    status, _, err = evaluate(listed)
    assert status == 2 and "0.wav" in err
    status, _, err = evaluate(listed, "--skip-failed", url="127.0.0.1:9")  # hopeless: the list ends at once
    assert status == 2 and "127.0.0.1:9" in err and err.count("\n") == 1
    fake.model = lambda fake: MODEL if len(fake.lengths) % 5 else "f" * 24  # from the fifth clip on
    fake.lengths.clear()
    status, _, err = evaluate(listed, "--skip-failed")
    assert status == 2 and "4.wav" in err and "f" * 24 in err and MODEL in err
    fake.otherwise = nan
    status, _, err = evaluate(listed, "--skip-failed")
    assert status == 2 and err.count("\n") == 6  # one for each clip, one for the end


@pytest.mark.parametrize(
    "options",
    [["--scores", "."], ["--det", "none/det.png"], ["--scores", "0.wav"], ["--scores", "trials.txt"]]
    + [["--scores", "x.png", "--det", "./x.png"], ["--det", "x.pdf"]],
)
def test_impossible_outputs_are_rejected_before_the_work(
    fake: FakeTriton, evaluate: Evaluate, listed: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(listed.parent)
    before = listed.with_name("0.wav").read_bytes()
    status, _, err = evaluate("trials.txt", *options)
    assert status == 2 and str(Path(options[-1])) in err and not fake.lengths
    assert listed.with_name("0.wav").read_bytes() == before


@pytest.mark.parametrize("missing", ["sklearn.metrics", "matplotlib.figure"])
def test_a_missing_extra_is_reported_before_the_work(
    fake: FakeTriton, evaluate: Evaluate, listed: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = evaluate(listed, "--det", listed.with_name("det.png"))
    assert status == 2 and "[evaluate]" in err and not fake.lengths


@pytest.mark.parametrize("text", [None, "1 0.wav 1.wav\n0 0.wav 4.wav\n", "1 0.wav 4.wav\n0 0.wav 1.wav\n"])
def test_det_plot(evaluate: Evaluate, listed: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    odd, picture = listed.with_name("$\\frac$.txt"), listed.with_name("det.png")  # in the title, where it is no formula
    odd.write_text(text or listed.read_text())
    assert evaluate(odd, "--det", picture)[0] == 0 and picture.read_bytes().startswith(b"\x89PNG")
    if text:
        return
    (axes,) = figures[0].axes
    curve, *marks = axes.lines
    least, most = PHI(axes.get_xlim()[0]), PHI(axes.get_xlim()[1])  # stand for rates of 0 and 1
    assert 0 < least < 0.001 < 0.5 < most < 1
    labels = [float(label.get_text()) for label in axes.get_xticklabels()]
    np.testing.assert_allclose(labels, [100 * PHI(place) for place in axes.get_xticks()])
    x, y = (np.vectorize(PHI)(values) for values in curve.get_data())
    np.testing.assert_allclose(x, np.clip([0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1], least, most))
    np.testing.assert_allclose(y, np.clip([1, 3 / 4, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 0, 0], least, most))
    points = {str(mark.get_label()): tuple(PHI(float(value[0])) for value in mark.get_data()) for mark in marks}
    assert points["EER 33.33 %"] == pytest.approx((1 / 3, 1 / 3))
    assert points["model's threshold 0.45"] == pytest.approx((most, least))
    assert points["minDCF 0.500, P_target 0.01"] == pytest.approx((least, 0.5))


# --- the real model, served and exported, beside SpeechBrain ---


def test_exported_and_served_models(
    both_formats: Path, server: TritonServer, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(evaluate(SAMPLES / "trials.txt", "--json", url=server.grpc_url)[1])
    assert (facts["targets"], facts["nontargets"], facts["served"]["eer"]) == (3, 12, 0)
    assert facts["served"]["decisions"]["false_accepts"] == facts["served"]["decisions"]["misses"] == 0

    elsewhere = tmp_path / "lists/trials.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes((SAMPLES / "trials.txt").read_bytes())
    command = ["verify", "--repository", str(both_formats), "--trials", str(elsewhere)]
    assert evaluate(elsewhere)[0] == 2 and export_main(command) == 1  # the clips are not beside the list
    assert evaluate(elsewhere, "--root", SAMPLES, url=server.grpc_url)[0] == 0
    capsys.readouterr()
    assert export_main([*command, "--root", str(SAMPLES)]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"EER +0\.000 % +0\.000 %", out)) == 5
    single, half, int8, *_ = (float(value) for value in re.findall(r"difference +(\S+)", out))
    assert 0 < single < 1e-5 < half < 1e-3 < int8 < 0.1
    with pytest.raises(SystemExit):
        export_main(["export", "--trials", str(elsewhere)])


@pytest.mark.parametrize(
    "change",
    [
        lambda embeddings: embeddings.roll(1, -1),  # keeps every score
        lambda embeddings: embeddings * torch.linspace(0.98, 1.02, SIZE),  # keeps the cosines to 0.9999
    ],
)
def test_another_checkpoint_is_out_of_bounds(
    repository: Path,
    mini: checkpoint.Checkpoint,
    change: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Another:
        def encode_batch(self, waveforms: torch.Tensor) -> torch.Tensor:
            return change(mini.classifier.encode_batch(waveforms))

    model = ExportedModel(repository / "ecapa/1/model.onnx")
    listed = trials.read(SAMPLES / "trials.txt", SAMPLES)
    result = compare(model, Reference(mini.classifier), listed)
    assert result.difference < 1e-5 and result.cosine > 0.999999
    monkeypatch.setattr("export.trials.BATCH", 100_000)
    assert compare(model, Reference(mini.classifier), listed).exported.eer_threshold == pytest.approx(
        result.exported.eer_threshold, abs=1e-5
    )
    result = compare(model, Reference(Another()), listed)
    assert (result.difference > 1e-3) != (result.cosine < 0.9999)
    with pytest.raises(VerificationError, match=rf"{result.difference:.1e}.*{result.cosine:.6f}"):
        print(*verify(model, Reference(Another()), listed))


def test_int8_is_judged_by_its_error_rate(
    both_formats: Path, mini: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ExportedModel(both_formats / "ecapa/1/model_int8.onnx")
    listed = trials.read(SAMPLES / "trials.txt", SAMPLES)
    lines = list(verify(model, Reference(mini.classifier), listed))
    assert any(line.startswith("threshold at the EER") for line in lines)
    monkeypatch.setattr("export.trials.INT8_MAX_EER_RISE", -0.001)
    with pytest.raises(VerificationError, match="EER in int8"):
        list(verify(model, Reference(mini.classifier), listed))


def test_clips_at_the_limits_of_the_model(repository: Path, mini: checkpoint.Checkpoint, tmp_path: Path) -> None:
    anna, berta = (
        np.resize(soundfile.read(SAMPLES / f"{name}_1.flac", dtype="float32")[0], 16_000 * 20)
        for name in ("anna", "berta")
    )
    for name, clip in ("both", np.concatenate([anna, berta])), ("anna", anna), ("berta", berta), ("short", anna[:639]):
        soundfile.write(tmp_path / f"{name}.wav", clip, 16_000)
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    model, reference = ExportedModel(repository / "ecapa/1/model.onnx"), Reference(mini.classifier)

    def difference(text: str) -> float:
        (tmp_path / "list.txt").write_text(text)
        return compare(model, reference, trials.read(tmp_path / "list.txt", tmp_path)).difference

    assert difference("1 anna.wav both.wav\n0 berta.wav both.wav\n") < 1e-4  # both embed the first 30 s of 40
    with pytest.raises(VerificationError, match=r"short\.wav: 639 "):
        difference("1 anna.wav short.wav\n0 berta.wav short.wav\n")
    with pytest.raises(NotAudioError, match=r"bad\.wav"):
        difference("1 anna.wav bad.wav\n0 berta.wav bad.wav\n")
