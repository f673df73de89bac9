"""Moments of inputs, outputs and channels of chosen experts, for a method that looks a second time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.collectors.events import PairOutputs
from harness.calibration.fused_experts import FusedExperts
from harness.contracts.second_pass import Look, Moments

NAMES = tuple(each.name for each in fields(Moments))


@dataclass
class LookedAt:
    """Collects the ``Moments`` that ``look`` asks for, under the names of their fields.

    Products are of a batch's rows in float32 or better; sums are float64.
    """

    sees: ClassVar[tuple[type, ...]] = (PairOutputs,)
    experts: FusedExperts
    look: Look
    totals: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        look, hidden, width = self.look, self.experts.hidden, self.experts.width
        count, rank = len(look.experts), look.rank
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (), "inputs": (hidden,), "outputs": (hidden,), "channels": (width,), "coordinates": (rank,),
            "input_square": (), "output_square": (), "products": (rank, rank), "mixed": (width, rank),
        }  # fmt: skip
        device = self.experts.device
        self.totals = {name: torch.zeros((count, *shapes[name]), dtype=torch.float64, device=device) for name in NAMES}
        self._inputs = torch.from_numpy(look.inputs).to(device)
        self._outputs = torch.from_numpy(look.outputs).to(device)
        self._basis = None if look.basis is None else torch.from_numpy(look.basis).to(device)

    def add(self, event: PairOutputs) -> None:
        precise = torch.promote_types(event.output.dtype, torch.float32)
        starts = [0, *event.pairs.bounds]
        basis = None if self._basis is None else self._basis.to(precise)
        for place, expert in enumerate(self.look.experts):
            group = slice(starts[expert], starts[expert + 1])
            if group.start == group.stop:
                continue
            x = event.hidden[event.pairs.token[group]].to(precise) - self._inputs[place].to(precise)
            f = event.output[group].to(precise) - self._outputs[place].to(precise)
            h = event.activations[group].to(precise)
            z = x if basis is None else x @ basis
            gate = event.pairs.gate[group].to(precise).unsqueeze(1)
            weight = gate.square() if self.look.gate_squared else torch.ones_like(gate)
            weighted = weight * z
            found = {
                "weight": weight.sum(dtype=torch.float64),
                "inputs": (weight * x).sum(0),
                "outputs": (weight * f).sum(0),
                "channels": (weight * h).sum(0),
                "coordinates": weighted.sum(0),
                "input_square": (weight * x.square()).sum(dtype=torch.float64),
                "output_square": (weight * f.square()).sum(dtype=torch.float64),
                "products": z.T @ weighted,
                "mixed": h.T @ weighted,
            }
            for name, value in found.items():
                self.totals[name][place] += value.double()

    def running(self) -> Mapping[str, Tensor]:
        return self.totals

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: total.cpu().numpy() for name, total in self.totals.items()}
