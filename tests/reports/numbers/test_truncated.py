"""Answers cut inside a thought have a column of their own, outside of every average."""

from harness.contracts.record import Record, Score
from reports.numbers.measures import averages, columns_of, main_measures


def test_a_column_that_no_average_takes_in() -> None:
    scores = [
        Score("gsm8k", "exact_match", 0.5, 4, 0.1, 0.9, kind="generative", domain="math"),
        Score("gsm8k_truncated", "truncated", 0.25, 4, 0.0, 0.8, higher_is_better=False, kind="probe", domain="math"),
    ]
    record = Record({"method": "none"}, {}, {}, {}, scores, {}, {})
    measures = {measure.label: measure for measure in main_measures([record])}
    found = measures["gsm8k_truncated: truncated"]
    assert (found.kind, found.higher_is_better) == ("share", False)
    mean = averages(columns_of([record])).generative
    assert mean is not None and [part.task for part in mean.parts] == ["gsm8k"]
