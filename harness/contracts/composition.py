"""Two plans, one after the other, as one."""

from dataclasses import replace

import numpy as np

from harness.contracts.plan import Array, CompressionPlan, LayerPlan, NewExpert, Source
from harness.errors import WinnowError


def compose(first: CompressionPlan, second: CompressionPlan, width: int | None = None) -> CompressionPlan:
    """The plan that does what ``first`` and then ``second`` do, ``second`` being made for what ``first`` leaves.

    So ``second`` numbers the new experts of ``first``, and its channels are those that ``first`` kept, in that order;
    ``second.route[j]`` is where the rows now lead that ``first`` led to its new expert j. ``width`` (the channels of an
    old expert) is needed only where experts that kept different channels are merged. Constants, low-rank maps and
    fitted down projections of ``first`` stay; a down projection of ``second`` takes the place of one of ``first``.

    Raises WinnowError where the plans do not fit each other, and where ``second`` would merge or cut what is no
    combination, or merge a fitted down projection with one that is not, and where it has router rows of its own.
    """
    after = {layer.layer: layer for layer in second.layers}
    if after.keys() != {layer.layer for layer in first.layers}:
        raise WinnowError("plans cannot be composed: they are for different layers")
    return CompressionPlan(tuple(_compose_layer(layer, after[layer.layer], width) for layer in first.layers))


def _compose_layer(first: LayerPlan, second: LayerPlan, width: int | None) -> LayerPlan:
    if len(second.route) != len(first.experts):
        raise WinnowError(
            f"plans cannot be composed: the first leaves {len(first.experts)} experts in layer {first.layer}, "
            f"the second is for {len(second.route)}"
        )
    if second.router is not None:
        raise WinnowError(f"plans cannot be composed: the second has router rows of its own in layer {first.layer}")
    experts = tuple(_compose_expert(first, new, width) for new in second.experts)
    route = tuple(None if j is None else second.route[j] for j in first.route)
    return LayerPlan(first.layer, experts, route, _left_of_router(first, route))


def _left_of_router(first: LayerPlan, route: tuple[int | None, ...]) -> Array | None:
    """Of the rows that ``first`` has for the router, those that ``route`` keeps."""
    if first.router is None:
        return None
    stay = [new is not None for old, new in zip(first.route, route, strict=True) if old is not None]
    return Array(first.router.values[np.array(stay)])


def _compose_expert(first: LayerPlan, new: NewExpert, width: int | None) -> NewExpert:
    if not new.sources:  # a constant, or a map of the layer's input: what was there before is gone
        return new
    between = [(share, first.experts[share.expert]) for share in new.sources]
    if any(old.constant is not None or old.low_rank is not None for _, old in between):
        return _as_it_is(between, new, first.layer)
    sources, channels = _combined(between, new.channels, first.layer, width)
    down = new.down or _combined_down(between, new.channels, first.layer)
    return replace(new, sources=sources, channels=channels, down=down)


def _as_it_is(between: list[tuple[Source, NewExpert]], new: NewExpert, layer: int) -> NewExpert:
    """What stands for an expert can stay, or go, and no more."""
    (share, old), *others = between
    if others or new != NewExpert((Source(share.expert),)):
        raise WinnowError(
            f"plans cannot be composed: layer {layer} has constants or low-rank maps, which a second method cannot "
            "merge, cut or fit again"
        )
    return old


def _combined_down(
    between: list[tuple[Source, NewExpert]], channels: tuple[int, ...] | None, layer: int
) -> Array | None:
    """The fitted down projection of the sum, of experts that all have one; None where none has."""
    fitted = [(share, old.down.values) for share, old in between if old.down is not None]
    if not fitted:
        return None
    arranged = [
        share.weight * (down if share.permutation is None else down[:, list(share.permutation)])
        for share, down in fitted
    ]
    if len(fitted) < len(between) or len({down.shape for down in arranged}) > 1:
        raise WinnowError(
            f"plans cannot be composed: layer {layer} merges an expert whose down projection was fitted with others"
        )
    total = sum(arranged[1:], arranged[0]).astype(arranged[0].dtype)
    return Array(total if channels is None else np.ascontiguousarray(total[:, list(channels)]))


def _combined(
    between: list[tuple[Source, NewExpert]], channels: tuple[int, ...] | None, layer: int, width: int | None
) -> tuple[tuple[Source, ...], tuple[int, ...] | None]:
    kept = {old.channels for _, old in between}
    in_place = all(share.permutation is None for share, _ in between)
    if kept != {None} and not (in_place and len(kept) == 1):
        return _combined_selections(between, channels, layer, width)
    sources = tuple(
        Source(old.expert, share.weight * old.weight, _through(share.permutation, old.permutation))
        for share, expert in between
        for old in expert.sources
    )
    return sources, _through(channels, kept.pop())


def _combined_selections(
    between: list[tuple[Source, NewExpert]], channels: tuple[int, ...] | None, layer: int, width: int | None
) -> tuple[tuple[Source, ...], tuple[int, ...] | None]:
    """Sources whose channels differ: each gets a permutation that begins with its own channels."""
    selected = [
        (old.expert, share.weight * old.weight, _through(_through(share.permutation, expert.channels), old.permutation))
        for share, expert in between
        for old in expert.sources
    ]
    if len(selected) == 1:
        expert, weight, order = selected[0]
        return (Source(expert, weight),), _through(channels, order)
    if width is None:
        raise WinnowError(f"plans cannot be composed without the width: layer {layer} merges different channels")
    orders = [tuple(range(width)) if order is None else order for _, _, order in selected]
    if len({len(order) for order in orders}) > 1:
        raise WinnowError(f"plans cannot be composed: layer {layer} merges experts of different widths")
    sources = tuple(
        Source(expert, weight, order + tuple(sorted(set(range(width)) - set(order))))
        for (expert, weight, _), order in zip(selected, orders, strict=True)
    )
    return sources, _through(channels, tuple(range(len(orders[0]))))


def _through(outer: tuple[int, ...] | None, inner: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Place i of the result is ``inner[outer[i]]``; None is every place as it is."""
    if outer is None or inner is None:
        return inner if outer is None else outer
    return tuple(inner[place] for place in outer)
