"""Tiny random models of every family, made on the spot: no test needs a file that is not in the repository."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILY_NAMES = ("qwen3_moe", "mixtral", "olmoe")
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
    """A float32 model with random weights; router weights are wide enough for distinct expert loads."""
    torch.manual_seed(seed)
    common = _COMMON | {"hidden_size": hidden}
    if family == "qwen3_moe":
        model: PreTrainedModel = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common, head_dim=hidden // 4, intermediate_size=48, moe_intermediate_size=width,
                num_experts=num_experts, num_experts_per_tok=top_k, norm_topk_prob=True, decoder_sparse_step=1,
                mlp_only_layers=[],
            )
        )  # fmt: skip
    elif family == "mixtral":
        model = MixtralForCausalLM(
            MixtralConfig(
                **common, intermediate_size=width, num_local_experts=num_experts, num_experts_per_tok=top_k,
                sliding_window=None,
            )
        )  # fmt: skip
    elif family == "olmoe":
        model = OlmoeForCausalLM(
            OlmoeConfig(
                **common, intermediate_size=width, num_experts=num_experts, num_experts_per_tok=top_k,
                norm_topk_prob=False,
            )
        )  # fmt: skip
    else:
        raise ValueError(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if ".gate.weight" in name else 0.15)
    return model.eval()


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
