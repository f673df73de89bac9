"""MoNE: experts whose outputs vary little, or that are little used, become constants."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from harness.contracts.method import Decision
from harness.contracts.plan import CompressionPlan
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from methods.budget import parse_ratio
from methods.checks import check_option, finite, statistic, warn_of_never_routed
from methods.novices import WEIGHTS, leave_constants, real_experts
from methods.prune_experts import keep_globally, keep_in_layer

SCOPES = ("layer", "global")


def variance(total: np.ndarray, squares: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(E, C): with n - 1, of ``count`` (E,) numbers with these sums (E, C) and sums of squares; 0 where n < 2."""
    n = count[:, None]
    middle = np.divide(total, n, out=np.zeros_like(total), where=n > 0)
    around = np.maximum(squares - n * middle**2, 0.0)
    return np.divide(around, n - 1, out=np.zeros_like(around), where=n > 1)


def routing_score(statistics: Statistics, layer: int) -> np.ndarray:
    return statistic(statistics, layer, "gate_sum") / statistics.tokens


def fusion(statistics: Statistics, layer: int) -> np.ndarray:
    deviation = np.sqrt(_variance(statistics, layer, "output_sum", "output_square_sum"))
    return np.linalg.norm(deviation, axis=1) * routing_score(statistics, layer)


def output_fluctuation(statistics: Statistics, layer: int) -> np.ndarray:
    return np.linalg.norm(_variance(statistics, layer, "output_sum", "output_square_sum"), axis=1)


def io_fluctuation(statistics: Statistics, layer: int) -> np.ndarray:
    squares = statistic(statistics, layer, "difference_square_sum")
    n = statistic(statistics, layer, "frequency")[:, None]
    return np.linalg.norm(np.divide(squares, n, out=np.zeros_like(squares), where=n > 0), axis=1)


def token_fluctuation(statistics: Statistics, layer: int) -> np.ndarray:
    return np.linalg.norm(_variance(statistics, layer, "input_sum", "input_square_sum"), axis=1)


def intermediate_fluctuation(statistics: Statistics, layer: int) -> np.ndarray:
    squares, total = (statistic(statistics, layer, name) for name in ("channel_square_sum", "channel_sum"))
    inside = variance(total, squares[:, 2], statistic(statistics, layer, "frequency"))
    columns = [
        np.square(statistics.expert_weights(layer, j).down, dtype=np.float64).sum(axis=0) for j in range(len(inside))
    ]
    return np.linalg.norm(inside * np.array(columns), axis=1)


def _variance(statistics: Statistics, layer: int, total: str, squares: str) -> np.ndarray:
    named = (statistic(statistics, layer, name) for name in (total, squares, "frequency"))
    return variance(*named)


# Score -> its function of a layer, and the statistics that it reads beside the frequency.
SCORES: dict[str, tuple[Callable[[Statistics, int], np.ndarray], tuple[str, ...]]] = {
    "fusion": (fusion, ("output_sum", "output_square_sum", "gate_sum")),
    "output_fluctuation": (output_fluctuation, ("output_sum", "output_square_sum")),
    "routing_score": (routing_score, ("gate_sum",)),
    "io_fluctuation": (io_fluctuation, ("difference_square_sum",)),
    "token_fluctuation": (token_fluctuation, ("input_sum", "input_square_sum")),
    "intermediate_fluctuation": (intermediate_fluctuation, ("channel_sum", "channel_square_sum")),
}


@dataclass(frozen=True)
class MoNE:
    """The experts of the lowest ``score`` are replaced by constants ("novices"): E - floor(E * ratio) real ones stay.

    Over the n routed tokens of an expert, x their inputs, f its outputs, h its channels, s the deviation of each hidden
    unit of f, r the gate values' sum / all tokens:
    - ``fusion``: ||s|| r (the paper's); ``output_fluctuation``: ||s squared||, the norm of variances;
      ``routing_score``: r; ``io_fluctuation``: norm of the mean of (x - f) squared; ``token_fluctuation``: norm of the
      variance of x; ``intermediate_fluctuation``: norm of var(h_i) ||column i of the down projection|| squared.
    ``scope``: as many in every ``layer``, or the scores of all layers ranked together (``global``; in all as many, and
    one real expert at least in each: every router row stays, so top-k and router groups set no bound). ``weights`` of
    the tokens in the constant: ``plain``, or ``gate_squared``. Of equals the lower layer, then the lower index, stays.
    An expert that no token was routed to has score 0 and leaves zeros.

    MoNE, read as its paper has it; the released code (mode-pd) differs: its deviation is a running value that hangs on
    the order of batches, and is too low; it takes softmax values for gates, and pads for tokens; ``fusion`` is
    multiplied by 1/4; ``routing_score`` leaves zeros for constants; ``global`` may leave a layer without a real expert;
    ties at the cut lose experts; constants are rounded to bfloat16.

    Raises WinnowError for an unknown option, a ratio that does not fit, and for statistics that are missing or not
    finite.
    """

    version: ClassVar[str] = "1"

    name: str
    score: str = "fusion"
    scope: str = "layer"
    weights: str = "plain"

    def __post_init__(self) -> None:
        check_option(self.name, "score", self.score, SCORES)
        check_option(self.name, "scope", self.scope, SCOPES)
        check_option(self.name, "weights", self.weights, WEIGHTS)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({*SCORES[self.score][1], *WEIGHTS[self.weights], "frequency"})

    @property
    def uses_seed(self) -> bool:
        return False

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        real_experts(shape, ratio)
        return parse_ratio(ratio)

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        count = real_experts(statistics.shape, ratio)
        warn_of_never_routed(statistics, "their scores are 0, and they leave zeros")
        scores = {
            layer: finite(
                SCORES[self.score][0](statistics, layer), f"score '{self.score}'", layer, statistics.num_experts
            )
            for layer in sorted(statistics.layers)
        }
        if self.scope == "global":
            kept = keep_globally(scores, count * len(scores), 1)
        else:
            kept = {layer: keep_in_layer(values, count) for layer, values in scores.items()}
        return Decision(CompressionPlan(leave_constants(statistics, kept, self.weights)), saliency=scores)
