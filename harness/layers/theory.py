"""What layer diagnostics compute from gate values, expert outputs, weights and counts: pure numpy, one layer at a time.

E experts, H hidden size, T tokens, m members of a group. Sums over tokens are kept by fold, ``FOLDS`` random parts of
the documents, so that every number built from them has an interval by leaving one fold out at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh  # type: ignore[import-untyped]

from harness.contracts.intervals import jackknife
from harness.contracts.statistics import ExpertWeights

FOLDS = 10
DIRECTIONS = 8  # leading singular vectors that are compared

Estimated = tuple[float, float, float]  # value, and the ends of its 95 % interval
Align = Callable[[ExpertWeights, ExpertWeights], Sequence[int]]


def folds_of(lengths: Sequence[int], seed: int = 0) -> np.ndarray:
    """(T,) the fold of each token, of documents of ``lengths`` tokens one after the other.

    The tokens of a document are alike, so documents are dealt out whole, in random order, each to the fold that has
    fewest tokens so far; one that is longer than a fold's share is cut into stretches of that length.
    """
    share = max(1, sum(lengths) // FOLDS)
    pieces = [size for length in lengths for size in (*[share] * (length // share), length % share) if size]
    folds, filled = np.zeros(len(pieces), dtype=np.int64), np.zeros(FOLDS, dtype=np.int64)
    for piece in np.random.default_rng(seed).permutation(len(pieces)):
        folds[piece] = np.argmin(filled)
        filled[folds[piece]] += pieces[piece]
    return np.repeat(folds, pieces)


def by_fold(values: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(FOLDS, ...) sums of ``values`` (T, ...) over the tokens of each fold."""
    sums = np.zeros((FOLDS, *values.shape[1:]))
    for fold in np.unique(folds):
        sums[fold] = values[folds == fold].sum(0)
    return sums


def leave_one_out(function: Callable[[np.ndarray], float], folds: np.ndarray) -> tuple[float, list[float]]:
    """``function`` of the folds to be used, (FOLDS,) zeros and ones: of all, and without each that holds tokens."""
    used = np.bincount(folds, minlength=FOLDS) > 0
    left_out = [float(function(used & (np.arange(FOLDS) != fold))) for fold in np.flatnonzero(used)]
    return function(used.astype(float)), left_out


def estimated(value: float, left_out: Sequence[float]) -> Estimated:
    """``value`` with the jackknife's interval over folds.

    The interval does not go below 0: everything that is measured here is a sum of squares.
    """
    low, high = jackknife(value, left_out) if len(left_out) > 1 else (value, value)
    return value, max(0.0, low), high


def ratio_of(above: np.ndarray, below: np.ndarray) -> Callable[[np.ndarray], float]:
    """Of the folds used, the sum of ``above`` (FOLDS,) over that of ``below``; 0 where that is 0."""

    def ratio(use: np.ndarray) -> float:
        total = float(use @ below)
        return float(use @ above) / total if total else 0.0

    return ratio


# -- predictions -------------------------------------------------------------------------------------------------


@dataclass
class GroupSums:
    """Of the m members of a merged group, sums over the tokens that choose any of them, by fold.

    With G = sum of the members' gate values and r_i = g_i / G: ``active`` (F,) tokens, ``mass_square`` (F,) G^2,
    ``share`` (F, m) r_i, ``share_product`` (F, m, m) r_i r_j, ``gram`` (F, m, m) <f_i(x), f_j(x)>.
    """

    active: np.ndarray
    mass_square: np.ndarray
    share: np.ndarray
    share_product: np.ndarray
    gram: np.ndarray

    @staticmethod
    def empty(members: int) -> "GroupSums":
        one, vector, square = np.zeros(FOLDS), np.zeros((FOLDS, members)), np.zeros((FOLDS, members, members))
        return GroupSums(one, one.copy(), vector, square, square.copy())

    def add(self, gates: np.ndarray, outputs: np.ndarray, folds: np.ndarray) -> None:
        """``gates`` (n, m), 0 where an expert is not chosen; ``outputs`` (m, n, H), chosen or not; ``folds`` (n,)."""
        mass = gates.sum(1)
        chosen = mass > 0
        share = gates[chosen] / mass[chosen, None]
        f, fold = outputs[:, chosen].astype(np.float64), folds[chosen]
        self.active += by_fold(np.ones(len(fold)), fold)
        self.mass_square += by_fold(mass[chosen] ** 2, fold)
        self.share += by_fold(share, fold)
        self.share_product += by_fold(share[:, :, None] * share[:, None, :], fold)
        for number in np.unique(fold):
            flat = f[:, fold == number].reshape(len(f), -1)
            self.gram[number] += flat @ flat.T

    def moments(self, use: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cov[r] and the mean of <f_i, f_j>, each (m, m), over the tokens that choose a member; 0 without any."""
        active = max(float(use @ self.active), 1.0)
        mean = use @ self.share / active
        product, gram = (np.tensordot(use, sums, 1) / active for sums in (self.share_product, self.gram))
        return product - np.outer(mean, mean), gram

    def error(self, use: np.ndarray) -> float:
        """What ``merging_error`` says, as a sum over tokens."""
        covariance, gram = self.moments(use)
        return merging_error(float(use @ self.mass_square), covariance, gram)


def merging_error(mass_square: float, covariance: np.ndarray, gram: np.ndarray) -> float:
    """E[G^2] * sum_ij Cov[r]_ij * E<f_i, f_j>: what merging a group costs at least, E|y - merged y|^2.

    With G the summed gate value of the group and r_i = g_i / G, the group adds G * sum_i r_i f_i to the layer's output;
    merged it adds G * f, whatever r. The best f that a constant can choose is sum_i E[r_i] f_i, which leaves
    G * sum_i (r_i - E[r_i]) f_i. Its expected square is the above if G, r and the f_i are independent over tokens. For
    two experts it is E[(g_i + g_j)^2] * Var[r] * E|f_i - f_j|^2 (Lasby et al., REAP, section 3.1, equation 6); in
    general, -1/2 * sum_ij Cov[r]_ij * E|f_i - f_j|^2 in place of the last two factors. Errors of different groups add
    up if they are uncorrelated. Weights averaged instead of outputs, and other weights than E[r_i], cost more.
    """
    return mass_square * float(np.sum(covariance * gram))


def policy_variability(covariance: np.ndarray) -> float:
    """Mean over members of Var[r_i]; for two members that is Var[r]."""
    return float(np.diagonal(covariance).mean())


def functional_gap(gram: np.ndarray) -> float:
    """Mean over pairs of members of E|f_i - f_j|^2, from the mean inner products (m, m); 0 for a single one."""
    members = len(gram)
    if members < 2:
        return 0.0
    norms = np.diagonal(gram)
    distance = norms[:, None] + norms[None, :] - 2 * gram
    return max(0.0, float(distance.sum()) / (members * (members - 1)))


def pruning_error(gates: np.ndarray, square_norms: np.ndarray) -> np.ndarray:
    """(T,) sum over removed experts of g_j^2 * |f_j|^2, from ``gates`` and ``square_norms`` (T, removed).

    That is |y - pruned y|^2 if nothing takes the place of a removed expert, and if the outputs of those that a token
    loses are orthogonal. Where gate values are renormalised or another expert moves up, the true error also holds what
    comes instead.
    """
    return np.sum(gates**2 * square_norms, axis=1)


# -- functional subspace -----------------------------------------------------------------------------------------


def spread(outputs: np.ndarray) -> np.ndarray:
    """(T,) mean over experts of |f_j(x_t) - mean_i f_i(x_t)|^2, from ``outputs`` (E, T, H): all experts, all tokens."""
    centred = outputs - outputs.mean(0)
    return np.einsum("eth,eth->t", centred, centred) / len(outputs)


def explained(gram: np.ndarray) -> list[float]:
    """Share of the spread that each principal component holds, largest first, from the mean <f_i, f_j> (E, E).

    An expert counts as a point whose coordinates are all elements of its outputs for all tokens. Empty where all
    experts are alike.
    """
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    values = np.clip(np.linalg.eigvalsh(centred)[::-1], 0.0, None)
    return [] if values.sum() <= 1e-12 * max(float(np.trace(gram)), 1e-300) else (values / values.sum()).tolist()


# -- weights -----------------------------------------------------------------------------------------------------


def weight_distance(one: ExpertWeights, other: ExpertWeights, order: Sequence[int] | None = None) -> float:
    """Frobenius distance over the root mean square of the two norms, all three matrices together.

    0 for equal weights, sqrt(2) for orthogonal ones. ``order`` permutes the channels of ``other`` first.
    """
    index = slice(None) if order is None else list(order)
    pairs = (one.gate, other.gate[index]), (one.up, other.up[index]), (one.down, other.down[:, index])
    apart = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in pairs)
    norms = sum(float(np.sum(a.astype(np.float64) ** 2) + np.sum(b.astype(np.float64) ** 2)) for a, b in pairs)
    return (2 * apart / norms) ** 0.5 if norms else 0.0


def leading_directions(weights: ExpertWeights, count: int = DIRECTIONS) -> tuple[np.ndarray, np.ndarray]:
    """Leading singular vectors in the hidden space, as columns: what gate and up read, and what down writes.

    Neither depends on the order of the channels.
    """
    return _right_vectors(np.vstack([weights.gate, weights.up]), count), _right_vectors(weights.down.T, count)


def _right_vectors(matrix: np.ndarray, count: int) -> np.ndarray:
    matrix = matrix.astype(np.float64)
    rows, columns = matrix.shape
    count = min(count, rows, columns)
    if columns <= rows:
        return eigh(matrix.T @ matrix, subset_by_index=[columns - count, columns - 1])[1]
    vectors = matrix.T @ eigh(matrix @ matrix.T, subset_by_index=[rows - count, rows - 1])[1]
    return np.linalg.qr(vectors)[0]


def subspace_overlap(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> float:
    """Mean squared cosine of the principal angles between the leading directions of two experts, reading and writing.

    1 where they span the same space; between k random directions of H it is k / H.
    """
    return float(np.mean([np.sum((a.T @ b) ** 2) / a.shape[1] for a, b in zip(one, other, strict=True)]))


def compare_pairs(
    weights: Callable[[int], ExpertWeights], pairs: Sequence[tuple[int, int]], align: Align
) -> dict[str, list[float]]:
    """Of each pair of experts, ``distance``, ``aligned_distance`` (channels of the second put in the best order by
    ``align``) and ``overlap`` of the leading singular vectors."""
    found: dict[str, list[float]] = {"distance": [], "aligned_distance": [], "overlap": []}
    for first, second in pairs:
        one, other = weights(first), weights(second)
        found["distance"].append(weight_distance(one, other))
        found["aligned_distance"].append(weight_distance(one, other, align(one, other)))
        found["overlap"].append(subspace_overlap(leading_directions(one), leading_directions(other)))
    return found


def random_pairs(experts: int, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """At most ``count`` different pairs of experts, all equally likely."""
    firsts, seconds = np.triu_indices(experts, 1)
    chosen = np.random.default_rng(seed).permutation(len(firsts))[:count]
    return [(int(firsts[i]), int(seconds[i])) for i in sorted(chosen)]


# -- counts ------------------------------------------------------------------------------------------------------


def load_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of how routed tokens are spread over experts; log E where all get equally many."""
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log(share))) + 0.0
