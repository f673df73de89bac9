"""Plans for tests, and what a compressed model computes, too simply to be wrong: slow float64 loops for routers of one
kind, and the stock model changed by hand for any family.
"""

import math
import random
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from harness.contracts.plan import Array, CompressionPlan, LayerPlan, LowRank, NewExpert, Source, identity, prune
from tests.brute_force import moe_blocks

RENORMALISED = {"qwen3_moe": True, "mixtral": True, "olmoe": False}


def pruned(*kept: list[int], num_experts: int = 8) -> CompressionPlan:
    """One list of kept experts a layer."""
    return CompressionPlan(tuple(prune(layer, num_experts, keep) for layer, keep in enumerate(kept)))


def merged_layer(
    layer: int, groups: list[list[int]], width: int = 16, permute: bool = False, removed: tuple[int, ...] = ()
) -> LayerPlan:
    """Every group one expert, weights unequal; ``permute`` shuffles the channels of all sources but one."""
    shuffle = random.Random(layer)
    experts = []
    for group in groups:
        shares = [1.0 + 0.5 * place for place in range(len(group))]
        sources = [
            Source(
                old,
                share / sum(shares),
                tuple(shuffle.sample(range(width), width)) if permute and place else None,
            )
            for place, (old, share) in enumerate(zip(group, shares, strict=True))
        ]
        experts.append(NewExpert(tuple(sources)))
    leads_to = {old: new for new, group in enumerate(groups) for old in group}
    rows = range(sum(map(len, groups)))
    return LayerPlan(layer, tuple(experts), tuple(None if j in removed else leads_to[j] for j in rows))


def merged(*groups: list[list[int]], permute: bool = False) -> CompressionPlan:
    return CompressionPlan(tuple(merged_layer(i, g, permute=permute) for i, g in enumerate(groups)))


def sliced(plan: CompressionPlan, *channels: list[int]) -> CompressionPlan:
    """The same plan with only ``channels[layer]`` kept in every expert."""
    return CompressionPlan(
        tuple(
            LayerPlan(p.layer, tuple(NewExpert(e.sources, tuple(c)) for e in p.experts), p.route)
            for p, c in zip(plan.layers, channels, strict=True)
        )
    )


def narrowed(plan: CompressionPlan, *widths: list[int | None], width: int = 16) -> CompressionPlan:
    """The same plan with ``widths[layer][e]`` random channels kept in new expert e; all of them, in place, for None."""
    shuffle = random.Random(7)

    def kept(count: int | None) -> tuple[int, ...] | None:
        return None if count is None else tuple(shuffle.sample(range(width), count))

    return CompressionPlan(
        tuple(
            LayerPlan(
                p.layer,
                tuple(NewExpert(e.sources, kept(count)) for e, count in zip(p.experts, counts, strict=True)),
                p.route,
            )
            for p, counts in zip(plan.layers, widths, strict=True)
        )
    )


def ragged_plan() -> CompressionPlan:
    """Merged groups and a removed row in layer 0, five of eight rows in layer 1; experts of many widths in both."""
    merging = merged_layer(0, [[0, 3], [1], [2, 5, 7], [4, 6]], permute=True, removed=(6,))
    return narrowed(CompressionPlan((merging, prune(1, 8, [0, 2, 3, 6, 7]))), [5, None, 12, 1], [4, 9, 4, 13, 8])


def constants_plan(hidden: int, size: float = 0.5) -> CompressionPlan:
    """Rows of three experts of eight lead to constants of their own in layer 0, of two in layer 1; others are whole."""
    draw = np.random.default_rng(3)

    def layer(number: int, pruned: set[int]) -> LayerPlan:
        def new(old: int) -> NewExpert:
            values = (draw.normal(size=hidden) * size).astype(np.float32)
            return NewExpert(constant=Array(values)) if old in pruned else NewExpert((Source(old),))

        return LayerPlan(number, tuple(map(new, range(8))), tuple(range(8)))

    return CompressionPlan((layer(0, {1, 4, 6}), layer(1, {0, 7})))


def standins_plan(hidden: int, size: float = 0.5) -> CompressionPlan:
    """Layer 0: merged, narrowed and whole experts, a constant that two rows share, maps with and without a shift and a
    base (one that no row leads to directly), a member whose row is removed, and a removed row. Layer 1: constants alone
    beside whole experts."""
    draw = np.random.default_rng(4)

    def array(*shape: int) -> Array:
        return Array((draw.normal(size=shape) * size / shape[-1] ** 0.5).astype(np.float32))

    def low(rank: int, shift: bool) -> LowRank:
        return LowRank(array(hidden, rank), array(rank, hidden), array(hidden) if shift else None)

    experts = (
        NewExpert((Source(0, 0.75), Source(3, 0.25))),
        NewExpert(low_rank=low(3, True)),
        NewExpert(constant=array(hidden)),
        NewExpert((Source(5),), channels=(4, 1, 7, 9, 2)),
        NewExpert((Source(6),), low_rank=low(2, False)),
    )
    first = LayerPlan(0, experts, (0, 1, 2, None, 2, 3, 4, None))
    return CompressionPlan((first, constants_plan(hidden, size).layers[1]))


def identity_plan(layers: int = 2, num_experts: int = 8) -> CompressionPlan:
    return CompressionPlan(tuple(identity(layer, num_experts) for layer in range(layers)))


def at_layers(plan: CompressionPlan, layers: list[int]) -> CompressionPlan:
    """The same plan for these layers instead of 0, 1, ..."""
    return CompressionPlan(tuple(replace(p, layer=layer) for p, layer in zip(plan.layers, layers, strict=True)))


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def brute_force_logits(original: PreTrainedModel, plan: CompressionPlan) -> torch.Tensor:
    """float64 logits of ``original`` (which becomes float64 and is changed) compressed by ``plan``.

    A token chooses the top-k of the rows that are left; y is the sum over the new experts of the summed gate
    values of the chosen rows that lead there, times the new expert's output.
    """
    model = original.double()
    top_k = model.config.num_experts_per_tok
    renormalised = RENORMALISED[model.config.model_type]
    for layer in plan.layers:
        block = model.model.layers[layer.layer].mlp
        router = block.gate.weight.detach().tolist()
        matrices = [_new_expert(block.experts, expert) for expert in layer.experts]

        def forward(hidden, layer=layer, router=router, matrices=matrices):
            flat = hidden.reshape(-1, hidden.shape[-1])
            out = torch.zeros_like(flat)
            for t, x in enumerate(flat):
                left = {j: float(x @ torch.tensor(router[j], dtype=x.dtype))
                        for j, new in enumerate(layer.route) if new is not None}  # fmt: skip
                total = sum(math.exp(r) for r in left.values())
                chosen = sorted(left, key=lambda j: -left[j])[:top_k]
                gates = {j: math.exp(left[j]) / total for j in chosen}
                if renormalised:
                    gates = {j: g / sum(gates.values()) for j, g in gates.items()}
                for new, (gate, up, down) in enumerate(matrices):
                    share = sum(g for j, g in gates.items() if layer.route[j] == new)
                    if share:
                        inner = gate @ x
                        out[t] += share * (down @ (inner * torch.sigmoid(inner) * (up @ x)))
            return out.reshape(hidden.shape)

        block.forward = forward
    return logits(model)


def _new_expert(experts, new: NewExpert) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width, hidden = experts.down_proj.shape[2], experts.down_proj.shape[1]
    gate = torch.zeros(width, hidden, dtype=torch.float64)
    up, down = gate.clone(), gate.T.clone()
    for source in new.sources:
        fused, old_down = (
            experts.gate_up_proj[source.expert].detach(),
            experts.down_proj[source.expert].detach(),
        )
        for c in range(width):
            old = c if source.permutation is None else source.permutation[c]
            gate[c] += source.weight * fused[old]
            up[c] += source.weight * fused[width + old]
            down[:, c] += source.weight * old_down[:, old]
    kept = list(range(width)) if new.channels is None else list(new.channels)
    return gate[kept], up[kept], down[:, kept]


def compressed_by_hand(model: PreTrainedModel, plan: CompressionPlan) -> PreTrainedModel:
    """``model`` itself, stock code and shapes, computing what ``plan`` asks for.

    Every old expert takes the weights of the new one that its row leads to, with zeros where a channel is dropped; no
    removed row is ever chosen.
    """
    blocks = moe_blocks(model)
    with torch.no_grad():
        for layer in plan.layers:
            block = blocks[layer.layer]
            old = {name: tensor.detach().double().clone() for name, tensor in block.experts.named_parameters()}
            for row, new in enumerate(layer.route):
                if new is not None:
                    _become(block.experts, old, row, layer.experts[new])
            mask = torch.tensor([-torch.inf if new is None else 0.0 for new in layer.route])
            _mask_rows(block.router, mask)
            parent = next(m for m in model.modules() if block.experts in m.children())
            for name, bias in [*parent.named_buffers(), *parent.named_parameters()]:
                if name.endswith(("correction_bias", "expert_bias")):  # these add to the scores after the logits
                    bias.add_(mask)
    return model


def _become(experts, old: dict[str, torch.Tensor], row: int, new: NewExpert) -> None:
    width = old["down_proj"].shape[1 if experts.is_transposed else 2]

    def by_channel(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A view (matrices, channels, ...) of one expert's tensor."""
        if name.startswith("down"):
            return (tensor if experts.is_transposed else tensor.T)[None]
        first = tensor.T if experts.is_transposed and tensor.dim() == 2 else tensor
        if experts.is_concatenated:
            return first.unflatten(0, (2, width))
        return first.unflatten(0, (width, 2)).transpose(0, 1)

    for name, parameter in experts.named_parameters():
        total = torch.zeros_like(old[name][row])
        for source in new.sources:
            share = source.weight * old[name][source.expert]
            if name == "down_proj_bias":
                total += share
                continue
            for channel in range(width) if new.channels is None else new.channels:
                before = channel if source.permutation is None else source.permutation[channel]
                by_channel(name, total)[:, channel] += by_channel(name, share)[:, before]
        parameter[row] = total.to(parameter.dtype)


def _mask_rows(router: torch.nn.Module, mask: torch.Tensor) -> None:
    """The router's own forward, in which ``mask`` is added to the logits: the product with its weight."""
    linear, own = torch.nn.functional.linear, router.forward

    def forward(*args):
        torch.nn.functional.linear = lambda *operands: linear(*operands) + mask
        try:
            return own(*args)
        finally:
            torch.nn.functional.linear = linear

    router.forward = forward
