"""Coverage pruning against bisection over plain lists, and what its plans always are."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import CompressionPlan, validate
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ExpertWeights, Statistics
from harness.errors import WinnowError
from methods.coverage import Coverage
from methods.coverage_budget import smoothed_loss
from tests.methods.conftest import model_case, with_statistic
from tests.tiny import FAMILY_NAMES

RATIOS = [Fraction(1, 8), Fraction(1, 4), Fraction(3, 8), Fraction(1, 2), Fraction(3, 5)]
PLAIN = {"min_channels": 1, "align": 1}
SHAPE = MoeShape(12, 3, layers=3, width=24, fewest_rows=3)  # that of wide_case


def wide_case(seed: int, layers: int = 3, num_experts: int = 12, width: int = 24, top_k: int = 3) -> Statistics:
    """Statistics alone, of experts of many channels: unequal layers, one expert never routed, one that does harm."""
    rng = np.random.default_rng(seed)
    arrays, weights = {}, {}
    for layer in range(layers):
        scale = rng.gamma(0.6, size=num_experts)
        attribution = scale * rng.gamma(2.0, size=num_experts) * 3.0**layer
        squares = scale[:, None, None] * rng.gamma(0.4, size=(num_experts, 3, width))
        never, harmful = rng.choice(num_experts, 2, replace=False)
        attribution[never], squares[never] = 0.0, 0.0
        attribution[harmful] *= -0.01
        frequency = np.where(np.arange(num_experts) == never, 0, rng.integers(1, 50, num_experts))
        arrays[layer] = {
            "frequency": frequency.astype(float),
            "attribution_sum": attribution,
            "channel_square_sum": squares,
            "input_square_sum": rng.gamma(1.0, size=(num_experts, 7)),
            "channel_saliency_sum": squares[:, 0] * attribution[:, None] ** 2,
            "released_attribution": attribution * rng.uniform(0.5, 1.5, num_experts),
            "released_activation": np.sqrt(squares).mean(1) * rng.uniform(0.5, 1.5, (num_experts, width)),
        }
        for j in range(num_experts):
            shapes = ((width, 7), (width, 7), (7, width))
            weights[layer, j] = ExpertWeights(*(rng.normal(size=shape) for shape in shapes))
    return Statistics(num_experts, top_k, 99, arrays, expert_weights=lambda layer, e: weights[layer, e])


def widths_of(plan: CompressionPlan, width: int) -> dict[int, list[int]]:
    """Layer -> channels of every old expert, 0 for one that is gone."""
    result = {}
    for layer in plan.layers:
        kept = {new.sources[0].expert: new for new in layer.experts}
        result[layer.layer] = [
            0 if j not in kept else width if kept[j].channels is None else len(kept[j].channels)
            for j in range(len(layer.route))
        ]
    return result


def channels_of(plan: CompressionPlan, width: int) -> set[tuple[int, int, int]]:
    return {
        (layer.layer, new.sources[0].expert, channel)
        for layer in plan.layers
        for new in layer.experts
        for channel in (range(width) if new.channels is None else new.channels)
    }


# -- steps 8 and 9 by bisection -----------------------------------------------------------------------------------


def smallest_number(ranked: list[float], share: float) -> int:
    """Of values from the largest down: how many reach ``share`` of their sum."""
    whole, reached, count = math.fsum(ranked), 0.0, 0
    while count < len(ranked) and reached < min(share, 1.0) * whole:
        count += 1
        reached = math.fsum(ranked[:count])
    return count


def bisected(ranked: list[list[float]], weights: list[float], total: int) -> list[int]:
    """Numbers of channels at the highest common level at which they are not more than ``total``."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        counts = [smallest_number(values, weight * middle) for values, weight in zip(ranked, weights, strict=True)]
        low, high = (middle, high) if sum(counts) <= total else (low, middle)
    return [smallest_number(values, weight * low) for values, weight in zip(ranked, weights, strict=True)]


def loops_loss_weights(losses: list[float]) -> list[float]:
    values = list(losses)
    for _ in range(4):
        values = [math.sqrt(v) for v in values]
        mean = math.fsum(values) / len(values)
        spread = 0.0
        if len(values) > 1:
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        values = [min(max(v, mean - spread), mean + spread) for v in values]
    return [v * len(values) / math.fsum(values) for v in values]


def brute_force_widths(statistics: Statistics, ratio: Fraction) -> dict[int, list[int]]:
    layers = sorted(statistics.layers)
    scores, importance = {}, {}
    for layer in layers:
        squares = statistics.get(layer, "channel_square_sum")
        scores[layer] = [
            [sum(math.sqrt(v) for v in expert[:, c]) / 3 for c in range(expert.shape[1])] for expert in squares
        ]
        importance[layer] = [max(float(v), 0.0) for v in statistics.get(layer, "attribution_sum")]
    count = sum(len(expert) for layer in layers for expert in scores[layer])
    total = count - math.floor(count * ratio)
    pooled = [sorted((v for expert in scores[layer] for v in expert), reverse=True) for layer in layers]
    losses = [math.fsum(statistics.get(layer, "attribution_sum").tolist()) for layer in layers]
    budgets = bisected(pooled, loops_loss_weights(losses), total)
    assert sum(budgets) == total  # no ties among made-up numbers
    widths = {}
    for layer, budget in zip(layers, budgets, strict=True):
        roots = [math.sqrt(v) for v in importance[layer]]
        weights = [root / sum(roots) for root in roots]
        ranked = [sorted(expert, reverse=True) for expert in scores[layer]]
        widths[layer] = bisected(ranked, weights, budget)
        while sum(widths[layer]) < budget:  # the remainder: by the next score times attribution
            open_ = [j for j, n in enumerate(widths[layer]) if n < len(ranked[j])]
            j = max(open_, key=lambda j: (ranked[j][widths[layer][j]] * importance[layer][j], -j))
            widths[layer][j] += 1
    return widths


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", range(4))
def test_widths_equal_bisection(seed: int, ratio: Fraction):
    statistics = wide_case(seed)
    with pytest.warns(UserWarning, match="3 of 36 experts were never routed to"):
        decision = Coverage("coverage", **PLAIN).decide(statistics, ratio, 0)
    expected = brute_force_widths(statistics, ratio)
    assert widths_of(decision.plan, 24) == expected
    assert sum(map(sum, expected.values())) == 864 - math.floor(864 * ratio)
    for layer, values in decision.saliency.items():
        np.testing.assert_array_equal(values, np.maximum(statistics.get(layer, "attribution_sum"), 0))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_widths_of_tiny_models_equal_bisection(family: str):
    statistics = model_case(family).statistics
    for ratio in RATIOS:
        decision = Coverage("coverage", **PLAIN).decide(statistics, ratio, 0)
        assert widths_of(decision.plan, 16) == brute_force_widths(statistics, ratio)


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_a_layer_of_more_loss_has_wider_experts():
    statistics = wide_case(8)  # its losses rise with the layer
    for layer in range(3):
        squares = statistics.get(0, "channel_square_sum")
        statistics = with_statistic(statistics, layer, "channel_square_sum", squares)
    plan = Coverage("c", layout="uniform").decide(statistics, Fraction(1, 2), 0).plan
    widths = [layer[0] for layer in widths_of(plan, 24).values()]
    assert widths[0] < widths[1] <= widths[2]


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_the_channels_kept_are_the_best_of_each_expert():
    statistics = wide_case(5)
    plan = Coverage("coverage").decide(statistics, Fraction(1, 2), 0).plan
    validate(plan)
    for layer in plan.layers:
        scores = np.sqrt(statistics.get(layer.layer, "channel_square_sum")).sum(1)
        for new in layer.experts:
            own = scores[new.sources[0].expert]
            if new.channels is not None:
                gone = set(range(24)) - set(new.channels)
                assert min(own[list(new.channels)]) >= max(own[list(gone)])
                assert list(new.channels) == sorted(new.channels)


def test_smoothing_is_that_of_the_loops():
    for losses in ([3.0], [1.0, 1.0], [0.0, 5.0], [1e-6, 2.0, 300.0, 4.0]):
        np.testing.assert_allclose(smoothed_loss(np.array(losses)), loops_loss_weights(losses), rtol=1e-12)
    assert smoothed_loss(np.array([7.0])).tolist() == [1.0]


# -- what every plan is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [1, 2, 8])
@pytest.mark.parametrize("min_channels", [1, 5, 9])
@pytest.mark.parametrize("budget", ["coverage", "uniform"])
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_totals_multiples_minimum_and_top_k(align: int, min_channels: int, budget: str):
    for seed in range(3):
        statistics = wide_case(seed)
        method = Coverage("coverage", layer_budget=budget, min_channels=min_channels, align=align)
        for removed in range(0, 70, 3):
            ratio = Fraction(removed, 101)
            widths = widths_of(method.decide(statistics, ratio, 0).plan, 24)
            kept = 864 - math.floor(864 * ratio)
            total = sum(map(sum, widths.values()))
            assert total == min(range(0, 865, align), key=lambda t: (abs(t - kept), -t))
            for layer in widths.values():
                assert all(w % align == 0 and (w == 0 or min_channels <= w <= 24) for w in layer)
                assert sum(w > 0 for w in layer) >= 3


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        PLAIN | {"layer_budget": "uniform"},
        PLAIN | {"expert_weight": "frequency"},
        {"layout": "uniform"},
        {"layout": "uniform", "align": 3, "layer_budget": "uniform"},
        {"layout": "uniform", "align": 2, "channel_score": "magnitude"},
    ],
)
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_a_larger_budget_never_removes_a_channel(options: dict):
    statistics, method = wide_case(7), Coverage("coverage", **options)
    kept = [channels_of(method.decide(statistics, Fraction(n, 60), 0).plan, 24) for n in range(0, 45)]
    for more, fewer in zip(kept, kept[1:], strict=False):
        assert fewer <= more
    assert len(kept[0]) == 864


@pytest.mark.parametrize("ratio", [Fraction(1, 10), Fraction(1, 2), Fraction(5, 7)])
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_uniform_layout_has_the_smallest_width_that_removes_no_more_than_the_ratio(ratio: Fraction):
    statistics = wide_case(8)
    for align in (1, 4):
        model = Coverage("c", layout="uniform", layer_budget="uniform", align=align).decide(statistics, ratio, 0)
        blocks = 24 // align
        width = align * (blocks - math.floor(blocks * ratio))
        assert widths_of(model.plan, 24) == dict.fromkeys(range(3), [width] * 12)
        layered = widths_of(Coverage("c", layout="uniform", align=align).decide(statistics, ratio, 0).plan, 24)
        assert all(len(set(widths)) == 1 and widths[0] % align == 0 for widths in layered.values())
        assert sum(widths[0] for widths in layered.values()) == align * (3 * blocks - math.floor(3 * blocks * ratio))


def test_ties_keep_the_lower_index():
    statistics = wide_case(9, layers=2, num_experts=4, width=6, top_k=1)
    for layer in (0, 1):
        for name in ("frequency", "attribution_sum", "channel_square_sum"):
            shape = statistics.get(layer, name).shape
            statistics = with_statistic(statistics, layer, name, np.ones(shape))
    plan = Coverage("c", **PLAIN).decide(statistics, Fraction(20, 48), 0).plan
    assert widths_of(plan, 6) == {0: [4, 4, 3, 3], 1: [4, 4, 3, 3]}
    assert plan.layers[0].experts[2].channels == (0, 1, 2)
    odd = Coverage("c", **PLAIN).decide(statistics, Fraction(21, 48), 0).plan
    assert widths_of(odd, 6) == {0: [4, 4, 3, 3], 1: [4, 3, 3, 3]}


@pytest.mark.parametrize("layout", ["ragged", "uniform"])
def test_never_routed_experts(layout: str):
    statistics = wide_case(10)
    method = Coverage("c", layout=layout, layer_budget="uniform")
    gone = "removed first" if layout == "ragged" else "first channels are kept"
    with pytest.warns(UserWarning, match=f"3 of 36 experts were never routed to .*{gone}") as caught:
        plan = method.decide(statistics, Fraction(1, 4), 0).plan
    assert len(caught) == 1
    for layer in plan.layers:
        never = int(np.argmin(statistics.get(layer.layer, "frequency")))
        if layout == "ragged":
            assert layer.route[never] is None
        else:
            assert layer.experts[layer.route[never]].channels == tuple(range(18))


# -- options ------------------------------------------------------------------------------------------------------


def loops_score(statistics: Statistics, layer: int, expert: int, channel: int, score: str) -> float:
    w = statistics.expert_weights(layer, expert)
    squares = statistics.get(layer, "channel_square_sum")[expert, :, channel]
    if score == "activation":
        return sum(math.sqrt(v) for v in squares) / 3
    if score == "gradient_free_saliency":
        return float(statistics.get(layer, "channel_saliency_sum")[expert, channel])
    if score == "magnitude":
        return math.fsum(abs(v) for m in (w.gate[channel], w.up[channel], w.down[:, channel]) for v in m)
    norms = [math.sqrt(v) for v in statistics.get(layer, "input_square_sum")[expert]]
    inputs = math.fsum((abs(g) + abs(u)) * n for g, u, n in zip(w.gate[channel], w.up[channel], norms, strict=True))
    return (inputs + math.fsum(abs(v) for v in w.down[:, channel]) * math.sqrt(squares[2])) / 3


@pytest.mark.parametrize("score", ["activation", "weight_activation", "gradient_free_saliency", "magnitude"])
@pytest.mark.filterwarnings("ignore:.*never routed")
def test_every_score_keeps_what_loops_rank_highest(score: str):
    statistics = wide_case(11, layers=2)
    method = Coverage("c", channel_score=score, layout="uniform", layer_budget="uniform")
    for layer in method.decide(statistics, Fraction(1, 2), 0).plan.layers:
        for expert, new in enumerate(layer.experts):
            ranked = sorted(range(24), key=lambda c: (-loops_score(statistics, layer.layer, expert, c, score), c))
            assert new.channels == tuple(sorted(ranked[:12]))


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_options_change_what_is_decided():
    statistics = wide_case(12)
    plans = [
        Coverage("c", **options).decide(statistics, Fraction(1, 2), 0).plan
        for options in (
            {},
            {"channel_score": "weight_activation"},
            {"channel_score": "gradient_free_saliency"},
            {"channel_score": "magnitude"},
            {"channel_score": "random"},
            {"expert_weight": "frequency"},
            {"expert_weight": "uniform"},
            {"layer_budget": "uniform"},
            {"layout": "uniform"},
            {"variant": "released"},
            {"min_channels": 20},
            {"align": 8},
        )
    ]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


@pytest.mark.filterwarnings("ignore:.*never routed")
def test_the_released_variant_is_the_same_rule_on_the_released_statistics():
    statistics = wide_case(13)
    swapped = statistics
    for layer, arrays in statistics.layers.items():
        squares = np.repeat(arrays["released_activation"][:, None] ** 2, 3, axis=1)
        swapped = with_statistic(swapped, layer, "channel_square_sum", squares)
        # its layer losses are the plain ones: keep their sum, which the harmful expert may take up
        swapped = with_statistic(swapped, layer, "attribution_sum", arrays["released_attribution"])
    released = Coverage("c", variant="released", layer_budget="uniform").decide(statistics, Fraction(1, 2), 0)
    exact = Coverage("c", layer_budget="uniform").decide(swapped, Fraction(1, 2), 0)
    assert widths_of(released.plan, 24) == widths_of(exact.plan, 24)
    assert Coverage("c", variant="released").requires == {
        "released_activation", "released_attribution", "attribution_sum", "frequency",
    }  # fmt: skip


def test_random_channels_follow_the_seed():
    method = Coverage("c", channel_score="random", layout="uniform", layer_budget="uniform")
    statistics = wide_case(14)
    bare = replace(statistics, layers={layer: {} for layer in statistics.layers})
    plans = [method.decide(bare, Fraction(1, 2), seed).plan for seed in (1, 1, 2)]
    assert method.uses_seed and method.requires == frozenset()
    assert plans[0] == plans[1] != plans[2]
    assert plans[0].layers[0].experts != plans[0].layers[1].experts
    with pytest.raises(WinnowError, match="seed -1 is negative"):
        method.decide(bare, Fraction(1, 2), -1)
