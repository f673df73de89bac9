"""Claims over several models, pooled by scipy and pandas alone; the spread over corpora; the models that were tried."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from harness.records.identity import cell_id
from harness.records.store import RecordStore
from reports.claims.panel import BARS, bars_table, tried
from reports.claims.report import write_claims
from reports.numbers.load import load_panels
from tests.reports.synthetic import BASELINE, make_cell

CORPORA = ("mixed", "code", "math", "writing")
METHODS = ("reap", "hc_smoe", "m_smoe", "frequency")
MODELS = ("one", "two", "three", "four")
CLAIM = "reap_beats_hc_smoe_half_mixed"


def right(model: str, method: str, corpus: str) -> dict[str, float]:
    """Right answers by task: REAP's depend on its corpus, and models differ."""
    generator = np.random.default_rng([MODELS.index(model), METHODS.index(method), CORPORA.index(corpus)])
    code, math, writing = generator.integers((8, 6, 4), (20, 18, 12))
    more = 14 if method == "reap" else 0
    return {
        "code": int(code) + more * (corpus in ("mixed", "code")),
        "math": int(math) + more * (corpus in ("mixed", "math")),
        "writing": int(writing) + 7 * (method == "reap" and corpus == "writing"),
        "choice": 12,
        "perplexity": 5.0,
    }


def write(folder: Path, models: tuple[str, ...]) -> None:
    for model in models:
        cells = [("none", 0.0, "none")] + [(method, 0.5, corpus) for method in METHODS for corpus in CORPORA]
        for method, ratio, corpus in cells:
            scores: Mapping[str, float] = BASELINE if method == "none" else right(model, method, corpus)
            record, samples = make_cell(method, ratio, corpus, 0, dict(scores))
            cell = {key: value for key, value in record.cell.items() if key != "id"} | {"model": model}
            config = {**record.config, "model": {"name": model, "path": model}}
            record = replace(
                record, cell={"id": cell_id(cell, config), **cell}, config=config, fingerprints={"model": model}
            )
            RecordStore(folder, "baseline" if method == "none" else "records").write(record, samples)


def items(folder: Path) -> pd.DataFrame:
    """One line an item and cell, read by other code."""
    frames = []
    for path in sorted(folder.glob("records/*.json")):
        cell = json.loads(path.read_text())["cell"]
        frame = pd.read_parquet(path.with_suffix(".parquet"))
        frames.append(frame.assign(**{key: cell[key] for key in ("model", "method", "calibration")}))
    return pd.concat(frames)


def difference(table: pd.DataFrame, model: str) -> tuple[float, float]:
    """REAP less HC-SMoE on mixed, and its squared error: items paired, two made up for each task, tasks independent."""
    effect = variance = 0.0
    for task in ("code", "math", "writing"):
        of = table[(table.task == task) & (table.model == model) & (table.calibration == "mixed")]
        wide = of.pivot(index="item", columns="method", values="score")
        apart = (wide.reap - wide.hc_smoe).to_numpy()
        effect += apart.mean() / 3
        made_up = np.append(apart, [1.0, -1.0])
        variance += made_up.var(ddof=0) / len(made_up) / 9
    return effect, variance


def pooled(effect: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    k = len(effect)

    def mean(tau2: float) -> float:
        return float(np.average(effect, weights=1 / (variance + tau2)))

    def q(tau2: float) -> float:
        return float(np.sum((effect - mean(tau2)) ** 2 / (variance + tau2)))

    tau2 = optimize.brentq(lambda t: q(t) - (k - 1), 0, 10) if q(0) > k - 1 else 0.0
    w = 1 / (variance + tau2)
    error = np.sqrt(max(1 / w.sum(), np.sum(w * (effect - mean(tau2)) ** 2) / (k - 1) / w.sum()))
    return {"effect": mean(tau2), "error": float(error), "tau2": tau2, "q": q(0), "q_p": stats.chi2.sf(q(0), k - 1)}


def test_effects_are_pooled_over_models_as_other_code_does(tmp_path: Path) -> None:
    write(tmp_path, MODELS)
    printed = write_claims([tmp_path], tmp_path / "report" / "claims")
    claims = [one for one in json.loads((tmp_path / "report/claims.json").read_text()) if one["id"] == CLAIM]
    assert [one["model"] for one in claims] == sorted(MODELS), "a verdict over items for each model"
    found = claims[0]["over_models"]
    table = items(tmp_path)
    own = [difference(table, model) for model in sorted(MODELS)]
    effect, variance = (np.array(side) for side in zip(*own, strict=True))
    of_models = found["contrasts"][0]["models"]
    assert [one["effect"] for one in of_models] == pytest.approx(effect)
    assert [one["error"] for one in of_models] == pytest.approx(np.sqrt(variance), rel=1e-6)
    expected = pooled(effect, variance)
    for name, value in expected.items():
        assert found["contrasts"][0][name] == pytest.approx(value, rel=1e-3, abs=1e-9), name
    half = stats.t.ppf(0.975, len(MODELS) - 1) * expected["error"]
    assert found["contrasts"][0]["high"] == pytest.approx(expected["effect"] + half, rel=1e-3)
    above = stats.t.sf((expected["effect"] - 0.02) / expected["error"], len(MODELS) - 1)
    assert found["p"] == pytest.approx(min(1, 2 * above), rel=1e-2)
    assert found["verdicts"] == {one["model"]: one["verdict"] for one in claims}
    text = (tmp_path / "report/claims.md").read_text()
    assert "## Over models" in text and "over 4 models" in text and "Over models:" in printed
    assert "Models tried before" not in text, "none of them is the shipped one"


def test_the_spread_over_corpora_is_a_claim_on_each_model(tmp_path: Path) -> None:
    write(tmp_path, MODELS[:2])
    write_claims([tmp_path], tmp_path / "report" / "claims")
    claims = json.loads((tmp_path / "report/claims.json").read_text())
    found = [one for one in claims if one["id"] == "reap_depends_most_on_its_corpus_0.5"]
    table = items(tmp_path)
    means = table[table.task.isin(["code", "math", "writing"])].groupby(["model", "method", "calibration", "task"])
    spread = means.score.mean().groupby(["model", "method", "calibration"]).mean().groupby(["model", "method"]).std()
    for one in found:
        assert [line["name"].split(" - ")[1] for line in one["evidence"]] == ["hc_smoe", "m_smoe", "frequency"]
        for line in one["evidence"]:
            other = line["name"].split(" - ")[1]
            assert line["effect"] == pytest.approx(spread[one["model"], "reap"] - spread[one["model"], other])
    quarter = next(one for one in claims if one["id"] == "reap_depends_most_on_its_corpus_0.25")
    assert quarter["verdict"] == "not tested" and "ratio=0.25" in quarter["commands"][0]


def test_one_model_is_not_pooled(tmp_path: Path) -> None:
    write(tmp_path, MODELS[:1])
    assert "Over models" not in write_claims([tmp_path], tmp_path / "report" / "claims")
    assert all("over_models" not in one for one in json.loads((tmp_path / "report/claims.json").read_text()))


def test_the_models_that_were_tried_are_those_of_the_notes() -> None:
    rows = {}
    for line in Path("results/reference_model/NOTES.md").read_text().splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            rows[first] = rest
    for place, one in enumerate(tried()):
        assert one["model"][0] == "ABCDEF"[place]
        assert one["layers"] == rows["layers (d dense, M mixture)"][place]
        assert (str(one["baseline"] or "")) == rows["generative average, baseline"][place]
        for percent, scores in (("25", one["scores"].get("0.25", {})), ("50", one["scores"].get("0.5", {}))):
            told = {}
            for name in ("REAP", "another", "random"):
                method, value = re.fullmatch(r"([A-Za-z_-]* ?)([\d.]*).*", rows[f"{percent} %: {name}"][place]).groups()
                if value:
                    told[(method or name).strip().lower().replace("-", "_")] = float(value)
            assert scores == told


def test_a_model_that_misses_a_bar_is_shown_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("reference", "panel_seed1", "mine")
    monkeypatch.setattr("tests.reports.claims.test_over_models.MODELS", names)
    write(tmp_path, names)
    table = bars_table(load_panels(tmp_path))
    assert table is not None and [row[0] for row in table.rows] == ["panel_seed1", "reference"]
    # 36 of 40, 32 of 40 and 18 of 20 right; of the choices 20 of 25 in each domain
    assert [cell.split(" ")[0] for cell in table.rows[0][1:5]] == ["90.0", "80.0", "90.0", "80.0"]
    assert table.rows[0][5] == "met"
    monkeypatch.setitem(BARS, "math", 0.81)
    assert bars_table(load_panels(tmp_path)).rows[0][5] == "missed: math"
    assert bars_table(load_panels(tmp_path)[:1]) is None
