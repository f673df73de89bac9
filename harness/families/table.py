"""The family table: where routers and experts live in each architecture. Nothing else asks which one it is looking at.

To add an architecture, add a row to ``FAMILIES`` and a tiny model of it to ``tests/tiny.py``.
"""

from collections.abc import Mapping
from typing import Any

from harness.errors import WinnowError
from harness.families.aliases import teach_transformers
from harness.families.family import Family
from harness.families.tensors import ExpertTensor, separate
from harness.families.vllm_support import Served

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
    "shared_experts": "model.layers.{layer}.mlp.shared_experts",
}
_DEEPSEEK_V3: dict[str, Any] = _DEEPSEEK | {
    "sigmoid_router": True,
    "judged_by": 2,
    "router_biases": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
}
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")
_SHARED_WITH_GATE: dict[str, Any] = {
    "shared_experts": "model.layers.{layer}.mlp.shared_expert",
    "shared_gate": "model.layers.{layer}.mlp.shared_expert_gate",
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
            **_SHARED_WITH_GATE,
            **_QWEN_LAYERS,
        ),
        Family(
            "qwen3_next",
            "qwen3_next.modeling_qwen3_next.Qwen3NextDecoderLayer",
            "softmax, renormalised by config",
            separates_packed=False,  # linear attention
            attention_interval_key="full_attention_interval",
            **_SHARED_WITH_GATE,
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
            sigmoid_router=True,
            served=Served(refused_on_cpu="vLLM's CPU build leaves the correction bias out of the choice"),
            router_biases=("model.layers.{layer}.block_sparse_moe.e_score_correction_bias",),
            **_MIXTRAL,
        ),
        Family(
            "phimoe",
            "phimoe.modeling_phimoe.PhimoeDecoderLayer",
            "sparsemixer: two experts one after the other, softmax over those near the largest logit",
            fixed_top_k=True,
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
            latent_keys=_LATENT,
            **_DEEPSEEK,
        ),
        Family(
            "deepseek_v3",
            "deepseek_v3.modeling_deepseek_v3.DeepseekV3DecoderLayer",
            "sigmoid, group-limited, chosen with a correction bias, renormalised by config, scaled",
            served=Served(
                cpu_arguments=_PLAIN_ROTARY,
                shared_width=_TIED_SHARED,
                compact=True,
                needs={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
            ),
            aliases=("kimi_k2",),
            first_moe_layer=("first_k_dense_replace", 3),
            latent_keys=_LATENT,
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
            shared_experts="model.layers.{layer}.mlp.shared_experts",
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
            shared_experts="model.layers.{layer}.mlp.shared_mlp",
            router_tensors=("model.layers.{layer}.mlp.gate.wg.weight",),
        ),
        Family(
            "lfm2_moe",
            "lfm2_moe.modeling_lfm2_moe.Lfm2MoeDecoderLayer",
            "sigmoid, chosen with a bias by config, renormalised by config, scaled",
            sigmoid_router=True,
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
            shared_experts="model.layers.{layer}.shared_mlp",
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
    model_type = config.get("model_type")
    family = None if not isinstance(model_type, str) else FAMILIES.get(model_type) or _BY_ALIAS.get(model_type)
    if family is None:
        found = f"'{model_type}'" if isinstance(model_type, str) else "without a name (config.json: model_type)"
        raise WinnowError(
            f"architecture {found} is not supported; supported: {', '.join(sorted([*FAMILIES, *_BY_ALIAS]))}. "
            "To add it, add a row to FAMILIES in harness/families/table.py"
        )
    if model_type in family.aliases:
        teach_transformers(model_type, family.model_type)
    return family
