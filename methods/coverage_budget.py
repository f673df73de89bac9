"""How many channels each layer and each expert keeps: coverage thresholds, then the adjustment to exact widths.

Coverage gives every layer (or expert) the smallest number of its best channels whose scores reach a share of its total
score, the share being its weight times a common level. The released code finds the level by bisection. Here the level
at which each channel would enter is computed, and the channels that enter first are taken: the limit of the bisection,
with a total that is exact, and with the same answer for every order of the layers and experts but for ties.
"""

from collections.abc import Sequence

import numpy as np

from harness.errors import WinnowError


def entry_levels(scores: np.ndarray, weight: float) -> np.ndarray:
    """(n,) levels at which the channels of ``scores`` (n,) >= 0 enter, the best first.

    Channel i enters when ``weight`` * level exceeds the share of the i better ones in the total score. It never does
    (infinity) where its score or the weight is 0.
    """
    ranked = -np.sort(-scores)
    total = ranked.sum()
    if weight <= 0 or total <= 0:
        return np.full(len(scores), np.inf)
    before = np.concatenate([[0.0], np.cumsum(ranked)[:-1]]) / total
    return np.where(ranked > 0, before / weight, np.inf)


def first_to_enter(
    levels: Sequence[np.ndarray], total: int, scores: Sequence[np.ndarray] | None = None, reserved: int = 0
) -> list[int]:
    """How many of the ``total`` lowest levels belong to each array of ``levels``, each sorted.

    Of equal levels the higher of ``scores`` (arrays like ``levels``), then the lower array, then the earlier place is
    taken. The first ``reserved`` places of each array come before all others.
    """
    flat = np.concatenate([np.where(np.arange(len(values)) < reserved, -1.0, values) for values in levels])
    owner = np.repeat(np.arange(len(levels)), [len(values) for values in levels])
    tie = np.zeros(len(flat)) if scores is None else -np.concatenate(list(scores))
    order = np.lexsort((np.arange(len(flat)), tie, flat))  # the last key counts most
    return np.bincount(owner[order[:total]], minlength=len(levels)).tolist()


def smoothed_loss(losses: np.ndarray) -> np.ndarray:
    """Relative block losses (layers,) as weights of mean 1: four times a root, then within one std of the mean.

    As in the released code; the standard deviation is the unbiased one, 0 for a single layer.
    """
    values = np.asarray(losses, dtype=np.float64)
    for _ in range(4):
        values = np.sqrt(values)
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        values = np.clip(values, values.mean() - spread, values.mean() + spread)
    return values / values.mean()


def apportion(total: int, capacities: Sequence[int]) -> list[int]:
    """``total`` in proportion to ``capacities`` (their sum at least ``total``), by largest remainder.

    Exact; no share exceeds its capacity; of equal remainders the lower index goes first.
    """
    whole = sum(capacities)
    if whole == 0:
        return [0] * len(capacities)
    shares = [total * capacity // whole for capacity in capacities]
    by_remainder = sorted(range(len(capacities)), key=lambda i: (-(total * capacities[i] % whole), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def nearest_multiple(total: int, align: int) -> int:
    """The multiple of ``align`` nearest to ``total``, the larger of two."""
    return (2 * total + align) // (2 * align) * align


def adjusted_widths(
    widths: Sequence[Sequence[int]],
    capacity: int,
    align: int,
    smallest: int,
    at_least: int,
    best: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Widths of every layer's experts as multiples of ``align``, each 0 or from ``smallest`` to ``capacity``.

    Widths are rounded down, and those below ``smallest`` (a multiple of ``align``)
    become 0; at least ``at_least`` experts of a layer stay, the first of ``best[layer]`` being revived. What is freed
    goes to the layers, and in a layer to the experts that are left, in proportion to their free capacity, but first a
    block of ``align`` each to those that rounding took most from. When all are full, experts of width 0 are revived.
    The total is the multiple of ``align`` nearest to the old one. Raises WinnowError where no such widths exist.
    """
    total = nearest_multiple(sum(map(sum, widths)), align)
    result = [_rounded_down(layer, align, smallest, at_least, order) for layer, order in zip(widths, best, strict=True)]
    while (free := total - sum(map(sum, result))) > 0:
        room = [sum(capacity - width for width in layer if width) for layer in result]
        given = apportion(min(free, sum(room)) // align, [blocks // align for blocks in room])
        result = [
            _with_blocks(layer, old, blocks, capacity, align)
            for layer, old, blocks in zip(result, widths, given, strict=True)
        ]
        if free > sum(room):
            _revive(result, free - sum(room), smallest, align, best)
    return result


def _rounded_down(widths: Sequence[int], align: int, smallest: int, at_least: int, best: Sequence[int]) -> list[int]:
    result = [width // align * align for width in widths]
    result = [width if width >= smallest else 0 for width in result]
    missing = at_least - sum(width > 0 for width in result)
    for expert in [e for e in best if not result[e]][: max(missing, 0)]:
        result[expert] = smallest
    while sum(result) > sum(widths):  # what was revived is taken from the widest
        result[max(range(len(result)), key=lambda e: (result[e], -e))] -= align
    return result


def _with_blocks(widths: list[int], old: Sequence[int], blocks: int, capacity: int, align: int) -> list[int]:
    """``widths`` and ``blocks`` blocks more, which the experts that are left have room for."""
    result = list(widths)
    lost = [before - now if 0 < now < min(before, capacity) else 0 for now, before in zip(widths, old, strict=True)]
    for expert in sorted(range(len(result)), key=lambda e: (-lost[e], e))[:blocks]:
        if lost[expert] > 0:
            result[expert] += align
            blocks -= 1
    room = [(capacity - width) // align if width else 0 for width in result]
    return [width + align * more for width, more in zip(result, apportion(blocks, room), strict=True)]


def _revive(widths: list[list[int]], free: int, smallest: int, align: int, best: Sequence[Sequence[int]]) -> None:
    """Give the best expert of width 0 ``smallest`` channels; those beyond ``free`` are taken from the widest."""
    layer = min((i for i, row in enumerate(widths) if 0 in row), key=lambda i: (-widths[i].count(0), i))
    expert = next(e for e in best[layer] if widths[layer][e] == 0)
    short = smallest - free
    slack = sum(width - smallest for row in widths for width in row if width)
    if short > slack:
        held = sum(map(sum, widths)) + free
        raise WinnowError(
            f"{held} channels cannot be split into experts of {smallest} to {max(map(max, widths))} each: "
            "use a smaller min_channels or another ratio"
        )
    while short > 0:
        i, e = max(
            ((i, e) for i, row in enumerate(widths) for e in range(len(row))), key=lambda at: widths[at[0]][at[1]]
        )
        widths[i][e] -= align
        short -= align
    widths[layer][expert] = smallest
