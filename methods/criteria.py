"""Saliency criteria for pruning: one pure function each, from a layer's statistics to one number per expert.

The lowest saliency goes first, but for ``LARGEST_GOES``, whose scores are as published and whose largest goes first.
Arrays are float64, (E,) or as described in ``harness.contracts.statistics.STATISTICS`` under the parameter's name. An
expert that was never routed to has saliency 0 in every criterion made from routed tokens.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh  # type: ignore[import-untyped]

from harness.contracts.statistics import ExpertWeights


def _per_token(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.zeros_like(total, dtype=np.float64), where=count > 0)


def reap(weighted_ean_sum: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Mean over the routed tokens of g_tj * ||f_j(x_t)||_2 (REAP; its repository's `reap`).

    g is the gate value that the model really multiplies by, as in llm-compressor. The REAP repository
    recomputes the softmax and renormalises it only if the config says ``norm_topk_prob``, which differs for
    Mixtral.
    """
    return _per_token(weighted_ean_sum, frequency)


def frequency(frequency: np.ndarray) -> np.ndarray:
    """Number of tokens routed to the expert, by the model's true top-k (the usual baseline)."""
    return frequency.copy()


def gate_sum(gate_sum: np.ndarray) -> np.ndarray:
    """Accumulated gate value over the routed tokens: frequency weighted by what the router gave."""
    return gate_sum.copy()


def soft_count(router_score_sum: np.ndarray) -> np.ndarray:
    """Accumulated score of the router over ALL tokens (SEER-MoE, "soft" heavy-hitters counting).

    The full softmax before top-k (of a router with sigmoids, the sigmoid of the logit), so that an expert which was
    never routed to still has a (small) positive count.
    """
    return router_score_sum.copy()


def importance_product(top1_frequency: np.ndarray, top1_score_sum: np.ndarray) -> np.ndarray:
    """Share of top-1 choices times exp(mean confidence) (Koishekenov et al., pruning of NLLB-200).

    Confidence is the router's score of the expert (softmax probability, or sigmoid), averaged over the tokens whose
    first choice it is. An expert which is nobody's first choice has saliency 0, whether or not it was routed to as a
    second choice.
    """
    share = top1_frequency / max(float(top1_frequency.sum()), 1.0)
    return share * np.exp(_per_token(top1_score_sum, top1_frequency))


def ean_sum(ean_sum: np.ndarray) -> np.ndarray:
    """Sum over routed tokens of ||f_j(x_t)||_2, the expert activation norm (REAP repository's `ean_sum`)."""
    return ean_sum.copy()


def ean_mean(ean_sum: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Mean over routed tokens of ||f_j(x_t)||_2 (REAP repository's `ean_mean`; not MC-Suite's, which is ``ean``)."""
    return _per_token(ean_sum, frequency)


def ean(output_square_sum: np.ndarray) -> np.ndarray:
    """Sum over the hidden units of the L2 norm, over the routed tokens, of that unit of f_j (MC-Suite, eq. 13).

    "Min-EAN" of the paper. It grows like the root of the number of tokens, unlike the REAP repository's ``ean_mean``.
    """
    return np.sqrt(output_square_sum).sum(axis=1)


def msan(output_square_sum: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Mean over routed tokens of ||f_j(x_t)||_2^2, the mean squared activation norm."""
    return _per_token(output_square_sum.sum(axis=1), frequency)


def vocabulary_coverage(token_ids: np.ndarray) -> np.ndarray:
    """Share of the vocabulary that is routed to the expert: distinct ids of its tokens / all ids (MC-Suite's EVTC).

    ``token_ids`` (E, V) is bool; V is the config's vocab_size.
    """
    return token_ids.sum(axis=1) / token_ids.shape[1]


def weighted_ean_sum(weighted_ean_sum: np.ndarray) -> np.ndarray:
    """Sum over routed tokens of g_tj * ||f_j(x_t)||_2: `reap` times frequency (REAP repository)."""
    return weighted_ean_sum.copy()


def max_activation(max_activation: np.ndarray) -> np.ndarray:
    """Largest signed output element over routed tokens, at least 0 (REAP repository's `max_activations`)."""
    return max_activation.copy()


def weight_norm(experts: Iterable[ExpertWeights]) -> np.ndarray:
    """Frobenius norm of gate, up and down together: magnitude pruning of whole experts, needs no data.

    The experts of a layer are consumed one after another, so that a lazy iterable holds one at a time.
    """
    squares = [sum(float(np.sum(np.square(m, dtype=np.float64))) for m in (e.gate, e.up, e.down)) for e in experts]
    return np.sqrt(np.array(squares))


def aimer(experts: Iterable[ExpertWeights]) -> np.ndarray:
    """mean |w| / root of mean w^2 over all N entries of gate, up and down together (AIMER), in 1 / sqrt(N) to 1.

    The largest goes first: flat distributions of weights are taken as uninformative. An expert of zeros alone is the
    flattest, and has 1. It needs no data.
    """

    def of(expert: ExpertWeights) -> float:
        entries = [np.abs(m, dtype=np.float64) for m in (expert.gate, expert.up, expert.down)]
        count, total = sum(m.size for m in entries), sum(float(m.sum()) for m in entries)
        root = math.sqrt(sum(float(np.square(m).sum()) for m in entries) * count)
        return total / root if root != 0 else 1.0

    return np.array([of(expert) for expert in experts])


def stable_rank(experts: Iterable[ExpertWeights]) -> np.ndarray:
    """Mean over gate, up and down of the sum of squared singular values / the largest squared one (MC-Suite's WSR).

    The largest goes first: the paper finds that dominant experts have a low one. A matrix of zeros alone counts as of
    full rank. It needs no data.
    """

    def of(matrix: np.ndarray) -> float:
        exact = matrix.astype(np.float64)
        if not np.isfinite(exact).all():
            return math.nan
        small = exact if len(exact) <= exact.shape[1] else exact.T
        gram = small @ small.T
        last = len(gram) - 1
        largest = float(eigvalsh(gram, subset_by_index=[last, last])[0])
        return float(np.trace(gram)) / largest if largest > 0 else float(len(gram))

    return np.array([np.mean([of(m) for m in (e.gate, e.up, e.down)]) for e in experts])


def router_norm(router_rows: np.ndarray) -> np.ndarray:
    """L2 norm of the expert's router row (MC-Suite's RWN), biases left out; needs no data.

    ``router_rows`` (E, H). The largest goes first, which the paper finds the best criterion of weights alone.
    """
    return np.sqrt(np.square(router_rows, dtype=np.float64).sum(axis=1))


def random(num_experts: int, layer: int, seed: int) -> np.ndarray:
    """Uniform numbers from a generator seeded with (seed, layer): the floor for every criterion."""
    return np.random.default_rng([seed, layer]).random(num_experts)


@dataclass(frozen=True)
class Criterion:
    """``function`` takes the statistics named in ``requires``, in that order."""

    function: Callable[..., np.ndarray]
    requires: tuple[str, ...]


FROM_STATISTICS: dict[str, Criterion] = {
    "reap": Criterion(reap, ("weighted_ean_sum", "frequency")),
    "frequency": Criterion(frequency, ("frequency",)),
    "gate_sum": Criterion(gate_sum, ("gate_sum",)),
    "soft_count": Criterion(soft_count, ("router_score_sum",)),
    "importance_product": Criterion(importance_product, ("top1_frequency", "top1_score_sum")),
    "ean_sum": Criterion(ean_sum, ("ean_sum",)),
    "ean_mean": Criterion(ean_mean, ("ean_sum", "frequency")),
    "ean": Criterion(ean, ("output_square_sum",)),
    "msan": Criterion(msan, ("output_square_sum", "frequency")),
    "vocabulary_coverage": Criterion(vocabulary_coverage, ("token_ids",)),
    "weighted_ean_sum": Criterion(weighted_ean_sum, ("weighted_ean_sum",)),
    "max_activation": Criterion(max_activation, ("max_activation",)),
}
# From a layer's experts, one after another.
FROM_WEIGHTS: dict[str, Callable[[Iterable[ExpertWeights]], np.ndarray]] = {
    "weight_norm": weight_norm,
    "aimer": aimer,
    "stable_rank": stable_rank,
}
CRITERIA = (*FROM_STATISTICS, *FROM_WEIGHTS, "router_norm", "random")
LARGEST_GOES = frozenset({"aimer", "stable_rank", "router_norm"})
