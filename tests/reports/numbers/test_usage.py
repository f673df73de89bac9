import numpy as np
import pytest

from reports.numbers.usage import collect_usage, half_overlap, layer_names, relative_usage, top_quarter_share
from tests.reports.synthetic import RIGHT, make_cell

USAGE = {
    "code": {"0": np.array([8.0, 4.0, 2.0, 2.0]), "2": np.array([1.0, 1.0, 1.0, 1.0])},
    "math": {"0": np.array([0.0, 10.0, 20.0, 10.0]), "2": np.array([0.0, 0.0, 0.0, 0.0])},
}


def test_use_is_relative_to_the_layers_mean_in_one_order():
    table = relative_usage(USAGE)
    # Shares code .5 .25 .125 .125, math 0 .25 .5 .25: summed .5 .5 .625 .375, so experts 2, 0, 1, 3.
    assert table["code"][0].tolist() == [0.5, 2.0, 1.0, 0.5]
    assert table["math"][0].tolist() == [2.0, 0.0, 1.0, 1.0]
    assert table["math"][1].tolist() == [1.0] * 4  # a layer that no token reached


def test_layers_are_in_numeric_order_and_padded():
    usage = {"code": {"10": np.ones(2), "9": np.ones(3)}}
    assert layer_names(usage) == ["9", "10"]
    table = relative_usage(usage)["code"]
    assert table.shape == (2, 3) and np.isnan(table[1, 2]) and not np.isnan(table[0]).any()


def test_top_quarter_share_is_the_mean_over_layers():
    assert top_quarter_share(USAGE["code"]) == pytest.approx((8 / 16 + 1 / 4) / 2)


def test_half_overlap():
    # Layer 0: halves {0, 1} and {2, 1}: 1/3. Layer 2: all alike, ties go by number: 1.
    assert half_overlap(USAGE) == {("code", "math"): pytest.approx((1 / 3 + 1) / 2)}


def test_each_source_comes_from_its_first_record():
    records = [make_cell("reap", 0.25, corpus, 0, RIGHT["reap"][0.25])[0] for corpus in ("code", "math", "code")]
    records[2].expert_usage["code"] = {"0": [1, 2]}
    usage = collect_usage(records)
    assert list(usage) == ["code", "math"] and list(usage["code"]) == ["0", "1", "2", "3"]
