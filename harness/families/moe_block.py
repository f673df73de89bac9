"""The one way to the modules of an MoE layer: its router, its experts, and the decoder layer that they are in."""

from dataclasses import dataclass
from typing import Any

from harness.families.family import Family


@dataclass(frozen=True)
class MoeBlock:
    """The modules of one MoE layer of a transformers model; ``block`` holds ``router`` and ``experts``."""

    layer: int
    decoder_layer: Any
    block: Any
    router: Any
    experts: Any


def moe_block(model: Any, family: Family, layer: int) -> MoeBlock:
    """The MoE block of decoder layer ``layer`` in ``model``, whose architecture is ``family``."""
    path = family.block.format(layer=layer)
    block = model.get_submodule(path)
    return MoeBlock(
        layer,
        model.get_submodule(path.rpartition(".")[0]),
        block,
        block.get_submodule(family.router),
        block.get_submodule(family.experts),
    )
