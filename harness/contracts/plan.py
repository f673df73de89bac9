"""The CompressionPlan: what every method returns, and how it is checked.

How it is stored is in ``harness.contracts.plan_files``, how two are put together in ``harness.contracts.composition``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import numpy as np

from harness.errors import WinnowError


@dataclass(frozen=True, eq=False)
class Array:
    """Numbers of a plan: float32 or float64. Two are equal where shape, dtype and every number are."""

    values: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return self.values.dtype == other.values.dtype and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.values.shape, self.values.tobytes()))


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
class LowRank:
    """``left`` (H, r) times ``right`` (r, H) times the layer's input x (H,), plus ``shift`` (H,) where there is one."""

    left: Array
    right: Array
    shift: Array | None = None

    @property
    def rank(self) -> int:
        return self.right.values.shape[0]


@dataclass(frozen=True)
class NewExpert:
    """One of three kinds.

    - A *combination*: a weighted sum of old experts, ``sources``, of which only ``channels`` (``None``: all of them)
      are kept, in that order. ``down`` (H, kept channels), where there is one, stands in the place of its down
      projection.
    - A *constant*: ``constant`` (H,) is its output for every token. It has no sources.
    - A *low-rank* map of the layer's input, ``low_rank``. With sources it is added to what they compute.
    """

    sources: tuple[Source, ...] = ()
    channels: tuple[int, ...] | None = None
    down: Array | None = None
    constant: Array | None = None
    low_rank: LowRank | None = None

    @property
    def is_whole(self) -> bool:
        """It is one old expert as it was."""
        return self == NewExpert((Source(self.sources[0].expert),)) if self.sources else False


@dataclass(frozen=True)
class LayerPlan:
    """``route[j]`` is the new expert that the old router row j now leads to, or None: the row is removed.

    ``router`` (rows that stay, H), where there is one, stands in the place of these rows of the router's matrix, in the
    order of the old ones.
    """

    layer: int
    experts: tuple[NewExpert, ...]
    route: tuple[int | None, ...]
    router: Array | None = None

    @property
    def is_pruning(self) -> bool:
        """No two router rows lead to the same new expert, so the layer is an ordinary, smaller MoE layer."""
        kept = [new for new in self.route if new is not None]
        return sorted(kept) == list(range(len(self.experts)))


@dataclass(frozen=True)
class CompressionPlan:
    layers: tuple[LayerPlan, ...]


def validate(
    plan: CompressionPlan, num_experts: int | None = None, width: int | None = None, hidden: int | None = None
) -> None:
    """Raises WinnowError where the plan contradicts itself, or does not fit a model.

    ``num_experts`` experts of ``width`` channels over ``hidden`` dimensions are in each layer of the model; None: not
    known, so not checked.
    """
    for layer in plan.layers:
        where = f"plan, layer {layer.layer}"
        if num_experts not in (None, len(layer.route)):
            raise WinnowError(f"{where}: it routes {len(layer.route)} experts, but the model has {num_experts}")
        if {new for new in layer.route if new is not None} != set(range(len(layer.experts))):
            raise WinnowError(f"{where}: the route must lead to every new expert and to no other")
        for index, expert in enumerate(layer.experts):
            _validate_expert(expert, f"{where}, new expert {index}", len(layer.route), width, hidden)
        if layer.router is not None:
            rows = sum(new is not None for new in layer.route)
            _validate_array(layer.router, f"{where}: its router", (rows, hidden))
        if layer.experts and not any(expert.sources for expert in layer.experts):
            raise WinnowError(f"{where}: no expert is left, only what replaces experts")


def _validate_expert(expert: NewExpert, where: str, num_experts: int, width: int | None, hidden: int | None) -> None:
    if expert.constant is not None:
        if expert.sources or expert.channels is not None or expert.down is not None or expert.low_rank is not None:
            raise WinnowError(f"{where} is a constant, and can have nothing else")
        _validate_array(expert.constant, f"{where}: its constant", (hidden,))
        return
    if expert.low_rank is not None:
        low, rank = expert.low_rank, expert.low_rank.rank
        _validate_array(low.left, f"{where}: its left factor", (hidden, rank))
        _validate_array(low.right, f"{where}: its right factor", (rank, hidden))
        if low.shift is not None:
            _validate_array(low.shift, f"{where}: its shift", (hidden,))
        if not expert.sources:
            if expert.channels is not None or expert.down is not None:
                raise WinnowError(f"{where} maps the layer's input, and can have no channels")
            return
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
    if expert.down is not None:
        kept = width if channels is None else len(channels)
        _validate_array(expert.down, f"{where}: its down projection", (hidden, kept))
    if channels is None:
        return
    if not channels or len(set(channels)) < len(channels):
        raise WinnowError(f"{where}: no channel is kept, or one is kept twice")
    last = max(channels) if width is None else width - 1
    if not 0 <= min(channels) <= max(channels) <= last:
        raise WinnowError(f"{where}: it keeps a channel outside 0 to {last}")


def _validate_array(array: Array, what: str, shape: tuple[int | None, ...]) -> None:
    found = array.values.shape
    fits = len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))
    if not fits or not all(found):
        wanted = " x ".join("?" if size is None else str(size) for size in shape)
        raise WinnowError(f"{what} has shape {found}, not {wanted}")
    if array.values.dtype not in (np.float32, np.float64):
        raise WinnowError(f"{what} is {array.values.dtype}, not float32 or float64")
    if not np.isfinite(array.values).all():
        raise WinnowError(f"{what} is not finite")


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
