"""What is known of one architecture: ``Family``, a row of the family table."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.contracts.shape import MoeShape
from harness.errors import WinnowError
from harness.families.tensors import ExpertTensor, separate
from harness.families.vllm_support import Served


@dataclass(frozen=True)
class Family:
    """One architecture.

    In memory (transformers 5): ``block`` is the module path of the MoE block of a decoder layer; ``router`` and
    ``experts`` are attributes of it (``harness.families.moe_block`` finds all of them); the router returns logits, gate
    values and indices in the places that ``router_output`` names. ``shared_experts`` and ``shared_gate``, where there
    are any, are the module paths of the experts that every token takes and of what weighs their output; the tensors of
    a checkpoint have the same names.

    On disk: ``expert_tensors`` hold the experts; the first dimension of ``router_tensors`` and, where a checkpoint
    has them, the last of ``router_biases`` is the expert.

    In config.json: ``*_key`` and ``*_keys`` are names (the number of experts goes by several: published Qwen3-MoE
    configs say ``num_experts``, transformers 5 writes ``num_local_experts``). A group-limited router chooses among
    the experts of the ``topk_group_key`` best of ``n_group_key`` groups, each judged by its ``judged_by`` best.
    MoE layers are those from ``first_moe_layer`` to ``last_moe_layer`` (-1: the last) whose index + 1 is a multiple
    of ``moe_layer_step``, less ``dense_layers_key``; each is a key and what transformers takes where it is absent.
    The shared experts' width is a setting of its own, or hangs on the routed experts': ``shared_count_key`` times
    that, or (``shared_is_as_wide``) the same. Latent attention caches the ``latent_keys`` instead of keys and values.
    Where config.json lists no ``layer_types``, one in ``attention_interval_key`` layers has attention, or all of them.

    ``aliases`` are model types of the same architecture that transformers does not know.
    ``sigmoid_router``: the router scores an expert by the sigmoid of its logit, not by a softmax of all logits.
    ``fixed_top_k``: its code chooses so many experts a token, whatever config.json says.
    ``served`` is None where vLLM was not tried with it.
    ``separates_packed``: documents packed into one sequence see nothing of each other, because everything that mixes
    tokens heeds positions that start again.
    """

    model_type: str
    decoder_layer: str
    router_kind: str
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    n_group_key: str | None = None
    topk_group_key: str = "topk_group"
    judged_by: int = 1
    first_moe_layer: tuple[str, int] | None = None
    last_moe_layer: tuple[str, int] | None = None
    moe_layer_step: tuple[str, int] | None = None
    dense_layers_key: str | None = None
    shared_count_key: str | None = None
    shared_is_as_wide: bool = False
    latent_keys: tuple[str, ...] = ()
    attention_interval_key: str | None = None
    separates_packed: bool = True
    aliases: tuple[str, ...] = ()
    sigmoid_router: bool = False
    fixed_top_k: bool = False
    served: Served | None = None
    block: str = "model.layers.{layer}.mlp"
    router: str = "gate"
    experts: str = "experts"
    shared_experts: str | None = None
    shared_gate: str | None = None
    router_output: tuple[str, str, str] = ("logits", "gates", "indices")
    expert_tensors: tuple[ExpertTensor, ...] = separate("mlp", "gate_proj", "up_proj", "down_proj")
    router_tensors: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)
    router_biases: tuple[str, ...] = ()

    def decoder_layer_class(self) -> type:
        module, name = self.decoder_layer.rsplit(".", 1)
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)

    def parsed(self, config: Mapping[str, Any]) -> Any:
        """The config.json as transformers' config of this model type. Raises what transformers does where it is not
        complete."""
        from transformers import CONFIG_MAPPING  # here, as it takes seconds to import

        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of a checkpoint belongs to the shared experts of a layer, or to their gate."""
        paths = (path for path in (self.shared_experts, self.shared_gate) if path)
        return any(re.match(re.escape(path).replace(r"\{layer\}", r"\d+") + r"\.", name) for path in paths)

    @property
    def stacks_experts(self) -> bool:
        """The experts of a layer share a tensor, and so a width."""
        return any(tensor.is_stacked for tensor in self.expert_tensors)

    def num_experts(self, config: Mapping[str, Any]) -> int:
        for key in self.num_experts_keys:
            if key in config:
                return positive(config, key)
        raise WinnowError(f"config.json of a {self.model_type} model has none of {', '.join(self.num_experts_keys)}")

    def top_k(self, config: Mapping[str, Any]) -> int:
        return positive(config, self.top_k_key)

    def router_groups(self, config: Mapping[str, Any]) -> int:
        """The number of groups of a group-limited router, 1 for any other."""
        return int(config.get(self.n_group_key) or 1) if self.n_group_key else 1

    def fewest_rows(self, config: Mapping[str, Any]) -> int:
        """The fewest router rows that a layer can run with: top-k, or what lets the chosen groups offer as many."""
        groups = self.router_groups(config)
        chosen_groups = min(int(config.get(self.topk_group_key) or groups), groups)
        return groups * max(self.judged_by, -(-self.top_k(config) // chosen_groups))

    def shape(self, config: Mapping[str, Any]) -> MoeShape:
        return MoeShape(
            self.num_experts(config),
            self.top_k(config),
            self.router_groups(config),
            len(self.moe_layers(config)),
            self.width(config),
            self.fewest_rows(config),
            self.stacks_experts,
        )

    def width(self, config: Mapping[str, Any]) -> int:
        """The channels of a routed expert."""
        return positive(config, self.width_key)

    def with_num_experts(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The config with every key for the number of experts set to ``count``."""
        return {key: count if key in self.num_experts_keys else value for key, value in config.items()}

    def with_top_k(self, config: Mapping[str, Any], top_k: int) -> dict[str, Any]:
        """The config of a model that chooses ``top_k`` experts a token."""
        before = config[self.top_k_key]
        return {**config, self.top_k_key: [top_k] * len(before) if isinstance(before, list) else top_k}

    def with_width(self, config: Mapping[str, Any], width: int) -> dict[str, Any] | None:
        """The config with routed experts of ``width`` channels and shared experts as they were; None if it has no such.

        Where shared experts are as wide as so many routed ones, the same width is written as more of them.
        """
        before = int(config[self.width_key])
        changed = {**config, self.width_key: width}
        if width == before:
            return changed
        if self.shared_is_as_wide:
            return None
        if self.shared_count_key and config.get(self.shared_count_key):
            count, rest = divmod(before * int(config[self.shared_count_key]), width)
            return None if rest else changed | {self.shared_count_key: count}
        return changed

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Indices of the decoder layers that are MoE layers (some models have dense ones in between)."""

        def setting(key_and_default: tuple[str, int] | None, otherwise: int) -> int:
            if key_and_default is None:
                return otherwise
            value = config.get(*key_and_default)
            return otherwise if value is None else int(value)

        count = positive(config, "num_hidden_layers")
        first, last = setting(self.first_moe_layer, 0), setting(self.last_moe_layer, -1)
        last = count - 1 if last == -1 else last
        step = setting(self.moe_layer_step, 1)
        dense = set(config.get(self.dense_layers_key) or ()) if self.dense_layers_key else set()
        return [i for i in range(count) if first <= i <= last and (i + 1) % step == 0 and i not in dense]

    def cached_elements(self, config: Mapping[str, Any]) -> int:
        """What one token leaves in the cache: 2 x key-value heads x head size in every attention layer.

        Latent attention caches its latents instead. Layers with linear attention or a convolution hold a state that
        does not grow, and count nothing. Raises WinnowError where config.json is not complete.
        """
        heads = positive(config, "num_attention_heads")
        if self.latent_keys and config.get(self.latent_keys[0]):
            elements = sum(positive(config, key) for key in self.latent_keys)
        else:
            head = config.get("head_dim") or positive(config, "hidden_size") // heads
            elements = 2 * int(config.get("num_key_value_heads") or heads) * int(head)
        return self._attention_layers(config) * elements

    def _attention_layers(self, config: Mapping[str, Any]) -> int:
        kinds = config.get("layer_types")
        if kinds:
            return sum("attention" in kind and "linear" not in kind for kind in kinds)
        interval = config.get(self.attention_interval_key) if self.attention_interval_key else None
        return positive(config, "num_hidden_layers") // int(interval or 1)


def positive(config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1 in config.json, or that of a list which says it for every layer.

    Raises WinnowError where it is absent, something else, or not the same in every layer.
    """
    value = config.get(key)
    if value is None:
        raise WinnowError(f"config.json does not describe a complete model: it has no {key}")
    each = value if isinstance(value, list) else [value]
    if not each or any(type(number) is not int or number < 1 for number in each):
        raise WinnowError(f"config.json: {key} must be a whole number of at least 1, not {value!r}")
    if len(set(each)) > 1:
        raise WinnowError(f"config.json: {key} differs between layers ({value}), which is not supported")
    return int(each[0])
