"""Calibration error against closed forms, loops written out by hand, and synthetic models of known calibration."""

import math

import numpy as np
import pytest

from harness.contracts import intervals
from harness.contracts.record import Sample
from harness.errors import BrokenModel
from tasks.probes.confidence import (
    CalibrationErrorTask,
    brier,
    calibration_error,
    equal_mass,
    equal_width,
    made_up,
    probabilities,
)


def by_hand(confidence: list[float], right: list[float], bins: int) -> float:
    """Guo et al.'s equation 3 with loops: bins (0, 1/M], (1/M, 2/M], ..."""
    total = 0.0
    for m in range(bins):
        own = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins]
        if own:
            total += abs(sum(confidence[i] - right[i] for i in own))
    return total / len(confidence)


def test_probabilities_are_a_softmax_that_does_not_overflow() -> None:
    assert probabilities([math.log(0.5), math.log(0.3), math.log(0.2)]) == pytest.approx([0.5, 0.3, 0.2])
    assert probabilities([-2000.0, -2000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])
    for bad in ([1.0], [math.nan, 0.0], [-math.inf, 0.0]):
        with pytest.raises(ValueError, match="at least two choices"):
            probabilities(bad)


def test_brier_score_of_several_choices() -> None:
    assert brier([1.0, 0.0, 0.0], 0) == 0.0 and brier([1.0, 0.0, 0.0], 1) == 2.0
    assert brier([0.25] * 4, 2) == pytest.approx(0.75**2 + 3 * 0.25**2)
    with pytest.raises(ValueError, match="none of 2 choices"):
        brier([0.5, 0.5], 2)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_error_is_the_sum_over_bins(bins: int) -> None:
    generator = np.random.default_rng(3)
    confidence = generator.uniform(0.25, 1, 200)
    right = (generator.random(200) < confidence**2).astype(float)
    found = calibration_error(confidence, right, equal_width(confidence, bins))
    assert found.value == pytest.approx(by_hand(confidence.tolist(), right.tolist(), bins))
    assert found.low <= found.value <= found.high and found.chance_low <= found.chance <= found.chance_high


def test_closed_forms() -> None:
    # Four answers of 0.8 of which two are right, and six of 0.5 of which three are.
    confidence, right = [0.8] * 4 + [0.5] * 6, [1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    assert calibration_error(confidence, right, equal_width(confidence)).value == pytest.approx(0.4 * 0.3)
    assert calibration_error([1.0] * 5, [1] * 5, equal_width([1.0] * 5)).value == 0.0
    certain = calibration_error([1.0] * 5, [1, 1, 1, 1, 0], equal_width([1.0] * 5))
    assert certain.value == pytest.approx(0.2) and certain.chance == certain.chance_high == 0.0
    one = calibration_error([0.7], [1], equal_width([0.7]))
    assert one.value == pytest.approx(0.3) and one.chance == pytest.approx(2 * 0.7 * 0.3, abs=0.02)


def test_a_domain_without_a_mistake_leaves_room_for_one() -> None:
    confidence, right = np.full(100, 0.999), np.ones(100)
    found = calibration_error(confidence, right, equal_width(confidence))
    assert found.value == pytest.approx(0.001) and found.low == 0.0
    assert 0.01 < found.high < intervals.wilson(0, 100)[1], "about what one mistake more would change"
    assert made_up([0.9, 0.7, 0.2], np.array([3, 3, 1])).tolist() == pytest.approx([-0.2, 0.8])
    perfect = [sample(str(i), [0.997, 0.001, 0.001, 0.001], 0) for i in range(100)]
    score = next(s for s in CalibrationErrorTask().run_on(perfect).scores if s.metric == "overconfidence")
    assert score.value == pytest.approx(-0.003) and score.low <= score.value and score.high > 0.01


def test_bins_hold_their_upper_edge_and_equal_mass_bins_the_same_number() -> None:
    assert equal_width([0.0, 0.25, 0.26, 0.5, 1.0], 4).tolist() == [0, 0, 1, 1, 3]
    generator = np.random.default_rng(0)
    values = generator.permutation(np.linspace(0.3, 1, 47))
    counts = np.bincount(equal_mass(values, 15))
    assert len(counts) == 15 and set(counts) == {3, 4}
    order = np.argsort(values)
    assert (np.diff(equal_mass(values, 15)[order]) >= 0).all()
    assert np.bincount(equal_mass([0.2, 0.9], 15)).tolist() == [1, 1]


def test_equal_confidences_share_a_bin_in_whatever_order_they_come() -> None:
    tied = np.array([1.0] * 40 + [0.4] * 5)
    right = np.array([0.0, 1.0] * 20 + [1.0] * 5)
    errors = set()
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(45)
        places = equal_mass(tied[order])
        assert len(set(places[tied[order] == 1.0])) == 1
        errors.add(round(calibration_error(tied[order], right[order], places).value, 12))
    assert errors == {round((40 * 0.5 + 5 * 0.6) / 45, 12)}


def calibrated(seed: int, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of a model that is right with exactly its confidence less ``shift``, and its outcomes."""
    generator = np.random.default_rng(seed)
    confidence = 0.25 + 0.75 * generator.beta(3, 1.5, n)
    return confidence, (generator.random(n) < np.clip(confidence - shift, 0, 1)).astype(float)


@pytest.mark.parametrize("bins", [equal_width, equal_mass])
def test_a_perfectly_calibrated_set_has_an_error_of_zero_within_sampling_error(bins) -> None:
    inside = 0
    for seed in range(60):
        confidence, right = calibrated(seed, 400)
        found = calibration_error(confidence, right, bins(confidence), seed, resamples=400)
        assert found.low == 0.0, "zero is in the interval"
        inside += found.chance_low <= found.value <= found.chance_high
    assert inside >= 52  # 95 % of 60 is 57; fewer than 52 has a probability below 1 %
    confidence, right = calibrated(1, 200_000)
    assert calibration_error(confidence, right, bins(confidence), resamples=20).value < 0.006


def test_a_badly_calibrated_set_is_told_apart_and_the_interval_holds_its_error() -> None:
    covered = 0
    for seed in range(40):
        confidence, right = calibrated(seed, 800, shift=0.15)
        found = calibration_error(confidence, right, equal_width(confidence), seed, resamples=400)
        assert found.low > 0 and found.value > found.chance_high
        covered += found.low <= 0.15 <= found.high
    assert covered >= 36


def test_what_cannot_be_scored_is_refused() -> None:
    for confidence, right in (([math.nan], [1]), ([1.2], [1]), ([0.5], [0.5]), ([0.5, 0.5], [1]), ([], [])):
        with pytest.raises(ValueError, match="calibration error needs"):
            calibration_error(confidence, right, np.zeros(len(confidence), dtype=int))


def sample(item: str, chances: list[float], answer: int, domain: str = "math", task: str = "multiple_choice") -> Sample:
    detail = {"logprobs": [math.log(p) - 7 for p in chances], "answer": answer}
    return Sample(task, item, 0.0, domain=domain, detail=detail)


GIVEN = [
    sample("a", [0.7, 0.1, 0.1, 0.1], 0),
    sample("b", [0.1, 0.7, 0.1, 0.1], 0),
    sample("c", [0.4, 0.2, 0.2, 0.2], 0, "code"),
    sample("d", [0.2, 0.2, 0.2, 0.4], 3, "code"),
    sample("e", [0.9, 0.1], 1, task="another"),
    Sample("code", "f", 1.0, output="return 1"),
]


def test_the_task_scores_each_domain_and_all() -> None:
    result = CalibrationErrorTask().run_on(GIVEN)
    scores = {(s.metric, s.part): s for s in result.scores}
    assert {domain for _, domain in scores if not domain.startswith("confidence")} == {"", "math", "code"}
    assert scores["ece", "math"].value == pytest.approx(0.2) and scores["ece", "code"].value == pytest.approx(0.6)
    assert scores["ece", ""].value == pytest.approx(0.4) and scores["ece", ""].n == 4
    assert scores["overconfidence", "math"].value == pytest.approx(0.2)
    assert scores["overconfidence", "code"].value == pytest.approx(-0.6)
    briers = [brier([0.7, 0.1, 0.1, 0.1], 0), brier([0.1, 0.7, 0.1, 0.1], 0), *[brier([0.4, 0.2, 0.2, 0.2], 0)] * 2]
    assert scores["brier", ""].value == pytest.approx(np.mean(briers))
    assert [s.score for s in result.samples] == pytest.approx(briers)
    assert [s.item for s in result.samples] == ["a", "b", "c", "d"] and result.samples[0].domain == "math"
    assert result.samples[1].detail == {"confidence": pytest.approx(0.7), "right": 0.0}
    assert all(s.low <= s.value <= s.high for s in result.scores)


def test_the_reliability_diagram_is_in_the_scores() -> None:
    scores = {(s.metric, s.part): s for s in CalibrationErrorTask(bins=10).run_on(GIVEN).scores}
    bins = {domain for metric, domain in scores if metric == "reliability"}
    assert bins == {"confidence 0.300-0.400", "confidence 0.600-0.700"}, "empty bins have no score"
    share = scores["reliability", "confidence 0.600-0.700"]
    assert (share.value, share.n) == (0.5, 2) and (share.low, share.high) == intervals.wilson(1, 2)
    assert scores["reliability_confidence", "confidence 0.600-0.700"].value == pytest.approx(0.7)
    gap = sum(
        scores["reliability", b].n * abs(scores["reliability", b].value - scores["reliability_confidence", b].value)
        for b in bins
    )
    assert gap / 4 == pytest.approx(scores["ece", ""].value)


def test_several_sources_are_the_domains_and_lm_eval_s_target_is_the_answer() -> None:
    target = Sample("arc", "x", 1.0, domain="arc_easy", detail={"logprobs": [0.0, -1.0], "target": 0})
    text = Sample("arc", "y", 1.0, domain="arc_easy", detail={"logprobs": [0.0, -1.0], "target": "a text"})
    result = CalibrationErrorTask(sources=("multiple_choice", "arc")).run_on([*GIVEN, target, text])
    assert {s.domain for s in result.samples} == {"multiple_choice", "arc"} and len(result.samples) == 5


def test_nothing_answered_gives_no_scores_and_nan_is_a_broken_model() -> None:
    nothing = CalibrationErrorTask().run_on(GIVEN[4:])
    assert nothing.scores == [] and nothing.samples == []
    broken = Sample("multiple_choice", "z", 0.0, detail={"logprobs": [math.nan, 0.0], "answer": 0})
    with pytest.raises(BrokenModel, match="calibration_error: z: .*check the weights"):
        CalibrationErrorTask().run_on([broken])
