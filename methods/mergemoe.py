"""MergeMoE: the most used experts are centres, the others join by their weights; down projections are fitted."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.recovery import Fit
from harness.contracts.statistics import Statistics
from methods.budget import checked_ratio, kept_experts
from methods.checks import finite, statistic, warn_of_never_routed
from methods.grouping import merge_groups, renumber
from methods.m_smoe import join_nearest
from methods.partial import fill_gram


@dataclass(frozen=True)
class MergeMoE:
    """In each layer the E - floor(E * ratio) experts with the most routed tokens are centres; every other expert joins
    the centre with the most similar flattened (up, gate) by cosine.

    Gate and up projections are the group's sums weighted by usage. The down projection is then fitted on calibration
    text: to the same sum of the members' outputs, over all tokens, routed or not (``fit``; by the identity of
    methods_3.md, 1.1, the paper's W T1 with its unconstrained T1). The paper's pseudo-inverse breaks down where there
    are about as many tokens as channels, so a ridge of ``alpha`` draws the fit to the weighted sum of the down
    projections; ``tokens`` of the corpus are read for it at most. Every router row stays. Of equals the lower expert
    index goes first. (MergeMoE; no code is public. The paper leaves open which similarity is meant, and compresses
    some of the layers; here it is all, by the same ratio.)

    Raises WinnowError for a ratio that does not fit, and for statistics or weights that are missing or not finite.
    """

    version: ClassVar[str] = "1"

    name: str
    alpha: float = 0.01
    tokens: int = 131_072

    @property
    def fit(self) -> Fit:
        """What the plan's down projections are to be fitted by."""
        return Fit("all_tokens", self.alpha, self.tokens)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"frequency"})

    @property
    def uses_seed(self) -> bool:
        return False

    check = staticmethod(checked_ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        count = kept_experts(statistics.shape, ratio)
        warn_of_never_routed(statistics, "they add nothing to their group's sum")
        plans, groups = [], {}
        for layer in sorted(statistics.layers):
            usage = statistic(statistics, layer, "frequency")
            centres = sorted(np.argsort(-usage, kind="stable")[:count].tolist())
            groups[layer] = renumber(join_nearest(self._distance(statistics, layer, centres), centres))
            plans.append(merge_groups(layer, groups[layer], usage))
        return Decision(CompressionPlan(tuple(plans)), groups=groups)

    def _distance(self, statistics: Statistics, layer: int, centres: list[int]) -> np.ndarray:
        """(E, E): 1 - cosine, filled in where another expert meets a centre; 1 with one of zeros alone."""
        experts = statistics.num_experts
        others = [j for j in range(experts) if j not in centres]
        gram = np.zeros((experts, experts))
        fill_gram(gram, lambda j: statistics.expert_weights(layer, j), others, centres, ("up", "gate"))
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        scale = np.outer(norms, norms)
        cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale != 0)
        return 1.0 - finite(cosine, "similarity by weights", layer, experts)
