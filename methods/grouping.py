"""Grouping experts: agglomerative clustering with an exact number of groups, and the merging plan."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.cluster.hierarchy import linkage as scipy_linkage  # type: ignore[import-untyped]
from scipy.spatial.distance import pdist, squareform  # type: ignore[import-untyped]

from harness.contracts.plan import LayerPlan, NewExpert, Source
from harness.errors import WinnowError

LINKAGES = ("average", "single", "complete", "ward")


def merge_groups(
    layer: int,
    labels: Sequence[int],
    weights: np.ndarray,
    permutations: Mapping[int, tuple[int, ...] | None] | None = None,
) -> LayerPlan:
    """Every group becomes one new expert, the average of its members weighted by ``weights`` (E,) >= 0.

    Weights are divided by their sum within the group; a group whose weights are all 0 is averaged uniformly.
    Labels are as made by ``renumber``. Every router row stays and leads to its group's new expert.
    ``permutations`` gives the channel order of members that were aligned.
    """
    permutations = permutations or {}
    experts = []
    for label in range(max(labels) + 1):
        members = [j for j, other in enumerate(labels) if other == label]
        total = float(sum(weights[j] for j in members))
        share = {j: float(weights[j]) / total if total > 0 else 1.0 / len(members) for j in members}
        experts.append(NewExpert(tuple(Source(j, share[j], permutations.get(j)) for j in members)))
    return LayerPlan(layer, tuple(experts), tuple(labels))


def only_rows(plan: LayerPlan, rows: Sequence[int]) -> LayerPlan:
    """The same without any other router row than ``rows``."""
    return replace(plan, route=tuple(new if row in rows else None for row, new in enumerate(plan.route)))


def renumber(labels: Sequence[int]) -> list[int]:
    """The same partition, its groups numbered 0, 1, ... by their smallest member."""
    order: dict[int, int] = {}
    return [order.setdefault(label, len(order)) for label in labels]


def agglomerate(
    features: np.ndarray, groups: int, linkage: str = "average", max_group_size: int | None = None
) -> list[int]:
    """Labels (E,) of exactly ``groups`` clusters of the rows of ``features`` (E, D), Euclidean distance.

    Without ``max_group_size`` the scipy linkage tree is cut after E - groups merges (a cut by height can give
    fewer clusters where distances tie). With it, see ``_agglomerate_limited``. Raises WinnowError where
    ``groups`` groups of ``max_group_size`` cannot hold all rows. Distances that tie are merged in an order
    that depends on the order of the rows.
    """
    count = len(features)
    if max_group_size is not None:
        if max_group_size * groups < count:
            raise WinnowError(
                f"max_group_size={max_group_size} is too small: {groups} groups of it hold "
                f"{max_group_size * groups} of {count} experts; "
                f"use at least {-(-count // groups)}, or a lower ratio"
            )
        return _agglomerate_limited(features, groups, linkage, max_group_size)
    members = {j: [j] for j in range(count)}
    if groups < count:
        tree = scipy_linkage(features, method=linkage, metric="euclidean")
        for step, (a, b) in enumerate(tree[: count - groups, :2].astype(int).tolist()):
            members[count + step] = members.pop(a) + members.pop(b)
    return _labels(list(members.values()), count)


def _labels(clusters: Sequence[Sequence[int]], count: int) -> list[int]:
    label = {j: index for index, cluster in enumerate(clusters) for j in cluster}
    return renumber([label[j] for j in range(count)])


def _agglomerate_limited(features: np.ndarray, groups: int, linkage: str, limit: int) -> list[int]:
    """Merge, again and again, the closest pair that leaves ``groups`` groups of ``limit`` within reach.

    Whether clusters that never split still fit into ``groups`` groups is a bin-packing question. ``bins`` is
    always a packing that shows they do: a merge inside one of its bins keeps it, any other merge is taken
    only if first-fit-decreasing finds a new one. A bin with two clusters exists until ``groups`` are left, so
    it never gets stuck.
    """
    count = len(features)
    distance = squareform(pdist(features))
    clusters = {j: [j] for j in range(count)}
    size = np.ones(count, dtype=int)
    bins = _pack(dict.fromkeys(clusters, 1), groups, limit)
    assert bins is not None
    while len(clusters) > groups:
        alive = sorted(clusters)
        open_pair = np.zeros_like(distance, dtype=bool)
        open_pair[np.ix_(alive, alive)] = True
        candidates = np.where(np.triu(open_pair, 1) & (size[:, None] + size <= limit), distance, np.inf)
        packing = None
        while packing is None:
            a, b = (int(i) for i in np.unravel_index(np.argmin(candidates), candidates.shape))
            assert np.isfinite(candidates[a, b]), "a packing has a bin with two clusters while there are too many"
            candidates[a, b] = np.inf
            packing = _packing_after(clusters, bins, a, b, groups, limit)
        bins = packing
        others = [c for c in alive if c not in (a, b)]
        distance[a, others] = [_lance_williams(linkage, distance, size, a, b, c) for c in others]
        distance[others, a] = distance[a, others]
        clusters[a] += clusters.pop(b)
        size[a] = len(clusters[a])
    return _labels(list(clusters.values()), count)


def _packing_after(
    clusters: Mapping[int, list[int]], bins: list[list[int]], a: int, b: int, groups: int, limit: int
) -> list[list[int]] | None:
    """A packing of the clusters once b has joined a, or None where none was found."""
    if any(a in bin_ and b in bin_ for bin_ in bins):
        return [[c for c in bin_ if c != b] for bin_ in bins]
    sizes = {c: len(members) for c, members in clusters.items() if c != b}
    sizes[a] += len(clusters[b])
    return _pack(sizes, groups, limit)


def _pack(sizes: Mapping[int, int], groups: int, limit: int) -> list[list[int]] | None:
    """First-fit-decreasing: at most ``groups`` bins of capacity ``limit``, or None where it needs more."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for cluster in sorted(sizes, key=lambda c: (-sizes[c], c)):
        for index, load in enumerate(loads):
            if load + sizes[cluster] <= limit:
                bins[index].append(cluster)
                loads[index] += sizes[cluster]
                break
        else:
            bins.append([cluster])
            loads.append(sizes[cluster])
    return bins if len(bins) <= groups else None


def _lance_williams(linkage: str, distance: np.ndarray, size: np.ndarray, a: int, b: int, c: int) -> float:
    """Distance from cluster c to the union of a and b, from the three distances between them."""
    to_a, to_b, between = float(distance[a, c]), float(distance[b, c]), float(distance[a, b])
    if linkage == "single":
        return min(to_a, to_b)
    if linkage == "complete":
        return max(to_a, to_b)
    m, n, o = int(size[a]), int(size[b]), int(size[c])
    if linkage == "average":
        return (m * to_a + n * to_b) / (m + n)
    squared = ((m + o) * to_a**2 + (n + o) * to_b**2 - o * between**2) / (m + n + o)
    return float(np.sqrt(max(squared, 0.0)))
