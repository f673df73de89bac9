"""Tilted novices against a least-squares fit by an augmented singular value decomposition of the tokens themselves."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from harness.contracts.plan import validate
from harness.contracts.second_pass import Look, Moments
from harness.errors import WinnowError
from methods.mone import MoNE
from methods.tilted import Tilted, centred, fitted, layer_basis
from tests.brute_force import brute_force_statistics, expert_function, routed_documents, weights_of
from tests.tiny import FAMILY_NAMES, tiny_model

HALF = Fraction(1, 2)


class Tokens:
    """The routed tokens of one expert: inputs (n, H), outputs (n, H), channels (n, I), weights (n,)."""

    def __init__(self, model, layer: int, expert: int, seen, gate_squared: bool) -> None:
        x, gates = [], []
        for document in seen:
            for t, slot in zip(*np.nonzero(document.indices == expert), strict=True):
                x.append(document.hidden[t])
                gates.append(document.gates[t, slot])
        self.x, weights = np.array(x), weights_of(model, layer, expert)
        self.down = weights.down.astype(float)
        function = expert_function(model, layer, expert)
        self.f = np.array([function(one) for one in self.x])
        pre = self.x @ weights.gate.T.astype(float)
        self.h = pre / (1 + np.exp(-pre)) * (self.x @ weights.up.T.astype(float))
        self.w = np.array(gates) ** 2 if gate_squared else np.ones(len(x))

    def moments(self, look: Look, place: int) -> dict[str, np.ndarray]:
        x, f, w = self.x - look.inputs[place], self.f - look.outputs[place], self.w
        z = x if look.basis is None else x @ look.basis
        return {
            "weight": w.sum(), "inputs": w @ x, "outputs": w @ f, "channels": w @ self.h, "coordinates": w @ z,
            "input_square": w @ (x**2).sum(1), "output_square": w @ (f**2).sum(1),
            "products": np.einsum("t,ta,tb->ab", w, z, z), "mixed": np.einsum("t,ta,tb->ab", w, self.h, z),
        }  # fmt: skip

    def by_svd(self, rank: int, alpha: float, basis: np.ndarray | None):
        """B (H, H), c and the unexplained share, from rows and not from moments."""
        share = self.w / self.w.sum()
        xb, fb = share @ self.x, share @ self.f
        x, f = np.sqrt(share)[:, None] * (self.x - xb), np.sqrt(share)[:, None] * (self.f - fb)
        ridge = alpha * (x**2).sum() / x.shape[1]
        columns = np.eye(x.shape[1]) if basis is None else basis
        rows = np.vstack([x @ columns, np.sqrt(ridge) * np.eye(columns.shape[1])])
        targets = np.vstack([f, np.zeros((columns.shape[1], f.shape[1]))])
        full = np.linalg.lstsq(rows, targets, rcond=None)[0].T  # (H, d)
        most = np.linalg.svd(rows @ full.T, full_matrices=False)[2][:rank].T  # (H, r)
        slope = most @ most.T @ full @ columns.T
        left = ((f - x @ slope.T) ** 2).sum() / (f**2).sum()
        return slope, fb - slope @ xb, left


def everything(family: str, method: Tilted):
    model = tiny_model(family)
    documents = [np.random.default_rng(3).integers(0, 256, length).tolist() for length in (300, 200)]
    statistics = brute_force_statistics_once(model, documents, family)
    seen = routed_documents(model, documents)
    decision = method.decide(statistics, HALF, seed=0)
    looks = method.looks_again_at(statistics, decision)

    def tokens(layer: int) -> list[Tokens]:
        return [Tokens(model, layer, j, seen[layer], looks[layer].gate_squared) for j in looks[layer].experts]

    def moments(layer: int) -> Moments:
        each = [one.moments(looks[layer], place) for place, one in enumerate(tokens(layer))]
        return Moments(**{name: np.array([one[name] for one in each]) for name in each[0]})

    return statistics, decision, looks, tokens, moments


_known: dict = {}


def brute_force_statistics_once(model, documents, family: str):
    if family not in _known:
        _known[family] = brute_force_statistics(model, documents)
    return _known[family]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("weights", ["ones", "gate_squared"])
@pytest.mark.parametrize("basis", ["exact", "layer"])
def test_maps_are_the_least_squares_of_the_tokens(family: str, weights: str, basis: str) -> None:
    method = Tilted("tilted", rank=3, alpha=0.02, weights=weights, basis=basis)
    statistics, decision, looks, tokens, moments = everything(family, method)
    final = method.finish(statistics, decision, moments)
    validate(final.plan, 8, hidden=32)
    compared = 0
    for before, after in zip(decision.plan.layers, final.plan.layers, strict=True):
        look = looks[after.layer]
        assert (look.basis is None) == (basis == "exact")
        for j, (old, new) in enumerate(zip(before.experts, after.experts, strict=True)):
            if old.sources:
                assert new == old
                continue
            expert = tokens(after.layer)[list(look.experts).index(j)]
            if len(expert.x) < 3:
                continue
            slope, shift, left = expert.by_svd(3, 0.02, look.basis)
            low = new.low_rank
            assert low.left.values.shape == (32, 3) and low.right.values.shape == (3, 32)
            found = low.left.values.astype(float) @ low.right.values
            np.testing.assert_allclose(found, slope, atol=1e-5 * np.abs(slope).max())
            np.testing.assert_allclose(low.shift.values, shift, atol=1e-5 * np.abs(shift).max())
            assert final.unexplained[after.layer][j] == pytest.approx(left, abs=1e-6)
            assert left < 1
            compared += 1
    assert compared >= 4
    assert final.saliency is decision.saliency


def test_rank_zero_is_mone_and_needs_no_second_look() -> None:
    for weights, plain in (("ones", "plain"), ("gate_squared", "gate_squared")):
        method = Tilted("tilted", rank=0, weights=weights)
        statistics, decision, looks, _, _ = everything("olmoe", method)
        assert looks == {} and method.requires == MoNE("mone", weights=plain).requires
        assert decision.plan == MoNE("mone", weights=plain).decide(statistics, HALF, seed=0).plan


def test_the_basis_of_a_layer_holds_most_of_the_variance_of_its_inputs() -> None:
    statistics = everything("mixtral", Tilted("tilted", rank=2))[0]
    documents = [np.random.default_rng(3).integers(0, 256, length).tolist() for length in (300, 200)]
    for layer, seen in routed_documents(tiny_model("mixtral"), documents).items():
        x = np.concatenate([document.hidden for document in seen])
        x = x - x.mean(0)
        basis = layer_basis(statistics, layer, 6)
        np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-9)
        most = (np.linalg.svd(x, compute_uv=False)[:6] ** 2).sum()
        assert ((x @ basis) ** 2).sum() == pytest.approx(most, rel=1e-6)


def test_more_rank_explains_more_and_wide_or_narrow_moments_agree() -> None:
    rng = np.random.default_rng(0)
    x, down = rng.normal(size=(400, 12)), rng.normal(size=(12, 5))
    h = np.tanh(x @ rng.normal(size=(12, 5)))
    f = h @ down.T
    look = Look([0], np.zeros((1, 12)), np.zeros((1, 12)))
    sums = {
        "weight": [400.0], "inputs": [x.sum(0)], "outputs": [f.sum(0)], "channels": [h.sum(0)],
        "coordinates": [x.sum(0)], "input_square": [(x**2).sum()], "output_square": [(f**2).sum()],
        "products": [x.T @ x], "mixed": [h.T @ x],
    }  # fmt: skip
    of = centred(Moments(**{name: np.array(value) for name, value in sums.items()}), 0, look)
    shares = [fitted(down, of, rank, 0.01).unexplained for rank in range(1, 6)]
    assert shares == sorted(shares, reverse=True) and shares[0] < 1
    assert fitted(down, of, 5, 1e9).unexplained == pytest.approx(1, abs=1e-6)


def test_experts_whose_tokens_do_not_differ_leave_their_constant() -> None:
    method = Tilted("tilted", rank=2)
    statistics, decision, looks, _, moments = everything("olmoe", method)

    def still(layer: int) -> Moments:
        found = moments(layer)
        found.weight[0] = 0.0
        found.output_square[1] = found.outputs[1] @ found.outputs[1] / found.weight[1]
        return found

    final = method.finish(statistics, decision, still)
    for before, after in zip(decision.plan.layers, final.plan.layers, strict=True):
        for j in looks[after.layer].experts[:2]:
            assert after.experts[j] == before.experts[j] and after.experts[j].constant is not None
            assert j not in final.unexplained[after.layer]
        assert after.experts[looks[after.layer].experts[2]].low_rank is not None


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    for options, message in (
        ({"rank": -1}, "rank must be a whole number of at least 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"weights": "plain"}, "unknown weights"),
        ({"basis": "random"}, "unknown basis"),
    ):
        with pytest.raises(WinnowError, match=message):
            Tilted("tilted", **options)
    statistics = everything("olmoe", Tilted("tilted", rank=2))[0]
    too_high = Tilted("tilted", rank=33)
    with pytest.raises(WinnowError, match="rank 33 is above 32, the hidden size: set method.rank lower"):
        too_high.looks_again_at(statistics, too_high.decide(statistics, HALF, seed=0))
    with pytest.raises(WinnowError, match="rank 17 is above 16, the width"):
        Tilted("tilted", rank=17).check(replace(statistics.shape, width=16), HALF)
