"""Numbers of layers, tested on the samples behind them: against scipy, closed forms and simulations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from harness.files import write_files
from harness.records.store import RecordStore
from reports.claims.evaluate import Finding, evaluate_claims
from reports.claims.list import MEASURES
from reports.claims.selection import Cell
from reports.claims.vocabulary import Claim, Contrast, Contrasts, FollowsWithin
from reports.numbers.contrasts import Comparer
from reports.numbers.layer_samples import GROUPS, LAYERS, PARTS, pseudo_values, unit_of, with_layer_samples
from reports.numbers.load import Panel, load_panels
from tests.reports.synthetic import RIGHT, make_cell
from tests.reports.tables.test_layers import numbers, told

FOLDS = 10
SPREAD = MEASURES["spread"]


def parts_of(value: float, seed: int, width: float = 0.05) -> list[float]:
    """A value without each of the ten parts, of which it is the mean."""
    parts = value + width * np.random.default_rng(seed).standard_normal(FOLDS)
    parts += value - parts.mean()
    return ((value * FOLDS - parts) / (FOLDS - 1)).tolist()


def layer(spread: float, seed: int, distances: dict[int, list[float]] | None = None, width: float = 0.05) -> dict:
    """``distances``: new expert -> those of the pairs of its group."""
    pairs = [[new, 0, 1] for new, own in (distances or {}).items() for _ in own]
    found = numbers(0, 1.0, False) | {"spread_ratio": [spread, spread - 0.01, spread + 0.01]}
    found["left_out"] = {"spread_ratio": parts_of(spread, seed, width)}
    flat = [distance for own in (distances or {}).values() for distance in own]
    return found | ({"aligned_distance": flat, "distance": flat, "overlap": flat, "pairs": pairs} if pairs else {})


def panel_of(folder: Path, cells: dict[str, list[dict[str, Any]]], **more: Any) -> Panel:
    """Method -> its layers; ``more`` goes into every file of diagnostics."""
    for method, layers in cells.items():
        record, _ = make_cell(method, 0.5, "mixed", 0, RIGHT["reap"][0.5])
        RecordStore(folder).write(record, [])
        cell = record.cell["id"]
        found = told(cell, {str(number): own for number, own in enumerate(layers)}) | {"sample": "abc"} | more
        write_files({folder / "diagnostics" / f"{cell}.json": json.dumps(found).encode()})
    (panel,) = load_panels(folder)
    return with_layer_samples(folder, panel)


def rows(panel: Panel) -> dict[str, Any]:
    return {row.method: row for row in panel.rows}


def verdict(panel: Panel, test: Contrasts | FollowsWithin) -> Finding:
    (found,) = evaluate_claims([Claim("it", "It is so.", "a test", "mixed", test)], [panel], MEASURES)
    return found


def over(first: str, second: str) -> Contrasts:
    return Contrasts((Contrast("spread", ((1, "spread", Cell(first)), (-1, "spread", Cell(second))), 0.0),))


def test_pseudo_values_have_the_jackknifes_error_and_are_the_parts_of_a_mean() -> None:
    without = np.random.default_rng(0).uniform(1, 2, FOLDS)
    found = pseudo_values(1.5, without.tolist())
    error = math.sqrt((FOLDS - 1) / FOLDS * np.sum((without - without.mean()) ** 2))
    assert found.mean() == pytest.approx(1.5) and found.std(ddof=1) / math.sqrt(FOLDS) == pytest.approx(error)
    parts = np.random.default_rng(1).uniform(size=FOLDS)
    left_out = [np.delete(parts, i).mean() for i in range(FOLDS)]
    assert pseudo_values(parts.mean(), left_out) == pytest.approx(parts) and not len(pseudo_values(1.0, []))


def test_a_mean_over_two_layers_is_tested_on_parts_of_the_tokens(tmp_path: Path) -> None:
    cells = {"reap": [layer(0.9, 0), layer(0.8, 1)], "hc_smoe": [layer(0.85, 2), layer(0.83, 3)]}
    panel = panel_of(tmp_path, cells)
    found = Comparer().difference(SPREAD, rows(panel)["reap"], rows(panel)["hc_smoe"])
    sides = [
        np.mean([pseudo_values(own["spread_ratio"][0], own["left_out"]["spread_ratio"]) for own in layers], axis=0)
        for layers in cells.values()
    ]
    assert found is not None and found.paired and (found.n, found.df) == (FOLDS, pytest.approx(FOLDS - 1))
    assert found.effect == pytest.approx(0.85 - 0.84)
    assert found.p == pytest.approx(stats.ttest_rel(*sides).pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_rel(*sides).confidence_interval(0.95)))
    undecided = verdict(panel, over("reap", "hc_smoe"))
    assert f"n 10 {PARTS}; above 0 in 1 of 2 layers" in undecided.evidence[0].text and undecided.verdict == "undecided"
    assert "times the calibration tokens (diagnostics.tokens)" in undecided.more


def test_two_layers_can_decide_where_the_tokens_agree(tmp_path: Path) -> None:
    close = {"reap": [layer(0.9, 0), layer(0.8, 1)], "hc_smoe": [layer(0.4, 2), layer(0.5, 3)]}
    found = verdict(panel_of(tmp_path, close), over("reap", "hc_smoe"))
    assert found.verdict == "holds" and "above 0 in 2 of 2 layers" in found.evidence[0].text
    assert verdict(panel_of(tmp_path, close), over("hc_smoe", "reap")).verdict == "reversed"


def test_parts_of_other_tokens_are_not_paired(tmp_path: Path) -> None:
    panel_of(tmp_path, {"reap": [layer(0.9, 0)]})
    panel = panel_of(tmp_path, {"hc_smoe": [layer(0.5, 0)]}, sample="other")
    found = Comparer().difference(SPREAD, rows(panel)["reap"], rows(panel)["hc_smoe"])
    assert found is not None and not found.paired
    errors = [np.std(parts_of(value, 0), ddof=1) * 9 / math.sqrt(FOLDS) for value in (0.9, 0.5)]
    assert found.error == pytest.approx(math.hypot(*errors))


def test_distances_are_tested_on_groups_layer_by_layer(tmp_path: Path) -> None:
    groups = [{0: [1.2, 1.4], 1: [1.1], 4: [0.9, 1.0, 1.1]}, {0: [1.3], 2: [1.5, 1.1], 3: [1.0], 5: [1.4]}]
    panel = panel_of(tmp_path, {"m_smoe": [layer(0.5, i, own) for i, own in enumerate(groups)]})
    bar = Contrasts((Contrast("distance", ((1.0, "merged_distance", Cell("m_smoe")),), 0.05, 1.0),))
    found = verdict(panel, bar)
    means = [np.array([np.mean(own) for own in of_layer.values()]) for of_layer in groups]
    comparison = found.evidence[0].comparison
    assert comparison is not None and comparison.n == 7
    assert comparison.effect == pytest.approx(np.mean([own.mean() for own in means]))
    squares = [own.var(ddof=1) / len(own) / 4 for own in means]
    assert comparison.error == pytest.approx(math.sqrt(sum(squares)))
    assert comparison.df == pytest.approx(sum(squares) ** 2 / (squares[0] ** 2 / 2 + squares[1] ** 2 / 3))
    assert f"n 7 {GROUPS}; above 1 in 2 of 2 layers" in found.evidence[0].text
    alone = panel_of(tmp_path, {"m_smoe": [layer(0.5, 0, groups[0])]})
    one_layer = verdict(alone, bar)
    seen = one_layer.evidence[0].comparison
    assert seen is not None and seen.p_above(1.0) == pytest.approx(
        stats.ttest_1samp(means[0], 1.0, alternative="greater").pvalue
    )
    assert one_layer.verdict == "undecided" and "the plan has no more groups" in one_layer.more


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_without_samples_few_layers_decide_nothing(tmp_path: Path, layers: int, apart: float) -> None:
    """Files from before the samples were kept; every layer differs by exactly as much."""
    cells = {
        name: [layer(value, i) for i in range(layers)] for name, value in (("reap", 0.5 + apart), ("hc_smoe", 0.5))
    }
    for own in (own for of_cell in cells.values() for own in of_cell):
        del own["left_out"]
    panel = panel_of(tmp_path, cells)
    assert unit_of(SPREAD.parts[0], list(rows(panel).values())) == LAYERS
    found = verdict(panel, over("reap", "hc_smoe"))
    comparison = found.evidence[0].comparison
    assert comparison is not None and comparison.n == layers and comparison.effect == pytest.approx(apart)
    assert found.verdict == "undecided" and found.p is not None and found.p >= 0.5 ** (layers - 1)
    assert f"n {layers} {LAYERS}" in found.evidence[0].text and "the model has no more layers" in found.more
    assert "inf" not in found.evidence[0].text + found.more and "nan" not in found.evidence[0].text + found.more


def test_equal_parts_are_no_certainty(tmp_path: Path) -> None:
    """Nor are two layers whose differences are equal but for the rounding."""
    assert 0.7 - 0.4 != 0.5 - 0.2
    of_layers = {"reap": [layer(0.7, 0), layer(0.5, 0)], "hc_smoe": [layer(0.4, 0), layer(0.2, 0)]}
    for own in (own for of_cell in of_layers.values() for own in of_cell):
        del own["left_out"]
    assert verdict(panel_of(tmp_path / "two", of_layers), over("reap", "hc_smoe")).p == pytest.approx(0.5)
    cells = {"reap": [layer(0.9, 0, width=0)] * 2, "hc_smoe": [layer(0.5, 0, width=0)] * 2}
    found = verdict(panel_of(tmp_path, cells), over("reap", "hc_smoe")).evidence[0].comparison
    assert found is not None and (found.effect, found.error) == (pytest.approx(0.4), 0.0)
    assert found.p == pytest.approx(2 * 0.5**FOLDS)


def test_intervals_over_parts_cover(tmp_path: Path) -> None:
    """A ratio of sums over tokens that come in documents, of two fixed layers: the true one is inside often enough."""
    rng, hits = np.random.default_rng(5), 0
    true = np.mean([0.5 / 1.0, 0.9 / 2.0])
    for _ in range(300):
        kinds = rng.normal(size=(60, 1))  # a document's own kind, which all of its tokens and both layers share
        below = np.exp(rng.normal(0, 0.3, size=(2, 60)) + 0.3 * kinds[:, 0]) * np.array([[1.0], [2.0]])
        above = below * (np.array([[0.5], [0.45]]) + 0.1 * rng.standard_normal((2, 60)))
        folds = rng.permutation(60) % FOLDS
        values = [above[i].sum() / below[i].sum() for i in (0, 1)]
        left_out = [[above[i][folds != f].sum() / below[i][folds != f].sum() for f in range(FOLDS)] for i in (0, 1)]
        parts = np.mean([pseudo_values(v, without) for v, without in zip(values, left_out, strict=True)], axis=0)
        low, high = stats.ttest_1samp(parts, 0).confidence_interval(0.95)
        hits += low <= true <= high
    assert 0.92 < hits / 300 < 0.99


def test_merged_pairs_are_set_against_random_pairs_of_their_layer(tmp_path: Path) -> None:
    own = [layer(0.5, i, {0: [1.2, 1.4], 1: [1.1]}) | {"average_aligned_distance": [1.3, 1.5, 1.4]} for i in range(2)]
    panel = panel_of(tmp_path, {"m_smoe": own})
    terms = ((1.0, "merged_distance", Cell("m_smoe")), (-1.0, "random_distance", Cell("m_smoe")))
    found = verdict(panel, Contrasts((Contrast("apart", terms, 0.05, -0.05),))).evidence[0].comparison
    assert found is not None and found.effect == pytest.approx(np.mean([1.3, 1.1]) - 1.4)
    squares = [np.var([1.3, 1.1], ddof=1) / 2 / 4, np.var([1.3, 1.5, 1.4], ddof=1) / 3 / 4]
    assert found.error == pytest.approx(math.sqrt(2 * sum(squares))) and found.n == 2 * (2 + 3)


def test_order_within_a_cell_is_counted_and_two_layers_decide_nothing(tmp_path: Path) -> None:
    cells = {}
    for place, method in enumerate(("hc_smoe", "m_smoe")):
        own = [numbers(i, 0.3 + 0.4 * place, True) for i in range(2)]
        cells[method] = [one | {"left_out": {}, "pairs": []} for one in own]
    names = ("predicted_error", "measured_error")
    test = FollowsWithin(*names, tuple(Cell(name) for name in cells))
    found = verdict(panel_of(tmp_path, cells), test)
    assert found.verdict == "undecided" and found.p is None and "2 layers are too few" in found.more
    assert found.evidence[0].text.startswith("2 of 2 pairs of layers within a method and ratio")
    factors = [layers[0]["measured_error"][0] / layers[0]["predicted_error"][0] for layers in cells.values()]
    assert all(f"layer 0 ×{factor:.1f}" in one.text for factor, one in zip(factors, found.evidence[1:], strict=True))
    many = {"hc_smoe": [numbers(i, 0.3, True) | {"left_out": {}, "pairs": []} for i in range(5)]}
    assert verdict(panel_of(tmp_path / "many", many), FollowsWithin(*names, (Cell("hc_smoe"),))).verdict == "holds"
    assert (
        verdict(
            panel_of(tmp_path / "turned", {"hc_smoe": turned(many["hc_smoe"])}),
            FollowsWithin(*names, (Cell("hc_smoe"),)),
        ).verdict
        == "reversed"
    )


def turned(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the measured errors in the opposite order."""
    return [one | {"measured_error": other["measured_error"]} for one, other in zip(layers, layers[::-1], strict=True)]
