"""What a collector is, and the one that most statistics need: a sum of one term an event."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from harness.calibration.fused_experts import FusedExperts
from harness.contracts.statistics import STATISTICS


class Collector(Protocol):
    """Collects one or more statistics of one MoE layer from the events that it sees. Sums are float64."""

    @property
    def sees(self) -> tuple[type, ...]:
        """The types of events (``harness.calibration.collectors.events``) that ``add`` is given."""
        ...

    def add(self, event: Any) -> None: ...

    def running(self) -> Mapping[str, Tensor]:
        """By statistic, what turns NaN or infinite where the statistic does."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """The finished statistics, as ``STATISTICS`` declares them. The layer's weights are at hand."""
        ...


# (event, experts) -> what the event adds, of the statistic's shape
Term = Callable[[Any, FusedExperts], Tensor]


@dataclass
class Sum:
    """The statistic ``name``: the sum of ``term`` over all events of type ``event``."""

    name: str
    event: type
    term: Term
    experts: FusedExperts
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = zeros(self.name, self.experts)

    @property
    def sees(self) -> tuple[type, ...]:
        return (self.event,)

    def add(self, event: Any) -> None:
        self.total += self.term(event, self.experts)

    def running(self) -> Mapping[str, Tensor]:
        return {self.name: self.total}

    def arrays(self) -> dict[str, np.ndarray]:
        return {self.name: self.total.cpu().numpy()}


def zeros(name: str, experts: FusedExperts) -> Tensor:
    """Float64, of the shape that the statistic ``name`` is declared with."""
    sizes = STATISTICS[name].sizes(experts.num_experts, experts.hidden, experts.width)
    return torch.zeros(sizes, dtype=torch.float64, device=experts.device)


def sum_by_expert(expert: Tensor, values: Tensor, num_experts: int) -> Tensor:
    """(E,) float64: ``values`` (S,) summed by ``expert`` (S,)."""
    return torch.zeros(num_experts, dtype=torch.float64, device=values.device).index_add_(0, expert, values)


def by_group(bounds: Sequence[int], reduce: Callable[[slice], Tensor]) -> Tensor:
    """``reduce`` of every expert's slice of rows that are sorted by expert, stacked; ``bounds`` (E,) are their ends."""
    return torch.stack([reduce(slice(start, end)) for start, end in zip([0, *bounds[:-1]], bounds, strict=True)])


def column_squares(rows: Tensor) -> Tensor:
    """(C,) float64: the sum of squares in each column of ``rows`` (n, C)."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=0, dtype=precise).double().square()


def column_moments(rows: Tensor) -> Tensor:
    """(2, C) float64: sum and sum of squares in each column of ``rows`` (n, C).

    About the columns' means, which are put back in float64: so a variance, in which they cancel, keeps its digits.
    """
    if not len(rows):
        return torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device)
    precise = torch.promote_types(rows.dtype, torch.float32)
    middle = rows.mean(0, dtype=precise)
    around = rows - middle
    middle, rest = middle.double(), around.sum(0, dtype=precise).double()
    squares = column_squares(around) + middle * (2 * rest + len(rows) * middle)
    return torch.stack([len(rows) * middle + rest, squares])
