"""How far two models' next-token distributions are apart, position by position. Pure numpy.

p is the baseline's distribution, q the compressed model's. Entropies and divergences are in nats.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What each measure of a position is; js and tv are symmetric and bounded by ln 2 and 1.
MEASURES = {
    "js": "Jensen-Shannon divergence (Lin 1991)",
    "kl_from_baseline": "KL(p || q)",
    "kl_to_baseline": "KL(q || p)",
    "tv": "total variation distance, half the sum of |p - q|",
    "esap": "expected acceptance of p's draws by q in speculative sampling, the sum of min(p, q): 1 - tv",
    "top1_agreement": "1 where both find the same token likeliest, else 0",
    "entropy": "entropy of q",
    "entropy_baseline": "entropy of p",
    "truncated_mass": "mean mass of p and q outside of what is known of both; 0 over the whole vocabulary",
}
FLOOR = -1e4  # nats: a token that a model rules out (log-probability -inf) counts as this unlikely
REST = 1e-12  # the least mass of all the tokens that are not known, since listed float32 masses may sum to 1
BLOCK = 2**20  # log-probabilities worked on at once: 8 MB in float64

Vectors = dict[str, NDArray[np.float64]]


def divergences(logp: ArrayLike, logq: ArrayLike) -> Vectors:
    """The ``MEASURES`` of each of T positions from the log-probabilities (T, V) of the whole vocabulary, exactly.

    Both are normalised again in float64. Everything comes from their difference, so the result is finite whatever
    they are but NaN, and equal distributions give exactly 0 (1 for esap and agreement). NaN gives NaN.
    """
    p, q = np.asarray(logp), np.asarray(logq)
    rows = max(1, BLOCK // max(1, p.shape[1]))
    blocks = [_block(p[start : start + rows], q[start : start + rows]) for start in range(0, len(p), rows)]
    return {name: np.concatenate([block[name] for block in blocks] or [np.zeros(0)]) for name in MEASURES}


def truncated_divergences(top_p: ArrayLike, logp: ArrayLike, top_q: ArrayLike, logq: ArrayLike) -> Vectors:
    """The ``MEASURES`` of each of T positions where only the likeliest tokens are known: ids and log-probabilities
    (T, n), likeliest first.

    Tokens that both lists hold count by themselves, all others together as one. Lumping can only bring distributions
    closer (data processing inequality), so divergences and entropies are lower bounds. With the truncated mass m of
    the position the exact tv is at most tv + m, js at most js + m ln 2, and esap at least esap - m; KL has no upper
    bound. Top-1 agreement is exact.
    """
    rows: list[Vectors] = []
    for ids_p, p, ids_q, q in zip(*map(np.asarray, (top_p, logp, top_q, logq)), strict=True):
        _, at_p, at_q = np.intersect1d(ids_p, ids_q, assume_unique=True, return_indices=True)
        row = divergences(_lumped(p[at_p]), _lumped(q[at_q]))
        row["top1_agreement"] = np.array([float(ids_p[0] == ids_q[0])])
        row["entropy_baseline"], row["entropy"] = (_entropy(_normalised(_lumped(one))) for one in (p, q))
        row["truncated_mass"] = np.exp([_lumped(p[at_p])[0, -1], _lumped(q[at_q])[0, -1]]).mean(keepdims=True)
        rows.append(row)
    return {name: np.concatenate([row[name] for row in rows] or [np.zeros(0)]) for name in MEASURES}


def _block(p: NDArray[np.floating], q: NDArray[np.floating]) -> Vectors:
    logp, logq = _normalised(p), _normalised(q)
    probability_p, probability_q, gap = np.exp(logp), np.exp(logq), logp - logq
    # log(p/m) and log(q/m) of the midway distribution m = (p + q) / 2
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        over_m = np.log(2) - np.logaddexp(0.0, -gap), np.log(2) - np.logaddexp(0.0, gap)
    tv = np.abs(probability_p - probability_q).sum(1) / 2
    return {
        "js": _not_negative((probability_p * over_m[0] + probability_q * over_m[1]).sum(1) / 2),
        "kl_from_baseline": _not_negative((probability_p * gap).sum(1)),
        "kl_to_baseline": _not_negative(-(probability_q * gap).sum(1)),
        "tv": tv,
        "esap": 1 - tv,
        "top1_agreement": (logp.argmax(1) == logq.argmax(1)).astype(np.float64),
        "entropy": _entropy(logq),
        "entropy_baseline": _entropy(logp),
        "truncated_mass": np.zeros(len(p)),
    }


def _normalised(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    values = np.asarray(logits, dtype=np.float64)
    values = np.maximum(values - values.max(1, keepdims=True), FLOOR)
    normalised: NDArray[np.float64] = values - np.log(np.exp(values).sum(1, keepdims=True))
    return normalised


def _entropy(logp: NDArray[np.float64]) -> NDArray[np.float64]:
    return _not_negative(-(np.exp(logp) * logp).sum(1))


def _not_negative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without what rounding takes below 0; NaN stays. The sum 0.0 + -0.0 makes no minus zero of it."""
    return np.maximum(values, 0.0) + 0.0


def _lumped(known: NDArray[np.floating]) -> NDArray[np.float64]:
    """(1, n + 1): the log-probabilities ``known`` (n,) and that of all other tokens together."""
    values = known.astype(np.float64)
    rest = np.log(max(1.0 - np.exp(values).sum(), REST))
    return np.append(values, rest)[None]
