"""What the router of a layer answers once rows of it are removed: by its own code, of whatever family it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.checkpoints.experts import router_biases
from harness.checkpoints.offload import forward_replaced, weights_at_hand
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
        return _skeleton(AutoConfig.from_pretrained(folder, local_files_only=True))

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
            # A bias that is not the router's own lies in the block, which hands it over.
            named = _answer(router, family, own, (hidden, *left.values()), len(index))
            return named["gates"].double().numpy(), named["indices"].numpy()

        return routing

    return read


class RoutersOf:
    """The routers of ``model``, whose architecture is ``family``: meanwhile they may answer as if rows were gone."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self._family, self._twin = family, _skeleton(model.config)
        config = model.config.to_dict()
        layers, self._experts = family.moe_layers(config), family.num_experts(config)
        self._routers = {layer: moe_block(model, family, layer).router for layer in layers}
        self._weights = {layer: weights_of(router) for layer, router in self._routers.items()}

    @contextmanager
    def keeping(self, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
        """Meanwhile the model is the one that a plan leaves which keeps the experts ``kept[layer]`` alone.

        Routers choose among these rows by their own code, so that every kind of them does what it does in the pruned
        checkpoint; experts are called by their old numbers. Logits of the other rows are the lowest number there is.
        """
        with ExitStack() as stack:
            for layer, experts in kept.items():
                twin, weights = moe_block(self._twin, self._family, layer).router, self._weights[layer]
                answer = restricted(twin, weights, self._family, experts, self._experts)
                stack.enter_context(forward_replaced(self._routers[layer], answer))
            yield


def restricted(
    router: Any, weights: Mapping[str, Tensor], family: Family, kept: Sequence[int], experts: int
) -> Callable[..., tuple[Tensor, ...]]:
    """A forward for a router of ``experts`` experts with these ``weights`` by which it has but the rows ``kept``.

    The code is that of ``router``, another module of the same class, which is changed. Experts are called by their old
    numbers; the logits of those that are gone are the lowest number there is.
    """
    index = torch.tensor(list(kept), device=next(iter(weights.values())).device)

    def rows(name: str, tensor: Tensor) -> Tensor:
        if _leaf(name) in map(_leaf, family.router_tensors):
            return tensor[index]
        return tensor[..., index] if _leaf(name) in map(_leaf, family.router_biases) else tensor

    own = {name: rows(name, tensor) for name, tensor in weights.items()}

    def forward(hidden: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
        """``biases`` lie in the block, which hands them over."""
        left = (None if bias is None else bias[..., index] for bias in biases)
        named = _answer(router, family, own, (hidden, *left), len(index))
        logits = named["logits"]
        named["logits"] = logits.new_full((*logits.shape[:-1], experts), torch.finfo(logits.dtype).min)
        named["logits"][..., index] = logits
        named["indices"] = index[named["indices"]]
        return tuple(named[name] for name in family.router_output)

    return forward


def _skeleton(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()  # some routers add noise while they are trained


def _answer(
    router: Any, family: Family, own: Mapping[str, Tensor], inputs: Sequence[Tensor | None], count: int
) -> dict[str, Tensor]:
    """What ``router`` says with the weights ``own`` of ``count`` experts."""
    router.num_experts = count  # group-limited routers reshape by it
    return dict(zip(family.router_output, functional_call(router, dict(own), tuple(inputs)), strict=True))


def weights_of(router: Any) -> dict[str, Tensor]:
    """Copies of what a checkpoint holds of it, by the names in the module."""
    found: dict[str, Tensor] = {}
    for prefix, module in router.named_modules():
        with weights_at_hand(module):
            stored = module.state_dict(keep_vars=False)
            found |= {f"{prefix}.{name}".lstrip("."): tensor.clone() for name, tensor in stored.items()}
    return found


def _leaf(name: str) -> str:
    """Checkpoints and modules name the path to a parameter differently, but not the parameter."""
    return name.rpartition(".")[2]
