"""HC-SMoE: hierarchical clustering of experts by their mean output, then an average of each cluster."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.budget import checked_ratio, kept_experts
from methods.checks import check_option, statistic, warn_of_never_routed
from methods.grouping import LINKAGES, agglomerate, merge_groups

MERGE_WEIGHTS = ("frequency", "uniform")


@dataclass(frozen=True)
class HCSMoE:
    """Clusters experts by c_j, the mean of f_j(x_t) over ALL tokens; equally many clusters in each layer.

    The official defaults (C. Chen et al., HC-SMoE): Euclidean distance and average linkage (UPGMA); clusters
    are averaged by frequency, counted here with the model's true top-k as in the REAP repository (the
    official code counts a top-2 whatever the model). Router rows stay; tokens that choose two members of a
    group add their gate values up. Options:
    - ``linkage``: average, single, complete or ward, as scipy defines them (the official complete picks the
      farthest pair and its ward lacks a square: those two faults are not reproduced).
    - ``max_group_size``: no cluster larger than this; None for no limit.
    - ``merge_weights``: ``frequency``, or ``uniform``: every member counts the same.

    Raises WinnowError for an unknown option, a ratio or group size that does not fit, and statistics that are
    missing or not finite.
    """

    version: ClassVar[str] = "1"

    name: str
    linkage: str = "average"
    max_group_size: int | None = None
    merge_weights: str = "frequency"

    def __post_init__(self) -> None:
        check_option(self.name, "linkage", self.linkage, LINKAGES)
        check_option(self.name, "merge_weights", self.merge_weights, MERGE_WEIGHTS)
        size = self.max_group_size
        if size is not None and (type(size) is not int or size < 1):
            raise WinnowError(f"method '{self.name}': max_group_size must be a whole number of at least 1, not {size}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"output_mean"} | ({"frequency"} if self.merge_weights == "frequency" else set()))

    @property
    def uses_seed(self) -> bool:
        return False

    check = staticmethod(checked_ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        count = kept_experts(statistics.shape, ratio)
        layers = sorted(statistics.layers)
        groups = {
            layer: agglomerate(statistic(statistics, layer, "output_mean"), count, self.linkage, self.max_group_size)
            for layer in layers
        }
        if self.merge_weights == "frequency":
            warn_of_never_routed(statistics, "they add nothing to their group's average")
            weights = {layer: statistic(statistics, layer, "frequency") for layer in layers}
        else:
            weights = {layer: np.ones(statistics.num_experts) for layer in layers}
        plan = CompressionPlan(tuple(merge_groups(layer, groups[layer], weights[layer]) for layer in layers))
        return Decision(plan, groups=groups)
