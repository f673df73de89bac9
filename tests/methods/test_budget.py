import re
from decimal import Decimal
from fractions import Fraction

import pytest

from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from methods.budget import as_decimal, kept_experts, parse_ratio


@pytest.mark.parametrize(
    ("written", "exact"),
    [
        ("0.55", (11, 20)),
        (0.55, (11, 20)),
        (0, (0, 1)),
        ("1/3", (1, 3)),
        (Fraction(2, 7), (2, 7)),
        ("1e-1", (1, 10)),
    ],
)
def test_a_ratio_is_read_as_it_is_written(written, exact):
    assert parse_ratio(written) == Fraction(*exact)


@pytest.mark.parametrize("bad", ["1", 1.0, "-0.1", "5/4", Fraction(1)])
def test_ratios_outside_the_unit_interval_are_refused(bad):
    with pytest.raises(WinnowError, match=r"outside \[0, 1\)"):
        parse_ratio(bad)


@pytest.mark.parametrize("bad", ["half", "", "nan", "1/0", float("inf"), None])
def test_ratios_that_are_no_numbers_are_refused(bad):
    with pytest.raises(WinnowError, match="is not a number"):
        parse_ratio(bad)


def test_the_count_is_that_of_exact_decimal_arithmetic():
    """E=60, ratio 0.55 and E=160, ratio 0.8 are where binary floats give one expert too few."""
    assert (kept_experts(MoeShape(60, 4), 0.55), kept_experts(MoeShape(160, 8), "0.8")) == (27, 32)
    for num_experts in (8, 16, 60, 64, 160):
        for hundredths in range(0, 90):
            ratio = Decimal(hundredths) / 100
            removed = int(num_experts * ratio)  # Decimal is exact here; int cuts towards zero
            assert kept_experts(MoeShape(num_experts, 1), str(ratio)) == num_experts - removed


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (64, 8), (128, 8), (16, 16), (7, 3), (384, 8)])
def test_too_few_for_top_k_names_the_largest_ratio_that_works(num_experts, top_k):
    ratio = Fraction(num_experts - top_k + 1, num_experts)
    with pytest.raises(WinnowError, match=f"top-k = {top_k}") as error:
        kept_experts(MoeShape(num_experts, top_k), ratio)
    largest = re.search(r"largest ratio that works is ([\d.]+) ", str(error.value)).group(1)
    assert kept_experts(MoeShape(num_experts, top_k), largest) == top_k


def test_group_limited_routers_need_a_multiple_of_their_groups():
    assert kept_experts(MoeShape(16, 2, n_group=4), 0.25) == 12
    with pytest.raises(WinnowError, match="nearest ratios") as error:
        kept_experts(MoeShape(16, 2, n_group=4), 0.4)
    nearest = re.findall(r"0\.\d+", str(error.value).split("nearest")[1])
    assert [kept_experts(MoeShape(16, 2, n_group=4), r) for r in nearest] == [16 - 4, 16 - 8]
    with pytest.raises(WinnowError, match="largest ratio") as error:
        kept_experts(MoeShape(16, 5, n_group=4), 0.9)  # 8 is the smallest multiple of 4 that is not below 5
    assert "0.5 (8 of 16 removed)" in str(error.value)
    with pytest.raises(WinnowError, match="contradicts itself"):
        kept_experts(MoeShape(10, 2, n_group=4), 0)


@pytest.mark.parametrize("num_experts", [1, 3, 7, 48, 60, 128, 512])
def test_a_short_decimal_removes_exactly_the_number_it_stands_for(num_experts):
    for removed in range(num_experts):
        text = as_decimal(removed, num_experts)
        assert int(num_experts * Decimal(text)) == removed
        assert len(text) <= 6


def test_fewer_rows_than_a_router_needs_are_refused():
    """Four groups of which two are chosen, top-4: each must have two, so eight rows stay."""
    with pytest.raises(
        WinnowError, match=r"leaves 4 of 16 experts, fewer than the 8 that the router needs; .* is 0.5 "
    ):
        kept_experts(MoeShape(16, 4, n_group=4, fewest_rows=8), 0.75)
    assert kept_experts(MoeShape(16, 4, n_group=4, fewest_rows=8), 0.5) == 8
    assert kept_experts(MoeShape(16, 4, n_group=4), 0.75) == 4
    with pytest.raises(WinnowError, match="contradicts itself"):
        kept_experts(MoeShape(8, 2, fewest_rows=9), 0)
