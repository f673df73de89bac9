"""Tiny random models of every family, made on the spot: no test needs a file that is not in the repository."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from harness.families.table import family_of

FAMILY_NAMES = ("qwen3_moe", "mixtral", "olmoe")
ALL_FAMILIES = FAMILY_NAMES + (
    "qwen2_moe",
    "qwen3_next",
    "flex_olmo",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "phimoe",
    "lfm2_moe",
    "granitemoe",
    "granitemoeshared",
    "gpt_oss",
)
_COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 257,
    "eos_token_id": 256,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}


def tiny_model(
    family: str, num_experts: int = 8, top_k: int = 2, width: int = 16, seed: int = 0, hidden: int = 32
) -> PreTrainedModel:
    """A float32 model with random weights; router weights are wide enough for distinct expert loads.

    Two MoE layers, and dense ones where the family knows them; two router groups where it has groups; correction
    biases large enough to change the choice of experts.
    """
    torch.manual_seed(seed)
    common = _COMMON | {"hidden_size": hidden}
    config, model_class = _settings(family, common, num_experts, top_k, width, hidden // 4)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("router.bias"):
                parameter.normal_(0, 0.3 if name.endswith(_ROUTERS) else 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0, 0.15)
    return model.eval()


_ROUTERS = (".gate.weight", ".gate.wg.weight", ".router.weight", ".router.bias")


def _settings(
    family: str, common: dict[str, Any], num_experts: int, top_k: int, width: int, head: int
) -> tuple[PreTrainedConfig, Any]:
    """The config and class of a tiny model. ``width`` is that of an expert, ``head`` of an attention head."""
    numbers = {"num_experts": num_experts, "num_experts_per_tok": top_k}
    local = {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
    one_dense_before = common | {
        "num_hidden_layers": 3, "intermediate_size": 48, "moe_intermediate_size": width, "num_experts_per_tok": top_k,
        "n_routed_experts": num_experts, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    }  # fmt: skip
    latent = {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": head,
        "qk_nope_head_dim": head, "v_head_dim": head,
    }  # fmt: skip
    groups = {"n_group": 2, "topk_group": 1}
    dense = {"intermediate_size": 48}
    match family:
        case "qwen3_moe":
            return Qwen3MoeConfig(
                **common, **numbers, **dense, head_dim=head, moe_intermediate_size=width, norm_topk_prob=True,
                decoder_sparse_step=1, mlp_only_layers=[],
            ), Qwen3MoeForCausalLM  # fmt: skip
        case "qwen2_moe":  # MoE layers 1 and 5: every other layer is dense, and one more by name
            return Qwen2MoeConfig(
                **common | {"num_hidden_layers": 6}, **numbers, **dense, moe_intermediate_size=width,
                shared_expert_intermediate_size=24, decoder_sparse_step=2, mlp_only_layers=[3],
            ), Qwen2MoeForCausalLM  # fmt: skip
        case "qwen3_next":
            return Qwen3NextConfig(
                **common, **numbers, **dense, head_dim=head, moe_intermediate_size=width,
                shared_expert_intermediate_size=24, linear_key_head_dim=head, linear_value_head_dim=head,
                linear_num_key_heads=2, linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
            ), Qwen3NextForCausalLM  # fmt: skip
        case "mixtral":
            return MixtralConfig(**common, **local, intermediate_size=width, sliding_window=None), MixtralForCausalLM
        case "olmoe":
            return OlmoeConfig(**common, **numbers, intermediate_size=width, norm_topk_prob=False), OlmoeForCausalLM
        case "flex_olmo":
            return FlexOlmoConfig(**common, **numbers, intermediate_size=width), FlexOlmoForCausalLM
        case "deepseek_v2":
            return DeepseekV2Config(
                **one_dense_before | latent, **groups, topk_method="group_limited_greedy"
            ), DeepseekV2ForCausalLM  # fmt: skip
        case "deepseek_v3":
            return DeepseekV3Config(**one_dense_before | latent, **groups), DeepseekV3ForCausalLM
        case "kimi_k2":  # not one of ALL_FAMILIES, but another name of deepseek_v3; as released it has no groups
            family_of({"model_type": "kimi_k2"})
            one_group = {"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
            return CONFIG_MAPPING["kimi_k2"](**one_dense_before | latent, **one_group), DeepseekV3ForCausalLM
        case "glm4_moe":
            return Glm4MoeConfig(**one_dense_before, head_dim=head), Glm4MoeForCausalLM
        case "dots1":
            return Dots1Config(**one_dense_before, head_dim=head, norm_topk_prob=True), Dots1ForCausalLM
        case "ernie4_5_moe":
            return Ernie4_5_MoeConfig(
                **common | {"num_hidden_layers": 6}, **dense, moe_num_experts=num_experts, moe_k=top_k,
                moe_intermediate_size=width, moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=4,
                moe_layer_interval=2,
            ), Ernie4_5_MoeForCausalLM  # fmt: skip
        case "hunyuan_v1_moe":
            return HunYuanMoEV1Config(
                **common, num_experts=num_experts, moe_topk=top_k, intermediate_size=width, head_dim=head
            ), HunYuanMoEV1ForCausalLM  # fmt: skip
        case "minimax_m2":
            return MiniMaxM2Config(**common, **local, intermediate_size=width, head_dim=head), MiniMaxM2ForCausalLM
        case "phimoe":
            return PhimoeConfig(**common, **local, intermediate_size=width), PhimoeForCausalLM
        case "lfm2_moe":
            return Lfm2MoeConfig(
                **common | {"num_hidden_layers": 3}, **numbers, **dense, moe_intermediate_size=width,
                num_dense_layers=1, layer_types=["conv", "full_attention", "conv"],
            ), Lfm2MoeForCausalLM  # fmt: skip
        case "granitemoe":
            return GraniteMoeConfig(**common, **local, intermediate_size=width), GraniteMoeForCausalLM
        case "granitemoeshared":
            return GraniteMoeSharedConfig(
                **common, **local, intermediate_size=width, shared_intermediate_size=24
            ), GraniteMoeSharedForCausalLM  # fmt: skip
        case "gpt_oss":
            return GptOssConfig(
                **common, **local, intermediate_size=width, head_dim=head, sliding_window=16
            ), GptOssForCausalLM  # fmt: skip
    raise ValueError(family)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (0-255), 256 = end of text, 257 = padding: any text in, the same text out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def save_tiny(folder: Path, family: str, max_shard_size: str = "5GB", **options: int) -> PreTrainedModel:
    """A checkpoint folder in the hub layout, with tokenizer; returns the model that was saved."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return model
