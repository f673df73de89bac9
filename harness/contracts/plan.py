"""The CompressionPlan: what every method returns, how it is checked, stored and composed with another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from harness.errors import WinnowError


@dataclass(frozen=True)
class Source:
    """One old expert's share in a new expert.

    ``permutation`` reorders the old expert's channels before they are summed: channel c of the sum takes the old
    channel ``permutation[c]``. ``None`` leaves them in place.
    """

    expert: int
    weight: float = 1.0
    permutation: tuple[int, ...] | None = None


@dataclass(frozen=True)
class NewExpert:
    """A weighted sum of old experts, of which only ``channels`` (``None``: all of them) are kept, in that order."""

    sources: tuple[Source, ...]
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LayerPlan:
    """``route[j]`` is the new expert that the old router row j now leads to, or None: the row is removed."""

    layer: int
    experts: tuple[NewExpert, ...]
    route: tuple[int | None, ...]

    @property
    def is_pruning(self) -> bool:
        """No two router rows lead to the same new expert, so the layer is an ordinary, smaller MoE layer."""
        kept = [new for new in self.route if new is not None]
        return sorted(kept) == list(range(len(self.experts)))


@dataclass(frozen=True)
class CompressionPlan:
    layers: tuple[LayerPlan, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layers": [_layer_to_json(layer) for layer in self.layers]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "CompressionPlan":
        """Raises WinnowError where ``data`` is not a valid plan."""
        try:
            plan = CompressionPlan(tuple(_layer_from_json(layer) for layer in data["layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WinnowError(f"not a compression plan: {type(error).__name__}: {error}") from error
        validate(plan)
        return plan

    @staticmethod
    def load(path: Path) -> "CompressionPlan":
        try:
            return CompressionPlan.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise WinnowError(f"cannot read the plan {path}: {error}") from error


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    def source(s: Source) -> dict[str, Any]:
        entry: dict[str, Any] = {"expert": s.expert, "weight": s.weight}
        return entry if s.permutation is None else entry | {"permutation": list(s.permutation)}

    return {
        "layer": layer.layer,
        "experts": [
            {
                "sources": [source(s) for s in e.sources],
                "channels": None if e.channels is None else list(e.channels),
            }
            for e in layer.experts
        ],
        "route": list(layer.route),
    }


def _layer_from_json(data: Mapping[str, Any]) -> LayerPlan:
    def indices(values: Sequence[int] | None) -> tuple[int, ...] | None:
        return None if values is None else tuple(int(v) for v in values)

    return LayerPlan(
        layer=int(data["layer"]),
        experts=tuple(
            NewExpert(
                tuple(
                    Source(int(s["expert"]), float(s["weight"]), indices(s.get("permutation"))) for s in e["sources"]
                ),
                indices(e["channels"]),
            )
            for e in data["experts"]
        ),
        route=tuple(None if r is None else int(r) for r in data["route"]),
    )


def validate(plan: CompressionPlan, num_experts: int | None = None, width: int | None = None) -> None:
    """Raises WinnowError where the plan contradicts itself, or does not fit a model.

    ``num_experts`` experts of ``width`` channels are in each layer of the model; None: not known, so not checked.
    """
    for layer in plan.layers:
        where = f"plan, layer {layer.layer}"
        if num_experts not in (None, len(layer.route)):
            raise WinnowError(f"{where}: it routes {len(layer.route)} experts, but the model has {num_experts}")
        if {new for new in layer.route if new is not None} != set(range(len(layer.experts))):
            raise WinnowError(f"{where}: the route must lead to every new expert and to no other")
        for index, expert in enumerate(layer.experts):
            _validate_expert(expert, f"{where}, new expert {index}", len(layer.route), width)


def _validate_expert(expert: NewExpert, where: str, num_experts: int, width: int | None) -> None:
    if not expert.sources:
        raise WinnowError(f"{where} has no source")
    for source in expert.sources:
        if not 0 <= source.expert < num_experts:
            raise WinnowError(f"{where}: old expert {source.expert} does not exist among {num_experts}")
        if not isfinite(source.weight):
            raise WinnowError(f"{where}: the weight of old expert {source.expert} is {source.weight}")
        order = source.permutation
        size = len(order or ()) if width is None else width
        if order is not None and sorted(order) != list(range(size)):
            raise WinnowError(f"{where}: old expert {source.expert} has no permutation of {size} channels")
    channels = expert.channels
    if channels is None:
        return
    if not channels or len(set(channels)) < len(channels):
        raise WinnowError(f"{where}: no channel is kept, or one is kept twice")
    last = max(channels) if width is None else width - 1
    if not 0 <= min(channels) <= max(channels) <= last:
        raise WinnowError(f"{where}: it keeps a channel outside 0 to {last}")


def prune(layer: int, num_experts: int, kept: Iterable[int]) -> LayerPlan:
    """Keep the experts ``kept`` (listed in their old order), remove the rows of the others."""
    kept = sorted(kept)
    position = {old: new for new, old in enumerate(kept)}
    return LayerPlan(
        layer,
        tuple(NewExpert((Source(old),)) for old in kept),
        tuple(position.get(j) for j in range(num_experts)),
    )


def identity(layer: int, num_experts: int) -> LayerPlan:
    return prune(layer, num_experts, range(num_experts))


def compose(first: CompressionPlan, second: CompressionPlan, width: int | None = None) -> CompressionPlan:
    """The plan that does what ``first`` and then ``second`` do, ``second`` being made for what ``first`` leaves.

    So ``second`` numbers the new experts of ``first``, and its channels are those that ``first`` kept, in that order;
    ``second.route[j]`` is where the rows now lead that ``first`` led to its new expert j. ``width`` (the channels of an
    old expert) is needed only where experts that kept different channels are merged. Raises WinnowError where the
    plans do not fit each other.
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
    experts = tuple(_compose_expert(first, new, width) for new in second.experts)
    return LayerPlan(first.layer, experts, tuple(None if j is None else second.route[j] for j in first.route))


def _compose_expert(first: LayerPlan, new: NewExpert, width: int | None) -> NewExpert:
    between = [(share, first.experts[share.expert]) for share in new.sources]
    kept = {old.channels for _, old in between}
    in_place = all(share.permutation is None for share, _ in between)
    if kept != {None} and not (in_place and len(kept) == 1):
        return _compose_selections(between, new.channels, first.layer, width)
    sources = tuple(
        Source(old.expert, share.weight * old.weight, _through(share.permutation, old.permutation))
        for share, expert in between
        for old in expert.sources
    )
    return NewExpert(sources, _through(new.channels, kept.pop()))


def _compose_selections(
    between: list[tuple[Source, NewExpert]], channels: tuple[int, ...] | None, layer: int, width: int | None
) -> NewExpert:
    """Sources whose channels differ: each gets a permutation that begins with its own channels."""
    selected = [
        (old.expert, share.weight * old.weight, _through(_through(share.permutation, expert.channels), old.permutation))
        for share, expert in between
        for old in expert.sources
    ]
    if len(selected) == 1:
        expert, weight, order = selected[0]
        return NewExpert((Source(expert, weight),), _through(channels, order))
    if width is None:
        raise WinnowError(f"plans cannot be composed without the width: layer {layer} merges different channels")
    orders = [tuple(range(width)) if order is None else order for _, _, order in selected]
    if len({len(order) for order in orders}) > 1:
        raise WinnowError(f"plans cannot be composed: layer {layer} merges experts of different widths")
    sources = tuple(
        Source(expert, weight, order + tuple(sorted(set(range(width)) - set(order))))
        for (expert, weight, _), order in zip(selected, orders, strict=True)
    )
    return NewExpert(sources, _through(channels, tuple(range(len(orders[0])))))


def _through(outer: tuple[int, ...] | None, inner: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Place i of the result is ``inner[outer[i]]``; None is every place as it is."""
    if outer is None or inner is None:
        return inner if outer is None else outer
    return tuple(inner[place] for place in outer)
