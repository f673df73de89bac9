"""What a method is and what it returns, and the checks that all methods make on their statistics."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from harness.contracts.plan import CompressionPlan, identity
from harness.contracts.statistics import MoeShape, Statistics
from harness.errors import WinnowError
from methods.budget import as_written, parse_ratio


@dataclass(frozen=True)
class Decision:
    """A plan and why: ``saliency`` (layer -> (E,), pruning) or ``groups`` (layer -> E labels, merging).

    The label of an old expert is the index of its new expert in the plan.
    """

    plan: CompressionPlan
    saliency: dict[int, np.ndarray] | None = None
    groups: dict[int, list[int]] | None = None


class Method(Protocol):
    """A pure function from statistics and a compression ratio to a plan.

    ``requires`` names the statistics (of ``harness.contracts.statistics.STATISTICS``) that the calibration pass must
    collect. Expert weights are not named there: ``Statistics.expert_weights`` reads them when asked. ``uses_seed``
    tells whether the seed changes the plan. ``check`` returns the ratio as it is written, exact; it raises WinnowError
    where the ratio or an option does not fit the model, before anything is computed; without a ``shape`` it checks
    what it can.
    """

    @property
    def name(self) -> str: ...

    @property
    def requires(self) -> frozenset[str]: ...

    @property
    def uses_seed(self) -> bool: ...

    def check(
        self, num_experts: int, top_k: int, n_group: int, ratio: str | float | Fraction, shape: MoeShape | None = None
    ) -> Fraction: ...

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision: ...


@dataclass(frozen=True)
class NoCompression:
    """The baseline: the identity plan, every expert kept. Raises WinnowError for a ratio other than 0."""

    name: str = "none"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset()

    @property
    def uses_seed(self) -> bool:
        return False

    def check(
        self, num_experts: int, top_k: int, n_group: int, ratio: str | float | Fraction, shape: MoeShape | None = None
    ) -> Fraction:
        exact = parse_ratio(ratio)
        if exact != 0:
            raise WinnowError(f"method '{self.name}' removes nothing: use ratio=0 (it was {as_written(exact)})")
        return exact

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        self.check(statistics.num_experts, statistics.top_k, statistics.n_group, ratio)
        layers = sorted(statistics.layers)
        return Decision(CompressionPlan(tuple(identity(layer, statistics.num_experts) for layer in layers)))


def check_option(method: str, option: str, value: object, known: Iterable[str]) -> None:
    """Raises WinnowError that lists the known values where ``value`` is none of them."""
    known = list(known)
    if value not in known:
        raise WinnowError(f"method '{method}': unknown {option} '{value}'; known: {', '.join(known)}")


def finite(values: np.ndarray, what: str, layer: int, num_experts: int) -> np.ndarray:
    """``values`` as float64. Raises WinnowError where a row per expert is missing or is not finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or values.shape[0] != num_experts:
        raise WinnowError(
            f"{what} of layer {layer} has shape {values.shape}, not one row for each of {num_experts} experts"
        )
    bad = np.flatnonzero(~np.isfinite(values.reshape(num_experts, -1)).all(axis=1))
    if len(bad):
        raise WinnowError(
            f"{what} of layer {layer} is NaN or infinite for expert(s) {', '.join(map(str, bad))}: "
            "check the model's weights and calibrate again (float32 if an activation overflows)"
        )
    return values


def statistic(statistics: Statistics, layer: int, name: str) -> np.ndarray:
    """The statistic as float64. Raises WinnowError that names layer and statistic if it is not finite."""
    return finite(statistics.get(layer, name), f"statistic '{name}'", layer, statistics.experts_in(layer))


def warn_of_never_routed(statistics: Statistics, consequence: str) -> None:
    """One warning with the number of experts that no calibration token was routed to, if there are any."""
    counts = {layer: int((statistic(statistics, layer, "frequency") == 0).sum()) for layer in sorted(statistics.layers)}
    never = sum(counts.values())
    if never:
        where = ", ".join(str(layer) for layer, count in counts.items() if count)
        warnings.warn(
            f"{never} of {sum(map(statistics.experts_in, counts))} experts were never routed to "
            f"during calibration (layers {where}): {consequence}",
            stacklevel=3,
        )
