"""Of a sample of tokens, what the loss of any subset of a layer's experts is computed from (see ``methods.naee``)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.contracts.statistics import sampled_tokens


class SampledTokens:
    """Router inputs, and inner products of the outputs of all experts, of tokens evenly spaced over the pass.

    ``tokens`` are those of the whole pass, in the order in which it sees them: it does not depend on the batch size.
    ``positions`` are the flat positions of the sampled tokens in the batch that was started last.
    """

    def __init__(self, experts: Any, tokens: int) -> None:
        count = min(tokens, sampled_tokens(int(experts.num_experts)))
        self.wanted = torch.arange(count, device=experts.down_proj.device) * tokens // max(count, 1)
        self.positions = self.wanted[:0]
        self.seen = 0
        self.inputs: list[Tensor] = []
        self.grams: list[Tensor] = []

    def start_batch(self, real: Tensor) -> None:
        """``real`` (N,) bool is False on padding."""
        flat = real.nonzero().squeeze(1)
        here = (self.wanted >= self.seen) & (self.wanted < self.seen + len(flat))
        self.positions = flat[self.wanted[here] - self.seen]
        self.seen += len(flat)

    def add_inputs(self, hidden: Tensor) -> None:
        """``hidden`` (..., H): what the router was given in this batch."""
        self.inputs.append(hidden.reshape(-1, hidden.shape[-1])[self.positions].double().cpu())

    def add_outputs(self, outputs: Tensor) -> None:
        """``outputs`` (E, n, H) of every expert for the next n sampled tokens."""
        by_token = outputs.transpose(0, 1).double()
        self.grams.append((by_token @ by_token.transpose(1, 2)).cpu())

    def arrays(self) -> dict[str, np.ndarray]:
        """``sampled_inputs`` and ``sampled_output_gram``, whichever were added."""
        found = {}
        if self.inputs:
            found["sampled_inputs"] = torch.cat(self.inputs).numpy()
        if self.grams:
            found["sampled_output_gram"] = torch.cat(self.grams).permute(1, 2, 0).contiguous().numpy()
        return found
