"""Rules for corpora, effects by corpus and domain, the choice of a panel, clusters of items, and the opening."""

import json
from dataclasses import replace

import numpy as np
import pytest

from harness.records.store import RecordStore
from reports.claims.corpora import Corpora
from reports.claims.evaluate import evaluate_claims
from reports.claims.list import CLAIMS, MEASURES
from reports.claims.opening import opening
from reports.claims.selection import Cell, matches
from reports.claims.tested import claims_of
from reports.claims.vocabulary import (
    EVERY,
    GENERAL,
    GENERATION,
    MATCHED,
    MIXED,
    SHIFTED,
    Claim,
    Contrast,
    Contrasts,
    KeptDiffer,
    LongTail,
    Needs,
)
from reports.cli import main
from reports.numbers.contrasts import Comparer
from reports.numbers.groupings import clustered_variance, clusters, labels_of, read_groupings
from reports.numbers.load import load_panels
from tests.reports.synthetic import BASELINE, RIGHT, make_cell, write_sweep

DOMAINS = ("code", "math", "writing")


def over(first: str, second: str, rule: str, measure: str = GENERATION, margin: float = 0.0) -> Contrast:
    terms = ((1.0, measure, Cell(first, 0.5, rule)), (-1.0, measure, Cell(second, 0.5, rule)))
    return Contrast(f"{first} - {second}", terms, margin)


def claim(contrast: Contrast, rule: str = MIXED, **more) -> Claim:
    return Claim("it", "It is so.", "a test", rule, Contrasts((contrast,)), **more)


def write(folder, corpora: dict[str, dict[str, dict[str, int]]]) -> None:
    """Corpus -> method -> right answers."""
    RecordStore(folder, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    for corpus, methods in corpora.items():
        for method, right in methods.items():
            full = RIGHT["reap"][0.5] | right
            RecordStore(folder).write(*make_cell(method, 0.5, corpus, 0, full))


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """REAP is ahead in each domain on its own corpus, and behind on every other; on the mix by math alone."""
    folder = tmp_path_factory.mktemp("domains")
    even = {"code": 20, "math": 20, "writing": 10}
    sizes = {"code": 40, "math": 40, "writing": 20}
    corpora = {
        domain: {
            "reap": {of: sizes[of] - 1 if of == domain else sizes[of] // 8 for of in DOMAINS},
            "hc_smoe": even,
        }
        for domain in DOMAINS
    }
    corpora["mixed"] = {"reap": even | {"math": 38}, "hc_smoe": even}
    write(folder, corpora)
    return folder


def test_matched_and_shifted_are_means_over_domains(domains):
    (panel,) = load_panels(domains)
    matched, shifted = evaluate_claims(
        [claim(over("reap", "hc_smoe", rule), rule) for rule in (MATCHED, SHIFTED)], [panel], MEASURES
    )
    assert (matched.verdict, shifted.verdict) == ("holds", "reversed")
    assert matched.evidence[0].comparison.effect == pytest.approx(np.mean([19 / 40, 19 / 40, 9 / 20]))
    assert shifted.evidence[0].comparison.effect == pytest.approx(np.mean([-15 / 40, -15 / 40, -8 / 20]))
    assert matched.evidence[0].comparison.n == 100


def test_each_corpus_and_domain_stands_beside_the_verdict(domains):
    (panel,) = load_panels(domains)
    (found,) = evaluate_claims([claim(over("reap", "hc_smoe", MIXED))], [panel], MEASURES)
    assert found.verdict == "holds"
    rows = {row.corpus: row for row in found.evidence[0].corpora}
    assert list(rows) == ["", "matched", "code", "math", "mixed", "writing"]
    assert rows[""].whole.effect == rows["mixed"].whole.effect == pytest.approx(18 / 40 / 3)
    assert {name: part.effect for name, part in rows[""].parts.items()} == pytest.approx(
        {"code": 0.0, "math": 18 / 40, "writing": 0.0}
    )
    assert rows["code"].whole.effect == pytest.approx((19 / 40 - 15 / 40 - 8 / 20) / 3)
    assert found.evidence[0].alone == "math"
    (matched,) = evaluate_claims([claim(over("reap", "hc_smoe", MATCHED), MATCHED)], [panel], MEASURES)
    assert matched.evidence[0].alone == ""


def test_every_corpus_asks_for_all_of_them(domains):
    (panel,) = load_panels(domains)
    (found,) = evaluate_claims([claim(over("reap", "hc_smoe", EVERY), EVERY)], [panel], MEASURES)
    assert [one.name.split(":")[0] for one in found.evidence] == ["code", "math", "mixed", "writing"]
    below, above = zip(*((one.comparison.p_below(), one.comparison.p_above()) for one in found.evidence), strict=True)
    assert found.regions["reversed"] == pytest.approx(min(1.0, 4 * min(below)))
    assert found.regions["holds"] == pytest.approx(max(above)) and above[2] < 0.001


def test_corpora_are_found_by_what_they_are_about():
    corpora = Corpora(("c4", "evol_codealpaca", "math_sft"), ("code", "math", "knowledge"))
    concrete = corpora.concrete(over("reap", "hc_smoe", MATCHED))
    assert {(name, cell.calibration) for _, name, cell in concrete.terms} == {
        ("code", "evol_codealpaca"), ("math", "math_sft")
    }  # fmt: skip
    assert {cell.calibration for *_, cell in corpora.concrete(over("reap", "hc_smoe", GENERAL)).terms} == {"c4"}
    assert Corpora((), ()).concrete(over("reap", "hc_smoe", MATCHED)).terms[0][2].calibration == "code"


def test_a_model_is_tested_once_where_most_items_are(tmp_path):
    write_sweep(tmp_path / "few", methods=("reap", "frequency"))
    write_sweep(tmp_path / "more", methods=("reap", "frequency", "random"))
    one = claim(over("reap", "random", MIXED))
    of_random = claims_of([(tmp_path / name, load_panels(tmp_path / name)) for name in ("few", "more")])
    panels, folders = of_random.panels, of_random.folders
    (found,) = evaluate_claims([one], panels, MEASURES, folders)
    assert found.verdict == "holds" and found.view.folder == tmp_path / "more"
    (both,) = evaluate_claims([claim(over("reap", "frequency", MIXED))], panels, MEASURES, folders)
    assert both.view.folder == tmp_path / "few"  # equally many: the first
    other = [replace(panel, model="other") for panel in load_panels(tmp_path / "more")]
    for row in other[0].all_rows():
        for record in row.records:
            record.fingerprints["model"] = "another"
    found = evaluate_claims([one], [*panels, *other], MEASURES, [*folders, tmp_path])
    assert [finding.panel.model for finding in found] == ["tiny", "other"]


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_labels_leave_out_what_varies():
    assert labels_of("Give Ann 3 cats. Then say 'x'.") == labels_of("Give Tom 12 cats. Then say 'y'.")
    assert labels_of("Give Ann 3 cats.") != labels_of("Give Ann 3 dogs.") != labels_of("Take Ann 3 dogs.")
    story = "Write a story.\nWho: a fox\nWhere: the sea\nEnd: slept\nStory:"
    assert labels_of(story) == ("Who: a fox", "Where: the sea", "End: slept")


def test_the_error_over_clusters_is_that_of_their_sums():
    values = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    numbers = np.array([0, 0, 1, 1, 2, 3])
    apart = values - values.mean()
    sums = [apart[numbers == g].sum() for g in range(4)]
    assert clustered_variance(apart, numbers) == (pytest.approx(4 / 3 * np.sum(np.square(sums)) / 36), 3)
    items = list("abcdefghijk")
    (found,) = clusters(items, {"a": ("t",), "b": ("t",)})
    assert found[0] == found[1] and len(set(found.tolist())) == 10
    assert clusters(items, {}) == [] and clusters(items[:5], {"a": ("t",), "b": ("t",)}) == []


def test_the_wider_error_is_taken_and_the_other_kept(tmp_path):
    write_sweep(tmp_path, methods=("reap", "frequency"))
    (panel,) = load_panels(tmp_path)
    rows = {row.method: row for row in panel.rows if row.ratio == 0.5}
    code = MEASURES_OF(panel)["code"]
    plain = Comparer().difference(code, rows["reap"], rows["frequency"])
    # The answers that only REAP has right lie beside each other: all of a template are of one kind.
    same = {f"code-{i:03}": (f"template {i // 4}",) for i in range(40)}
    wide = Comparer(same).difference(code, rows["reap"], rows["frequency"])
    total = np.array([float(12 <= i < 24) for i in range(40)])
    sums = [(total - 0.3)[4 * g : 4 * g + 4].sum() for g in range(10)]
    assert wide.error == pytest.approx(np.sqrt(10 / 9 * np.sum(np.square(sums)) / 40**2)) and wide.df == pytest.approx(
        9
    )
    assert wide.plain == (plain.low, plain.high) and wide.low < plain.low and wide.effect == plain.effect
    mixed = {f"code-{i:03}": (f"template {i % 10}",) for i in range(40)}
    narrow = Comparer(mixed).difference(code, rows["reap"], rows["frequency"])
    assert narrow.error == plain.error and narrow.plain is None


def MEASURES_OF(panel):  # noqa: N802
    from reports.claims.view import View

    return View(panel, MEASURES).averages


def test_prompts_are_read_from_the_samples(tmp_path):
    record, samples = make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5])
    told = [replace(s, prompt=f"Add {s.item[-3:]}.") if s.task == "code" else s for s in samples]
    RecordStore(tmp_path).write(record, told)
    found = read_groupings(tmp_path, load_panels(tmp_path))
    assert set(found) == {f"code-{i:03}" for i in range(40)} and set(found.values()) == {("Add #.",)}


# --- counts -----------------------------------------------------------------------------------------------------------


def test_kept_sets_are_read_from_plans(tmp_path):
    write(tmp_path, {"code": {"reap": {}}, "math": {"reap": {}}})
    for place, record in enumerate(
        r for panel in load_panels(tmp_path) for r in (row.records[0] for row in panel.rows)
    ):
        folder = tmp_path / "cells" / record.cell["id"]
        folder.mkdir(parents=True)
        route = [[0, 1, None, None], [None, 0, 1, None]][place]
        experts = [{"sources": [{"expert": old, "weight": 1.0}]} for old in (place, place + 1)]
        of_layers = ((2, route), (4, [0, 1, None, None]))
        layers = [{"layer": layer, "route": row, "experts": experts} for layer, row in of_layers]
        (folder / "plan.json").write_text(json.dumps({"layers": layers}))
    pair = (Cell("reap", 0.5, "code"), Cell("reap", 0.5, "math"))
    claims = [Claim("it", "So.", "a test", MATCHED, KeptDiffer((pair,), bar)) for bar in (1.0, 1.1)]
    some, both = evaluate_claims(claims, load_panels(tmp_path), MEASURES, [tmp_path])
    assert some.verdict == "reversed" and "layer 2 0.33, layer 4 1.00" in some.evidence[1].text
    assert both.verdict == "holds" and both.p is None
    (alone,) = evaluate_claims(claims[:1], load_panels(tmp_path), MEASURES)
    assert alone.verdict == "not tested" and alone.missing[0].why == "its plan is not kept"
    for path in tmp_path.glob("cells/*/plan.json"):
        path.write_text("{")
    (damaged,) = evaluate_claims(claims[:1], load_panels(tmp_path), MEASURES, [tmp_path])
    assert damaged.missing[0].why == "its plan.json is damaged"


def test_tails_of_usage(panel):
    cell = (Cell("reap"),)
    claims = [Claim("it", "So.", "a test", MIXED, LongTail(cell, share)) for share in (0.5, 0.9)]
    long, longer = evaluate_claims(claims, [panel], MEASURES)
    share = np.sort(0.8 ** np.arange(16))[::-1]
    assert (long.verdict, longer.verdict) == ("holds", "reversed")
    assert f"mixed {100 * share[:4].sum() / share.sum():.0f} %" in long.evidence[1].text


def test_what_needs_machinery_says_what(panel):
    (found,) = evaluate_claims([Claim("it", "So.", "a test", MIXED, Needs("Wanda"))], [panel, panel], MEASURES)
    assert found.verdict == "not tested" and found.more == "needs Wanda"


# --- stages that records may tell of ----------------------------------------------------------------------------------


def test_a_refitted_cell_is_no_bare_one(tmp_path):
    def cell(**more):
        stages = {key: more.pop(key) for key in ("refit", "router") if key in more}
        record, samples = make_cell("hc_smoe", 0.5, "mixed", 0, RIGHT["hc_smoe"][0.5], more)
        return replace(record, cell=record.cell | stages), samples

    store = RecordStore(tmp_path)
    for one in (
        cell(),
        cell(refit="routed-refit", method={"name": "hc_smoe", "refitted": 1}),
        cell(method={"name": "hc_smoe", "constants": True}),
        cell(allocation={"name": "evoesap"}, method={"name": "hc_smoe", "linkage": "average", "searched": 1}),
        cell(router="recalibrated", method={"name": "hc_smoe", "again": 1}),
    ):
        store.write(*one)
    rows = [row for panel in load_panels(tmp_path) for row in panel.rows]

    def found(**settings):
        wanted = Cell("hc_smoe", settings=tuple((k.replace("__", "."), v) for k, v in settings.items()))
        return sum(matches(wanted, row) for row in rows)

    assert found() == 1 and len(rows) == 5
    assert found(refit="routed") == found(method__constants=True) == found(allocation="evoesap") == 1
    assert found(refit="joint") == found(refit="all_tokens") == 0


# --- the opening ------------------------------------------------------------------------------------------------------


def test_a_report_opens_with_five_sentences_of_verdicts(tmp_path, capsys):
    write_sweep(tmp_path, ("mixed", "code", "math"), methods=("reap", "hc_smoe", "frequency"))
    assert main(["claims", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "claims.md").read_text()
    found = claims_of([(tmp_path, load_panels(tmp_path))]).findings
    sentences = opening(found)
    assert len(sentences) == 5 and all(one in text for one in sentences)
    assert sentences[1] == "Calibrated on general text: nothing of this was run."
    verdict = {one.claim.id: one for one in found}["reap_beats_frequency_half_mixed"]
    assert verdict.verdict == "holds" and "REAP beats frequency (by 26.7 points" in sentences[2]
    assert sentences[3].startswith("How sure: ") and "one seed" in sentences[3]
    assert (
        "on the mix REAP and M-SMoE (at 50 and 25 %)" in sentences[4] and "coverage and magnitude (at" in sentences[4]
    )
    assert "on general text nothing" in sentences[4]
    assert main([str(tmp_path)]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert all(one in report for one in sentences)
    capsys.readouterr()


def test_headlines_come_in_three_readings():
    heads = [one for one in CLAIMS if one.headline]
    for name in ("reap_beats_hc_smoe", "reap_beats_m_smoe", "reap_beats_frequency", "coverage_beats_reap",
                 "coverage_beats_magnitude"):  # fmt: skip
        for ratio in ("half", "quarter"):
            assert {one.corpus for one in heads if one.id.startswith(f"{name}_{ratio}_")} >= {MATCHED, GENERAL, MIXED}
