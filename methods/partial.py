"""Partial preservation: some experts stay whole, the others are merged into bases; between pruning and merging."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ExpertWeights, Statistics
from harness.errors import WinnowError
from methods import criteria
from methods.budget import kept_experts, parse_ratio
from methods.checks import check_option, finite, statistic, warn_of_never_routed
from methods.grouping import merge_groups, only_rows
from methods.prune_experts import keep_in_layer

IMPORTANCES = ("reap", "frequency", "soft_count")
# similarity -> the statistic that it reads
SIMILARITIES = {"router_logits": "router_gram", "router_rows": None, "weights": None}


@dataclass(frozen=True)
class Partial:
    """Of the r = E - floor(E * ratio) experts of highest importance, the best stay as they are, the others are bases.

    Every expert that is left joins the base that it is most like, and each base becomes its group's average.

    Averages are weighted by importance. Router rows of the experts that stay and of the bases stay, all others go, so
    the result is an ordinary, smaller checkpoint (SlimQwen, arXiv 2605.08738, its "partial preservation", without the
    training that follows there; read from a summary, as no code is public). Of equals the lower expert index goes
    first. Options:
    - ``preserved``: the share of the r experts that stays as it is, rounded down; at least one is a base. 0.5 is the
      published half, 0 merges into all r.
    - ``importance``: ``reap``, ``frequency`` or ``soft_count`` (its soft-logits), as the criteria of the same names.
    - ``similarity``: the cosine between the experts' columns of the router logits over all tokens (``router_logits``),
      their router rows (``router_rows``), or all their weights (``weights``), without alignment of channels.

    Raises WinnowError for an unknown option, a ratio that does not fit, and for statistics or weights that are missing
    or not finite.
    """

    version: ClassVar[str] = "1"

    name: str
    preserved: str | float = 0.5
    importance: str = "reap"
    similarity: str = "router_logits"

    def __post_init__(self) -> None:
        check_option(self.name, "importance", self.importance, IMPORTANCES)
        check_option(self.name, "similarity", self.similarity, SIMILARITIES)
        self._share()

    def _share(self) -> Fraction:
        try:
            share = Fraction(str(self.preserved))
        except (ValueError, ZeroDivisionError):
            raise WinnowError(f"method '{self.name}': preserved '{self.preserved}' is no number, such as 0.5") from None
        if not 0 <= share <= 1:
            raise WinnowError(f"method '{self.name}': preserved {self.preserved} is outside [0, 1]")
        return share

    @property
    def requires(self) -> frozenset[str]:
        compared = SIMILARITIES[self.similarity]
        wanted = {*criteria.FROM_STATISTICS[self.importance].requires, "frequency"}
        return frozenset(wanted if compared is None else wanted | {compared})

    @property
    def uses_seed(self) -> bool:
        return False

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        kept_experts(shape, ratio)
        return parse_ratio(ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        count = kept_experts(statistics.shape, ratio)
        warn_of_never_routed(statistics, "they are merged first, and add nothing to their group's average")
        plans, groups = [], {}
        criterion = criteria.FROM_STATISTICS[self.importance]
        for layer in sorted(statistics.layers):
            values = criterion.function(*(statistic(statistics, layer, name) for name in criterion.requires))
            staying = keep_in_layer(values, count, statistics.n_group)
            ranked = sorted(staying, key=lambda j, values=values: (-values[j], j))  # type: ignore[misc]
            bases = sorted(ranked[min(math.floor(count * self._share()), count - 1) :])
            joining = [j for j in range(statistics.num_experts) if j not in staying]
            cosine = self._cosine(statistics, layer, joining, bases)
            leader = {j: j for j in staying} | {j: bases[int(np.argmax(cosine[j, bases]))] for j in joining}
            labels = [staying.index(leader[j]) for j in range(statistics.num_experts)]
            plans.append(only_rows(merge_groups(layer, labels, values), staying))
            groups[layer] = labels
        return Decision(CompressionPlan(tuple(plans)), groups=groups)

    def _cosine(self, statistics: Statistics, layer: int, joining: list[int], bases: list[int]) -> np.ndarray:
        """(E, E), filled in where an expert of ``joining`` meets a base; 0 with one of zeros alone."""
        experts = statistics.num_experts
        gram = np.zeros((experts, experts))
        if self.similarity == "weights":
            fill_gram(gram, lambda j: statistics.expert_weights(layer, j), joining, bases)
        elif self.similarity == "router_rows":
            rows = finite(statistics.router_rows(layer), "router", layer, experts)
            gram = rows @ rows.T
        else:
            gram = statistic(statistics, layer, "router_gram")
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        scale = np.outer(norms, norms)
        cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale != 0)
        return finite(cosine, f"similarity by {self.similarity}", layer, experts)


def fill_gram(
    gram: np.ndarray,
    expert: Callable[[int], ExpertWeights],
    rows: list[int],
    columns: list[int],
    matrices: Sequence[str] = ("gate", "up", "down"),
) -> None:
    """Inner products of ``matrices``, of ``rows`` with ``columns`` and of each with itself; holds two experts."""

    def flat(j: int) -> np.ndarray:
        weights = expert(j)
        return np.concatenate([getattr(weights, name).ravel() for name in matrices], dtype=np.float64)

    for j in columns:
        one = flat(j)
        gram[j, j] = one @ one
        for i in rows:
            other = flat(i)
            gram[i, i] = other @ other
            gram[i, j] = one @ other
