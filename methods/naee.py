"""NAEE: keep the subset of experts whose layer output is nearest to that of all experts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, prune
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Routing, Statistics
from harness.errors import WinnowError
from methods.budget import kept_experts, parse_ratio
from methods.checks import finite, statistic

Loss = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class NAEE:
    """Of each layer's subsets of E - floor(E * ratio) experts, the one of the least reconstruction loss stays.

    The loss of a subset is the Frobenius norm, over the sampled tokens of the calibration corpus, of the difference
    between the layer's output and its output when the router has no other rows: dropped experts are never chosen, and
    gate values are what the model then computes (Lu et al. 2024, "Not All Experts are Equal", section 3.1; repository
    Lucky-Lance/Expert_Sparsity, which adds the norms of its batches instead). Layers are judged on the intact model.

    All subsets are tried in layers of up to ``exhaustive_up_to`` experts, as in the paper: 12,870 for 8 of 16. Beyond
    that the search is greedy, and not the paper's: the expert whose removal leaves the least loss goes, and the rest is
    tried again, about (E^2 - r^2) / 2 subsets for r of E. Of equal losses the lower expert index is kept.

    The decision's saliency of an expert is the loss where it alone is removed, 0 where nothing goes. How many tokens
    are sampled is bounded by memory (``harness.contracts.statistics.sampled_tokens``).

    Raises WinnowError for a ratio that does not fit, statistics that are missing or not finite, and for a group-limited
    router, whose groups must stay equal while single experts go.
    """

    version: ClassVar[str] = "1"

    name: str
    exhaustive_up_to: int = 16

    def __post_init__(self) -> None:
        if type(self.exhaustive_up_to) is not int or self.exhaustive_up_to < 0:
            raise WinnowError(
                f"method '{self.name}': exhaustive_up_to must be a whole number of at least 0, not "
                f"{self.exhaustive_up_to}"
            )

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"sampled_inputs", "sampled_output_gram"})

    @property
    def uses_seed(self) -> bool:
        return False

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        if shape.n_group > 1:
            raise WinnowError(f"method '{self.name}' does not fit a group-limited router; use method=reap")
        kept_experts(shape, ratio)
        return parse_ratio(ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        num_experts = statistics.num_experts
        self.check(statistics.shape, ratio)
        count = kept_experts(statistics.shape, ratio)
        search = best_subset if num_experts <= self.exhaustive_up_to else greedy_subset
        kept: dict[int, Sequence[int]] = {}
        saliency = {}
        for layer in sorted(statistics.layers):
            gram = statistic(statistics, layer, "sampled_output_gram")
            routing = statistics.router(layer, statistics.get(layer, "sampled_inputs"))
            loss = reconstruction_loss(gram, routing)
            alone = [loss(_without(range(num_experts), j)) if count < num_experts else 0.0 for j in range(num_experts)]
            saliency[layer] = finite(np.array(alone), "reconstruction loss", layer, num_experts)
            kept[layer] = search(loss, num_experts, count)
        plan = CompressionPlan(tuple(prune(layer, num_experts, experts) for layer, experts in kept.items()))
        return Decision(plan, saliency=saliency)


def reconstruction_loss(gram: np.ndarray, routing: Routing) -> Loss:
    """The loss of a subset of experts, from ``gram`` (E, E, T), the inner products of the experts' outputs.

    The difference of the outputs of a token is a sum of the experts chosen before and after, so its squared norm needs
    the inner products of these alone.
    """
    by_token = np.ascontiguousarray(gram.transpose(2, 0, 1))
    tokens = np.arange(len(by_token))[:, None, None]
    gates, indices = routing(range(len(gram)))

    def loss(kept: Sequence[int]) -> float:
        gates_left, places = routing(kept)
        experts = np.concatenate([indices, np.asarray(kept)[places]], axis=1)
        weights = np.concatenate([-gates, gates_left], axis=1)
        products = by_token[tokens, experts[:, :, None], experts[:, None, :]]
        squared = (weights[:, None, :] @ products @ weights[:, :, None]).sum()
        return float(np.sqrt(np.maximum(squared, 0.0)))  # rounding can make a 0 negative

    return loss


def best_subset(loss: Loss, num_experts: int, count: int) -> Sequence[int]:
    """The ``count`` experts of the least loss: every subset is tried."""
    return min(itertools.combinations(range(num_experts), count), key=loss)


def greedy_subset(loss: Loss, num_experts: int, count: int) -> Sequence[int]:
    """``count`` experts: one at a time goes, the one without which the loss is least."""
    kept = list(range(num_experts))
    while len(kept) > count:
        kept = min((_without(kept, expert) for expert in reversed(kept)), key=loss)
    return kept


def _without(experts: Sequence[int], gone: int) -> list[int]:
    return [expert for expert in experts if expert != gone]
