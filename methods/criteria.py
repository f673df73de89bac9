"""Saliency criteria for pruning: one pure function each, from a layer's statistics to one number per expert.

The lowest saliency goes first. Arrays are (E,) float64 as described in ``harness.contracts.statistics.STATISTICS``
under the parameter's name. An expert that was never routed to has saliency 0 in every criterion made from
routed tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

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


def soft_count(router_probability_sum: np.ndarray) -> np.ndarray:
    """Accumulated softmax of the router over ALL tokens (SEER-MoE, "soft" heavy-hitters counting).

    The full softmax before top-k, so that an expert which was never routed to still has a (small) positive
    count.
    """
    return router_probability_sum.copy()


def importance_product(top1_frequency: np.ndarray, top1_confidence_sum: np.ndarray) -> np.ndarray:
    """Share of top-1 choices times exp(mean confidence) (Koishekenov et al., pruning of NLLB-200).

    Confidence is the softmax probability of the expert, averaged over the tokens whose first choice it is. An
    expert which is nobody's first choice has saliency 0, whether or not it was routed to as a second choice.
    """
    share = top1_frequency / max(float(top1_frequency.sum()), 1.0)
    return share * np.exp(_per_token(top1_confidence_sum, top1_frequency))


def ean_sum(ean_sum: np.ndarray) -> np.ndarray:
    """Sum over routed tokens of ||f_j(x_t)||_2, the expert activation norm (REAP repository's `ean_sum`)."""
    return ean_sum.copy()


def ean_mean(ean_sum: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Mean over routed tokens of ||f_j(x_t)||_2 (REAP repository's `ean_mean`; "Min-EAN" of MC-Suite)."""
    return _per_token(ean_sum, frequency)


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
    "soft_count": Criterion(soft_count, ("router_probability_sum",)),
    "importance_product": Criterion(importance_product, ("top1_frequency", "top1_confidence_sum")),
    "ean_sum": Criterion(ean_sum, ("ean_sum",)),
    "ean_mean": Criterion(ean_mean, ("ean_sum", "frequency")),
    "weighted_ean_sum": Criterion(weighted_ean_sum, ("weighted_ean_sum",)),
    "max_activation": Criterion(max_activation, ("max_activation",)),
}
CRITERIA = (*FROM_STATISTICS, "weight_norm", "random")
