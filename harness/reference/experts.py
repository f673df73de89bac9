"""Training-time experts for CPUs: the same function as transformers' experts, computed expert by expert.

One expert's tokens fit into the processor's cache, so nothing of the size (tokens x top-k, hidden) is ever written to
memory, and the gate value is applied to the narrow hidden activation instead of the wide output.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _RoutedExperts(torch.autograd.Function):
    """y[t] = sum over the slots s of token t of g[s] * down_e(silu(gate_e(x)) * up_e(x)), e the slot's expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        top_k, num_experts, width = indices.shape[1], gate_up.shape[0], down.shape[2]
        slots = torch.argsort(indices.reshape(-1), stable=True)
        tokens = slots // top_k
        counts = torch.bincount(indices.reshape(-1), minlength=num_experts).tolist()
        slot_gates = gates.reshape(-1)[slots]
        projected = x.new_empty(len(slots), 2 * width)
        y = torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                start += count
                torch.mm(x[tokens[part]], gate_up[expert].t(), out=projected[part])
                gate, up = projected[part].chunk(2, dim=1)
                h = F.silu(gate).mul_(up).mul_(slot_gates[part, None])
                y.index_add_(0, tokens[part], h @ down[expert].t())
        ctx.save_for_backward(x, gate_up, down, projected, slots, slot_gates)
        ctx.counts, ctx.top_k, ctx.gates_shape = counts, top_k, gates.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, gate_up, down, projected, slots, slot_gates = ctx.saved_tensors
        tokens = slots // ctx.top_k
        dx, d_slot_gates = torch.zeros_like(x), torch.empty_like(slot_gates)
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        start = 0
        for expert, count in enumerate(ctx.counts):
            if not count:
                continue
            part = slice(start, start + count)
            start += count
            rows, g = tokens[part], slot_gates[part, None]
            gate, up = projected[part].chunk(2, dim=1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            h = silu * up
            dye = dy[rows]
            dh = dye @ down[expert]
            d_slot_gates[part] = (dh * h).sum(dim=1)
            torch.mm(dye.t(), h * g, out=d_down[expert])
            dh.mul_(g)
            d_silu = sigmoid + silu * (1 - sigmoid)
            d_projected = torch.cat((dh * up * d_silu, dh * silu), dim=1)
            torch.mm(d_projected.t(), x[rows], out=d_gate_up[expert])
            dx.index_add_(0, rows, d_projected @ gate_up[expert])
        d_gates = torch.empty_like(d_slot_gates)
        d_gates[slots] = d_slot_gates
        return dx, d_gates.view(ctx.gates_shape), None, d_gate_up, d_down


def routed_experts(module: nn.Module, x: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    """Signature of transformers' experts implementations: x (T, H), indices and gate values (T, top-k) -> (T, H)."""
    return _RoutedExperts.apply(x, gates, indices, module.gate_up_proj, module.down_proj)
