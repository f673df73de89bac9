"""Two methods one after the other: prune experts first, then channels of those that are left."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from harness.contracts.composition import compose
from harness.contracts.layerwise import layerwise
from harness.contracts.method import Decision, Method
from harness.contracts.plan import CompressionPlan
from harness.contracts.search import searching
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics, restricted
from harness.errors import WinnowError
from methods.budget import parse_ratio


@dataclass(frozen=True)
class Chain:
    """``first`` removes ``split`` of what the ratio removes (whole experts, rounded down), ``second`` the rest.

    Both see the statistics of the intact model, ``second`` only those of the experts that are left, and together they
    keep the same total as ``second`` alone would. The saliency of the decision is that of ``first``. Raises WinnowError
    where a stage does, where ``first`` merges experts (what a merged expert computes was not measured) or removes
    channels, and for a ``split`` outside [0, 1].
    """

    name: str
    first: Method
    second: Method
    split: str | float | Fraction = 0.5

    def __post_init__(self) -> None:
        self._share()
        if searching(self.first) or searching(self.second):
            raise WinnowError(f"method '{self.name}': allocation=evoesap is not for a stage of another method")
        if any(getattr(stage, "weights", "") for stage in (self.first, self.second)):
            raise WinnowError(f"method '{self.name}': a stage of it cannot leave constants for experts")
        if layerwise(self.first) or layerwise(self.second):
            raise WinnowError(f"method '{self.name}': a stage of it cannot decide layer by layer, as ream does")

    def _share(self) -> Fraction:
        try:
            share = Fraction(str(self.split))
        except (ValueError, ZeroDivisionError):
            raise WinnowError(f"method '{self.name}': split '{self.split}' is not a number, such as 0.5") from None
        if not 0 <= share <= 1:
            raise WinnowError(f"method '{self.name}': split {self.split} is outside [0, 1]")
        return share

    @property
    def version(self) -> str:
        return f"1 ({self.first.name} {self.first.version}, {self.second.name} {self.second.version})"

    @property
    def requires(self) -> frozenset[str]:
        return self.first.requires | self.second.requires

    @property
    def uses_seed(self) -> bool:
        return self.first.uses_seed or self.second.uses_seed

    @property
    def mean_layer(self) -> "Chain":
        """The method for a layer that stands for all of them."""
        return replace(self, first=getattr(self.first, "mean_layer", self.first))

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        exact = parse_ratio(ratio)
        self.first.check(shape, exact * self._share())
        left = shape.num_experts - math.floor(shape.num_experts * exact * self._share())
        try:
            self.second.check(replace(shape, num_experts=left), _rest(exact, Fraction(left, shape.num_experts)))
        except WinnowError as error:
            raise self._of_second_stage(error) from error
        return exact

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        first = self.first.decide(statistics, ratio * self._share(), seed)
        kept = self._survivors(first.plan)
        left = Fraction(sum(map(len, kept.values())), statistics.num_experts * len(kept))
        try:
            second = self.second.decide(restricted(statistics, kept), _rest(ratio, left), seed)
        except WinnowError as error:
            raise self._of_second_stage(error) from error
        return replace(first, plan=compose(first.plan, second.plan))

    def _of_second_stage(self, error: WinnowError) -> WinnowError:
        return WinnowError(f"method '{self.name}', after its first stage '{self.first.name}': {error}")

    def _survivors(self, plan: CompressionPlan) -> dict[int, list[int]]:
        experts = [new for layer in plan.layers for new in layer.experts]
        if any(len(new.sources) > 1 or new.channels is not None for new in experts):
            raise WinnowError(
                f"method '{self.name}': its first stage '{self.first.name}' merges experts or removes channels; "
                "only a method that prunes experts can come first"
            )
        return {layer.layer: [new.sources[0].expert for new in layer.experts] for layer in plan.layers}


def _rest(ratio: Fraction, left: Fraction) -> Fraction:
    """The ratio by which to compress the share ``left`` of the experts, so that ``ratio`` of all goes."""
    return 1 - (1 - ratio) / left
