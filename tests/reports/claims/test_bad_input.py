"""Records of several versions, few cells, one seed, no variance, missing corpora: said, never a traceback."""

import json
import math
from dataclasses import replace

import pytest

from harness.contracts.record import Score
from harness.records.store import RecordStore
from reports.claims.evaluate import evaluate_claims
from reports.claims.list import CLAIMS, MEASURES
from reports.claims.selection import Cell
from reports.claims.verdicts import VERDICTS
from reports.claims.vocabulary import GENERATION, MATCHED, MIXED, Claim, Contrast, Contrasts
from reports.cli import main
from reports.numbers.load import load_panels
from tests.reports.synthetic import BASELINE, RIGHT, make_cell, write_sweep

EQUAL = RIGHT["reap"][0.5]


def verdicts_of(folder) -> dict[str, dict]:
    """Of the command, which writes no number that JSON lacks."""
    assert main(["claims", str(folder)]) == 0
    found = json.loads((folder / "report" / "claims.json").read_text(), parse_constant=pytest.fail)
    assert {one["verdict"] for one in found} <= {*VERDICTS}
    return {one["id"]: one for one in found}


def test_versions_that_differ_are_said(tmp_path, capsys):
    write_sweep(tmp_path, methods=("reap", "frequency"))
    store = RecordStore(tmp_path)
    for place, name in enumerate(store.ids()):
        record = store.read(name)
        samples = store.read_samples(name)
        store.write(replace(record, method_version=str(1 + place % 2), task_versions={"code": str(place % 3)}), samples)
    verdicts_of(tmp_path)
    text = (tmp_path / "report" / "claims.md").read_text()
    assert "Results of different versions stand side by side: method" in text and "task code (0 and 1 and 2)" in text
    assert "Results of different versions" in capsys.readouterr().out


def test_a_single_cell_and_a_baseline_alone(tmp_path):
    RecordStore(tmp_path, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    found = verdicts_of(tmp_path)
    assert {one["verdict"] for one in found.values()} == {"not tested"} and len(found) == len(CLAIMS)
    RecordStore(tmp_path).write(*make_cell("reap", 0.5, "mixed", 0, EQUAL))
    found = verdicts_of(tmp_path)
    lacking = found["reap_beats_hc_smoe_half_mixed"]
    assert [one["cell"] for one in lacking["missing"]] == ["method=hc_smoe ratio=0.5 calibration=mixed"]
    assert "method=hc_smoe ratio=0.5" in lacking["commands"][0]


def test_cells_that_agree_on_every_item_are_no_certainty(tmp_path):
    """Equal answers, equal texts: the error of shares is not 0, and that of perplexity is told as such."""
    for method in ("reap", "hc_smoe", "frequency", "m_smoe"):
        RecordStore(tmp_path).write(*make_cell(method, 0.5, "mixed", 0, EQUAL))
    RecordStore(tmp_path, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    found = verdicts_of(tmp_path)["reap_beats_hc_smoe_half_mixed"]
    assert found["verdict"] == "undecided" and found["evidence"][0]["effect"] == 0.0
    assert found["evidence"][0]["error"] > 0
    same = Contrast("equal", ((1.0, "perplexity", Cell("reap")), (-1.0, "perplexity", Cell("hc_smoe"))), 0.0198)
    (one,) = evaluate_claims([Claim("it", "So.", "a test", MIXED, Contrasts((same,)))], load_panels(tmp_path), MEASURES)
    comparison = one.evidence[0].comparison
    assert (comparison.effect, comparison.error) == (0.0, 0.0)
    # All 40 texts agree: the chance that as many fair coins fall alike.
    assert one.verdict == "negligible" and one.p == pytest.approx(2 * 0.5**comparison.n)


def test_one_item_a_task_decides_nothing(tmp_path):
    for method, right in (("reap", 1.0), ("hc_smoe", 0.0)):
        record, samples = make_cell(method, 0.5, "mixed", 0, EQUAL)
        kept = [
            replace(next(s for s in samples if s.task == task), score=right) for task in ("code", "math", "writing")
        ]
        scores = [
            replace(s, value=right, n=1, low=0.0, high=1.0)
            for s in record.scores
            if s.task in ("code", "math", "writing")
        ]
        RecordStore(tmp_path).write(replace(record, scores=scores), kept)
    found = verdicts_of(tmp_path)["reap_beats_hc_smoe_half_mixed"]
    assert found["verdict"] == "undecided" and found["evidence"][0]["error"] is None


def test_a_score_that_is_not_finite_is_broken_and_not_tested(tmp_path):
    for method in ("reap", "hc_smoe"):
        record, samples = make_cell(method, 0.5, "mixed", 0, EQUAL)
        scores = [replace(s, value=math.inf) if s.task == "perplexity" and not s.part else s for s in record.scores]
        RecordStore(tmp_path).write(replace(record, scores=scores), samples)
    contrast = Contrast("p", ((1.0, "perplexity", Cell("reap")), (-1.0, "perplexity", Cell("hc_smoe"))), 0.02)
    (found,) = evaluate_claims(
        [Claim("it", "So.", "a test", MIXED, Contrasts((contrast,)))], load_panels(tmp_path), MEASURES
    )
    assert found.verdict == "not tested" and "broken (perplexity perplexity is inf" in found.missing[0].why


def test_corpora_that_are_missing_are_asked_for(tmp_path):
    write_sweep(tmp_path, ("code", "math"), methods=("reap", "hc_smoe"))
    found = verdicts_of(tmp_path)
    matched = found["reap_beats_hc_smoe_half_matched"]
    assert {one["cell"].split("calibration=")[1] for one in matched["missing"]} == {"writing"}
    assert found["reap_beats_hc_smoe_half_general"]["missing"][0]["cell"].endswith("calibration=real_text")
    assert "at 50 % REAP" not in (tmp_path / "report" / "claims.md").read_text()


def test_a_suite_without_writing_has_its_own_matched_reading(tmp_path):
    for corpus in ("code", "math"):
        for method, lost in (("reap", 0), ("hc_smoe", 20)):
            record, samples = make_cell(
                method, 0.5, corpus, 0, {k: v - lost if k in ("code", "math") else v for k, v in BASELINE.items()}
            )
            kept = [s for s in record.scores if s.task in ("code", "math")]
            RecordStore(tmp_path).write(
                replace(record, scores=kept), [s for s in samples if s.task in ("code", "math")]
            )
    found = verdicts_of(tmp_path)["reap_beats_hc_smoe_half_matched"]
    assert found["verdict"] == "holds" and found["evidence"][0]["effect"] == pytest.approx(0.5)
    assert set(found["evidence"][0]["corpora"][0]["parts"]) == {"code", "math"}


def test_seeds_without_spread_and_a_single_one(tmp_path):
    store = RecordStore(tmp_path)
    for seed in range(3):
        store.write(*make_cell("random", 0.5, "none", seed, EQUAL))
    store.write(*make_cell("frequency", 0.5, "mixed", 0, RIGHT["frequency"][0.5]))
    found = verdicts_of(tmp_path)["frequency_worse_than_random_mixed"]
    assert found["verdict"] == "holds" and found["evidence"][0]["seeds"] == [3, 1]
    assert found["evidence"][0]["seed_error"] == 0.0


def test_generation_without_tasks_is_not_tested(tmp_path):
    record, samples = make_cell("reap", 0.5, "code", 0, EQUAL)
    only = Score("multiple_choice", "acc", 0.5, 100, 0.4, 0.6, kind="choice", domain="knowledge")
    RecordStore(tmp_path).write(replace(record, scores=[only]), samples)
    test = Contrasts((Contrast("g", ((1.0, GENERATION, Cell("reap", 0.5, MATCHED)),), 0.02),))
    (found,) = evaluate_claims([Claim("it", "So.", "a test", MATCHED, test)], load_panels(tmp_path), MEASURES)
    assert found.verdict == "not tested"
    verdicts_of(tmp_path)
