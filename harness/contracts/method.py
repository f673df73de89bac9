"""What a method is and what it returns, and the checks that all methods make on their statistics."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from harness.contracts.plan import CompressionPlan
from harness.contracts.statistics import MoeShape, Statistics


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
