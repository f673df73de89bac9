"""What coverage pruning reads of the calibration pass: attribution and channel scores, without a backward pass.

Scaling the outputs of all routed experts by alpha moves the decoder layer's output y_t by (alpha - 1) m_t, where m_t is
what the routed experts add to it. So the gradient of the relative squared error along an expert's output is a constant
times g_tj m_t / |y_t|^2, and one ordinary forward pass holds all that attribution needs
(``harness.contracts.statistics``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.collectors.collector import by_group, column_squares, zeros
from harness.calibration.collectors.events import BlockOutput, PairActivations, WeightedOutputs
from harness.calibration.fused_experts import FusedExperts


def input_square_sum(event: PairActivations, experts: FusedExperts) -> Tensor:
    pairs = event.pairs
    return by_group(pairs.bounds, lambda group: column_squares(event.hidden[pairs.token[group]]))


def channel_square_sum(event: PairActivations, experts: FusedExperts) -> Tensor:
    return channel_squares(event.gate_up, event.activations, event.pairs.bounds, experts)


def channel_squares(gate_up: Tensor, activations: Tensor, bounds: Sequence[int], experts: FusedExperts) -> Tensor:
    """(E, 3, I): of every expert's rows, the squares of gate output, up output and activations, summed."""
    gate, up = experts.gate_and_up(by_group(bounds, lambda group: column_squares(gate_up[group])))
    inside = by_group(bounds, lambda group: column_squares(activations[group]))
    return torch.stack([gate, up, inside], dim=1)


@dataclass
class Attribution:
    """``attribution_sum``; g_tj <m_t, f_j> (S,) waits for |y_t|."""

    sees: ClassVar[tuple[type, ...]] = (WeightedOutputs, BlockOutput)
    experts: FusedExperts
    total: Tensor = field(init=False)
    waiting: Tensor | None = None

    def __post_init__(self) -> None:
        self.total = zeros("attribution_sum", self.experts)

    def add(self, event: WeightedOutputs | BlockOutput) -> None:
        if isinstance(event, WeightedOutputs):
            precise = torch.promote_types(event.combined.dtype, torch.float32)
            products = torch.bmm(event.slots.to(precise), event.combined.to(precise).unsqueeze(2))
            self.waiting = products.reshape(-1)[event.pairs.order]
        elif self.waiting is not None:
            products, self.waiting = self.waiting, None
            self.total.index_add_(0, event.pairs.expert, products.double() * event.scale.double())

    def running(self) -> Mapping[str, Tensor]:
        return {"attribution_sum": self.total}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"attribution_sum": self.total.cpu().numpy()}


@dataclass
class ChannelSaliency:
    """``channel_saliency_sum``; |g_tj h_tjc <m_t, d_jc>| (S, I) waits for |y_t|."""

    sees: ClassVar[tuple[type, ...]] = (WeightedOutputs, BlockOutput)
    experts: FusedExperts
    total: Tensor = field(init=False)
    waiting: Tensor | None = None

    def __post_init__(self) -> None:
        self.total = zeros("channel_saliency_sum", self.experts)

    def add(self, event: WeightedOutputs | BlockOutput) -> None:
        pairs = event.pairs
        if isinstance(event, WeightedOutputs):
            channels = self.experts.back_through_down(event.combined[pairs.token], pairs.ends)
            channels.mul_(event.activations).mul_(pairs.gate.to(channels.dtype).unsqueeze(1)).abs_()
            self.waiting = channels
        elif self.waiting is not None:
            rows, self.waiting = self.waiting, None
            scale = event.scale
            self.total += by_group(pairs.bounds, lambda group: scale[group] @ rows[group].to(scale.dtype)).double()

    def running(self) -> Mapping[str, Tensor]:
        return {"channel_saliency_sum": self.total}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"channel_saliency_sum": self.total.cpu().numpy()}
