"""Expert pruning: rank experts by a saliency criterion and drop the worst, with their router rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, prune
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods import criteria
from methods.budget import as_written, check_any_number, kept_experts, parse_ratio
from methods.checks import check_option, finite, statistic, warn_of_never_routed

SCOPES = ("layer", "global", "list")


@dataclass(frozen=True)
class ExpertPruning:
    """Keeps the experts of highest saliency (of ``criteria.LARGEST_GOES``, of the lowest score); the survivors' weights
    and router rows stay as they are.

    All layers are scored on the intact model. ``scope`` shares the budget out among the layers (``allocation=``):
    - ``layer``: E - floor(E * ratio) experts stay in every layer (the same number in each router group where
      the router is group-limited).
    - ``global``: the experts of all layers are ranked together and as many go in total, but at least top-k
      stay in each layer. Raw saliencies are compared across layers, so a layer whose outputs are larger keeps
      more experts.
    - ``list``: ``experts`` says how many stay in each MoE layer, the first one first; in all as many as with ``layer``.
    Of equal saliencies the lower layer, then the lower expert index, is kept.

    Raises WinnowError for an unknown option, a ratio or list that does not fit, statistics that are missing or not
    finite, and for ``global`` with a group-limited router.
    """

    version: ClassVar[str] = "1"

    name: str
    criterion: str
    scope: str = "layer"
    experts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_option(self.name, "criterion", self.criterion, criteria.CRITERIA)
        check_option(self.name, "scope", self.scope, SCOPES)
        if (self.experts is None) == (self.scope == "list"):
            raise WinnowError(f"method '{self.name}': experts=[...] goes with scope=list, and scope=list with it")
        if any(type(number) is not int for number in self.experts or ()):
            raise WinnowError(f"method '{self.name}': experts={list(self.experts or ())} are not all whole numbers")

    @property
    def requires(self) -> frozenset[str]:
        """What the criterion reads, and the frequency, by which never-routed experts are told."""
        if self.criterion not in criteria.FROM_STATISTICS:
            return frozenset()
        return frozenset(criteria.FROM_STATISTICS[self.criterion].requires) | {"frequency"}

    @property
    def uses_seed(self) -> bool:
        return self.criterion == "random"

    @property
    def mean_layer(self) -> "ExpertPruning":
        """The method for a layer that stands for all of them: a list leaves as many in the mean as ``layer`` does."""
        return replace(self, scope="layer", experts=None) if self.scope == "list" else self

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        exact = parse_ratio(ratio)
        count = kept_experts(shape, exact)
        if self.scope == "global":
            check_any_number("scope=global", "scope=layer", shape)
        if self.experts is not None:
            self._check_list(self.experts, shape, exact, count * shape.layers)
        return exact

    def _check_list(self, experts: Sequence[int], shape: MoeShape, ratio: Fraction, total: int) -> None:
        given = f"method '{self.name}': experts={list(experts)}"
        if len(experts) != shape.layers:
            raise WinnowError(f"{given} are {len(experts)} numbers, but the model has {shape.layers} MoE layers")
        fewest = max(shape.top_k, shape.fewest_rows)
        for number in experts:
            if not fewest <= number <= shape.num_experts or number % shape.n_group:
                groups = "" if shape.n_group == 1 else f", in multiples of the router's {shape.n_group} groups"
                raise WinnowError(
                    f"{given}: {number} is not possible; a layer keeps {fewest} to {shape.num_experts}{groups}"
                )
        if sum(experts) != total:
            raise WinnowError(
                f"{given} leave {sum(experts)} experts in all, but ratio {as_written(ratio)} leaves {total}: "
                "change the list, or the ratio"
            )

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        num_experts, top_k, n_group = statistics.num_experts, statistics.top_k, statistics.n_group
        self.check(statistics.shape, ratio)
        count = kept_experts(statistics.shape, ratio)
        saliency = {layer: self._saliency(statistics, layer, seed) for layer in sorted(statistics.layers)}
        if self.requires:
            warn_of_never_routed(statistics, "saliencies over routed tokens are 0 for them, so they go first")
        largest_goes = self.criterion in criteria.LARGEST_GOES
        worth = {layer: -values if largest_goes else values for layer, values in saliency.items()}
        if self.scope == "global":
            kept = keep_globally(worth, count * len(worth), top_k)
        else:
            counts = self.experts or [count] * len(worth)
            kept = {
                layer: keep_in_layer(values, number, n_group)
                for (layer, values), number in zip(worth.items(), counts, strict=True)
            }
        return Decision(
            CompressionPlan(tuple(prune(layer, num_experts, kept[layer]) for layer in saliency)),
            saliency=saliency,
            largest_goes=largest_goes,
        )

    def _saliency(self, statistics: Statistics, layer: int, seed: int) -> np.ndarray:
        num_experts = statistics.num_experts
        if self.criterion == "random":
            if seed < 0:
                raise WinnowError(f"seed {seed} is negative: random pruning needs a seed of at least 0")
            values = criteria.random(num_experts, layer, seed)
        elif self.criterion == "router_norm":
            values = criteria.router_norm(statistics.router_rows(layer))
        elif self.criterion in criteria.FROM_WEIGHTS:
            experts = (statistics.expert_weights(layer, j) for j in range(num_experts))
            values = criteria.FROM_WEIGHTS[self.criterion](experts)
        else:
            criterion = criteria.FROM_STATISTICS[self.criterion]
            values = criterion.function(*(statistic(statistics, layer, name) for name in criterion.requires))
        return finite(values, f"saliency '{self.criterion}'", layer, num_experts)


def keep_in_layer(saliency: np.ndarray, count: int, n_group: int = 1) -> list[int]:
    """Indices of the ``count`` highest saliencies (E,), equally many in each of ``n_group`` equal blocks."""
    size = len(saliency) // n_group
    kept: list[int] = []
    for start in range(0, len(saliency), size):
        # A stable sort of the negated values puts the lower index first among equals.
        best = np.argsort(-saliency[start : start + size], kind="stable")[: count // n_group]
        kept += [start + int(j) for j in best]
    return sorted(kept)


def keep_globally(saliency: Mapping[int, np.ndarray], total: int, at_least: int) -> dict[int, list[int]]:
    """Layer -> kept indices: the best ``at_least`` of every layer, then the best of all up to ``total``."""
    kept = {layer: keep_in_layer(values, at_least) for layer, values in saliency.items()}
    others = sorted(
        (-float(value), layer, expert)
        for layer, values in saliency.items()
        for expert, value in enumerate(values)
        if expert not in kept[layer]
    )
    for _, layer, expert in others[: total - at_least * len(saliency)]:
        kept[layer].append(expert)
    return {layer: sorted(experts) for layer, experts in kept.items()}
