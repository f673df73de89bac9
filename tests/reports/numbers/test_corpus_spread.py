"""The spread over calibration corpora: its value, and its error against resampled items."""

from pathlib import Path

import numpy as np
import pytest

from harness.records.store import RecordStore
from reports.numbers.contrasts import Comparer
from reports.numbers.corpus_spread import corpus_spread, spread_difference, spread_terms
from reports.numbers.load import Panel, Row, load_panels
from reports.numbers.measures import averages, reference_columns
from reports.numbers.statistics import Measure
from tests.reports import synthetic

CORPORA = ("mixed", "code", "math", "writing")
ITEMS = {"code": 400, "math": 400, "writing": 200}
RIGHT = {
    "reap": [(340, 300, 170), (380, 100, 60), (120, 360, 40), (60, 80, 190)],
    "hc_smoe": [(280, 240, 150), (300, 200, 130), (240, 280, 120), (200, 180, 170)],
    "frequency": [(200, 200, 100)] * 4,
}


@pytest.fixture(autouse=True)
def many_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that the two items which are made up for each task count for little."""
    monkeypatch.setattr(synthetic, "ITEMS", ITEMS)


def panel(folder: Path) -> Panel:
    right = {
        (method, corpus): dict(zip(ITEMS, scores, strict=True)) | {"choice": 12, "perplexity": 5.0}
        for method, of_corpora in RIGHT.items()
        for corpus, scores in zip(CORPORA, of_corpora, strict=True)
    }
    for (method, corpus), scores in right.items():
        record, samples = synthetic.make_cell(method, 0.5, corpus, 0, scores)
        RecordStore(folder).write(record, samples)
    baseline, samples = synthetic.make_cell(
        "none", 0.0, "", 0, dict.fromkeys(ITEMS, 190) | {"choice": 20, "perplexity": 4.0}
    )
    RecordStore(folder, "baseline").write(baseline, samples)
    return load_panels(folder)[0]


def of(found: Panel, method: str) -> list[Row]:
    return [row for corpus in CORPORA for row in found.rows if (row.method, row.calibration) == (method, corpus)]


def measure(found: Panel) -> Measure:
    generative = averages(reference_columns(found.records(), found.baseline_record())).generative
    assert generative is not None
    return generative


def table(method: str) -> dict[str, np.ndarray]:
    """(corpora, items) of each task: the first so many are right."""
    return {
        task: np.array([np.arange(count) < scores[place] for scores in RIGHT[method]], dtype=float)
        for place, (task, count) in enumerate(ITEMS.items())
    }


def spread(table: dict[str, np.ndarray], drawn: dict[str, np.ndarray] | None = None) -> float:
    scores = [of_task[:, drawn[task]].mean(1) if drawn else of_task.mean(1) for task, of_task in table.items()]
    return float(np.std(np.mean(scores, axis=0), ddof=1))


def test_spread_and_its_error_are_those_of_resampled_items(tmp_path: Path) -> None:
    found = panel(tmp_path)
    one, other = table("reap"), table("hc_smoe")
    of_one = corpus_spread(Comparer(), measure(found), of(found, "reap"))
    apart = spread_difference(Comparer(), measure(found), of(found, "reap"), of(found, "hc_smoe"))
    assert of_one is not None and apart is not None and apart.paired
    assert of_one.effect == pytest.approx(spread(one))
    assert apart.effect == pytest.approx(spread(one) - spread(other))
    generator = np.random.default_rng(0)
    draws = [{task: generator.integers(0, n, n) for task, n in ITEMS.items()} for _ in range(2000)]
    resampled = np.array([[spread(one, drawn), spread(other, drawn)] for drawn in draws])
    assert of_one.error == pytest.approx(resampled[:, 0].std(), rel=0.08)
    assert apart.error == pytest.approx((resampled[:, 0] - resampled[:, 1]).std(), rel=0.08)


def test_corpora_that_change_nothing_have_no_spread(tmp_path: Path) -> None:
    found = panel(tmp_path)
    none = corpus_spread(Comparer(), measure(found), of(found, "frequency"))
    assert none is not None and none.effect == 0
    assert spread_terms(Comparer(), measure(found), of(found, "reap")[:1]) is None
    assert spread_difference(Comparer(), measure(found), of(found, "reap")[:1], of(found, "hc_smoe")) is None
