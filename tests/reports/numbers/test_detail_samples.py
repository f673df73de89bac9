"""Scores that are paired on what a task keeps in the detail of its samples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from harness.contracts.record import Sample, Score
from harness.records.store import RecordStore
from reports.numbers.contrasts import Comparer, Term
from reports.numbers.detail_samples import samples_of_score, with_detail_samples
from reports.numbers.load import Panel, load_panels
from reports.numbers.statistics import Measure, Part
from tasks.probes.confidence import calibration_error, equal_width
from tests.reports.synthetic import BASELINE, RIGHT, make_cell

ECE, SPAN = Part("calibration_error", "ece"), Part("drift", "js", "position 2-3")
QUESTIONS = 200


def write(folder: Path, kind: str, method: str, ratio: float, seed: int, told: bool = True) -> dict[str, float]:
    """A cell with made-up confidences and divergences; the scores that its tasks would record."""
    random = np.random.default_rng(seed)
    sure = random.uniform(0.3, 1, QUESTIONS)
    right = (random.uniform(size=QUESTIONS) < 0.8 * sure).astype(float)
    curves = [random.uniform(size=length).tolist() for length in (1, 2, 3, 5, 8)]
    found = calibration_error(sure, right, equal_width(sure), resamples=50)
    late = float(np.mean([np.mean(curve[1:3]) for curve in curves if len(curve) > 1]))
    samples = [
        Sample("calibration_error", f"q{i}", 0.0, detail={"confidence": s, "right": r} if told else {})
        for i, (s, r) in enumerate(zip(sure, right, strict=True))
    ] + [Sample("drift", f"t{i}", 0.0, detail={"js": curve} if told else {}) for i, curve in enumerate(curves)]
    scores = [
        Score("calibration_error", "ece", found.value, QUESTIONS, found.low, found.high),
        Score("drift", "js", late, 4, late - 0.1, late + 0.1, "position 2-3"),
    ]
    record, own = make_cell(method, ratio, "mixed", 0, BASELINE if method == "none" else RIGHT["reap"][0.5])
    RecordStore(folder, kind).write(replace(record, scores=[*record.scores, *scores]), [*own, *samples])
    return {"ece": found.value, "js": late}


def panel_of(folder: Path, told: bool = True) -> tuple[Panel, dict[str, float], dict[str, float]]:
    baseline = write(folder, "baseline", "none", 0.0, 1, told)
    cell = write(folder, "records", "reap", 0.5, 2, told)
    (panel,) = load_panels(folder)
    return with_detail_samples(folder, panel), baseline, cell


def difference(panel: Panel, part: Part):
    measure = Measure("m", "m", (part,), kind="number")
    assert panel.baseline is not None
    return Comparer().compare([Term(1.0, measure, panel.rows[0]), Term(-1.0, measure, panel.baseline)])


def test_items_average_to_the_recorded_scores_and_pair(tmp_path: Path) -> None:
    panel, baseline, cell = panel_of(tmp_path)
    assert panel.baseline is not None
    for part in (ECE, SPAN):
        mine, theirs = (samples_of_score(part, row.items[0]) for row in (panel.rows[0], panel.baseline))
        assert mine is not None and theirs is not None
        assert mine.score.mean() == pytest.approx(cell[part.metric])
        assert theirs.score.mean() == pytest.approx(baseline[part.metric])
        assert len(mine.score) == (QUESTIONS if part is ECE else 4), "a text that ends before the stretch has no part"
        found, expected = difference(panel, part), ttest_rel(mine.score, theirs.score)
        assert found.paired and found.n == len(mine.score)
        assert found.effect == pytest.approx(cell[part.metric] - baseline[part.metric])
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_without_detail_the_recorded_intervals_are_all_there_is(tmp_path: Path) -> None:
    panel, baseline, cell = panel_of(tmp_path, told=False)
    for part in (ECE, SPAN):
        found = difference(panel, part)
        assert not found.paired and found.effect == pytest.approx(cell[part.metric] - baseline[part.metric])
