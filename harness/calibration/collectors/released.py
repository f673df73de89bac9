"""The moving averages of coverage's released code, of documents in the place of its batches, in the order of the pass.

A step takes an average from v to 0.9 v + 0.1 x; the first value of an expert begins it, and an expert that a document
is not routed to keeps what it has. So any run of steps is v -> decay * v + from_zero, which is what parts of a corpus
are put together by (``harness.calibration.merge``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.collected import AffineStep
from harness.calibration.collectors.collector import by_group, zeros
from harness.calibration.collectors.coverage import channel_squares
from harness.calibration.collectors.events import BlockOutput, PairActivations, WeightedOutputs
from harness.calibration.fused_experts import FusedExperts

_DECAY, _QUANTILE = 0.9, 0.99


@dataclass
class MovingAverage:
    """The average ``name`` of every expert: its ``value`` (E, ...), and what its steps do to a value before them.

    ``decay`` (E,) is below 1 for the experts that have begun; ``from_zero`` is like ``value``.
    """

    name: ClassVar[str]
    experts: FusedExperts
    value: Tensor = field(init=False)
    from_zero: Tensor = field(init=False)
    decay: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.value, self.from_zero = zeros(self.name, self.experts), zeros(self.name, self.experts)
        self.decay = torch.ones(len(self.value), dtype=torch.float64, device=self.value.device)

    def step(self, value: Tensor, routed: Tensor) -> None:
        """``value`` like ``self.value``; ``routed`` (E,) bool are the experts that take the step."""
        decay = torch.where(routed, _DECAY, 1.0).double()
        first = routed & (self.decay == 1.0)
        shape = (-1, *[1] * (value.dim() - 1))
        for average, kept in ((self.value, decay.masked_fill(first, 0.0)), (self.from_zero, decay)):
            average.mul_(kept.view(shape)).add_(value * (1.0 - kept.view(shape)))
        self.decay *= decay

    @property
    def affine(self) -> AffineStep:
        return AffineStep(self.decay.cpu().numpy(), self.from_zero.cpu().numpy())

    def running(self) -> Mapping[str, Tensor]:
        return {self.name: self.value}

    def arrays(self) -> dict[str, np.ndarray]:
        return {self.name: self.value.cpu().numpy()}


@dataclass
class ReleasedActivation(MovingAverage):
    """``released_activation``: of each document, the mean of the three roots of ``channel_square_sum``."""

    name: ClassVar[str] = "released_activation"
    sees: ClassVar[tuple[type, ...]] = (PairActivations,)

    def add(self, event: PairActivations) -> None:
        for mine, counts, _ in event.pairs.documents:
            bounds = counts.cumsum(0).tolist()
            squares = channel_squares(event.gate_up[mine], event.activations[mine], bounds, self.experts)
            self.step(squares.sqrt().mean(1), counts > 0)


@dataclass
class ReleasedAttribution(MovingAverage):
    """``released_attribution``: of each document, its clipped attribution over its tokens.

    The weighted outputs (S, H) and their sums m (N, H) wait for |y_t|.
    """

    name: ClassVar[str] = "released_attribution"
    sees: ClassVar[tuple[type, ...]] = (WeightedOutputs, BlockOutput)
    waiting: tuple[Tensor, Tensor] | None = None

    def add(self, event: WeightedOutputs | BlockOutput) -> None:
        if isinstance(event, WeightedOutputs):
            self.waiting = event.weighted, event.combined
            return
        if self.waiting is None:
            return
        (weighted, combined), self.waiting = self.waiting, None
        for mine, counts, tokens in event.pairs.documents:
            along = combined[event.pairs.token[mine]] * event.scale[mine].unsqueeze(1)
            self.step(_clipped_sums(weighted[mine] * along, counts.cumsum(0).tolist()) / tokens, counts > 0)


def _clipped_sums(terms: Tensor, bounds: Sequence[int]) -> Tensor:
    """(E,) float64: the sum of every expert's rows of ``terms`` (S, H), clipped."""
    return by_group(bounds, lambda group: _clipped(terms[group]).sum(dtype=torch.float64))


def _clipped(terms: Tensor) -> Tensor:
    """``terms`` (n, H), each column within its own 99 % quantile of absolute values where n > 2."""
    if len(terms) <= 2:
        return terms
    place = _QUANTILE * (len(terms) - 1)
    below = int(place)
    largest = terms.abs().topk(len(terms) - below, dim=0).values  # cheaper than torch.quantile, which sorts all
    limit = torch.lerp(largest[-1], largest[-2], place - below)
    return terms.clamp(-limit, limit)
