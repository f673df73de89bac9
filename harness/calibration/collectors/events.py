"""What the collectors of an MoE layer are shown, in the order in which a batch brings it about.

N positions of a batch with padding, T without, S routed token-expert pairs; k top-k, E experts, H hidden size, I
channels. What several collectors read is computed when the first of them asks for it, and never if none does.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from harness.calibration.batches import BatchLayout
from harness.calibration.collectors.collector import by_group, column_moments

_EPSILON = 1e-6  # added to |y_t|^2, as in coverage's released code


@dataclass(frozen=True, eq=False)
class BatchStart:
    layout: BatchLayout


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """``inputs`` (..., H) go into the router; ``logits`` (N, E) are raw, ``gates`` and ``indices`` (N, k) of the
    selected experts. ``sigmoid``: the router takes the sigmoid of a logit, not a softmax of all of them."""

    inputs: Tensor
    logits: Tensor
    gates: Tensor
    indices: Tensor
    layout: BatchLayout
    sigmoid: bool = False

    @cached_property
    def real_logits(self) -> Tensor:
        """(T, E)"""
        return self.layout.without_padding(self.logits)

    @cached_property
    def scores(self) -> Tensor:
        """(T, E) full softmax of the logits, or their sigmoids, in float32 or better."""
        precise = torch.promote_types(self.real_logits.dtype, torch.float32)
        if self.sigmoid:
            return torch.sigmoid(self.real_logits.to(precise))
        return torch.softmax(self.real_logits, dim=-1, dtype=precise)

    @cached_property
    def best(self) -> Tensor:
        """(T, 1) the expert with the largest gate value of each token."""
        gates, indices = (self.layout.without_padding(values) for values in (self.gates, self.indices))
        return indices.gather(1, gates.argmax(dim=1, keepdim=True))


@dataclass(frozen=True, eq=False)
class RoutedPairs:
    """The routed token-expert pairs of a batch, sorted by expert, without padding.

    ``expert``, ``token`` (a position) and ``gate`` are (S,), ``order`` (S,) is the pair's place among all N * k slots,
    ``ends`` (E,) where each expert's pairs end.
    """

    expert: Tensor
    token: Tensor
    gate: Tensor
    order: Tensor
    ends: Tensor
    layout: BatchLayout

    @cached_property
    def bounds(self) -> list[int]:
        """``ends`` in the host's memory."""
        return self.ends.tolist()

    @cached_property
    def documents(self) -> list[tuple[Tensor, Tensor, int]]:
        """Of each document: its pairs, still sorted by expert; how many each expert has (E,); its tokens."""
        found = []
        for start, end in self.layout.documents:
            mine = torch.nonzero((self.token >= start) & (self.token < end)).squeeze(1)
            found.append((mine, torch.bincount(self.expert[mine], minlength=len(self.ends)), end - start))
        return found


@dataclass(frozen=True, eq=False)
class PairActivations:
    """``hidden`` (N, H) goes into the experts; ``gate_up`` (S, 2I) and ``activations`` (S, I) come before the down
    projection."""

    pairs: RoutedPairs
    hidden: Tensor
    gate_up: Tensor
    activations: Tensor


@dataclass(frozen=True, eq=False)
class PairOutputs:
    """``output`` (S, H): f_j(x_t) of each pair; ``hidden`` (N, H) goes into the experts, ``activations`` (S, I) into
    their down projections."""

    pairs: RoutedPairs
    output: Tensor
    hidden: Tensor
    activations: Tensor

    @cached_property
    def norms(self) -> Tensor:
        """(S,) float64 L2 norms, added up in float32 or better."""
        precise = torch.promote_types(self.output.dtype, torch.float32)
        return torch.linalg.vector_norm(self.output, dim=1, dtype=precise).double()

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """(E, H) float64 each: sums of the outputs and of their squares over the tokens of each expert."""
        both = by_group(self.pairs.bounds, lambda group: column_moments(self.output[group]))
        return both[:, 0], both[:, 1]


@dataclass(frozen=True, eq=False)
class AllTokens:
    """``hidden`` (N, H) goes into the experts, of every token whatever it is routed to."""

    hidden: Tensor
    layout: BatchLayout

    @cached_property
    def real(self) -> Tensor:
        """(T, H)"""
        return self.layout.without_padding(self.hidden)


@dataclass(frozen=True, eq=False)
class WeightedOutputs:
    """``weighted`` (S, H) is gate value times output, ``slots`` (N, k, H) the same by position, ``combined`` (N, H)
    their sums: m_t, what the routed experts add to the layer's output."""

    pairs: RoutedPairs
    activations: Tensor
    weighted: Tensor
    slots: Tensor
    combined: Tensor


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """``output`` (N, H) of the decoder layer that the experts are in; the last event of a batch."""

    pairs: RoutedPairs
    output: Tensor

    @cached_property
    def scale(self) -> Tensor:
        """(S,) 1 / (|y_t|^2 + 1e-6) of each pair's token, in float32 or better."""
        precise = torch.promote_types(self.output.dtype, torch.float32)
        norms = torch.linalg.vector_norm(self.output, dim=1, dtype=precise)
        return (1.0 / (norms.square() + _EPSILON))[self.pairs.token]


Event = (
    BatchStart | RouterOutput | RoutedPairs | PairActivations | PairOutputs | AllTokens | WeightedOutputs | BlockOutput
)
