"""Coverage pruning: widths adjusted to the options, and what is refused."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from methods.coverage import Coverage
from methods.coverage_budget import adjusted_widths, apportion, nearest_multiple
from tests.methods.conftest import made_up_case, with_statistic
from tests.methods.test_coverage import SHAPE, wide_case, widths_of

# -- adjustment ---------------------------------------------------------------------------------------------------


def test_freed_channels_go_by_free_capacity():
    """3 and 2 channels are freed; the layers have room for 10 and 30, the experts of the second for 12, 10 and 8."""
    best = [[0, 1, 2, 3]] * 2
    adjusted = adjusted_widths([[16, 16, 6, 3], [4, 6, 8, 2]], 16, 1, 4, 1, best)
    assert adjusted == [[16, 16, 7, 0], [6, 7, 9, 0]]  # 1.25 and 3.75 -> 1 and 4; then 1.6, 1.33, 1.07 -> 2, 1, 1


def test_blocks_go_first_to_those_that_rounding_took_most_from():
    adjusted = adjusted_widths([[15, 5, 10, 2, 0]], 16, 4, 4, 1, [[0, 1, 2, 3, 4]])
    assert adjusted == [[16, 4, 12, 0, 0]]  # 12, 4, 8 and two blocks more: 3 were lost by expert 0, 2 by expert 2


def test_best_experts_are_revived_for_top_k_and_for_what_has_no_room():
    assert adjusted_widths([[9, 2, 2, 3]], 16, 1, 4, 3, [[2, 0, 3, 1]]) == [[8, 0, 4, 4]]
    assert adjusted_widths([[16, 3, 3]], 16, 1, 4, 1, [[2, 1, 0]]) == [[16, 0, 6]]
    assert adjusted_widths([[16, 1, 0]], 16, 1, 4, 1, [[0, 2, 1]]) == [[13, 0, 4]]


def test_widths_that_do_not_exist_are_refused():
    with pytest.raises(WinnowError, match="20 channels cannot be split into experts of 12 to 16 each"):
        adjusted_widths([[16, 4]], 16, 1, 12, 1, [[0, 1]])


def test_apportioning_is_exact_and_within_capacity():
    rng = np.random.default_rng(0)
    for _ in range(200):
        capacities = rng.integers(0, 30, size=rng.integers(1, 9)).tolist()
        for total in range(sum(capacities) + 1):
            shares = apportion(total, capacities)
            assert sum(shares) == total
            for share, capacity in zip(shares, capacities, strict=True):
                assert share <= capacity
                assert abs(share - Fraction(total * capacity, max(sum(capacities), 1))) < 1
    assert apportion(2, [5, 5, 5]) == [1, 1, 0]
    assert [nearest_multiple(n, 8) for n in (3, 4, 11, 12, 13)] == [0, 8, 8, 16, 16]


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_score": "gradient"}, "unknown channel_score 'gradient'; known: activation, weight_activation"),
        ({"expert_weight": "loss"}, "unknown expert_weight 'loss'; known: attribution, frequency, uniform"),
        ({"layer_budget": "u"}, "unknown layer_budget 'u'; known: coverage, uniform"),
        ({"variant": "paper"}, "unknown variant 'paper'; known: exact, released"),
        ({"layout": "plain"}, "unknown layout 'plain'; known: ragged, uniform"),
        ({"align": 0}, "align must be a whole number of at least 1, not 0"),
        ({"min_channels": 2.5}, "min_channels must be a whole number of at least 1, not 2.5"),
        ({"variant": "released", "channel_score": "magnitude"}, "variant=released has channel_score=activation only"),
    ],
)
def test_unknown_options_are_refused(options: dict, message: str):
    with pytest.raises(WinnowError, match=message):
        Coverage("c", **options)


@pytest.mark.parametrize(
    ("options", "ratio", "message"),
    [
        (
            {"align": 5},
            "1/2",
            "align=5 does not divide the 24 channels of an expert; these do: 1, 2, 3, 4, 6, 8, 12, 24",
        ),
        ({"min_channels": 25}, "1/2", "min_channels=25 is more than the 24 channels"),
        (
            {"min_channels": 12},
            "9/10",
            r"leaves 87 of 864 channels, too few for 12 in top-k = 3 experts in every layer",
        ),
        ({"layout": "uniform", "min_channels": 8}, "3/4", "too few for 8 in every expert; the largest .* is 0.667"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_settings_that_cannot_be_fulfilled_say_what_could(options: dict, ratio: str, message: str):
    with pytest.raises(WinnowError, match=message):
        Coverage("c", **options).decide(wide_case(1), Fraction(ratio), 0)


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_the_largest_ratio_that_is_named_works():
    method = Coverage("c", min_channels=12)
    with pytest.raises(WinnowError, match="largest ratio that works is 0.875$"):
        method.decide(wide_case(1), Fraction(8, 9), 0)
    widths = widths_of(method.decide(wide_case(1), Fraction(7, 8), 0).plan, 24)
    assert [sorted(layer)[-4:] for layer in widths.values()] == [[0, 12, 12, 12]] * 3


@pytest.mark.parametrize(
    ("options", "ratio", "message"),
    [
        ({"align": 5}, "1/2", "align=5 does not divide the 24 channels"),
        ({"min_channels": 12}, "9/10", r"too few for 12 in top-k = 3 experts in every layer; .* works is 0.875$"),
        ({"layout": "uniform", "min_channels": 8}, "3/4", "too few for 8 in every expert; .* works is 0.667$"),
        ({"min_channels": 23}, "644/864", "leaves 220 .* experts of 23 to 24 cannot share; .*: 0.734 and 0.75$"),
    ],
)
def test_what_does_not_fit_the_shape_is_refused_before_there_are_statistics(options: dict, ratio: str, message: str):
    method = Coverage("c", **options)
    with pytest.raises(WinnowError, match=f"method 'c': .*{message}"):
        method.check(SHAPE, ratio)
    assert method.check(MoeShape(12, 3), ratio) == Fraction(ratio)


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_the_nearest_ratios_that_are_named_work():
    """Nine experts hold at most 216 channels, ten at least 230."""
    method, statistics = Coverage("c", min_channels=23), wide_case(1)
    for kept in range(217, 230):
        with pytest.raises(WinnowError, match="cannot share; the nearest ratios that work: 0.734 and 0.75$"):
            method.decide(statistics, Fraction(864 - kept, 864), 0)
    for ratio, kept in (("0.734", 230), ("0.75", 216)):
        plan = method.decide(statistics, method.check(SHAPE, ratio), 0).plan
        assert sum(map(sum, widths_of(plan, 24).values())) == kept


def test_experts_that_share_a_tensor_and_routers_that_need_more_rows_need_the_uniform_layout():
    ragged, uniform = Coverage("c"), Coverage("c", layout="uniform")
    stacked, hungry = replace(SHAPE, one_width=True), replace(SHAPE, fewest_rows=4)
    with pytest.raises(WinnowError, match="experts of a layer share a tensor.* use layout=uniform"):
        ragged.check(stacked, "1/2")
    with pytest.raises(WinnowError, match="may leave top-k = 3 .*, but the router needs 4; use layout=uniform"):
        ragged.check(hungry, "1/2")
    for shape in (stacked, hungry):
        assert uniform.check(shape, "1/2") == Fraction(1, 2)
        assert ragged.check(shape, 0) == 0


def test_a_group_limited_router_needs_the_uniform_layout():
    with pytest.raises(WinnowError, match="does not fit a group-limited router; use layout=uniform"):
        Coverage("c").check(MoeShape(8, 2, 4), "1/2")
    assert Coverage("c", layout="uniform").check(MoeShape(8, 2, 4), "1/2") == Fraction(1, 2)
    assert Coverage("c").check(MoeShape(8, 2), 0.55) == Fraction(11, 20)


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_statistics_that_are_not_finite_or_say_nothing_are_named():
    statistics = wide_case(1)
    broken = statistics.get(2, "channel_square_sum").copy()
    broken[4, 1, 7] = np.nan
    with pytest.raises(WinnowError, match=r"'channel_square_sum' of layer 2 is NaN or infinite for expert\(s\) 4"):
        Coverage("c").decide(with_statistic(statistics, 2, "channel_square_sum", broken), Fraction(1, 2), 0)
    for layer in range(3):
        statistics = with_statistic(statistics, layer, "attribution_sum", np.zeros(12))
    with pytest.raises(WinnowError, match="'attribution_sum' is 0 in every layer"):
        Coverage("c").decide(statistics, Fraction(1, 2), 0)


def test_made_up_cases_have_what_coverage_reads():
    """The conftest's case, which the tests of all methods share, is decided without any warning or error."""
    plan = Coverage("c").decide(made_up_case(1).statistics, Fraction(1, 4), 0).plan
    assert sum(map(sum, widths_of(plan, 5).values())) == 135
