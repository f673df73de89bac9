"""The one way to the modules of an MoE layer: its router, its experts, and the decoder layer that they are in."""

from dataclasses import dataclass
from typing import Any

from harness.families.family import Family


@dataclass(frozen=True)
class MoeBlock:
    """The modules of one MoE layer of a transformers model; ``block`` holds ``router`` and ``experts``.

    ``shared_experts`` and ``shared_gate`` are None where the layer has none.
    """

    decoder_layer: Any
    block: Any
    router: Any
    experts: Any
    shared_experts: Any = None
    shared_gate: Any = None


def moe_block(model: Any, family: Family, layer: int) -> MoeBlock:
    """The MoE block of decoder layer ``layer`` in ``model``, whose architecture is ``family``."""
    before, _, _ = family.block.partition("{layer}")
    return moe_block_of(model.get_submodule(f"{before}{layer}"), family)


def moe_block_of(decoder_layer: Any, family: Family) -> MoeBlock:
    """The MoE block of a decoder layer, in a model or by itself."""
    block = decoder_layer.get_submodule(_inside(family.block))
    return MoeBlock(
        decoder_layer,
        block,
        block.get_submodule(family.router),
        block.get_submodule(family.experts),
        _find(decoder_layer, family.shared_experts),
        _find(decoder_layer, family.shared_gate),
    )


def replace_experts(decoder_layer: Any, experts: Any, family: Family) -> None:
    """Give the MoE block of a decoder layer other routed experts."""
    setattr(moe_block_of(decoder_layer, family).block, family.experts, experts)


def _inside(path: str) -> str:
    """The part of a module path that lies inside of the decoder layer."""
    return path.partition("{layer}.")[2]


def _find(decoder_layer: Any, path: str | None) -> Any:
    try:
        return None if path is None else decoder_layer.get_submodule(_inside(path))
    except AttributeError:  # settings of the model may leave them out
        return None
