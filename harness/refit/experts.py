"""New experts of a plan, made from the intact experts of the layer while these are in memory.

T tokens, k top-k, H hidden size, I channels of an old expert, d of a new one. All is float32, or float64 where the
model is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.calibration.fused_experts import FusedExperts
from harness.contracts.plan import Array, NewExpert, Source

CHUNK = 8192  # tokens at once


@dataclass(frozen=True)
class Choices:
    """What each token chooses: ``expert`` and ``gate`` (T, k); expert -1 is nothing."""

    expert: Tensor
    gate: Tensor

    def of(self, expert: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tokens that choose ``expert``, of ``among`` (T,) bool, and the sum of their gate values for it."""
        chosen = self.expert == expert
        some = chosen.any(1) if among is None else chosen.any(1) & among
        tokens = torch.nonzero(some).squeeze(1)
        return tokens, (self.gate[tokens] * chosen[tokens]).sum(1)

    def led(self, route: Sequence[int | None]) -> "Choices":
        """The same by new experts; ``route`` as in a ``LayerPlan``."""
        places = torch.tensor([-1 if new is None else new for new in route], device=self.expert.device)
        return Choices(places[self.expert], self.gate)


@dataclass(frozen=True)
class Expert:
    """``down`` (H, d) times ``hidden``, plus ``rest``. ``gate_up`` (2d, H) is in the order of the model's own."""

    module: FusedExperts
    gate_up: Tensor | None
    gate_up_bias: Tensor | None
    down: Tensor | None
    shift: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def hidden(self, x: Tensor) -> Tensor:
        """(n, d): what goes into the down projection for rows x (n, H)."""
        assert self.gate_up is not None
        return self.module.activations(linear(x, self.gate_up, self.gate_up_bias))

    def rest(self, x: Tensor) -> Tensor | None:
        """(n, H): what it gives besides; None for nothing."""
        low = None if self.left is None or self.right is None else linear(linear(x, self.right), self.left)
        if self.shift is None:
            return low
        return self.shift.expand(len(x), -1) if low is None else low + self.shift

    def output(self, x: Tensor) -> Tensor:
        """(n, H)"""
        rest = self.rest(x)
        if self.down is None:
            assert rest is not None
            return rest
        out = linear(self.hidden(x), self.down)
        return out if rest is None else out + rest


class Experts:
    """The intact experts of a layer, and what a plan makes of them as a checkpoint in the format ``stored`` has it."""

    def __init__(self, module: FusedExperts, stored: torch.dtype) -> None:
        self.fused, self.stored = module, stored
        own = module.module.down_proj.dtype
        self.dtype = torch.float64 if own == torch.float64 else torch.float32

    def old(self, expert: int) -> Expert:
        return self.new(NewExpert((Source(expert),)))

    def new(self, expert: NewExpert) -> Expert:
        """Sums of sources are rounded to the stored format, as applying the plan does."""
        low = expert.low_rank
        left, right = (None, None) if low is None else (self._tensor(low.left), self._tensor(low.right))
        shift = expert.constant if low is None else low.shift
        rest = None if shift is None else self._tensor(shift)
        if not expert.sources:
            return Expert(self.fused, None, None, None, rest, left, right)
        module = self.fused.module
        first, second = (2, 1) if module.is_transposed else (1, 2)
        gate_up, gate_up_bias = self._sum(expert, module.gate_up_proj, first, 2), None
        down = self._sum(expert, module.down_proj, second, 1) if expert.down is None else self._tensor(expert.down)
        if module.is_transposed:
            gate_up, down = gate_up.T, down.T if expert.down is None else down
        if module.has_bias:
            gate_up_bias = self._sum(expert, module.gate_up_proj_bias, 1, 2)
            bias = self._sum(expert, module.down_proj_bias, None, 1)
            rest = bias if rest is None else rest + bias
        return Expert(self.fused, gate_up, gate_up_bias, down, rest, left, right)

    def array(self, values: Tensor) -> Array:
        """For a plan."""
        return Array(values.to(self.dtype).cpu().contiguous().numpy())

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array.values).to(self.fused.device, self.stored).to(self.dtype)

    def _sum(self, expert: NewExpert, stack: Tensor, axis: int | None, count: int) -> Tensor:
        """Of the sources' parts of ``stack`` (E, ...), whose ``axis`` has ``count`` places a channel."""
        parts = [(source.weight, self._arranged(expert, source, stack, axis, count)) for source in expert.sources]
        weight, part = parts[0]
        if len(parts) == 1 and weight == 1.0:
            return part.to(self.dtype)
        exact = torch.float32 if self.stored in (torch.bfloat16, torch.float16) else torch.float64
        total = torch.zeros(part.shape, dtype=exact, device=part.device)
        for weight, part in parts:
            total.add_(part.to(exact), alpha=weight)
        return total.to(self.stored).to(self.dtype)

    def _arranged(self, expert: NewExpert, source: Source, stack: Tensor, axis: int | None, count: int) -> Tensor:
        part, order = stack[source.expert], source.permutation
        if expert.channels is not None:
            order = tuple(c if source.permutation is None else source.permutation[c] for c in expert.channels)
        if order is None or axis is None:
            return part
        channels = torch.tensor(order, device=part.device)
        if count > 1 and self.fused.module.is_concatenated:
            places = torch.cat([channels + place * self.fused.width for place in range(count)])
        else:
            places = (channels.unsqueeze(1) * count + torch.arange(count, device=part.device)).reshape(-1)
        return part.index_select(axis - 1, places)


def rows(hidden: Tensor, tokens: Tensor, like: Experts) -> Iterator[tuple[slice, Tensor]]:
    """The rows ``tokens`` of ``hidden`` (T, H), some at once, on the experts' device; and which of them they are."""
    for start in range(0, len(tokens), CHUNK):
        some = slice(start, min(start + CHUNK, len(tokens)))
        yield some, hidden[tokens[some].to(hidden.device)].to(like.fused.device, like.dtype)


def mixture(made: Sequence[NewExpert], experts: Experts, choices: Choices, hidden: Tensor) -> Tensor:
    """(T, H): the sum over each token's experts of gate value times output."""
    total = torch.zeros(hidden.shape, dtype=experts.dtype, device=experts.fused.device)
    for place, new in enumerate(made):
        tokens, gates = choices.of(place)
        if not len(tokens):
            continue
        expert = experts.new(new)
        for some, x in rows(hidden, tokens, experts):
            total.index_add_(0, tokens[some], gates[some].unsqueeze(1).to(experts.dtype) * expert.output(x))
    return total
