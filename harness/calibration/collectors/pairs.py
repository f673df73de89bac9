"""Statistics of the routed token-expert pairs: how many there are, their gate values and the norms of the outputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.collectors.collector import by_group, column_squares, sum_by_expert, zeros
from harness.calibration.collectors.events import PairActivations, PairOutputs, RoutedPairs
from harness.calibration.fused_experts import FusedExperts


def gate_sum(pairs: RoutedPairs, experts: FusedExperts) -> Tensor:
    return sum_by_expert(pairs.expert, pairs.gate.double(), experts.num_experts)


def ean_sum(event: PairOutputs, experts: FusedExperts) -> Tensor:
    return sum_by_expert(event.pairs.expert, event.norms, experts.num_experts)


def weighted_ean_sum(event: PairOutputs, experts: FusedExperts) -> Tensor:
    return sum_by_expert(event.pairs.expert, event.norms * event.pairs.gate.double(), experts.num_experts)


def output_sum(event: PairOutputs, experts: FusedExperts) -> Tensor:
    return event.moments[0]


def output_square_sum(event: PairOutputs, experts: FusedExperts) -> Tensor:
    return event.moments[1]


def gate_square_sum(pairs: RoutedPairs, experts: FusedExperts) -> Tensor:
    return sum_by_expert(pairs.expert, pairs.gate.double().square(), experts.num_experts)


def gate_square_output_sum(event: PairOutputs, experts: FusedExperts) -> Tensor:
    pairs = event.pairs
    precise = torch.promote_types(event.output.dtype, torch.float32)

    def weighted(group: slice) -> Tensor:
        return (pairs.gate[group].to(precise).square() @ event.output[group].to(precise)).double()

    return by_group(pairs.bounds, weighted)


def difference_square_sum(event: PairOutputs, experts: FusedExperts) -> Tensor:
    pairs = event.pairs
    return by_group(pairs.bounds, lambda group: column_squares(event.hidden[pairs.token[group]] - event.output[group]))


def input_sum(event: PairActivations, experts: FusedExperts) -> Tensor:
    pairs = event.pairs
    return by_group(pairs.bounds, lambda group: event.hidden[pairs.token[group]].sum(0, dtype=torch.float64))


def channel_sum(event: PairActivations, experts: FusedExperts) -> Tensor:
    return by_group(event.pairs.bounds, lambda group: event.activations[group].sum(0, dtype=torch.float64))


@dataclass
class Usage:
    """``frequency``, and beside it ``counts`` (sources, E): the same by source of the text."""

    sees: ClassVar[tuple[type, ...]] = (RoutedPairs,)
    experts: FusedExperts
    sources: int
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.sources, self.experts.num_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=self.experts.device)

    def add(self, pairs: RoutedPairs) -> None:
        cells = pairs.layout.source[pairs.token] * self.counts.shape[1] + pairs.expert
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def running(self) -> Mapping[str, Tensor]:
        return {}  # counts are finite

    def arrays(self) -> dict[str, np.ndarray]:
        return {"frequency": self.counts.sum(0).double().cpu().numpy()}


@dataclass
class MaxActivation:
    """``max_activation``: a maximum instead of a sum."""

    sees: ClassVar[tuple[type, ...]] = (PairOutputs,)
    experts: FusedExperts
    largest: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.largest = zeros("max_activation", self.experts)

    def add(self, event: PairOutputs) -> None:
        largest = event.output.amax(dim=1).double()
        self.largest.scatter_reduce_(0, event.pairs.expert, largest, reduce="amax", include_self=True)

    def running(self) -> Mapping[str, Tensor]:
        return {"max_activation": self.largest}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"max_activation": self.largest.cpu().numpy()}


@dataclass
class TokenIds:
    """``token_ids``: marks instead of a sum."""

    name: ClassVar[str] = "token_ids"
    sees: ClassVar[tuple[type, ...]] = (RoutedPairs,)
    experts: FusedExperts
    vocabulary: int
    seen: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.experts.num_experts, self.vocabulary)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=self.experts.device)

    def add(self, pairs: RoutedPairs) -> None:
        self.seen[pairs.expert, pairs.layout.ids[pairs.token]] = True

    def running(self) -> Mapping[str, Tensor]:
        return {}  # marks are finite

    def arrays(self) -> dict[str, np.ndarray]:
        return {self.name: self.seen.cpu().numpy()}
