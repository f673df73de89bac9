"""In how many rounds a method prunes: one, or several with a calibration pass over what is left before each."""

import math
from dataclasses import dataclass
from fractions import Fraction

from harness.contracts.composition import compose
from harness.contracts.method import Decision, Method
from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from methods.budget import as_written
from methods.naee import NAEE
from methods.prune_experts import ExpertPruning


@dataclass(frozen=True)
class Schedule:
    """``rounds`` rounds, each of which removes the same share of what goes in all, rounded down.

    Every round sees the statistics of the model that the rounds before have left. Only methods that remove whole
    experts, equally many in every layer, can be repeated: what is left is then an ordinary, smaller model. Raises
    WinnowError for a number of rounds that is no whole number of at least 1.
    """

    name: str
    rounds: int = 1

    def __post_init__(self) -> None:
        if type(self.rounds) is not int or self.rounds < 1:
            raise WinnowError(f"schedule.rounds must be a whole number of at least 1, not {self.rounds}")

    def check(self, method: Method, shape: MoeShape, ratio: Fraction) -> None:
        """Raises WinnowError where more than one round of ``method`` is impossible or would change nothing.

        ``ratio`` is one that ``method.check`` has accepted.
        """
        if self.rounds == 1:
            return
        if not isinstance(method, ExpertPruning | NAEE):
            raise WinnowError(
                f"schedule={self.name} repeats methods that remove whole experts, such as method=reap; "
                f"method '{method.name}' needs schedule=one_shot"
            )
        if isinstance(method, ExpertPruning) and method.weights:
            raise WinnowError(
                f"schedule={self.name} calibrates what the rounds before have left, and constants are no experts: use "
                "method.constants=false"
            )
        if isinstance(method, ExpertPruning) and method.scope != "layer":
            raise WinnowError(
                f"schedule={self.name} needs as many experts in every layer: use method.scope=layer, not {method.scope}"
            )
        if not method.requires:
            raise WinnowError(
                f"method '{method.name}' reads no statistics, so that a calibration pass before each round changes "
                "nothing: use schedule=one_shot"
            )
        num_experts, n_group = shape.num_experts, shape.n_group
        steps = math.floor(num_experts * ratio) // n_group
        if self.rounds > steps:
            at_once = "one expert" if n_group == 1 else f"one expert of each of {n_group} router groups"
            raise WinnowError(
                f"schedule.rounds={self.rounds} is too many: ratio {as_written(ratio)} removes {steps * n_group} of "
                f"{num_experts} experts, and a round at least {at_once}, so use schedule.rounds={max(steps, 1)} or less"
            )

    def ratios(self, shape: MoeShape, ratio: Fraction) -> list[Fraction]:
        """Of each round, the share that it removes of the experts that are then left; in all ``ratio`` goes.

        Each leaves a number of experts that the router's groups can share evenly.
        """
        if self.rounds == 1:
            return [ratio]
        num_experts, n_group = shape.num_experts, shape.n_group
        steps = math.floor(num_experts * ratio) // n_group
        left = [num_experts - n_group * (steps * number // self.rounds) for number in range(self.rounds + 1)]
        return [1 - Fraction(after, before) for before, after in zip(left, left[1:], strict=False)]

    @staticmethod
    def joined(before: Decision | None, after: Decision) -> Decision:
        """The decision of all rounds so far, about the original model; ``after`` is about what ``before`` left.

        The saliency of an expert is that of the last round in which it was still there.
        """
        if before is None or before.saliency is None or after.saliency is None:
            return after
        saliency = {}
        for layer in before.plan.layers:
            values = before.saliency[layer.layer].copy()
            values[[new.sources[0].expert for new in layer.experts]] = after.saliency[layer.layer]
            saliency[layer.layer] = values
        return Decision(compose(before.plan, after.plan), saliency=saliency, largest_goes=after.largest_goes)
