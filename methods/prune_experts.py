"""Expert pruning: rank experts by a saliency criterion and drop the worst, with their router rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from harness.contracts.method import Decision, SearchReport
from harness.contracts.plan import CompressionPlan, prune
from harness.contracts.search import Kept, Overlap
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods import criteria, evoesap
from methods.budget import as_written, check_any_number, kept_experts, parse_ratio
from methods.checks import check_option, finite, statistic, warn_of_never_routed
from methods.novices import WEIGHTS, every_row_stays, leave_constants

SCOPES = ("layer", "global", "list", "evoesap")
# What an expert that goes leaves -> the weights of its tokens in that; nothing, or a constant.
CONSTANTS: dict[bool | str | None, str] = {None: "", False: "", True: "plain", "plain": "plain"}
CONSTANTS["gate_squared"] = "gate_squared"


@dataclass(frozen=True)
class ExpertPruning:
    """Keeps the experts of highest saliency (of ``criteria.LARGEST_GOES``, of the lowest score); the survivors' weights
    and router rows stay as they are.

    All layers are scored on the intact model. ``scope`` shares the budget out among the layers (``allocation=``):
    - ``layer``: E - floor(E * ratio) experts stay in every layer (the same number in each router group where
      the router is group-limited).
    - ``global``: the experts of all layers are ranked together and as many go in total, but at least top-k
      stay in each layer. Raw saliencies are compared across layers, so a layer whose outputs are larger keeps
      more experts.
    - ``list``: ``experts`` says how many stay in each MoE layer, the first one first; in all as many as with ``layer``.
    - ``evoesap``: such a list is searched on the model with the settings ``search`` (those of ``evoesap.Search``; null
      is its default). ``with_budget`` finds it, in steps that the router groups can share and ``even`` allows.
    Of equal saliencies the lower layer, then the lower expert index, is kept.

    With ``constants`` an expert that goes leaves its mean output over its routed tokens (true, ``plain``), or that
    weighted by their squared gate values (``gate_squared``): MoNE's constant. Every router row stays then, so top-k and
    router groups set no bound, but that a layer keeps one real expert; groups need not keep equally many.

    Raises WinnowError for an unknown option, a ratio or list that does not fit, statistics that are missing or not
    finite, for ``global`` with a group-limited router, and for ``evoesap`` with ``constants``, which it does not see.
    """

    name: str
    criterion: str
    scope: str = "layer"
    experts: Sequence[int] | None = None
    search: evoesap.Search | Mapping[str, Any] | None = None
    constants: bool | str | None = None

    def __post_init__(self) -> None:
        check_option(self.name, "constants", self.constants, CONSTANTS)
        check_option(self.name, "criterion", self.criterion, criteria.CRITERIA)
        check_option(self.name, "scope", self.scope, SCOPES)
        if (self.experts is None) == (self.scope == "list"):
            raise WinnowError(f"method '{self.name}': experts=[...] goes with scope=list, and scope=list with it")
        if any(type(number) is not int for number in self.experts or ()):
            raise WinnowError(f"method '{self.name}': experts={list(self.experts or ())} are not all whole numbers")
        if (self.search is None) == (self.scope == "evoesap"):
            raise WinnowError(f"method '{self.name}': scope=evoesap and its settings search go together")
        if isinstance(self.search, Mapping):
            object.__setattr__(self, "search", evoesap.search_from(self.search))
        if self.search is not None and self.constants:
            raise WinnowError(
                f"method '{self.name}': allocation=evoesap searches a budget for experts that are deleted; "
                "with constants use allocation=uniform, global or list"
            )

    @property
    def version(self) -> str:
        return "1" if self.search is None else f"1{evoesap.VERSION}"

    @property
    def requires(self) -> frozenset[str]:
        """What the criterion reads, and the frequency, by which never-routed experts are told."""
        read = criteria.FROM_STATISTICS[self.criterion].requires if self.criterion in criteria.FROM_STATISTICS else ()
        read += WEIGHTS[self.weights] if self.weights else ()
        return frozenset({*read, "frequency"} if read else ())

    @property
    def weights(self) -> str:
        """Of the tokens in the constants; empty where none are left."""
        return CONSTANTS[self.constants]

    @property
    def leaves(self) -> str | None:
        """The word for the constants, in descriptions of a cell."""
        return {"": None, "plain": "constants"}.get(self.weights, f"constants-{self.weights}")

    @property
    def uses_seed(self) -> bool:
        return self.criterion == "random" or self.scope == "evoesap"

    @property
    def mean_layer(self) -> "ExpertPruning":
        """The method for a layer that stands for all of them: a list, given or searched, leaves as many in the mean as
        ``layer`` does."""
        listed = self.scope in ("list", "evoesap")
        return replace(self, scope="layer", experts=None, search=None) if listed else self

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        exact, shape = parse_ratio(ratio), self._bounding(shape)
        count = kept_experts(shape, exact)
        if self.scope == "global":
            check_any_number("scope=global", "scope=layer", shape)
        if self.experts is not None:
            self._check_list(self.experts, shape, exact, count * shape.layers)
        if self.search is not None:
            self._bounds(shape, exact)
        return exact

    def _bounding(self, shape: MoeShape) -> MoeShape:
        """What bounds the number of experts that stay: where they leave constants, no router row goes."""
        return every_row_stays(shape) if self.weights else shape

    def _check_list(self, experts: Sequence[int], shape: MoeShape, ratio: Fraction, total: int) -> None:
        given = f"method '{self.name}': experts={list(experts)}"
        if len(experts) != shape.layers:
            raise WinnowError(f"{given} are {len(experts)} numbers, but the model has {shape.layers} MoE layers")
        fewest = max(shape.top_k, shape.fewest_rows)
        for number in experts:
            if not fewest <= number <= shape.num_experts or number % shape.n_group:
                groups = "" if shape.n_group == 1 else f", in multiples of the router's {shape.n_group} groups"
                raise WinnowError(
                    f"{given}: {number} is not possible; a layer keeps {fewest} to {shape.num_experts}{groups}"
                )
        if sum(experts) != total:
            raise WinnowError(
                f"{given} leave {sum(experts)} experts in all, but ratio {as_written(ratio)} leaves {total}: "
                "change the list, or the ratio"
            )

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        num_experts, shape = statistics.num_experts, self._bounding(statistics.shape)
        self.check(shape, ratio)
        if self.search is not None:
            raise WinnowError(f"method '{self.name}': allocation=evoesap is not for a stage of another method")
        count = kept_experts(shape, ratio)
        saliency, worth = self._ranked(statistics, seed)
        if self.requires:
            warn_of_never_routed(statistics, "saliencies over routed tokens are 0 for them, so they go first")
        if self.scope == "global":
            kept = keep_globally(worth, count * len(worth), shape.top_k)
        else:
            counts = self.experts or [count] * len(worth)
            kept = {
                layer: keep_in_layer(values, number, shape.n_group)
                for (layer, values), number in zip(worth.items(), counts, strict=True)
            }
        if self.weights:
            layers = leave_constants(statistics, kept, self.weights)
        else:
            layers = tuple(prune(layer, num_experts, kept[layer]) for layer in saliency)
        return Decision(
            CompressionPlan(layers),
            saliency=saliency,
            largest_goes=self.criterion in criteria.LARGEST_GOES,
        )

    def with_budget(
        self, statistics: Statistics, shape: MoeShape, ratio: Fraction, seed: int, overlap: Overlap
    ) -> tuple["ExpertPruning", SearchReport]:
        """The method with ``scope=list`` and the ``experts`` that EvoESAP finds, and what it found.

        ``shape`` bounds the budgets, ``overlap`` is the fitness. Raises WinnowError as ``check`` and ``decide`` do.
        """
        assert isinstance(self.search, evoesap.Search)
        step, total, room = self._bounds(shape, ratio)
        _, worth = self._ranked(statistics, seed)

        def counts(plan: evoesap.Numbers) -> list[int]:
            return [shape.num_experts - step * removed for removed in plan]

        def kept(plan: evoesap.Numbers) -> Kept:
            numbers = zip(worth.items(), counts(plan), strict=True)
            return {layer: keep_in_layer(values, number, shape.n_group) for (layer, values), number in numbers}

        found = evoesap.evolve(lambda plans: overlap([*map(kept, plans)]), len(worth), total, room, self.search, seed)
        uniform = (total // len(worth),) * len(worth)
        best = counts(found.best)
        report = SearchReport(
            dict(zip(worth, best, strict=True)), len(found.worth), found.worth[found.best], found.worth[uniform]
        )
        return replace(self, scope="list", experts=best, search=None), report

    def _bounds(self, shape: MoeShape, ratio: Fraction) -> tuple[int, int, int]:
        """A layer gives up a multiple of ``step`` experts, at most ``room`` times, and all of them ``total`` times.

        Raises WinnowError where that leaves but one budget.
        """
        assert isinstance(self.search, evoesap.Search)
        count = kept_experts(shape, ratio)
        step = math.lcm(shape.n_group, 2 if self.search.even else 1)
        removed = shape.num_experts - count
        room = (shape.num_experts - max(shape.top_k, shape.fewest_rows)) // step
        refused = f"method '{self.name}', allocation=evoesap:"
        if self.search.even and (shape.num_experts % step or count % step):
            raise WinnowError(
                f"{refused} search.even=true cannot keep {count} of {shape.num_experts} experts a layer, which are no "
                f"multiples of {step}; take another ratio, or search.even=false"
            )
        if shape.layers == 1:
            raise WinnowError(f"{refused} one MoE layer leaves nothing to search for; use allocation=uniform")
        if not 0 < removed < step * room:
            raise WinnowError(
                f"{refused} ratio {as_written(ratio)} removes {removed} of {shape.num_experts} experts a layer, of "
                f"which at most {step * room} can go: there is but one budget; use allocation=uniform"
            )
        return step, removed // step * shape.layers, room

    def _ranked(self, statistics: Statistics, seed: int) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Layer -> saliency as it is published, and so that the expert of the lowest goes first."""
        saliency = {layer: self._saliency(statistics, layer, seed) for layer in sorted(statistics.layers)}
        if self.criterion not in criteria.LARGEST_GOES:
            return saliency, saliency
        return saliency, {layer: -values for layer, values in saliency.items()}

    def _saliency(self, statistics: Statistics, layer: int, seed: int) -> np.ndarray:
        num_experts = statistics.num_experts
        if self.criterion == "random":
            if seed < 0:
                raise WinnowError(f"seed {seed} is negative: random pruning needs a seed of at least 0")
            values = criteria.random(num_experts, layer, seed)
        elif self.criterion == "router_norm":
            values = criteria.router_norm(statistics.router_rows(layer))
        elif self.criterion in criteria.FROM_WEIGHTS:
            experts = (statistics.expert_weights(layer, j) for j in range(num_experts))
            values = criteria.FROM_WEIGHTS[self.criterion](experts)
        else:
            criterion = criteria.FROM_STATISTICS[self.criterion]
            values = criterion.function(*(statistic(statistics, layer, name) for name in criterion.requires))
        return finite(values, f"saliency '{self.criterion}'", layer, num_experts)


def keep_in_layer(saliency: np.ndarray, count: int, n_group: int = 1) -> list[int]:
    """Indices of the ``count`` highest saliencies (E,), equally many in each of ``n_group`` equal blocks."""
    size = len(saliency) // n_group
    kept: list[int] = []
    for start in range(0, len(saliency), size):
        # A stable sort of the negated values puts the lower index first among equals.
        best = np.argsort(-saliency[start : start + size], kind="stable")[: count // n_group]
        kept += [start + int(j) for j in best]
    return sorted(kept)


def keep_globally(saliency: Mapping[int, np.ndarray], total: int, at_least: int) -> dict[int, list[int]]:
    """Layer -> kept indices: the best ``at_least`` of every layer, then the best of all up to ``total``."""
    kept = {layer: keep_in_layer(values, at_least) for layer, values in saliency.items()}
    others = sorted(
        (-float(value), layer, expert)
        for layer, values in saliency.items()
        for expert, value in enumerate(values)
        if expert not in kept[layer]
    )
    for _, layer, expert in others[: total - at_least * len(saliency)]:
        kept[layer].append(expert)
    return {layer: sorted(experts) for layer, experts in kept.items()}
