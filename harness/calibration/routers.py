"""What the router of a layer answers once rows of it are removed: by its own code, of whatever family it is."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.checkpoints.experts import router_biases
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.statistics import Routing
from harness.families.family import Family
from harness.families.moe_block import moe_block


def router_reader(folder: Path, family: Family) -> Callable[[int, np.ndarray], Routing]:
    """A function (layer, inputs (T, H)) -> the layer's ``Routing`` of these inputs, in float32.

    The router's rows are read when it is called. ``folder`` is a plain checkpoint.
    """

    @cache
    def skeleton() -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()  # some routers add noise while they are trained

    def read(layer: int, inputs: np.ndarray) -> Routing:
        reader = CheckpointReader(folder)
        rows = {_leaf(name): reader.tensor(name.format(layer=layer)).float() for name in family.router_tensors}
        biases = {_leaf(name): reader.tensor(name).float() for name in router_biases(reader, family, layer)}
        router = moe_block(skeleton(), family, layer).router
        hidden = torch.from_numpy(inputs).float()

        @torch.inference_mode()
        def routing(kept: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            index = torch.tensor(list(kept))
            left = {leaf: tensor[index] for leaf, tensor in rows.items()}
            left |= {leaf: tensor[..., index] for leaf, tensor in biases.items()}
            own = {name: left.pop(_leaf(name)) for name in router.state_dict()}
            router.num_experts = len(index)  # group-limited routers reshape by it
            # A bias that is not the router's own lies in the block, which hands it over.
            output = functional_call(router, own, (hidden, *left.values()))
            named = dict(zip(family.router_output, output, strict=True))
            return named["gates"].double().numpy(), named["indices"].numpy()

        return routing

    return read


def _leaf(name: str) -> str:
    """Checkpoints and modules name the path to a parameter differently, but not the parameter."""
    return name.rpartition(".")[2]
