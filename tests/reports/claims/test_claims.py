"""Verdicts on sweeps whose answers are known, the selection of cells, and what the command writes."""

import csv
import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from scipy import stats

from reports.claims.evaluate import evaluate_claims
from reports.claims.list import CLAIMS, MEASURES
from reports.claims.selection import Cell, commands, matches
from reports.claims.vocabulary import (
    CHOICE,
    GENERATION,
    PERPLEXITY,
    RULES,
    Claim,
    Contrast,
    Contrasts,
    FewLargeGroups,
    Needs,
    RanksAgree,
)
from reports.cli import main
from reports.numbers.load import load_panels
from reports.numbers.paired import holm
from tests.reports.synthetic import BASELINE, RIGHT, RecordStore, make_cell, write_sweep
from tests.reports.test_cli import ROOT, WITHOUT_TORCH, run_without_torch


def claim(test, **more) -> Claim:
    return Claim("it", "It is so.", "a test", "mixed", test, **more)


def over(first: Cell, second: Cell, measure: str = GENERATION, margin: float = 0.0, least: float | None = None):
    return Contrast(f"{first.method} - {second.method}", ((1, measure, first), (-1, measure, second)), margin, least)


def verdicts(panels, *tests):
    return evaluate_claims([claim(test) for test in tests], panels, MEASURES)


REAP, HC, FREQUENCY, RANDOM = (Cell(name) for name in ("reap", "hc_smoe", "frequency", "random"))


def test_a_claim_holds_or_not_by_the_side_that_is_sure(panel):
    holds, fails = verdicts([panel], Contrasts((over(REAP, FREQUENCY),)), Contrasts((over(FREQUENCY, REAP),)))
    assert (holds.verdict, fails.verdict) == ("holds", "reversed")
    assert holds.p == pytest.approx(fails.p) and holds.corrected == pytest.approx(2 * holds.p)
    assert holds.evidence[0].comparison.effect == pytest.approx((12 / 40 + 12 / 40 + 4 / 20) / 3)
    assert "n 100, seeds 1)" in holds.evidence[0].text and holds.more == ""


def test_all_contrasts_have_to_hold_and_one_is_enough_against(panel):
    sure, unsure = over(REAP, FREQUENCY), over(Cell("reap", 0.25), Cell("hc_smoe", 0.25), "multiple_choice")
    both, one_against = verdicts([panel], Contrasts((sure, unsure)), Contrasts((sure, over(FREQUENCY, REAP))))
    assert both.verdict == "undecided" and both.regions["holds"] == 1.0  # equally many right: no evidence for
    assert one_against.verdict == "reversed"
    assert one_against.regions["reversed"] == pytest.approx(2 * one_against.evidence[1].comparison.p_below())


def test_undecided_says_how_many_more(panel):
    contrast = over(Cell("reap", 0.25), Cell("hc_smoe", 0.25), "code")
    (found,) = verdicts([panel], Contrasts((contrast,)))
    seen = found.evidence[0].comparison
    assert found.verdict == "undecided" and found.p == pytest.approx(0.125)  # 4 items won, none lost
    needed = seen.items_needed(0.0, 0.05)
    assert 40 < needed < 200 and f"{needed - 40:,.0f} more items than the 40" in found.more
    assert "smallest detectable: " in found.more


def test_undecided_by_chance_asks_for_seeds(tmp_path):
    RecordStore(tmp_path, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    store = RecordStore(tmp_path)
    for seed, right in enumerate((2, 38, 20)):
        store.write(*make_cell("random", 0.5, "none", seed, RIGHT["reap"][0.5] | {"code": right}))
    store.write(*make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5] | {"code": 28}))
    (found,) = verdicts(load_panels(tmp_path), Contrasts((over(REAP, RANDOM, "code"),)))
    assert found.verdict == "undecided" and "seeds instead of 3" in found.more
    assert "seeds 1/3" in found.evidence[0].text


def test_a_stated_size_is_what_is_tested_against(panel):
    """The effect is 26.7 points."""
    near, far = (Contrasts((over(REAP, FREQUENCY, margin=0.02, least=bar),)) for bar in (0.05, 0.5))
    assert [one.verdict for one in verdicts([panel], near, far)] == ["holds", "smaller than said"]
    turned = Contrasts((over(FREQUENCY, REAP, margin=0.02, least=0.05),))
    assert verdicts([panel], turned)[0].verdict == "reversed"
    at_most, too_much = (Contrasts((over(FREQUENCY, REAP, margin=bar, least=-bar),)) for bar in (0.5, 0.05))
    assert [one.verdict for one in verdicts([panel], at_most, too_much)] == ["holds", "reversed"]
    assert "to be above −50.0 (" in verdicts([panel], at_most)[0].evidence[0].text


def test_an_effect_inside_the_margin_is_negligible(panel):
    narrow, wide = (Contrasts((over(REAP, FREQUENCY, margin=bar),)) for bar in (0.2, 0.5))
    assert [one.verdict for one in verdicts([panel], narrow, wide)] == ["undecided", "negligible"]
    (found,) = verdicts([panel], wide)
    c = found.evidence[0].comparison
    assert found.p == pytest.approx(2 * max(c.p_above(-0.5), c.p_below(0.5)))
    assert c.low > -0.5 and c.high < 0.5
    (unsure,) = verdicts([panel], narrow)
    assert "above 0 by its own interval, not yet beyond the margin or within it" in unsure.more


def test_p_values_are_corrected_over_all_tested_claims(panel):
    found = evaluate_claims(CLAIMS, [panel], MEASURES)
    tested = [one for one in found if one.p is not None]
    assert len(tested) >= 3
    assert [one.corrected for one in tested] == pytest.approx(holm([one.p for one in tested]))


def test_cells_that_are_missing_are_named(panel):
    (found,) = verdicts([panel], Contrasts((over(REAP, Cell("coverage")), over(REAP, HC))))
    assert found.verdict == "not tested" and [str(m.cell) for m in found.missing] == [str(Cell("coverage"))]
    assert found.p is None and found.missing[0].why == "not run"
    (lacking,) = verdicts([panel], Contrasts((over(REAP, HC, "calibration_error"),)))
    assert {one.why for one in lacking.missing} == {"suite=reference does not measure calibration error"}


def test_broken_cells_are_named_and_nothing_of_theirs_is_tested(tmp_path):
    write_sweep(tmp_path, methods=("reap", "hc_smoe"))
    store = RecordStore(tmp_path)
    record = next(r for r in map(store.read, store.ids()) if r.cell["method"] == "hc_smoe" and r.cell["ratio"] == 0.5)
    samples = store.read_samples(record.cell["id"])
    scores = [replace(s, value=math.nan) if s.task == "math" else s for s in record.scores]
    store.write(replace(record, scores=scores), samples)
    contrasts = (Contrasts((over(REAP, HC),)), Contrasts((over(REAP, HC, "code"),)))
    broken, sound = verdicts(load_panels(tmp_path), *contrasts)
    assert broken.verdict == "not tested" and broken.missing[0].why == "broken (math exact_match is nan)"
    assert sound.verdict != "not tested"

    store.write(
        replace(record, scores=[s for s in scores if s.task != "math"], broken={"math": "logits of NaN"}), samples
    )
    (told,) = verdicts(load_panels(tmp_path), contrasts[0])
    assert told.missing[0].why == "broken (math: logits of NaN)"
    assert main(["claims", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "claims.md").read_text()
    assert "## Broken cells" in text and "hc_smoe (broken), ratio 0.5, mixed: math: logits of NaN" in text
    assert "method=hc_smoe ratio=0.5 calibration=mixed: broken" in text
    # Its record is there, so to run it again would change nothing.
    assert "method=hc_smoe ratio=0.5 calibration=mixed suite=reference backend=hf output_dir" not in text


def ranked(folder, perplexities):
    """Methods that lose three right answers each; by how much their perplexities rise."""
    store = RecordStore(folder)
    RecordStore(folder, "baseline").write(*make_cell("none", 0.0, "none", 0, BASELINE))
    for place, (method, perplexity) in enumerate(perplexities.items()):
        right = {"code": 36 - 3 * place, "math": 34 - 3 * place, "writing": 18, "choice": 20, "perplexity": perplexity}
        store.write(*make_cell(method, 0.5, "mixed", 0, right))
    return tuple(Cell(method) for method in perplexities)


NAMES = ("reap", "frequency", "hc_smoe", "m_smoe", "gate_sum", "soft_count", "ean_sum", "ean_mean", "ean", "msan")


@pytest.mark.parametrize(
    ("perplexities", "verdict", "rho"),
    [(range(10, 0, -1), "holds", -1.0), ((3, 1, 4, 2, 6, 8, 5, 10, 7, 9), "undecided", 0.8303)],
)
def test_ranks_that_agree_or_not(tmp_path, perplexities, verdict, rho):
    cells = ranked(tmp_path, dict(zip(NAMES, (float(1 + p) for p in perplexities), strict=True)))
    (found,) = verdicts(load_panels(tmp_path), RanksAgree(GENERATION, PERPLEXITY, cells, 0.8))
    assert found.verdict == verdict
    assert found.evidence[0].comparison.effect == pytest.approx(rho, abs=1e-3)
    z = math.atanh(max(rho, -0.999999)) - math.atanh(0.8)
    error = math.sqrt((1 + rho**2 / 2) / 7)
    assert found.p == pytest.approx(2 * stats.norm.cdf(-abs(z) / error), rel=1e-2)
    (few,) = verdicts(load_panels(tmp_path), RanksAgree(GENERATION, PERPLEXITY, (*cells[:4], Cell("coverage")), 0.8))
    assert few.verdict == "not tested" and [one.cell.method for one in few.missing] == ["coverage"]


def test_groups_are_counted(tmp_path):
    def plan(groups: int, sizes: list[int]) -> dict:
        return {"experts": groups, "rows": 128, "group_sizes": sizes}

    record, samples = make_cell("hc_smoe", 0.5, "mixed", 0, RIGHT["hc_smoe"][0.5])
    RecordStore(tmp_path).write(replace(record, plan={"2": plan(64, [60, 6]), "4": plan(64, [65])}), samples)
    record, samples = make_cell("m_smoe", 0.5, "mixed", 0, RIGHT["hc_smoe"][0.5])
    RecordStore(tmp_path).write(replace(record, plan={"2": plan(64, [2] * 64), "4": plan(64, [2] * 64)}), samples)
    lumpy, even, both, none = verdicts(
        load_panels(tmp_path),
        FewLargeGroups((HC,)),
        FewLargeGroups((Cell("m_smoe"),)),
        FewLargeGroups((HC, Cell("m_smoe"))),
        FewLargeGroups((Cell("hc_smoe", 0.25),)),
    )
    assert [one.verdict for one in (lumpy, even, both, none)] == [
        "holds",
        "reversed",
        "reversed",
        "not tested",
    ]
    assert lumpy.evidence[0].text == "2 of 2 layers; a count, no sample" and lumpy.p is None
    assert "97 % of 64 groups" in lumpy.evidence[1].text and "the largest has 60 (mean 2.0)" in lumpy.evidence[1].text


def test_settings_tell_cells_apart(tmp_path):
    def cell(method: str, settings: dict, seed: int = 0, **more):
        config = {"method": {"name": method} | settings} | more
        return make_cell(method, 0.5, "mixed", seed, RIGHT["reap"][0.5], config)

    store = RecordStore(tmp_path)
    store.write(*cell("hc_smoe", {"linkage": "average", "max_group_size": None, "merge_weights": "frequency"}))
    store.write(*cell("hc_smoe", {"linkage": "average", "max_group_size": 32, "merge_weights": "frequency"}))
    store.write(*cell("hc_smoe", {"linkage": "single", "max_group_size": None, "merge_weights": "frequency"}))
    quantized, samples = cell("hc_smoe", {}, quantize={"name": "int4"})
    store.write(replace(quantized, cell=quantized.cell | {"quantize": "int4-g8-sym"}), samples)
    store.write(*cell("hc_smoe", {}, schedule={"name": "iterative", "rounds": 4}))
    (panel,) = load_panels(tmp_path)

    def found(*settings) -> list[dict]:
        wanted = Cell("hc_smoe", settings=settings)
        return [row.records[0].config for row in panel.rows if matches(wanted, row)]

    assert [one["method"]["max_group_size"] for one in found()] == [None]
    assert [one["method"]["linkage"] for one in found()] == ["average"]
    assert [one["method"]["max_group_size"] for one in found(("method.max_group_size", 32))] == [32]
    assert [one["quantize"]["name"] for one in found(("quantize", "int4"))] == ["int4"]
    assert (
        found(("quantize", "int4"), ("method.linkage", "ward")) == []
        and found(("quantize", "int8")) == []
        and found(("method.max_group_size", 8)) == []
    )
    assert [one["schedule"]["rounds"] for one in found(("schedule", "iterative"))] == [4]
    # Of the records that do not name the setting, none passes for another value than the default.
    assert all("max_group_size" in one["method"] for one in found(("method.max_group_size", 32)))
    assert not any(matches(Cell("hc_smoe", 0.25), row) or matches(REAP, row) for row in panel.rows)


def test_commands_run_what_is_missing_together(panel, tmp_path):
    cells = [Cell("coverage"), Cell("m_smoe"), Cell("m_smoe", 0.25), Cell("none", 0.0)]
    cells += [Cell("reap", settings=(("quantize", "int4"),))]
    end = "suite=reference backend=hf diagnostics=layers output_dir=out"
    assert commands(cells, panel, "", "out", ("diagnostics=layers",)) == [
        f"winnow -m model=tiny method=coverage,m_smoe ratio=0.5 calibration=mixed {end}",
        f"winnow model=tiny method=m_smoe ratio=0.25 calibration=mixed {end}",
        f"winnow model=tiny method=reap ratio=0.5 calibration=mixed quantize=int4 {end}",
    ]
    config = {"suite": {"name": "reference", "items": 100}, "model": {"name": "local", "path": "m/x"}}
    record, _ = make_cell("reap", 0.5, "mixed", 0, RIGHT["reap"][0.5], config)
    RecordStore(tmp_path).write(replace(record, cell=record.cell | {"model": "local"}), [])
    (command,) = commands([REAP], load_panels(tmp_path)[0], "", "out")
    assert "model=local model.path=m/x" in command and "suite=reference suite.items=100" in command


def test_another_suite_needs_all_its_cells(tmp_path, panel, capsys, sweep):
    found = evaluate_claims([c for c in CLAIMS if c.id == "merged_logits_drift_faster"], [panel], MEASURES)
    assert found[0].verdict == "not tested"
    assert main(["claims", str(sweep), "--output", str(tmp_path / "c")]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "suite=diagnostics" in line]
    assert any("method=hc_smoe,reap,m_smoe ratio=0.5" in line for line in lines)


def test_the_command_writes_three_files(sweep, tmp_path, capsys):
    assert main(["claims", str(sweep), "--output", str(tmp_path / "out" / "c")]) == 0
    shown = capsys.readouterr().out
    assert all(one.id in shown for one in CLAIMS) and "not tested" in shown
    loaded = json.loads((tmp_path / "out" / "c.json").read_text(), parse_constant=pytest.fail)
    assert [one["id"] for one in loaded] == [one.id for one in CLAIMS]
    beats = next(one for one in loaded if one["id"] == "reap_beats_frequency_half_mixed")
    assert beats["verdict"] == "holds" and beats["evidence"][0]["n"] == 100
    rows = list(csv.DictReader((tmp_path / "out" / "c.csv").open()))
    line = next(row for row in rows if row["claim"] == "reap_beats_frequency_half_mixed")
    assert float(line["effect"]) == pytest.approx(beats["evidence"][0]["effect"]) and line["paired"] == "true"
    text = (tmp_path / "out" / "c.md").read_text()
    assert "corrected by Holm's rule" in text and "## Missing cells" in text
    assert not (sweep / "report" / "claims.md").exists()


def test_every_claim_uses_known_measures_and_its_cells_exist():
    assert len({one.id for one in CLAIMS}) == len(CLAIMS) >= 40
    methods = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    for one in CLAIMS:
        rules = {part for part in one.corpus.split(" and ")}
        assert one.corpus in RULES or rules <= {*RULES}, one.id
        assert one.source and one.says.endswith("."), one.id
        assert {cell.method for cell in one.cells()} <= methods, one.id
        if isinstance(one.test, Contrasts):
            named = {name for contrast in one.test.contrasts for _, name, _ in contrast.terms}
            assert named <= {*MEASURES, GENERATION, CHOICE, PERPLEXITY, "code", "math", "writing"}
            assert all(contrast.margin > 0 for contrast in one.test.contrasts), one.id
        if isinstance(one.test, Needs):
            assert one.test.what


@pytest.mark.parametrize("case", ["no folder", "no records", "not writable"])
def test_errors_are_one_line(tmp_path, capsys, case):
    folder = tmp_path / "sweep"
    if case != "no folder":
        folder.mkdir()
    if case == "not writable":
        write_sweep(folder, methods=("reap",))
        (folder / "report").write_text("a file where the folder should be")
    assert main(["claims", str(folder)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("winnow-report: error: ") and output.err.count("\n") == 1


def test_claims_need_no_torch(sweep, tmp_path):
    run = run_without_torch("claims", str(sweep), "--output", str(tmp_path / "c"))
    assert run.returncode == 0, run.stderr
    assert "HOLDS             reap_beats_frequency_half_mixed" in run.stdout
    code = WITHOUT_TORCH.replace(
        "sys.exit(main(sys.argv[1:]))", "main(sys.argv[1:])\nassert 'torch' not in sys.modules"
    )
    arguments = [sys.executable, "-c", code, "claims", str(sweep), "--output", str(tmp_path / "c")]
    assert subprocess.run(arguments, capture_output=True, cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_200_cells_take_less_than_a_minute(tmp_path):
    """Of computing: the machine's other work does not count."""
    baselines, store = RecordStore(tmp_path, "baseline"), RecordStore(tmp_path)
    baselines.write(*make_cell("none", 0.0, "none", 0, BASELINE))
    methods = ("reap", "frequency", "hc_smoe", "m_smoe", "gate_sum", "soft_count", "ean_sum", "ean_mean")
    cells = 0
    for corpus in ("mixed", "code", "math", "writing", "real_text"):
        for method in methods:
            for ratio in (0.125, 0.25, 0.375, 0.45, 0.5):
                right = RIGHT["reap"][0.5 if ratio > 0.3 else 0.25]
                store.write(*make_cell(method, ratio, corpus, 0, right))
                cells += 1
    assert cells == 200
    started = time.process_time()
    assert main(["claims", str(tmp_path)]) == 0
    seconds = time.process_time() - started
    print(f"{seconds:.1f} s for {cells} cells")
    assert seconds < 60
