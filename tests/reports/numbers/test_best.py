"""Which row is the best for certain, from the counts in synthetic.py."""

from dataclasses import replace

import pytest

from reports.numbers.best import clearly_best
from reports.numbers.contrasts import Comparer
from reports.numbers.measures import CODE, MATH, PERPLEXITY, evaluate


@pytest.fixture
def rows(panel):
    return [panel.baseline, *panel.of_corpus("mixed")]


def named(rows, places) -> set[tuple[str, float]]:
    return {(rows[place].method, rows[place].ratio) for place in places}


def test_the_baseline_does_not_compete_and_close_ones_are_no_best(results, rows):
    assert named(rows, clearly_best(results, rows, MATH, Comparer())) == {("reap", 0.5)}
    assert clearly_best(results, rows, CODE, Comparer()) == set()


def test_lower_is_better_for_perplexity(results, rows):
    assert named(rows, clearly_best(results, rows, PERPLEXITY, Comparer())) == {("reap", 0.25), ("reap", 0.5)}


def test_one_row_alone_is_no_best(results, rows):
    alone = [row for row in rows if row.method in ("baseline", "reap")]
    assert clearly_best(results, alone, MATH, Comparer()) == set()


def test_rows_without_the_score_do_not_compete(results, panel):
    (broken,) = (row for row in panel.rows if (row.method, row.ratio) == ("hc_smoe", 0.5))
    scores = [s for s in broken.records[0].scores if s.task != "math"]
    without = replace(broken, records=(replace(broken.records[0], scores=scores),))
    rows = tuple(without if row is broken else row for row in panel.rows)
    found = evaluate(replace(panel, rows=rows))
    # The row without the measure is out of the race.
    assert named(rows, clearly_best(found, rows, MATH, Comparer())) == {("reap", 0.5)}
