"""Of all tokens, whatever they are routed to: the mean output of every expert, and the products of their inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.collectors.events import AllTokens
from harness.calibration.fused_experts import FusedExperts

_CHUNK = 4096  # tokens that one expert sees at once: bounds the memory


def input_gram(event: AllTokens, experts: FusedExperts) -> Tensor:
    rows = event.real.to(torch.promote_types(event.real.dtype, torch.float32))
    return (rows.T @ rows).double()


@dataclass
class OutputMean:
    """``output_mean``, the cheap way: the down projection is linear, so it can wait for the mean of what goes into it.

    ``sums`` (E, I) are those of each expert's activations before its down projection.
    """

    sees: ClassVar[tuple[type, ...]] = (AllTokens,)
    experts: FusedExperts
    sums: Tensor = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        shape = (self.experts.num_experts, self.experts.width)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=self.experts.device)

    def add(self, event: AllTokens) -> None:
        self.tokens += event.layout.tokens
        for expert in range(len(self.sums)):
            only = slice(expert, expert + 1)
            for chunk in event.real.split(_CHUNK):
                end = torch.full((1,), len(chunk), dtype=torch.int32, device=chunk.device)
                gate_up = self.experts.gate_up(chunk, end, slice(None), only)
                self.sums[expert] += self.experts.activations(gate_up).sum(0, dtype=torch.float64)

    def running(self) -> Mapping[str, Tensor]:
        return {"output_mean": self.sums}

    def arrays(self) -> dict[str, np.ndarray]:
        mean = self.sums / self.tokens
        outputs = [self.experts.down_in_float64(expert, mean[expert]) for expert in range(len(mean))]
        return {"output_mean": torch.stack(outputs).cpu().numpy()}
