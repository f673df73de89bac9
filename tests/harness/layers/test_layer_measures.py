"""What layer diagnostics compute from arrays, against loops and against cases whose answer is known."""

import itertools
import math

import numpy as np
import pytest

from harness.contracts.alignment import align_channels
from harness.contracts.statistics import ExpertWeights
from harness.layers import theory as measures
from harness.layers.theory import FOLDS, GroupSums

ALL = np.ones(FOLDS)


def random_expert(seed: int, width: int = 6, hidden: int = 5) -> ExpertWeights:
    draw = np.random.default_rng(seed).normal
    return ExpertWeights(draw(size=(width, hidden)), draw(size=(width, hidden)), draw(size=(hidden, width)))


def permuted(expert: ExpertWeights, order: list[int]) -> ExpertWeights:
    return ExpertWeights(expert.gate[order], expert.up[order], expert.down[:, order])


def test_merging_costs_what_the_theory_says_where_its_assumptions_hold() -> None:
    """Two groups; all combinations of masses, shares and inputs, so that these are independent over tokens."""
    f = np.random.default_rng(0).normal(size=(5, 4, 3))  # five experts, four inputs
    groups = [0, 1, 2], [3, 4]
    masses = [0.3, 0.7], [0.5, 0.1]
    shares = [[0.2, 0.3, 0.5], [0.6, 0.0, 0.4], [0.1, 0.8, 0.1]], [[1.0, 0.0], [0.25, 0.75]]
    tokens = list(itertools.product(masses[0], shares[0], masses[1], shares[1], range(4)))
    gates = np.array([[*np.multiply(a, r), *np.multiply(b, s)] for a, r, b, s, _ in tokens])
    outputs = np.stack([f[:, x] for *_, x in tokens], axis=1)
    folds = measures.folds_of([1] * len(tokens))
    measured, predicted = np.zeros((len(tokens), 3)), 0.0
    for group, own in zip(groups, shares, strict=True):
        merged = np.tensordot(np.mean(own, axis=0), outputs[group], 1)
        measured += np.einsum("te,eth->th", gates[:, group], outputs[group])
        measured -= gates[:, group].sum(1)[:, None] * merged
        sums = GroupSums.empty(len(group))
        for part in np.array_split(np.arange(len(tokens)), 3):
            sums.add(gates[part][:, group], outputs[group][:, part], folds[part])
        predicted += sums.error(ALL) / len(tokens)
    assert predicted == pytest.approx(np.mean(np.sum(measured**2, axis=1)), rel=1e-12)
    assert predicted > 0.01


def test_for_two_experts_it_is_the_published_product() -> None:
    generator = np.random.default_rng(1)
    gates, outputs = generator.uniform(0.1, 1, size=(40, 2)), generator.normal(size=(2, 40, 3))
    sums = GroupSums.empty(2)
    sums.add(gates, outputs, measures.folds_of([40]))
    mass, ratio = gates.sum(1), gates[:, 0] / gates.sum(1)
    gap = np.mean(np.sum((outputs[0] - outputs[1]) ** 2, axis=1))
    covariance, gram = sums.moments(ALL)
    assert sums.error(ALL) / 40 == pytest.approx(np.mean(mass**2) * np.var(ratio) * gap, rel=1e-12)
    assert measures.policy_variability(covariance) == pytest.approx(np.var(ratio), rel=1e-12)
    assert measures.functional_gap(gram) == pytest.approx(gap, rel=1e-12)
    assert measures.functional_gap(np.ones((1, 1))) == 0.0


def test_shares_are_of_the_tokens_that_choose_a_member() -> None:
    gates = np.array([[0.0, 0.0], [0.2, 0.6], [0.0, 0.0], [0.5, 0.5]])
    outputs = np.random.default_rng(2).normal(size=(2, 4, 3))
    sums = GroupSums.empty(2)
    sums.add(gates, outputs, np.array([0, 0, 1, 1]))
    assert sums.active[:3].tolist() == [1, 1, 0] and sums.mass_square.sum() == pytest.approx(0.64 + 1.0)
    covariance, gram = sums.moments(ALL)
    assert covariance[0, 0] == pytest.approx(np.var([0.25, 0.5])) and covariance[0, 1] == -covariance[0, 0]
    assert gram[0, 1] == pytest.approx(np.mean([outputs[0, t] @ outputs[1, t] for t in (1, 3)]))
    assert sums.moments(np.eye(FOLDS)[0])[0] == pytest.approx(np.zeros((2, 2)))  # one token has no variance
    assert GroupSums.empty(3).error(ALL) == 0.0


def test_pruning_costs_the_gate_weighted_outputs_where_nothing_replaces_them() -> None:
    gates = np.random.default_rng(3).uniform(size=(6, 3))
    outputs = np.zeros((3, 6, 4))
    for expert in range(3):
        outputs[expert, :, expert] = np.arange(1, 7) * (expert + 1)  # orthogonal
    kept = np.einsum("te,eth->th", gates[:, :1], outputs[:1])
    whole = np.einsum("te,eth->th", gates, outputs)
    square_norms = np.sum(outputs**2, axis=2).T
    predicted = measures.pruning_error(gates[:, 1:], square_norms[:, 1:])
    assert predicted == pytest.approx(np.sum((whole - kept) ** 2, axis=1))
    assert measures.pruning_error(gates[:, []], square_norms[:, []]).tolist() == [0.0] * 6


def test_spread_and_its_principal_components() -> None:
    outputs = np.random.default_rng(4).normal(size=(5, 7, 3))
    by_hand = [np.mean([np.sum((f - outputs[:, t].mean(0)) ** 2) for f in outputs[:, t]]) for t in range(7)]
    assert measures.spread(outputs) == pytest.approx(by_hand)
    points = outputs.reshape(5, -1)
    singular = np.linalg.svd(points - points.mean(0), compute_uv=False)
    found = measures.explained(points @ points.T / 7)
    assert found == pytest.approx(singular**2 / np.sum(singular**2), abs=1e-12)
    alike = np.ones((3, 3))
    assert measures.explained(alike) == [] and measures.explained(np.zeros((2, 2))) == []


def test_weight_distances_before_and_after_alignment() -> None:
    one, order = random_expert(0), [3, 0, 5, 1, 4, 2]
    shuffled = permuted(one, order)
    assert measures.weight_distance(one, one) == 0.0
    assert measures.weight_distance(one, shuffled) > 0.5
    assert measures.weight_distance(one, shuffled, align_channels(one, shuffled)) == pytest.approx(0.0, abs=1e-12)
    other = random_expert(1)
    flat = [np.concatenate([w.gate.ravel(), w.up.ravel(), w.down.ravel()]) for w in (one, other)]
    norm = math.sqrt((flat[0] @ flat[0] + flat[1] @ flat[1]) / 2)
    assert measures.weight_distance(one, other) == pytest.approx(np.linalg.norm(flat[0] - flat[1]) / norm)
    zero = ExpertWeights(*(np.zeros_like(m) for m in (one.gate, one.up, one.down)))
    assert measures.weight_distance(zero, zero) == 0.0
    found = measures.compare_pairs([one, shuffled, other].__getitem__, [(0, 1), (0, 2)], align_channels)
    assert found["aligned_distance"][0] == pytest.approx(0.0, abs=1e-12)
    assert 0 < found["aligned_distance"][1] <= found["distance"][1]
    assert found["overlap"][0] == pytest.approx(1.0)


@pytest.mark.parametrize(("width", "hidden"), [(6, 9), (9, 4)])
def test_leading_directions_are_singular_vectors(width: int, hidden: int) -> None:
    one, other = random_expert(5, width, hidden), random_expert(6, width, hidden)
    overlaps = []
    for matrices in ([np.vstack([w.gate, w.up]) for w in (one, other)], [w.down.T for w in (one, other)]):
        a, b = (np.linalg.svd(matrix)[2][:2].T for matrix in matrices)
        angles = np.linalg.svd(a.T @ b, compute_uv=False)
        overlaps.append(np.mean(angles**2))
    found = [measures.leading_directions(w, 2) for w in (one, other)]
    assert measures.subspace_overlap(*found) == pytest.approx(np.mean(overlaps))
    shuffled = measures.leading_directions(permuted(one, list(range(width))[::-1]), 2)
    assert measures.subspace_overlap(found[0], shuffled) == pytest.approx(1.0)


def test_an_interval_leaves_one_fold_out_at_a_time() -> None:
    above, below = np.random.default_rng(7).uniform(1, 2, size=(2, 40))
    folds = measures.folds_of([4] * FOLDS)
    assert np.bincount(folds).tolist() == [4] * FOLDS
    sums = [measures.by_fold(values, folds) for values in (above, below)]
    whole, left_out = measures.leave_one_out(measures.ratio_of(*sums), folds)
    value, low, high = measures.estimated(whole, left_out)
    without = np.array([above[folds != f].sum() / below[folds != f].sum() for f in range(FOLDS)])
    error = math.sqrt((FOLDS - 1) / FOLDS * np.sum((without - without.mean()) ** 2))
    assert value == pytest.approx(above.sum() / below.sum()) and left_out == pytest.approx(without)
    assert high - low == pytest.approx(2 * 1.959964 * error, rel=1e-5)
    nothing = measures.leave_one_out(measures.ratio_of(np.zeros(FOLDS), np.zeros(FOLDS)), folds)
    assert measures.estimated(*nothing) == (0.0, 0.0, 0.0) and measures.estimated(0.5, [0.5]) == (0.5, 0.5, 0.5)


def test_folds_hold_whole_documents_and_as_many_tokens_each() -> None:
    lengths = np.random.default_rng(9).integers(1, 30, size=200).tolist()
    folds = measures.folds_of(lengths)
    ends = np.cumsum(lengths)
    assert all(len(set(folds[end - length : end])) == 1 for end, length in zip(ends, lengths, strict=True))
    counts = np.bincount(folds, minlength=FOLDS)
    assert counts.sum() == sum(lengths) and counts.max() - counts.min() < 30
    firsts = folds[ends - lengths]
    assert not np.array_equal(firsts, np.sort(firsts)), "documents of one kind that follow each other are spread"
    assert np.array_equal(folds, measures.folds_of(lengths))
    one = measures.folds_of([105])  # ten stretches of 10 and what is left of it
    assert sorted(np.bincount(one).tolist()) == [10] * 9 + [15] and np.count_nonzero(np.diff(one)) >= FOLDS - 1
    assert measures.folds_of([2, 0, 1]).tolist() == measures.folds_of([2, 1]).tolist()


def test_pairs_and_counts() -> None:
    pairs = measures.random_pairs(8, 10)
    assert len(set(pairs)) == 10 and all(0 <= one < other < 8 for one, other in pairs)
    assert measures.random_pairs(8, 10) == pairs and len(measures.random_pairs(3, 10)) == 3
    assert measures.load_entropy(np.array([5, 5, 5, 5])) == pytest.approx(math.log(4))
    assert measures.load_entropy(np.array([3, 1, 0])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert measures.load_entropy(np.array([9, 0])) == 0.0
