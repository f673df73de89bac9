"""Tilted novices: what is pruned leaves an affine map of the layer's input, of low rank; rank 0 is MoNE's constant."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
from scipy.linalg import LinAlgError, cholesky, eigh, qr, solve_triangular, svd  # type: ignore[import-untyped]

from harness.contracts.method import Decision
from harness.contracts.plan import Array, CompressionPlan, LayerPlan, LowRank, NewExpert
from harness.contracts.second_pass import Look, Moments, Seen
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from methods.checks import check_option, statistic
from methods.mone import MoNE

BASES = ("layer", "exact")
TOKENS = {"ones": "plain", "gate_squared": "gate_squared"}
OF_BASIS = 8  # columns of the layer's basis for each rank


@dataclass(frozen=True)
class Map:
    """f(x) is about ``left`` (H, r) ``right`` (r, H) x + ``shift`` (H,), but for ``unexplained`` of its variance."""

    left: np.ndarray
    right: np.ndarray
    shift: np.ndarray
    unexplained: float


@dataclass(frozen=True)
class Centred:
    """Of one expert's routed tokens: means of x (H,), f (H,) and z (d,); variance of f, covariances of z (d, d) and of
    h with z (I, d), and the trace of x's covariance."""

    inputs: np.ndarray
    outputs: np.ndarray
    variance: float
    covariance: np.ndarray
    mixed: np.ndarray
    trace: float


def centred(moments: Moments, place: int, look: Look) -> Centred | None:
    """Of the expert at ``place``; None where it saw no token, or no tokens that differ."""
    weight = float(moments.weight[place])
    if weight <= 0:
        return None
    x, f, h, z = (getattr(moments, name)[place] / weight for name in ("inputs", "outputs", "channels", "coordinates"))
    found = Centred(
        inputs=look.inputs[place] + x,
        outputs=look.outputs[place] + f,
        variance=float(moments.output_square[place] / weight - f @ f),
        covariance=moments.products[place] / weight - np.outer(z, z),
        mixed=moments.mixed[place] / weight - np.outer(h, z),
        trace=float(moments.input_square[place] / weight - x @ x),
    )
    return found if found.variance > 0 and found.trace > 0 else None


def fitted(down: np.ndarray, of: Centred, rank: int, alpha: float, basis: np.ndarray | None = None) -> Map:
    """The map of rank ``rank`` with the least mean of |f - c - B x|^2 + lambda |B|^2 (Frobenius), B in the basis.

    lambda = ``alpha`` trace(S) / H. f = ``down`` (H, I) h, so no product with f is needed: with R (I, d) the covariance
    of h and z, S (d, d) that of z, and L L^T = S + lambda 1, the ridge solution is W R (S + lambda 1)^-1, and the left
    singular vectors U of W R L^-T, the most of which it can keep, give U U^T of it (methods_2.md, 13.1). The product of
    these with their transpose (H, H) is never formed. Raises LinAlgError where S + lambda 1 is not positive definite.
    """
    ridge = alpha * of.trace / len(of.inputs)
    lower = cholesky(of.covariance + ridge * np.eye(len(of.covariance)), lower=True)
    whitened = solve_triangular(lower, of.mixed.T, lower=True)  # L^-1 R^T (d, I)
    width = whitened.shape[1]
    small = whitened if len(whitened) <= width else qr(whitened, mode="r")[0][:width]
    left = svd(down @ small.T, full_matrices=False)[0][:, :rank]
    projected = left.T @ down  # (r, I)
    right = solve_triangular(lower, whitened @ projected.T, lower=True, trans="T").T  # (r, d)
    explained = 2 * np.sum(right * (projected @ of.mixed)) - np.sum(right * (right @ of.covariance))
    right = right if basis is None else right @ basis.T
    return Map(left, right, of.outputs - left @ (right @ of.inputs), 1.0 - float(explained) / of.variance)


def layer_basis(statistics: Statistics, layer: int, columns: int) -> np.ndarray:
    """(H, ``columns``): the leading eigenvectors of the covariance of the layer's inputs, over all tokens."""
    # Every token is routed to equally many experts, so their inputs together have the mean of all tokens.
    mean = statistic(statistics, layer, "input_sum").sum(0) / statistic(statistics, layer, "frequency").sum()
    covariance = statistics.get(layer, "input_gram") / statistics.tokens - np.outer(mean, mean)
    size = len(covariance)
    return np.ascontiguousarray(eigh(covariance, subset_by_index=[size - columns, size - 1])[1][:, ::-1])


@dataclass(frozen=True)
class Tilted:
    """The experts that MoNE's fusion score replaces become affine maps of low rank of the layer's input.

    A second pass over the corpus collects the moments of the experts chosen, and of no other. ``rank`` null is 32, or
    a sixteenth of the hidden size where that is less; 0 leaves MoNE's constants, without a second pass. ``alpha`` is
    the ridge as a share of the mean variance of an input dimension. ``weights`` of the tokens: ``ones``, or
    ``gate_squared``, which is the error of the layer's output where the expert alone is replaced. ``basis``: ``layer``
    has moments of the input's 8 x rank leading components in its layer; ``exact`` those of all its dimensions, of
    4 (H + 2 I) H bytes an expert in float32 and twice that here.

    Every router row stays (see ``methods.mone``). An expert whose routed tokens do not differ leaves its constant. From
    the abstract of arXiv 2610.41366 and our own derivation (methods_2.md, 13): no code is public.

    Raises WinnowError for an unknown option, a rank above the width or the hidden size, a ratio that does not fit, and
    for statistics that are missing or not finite.
    """

    version: ClassVar[str] = "1"

    name: str
    rank: int | None = None
    alpha: float = 0.01
    weights: str = "ones"
    basis: str = "layer"

    def __post_init__(self) -> None:
        check_option(self.name, "weights", self.weights, TOKENS)
        check_option(self.name, "basis", self.basis, BASES)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 0):
            raise WinnowError(f"method '{self.name}': rank must be a whole number of at least 0, not {self.rank}")
        if isinstance(self.alpha, bool) or not 0 < self.alpha < math.inf:
            raise WinnowError(f"method '{self.name}': alpha must be a number above 0, not {self.alpha}")

    @property
    def _mone(self) -> MoNE:
        return MoNE(self.name, weights=TOKENS[self.weights])

    @property
    def requires(self) -> frozenset[str]:
        basis = {"input_gram"} if self.basis == "layer" else set()
        again = set() if self.rank == 0 else {"input_sum", "output_sum", *basis}
        return self._mone.requires | again

    @property
    def uses_seed(self) -> bool:
        return False

    def check(self, shape: MoeShape, ratio: str | float | Fraction) -> Fraction:
        if self.rank is not None and shape.width is not None:
            self._check_rank(self.rank, shape.width, "the width of the experts")
        return self._mone.check(shape, ratio)

    def _check_rank(self, rank: int, most: int, what: str) -> None:
        if rank > most:
            raise WinnowError(f"method '{self.name}': rank {rank} is above {most}, {what}: set method.rank lower")

    def decide(self, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        return self._mone.decide(statistics, ratio, seed)

    def looks_again_at(self, statistics: Statistics, decision: Decision) -> Mapping[int, Look]:
        if self.rank == 0:
            return {}
        return {
            layer.layer: self._look(statistics, layer.layer, novices)
            for layer in decision.plan.layers
            if (novices := [j for j, new in enumerate(layer.experts) if not new.sources])
        }

    def _look(self, statistics: Statistics, layer: int, novices: list[int]) -> Look:
        count = np.maximum(statistic(statistics, layer, "frequency")[novices], 1)[:, None]
        inputs, outputs = (statistic(statistics, layer, name)[novices] / count for name in ("input_sum", "output_sum"))
        rank, hidden = self.rank_in(inputs.shape[1]), inputs.shape[1]
        basis = None if self.basis == "exact" else layer_basis(statistics, layer, min(OF_BASIS * rank, hidden))
        return Look(novices, inputs, outputs, basis, self.weights == "gate_squared")

    def rank_in(self, hidden: int) -> int:
        """Of the maps, where the layer has so many dimensions. Raises WinnowError for a rank above that."""
        rank = max(1, min(32, hidden // 16)) if self.rank is None else self.rank
        self._check_rank(rank, hidden, "the hidden size")
        return rank

    def finish(self, statistics: Statistics, decision: Decision, seen: Seen) -> Decision:
        looks = self.looks_again_at(statistics, decision)
        plans, left = [], {}
        for layer in decision.plan.layers:
            if layer.layer in looks:
                maps = self._maps(statistics, layer.layer, looks[layer.layer], seen(layer.layer))
                left[layer.layer] = {j: found.unexplained for j, found in maps.items()}
                layer = _with_maps(layer, maps)
            plans.append(layer)
        return replace(decision, plan=CompressionPlan(tuple(plans)), unexplained=left)

    def _maps(self, statistics: Statistics, layer: int, look: Look, moments: Moments) -> dict[int, Map]:
        found = {}
        for place, expert in enumerate(look.experts):
            of = centred(moments, place, look)
            if of is None:
                continue
            down = statistics.expert_weights(layer, expert).down.astype(np.float64)
            rank = self.rank_in(len(of.inputs))
            self._check_rank(rank, down.shape[1], "the width of the experts")
            try:
                found[expert] = fitted(down, of, rank, self.alpha, look.basis)
            except LinAlgError as error:
                raise WinnowError(
                    f"method '{self.name}': the moments of expert {expert} of layer {layer} are singular: "
                    "set method.alpha higher"
                ) from error
        return found


def _with_maps(layer: LayerPlan, maps: Mapping[int, Map]) -> LayerPlan:
    def array(values: np.ndarray) -> Array:
        return Array(np.ascontiguousarray(values, dtype=np.float32))

    tilted = {
        j: NewExpert(low_rank=LowRank(array(one.left), array(one.right), array(one.shift))) for j, one in maps.items()
    }
    return replace(layer, experts=tuple(tilted.get(j, new) for j, new in enumerate(layer.experts)))
