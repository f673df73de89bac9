"""Verdicts, effects and equivalence tests of the committed records, computed again by pandas and scipy alone.

Nothing of ``reports/`` is imported here: the command runs in a process of its own, and its claims.json is compared with
what this file makes of the JSON and parquet files of the records.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).parents[3]
FOLDERS = [ROOT / "results" / name for name in ("claims", "reference", "channels_vs_experts", "routing")]
CLAIMS, REFERENCE, CHANNELS = FOLDERS[:3]
DOMAINS = ("code", "math", "writing")
POINTS = 0.02


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("claims") / "claims"
    command = "import sys; from reports.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", command, "claims", *map(str, FOLDERS), "--output", str(out)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.with_suffix(".json").read_text())


# --- records ----------------------------------------------------------------------------------------------------------


def cells(folder: Path) -> pd.DataFrame:
    rows = []
    for path in [*(folder / "records").glob("*.json"), *(folder / "baseline").glob("*.json")]:
        data = json.loads(path.read_text())
        method = data["config"].get("method") or {}
        rows.append(
            {name: data["cell"].get(name) for name in ("model", "method", "ratio", "calibration", "seed")}
            | {name: data["cell"].get(name) or "" for name in ("quantize", "schedule")}
            | {"scope": method.get("scope") or "layer", "limit": method.get("max_group_size") or 0}
            | {"path": path.with_suffix(".parquet")}
        )
    return pd.DataFrame(rows)


_CELLS: dict[Path, pd.DataFrame] = {}


def scores(folder: Path, method: str, ratio: float, corpus: str, task: str, **more) -> pd.DataFrame:
    """item -> the score, its mean over seeds, and a column a seed."""
    if folder not in _CELLS:
        _CELLS[folder] = cells(folder)
    table = _CELLS[folder]
    wanted = {"quantize": "", "schedule": "", "scope": "layer", "limit": 0} | more
    mask = (table.model == "reference") & (table.method == method) & np.isclose(table.ratio.astype(float), ratio)
    if method not in ("random", "none", "magnitude_channels"):
        mask &= table.calibration == corpus
    for name, value in wanted.items():
        mask &= (
            table[name].astype(str).str.startswith(value) if value and isinstance(value, str) else table[name] == value
        )
    found = table[mask]
    assert len(found) == found.seed.nunique() >= 1, (method, ratio, corpus, more)
    frames = []
    for path, seed in zip(found.path, found.seed, strict=True):
        samples = pd.read_parquet(path, columns=["task", "domain", "item", "score", "weight"])
        own = samples[samples.task == task].set_index(["domain", "item"])
        frames.append(own.score.rename(seed))
        weight = own.weight
    return pd.concat(frames, axis=1).assign(weight=weight).sort_index()


def prompts() -> dict[str, str]:
    path = sorted((CLAIMS / "records").glob("*reap__0.5__mixed*.parquet"))[0]
    samples = pd.read_parquet(path, columns=["item", "prompt"])
    return {item: prompt for item, prompt in zip(samples["item"], samples["prompt"], strict=True) if prompt}


def groupings(items: list[str]) -> list[pd.Series]:
    """Of each grouping the label of every item; what shares none is alone."""
    known = prompts()
    labels = []
    for item in items:
        prompt = known.get(item, "")
        fields = [f"{name}={value}" for name, value in re.findall(r"(?m)^([A-Z][a-z]+): (\S.*)$", prompt)]
        masked = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"|\d+(?:\.\d+)?", "#", prompt.replace('"""', "\n"))
        masked = re.sub(r"(?<![.?!:\n] )(?<!^)\b[A-Z][a-z]+\b", "#", masked)
        labels.append(fields if len(fields) >= 3 else [masked] if prompt else [])
    wide = max(map(len, labels), default=0)
    return [
        pd.Series([of[k] if k < len(of) else item for of, item in zip(labels, items, strict=True)]) for k in range(wide)
    ]


# --- statistics -------------------------------------------------------------------------------------------------------


class Sum:
    """Effects that add up, with the squared errors of independent parts and their degrees of freedom."""

    def __init__(self) -> None:
        self.effect = self.centre = 0.0
        self.parts: list[tuple[float, float]] = []
        self.plain: list[tuple[float, float]] = []
        self.n = 0

    def share(self, pairs: list[tuple[float, pd.DataFrame]]) -> None:
        """A weighted sum of shares over common items, two items at its extremes made up."""
        columns = [frame.drop(columns="weight").mean(axis=1) * weight for weight, frame in pairs]
        total = pd.concat(columns, axis=1, join="inner").sum(axis=1)
        extremes = [sum(w for w, _ in pairs if w > 0), sum(w for w, _ in pairs if w < 0)]
        padded = np.append(total, extremes)
        self._add(total.mean(), padded.mean(), padded.var() / (len(total) + 2), total - total.mean(), len(total))

    def perplexity(self, first: pd.DataFrame, second: pd.DataFrame) -> None:
        """Of logarithms; the geometric mean over domains, in each of which a text counts by its tokens."""
        domains = first.index.get_level_values("domain")
        share = 1 / domains.nunique()
        for domain in domains.unique():
            own, tokens = (first[0] - second[0])[domains == domain], first.weight[domains == domain]
            mean = own.sum() / tokens.sum()
            apart = share * (own - mean * tokens) / tokens.mean()
            self._add(share * mean, share * mean, apart.var(ddof=1) / len(apart), apart, len(apart))

    def seeds(self, values: np.ndarray) -> None:
        one = (values.var(ddof=1) / len(values), len(values) - 1.0)
        self.parts.append(one)
        self.plain.append(one)

    def _add(self, effect: float, centre: float, square: float, apart: pd.Series, n: int) -> None:
        self.effect, self.centre, self.n = self.effect + effect, self.centre + centre, self.n + n
        found = [(square, n - 1.0)]
        items = apart.index.get_level_values("item").tolist()
        for labels in groupings(items):
            sums = apart.groupby(labels.to_numpy()).sum()
            if 10 <= len(sums) < n:
                found.append((len(sums) / (len(sums) - 1) * (sums**2).sum() / n**2, len(sums) - 1.0))
        self.plain.append(found[0])
        self.parts.append(max(found) if square > 0 else found[0])

    def error(self) -> tuple[float, float]:
        total = sum(square for square, _ in self.parts)
        return math.sqrt(total), total**2 / sum(square**2 / df for square, df in self.parts if square)

    def above(self, bar: float) -> float:
        error, df = self.error()
        return float(stats.t.sf((self.effect - bar) / error, df))

    def below(self, bar: float) -> float:
        error, df = self.error()
        return float(stats.t.cdf((self.effect - bar) / error, df))

    def interval(self) -> tuple[float, float]:
        error, df = self.error()
        half = stats.t.ppf(0.975, df) * error
        return min(self.effect, self.centre - half), max(self.effect, self.centre + half)


def generation(pairs) -> Sum:
    """``pairs``: (weight, domain, folder, method, ratio, corpus, more) of every cell; seeds counted where several."""
    found = Sum()
    of_cells: dict[tuple, np.ndarray] = {}
    for domain in dict.fromkeys(domain for _, domain, *_ in pairs):
        own = []
        for weight, of, folder, method, ratio, corpus, more in pairs:
            if of != domain:
                continue
            frame = scores(folder, method, ratio, corpus, domain, **more)
            own.append((weight, frame))
            key = (method, "" if method in ("random", "magnitude_channels") else corpus, *more.items())
            of_cells[key] = of_cells.get(key, 0.0) + weight * frame.drop(columns="weight").mean().to_numpy()
        found.share(own)
    for values in of_cells.values():
        if len(values) > 1:
            found.seeds(values)
    return found


def average(folder, first, second, ratio=0.5, corpora=None, first_more=None, second_more=None) -> Sum:
    """The mean over domains, by ``corpora``: (domain, corpus, share) of each."""
    pairs = []
    for domain, corpus, share in corpora:
        pairs.append((share, domain, folder, first, ratio, corpus, first_more or {}))
        pairs.append((-share, domain, folder, second, ratio, corpus, second_more or {}))
    return generation(pairs)


def one_task(folder, task, first, second, ratio=0.5, corpus="mixed", first_more=None, second_more=None) -> Sum:
    found = Sum()
    found.share(
        [
            (1.0, scores(folder, first, ratio, corpus, task, **(first_more or {}))),
            (-1.0, scores(folder, second, ratio, corpus, task, **(second_more or {}))),
        ]
    )
    return found


def perplexity(second_more: dict) -> Sum:
    found = Sum()
    frames = (scores(CLAIMS, "reap", 0.5, "mixed", "perplexity", **more) for more in ({}, second_more))
    found.perplexity(*frames)
    return found


ON = {
    "matched": [(domain, domain, 1 / 3) for domain in DOMAINS],
    "shifted": [(domain, corpus, 1 / 6) for domain in DOMAINS for corpus in DOMAINS if domain != corpus],
    "general": [(domain, "real_text", 1 / 3) for domain in DOMAINS],
    "mixed": [(domain, "mixed", 1 / 3) for domain in DOMAINS],
}
# Claim -> (what it is made of, margin, size that was stated, verdict).
WANTED = {
    "reap_beats_hc_smoe_half_mixed": (
        lambda: average(CLAIMS, "reap", "hc_smoe", corpora=ON["mixed"]), POINTS, None, "holds"),
    "reap_beats_hc_smoe_half_general": (
        lambda: average(CLAIMS, "reap", "hc_smoe", corpora=ON["general"]), POINTS, None, "reversed"),
    "reap_beats_m_smoe_half_matched": (
        lambda: average(REFERENCE, "reap", "m_smoe", corpora=ON["matched"]), POINTS, None, "holds"),
    "reap_beats_frequency_quarter_mixed": (
        lambda: average(CLAIMS, "reap", "frequency", 0.25, ON["mixed"]), POINTS, None, "undecided"),
    "coverage_beats_magnitude_half_shifted": (
        lambda: average(CHANNELS, "coverage", "magnitude_channels", corpora=ON["shifted"]), POINTS, None, "reversed"),
    "frequency_worse_than_random_mixed": (
        lambda: average(CLAIMS, "random", "frequency", corpora=ON["mixed"]), POINTS, None, "undecided"),
    "hc_smoe_repeats": (lambda: one_task(CLAIMS, "diversity", "reap", "hc_smoe"), POINTS, None, "negligible"),
    "global_thresholds_loop": (
        lambda: one_task(CLAIMS, "generation", "reap", "reap", first_more={"scope": "global"}), 0.01, None,
        "negligible"),
    "global_beats_layerwise_in_perplexity": (lambda: perplexity({"scope": "global"}), 0.0198, None, "holds"),
    "iterative_halves_perplexity": (
        lambda: perplexity({"schedule": "iterative"}), 0.0198, math.log(30.6 / 17.4), "smaller than said"),
    "limiting_groups_costs_much": (
        lambda: one_task(CLAIMS, "code", "hc_smoe", "hc_smoe", second_more={"limit": 32}), POINTS, 0.05,
        "smaller than said"),
    "channels_beat_experts_in_choice_mixed": (
        lambda: one_task(CLAIMS, "multiple_choice", "coverage", "reap"), 0.01, None, "holds"),
}  # fmt: skip


def verdict_and_p(found: Sum, margin: float, least: float | None) -> dict[str, float]:
    """Two-sided p-values by verdict."""
    if least is not None:
        return {"holds": 2 * found.above(least), "smaller than said": 2 * found.below(least)}
    inside = max(found.above(-margin), found.below(margin))
    return {"holds": 2 * found.above(margin), "reversed": 2 * found.below(-margin), "negligible": 2 * inside}


@pytest.mark.parametrize("name", WANTED)
def test_effects_errors_and_p_values(name: str, told: list[dict]) -> None:
    make, margin, least, _ = WANTED[name]
    (claim,) = [one for one in told if one["id"] == name and one["model"] == "reference"]
    (evidence,) = claim["evidence"]
    found = make()
    assert evidence["margin"] == margin and evidence["least"] == least
    assert (evidence["effect"], evidence["n"]) == (pytest.approx(found.effect, abs=1e-12), found.n)
    assert (evidence["error"], evidence["df"]) == pytest.approx(found.error(), rel=1e-9)
    assert (evidence["low"], evidence["high"]) == pytest.approx(found.interval(), abs=1e-9)
    p = min(1.0, *verdict_and_p(found, margin, least).values())
    assert claim["p"] == pytest.approx(p, rel=1e-6)
    assert evidence["p_within"] == pytest.approx(max(found.above(-margin), found.below(margin)), rel=1e-6, abs=1e-300)


def test_verdicts_by_holms_rule(told: list[dict]) -> None:
    """Over all p-values of the command, those of ten claims and more in place of its own."""
    tested = [one for one in told if one["p"] is not None]
    own = {name: verdict_and_p(make(), margin, least) for name, (make, margin, least, _) in WANTED.items()}
    p_values = pd.Series(
        [
            min(1.0, *own[one["id"]].values()) if one["id"] in own and one["model"] == "reference" else one["p"]
            for one in tested
        ]
    )
    order = p_values.sort_values()
    corrected = (order * np.arange(len(order), 0, -1)).clip(upper=1.0).cummax().reindex(p_values.index)
    assert corrected.tolist() == pytest.approx([one["p_corrected"] for one in tested], rel=1e-6)
    for place, one in enumerate(tested):
        if one["id"] in WANTED and one["model"] == "reference":
            found = own[one["id"]]
            verdict = min(found, key=found.get) if corrected[place] < 0.05 else "undecided"
            assert verdict == one["verdict"] == WANTED[one["id"]][3], one["id"]
