"""How the router of the uncompressed model spreads tokens over experts, by source of text."""

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from harness.contracts.record import Record

Usage = dict[str, dict[str, np.ndarray]]


def collect_usage(records: Iterable[Record]) -> Usage:
    """source -> layer -> routed-token counts (E,), each source from the first record that has it."""
    usage: Usage = {}
    for record in records:
        for source, layers in record.expert_usage.items():
            if layers and source not in usage:
                usage[source] = {
                    layer: np.asarray(layers[layer], dtype=np.float64) for layer in sorted(layers, key=int)
                }
    return usage


def relative_usage(usage: Usage) -> dict[str, np.ndarray]:
    """source -> (layers, E) counts over the layer's mean count: 1 is what every expert gets if all are used
    alike.

    In each layer the experts are in descending order of their share summed over sources, the same order for
    every source, so equal places are equal experts. Layers with fewer experts are filled up with NaN.
    """
    layers = layer_names(usage)
    width = max(len(counts) for of_source in usage.values() for counts in of_source.values())
    table = {source: np.full((len(layers), width), np.nan) for source in usage}
    for place, layer in enumerate(layers):
        shares = {source: _share(of_source[layer]) for source, of_source in usage.items() if layer in of_source}
        order = np.argsort(-sum(shares.values()), kind="stable")
        for source, share in shares.items():
            table[source][place, : len(share)] = share[order] * len(share)
    return table


def layer_names(usage: Usage) -> list[str]:
    return sorted({layer for of_source in usage.values() for layer in of_source}, key=int)


def top_quarter_share(of_source: dict[str, np.ndarray]) -> float:
    """The share of routed tokens that the most used quarter of a layer's experts takes, mean over layers."""
    return float(
        np.mean([np.sort(_share(counts))[::-1][: max(1, len(counts) // 4)].sum() for counts in of_source.values()])
    )


def half_overlap(usage: Usage) -> dict[tuple[str, str], float]:
    """(source, source) -> Jaccard index of the most used halves of experts, mean over the layers both have.

    1 is the same half; two halves drawn at random have about 1/3.
    """
    overlap = {}
    for one, other in combinations(usage, 2):
        shared = [layer for layer in usage[one] if layer in usage[other]]
        if shared:
            halves = [(_most_used_half(usage[one][layer]), _most_used_half(usage[other][layer])) for layer in shared]
            overlap[(one, other)] = float(np.mean([len(a & b) / len(a | b) for a, b in halves]))
    return overlap


def _most_used_half(counts: np.ndarray) -> set[int]:
    return set(np.argsort(-counts, kind="stable")[: max(1, len(counts) // 2)].tolist())


def _share(counts: np.ndarray) -> np.ndarray:
    """Shares of the layer's routed tokens; of a layer that no token reached, equal ones."""
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(counts), 1 / len(counts))
