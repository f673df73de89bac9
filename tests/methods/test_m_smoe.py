"""M-SMoE against explicit loops over raw logits, documents and channels."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.alignment import align_channels
from harness.contracts.plan import validate
from harness.contracts.statistics import ExpertWeights
from harness.errors import WinnowError
from methods.m_smoe import MSMoE, choose_dominants
from tests.methods.conftest import (
    DOCUMENT_LENGTHS,
    Case,
    RawLayer,
    made_up_case,
    partition,
    relabelled,
    with_statistic,
)

HALF = Fraction(1, 2)


def cosine(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(y * y for y in b))


def exact_distance(raw: RawLayer) -> list[list[float]]:
    columns = [raw.logits[:, j].tolist() for j in range(raw.logits.shape[1])]
    return [[1 - cosine(a, b) for b in columns] for a in columns]


def reap_repo_distance(raw: RawLayer) -> list[list[float]]:
    experts = range(raw.logits.shape[1])
    mean = [[0.0 for _ in experts] for _ in experts]
    start = 0
    for length in DOCUMENT_LENGTHS:
        for i, j in itertools.product(experts, experts):
            block = raw.logits[start : start + length]
            mean[i][j] += (1 - cosine(block[:, i].tolist(), block[:, j].tolist())) * length / len(raw.logits)
        start += length
    return [[1 - cosine(a, b) for b in mean] for a in mean]


DISTANCES = {"exact": exact_distance, "reap_repo": reap_repo_distance}


def official_dominants(case: Case, total: int) -> dict[int, list[int]]:
    """Usage normalised by layer, the best of each layer set to 1, everything from the top down."""
    usage = {}
    for layer, raw in case.raw.items():
        counts = [len(raw.routed(j)) for j in range(case.num_experts)]
        best = counts.index(max(counts))
        usage |= {(layer, j): 1.0 if j == best else n / sum(counts) for j, n in enumerate(counts)}
    chosen = sorted(usage, key=lambda key: (-usage[key], key))[:total]
    return {layer: sorted(j for other, j in chosen if other == layer) for layer in case.raw}


@pytest.mark.parametrize("variant", DISTANCES)
@pytest.mark.parametrize("ratio", [Fraction(1, 4), HALF, Fraction(3, 4)])
def test_groups_equal_loops_over_raw_logits(case: Case, variant: str, ratio: Fraction):
    decision = MSMoE("m_smoe", variant=variant).decide(case.statistics, ratio, seed=0)
    validate(decision.plan)
    total = (case.num_experts - int(case.num_experts * ratio)) * len(case.raw)
    dominants = official_dominants(case, total)
    for plan in decision.plan.layers:
        distance = DISTANCES[variant](case.raw[plan.layer])
        groups = {d: {d} for d in dominants[plan.layer]}
        for j in set(range(case.num_experts)) - set(groups):
            groups[min(groups, key=lambda d: distance[j][d])].add(j)
        assert partition(decision.groups[plan.layer]) == set(map(frozenset, groups.values()))
        assert list(plan.route) == decision.groups[plan.layer]
    assert sum(len(plan.experts) for plan in decision.plan.layers) == total


def test_the_two_variants_are_not_the_same_rule():
    decisions = [MSMoE("m", variant=v).decide(made_up_case(2).statistics, HALF, 0).groups for v in DISTANCES]
    assert decisions[0] != decisions[1]


def test_merge_weights_are_frequencies_within_the_group(case: Case):
    for plan in MSMoE("m").decide(case.statistics, HALF, 0).plan.layers:
        for expert in plan.experts:
            counts = [len(case.raw[plan.layer].routed(source.expert)) for source in expert.sources]
            expected = [n / sum(counts) for n in counts]
            assert [source.weight for source in expert.sources] == pytest.approx(expected, rel=1e-12)


def test_every_layer_has_a_dominant_and_the_total_is_exact_with_ties():
    skewed = np.array([40.0, 30, 20, 10])
    even = np.array([25.0, 25, 25, 25])
    assert choose_dominants({0: skewed, 1: even}, 4) == {0: [0, 1], 1: [0, 1]}
    assert choose_dominants({0: even, 1: even}, 5) == {0: [0, 1, 2, 3], 1: [0]}
    assert choose_dominants({0: skewed, 4: even}, 2) == {0: [0], 4: [0]}
    # A layer that saw twice the routed slots does not take the others' places: shares count, not counts.
    assert choose_dominants({0: skewed, 1: np.array([60.0, 50, 50, 40])}, 3) == {0: [0, 1], 1: [0]}
    with pytest.raises(WinnowError, match="layer 1 is 0 for every expert"):
        choose_dominants({0: skewed, 1: np.zeros(4)}, 4)


def alignment_cost(reference: ExpertWeights, member: ExpertWeights, order: tuple[int, ...]) -> float:
    return sum(
        float(np.sum((reference.gate[c] - member.gate[p]) ** 2))
        + float(np.sum((reference.up[c] - member.up[p]) ** 2))
        + float(np.sum((reference.down[:, c] - member.down[:, p]) ** 2))
        for c, p in enumerate(order)
    )


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (400.0, 0.0), (0.1, 1000.0)])
def test_alignment_is_the_best_of_all_permutations(scale: float, offset: float):
    """The second has costs beyond float16 (the REAP repository rounds to it), the third needs digits."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b = (ExpertWeights(*(rng.normal(offset, scale, size=s) for s in ((5, 4), (5, 4), (4, 5)))) for _ in range(2))
        best = min(itertools.permutations(range(5)), key=lambda order: alignment_cost(a, b, order))
        assert align_channels(a, b) == best


def test_alignment_undoes_a_shuffle_and_leaves_an_aligned_expert():
    rng = np.random.default_rng(1)
    original = ExpertWeights(*(rng.normal(size=s) for s in ((16, 8), (16, 8), (8, 16))))
    shuffle = rng.permutation(16)
    shuffled = ExpertWeights(original.gate[shuffle], original.up[shuffle], original.down[:, shuffle])
    order = list(align_channels(original, shuffled))
    np.testing.assert_array_equal(shuffled.gate[order], original.gate)
    np.testing.assert_array_equal(shuffled.down[:, order], original.down)
    assert align_channels(original, original) == tuple(range(16))


def test_every_member_is_aligned_to_the_dominant_of_its_group():
    case = made_up_case(4)
    decision = MSMoE("m").decide(case.statistics, HALF, 0)
    dominants = official_dominants(case, 18)
    aligned = 0
    for plan in decision.plan.layers:
        for expert in plan.experts:
            (dominant,) = {source.expert for source in expert.sources} & set(dominants[plan.layer])
            reference = case.statistics.expert_weights(plan.layer, dominant)
            for source in expert.sources:
                if source.expert == dominant:
                    assert source.permutation is None
                    continue
                member = case.statistics.expert_weights(plan.layer, source.expert)
                best = min(
                    itertools.permutations(range(5)),
                    key=lambda order: alignment_cost(reference, member, order),
                )
                assert source.permutation == best
                aligned += 1
    assert aligned == 18


def test_without_alignment_no_weight_is_read_and_the_groups_are_the_same(case: Case):
    def refuse(layer, expert):
        raise AssertionError("weights were read")

    plain = MSMoE("m", alignment="none").decide(replace(case.statistics, expert_weights=refuse), HALF, 0)
    sources = [source for plan in plain.plan.layers for expert in plan.experts for source in expert.sources]
    assert all(source.permutation is None for source in sources)
    assert plain.groups == MSMoE("m").decide(case.statistics, HALF, 0).groups


@pytest.mark.parametrize("variant", DISTANCES)
def test_permuting_the_experts_permutes_the_plan(variant: str):
    # Frequencies without ties, where the order of the experts could not decide.
    case = made_up_case(6)
    statistics = case.statistics
    rng = np.random.default_rng(13)
    for layer, places in zip(case.raw, np.split(rng.permutation(36), 3), strict=True):
        frequency = 100.0 + places
        frequency[np.argmax(frequency)] += 4000 - frequency.sum()
        statistics = with_statistic(statistics, layer, "frequency", frequency)
    order = {layer: rng.permutation(12) for layer in case.raw}
    before = MSMoE("m", variant=variant).decide(statistics, HALF, 0)
    after = MSMoE("m", variant=variant).decide(relabelled(statistics, order), HALF, 0)

    def shares(plan, names):
        return {
            frozenset((int(names[s.expert]), round(s.weight, 12), s.permutation) for s in e.sources)
            for e in plan.experts
        }

    for old, new in zip(before.plan.layers, after.plan.layers, strict=True):
        assert shares(new, order[new.layer]) == shares(old, range(12))


def test_bad_options_statistics_and_weights_are_refused():
    statistics = made_up_case(3).statistics
    with pytest.raises(WinnowError, match="unknown variant 'repo'; known: exact, reap_repo"):
        MSMoE("m", variant="repo")
    with pytest.raises(WinnowError, match="unknown alignment 'first'; known: none, dominant"):
        MSMoE("m", alignment="first")
    gram = statistics.get(0, "router_gram").copy()
    gram[1, 2] = np.inf
    with pytest.raises(WinnowError, match=r"'router_gram' of layer 0 is NaN or infinite for expert\(s\) 1"):
        MSMoE("m").decide(with_statistic(statistics, 0, "router_gram", gram), HALF, 0)
    with pytest.raises(WinnowError, match="fewer than top-k"):
        MSMoE("m").decide(statistics, Fraction(5, 6), 0)
    nowhere = ExpertWeights(np.full((5, 6), np.nan), np.zeros((5, 6)), np.zeros((6, 5)))
    with pytest.raises(WinnowError, match="weights are NaN"):
        MSMoE("m").decide(replace(statistics, expert_weights=lambda layer, expert: nowhere), HALF, 0)
    frequency = statistics.get(3, "frequency").copy()
    frequency[:2] = 0
    with pytest.warns(UserWarning, match=r"2 of 36 experts were never routed to.*layers 3") as caught:
        MSMoE("m").decide(with_statistic(statistics, 3, "frequency", frequency), HALF, 0)
    assert len(caught) == 1
