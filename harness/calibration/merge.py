"""Results of passes over parts of a corpus, put together to what one pass over all of it measures.

Each statistic is merged by the rule that its declaration names (``Statistic.merges``):

- sum: a + b; max: the larger one;
- token mean: a and b weighted by the tokens of their parts;
- samples: those of b behind those of a, since every pass takes its share of one sample of the whole corpus;
- moving average: the documents of the later part take a to decay * a + from_zero (``AffineStep``), or to b where no
  document before was routed to the expert.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from harness.calibration.collected import AffineStep, Collected, Part
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError


def merged(parts: Sequence[Collected]) -> Collected:
    """What one pass measures over the corpus that ``parts`` share, to rounding. They may come in any order.

    Raises WinnowError where one is missing or there twice, and where they are not of the same model and settings.
    """
    return merged_in_order(sorted(parts, key=lambda each: _part(each).offset))


def merged_in_order(parts: Iterable[Collected]) -> Collected:
    """As ``merged``, of parts that come in the order of the pass, so that no more than two are held at once."""
    whole: Collected | None = None
    for each in parts:
        whole = joined(whole, each) if whole is not None else _first(each)
    if whole is None:
        raise WinnowError("calibration: there are no parts to merge")
    if whole.tokens != _part(whole).total:
        raise WinnowError(f"calibration: the part from token {whole.tokens} to {_part(whole).total} is missing")
    return replace(whole, part=None, steps={})


def _part(collected: Collected) -> Part:
    if collected.part is None:
        raise WinnowError("calibration: only passes over a part of a corpus can be merged, and this one saw all of it")
    return collected.part


def _first(collected: Collected) -> Collected:
    if _part(collected).offset:
        raise WinnowError(f"calibration: the part from token 0 to {_part(collected).offset} is missing")
    return collected


def _check_joins(first: Collected, second: Collected) -> None:
    one, other = (
        (each.num_experts, each.top_k, each.n_group, each.layers.keys(), each.names, _part(each).total)
        for each in (first, second)
    )
    if one != other:
        raise WinnowError("calibration: the parts to merge are of different models, corpora or statistics")
    end, start = _part(first).offset + first.tokens, _part(second).offset
    if start < end:
        raise WinnowError(f"calibration: the part from token {start} is there twice: give each once")
    if start > end:
        raise WinnowError(f"calibration: the part from token {end} to {start} is missing")


def joined(first: Collected, second: Collected) -> Collected:
    """Of two parts, one behind the other. Raises WinnowError where they are not."""
    _check_joins(first, second)
    return replace(
        first,
        sequences=first.sequences + second.sequences,
        tokens=first.tokens + second.tokens,
        seconds=first.seconds + second.seconds,
        layers={
            layer: {name: _merged(name, layer, first, second) for name in arrays}
            for layer, arrays in first.layers.items()
        },
        usage=_added(first.usage, second.usage),
        steps={
            layer: {name: _composed(step, second.steps[layer][name]) for name, step in steps.items()}
            for layer, steps in first.steps.items()
        },
    )


def _merged(name: str, layer: int, first: Collected, second: Collected) -> np.ndarray:
    a, b = first.layers[layer][name], second.layers[layer][name]
    match STATISTICS[name].merges:
        case "sum":
            return a + b
        case "max":
            return np.maximum(a, b)
        case "token mean":
            return (a * first.tokens + b * second.tokens) / (first.tokens + second.tokens)
        case "samples":
            return np.concatenate([a, b], axis=STATISTICS[name].shape.index("T"))
        case "moving average":
            begun = first.steps[layer][name].decay < 1.0
            return np.where(_by_expert(begun, a), _applied(second.steps[layer][name], a), b)


def _applied(step: AffineStep, value: np.ndarray) -> np.ndarray:
    return _by_expert(step.decay, value) * value + step.from_zero


def _composed(first: AffineStep, second: AffineStep) -> AffineStep:
    return AffineStep(first.decay * second.decay, _applied(second, first.from_zero))


def _by_expert(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``values`` (E,) as (E, 1, ...), to go with ``like`` (E, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _added(
    first: dict[str, dict[str, list[int]]], second: dict[str, dict[str, list[int]]]
) -> dict[str, dict[str, list[int]]]:
    """Usage by source and layer; a source may be in one of the parts only."""
    found = {}
    for source in sorted(first.keys() | second.keys()):
        counts = [each[source] for each in (first, second) if source in each]
        found[source] = {
            layer: [sum(of) for of in zip(*(c[layer] for c in counts), strict=True)] for layer in counts[0]
        }
    return found
