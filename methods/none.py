"""No compression: the baseline."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, identity
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.budget import as_written, parse_ratio


@dataclass(frozen=True)
class NoCompression:
    """The baseline: the identity plan, every expert kept. Raises WinnowError for a ratio other than 0."""

    version: ClassVar[str] = "1"

    name: str = "none"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset()

    @property
    def uses_seed(self) -> bool:
        return False

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        exact = parse_ratio(ratio)
        if exact != 0:
            raise WinnowError(f"method '{self.name}' removes nothing: use ratio=0 (it was {as_written(exact)})")
        return exact

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        self.check(statistics.shape, ratio)
        layers = sorted(statistics.layers)
        return Decision(CompressionPlan(tuple(identity(layer, statistics.num_experts) for layer in layers)))
