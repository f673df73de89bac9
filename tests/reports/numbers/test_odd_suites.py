"""Averages of suites that nobody had in mind: tasks named like a kind or a domain, filters, groups, scores that are no
shares, and baselines that hold other metrics than the cells."""

from dataclasses import replace

import numpy as np
import pytest

from harness.contracts.intervals import wilson
from harness.contracts.record import Record, Sample, Score
from harness.records.store import RecordStore
from reports.numbers.load import load_panels
from reports.numbers.measures import Results, averages, columns_of, evaluate, main_measures
from reports.tables.scores import main_table, to_csv


def score(task: str, metric: str, value: float, kind: str, domain: str, part: str = "", **more) -> Score:
    better = kind != "perplexity"
    return Score(task, metric, value, 100, 0.9 * value, 1.1 * value, part, better, kind, domain, **more)


def record(scores: list[Score], side: int = 0) -> Record:
    method = ("none", "reap")[side]
    cell = {"id": method, "model": "m", "method": method, "ratio": side / 2, "calibration": "code", "seed": 0}
    cell |= {"suite": "own", "backend": "hf"} | ({"baseline": "none"} if side else {})
    return Record(cell, {"method": {"name": method}}, {}, {}, scores, {}, {})


def results_of(tmp_path, scores: list[Score], samples: tuple[list[Sample], list[Sample]] = ([], [])) -> Results:
    for side, kind in enumerate(("baseline", "records")):
        RecordStore(tmp_path, kind).write(record(scores, side), samples[side])
    (panel,) = load_panels(tmp_path)
    return evaluate(panel)


def test_tasks_may_have_the_name_of_a_kind_or_a_domain(tmp_path):
    scores = [
        score("code", "pass@1", 0.2, "generative", "code"),
        score("humaneval", "pass@1", 0.6, "generative", "code"),
        score("choice", "acc", 0.3, "choice", "knowledge"),
        score("multiple_choice", "acc", 0.5, "choice", "knowledge"),
        score("perplexity", "perplexity", 2.0, "perplexity", "language"),
        score("c4", "perplexity", 8.0, "perplexity", "language"),
    ]
    results = results_of(tmp_path, scores)
    baseline, stand = results.panel.baseline, results.averages
    assert len({m.name for m in results.measures}) == len(results.measures)
    means = [results.get(baseline, m).estimate.value for m in (stand.domains["code"], stand.choice, stand.perplexity)]
    assert means == pytest.approx([0.4, 0.4, 4.0])
    columns = {m.label: results.get(baseline, m).estimate.value for m in results.main}
    assert (columns["code"], columns["multiple choice"], columns["perplexity"]) == (0.2, 0.5, 2.0)
    assert (columns["choice average"], columns["perplexity average"]) == pytest.approx((0.4, 4.0))
    header = to_csv([results]).splitlines()[0].split(",")
    assert len(header) == len(set(header)) and {"generative_value", "code_value", "perplexity_value"} <= set(header)


def test_a_metric_behind_a_filter_is_what_it_is_without():
    scores = [
        score("lm_eval", "exact_match,strict-match", 0.4, "generative", "math", "gsm8k"),
        score("lm_eval", "exact_match,flexible-extract", 0.5, "generative", "math", "gsm8k"),
        score("lm_eval", "bleu,none", 30.0, "generative", "language", "wmt16"),
    ]
    found = averages(columns_of([record(scores)])).generative
    assert [part.metric for part in found.parts] == ["exact_match,strict-match"]  # and no BLEU, which is no share


def test_the_stricter_test_counts_under_whatever_name():
    scores = [
        score("easy", "pass@1", 0.9, "generative", "code"),
        score("hard", "pass@1", 0.5, "generative", "code", supersedes="easy"),
        score("alone", "pass@1", 0.3, "generative", "code", supersedes="absent"),
    ]
    found = averages(columns_of([record(scores)])).generative
    assert [part.task for part in found.parts] == ["hard", "alone"]


def test_the_note_says_which_tests_of_the_same_answers_do_not_count(tmp_path):
    scores = [
        score("easy", "pass@1", 0.9, "generative", "code"),
        score("hard", "pass@1", 0.5, "generative", "code", supersedes="easy"),
        score("alone", "pass@1", 0.3, "generative", "code", supersedes="absent"),
    ]
    note = main_table(results_of(tmp_path, scores), "code").note
    assert "of easy and hard, tests of the same answers, hard counts" in note and "absent" not in note


def test_parts_of_two_tasks_of_one_name_are_two_columns(tmp_path):
    scores = [
        score(task, "acc", value, "choice", "knowledge", part)
        for task, own in (("first", 0.2), ("second", 0.6))
        for part, value in (("", own), ("math", own + 0.1), ("code", own - 0.1))
    ]
    results = results_of(tmp_path, scores)
    of_math = [m for m in results.measures if m.parts[0].of == "math"]
    assert [results.get(results.panel.baseline, m).estimate.value for m in of_math] == pytest.approx([0.3, 0.7])


def test_a_baseline_with_another_first_metric_has_an_average_and_the_cell_none(tmp_path):
    old = [score("essay", "score", 5.0, "probe", "writing"), score("story", "share", 0.5, "generative", "writing")]
    new = [score("essay", "share", 0.4, "generative", "writing"), score("story", "share", 0.3, "generative", "writing")]
    for side, kind, scores in ((0, "baseline", new), (1, "records", [*old[:1], new[1]])):
        RecordStore(tmp_path, kind).write(record(scores, side), [])
    (panel,) = load_panels(tmp_path)
    results = evaluate(panel)
    average, (row,) = results.averages.generative, results.panel.rows
    assert results.get(results.panel.baseline, average).estimate.value == pytest.approx(0.35)
    assert results.get(row, average) is None
    assert "the generative average is the mean of writing (essay and story)" in main_table(results, "code").note


def test_a_group_is_paired_by_the_items_of_its_parts(tmp_path):
    draw = np.random.default_rng(3)
    right = {part: draw.random((2, items)) < 0.5 for part, items in (("mmlu_law", 12), ("mmlu_virology", 30))}
    samples, scores = ([], []), []
    for part, of_sides in right.items():
        for side in (0, 1):
            samples[side].extend(
                Sample("mmlu", f"{part}-{i:02}", float(one), domain=part) for i, one in enumerate(of_sides[side])
            )
    for side in (0, 1):
        own = np.concatenate([of_sides[side] for of_sides in right.values()]).astype(float)
        parts = [
            Score("mmlu", "acc", of_sides[side].mean(), of_sides.shape[1], 0.2, 0.8, part, True, "choice", "knowledge")
            for part, of_sides in right.items()
        ]
        low, high = wilson(own.sum(), len(own))
        scores.append(
            [*parts, Score("mmlu", "acc", own.mean(), len(own), low, high, "mmlu", True, "choice", "knowledge")]
        )
    for side, kind in enumerate(("baseline", "records")):
        RecordStore(tmp_path, kind).write(record(scores[side], side), samples[side])
    (panel,) = load_panels(tmp_path)
    results = evaluate(panel)
    assert [m.label for m in results.main] == ["mmlu: acc"]
    found = results.get(panel.rows[0], results.main[0]).difference
    difference = np.concatenate([of[1].astype(float) - of[0] for of in right.values()])
    drawn = draw.choice(difference, (20_000, len(difference))).mean(axis=1)
    assert found.paired and found.value == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=1.5 / 42)


def test_what_asks_again_is_no_column_whatever_its_kind():
    scores = [
        score("arc_order", "consistent", 0.5, "probe", "knowledge"),
        score("arc_order", "acc", 0.5, "probe", "knowledge"),
        score("arc", "acc", 0.5, "choice", "knowledge"),
    ]
    assert [m.parts[0].task for m in main_measures([record(scores)])] == ["arc"]
    fewer = replace(record(scores), scores=scores[:2])
    assert main_measures([fewer]) == []
