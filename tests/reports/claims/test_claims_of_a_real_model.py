"""Every claim about averages, on the records of a real language model that are relabelled as the cells it asks for."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.record import STAGES, Record, Sample, Score
from harness.records.store import RecordStore
from reports.claims.corpora import Corpora
from reports.claims.list import CLAIMS
from reports.claims.selection import Cell
from reports.claims.verdicts import VERDICTS
from reports.claims.vocabulary import CHOICE, EVERY, GENERATION, PERPLEXITY, Claim, Contrasts, RanksAgree
from reports.cli import main

SMOLLM2 = Path(__file__).parents[3] / "results" / "smollm2"
STORED_AS = {
    "int4": "int4-g8-sym",
    "iterative": "iterative-4",
    "calibrated": "calibrated",
    4: "4-active",
}
Stored = tuple[Record, list[Sample]]


def asked(claim: Claim) -> set[str]:
    """What the claim calls its measures; none where it counts what plans hold."""
    if isinstance(claim.test, Contrasts):
        return {name for contrast in claim.test.contrasts for _, name, _ in contrast.terms}
    return {claim.test.first, claim.test.second} if isinstance(claim.test, RanksAgree) else set()


def cells_of(claim: Claim) -> list[Cell]:
    """With corpora in place of rules: those of the two domains in which this model writes."""
    corpora = Corpora((), ("code", "math"))
    if not isinstance(claim.test, Contrasts):
        return [corpora.cell(cell) for cell in claim.cells()]
    return [cell for contrast in claim.test.contrasts for *_, cell in corpora.concrete(contrast).terms]


ABOUT_AVERAGES = [
    claim
    for claim in CLAIMS
    if asked(claim) and asked(claim) <= {GENERATION, CHOICE, PERPLEXITY, "code"} and claim.corpus != EVERY
]


def with_text(stored: Stored, loss: float) -> Stored:
    """The suite of these records has no perplexity."""
    record, samples = stored
    nll, tokens = [100 * (loss + 0.1 * (place % 3 - 1)) for place in range(30)], 100.0
    value = math.exp(sum(nll) / (30 * tokens))
    text = Score("c4", "perplexity", value, 30, 0.9 * value, 1.1 * value, "", False, "perplexity", "language")
    own = [Sample("c4", f"c4-{place:02}", one, tokens) for place, one in enumerate(nll)]
    return replace(record, scores=[*record.scores, text]), [*samples, *own]


def relabelled(stored: Stored, cell: Cell, name: str) -> Stored:
    record, samples = stored
    stages = {key: STORED_AS.get(value, f"{value}-{key}") for key, value in cell.settings if key in STAGES}
    others = {key: {"name": v} for key, v in cell.settings if key not in STAGES and not key.startswith("method.")}
    of_method: dict[str, Any] = {
        key.removeprefix("method."): v for key, v in cell.settings if key.startswith("method.")
    }
    described = record.cell | {"id": name, "method": cell.method, "ratio": cell.ratio, "calibration": cell.calibration}
    config = record.config | {"method": {"name": cell.method, **of_method}, "ratio": cell.ratio} | others
    return replace(record, cell=described | stages, config=config), samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pruned by one half of the cells, merged by the other; the baseline is the model's own."""
    folder, cells, baselines = tmp_path_factory.mktemp("sweep"), RecordStore(SMOLLM2), RecordStore(SMOLLM2, "baseline")
    of_methods = {record.cell["method"]: record for record in map(cells.read, cells.ids())}
    merged, pruned = (
        (of_methods[name], cells.read_samples(of_methods[name].cell["id"])) for name in ("hc_smoe", "reap")
    )
    whole = pruned[0].cell["baseline"]
    RecordStore(folder, "baseline").write(*with_text((baselines.read(whole), baselines.read_samples(whole)), 2.0))
    wanted = dict.fromkeys(cell for claim in ABOUT_AVERAGES for cell in cells_of(claim))
    for place, cell in enumerate(cell for cell in wanted if cell != Cell("none", 0.0)):
        source = with_text(pruned if place % 2 else merged, 2.5 + 0.1 * (place % 4))
        RecordStore(folder).write(*relabelled(source, cell, f"cell-{place}"))
    return folder


def test_all_of_them_get_a_verdict(folder, tmp_path, capsys):
    assert main(["claims", str(folder), "--output", str(tmp_path / "claims")]) == 0
    printed = capsys.readouterr().out
    assert "no score" not in printed and "has no tasks" not in printed
    found = {one["id"]: one for one in json.loads((tmp_path / "claims.json").read_text())}
    names = {name for claim in ABOUT_AVERAGES for name in asked(claim)}
    assert names == {GENERATION, CHOICE, PERPLEXITY, "code"} and len(ABOUT_AVERAGES) >= 60
    for claim in ABOUT_AVERAGES:
        one = found[claim.id]
        assert one["verdict"] in VERDICTS[:-1] and not one["missing"], one
        assert one["p"] is not None and all(seen["n"] > 1 for seen in one["evidence"] if "n" in seen)
        assert all(seen["paired"] for seen in one["evidence"] if "paired" in seen), claim.id


def test_the_report_shows_the_averages_and_what_they_are_over(folder, tmp_path):
    assert main([str(folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| generative average (%) |" in text and "| choice average (%) |" in text
    assert "the generative average is the mean of code (humaneval and mbpp) and math (gsm8k and math_500)" in text
    assert "perplexity average" not in text  # over a single text its own column says it


def test_without_texts_the_claim_on_perplexity_says_that_the_suite_has_none(folder, tmp_path, capsys):
    for kind in ("baseline", "records"):
        store, other = RecordStore(folder, kind), RecordStore(tmp_path, kind)
        for record in map(store.read, store.ids()):
            kept = [score for score in record.scores if score.kind != "perplexity"]
            other.write(replace(record, scores=kept), store.read_samples(record.cell["id"]))
    assert main(["claims", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "suite=quick has no tasks of perplexity" in printed and "no score" not in printed
