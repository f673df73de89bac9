"""M-SMoE: dominant experts chosen over all layers; the others join the one their router logits resemble."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import ClassVar

import numpy as np

from harness.contracts.alignment import align_channels
from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.budget import checked_ratio, kept_experts
from methods.checks import check_option, statistic, warn_of_never_routed
from methods.grouping import merge_groups, renumber

# variant -> the statistic that experts are compared by
VARIANTS = {"exact": "router_gram", "reap_repo": "router_document_distance"}
ALIGNMENTS = ("none", "dominant")


@dataclass(frozen=True)
class MSMoE:
    """Merges each group into one expert weighted by frequency (P. Li et al., MC-SMoE, no distillation).

    Dominants: the most frequent expert of each layer, then the globally most frequent others (as a share of
    their layer's routed slots) until there are (E - floor(E * ratio)) * layers. So the number of groups
    varies by layer and the total is exact (the official strict threshold loses groups on ties). Every other
    expert joins the nearest dominant of its layer. Of equals, the lower layer, then the lower expert index,
    goes first. Options:
    - ``variant``: ``exact`` compares experts by the cosine between their columns of the raw router logits
      over all tokens, as the official code does. ``reap_repo`` reproduces the REAP repository: the cosine
      distance between ROWS of the matrix of cosine distances that were averaged over documents.
    - ``alignment``: ``dominant`` permutes the channels of each member to match its group's dominant (see
      ``align_channels``), ``none`` leaves them (the official code for Mixtral).

    Every router row stays, so a layer may have fewer groups than top-k. Raises WinnowError for an unknown
    option, a ratio that does not fit, and statistics or weights that are missing or not finite.
    """

    version: ClassVar[str] = "1"

    name: str
    variant: str = "exact"
    alignment: str = "dominant"

    def __post_init__(self) -> None:
        check_option(self.name, "variant", self.variant, VARIANTS)
        check_option(self.name, "alignment", self.alignment, ALIGNMENTS)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"frequency", VARIANTS[self.variant]})

    @property
    def uses_seed(self) -> bool:
        return False

    check = staticmethod(checked_ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        count = kept_experts(statistics.shape, ratio)
        layers = sorted(statistics.layers)
        frequency = {layer: statistic(statistics, layer, "frequency") for layer in layers}
        warn_of_never_routed(statistics, "they add nothing to their group's average")
        dominants = choose_dominants(frequency, count * len(layers))
        plans, groups = [], {}
        for layer in layers:
            distance = expert_distance(statistic(statistics, layer, VARIANTS[self.variant]), self.variant)
            leader = join_nearest(distance, dominants[layer])
            groups[layer] = renumber(leader)
            permutations = self._permutations(statistics, layer, leader)
            plans.append(merge_groups(layer, groups[layer], frequency[layer], permutations))
        return Decision(CompressionPlan(tuple(plans)), groups=groups)

    def _permutations(self, statistics: Statistics, layer: int, leader: list[int]) -> dict[int, tuple[int, ...]]:
        """Member -> its channels in its dominant's order."""
        if self.alignment == "none":
            return {}
        pairs = sorted((dominant, j) for j, dominant in enumerate(leader) if j != dominant)
        align = statistics.align or partial(_one_by_one, statistics)
        return {j: order for (_, j), order in zip(pairs, align(layer, pairs), strict=True)}


def _one_by_one(statistics: Statistics, layer: int, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """``Align`` of these statistics by their experts' weights."""
    weights = statistics.expert_weights
    return [align_channels(weights(layer, dominant), weights(layer, member)) for dominant, member in pairs]


def choose_dominants(frequency: Mapping[int, np.ndarray], total: int) -> dict[int, list[int]]:
    """Layer -> its dominants, ``total`` over all layers and at least one in each.

    ``frequency`` (E,) is divided by its sum in each layer, which counts every token top-k times.
    """
    share = {}
    for layer, values in frequency.items():
        if values.sum() <= 0:
            raise WinnowError(f"statistic 'frequency' of layer {layer} is 0 for every expert: no token was routed")
        share[layer] = values / values.sum()
    dominants = {layer: [int(np.argmax(values))] for layer, values in share.items()}
    others = sorted(
        (-float(value), layer, expert)
        for layer, values in share.items()
        for expert, value in enumerate(values)
        if expert not in dominants[layer]
    )
    for _, layer, expert in others[: total - len(share)]:
        dominants[layer].append(expert)
    return {layer: sorted(experts) for layer, experts in dominants.items()}


def expert_distance(values: np.ndarray, variant: str) -> np.ndarray:
    """(E, E) distance by which experts join dominants, from the statistic (E, E) of the ``variant``.

    exact: 1 - cosine, from the Gram matrix of the logit columns. reap_repo: 1 - cosine between rows of the
    distance matrix, diagonal included. A column (or row) of zeros resembles nothing: its distance is 1.
    """
    gram = values if variant == "exact" else values @ values.T
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scale = np.outer(norms, norms)
    return 1.0 - np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)


def join_nearest(distance: np.ndarray, dominants: list[int]) -> list[int]:
    """Expert -> its dominant: itself if it is one, otherwise the nearest by ``distance`` (E, E)."""
    nearest = [dominants[int(np.argmin(distance[j, dominants]))] for j in range(len(distance))]
    return [j if j in dominants else nearest[j] for j in range(len(distance))]
