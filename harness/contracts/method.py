"""What a method is, and what it returns."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from harness.contracts.plan import CompressionPlan
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics


@dataclass(frozen=True)
class SearchReport:
    """How many experts each layer keeps by a search (``counts``), which looked at so many budgets (``evaluations``).

    ``fitness`` is the overlap (``harness.contracts.search``) of what was found, ``uniform`` that of as many experts in
    every layer.
    """

    counts: dict[int, int]
    evaluations: int
    fitness: float
    uniform: float

    def to_json(self) -> dict[str, Any]:
        counts = {str(layer): count for layer, count in self.counts.items()}
        found = {"evaluations": self.evaluations, "fitness": self.fitness, "uniform": self.uniform}
        return {"counts": counts, **found}


@dataclass(frozen=True)
class Decision:
    """A plan and why: ``saliency`` (layer -> (E,), pruning), ``groups`` (layer -> E labels, merging), or both.

    The expert of the lowest saliency goes first, or with ``largest_goes`` that of the largest. The label of an old
    expert is the index of its new expert in the plan. ``search`` is there where the budget was searched, ``all_tokens``
    where every expert was run on so many tokens, routed or not, ``unexplained`` (layer -> old expert -> share of its
    output's variance) where fitted maps stand for experts.
    """

    plan: CompressionPlan
    saliency: dict[int, np.ndarray] | None = None
    groups: dict[int, list[int]] | None = None
    largest_goes: bool = False
    search: SearchReport | None = None
    unexplained: dict[int, dict[int, float]] | None = None
    all_tokens: int | None = None


class Method(Protocol):
    """A pure function from statistics and a compression ratio to a plan.

    ``requires`` names the statistics (of ``harness.contracts.statistics.STATISTICS``) that the calibration pass must
    collect. Expert weights are not named there: ``Statistics.expert_weights`` reads them when asked. ``uses_seed``
    tells whether the seed changes the plan. ``version`` is raised by whoever changes what the method decides: it is
    part of a cell's id, so that old and new plans are not taken for one another (of a method made of others it names
    theirs too). ``check`` returns the ratio as it is written, exact; it raises WinnowError where the ratio or an option
    does not fit the model, before anything is computed.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def requires(self) -> frozenset[str]: ...

    @property
    def uses_seed(self) -> bool: ...

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction: ...

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision: ...


class Schedule(Protocol):
    """In how many rounds a method decides, each on the statistics of what the rounds before have left."""

    @property
    def name(self) -> str: ...

    @property
    def rounds(self) -> int: ...

    def check(self, method: Method, shape: MoeShape, ratio: Fraction) -> None:
        """Raises WinnowError where the method cannot be repeated so. ``ratio`` is one that the method has accepted."""
        ...

    def ratios(self, shape: MoeShape, ratio: Fraction) -> list[Fraction]:
        """Of each round, the share that it removes of the experts that are then left; in all ``ratio`` goes."""
        ...

    def joined(self, before: Decision | None, after: Decision) -> Decision:
        """The decision of all rounds so far, about the original model; ``after`` is about what ``before`` left."""
        ...
