"""Coverage pruning: every expert keeps as many channels as it takes to cover its share of the layer's activations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan, LayerPlan, prune
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.budget import as_decimal, as_written, check_any_number, parse_ratio
from methods.checks import check_option, finite, statistic, warn_of_never_routed
from methods.coverage_budget import adjusted_widths, entry_levels, first_to_enter, nearest_multiple, smoothed_loss

# channel_score -> the statistics that it reads
CHANNEL_SCORES: dict[str, frozenset[str]] = {
    "activation": frozenset({"channel_square_sum"}),
    "weight_activation": frozenset({"channel_square_sum", "input_square_sum"}),
    "gradient_free_saliency": frozenset({"channel_saliency_sum"}),
    "magnitude": frozenset(),
    "random": frozenset(),
}
EXPERT_WEIGHTS = ("attribution", "frequency", "uniform")
LAYER_BUDGETS = ("coverage", "uniform")
VARIANTS = ("exact", "released")
LAYOUTS = ("ragged", "uniform")


@dataclass(frozen=True)
class Coverage:
    """Removes channels inside experts, and experts that keep none (attribution-guided, coverage-maximised pruning).

    Of the C channels of all experts, C - floor(C * ratio) stay. A layer gets the smallest number of its channels whose
    scores reach its smoothed relative block loss times a common level; in it, an expert gets the smallest number of its
    own that reach the root of its attribution times a common level (with exact
    totals). Experts of fewer than ``min_channels`` are removed and widths rounded to ``align``, which keeps
    the total but for rounding to the nearest multiple of ``align``. At least top-k experts stay in each layer. Of equal
    scores the lower layer, expert and channel is kept. Options:
    - ``channel_score``: ``activation`` is the mean of three root sums of squares over routed tokens: gate output, up
      output, input of the down projection. ``weight_activation`` is the mean of |W| times the norm of what it
      multiplies over the three matrices. ``gradient_free_saliency`` is the sum over tokens of |activation * gradient|
      at the input of the down projection, in closed form (the released ``saliency`` has this as the mean of three
      places: the up output's is the same, the gate output's needs the activation's derivative and is left out).
      ``magnitude`` (sum of |W|) and ``random`` are ablations.
    - ``expert_weight``: ``attribution``, ``frequency`` (routed tokens) or ``uniform``.
    - ``layer_budget``: ``coverage``, or ``uniform``: the same share of every layer's channels.
    - ``layout``: ``ragged``, or ``uniform``: all experts of a layer (with layer_budget=uniform: of the model) have one
      width, the smallest that removes no more than the ratio; none is removed and ``expert_weight`` does not count.
    - ``variant``: ``exact`` takes plain sums over all tokens; ``released`` the released code's moving average and clip,
      a document standing for its batch (with channel_score=activation only).

    An expert that was never routed to has attribution and activations 0: ragged, it goes first; uniform, it keeps its
    first channels. Raises WinnowError for options and ratios that cannot be fulfilled, statistics or weights that are
    missing or not finite, and, with layout=ragged, for a router that cannot run with every number of experts from top-k
    on (a group-limited one) and for experts that share a tensor (gpt-oss, Granite), and so a width.
    """

    version: ClassVar[str] = "1"

    name: str
    channel_score: str = "activation"
    expert_weight: str = "attribution"
    layer_budget: str = "coverage"
    layout: str = "ragged"
    variant: str = "exact"
    min_channels: int = 4
    align: int = 1

    def __post_init__(self) -> None:
        check_option(self.name, "channel_score", self.channel_score, CHANNEL_SCORES)
        check_option(self.name, "expert_weight", self.expert_weight, EXPERT_WEIGHTS)
        check_option(self.name, "layer_budget", self.layer_budget, LAYER_BUDGETS)
        check_option(self.name, "layout", self.layout, LAYOUTS)
        check_option(self.name, "variant", self.variant, VARIANTS)
        for option in ("min_channels", "align"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise WinnowError(f"method '{self.name}': {option} must be a whole number of at least 1, not {value}")
        if self.variant == "released" and self.channel_score != "activation":
            raise WinnowError(f"method '{self.name}': variant=released has channel_score=activation only")

    @property
    def requires(self) -> frozenset[str]:
        released = self.variant == "released"
        names = set(CHANNEL_SCORES[self.channel_score] if not released else {"released_activation"})
        if self.layout == "ragged" and self.expert_weight == "attribution":
            names.add("released_attribution" if released else "attribution_sum")
        if self.layout == "ragged" and self.expert_weight == "frequency":
            names.add("frequency")
        if self.layer_budget == "coverage":
            names.add("attribution_sum")
        return frozenset(names | {"frequency"} if names else names)

    @property
    def uses_seed(self) -> bool:
        return self.channel_score == "random"

    @property
    def smallest(self) -> int:
        """The fewest channels of an expert that stays: ``min_channels``, rounded up to a multiple of ``align``."""
        return -(-self.min_channels // self.align) * self.align

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        """Where the width is not known, ``decide`` finds too high a ratio."""
        exact = parse_ratio(ratio)
        if self.layout == "ragged" and exact > 0:
            ragged = f"method '{self.name}': layout=ragged"
            check_any_number(ragged, "layout=uniform", shape)
            if shape.one_width:
                raise WinnowError(
                    f"{ragged} does not fit this architecture: the experts of a layer share a tensor, in which padding "
                    "would take the room of what is removed; use layout=uniform"
                )
        if shape.width is not None:
            self._kept_channels([shape.num_experts] * shape.layers, shape.width, shape.top_k, exact)
        return exact

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        self.check(statistics.shape, ratio)
        layers = sorted(statistics.layers)
        if self.requires:
            ragged = "they are removed first" if self.layout == "ragged" else "their first channels are kept"
            warn_of_never_routed(statistics, f"their channels have no score, so {ragged}")
        scores = {layer: self._scores(statistics, layer, seed) for layer in layers}
        widths_before = {values.shape[1] for values in scores.values()}
        if len(widths_before) > 1:
            raise WinnowError(f"method '{self.name}': experts of {sorted(widths_before)} channels: one width is needed")
        experts = [len(values) for values in scores.values()]
        total = self._kept_channels(experts, widths_before.pop(), statistics.top_k, ratio)
        levels = self._layer_levels(statistics, scores)
        if self.layout == "uniform":
            importance = {layer: values.sum(axis=1) for layer, values in scores.items()}
            widths = self._uniform_widths(scores, levels, total)
        else:
            importance = {layer: self._importance(statistics, layer) for layer in layers}
            widths = self._ragged_widths(scores, importance, levels, total, statistics.top_k)
        plan = CompressionPlan(tuple(keep_best(layer, scores[layer], widths[layer]) for layer in layers))
        return Decision(plan, saliency=importance)

    # -- scores ----------------------------------------------------------------------------------------------

    def _scores(self, statistics: Statistics, layer: int, seed: int) -> np.ndarray:
        """(E, I) >= 0: what each channel is worth within its expert and layer."""
        experts = range(statistics.experts_in(layer))
        if self.variant == "released":
            values = statistic(statistics, layer, "released_activation")
        elif self.channel_score == "activation":
            values = np.sqrt(statistic(statistics, layer, "channel_square_sum")).mean(axis=1)
        elif self.channel_score == "gradient_free_saliency":
            values = statistic(statistics, layer, "channel_saliency_sum")
        elif self.channel_score == "weight_activation":
            inputs = np.sqrt(statistic(statistics, layer, "input_square_sum"))
            activations = np.sqrt(statistic(statistics, layer, "channel_square_sum"))[:, 2]
            values = np.stack([_weight_activation(statistics, layer, e, inputs[e], activations[e]) for e in experts])
        elif self.channel_score == "magnitude":
            values = np.stack([_magnitude(statistics, layer, e) for e in experts])
        else:
            if seed < 0:
                raise WinnowError(f"seed {seed} is negative: random channels need a seed of at least 0")
            width = len(statistics.expert_weights(layer, 0).gate)
            values = np.random.default_rng([seed, layer]).random((len(experts), width))
        return finite(values, f"channel score '{self.channel_score}'", layer, len(experts))

    def _importance(self, statistics: Statistics, layer: int) -> np.ndarray:
        """(E,) >= 0: the root of it weighs an expert; negative attributions (the block gains without it) count 0."""
        if self.expert_weight == "uniform":
            return np.ones(statistics.experts_in(layer))
        if self.expert_weight == "frequency":
            return statistic(statistics, layer, "frequency")
        name = "released_attribution" if self.variant == "released" else "attribution_sum"
        return np.maximum(statistic(statistics, layer, name), 0.0)

    # -- budgets ---------------------------------------------------------------------------------------------

    def _kept_channels(self, experts: Sequence[int], width: int, top_k: int, ratio: Fraction) -> int:
        """C - floor(C * ratio), of ``experts[i]`` experts of ``width`` channels in layer i.

        Raises WinnowError where widths cannot be what the options ask for.
        """
        fitting = [n for n in range(1, width + 1) if width % n == 0]
        if self.align not in fitting:
            raise WinnowError(
                f"method '{self.name}': align={self.align} does not divide the {width} channels of an expert; "
                f"these do: {', '.join(map(str, fitting))}"
            )
        if self.smallest > width:
            raise WinnowError(
                f"method '{self.name}': min_channels={self.min_channels} is more than the {width} channels of an expert"
            )
        channels = sum(experts) * width
        kept = channels - math.floor(channels * ratio)
        leaves = f"method '{self.name}': ratio {as_written(ratio)} leaves {kept} of {channels} channels"
        ragged = self.layout == "ragged"
        needed = (top_k * len(experts) if ragged else sum(experts)) * self.smallest
        if kept < needed:
            who = f"top-k = {top_k} experts in every layer" if ragged else "every expert"
            raise WinnowError(
                f"{leaves}, too few for {self.smallest} in {who}; the largest ratio that works is "
                f"{as_decimal(channels - needed, channels)}"
            )
        together = nearest_multiple(kept, self.align)
        holders = -(-together // width)  # the fewest experts that hold so many
        if ragged and holders * self.smallest > together:
            ratios = (as_decimal(channels - n, channels) for n in (holders * self.smallest, (holders - 1) * width))
            raise WinnowError(
                f"{leaves}, which experts of {self.smallest} to {width} cannot share; the nearest ratios that work: "
                f"{' and '.join(ratios)}"
            )
        return kept

    def _layer_levels(self, statistics: Statistics, scores: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Of every layer, the levels at which its channels, all experts together, enter the budget."""
        if self.layer_budget == "uniform":
            return [np.arange(values.size) / values.size for values in scores.values()]
        losses = np.array([max(statistic(statistics, layer, "attribution_sum").sum(), 0.0) for layer in scores])
        if not losses.any():
            raise WinnowError(
                "statistic 'attribution_sum' is 0 in every layer: the experts add nothing to their blocks"
            )
        weights = smoothed_loss(losses)
        return [
            entry_levels(values.ravel(), float(weight)) for values, weight in zip(scores.values(), weights, strict=True)
        ]

    def _ragged_widths(
        self,
        scores: dict[int, np.ndarray],
        importance: dict[int, np.ndarray],
        levels: list[np.ndarray],
        total: int,
        top_k: int,
    ) -> dict[int, list[int]]:
        budgets = first_to_enter(levels, total, reserved=top_k * self.smallest)
        widths = [
            coverage_widths(scores[layer], importance[layer], budget)
            for layer, budget in zip(scores, budgets, strict=True)
        ]
        best = [np.argsort(-values, kind="stable").tolist() for values in importance.values()]
        capacity = next(iter(scores.values())).shape[1]
        adjusted = adjusted_widths(widths, capacity, self.align, self.smallest, top_k, best)
        return dict(zip(scores, adjusted, strict=True))

    def _uniform_widths(
        self, scores: dict[int, np.ndarray], levels: list[np.ndarray], total: int
    ) -> dict[int, list[int]]:
        """One width in a layer: blocks of ``align`` channels of all its experts enter where their middle does."""
        experts = [len(values) for values in scores.values()]
        if self.layer_budget == "uniform":
            widths = [-(-total // (sum(experts) * self.align))] * len(experts)
        else:
            sizes = [count * self.align for count in experts]
            blocks = [values[size // 2 :: size] for values, size in zip(levels, sizes, strict=True)]
            reserved = self.smallest // self.align
            taken = max(reserved * len(sizes), total // max(sizes))
            widths = first_to_enter(blocks, taken, reserved=reserved)
            while sum(size * width for size, width in zip(sizes, widths, strict=True)) < total:
                taken += 1
                widths = first_to_enter(blocks, taken, reserved=reserved)
        together = zip(scores, widths, experts, strict=True)
        return {layer: [width * self.align] * count for layer, width, count in together}


def coverage_widths(scores: np.ndarray, importance: np.ndarray, budget: int) -> list[int]:
    """Channels of each expert, ``budget`` together, by coverage within the layer.

    ``scores`` (E, I) and ``importance`` (E,) >= 0. Of channels that enter at the same level the one of the highest
    score times importance goes first.
    """
    weights = np.sqrt(importance)
    levels = [entry_levels(own, float(weight)) for own, weight in zip(scores, weights, strict=True)]
    ranked = -np.sort(-scores * importance[:, None], axis=1)
    return first_to_enter(levels, budget, list(ranked))


def keep_best(layer: int, scores: np.ndarray, widths: list[int]) -> LayerPlan:
    """Every expert keeps its ``widths[e]`` channels of the highest ``scores`` (E, I), and goes where that is none."""
    plan = prune(layer, len(scores), [expert for expert, width in enumerate(widths) if width])

    def kept(expert: int) -> tuple[int, ...] | None:
        if widths[expert] == scores.shape[1]:
            return None
        best = np.argsort(-scores[expert], kind="stable")[: widths[expert]]
        return tuple(sorted(best.tolist()))

    return replace(plan, experts=tuple(replace(new, channels=kept(new.sources[0].expert)) for new in plan.experts))


def _weight_activation(
    statistics: Statistics, layer: int, expert: int, inputs: np.ndarray, activations: np.ndarray
) -> np.ndarray:
    """(I,): of the root sums of squares ``inputs`` (H,) and ``activations`` (I,)."""
    weights = statistics.expert_weights(layer, expert)
    gate, up, down = (np.abs(matrix.astype(np.float64)) for matrix in (weights.gate, weights.up, weights.down))
    return (gate @ inputs + up @ inputs + down.sum(axis=0) * activations) / 3


def _magnitude(statistics: Statistics, layer: int, expert: int) -> np.ndarray:
    weights = statistics.expert_weights(layer, expert)
    gate, up, down = (np.abs(matrix.astype(np.float64)) for matrix in (weights.gate, weights.up, weights.down))
    return gate.sum(axis=1) + up.sum(axis=1) + down.sum(axis=0)
