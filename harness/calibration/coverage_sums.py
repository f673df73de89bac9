"""What coverage pruning reads of the calibration pass: attribution and channel scores, without a backward pass.

Scaling the outputs of all routed experts by alpha moves the decoder layer's output y_t by (alpha - 1) m_t, where m_t is
what the routed experts add to it. So the gradient of the relative squared error along an expert's output is a constant
times g_tj m_t / |y_t|^2, and one ordinary forward pass holds all that attribution needs
(``harness.contracts.statistics``)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

_EPSILON = 1e-6  # added to |y_t|^2, as in the released code
_DECAY, _QUANTILE = 0.9, 0.99
_NEED_OUTPUT = frozenset({"attribution_sum", "channel_saliency_sum", "released_attribution"})
NAMES = _NEED_OUTPUT | {"channel_square_sum", "input_square_sum", "released_activation"}


@dataclass(frozen=True)
class RoutedPairs:
    """The S routed token-expert pairs of a batch, sorted by expert.

    ``expert``, ``token`` (a position) and ``gate`` are (S,), ``order`` (S,) is the pair's place among all N * k slots,
    ``ends`` (E,) where each expert's pairs end. ``documents`` are (start, end) ranges of positions.
    """

    expert: Tensor
    token: Tensor
    gate: Tensor
    order: Tensor
    ends: Tensor
    documents: tuple[tuple[int, int], ...]

    def by_document(self, num_experts: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Of each document: its pairs, still sorted by expert; how many each expert has (E,); its tokens."""
        for start, end in self.documents:
            mine = torch.nonzero((self.token >= start) & (self.token < end)).squeeze(1)
            yield mine, torch.bincount(self.expert[mine], minlength=num_experts), end - start


@dataclass(frozen=True)
class _Waiting:
    """What waits for |y_t|: g_tj <m_t, f_j> (S,), |g_tj h_tjc <m_t, d_jc>| (S, I), g_tj f_j (S, H) and m (N, H)."""

    pairs: RoutedPairs
    products: Tensor
    channels: Tensor | None
    weighted: Tensor | None
    combined: Tensor | None


@dataclass
class CoverageSums:
    """The running sums of one layer with E experts, for the statistics ``names``.

    ``seen`` (E,) tells by name of a moving average for which experts it has begun.
    """

    experts: Any  # the block's experts module, of transformers' fused layout
    names: frozenset[str]
    sums: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    waiting: _Waiting | None = None

    def __post_init__(self) -> None:
        down = self.experts.down_proj
        self.num_experts, width, hidden = down.shape if self.experts.is_transposed else down.transpose(1, 2).shape
        shapes: dict[str, tuple[int, ...]] = {
            "attribution_sum": (),
            "channel_square_sum": (3, width),
            "input_square_sum": (hidden,),
            "channel_saliency_sum": (width,),
            "released_attribution": (),
            "released_activation": (width,),
        }
        for name in self.names:
            shape = (self.num_experts, *shapes[name])
            self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=down.device)
            self.seen[name] = torch.zeros(self.num_experts, dtype=torch.bool, device=down.device)

    def add_activations(self, pairs: RoutedPairs, hidden: Tensor, gate_up: Tensor, activations: Tensor) -> None:
        """``hidden`` (N, H) goes in; ``gate_up`` (S, 2I) and ``activations`` (S, I) precede the down projection."""
        ends = pairs.ends.tolist()
        if "input_square_sum" in self.names:
            self.sums["input_square_sum"] += _by_group(ends, lambda group: _column_squares(hidden[pairs.token[group]]))
        if "channel_square_sum" in self.names:
            self.sums["channel_square_sum"] += self._channel_squares(gate_up, activations, ends)
        if "released_activation" in self.names:
            for mine, counts, _ in pairs.by_document(self.num_experts):
                squares = self._channel_squares(gate_up[mine], activations[mine], counts.cumsum(0).tolist())
                self._average("released_activation", squares.sqrt().mean(1), counts > 0)

    def _channel_squares(self, gate_up: Tensor, activations: Tensor, ends: Sequence[int]) -> Tensor:
        """(E, 3, I) of gate output, up output and activations of every expert's rows."""
        outside = _by_group(ends, lambda group: _column_squares(gate_up[group]))
        gate, up = outside.chunk(2, 1) if self.experts.is_concatenated else (outside[:, ::2], outside[:, 1::2])
        inside = _by_group(ends, lambda group: _column_squares(activations[group]))
        return torch.stack([gate, up, inside], dim=1)

    def add_outputs(
        self, pairs: RoutedPairs, activations: Tensor, weighted: Tensor, slots: Tensor, combined: Tensor
    ) -> None:
        """``weighted`` (S, H) are gate value times output, ``slots`` (N, k, H) the same by position, ``combined``
        (N, H) their sums.
        """
        if not self.names & _NEED_OUTPUT:
            return
        precise = torch.promote_types(combined.dtype, torch.float32)
        products = torch.bmm(slots.to(precise), combined.to(precise).unsqueeze(2)).reshape(-1)[pairs.order]
        channels = None
        if "channel_saliency_sum" in self.names:
            backwards = not self.experts.is_transposed
            channels = _grouped_linear(combined[pairs.token], self.experts.down_proj, pairs.ends, None, backwards)
            channels.mul_(activations).mul_(pairs.gate.to(channels.dtype).unsqueeze(1)).abs_()
        clipped = "released_attribution" in self.names
        self.waiting = _Waiting(pairs, products, channels, weighted if clipped else None, combined if clipped else None)

    def add_block_output(self, output: Tensor) -> None:
        """``output`` (N, H) of the decoder layer."""
        if self.waiting is None:
            return
        waiting, pairs, self.waiting = self.waiting, self.waiting.pairs, None
        precise = torch.promote_types(output.dtype, torch.float32)
        norms = torch.linalg.vector_norm(output, dim=1, dtype=precise)
        scale = 1.0 / (norms.square() + _EPSILON)
        by_pair = scale[pairs.token]
        if "attribution_sum" in self.names:
            self.sums["attribution_sum"].index_add_(0, pairs.expert, waiting.products.double() * by_pair.double())
        if waiting.channels is not None:
            rows, ends = waiting.channels, pairs.ends.tolist()
            total = _by_group(ends, lambda group: by_pair[group] @ rows[group].to(precise))
            self.sums["channel_saliency_sum"] += total.double()
        if waiting.weighted is not None and waiting.combined is not None:
            for mine, counts, tokens in pairs.by_document(self.num_experts):
                along = waiting.combined[pairs.token[mine]] * by_pair[mine].unsqueeze(1)
                sums = _clipped_sums(waiting.weighted[mine] * along, counts.cumsum(0).tolist())
                self._average("released_attribution", sums / tokens, counts > 0)

    def _average(self, name: str, value: Tensor, routed: Tensor) -> None:
        """The released code's moving average, of documents in the place of its batches, in the order of the pass.

        The first value of an expert begins it; an expert that is not ``routed`` (E,) to keeps what it has.
        """
        keep = torch.where(self.seen[name], _DECAY, 0.0).double().masked_fill(~routed, 1.0)
        keep = keep.view(-1, *[1] * (value.dim() - 1))
        self.sums[name].mul_(keep).add_(value * (1.0 - keep))
        self.seen[name] |= routed


def _clipped_sums(terms: Tensor, ends: Sequence[int]) -> Tensor:
    """(E,) float64: the sum of every expert's rows of ``terms`` (S, H), clipped."""
    return _by_group(ends, lambda group: _clipped(terms[group]).sum(dtype=torch.float64))


def _clipped(terms: Tensor) -> Tensor:
    """``terms`` (n, H), each column within its own 99 % quantile of absolute values where n > 2."""
    if len(terms) <= 2:
        return terms
    place = _QUANTILE * (len(terms) - 1)
    below = int(place)
    largest = terms.abs().topk(len(terms) - below, dim=0).values  # cheaper than torch.quantile, which sorts all
    limit = torch.lerp(largest[-1], largest[-2], place - below)
    return terms.clamp(-limit, limit)


def _column_squares(rows: Tensor) -> Tensor:
    """(C,) float64: the sum of squares in each column of ``rows`` (n, C)."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=0, dtype=precise).double().square()


def _by_group(ends: Sequence[int], reduce: Callable[[slice], Tensor]) -> Tensor:
    """``reduce`` of every expert's slice of pairs that are sorted by expert, stacked."""
    return torch.stack([reduce(slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)])
