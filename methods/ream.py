"""REAM: the most salient experts each take in their nearest ones, whose router rows go; layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, LayerPlan, prune
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import ExpertWeights, LayerLook, Statistics
from harness.errors import WinnowError
from methods.budget import as_written, kept_experts, parse_ratio
from methods.checks import check_option, finite, statistic, warn_of_never_routed
from methods.grouping import merge_groups, only_rows
from methods.prune_experts import keep_in_layer

VARIANTS = ("exact", "released")
MERGINGS = ("logits+weights", "logits", "weights", "avg", "none")
_LEAST = 0.5  # what the released code replaces a saliency of 0 by, at most


@dataclass(frozen=True)
class REAM:
    """Merges without a row for every member: of each group only the centroid's router row stays (REAM, Samsung).

    Centroids are the k = E - floor(E * ratio) experts of highest saliency (REAP's). Each in turn, the highest first,
    takes the nearest experts that are neither centroids nor taken, until its group has ``group_size`` members. Members
    are permuted onto their centroid, channel by channel, and averaged by saliency. A group of one stays as it is. Of
    equals the lower index goes first; of a group-limited router every router group keeps equally many.

    - ``variant=exact``: the paper's equations. Saliency: mean over routed tokens of gate value times |f_j(x)|.
      Likeness: the cosine of the columns of router logits, plus the mean over all tokens of the cosine of outputs.
      Alignment: the distances of unit vectors of h_j over the same tokens, and of unit vectors of weights, added.
    - ``variant=released``: the code of SamsungSAILMontreal/ream 84a3030 with its faults, on one document at a time.
      Saliency: mean over documents of the mean of p^2 |f_j(x)| (the gate twice, not renormalised, of a plain top-k).
      Likeness: 1 - D / max(D) of unit logit columns, and the cosine of the mean gated outputs. Alignment: h_j over
      tokens in another order for each expert (by the cell's seed; the release draws from numpy's global stream), and
      weights by principal components. ``gated_sim=false`` leaves one gate out of the saliency and those of the outputs.
    - ``group_size``: C, with the centroid; 0: every expert joins its nearest centroid, however many do.
    - ``sequential``: each layer is scored on what the merged layers before hand on; false: on the intact model.
    - ``merging``: what channels are aligned by; ``avg``: not at all; ``none``: what is no centroid is pruned.

    Source: the paper's Eq. 3 to 8, as the author's blog and the release have them. Raises WinnowError for an unknown
    option, a ratio or group size that does not fit, and where statistics or weights are not finite.
    """

    version: ClassVar[str] = "1"

    name: str
    variant: str = "exact"
    group_size: int = 16
    sequential: bool = True
    merging: str = "logits+weights"
    gated_sim: bool = True

    def __post_init__(self) -> None:
        check_option(self.name, "variant", self.variant, VARIANTS)
        check_option(self.name, "merging", self.merging, MERGINGS)
        for option, value in (("sequential", self.sequential), ("gated_sim", self.gated_sim)):
            if type(value) is not bool:
                raise WinnowError(f"method '{self.name}': {option} must be true or false, not {value}")
        if type(self.group_size) is not int or self.group_size < 0:
            raise WinnowError(
                f"method '{self.name}': group_size must be a whole number of at least 0, not {self.group_size}"
            )
        if not self.gated_sim and self.variant != "released":
            raise WinnowError(f"method '{self.name}': gated_sim=false changes nothing of variant=exact: leave it out")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset()

    @property
    def looks_at(self) -> frozenset[str]:
        return frozenset({"frequency", "weighted_ean_sum", "router_gram"})

    @property
    def every_token(self) -> bool:
        return self.variant == "released"

    @property
    def uses_seed(self) -> bool:
        return self.variant == "released" and "logits" in self.merging

    @property
    def mean_layer(self) -> "REAM":
        """The method for a layer that stands for all of them: pruning leaves as many experts and rows."""
        return replace(self, variant="exact", merging="none", gated_sim=True)

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        count, size, experts = kept_experts(shape, ratio), self.group_size, shape.num_experts
        if self.merging != "none" and size and count * size < experts:
            raise WinnowError(
                f"method '{self.name}': group_size={size} is too small: ratio {as_written(parse_ratio(ratio))} leaves "
                f"{count} groups, which hold {count * size} of {experts} experts; use at least "
                f"{-(-experts // count)}, or a lower ratio"
            )
        return parse_ratio(ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        count = kept_experts(statistics.shape, ratio)
        warn_of_never_routed(statistics, "they are merged first, and add nothing to their group's average")
        plans, saliency, groups = [], {}, {}
        for layer in sorted(statistics.layers):
            saliency[layer] = self._saliency(statistics, layer)
            staying = keep_in_layer(saliency[layer], count, statistics.n_group)
            if self.merging == "none":
                plans.append(prune(layer, statistics.num_experts, staying))
                continue
            if count == statistics.num_experts:
                plans.append(prune(layer, count, staying))
                groups[layer] = staying
                continue
            distance = self._distance(statistics, layer)
            centroids = sorted(staying, key=lambda j, values=saliency[layer]: (-values[j], j))  # type: ignore[misc]
            leader = join(distance, centroids, self.group_size)
            groups[layer] = [staying.index(leader[j]) for j in range(statistics.num_experts)]
            plans.append(self._merged(statistics, layer, leader, groups[layer], staying, saliency[layer], seed))
        return Decision(CompressionPlan(tuple(plans)), saliency=saliency, groups=groups or None)

    def _saliency(self, statistics: Statistics, layer: int) -> np.ndarray:
        if self.variant == "released":
            values = statistics.look(layer).document_saliency(2 if self.gated_sim else 1)
            return finite(values, "saliency", layer, statistics.num_experts)
        total, count = (statistic(statistics, layer, name) for name in ("weighted_ean_sum", "frequency"))
        return np.divide(total, count, out=np.zeros_like(total), where=count > 0)

    def _distance(self, statistics: Statistics, layer: int) -> np.ndarray:
        """(E, E) between 0 and 1."""
        gram, look = statistic(statistics, layer, "router_gram"), statistics.look(layer)
        gates = _cosine(gram, np.diag(gram))
        if self.variant == "exact":
            by_gates, outputs = (gates + 1.0) / 2.0, look.output_cosine()
        else:
            apart = np.sqrt(np.maximum(2.0 - 2.0 * gates, 0.0))
            np.fill_diagonal(apart, 0.0)
            by_gates = 1.0 - np.divide(apart, apart.max(), out=np.zeros_like(apart), where=apart > 0)
            means = look.output_mean(self.gated_sim)
            inner = means @ means.T
            outputs = _cosine(inner, np.diag(inner))
        distance = 1.0 - (by_gates + (outputs + 1.0) / 2.0) / 2.0
        return finite(distance, "distance between experts", layer, statistics.num_experts)

    def _merged(
        self,
        statistics: Statistics,
        layer: int,
        leader: Sequence[int],
        labels: Sequence[int],
        staying: list[int],
        saliency: np.ndarray,
        seed: int,
    ) -> LayerPlan:
        pairs = sorted((centroid, j) for j, centroid in enumerate(leader) if j != centroid)
        shares = _without_zeros(saliency) if self.variant == "released" else saliency
        orders: dict[int, tuple[int, ...] | None] = {}
        if self.merging != "avg" and pairs:
            costs = self._costs(statistics, layer, pairs, seed)
            orders = {j: _best(cost) for (_, j), cost in zip(pairs, costs, strict=True)}
        return only_rows(merge_groups(layer, labels, shares, orders), staying)

    def _costs(
        self, statistics: Statistics, layer: int, pairs: Sequence[tuple[int, int]], seed: int
    ) -> list[np.ndarray]:
        """(I, I) of each pair: how far each channel of the centroid is from each of the member."""
        look = statistics.look(layer)
        costs: list[np.ndarray] = []
        if "logits" in self.merging:
            shuffled = seed if self.variant == "released" else None
            costs = [_apart(cosines, a, b) for cosines, a, b in look.channel_cosines(pairs, shuffled)]
        if "weights" in self.merging:
            by_weights = self._by_weights(statistics, look, layer, pairs)
            costs = [a + b for a, b in zip(costs, by_weights, strict=True)] if costs else by_weights
        return costs

    def _by_weights(
        self, statistics: Statistics, look: LayerLook, layer: int, pairs: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        if self.variant == "released":
            features = look.channel_features()
            units = {j: features[j] for pair in pairs for j in pair}
            return [_apart(units[c] @ units[e].T, *map(_is_there, (units[c], units[e]))) for c, e in pairs]
        found: list[np.ndarray] = []
        last, one = -1, np.zeros(0)
        for c, e in pairs:  # those of one centroid stand together
            if c != last:
                last, one = c, _unit_channels(statistics.expert_weights(layer, c))
            other = _unit_channels(statistics.expert_weights(layer, e))
            found.append(_apart(one @ other.T, _is_there(one), _is_there(other)))
        return found


def join(distance: np.ndarray, centroids: Sequence[int], size: int) -> list[int]:
    """Expert -> its centroid. Each of the ``centroids`` in turn takes its nearest by ``distance`` (E, E), until it and
    they are ``size``; with size 0 every expert joins its nearest centroid, of equals the one of lower index."""
    leader = {c: c for c in centroids}
    others = [j for j in range(len(distance)) if j not in leader]
    if size == 0:
        ordered = sorted(centroids)
        leader |= {j: ordered[int(np.argmin(distance[j, ordered]))] for j in others}
    for c in centroids if size else ():
        nearest = sorted((j for j in others if j not in leader), key=lambda j, c=c: (distance[c, j], j))  # type: ignore[misc]
        leader |= dict.fromkeys(nearest[: size - 1], c)
    return [leader[j] for j in range(len(distance))]


def _cosine(gram: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """From inner products (E, E) and squared norms (E,); 0 with a vector of zeros."""
    norms = np.sqrt(np.maximum(squares, 0.0))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)


def _without_zeros(saliency: np.ndarray) -> np.ndarray:
    """Zeros as the release replaces them in its averages."""
    positive = saliency[saliency > 0]
    return np.where(saliency > 0, saliency, min(_LEAST, float(positive.min())) if len(positive) else _LEAST)


def _unit_channels(weights: ExpertWeights) -> np.ndarray:
    """(I, 3 H) float64: gate row, up row and down column of each channel, of length 1 together, or 0."""
    rows = np.concatenate([weights.gate, weights.up, weights.down.T], axis=1, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)  # not finite: stays


def _is_there(units: np.ndarray) -> np.ndarray:
    return (units != 0).sum(axis=1) > 0


def _apart(cosines: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distances between vectors of length 1, or 0 where ``one`` (I,) and ``other`` (I,) say so."""
    squares = one[:, None].astype(np.float64) + other[None, :] - 2.0 * cosines
    return np.sqrt(np.maximum(squares, 0.0))


def _best(cost: np.ndarray) -> tuple[int, ...]:
    """Channel c of the centroid -> channel of the member, for the least sum."""
    if not np.isfinite(cost).all():
        raise WinnowError("channels cannot be aligned: weights or activations are NaN or infinite; check the model")
    return tuple(int(channel) for channel in linear_sum_assignment(cost)[1])
