"""The experts of one layer in transformers' fused layout: their sizes, and their matrix products on sorted rows.

The products follow the implementation that loading chose for the model: grouped where it is "grouped_mm", else one
expert after the other, which runs with every dtype and width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from harness.checkpoints.offload import device_of

_ALL = slice(None)


@dataclass(frozen=True)
class FusedExperts:
    """E experts of I channels over H hidden dimensions.

    Rows x (S, ...) are sorted by expert; ``ends`` (E,) int32 says where the rows of each expert end.
    """

    module: Any

    @property
    def num_experts(self) -> int:
        return int(self.module.num_experts)

    @property
    def hidden(self) -> int:
        return self.module.down_proj.shape[2 if self.module.is_transposed else 1]

    @property
    def width(self) -> int:
        return self.module.down_proj.shape[1 if self.module.is_transposed else 2]

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    def gate_up(self, x: Tensor, ends: Tensor, expert: Tensor | slice, which: slice = _ALL) -> Tensor:
        """(S, 2I) gate and up outputs of rows x (S, H); ``expert`` (S,) is the expert of each row.

        ``which`` are the experts that take part, all by default; ``ends`` and ``expert`` count among these.
        """
        module = self.module
        bias = module.gate_up_proj_bias[which][expert] if module.has_bias else None
        return self._linear(x, module.gate_up_proj[which], ends, bias, module.is_transposed)

    def gate_and_up(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The columns (..., 2I) of ``gate_up`` apart, each (..., I)."""
        if self.module.is_concatenated:
            gate, up = columns.chunk(2, dim=-1)
            return gate, up
        return columns[..., ::2], columns[..., 1::2]

    def activations(self, gate_up: Tensor) -> Tensor:
        """(S, I): what goes into the down projection."""
        return self.module._apply_gate(gate_up)

    def down(self, activations: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
        """(S, H): the outputs of the experts."""
        module = self.module
        bias = module.down_proj_bias[expert] if module.has_bias else None
        return self._linear(activations, module.down_proj, ends, bias, module.is_transposed)

    def back_through_down(self, outputs: Tensor, ends: Tensor) -> Tensor:
        """(S, I): inner products of rows (S, H) with each column of their expert's down projection."""
        return self._linear(outputs, self.module.down_proj, ends, None, not self.module.is_transposed)

    def down_in_float64(self, expert: int, activations: Tensor) -> Tensor:
        """(H,): the output of one expert for ``activations`` (I,) float64."""
        module = self.module
        weight = module.down_proj[expert].detach().double()
        output = activations @ weight if module.is_transposed else weight @ activations
        return output + module.down_proj_bias[expert].detach().double() if module.has_bias else output

    def outputs_of_all(self, x: Tensor) -> Tensor:
        """(E, n, H): the output of every expert for every row of x (n, H), n > 0."""
        count = self.num_experts
        expert = torch.arange(count, device=x.device).repeat_interleave(len(x))
        ends = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * len(x)
        activations = self.activations(self.gate_up(x.repeat(count, 1), ends, expert))
        return self.down(activations, ends, expert).view(count, len(x), -1)

    def _linear(self, x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        if self.module.config._experts_implementation == "grouped_mm":
            return _grouped_linear(x, weight, ends, bias, transposed)
        by_column = weight if transposed else weight.transpose(-2, -1)
        output = torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), by_column, ends)
        return output if bias is None else output.add_(bias)
