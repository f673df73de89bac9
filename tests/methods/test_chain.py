"""Experts first, then channels; and plans that compose as data."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.composition import compose
from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert, Source, identity, prune, validate
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import restricted
from harness.errors import WinnowError
from methods.chain import Chain
from methods.coverage import Coverage
from methods.m_smoe import MSMoE
from methods.prune_experts import ExpertPruning
from tests.methods.conftest import made_up_case, with_statistic
from tests.methods.test_coverage import SHAPE, wide_case, widths_of

REAP, FREQUENCY = ExpertPruning("reap", "reap"), ExpertPruning("frequency", "frequency")
pytestmark = pytest.mark.filterwarnings("ignore:.*never routed")


def chained(split: object = "0.5", first=FREQUENCY, **options: object) -> Chain:
    return Chain("chain", first, Coverage("coverage", **options), split)


@pytest.mark.parametrize("split", ["0", "1/3", "0.5", "1"])
@pytest.mark.parametrize("ratio", [Fraction(1, 8), Fraction(2, 5), Fraction(1, 2)])
def test_the_total_is_that_of_the_second_stage_alone(split: str, ratio: Fraction):
    statistics = wide_case(1)
    decision = chained(split).decide(statistics, ratio, 0)
    validate(decision.plan)
    widths = widths_of(decision.plan, 24)
    assert sum(map(sum, widths.values())) == 864 - math.floor(864 * ratio)
    experts = 12 - math.floor(12 * ratio * Fraction(split))
    first = FREQUENCY.decide(statistics, ratio * Fraction(split), 0).plan
    for layer in first.layers:
        gone = {j for j, new in enumerate(layer.route) if new is None}
        assert len(gone) == 12 - experts
        assert all(widths[layer.layer][j] == 0 for j in gone)
    if split == "0":
        assert decision.plan == Coverage("coverage").decide(statistics, ratio, 0).plan


def test_experts_of_unequal_numbers_in_each_layer():
    statistics = wide_case(2)
    statistics = with_statistic(statistics, 1, "frequency", 3 * statistics.get(1, "frequency"))
    first = ExpertPruning("frequency", "frequency", scope="global")
    widths = widths_of(chained(first=first).decide(statistics, Fraction(1, 2), 0).plan, 24)
    counts = [len(layer.experts) for layer in first.decide(statistics, Fraction(1, 4), 0).plan.layers]
    assert len(set(counts)) > 1
    assert sum(map(sum, widths.values())) == 432
    assert all(sum(w > 0 for w in widths[layer]) <= count for layer, count in enumerate(counts))
    uniform = chained(first=first, layout="uniform", align=2).decide(statistics, Fraction(1, 2), 0).plan
    assert [len(layer.experts) for layer in uniform.layers] == counts
    total = sum(map(sum, widths_of(uniform, 24).values()))
    assert 432 <= total < 432 + 2 * max(counts)


def test_the_second_stage_sees_only_the_experts_that_are_left():
    statistics = made_up_case(3).statistics
    kept = {0: [2, 5], 2: [0, 1, 11], 3: [7]}
    less = restricted(statistics, kept)
    for layer, experts in kept.items():
        assert less.experts_in(layer) == len(experts)
        np.testing.assert_array_equal(less.get(layer, "ean_sum"), statistics.get(layer, "ean_sum")[experts])
        np.testing.assert_array_equal(less.get(layer, "token_ids"), statistics.get(layer, "token_ids")[experts])
        np.testing.assert_array_equal(less.router_rows(layer), statistics.router_rows(layer)[experts])
        square = statistics.get(layer, "router_gram")
        for i, a in enumerate(experts):
            np.testing.assert_array_equal(less.expert_weights(layer, i).up, statistics.expert_weights(layer, a).up)
            for j, b in enumerate(experts):
                assert less.get(layer, "router_gram")[i, j] == square[a, b]
    assert statistics.experts_in(3) == 12


def test_a_chain_asks_for_what_its_stages_ask_for():
    chain = Chain("c", REAP, Coverage("coverage"), 0.5)
    assert chain.requires == REAP.requires | Coverage("coverage").requires
    assert not chain.uses_seed
    assert Chain("c", ExpertPruning("random", "random"), Coverage("coverage")).uses_seed
    assert chain.check(MoeShape(12, 3), 0.5) == Fraction(1, 2)
    with pytest.raises(WinnowError, match="fewer than top-k = 3"):
        Chain("c", REAP, Coverage("coverage"), 1).check(MoeShape(12, 3), "5/6")
    assert Chain("c", REAP, Coverage("coverage"), 0.5).check(MoeShape(12, 3), "5/6") == Fraction(5, 6)


def test_the_second_stage_is_checked_for_the_experts_that_the_first_leaves():
    """At 0.6 of 12 experts of 24 channels: nine experts of 12 have room, twelve do not."""
    options = {"layout": "uniform", "layer_budget": "uniform", "min_channels": 12}
    assert chained("0.5", **options).check(SHAPE, "0.6") == Fraction(3, 5)
    with pytest.raises(WinnowError, match="after its first stage 'frequency': .* too few for 12 in every expert"):
        chained("0", **options).check(SHAPE, "0.6")
    plan = chained("0.5", **options).decide(wide_case(1), Fraction(3, 5), 0).plan
    assert all({*widths} == {0, 13} for widths in widths_of(plan, 24).values())
    with pytest.raises(WinnowError, match="after its first stage 'frequency': .* share a tensor"):
        chained("0.5").check(replace(SHAPE, one_width=True), "0.6")


def test_what_cannot_be_chained_is_refused():
    with pytest.raises(WinnowError, match="'m_smoe' merges experts or removes channels"):
        Chain("c", MSMoE("m_smoe"), Coverage("coverage")).decide(made_up_case(1).statistics, Fraction(1, 2), 0)
    for split in (-0.1, "3/2"):
        with pytest.raises(WinnowError, match=r"split .* is outside \[0, 1\]"):
            Chain("c", REAP, Coverage("coverage"), split)
    with pytest.raises(WinnowError, match="split 'half' is not a number"):
        Chain("c", REAP, Coverage("coverage"), "half")


# -- compose ------------------------------------------------------------------------------------------------------


def one(layer: LayerPlan) -> CompressionPlan:
    return CompressionPlan((layer,))


PRUNED = prune(0, 4, [0, 2, 3])
SLICED = LayerPlan(0, (NewExpert((Source(2),), (5, 1, 3)), NewExpert((Source(0),))), (1, None, 0, None))
MERGED = LayerPlan(
    0,
    (NewExpert((Source(0, 0.25, (2, 0, 1)), Source(1, 0.75)), (2, 0)), NewExpert((Source(2),))),
    (0, 0, 1),
)


def test_the_identity_changes_nothing():
    for plan in (PRUNED, SLICED, MERGED):
        after = identity(0, len(plan.experts))
        assert compose(one(plan), one(after)) == one(plan)
        assert compose(one(identity(0, len(plan.route))), one(plan)) == one(plan)


def test_selections_and_routes_run_through_both_plans():
    sliced = LayerPlan(0, (NewExpert((Source(1),), (2, 0)),), (None, 0, None))
    assert compose(one(PRUNED), one(sliced)) == one(
        LayerPlan(0, (NewExpert((Source(2),), (2, 0)),), (None, None, 0, None))
    )
    again = LayerPlan(0, (NewExpert((Source(0),), (2, 0)), NewExpert((Source(1),), (4,))), (0, 1))
    assert compose(one(SLICED), one(again)) == one(
        LayerPlan(0, (NewExpert((Source(2),), (3, 5)), NewExpert((Source(0),), (4,))), (1, None, 0, None))
    )
    merged = compose(one(PRUNED), one(MERGED)).layers[0]
    assert merged.experts[0].sources == (Source(0, 0.25, (2, 0, 1)), Source(2, 0.75))
    assert merged.route == (0, None, 0, 1)


def matrix(new: NewExpert, old: dict[int, np.ndarray]) -> np.ndarray:
    """Rows are channels."""
    total = sum(s.weight * old[s.expert][list(s.permutation or range(len(old[s.expert])))] for s in new.sources)
    return total[list(range(len(total)) if new.channels is None else new.channels)]


def random_layer(rng: np.random.Generator, rows: int, width: int, count: int, kept: int | None) -> LayerPlan:
    """``count`` groups of ``rows`` experts, random weights and permutations, of ``kept`` channels (None: all)."""
    labels = [*range(count), *rng.integers(0, count, rows - count).tolist()]
    experts = tuple(
        NewExpert(
            tuple(
                Source(e, float(rng.normal()), tuple(rng.permutation(width).tolist()) if rng.random() < 0.6 else None)
                for e, label in enumerate(labels)
                if label == group
            ),
            None if kept is None else tuple(rng.permutation(width)[:kept].tolist()),
        )
        for group in range(count)
    )
    return LayerPlan(0, experts, tuple(labels))


@pytest.mark.parametrize(("first", "second"), [(None, None), (None, 4), (5, None), (5, 3), (1, 1)])
def test_composing_random_merges_is_applying_one_after_the_other(first: int | None, second: int | None):
    rng = np.random.default_rng(4)
    for _ in range(30):
        a = random_layer(rng, 6, 7, 4, first)
        b = random_layer(rng, 4, first or 7, 2, second)
        old = {e: rng.normal(size=(7, 3)) for e in range(6)}
        between = {e: matrix(new, old) for e, new in enumerate(a.experts)}
        both = compose(one(a), one(b), width=7).layers[0]
        for new, step in zip(both.experts, b.experts, strict=True):
            np.testing.assert_allclose(matrix(new, old), matrix(step, between), rtol=1e-12)
            for source in new.sources:
                assert source.permutation is None or sorted(source.permutation) == list(range(7))
        assert both.route == tuple(b.route[j] for j in a.route)


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(WinnowError, match="for different layers"):
        compose(one(PRUNED), one(identity(1, 3)))
    with pytest.raises(WinnowError, match="the first leaves 3 experts in layer 0, the second is for 4"):
        compose(one(PRUNED), one(identity(0, 4)))
    unequal = LayerPlan(0, (NewExpert((Source(0),), (0, 1)), NewExpert((Source(1),), (2, 3, 4))), (0, 1))
    merged = one(LayerPlan(0, (NewExpert((Source(0, 0.5), Source(1, 0.5))),), (0, 0)))
    with pytest.raises(WinnowError, match="without the width: layer 0 merges different channels"):
        compose(one(unequal), merged)
    with pytest.raises(WinnowError, match="merges experts of different widths"):
        compose(one(unequal), merged, width=6)
