"""Of a sample of tokens, what the loss of any subset of a layer's experts is computed from (see ``methods.naee``)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from harness.calibration.batches import evenly_spaced
from harness.calibration.collected import Part
from harness.calibration.collectors.events import AllTokens, BatchStart, RouterOutput
from harness.calibration.fused_experts import FusedExperts
from harness.contracts.statistics import sampled_tokens

_INPUTS, _GRAM = "sampled_inputs", "sampled_output_gram"
_CHUNK = 16  # tokens of which the outputs of all experts are held at once


@dataclass
class SampledTokens:
    """Router inputs, and inner products of the outputs of all experts, of tokens evenly spaced over the whole pass.

    Which tokens they are hangs on their order in the pass, not on the batch size nor on the part of the corpus that
    this pass sees. ``positions`` are their flat positions in the batch that was started last.
    """

    provides: ClassVar[frozenset[str]] = frozenset({_INPUTS, _GRAM})
    sees: ClassVar[tuple[type, ...]] = (BatchStart, RouterOutput, AllTokens)
    names: frozenset[str]
    experts: FusedExperts
    part: Part
    wanted: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    seen: int = field(init=False)
    inputs: list[Tensor] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        total, experts = self.part.total, self.experts.num_experts
        self.wanted = evenly_spaced(total, sampled_tokens(experts)).to(self.experts.device)
        self.positions, self.seen = self.wanted[:0], self.part.offset
        if _GRAM in self.names:
            self.grams.append(torch.zeros(0, experts, experts, dtype=torch.float64))

    def add(self, event: BatchStart | RouterOutput | AllTokens) -> None:
        if isinstance(event, BatchStart):
            self._find_positions(event.layout.real)
        elif isinstance(event, RouterOutput):
            if _INPUTS in self.names:
                self.inputs.append(event.inputs.reshape(-1, event.inputs.shape[-1])[self.positions].double().cpu())
        elif _GRAM in self.names and len(self.positions):
            for chunk in event.hidden[self.positions].split(_CHUNK):
                by_token = self.experts.outputs_of_all(chunk).transpose(0, 1).double()
                self.grams.append((by_token @ by_token.transpose(1, 2)).cpu())

    def _find_positions(self, real: Tensor) -> None:
        """``real`` (N,) bool is False on padding."""
        flat = real.nonzero().squeeze(1)
        here = (self.wanted >= self.seen) & (self.wanted < self.seen + len(flat))
        self.positions = flat[self.wanted[here] - self.seen]
        self.seen += len(flat)

    def running(self) -> Mapping[str, Tensor]:
        return {}  # token by token in the host's memory, not sums

    def arrays(self) -> dict[str, np.ndarray]:
        found = {}
        if _INPUTS in self.names:
            found[_INPUTS] = torch.cat(self.inputs).numpy()
        if _GRAM in self.names:
            found[_GRAM] = torch.cat(self.grams).permute(1, 2, 0).contiguous().numpy()
        return found
