"""Novices: what a pruned expert leaves behind. Here the constant; rows, gate values and top-k stay as they are."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from harness.contracts.plan import Array, LayerPlan, NewExpert, Source
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from methods.budget import kept_experts
from methods.checks import statistic

# How the tokens of an expert are weighted in what it leaves -> the statistics that its constant is made from.
WEIGHTS = {"plain": ("output_sum", "frequency"), "gate_squared": ("gate_square_output_sum", "gate_square_sum")}


def every_row_stays(shape: MoeShape) -> MoeShape:
    """What bounds a plan in which no router row goes: top-k, the router's groups and its fewest rows do not.

    One real expert is left in a layer at least.
    """
    return replace(shape, top_k=1, n_group=1, fewest_rows=0)


def real_experts(shape: MoeShape, ratio: str | float | Fraction) -> int:
    """E - floor(E * ratio): experts that stay in each layer where all others leave a novice.

    Raises WinnowError for a ratio outside [0, 1).
    """
    return kept_experts(every_row_stays(shape), ratio)


def constants(statistics: Statistics, layer: int, weights: str) -> np.ndarray:
    """(E, H): the mean of f_j over its routed tokens, weighted by 1 (``plain``; MoNE) or by g_tj squared.

    The plain mean is the constant nearest to f_j; weighted by g squared it is the one that changes the layer's output
    least where j alone goes. Zeros for an expert that no token was routed to.
    """
    total, weight = (statistic(statistics, layer, name) for name in WEIGHTS[weights])
    return np.divide(total, weight[:, None], out=np.zeros_like(total), where=weight[:, None] > 0)


def leave_constants(statistics: Statistics, kept: Mapping[int, Collection[int]], weights: str) -> tuple[LayerPlan, ...]:
    """Of every layer: the experts ``kept[layer]`` as they are, the constants of all others in their place."""
    return tuple(
        with_novices(layer, [NewExpert(constant=_array(row)) for row in constants(statistics, layer, weights)], experts)
        for layer, experts in kept.items()
    )


def with_novices(layer: int, novices: list[NewExpert], kept: Collection[int]) -> LayerPlan:
    """New expert j is the old one where it is ``kept``, else ``novices[j]``; every row leads where it did."""
    experts = [NewExpert((Source(j),)) if j in kept else novice for j, novice in enumerate(novices)]
    return LayerPlan(layer, tuple(experts), tuple(range(len(novices))))


def _array(values: np.ndarray) -> Array:
    return Array(values.astype(np.float32))
