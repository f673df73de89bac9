"""Which row is the best for certain, from the counts in synthetic.py."""

from dataclasses import replace

import pytest

from reports.numbers.best import clearly_best
from reports.numbers.contrasts import Comparer
from reports.numbers.measures import evaluate


@pytest.fixture
def rows(panel):
    return [panel.baseline, *panel.of_corpus("mixed")]


@pytest.fixture
def columns(results):
    return {measure.name: measure for measure in results.main}


def named(rows, places) -> set[tuple[str, float]]:
    return {(rows[place].method, rows[place].ratio) for place in places}


def test_the_baseline_does_not_compete_and_close_ones_are_no_best(results, rows, columns):
    assert named(rows, clearly_best(results, rows, columns["math"], Comparer())) == {("reap", 0.5)}
    assert clearly_best(results, rows, columns["code"], Comparer()) == set()


def test_lower_is_better_for_perplexity(results, rows, columns):
    assert named(rows, clearly_best(results, rows, columns["perplexity"], Comparer())) == {
        ("reap", 0.25),
        ("reap", 0.5),
    }


def test_one_row_alone_is_no_best(results, rows, columns):
    alone = [row for row in rows if row.method in ("baseline", "reap")]
    assert clearly_best(results, alone, columns["math"], Comparer()) == set()


def test_rows_without_the_score_do_not_compete(results, panel, columns):
    (broken,) = (row for row in panel.rows if (row.method, row.ratio) == ("hc_smoe", 0.5))
    scores = [s for s in broken.records[0].scores if s.task != "math"]
    without = replace(broken, records=(replace(broken.records[0], scores=scores),))
    rows = tuple(without if row is broken else row for row in panel.rows)
    found = evaluate(replace(panel, rows=rows))
    # The row without the measure is out of the race.
    assert named(rows, clearly_best(found, rows, columns["math"], Comparer())) == {("reap", 0.5)}
