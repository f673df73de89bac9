"""A layer's plan applied to the layer in memory, for what the next one is given."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.calibration.fused_experts import FusedExperts
from harness.calibration.routers import restricted, weights_of
from harness.checkpoints.offload import forward_replaced
from harness.contracts.plan import LayerPlan, NewExpert
from harness.families.family import Family
from harness.families.moe_block import MoeBlock
from harness.refit.experts import Expert, Experts


@contextmanager
def applied(block: MoeBlock, plan: LayerPlan, family: Family, top_k: int, stored: torch.dtype) -> Iterator[None]:
    """Meanwhile the block computes what it will in the checkpoint, of the format ``stored``, that ``plan`` makes of it.

    The plan has combinations of all channels alone. Experts are written over and do not come back: the weights of the
    layer are read anew for whoever needs them. Tokens choose ``top_k`` experts.
    """
    rows = [row for row, new in enumerate(plan.route) if new is not None]
    experts = Experts(FusedExperts(block.experts), stored)
    made = {place: experts.new(new) for place, new in enumerate(plan.experts) if _is_new(plan, place, new)}
    for row in rows:
        place = plan.route[row]
        if place in made:
            _write(block, row, made[place])
    twin = copy.deepcopy(block.router)
    twin.top_k = top_k
    with forward_replaced(block.router, restricted(twin, weights_of(block.router), family, rows, len(plan.route))):
        yield


def _is_new(plan: LayerPlan, place: int, new: NewExpert) -> bool:
    """A row that leads to it has something else."""
    led = [row for row, to in enumerate(plan.route) if to == place]
    return not (new.is_whole and led == [new.sources[0].expert])


def _write(block: MoeBlock, row: int, expert: Expert) -> None:
    module = block.experts
    assert expert.gate_up is not None and expert.down is not None
    with torch.no_grad():
        module.gate_up_proj[row].copy_(expert.gate_up.T if module.is_transposed else expert.gate_up)
        module.down_proj[row].copy_(expert.down.T if module.is_transposed else expert.down)
        if module.has_bias:
            assert expert.gate_up_bias is not None and expert.shift is not None
            module.gate_up_proj_bias[row].copy_(expert.gate_up_bias)
            module.down_proj_bias[row].copy_(expert.shift)
