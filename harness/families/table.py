"""The family table: where routers and experts live in each architecture. Nothing else asks which one it is looking at.

To add an architecture, add a row to ``FAMILIES`` and a tiny model of it to ``tests/tiny.py``.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts.statistics import MoeShape
from harness.errors import WinnowError
from harness.families.aliases import teach_transformers
from harness.families.tensors import ExpertTensor, separate
from harness.families.vllm_support import Served


@dataclass(frozen=True)
class Family:
    """One architecture.

    In memory (transformers 5): ``block`` is the module path of the MoE block of a decoder layer; ``router`` and
    ``experts`` are attributes of it; the router returns logits, gate values and indices in the places that
    ``router_output`` names.

    On disk: ``expert_tensors`` hold the experts; the first dimension of ``router_tensors`` and, where a checkpoint
    has them, the last of ``router_biases`` is the expert.

    In config.json: ``*_key`` and ``*_keys`` are names (the number of experts goes by several: published Qwen3-MoE
    configs say ``num_experts``, transformers 5 writes ``num_local_experts``). A group-limited router chooses among
    the experts of the ``topk_group_key`` best of ``n_group_key`` groups, each judged by its ``judged_by`` best.
    MoE layers are those from ``first_moe_layer`` to ``last_moe_layer`` (-1: the last) whose index + 1 is a multiple
    of ``moe_layer_step``, less ``dense_layers_key``; each is a key and what transformers takes where it is absent.
    The shared experts' width is a setting of its own, or hangs on the routed experts': ``shared_count_key`` times
    that, or (``shared_is_as_wide``) the same.

    ``aliases`` are model types of the same architecture that transformers does not know.
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
    separates_packed: bool = True
    aliases: tuple[str, ...] = ()
    served: Served | None = None
    block: str = "model.layers.{layer}.mlp"
    router: str = "gate"
    experts: str = "experts"
    router_output: tuple[str, str, str] = ("logits", "gates", "indices")
    expert_tensors: tuple[ExpertTensor, ...] = separate("mlp", "gate_proj", "up_proj", "down_proj")
    router_tensors: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)
    router_biases: tuple[str, ...] = ()

    def decoder_layer_class(self) -> type:
        module, name = self.decoder_layer.rsplit(".", 1)
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)

    @property
    def stacks_experts(self) -> bool:
        """The experts of a layer share a tensor, and so a width."""
        return any(tensor.is_stacked for tensor in self.expert_tensors)

    def num_experts(self, config: Mapping[str, Any]) -> int:
        for key in self.num_experts_keys:
            if key in config:
                return _one_number(config, key)
        raise WinnowError(f"config.json of a {self.model_type} model has none of {', '.join(self.num_experts_keys)}")

    def top_k(self, config: Mapping[str, Any]) -> int:
        return _one_number(config, self.top_k_key)

    def router_groups(self, config: Mapping[str, Any]) -> int:
        """The number of groups of a group-limited router, 1 for any other."""
        return int(config.get(self.n_group_key) or 1) if self.n_group_key else 1

    def fewest_rows(self, config: Mapping[str, Any]) -> int:
        """The fewest router rows that a layer can run with: top-k, or what lets the chosen groups offer as many."""
        groups = self.router_groups(config)
        chosen_groups = min(int(config.get(self.topk_group_key) or groups), groups)
        return groups * max(self.judged_by, -(-self.top_k(config) // chosen_groups))

    def shape(self, config: Mapping[str, Any]) -> MoeShape:
        width = _one_number(config, self.width_key)
        return MoeShape(len(self.moe_layers(config)), width, self.fewest_rows(config), self.stacks_experts)

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

        count = int(config["num_hidden_layers"])
        first, last = setting(self.first_moe_layer, 0), setting(self.last_moe_layer, -1)
        last = count - 1 if last == -1 else last
        step = setting(self.moe_layer_step, 1)
        dense = set(config.get(self.dense_layers_key) or ()) if self.dense_layers_key else set()
        return [i for i in range(count) if first <= i <= last and (i + 1) % step == 0 and i not in dense]


def _one_number(config: Mapping[str, Any], key: str) -> int:
    """A whole number of config.json, or that of a list which says it for every layer."""
    value = config.get(key)
    each = set(value) if isinstance(value, list) else {value}
    if len(each) > 1:
        raise WinnowError(f"config.json: {key} differs between layers ({value}), which is not supported")
    for number in each:
        if isinstance(number, int):
            return number
    raise WinnowError(f"config.json does not describe a complete model: it has no {key}")


# vLLM's rotary operation on CPUs is wrong for queries of three dimensions, which latent attention has.
_PLAIN_ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
_TIED_SHARED = ("moe_intermediate_size", "n_shared_experts")

_QWEN_LAYERS: dict[str, Any] = {
    "moe_layer_step": ("decoder_sparse_step", 1),
    "dense_layers_key": "mlp_only_layers",
}
_DEEPSEEK: dict[str, Any] = {
    "num_experts_keys": ("n_routed_experts", "num_experts", "num_local_experts"),
    "n_group_key": "n_group",
    "shared_count_key": "n_shared_experts",
}
_DEEPSEEK_V3: dict[str, Any] = _DEEPSEEK | {
    "judged_by": 2,
    "router_biases": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
}
_MIXTRAL: dict[str, Any] = {
    "width_key": "intermediate_size",
    "expert_tensors": separate("block_sparse_moe", "w1", "w3", "w2"),
    "router_tensors": ("model.layers.{layer}.block_sparse_moe.gate.weight",),
}
_GRANITE: dict[str, Any] = {
    "width_key": "intermediate_size",
    "block": "model.layers.{layer}.block_sparse_moe",
    "router": "router",
    "router_output": ("indices", "gates", "logits"),
    "expert_tensors": (
        ExpertTensor(
            "model.layers.{layer}.block_sparse_moe.input_linear.weight", ("channel", "hidden"), ("gate", "up")
        ),
        ExpertTensor("model.layers.{layer}.block_sparse_moe.output_linear.weight", ("hidden", "channel"), ("down",)),
    ),
    "router_tensors": ("model.layers.{layer}.block_sparse_moe.router.layer.weight",),
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "qwen3_moe",
            "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer",
            "softmax, renormalised by config",
            served=Served(compact=True),
            **_QWEN_LAYERS,
        ),
        Family(
            "qwen2_moe",
            "qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer",
            "softmax, renormalised by config (off as released)",
            served=Served(shared_width=("shared_expert_intermediate_size",), compact=True),
            **_QWEN_LAYERS,
        ),
        Family(
            "qwen3_next",
            "qwen3_next.modeling_qwen3_next.Qwen3NextDecoderLayer",
            "softmax, renormalised by config",
            separates_packed=False,  # linear attention
            **_QWEN_LAYERS,
        ),
        Family(
            "olmoe",
            "olmoe.modeling_olmoe.OlmoeDecoderLayer",
            "softmax, renormalised by config (off as released)",
            served=Served(compact=True, needs={"norm_topk_prob": False}),  # vLLM never renormalises its gate values
            width_key="intermediate_size",
        ),
        Family(
            "flex_olmo",
            "flex_olmo.modeling_flex_olmo.FlexOlmoDecoderLayer",
            "softmax, renormalised by config (off as released)",
            served=Served(),
            width_key="intermediate_size",
        ),
        Family(
            "mixtral",
            "mixtral.modeling_mixtral.MixtralDecoderLayer",
            "softmax, always renormalised",
            served=Served(compact=True),
            **_MIXTRAL,
        ),
        Family(
            "minimax_m2",
            "minimax_m2.modeling_minimax_m2.MiniMaxM2DecoderLayer",
            "sigmoid, chosen with a correction bias, always renormalised",
            served=Served(refused_on_cpu="vLLM's CPU build leaves the correction bias out of the choice"),
            router_biases=("model.layers.{layer}.block_sparse_moe.e_score_correction_bias",),
            **_MIXTRAL,
        ),
        Family(
            "phimoe",
            "phimoe.modeling_phimoe.PhimoeDecoderLayer",
            "sparsemixer: two experts one after the other, softmax over those near the largest logit",
            served=Served(refused="vLLM 0.32 cannot unpack what its router returns"),
            router="router",
            **_MIXTRAL,
        ),
        Family(
            "deepseek_v2",
            "deepseek_v2.modeling_deepseek_v2.DeepseekV2DecoderLayer",
            "softmax, group-limited by config, scaled, never renormalised",
            served=Served(cpu_arguments=_PLAIN_ROTARY, shared_width=_TIED_SHARED),
            first_moe_layer=("first_k_dense_replace", 0),
            **_DEEPSEEK,
        ),
        Family(
            "deepseek_v3",
            "deepseek_v3.modeling_deepseek_v3.DeepseekV3DecoderLayer",
            "sigmoid, group-limited, chosen with a correction bias, renormalised by config, scaled",
            served=Served(
                cpu_arguments=_PLAIN_ROTARY,
                shared_width=_TIED_SHARED,
                needs={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            ),
            aliases=("kimi_k2",),
            first_moe_layer=("first_k_dense_replace", 3),
            **_DEEPSEEK_V3,
        ),
        Family(
            "glm4_moe",
            "glm4_moe.modeling_glm4_moe.Glm4MoeDecoderLayer",
            "as deepseek_v3",
            served=Served(shared_width=_TIED_SHARED),
            first_moe_layer=("first_k_dense_replace", 1),
            **_DEEPSEEK_V3,
        ),
        Family(
            "dots1",
            "dots1.modeling_dots1.Dots1DecoderLayer",
            "as deepseek_v3",
            served=Served(shared_width=_TIED_SHARED),
            first_moe_layer=("first_k_dense_replace", 0),
            **_DEEPSEEK_V3,
        ),
        Family(
            "ernie4_5_moe",
            "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeDecoderLayer",
            "softmax, chosen with a correction bias, always renormalised",
            served=Served(
                cpu_arguments={"model_impl": "transformers"},  # whose own router has the correction bias
                shared_width=("moe_intermediate_size", "moe_num_shared_experts"),
            ),
            num_experts_keys=("moe_num_experts", "num_experts", "num_local_experts"),
            top_k_key="moe_k",
            first_moe_layer=("moe_layer_start_index", 1),
            last_moe_layer=("moe_layer_end_index", -1),
            moe_layer_step=("moe_layer_interval", 1),
            shared_count_key="moe_num_shared_experts",
            router_biases=("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias",),
        ),
        Family(
            "hunyuan_v1_moe",
            "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1DecoderLayer",
            "softmax, always renormalised",
            served=Served(),
            top_k_key="moe_topk",
            width_key="intermediate_size",
            shared_is_as_wide=True,
            router_tensors=("model.layers.{layer}.mlp.gate.wg.weight",),
        ),
        Family(
            "lfm2_moe",
            "lfm2_moe.modeling_lfm2_moe.Lfm2MoeDecoderLayer",
            "sigmoid, chosen with a bias by config, renormalised by config, scaled",
            served=Served(refused="vLLM 0.32 writes wrong text with it, for a reason that is not known"),
            first_moe_layer=("num_dense_layers", 2),
            separates_packed=False,  # convolutions
            block="model.layers.{layer}.feed_forward",
            expert_tensors=separate("feed_forward", "w1", "w3", "w2"),
            router_tensors=("model.layers.{layer}.feed_forward.gate.weight",),
            router_biases=("model.layers.{layer}.feed_forward.expert_bias",),
        ),
        Family(
            "granitemoe",
            "granitemoe.modeling_granitemoe.GraniteMoeDecoderLayer",
            "softmax over the top-k logits",
            served=Served(),
            **_GRANITE,
        ),
        Family(
            "granitemoeshared",
            "granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedDecoderLayer",
            "softmax over the top-k logits",
            served=Served(),
            **_GRANITE,
        ),
        Family(
            "gpt_oss",
            "gpt_oss.modeling_gpt_oss.GptOssDecoderLayer",
            "softmax over the top-k logits, which have a bias",
            served=Served(),
            width_key="intermediate_size",
            separates_packed=False,  # transformers makes its attention mask without the positions
            router="router",
            expert_tensors=(
                ExpertTensor(
                    "model.layers.{layer}.mlp.experts.gate_up_proj", ("hidden", "channel"), ("gate", "up"), True
                ),
                ExpertTensor("model.layers.{layer}.mlp.experts.gate_up_proj_bias", ("channel",), ("gate", "up"), True),
                ExpertTensor("model.layers.{layer}.mlp.experts.down_proj", ("channel", "hidden"), ("down",)),
                ExpertTensor("model.layers.{layer}.mlp.experts.down_proj_bias", ("hidden",), ("down",)),
            ),
            router_tensors=("model.layers.{layer}.mlp.router.weight",),
            router_biases=("model.layers.{layer}.mlp.router.bias",),
        ),
    )
}
_BY_ALIAS = {alias: family for family in FAMILIES.values() for alias in family.aliases}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises WinnowError for an architecture without a row.

    From then on transformers knows the model type too, where it is an alias.
    """
    model_type = config.get("model_type", "(none)")
    family = FAMILIES.get(model_type) or _BY_ALIAS.get(model_type)
    if family is None:
        raise WinnowError(
            f"architecture '{model_type}' is not supported; supported: {', '.join(sorted([*FAMILIES, *_BY_ALIAS]))}. "
            "To add it, add a row to FAMILIES in harness/families/table.py"
        )
    if model_type in family.aliases:
        teach_transformers(model_type, family.model_type)
    return family


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises WinnowError where it is missing or not JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WinnowError(f"no model at {folder}: there is no config.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WinnowError(f"{path} is not valid JSON: {error}") from error
