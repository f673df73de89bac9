"""The models that the recipe can train, and how their routers are watched and balanced."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from harness.reference.experts import routed_experts
from harness.reference.recipe import Recipe

# DeepSeek-V3's technical report (arXiv 2412.19437), section 4.2: how fast the correction bias moves a step, and the
# share of training after which it stands still (14.3 of 14.8 trillion tokens).
BIAS_SPEED, BIAS_MOVES_UNTIL = 1e-3, 14.3 / 14.8


def _common(recipe: Recipe) -> dict[str, Any]:
    return dict(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // 32,
        intermediate_size=recipe.dense_width,
        moe_intermediate_size=recipe.expert_width,
        num_experts_per_tok=recipe.top_k,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def _qwen3_moe(recipe: Recipe) -> PreTrainedModel:
    # transformers' checked dataclasses hide their fields from type checkers.
    settings: dict[str, Any] = _common(recipe) | dict(
        num_key_value_heads=recipe.hidden_size // 64,
        head_dim=32,
        mlp_only_layers=list(recipe.dense_layers),
        num_experts=recipe.num_experts,
        # Renormalised over a single expert, every gate value were 1 and the router would learn nothing from the text.
        norm_topk_prob=recipe.top_k > 1,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


def _deepseek_v3(recipe: Recipe) -> PreTrainedModel:
    """Sigmoid router with correction bias, four of eight groups, one shared expert, latent attention."""
    settings: dict[str, Any] = _common(recipe) | dict(
        num_key_value_heads=recipe.hidden_size // 32,
        first_k_dense_replace=len(recipe.dense_layers),
        n_routed_experts=recipe.num_experts,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        q_lora_rank=None,
        kv_lora_rank=recipe.hidden_size // 2,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        num_mtp_layers=0,
        tie_word_embeddings=False,
    )
    # What published configs say and transformers takes for granted.
    published: dict[str, Any] = dict(topk_method="noaux_tc", scoring_func="sigmoid")
    return DeepseekV3ForCausalLM(DeepseekV3Config(**settings, **published))


_BUILDERS: dict[str, Callable[[Recipe], PreTrainedModel]] = {"qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3}


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The untrained model of a recipe, in float32, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = _BUILDERS[recipe.family](recipe)
    ALL_EXPERTS_FUNCTIONS.register("cache_sized", routed_experts)
    model.set_experts_implementation("cache_sized")
    return model


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of all MoE layers, first layer first."""
    blocks = (cast(Any, layer).mlp for layer in cast(Any, model).model.layers)
    return [block.gate for block in blocks if hasattr(block, "experts")]


def watch_routers(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """A list that every forward pass fills with one (logits (T, E), chosen experts (T, top-k)) a MoE layer.

    Whoever runs the model empties the list before each pass.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    for router in routers(model):
        router.register_forward_hook(lambda module, given, output: seen.append((output[0], output[2])))
    return seen


def balance_loss(recipe: Recipe, logits: Tensor, chosen: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The family's balancing loss of one layer (1 when balanced) and the tokens routed to each expert (E,).

    ``logits`` (T, E), ``chosen`` (T, top-k) and ``real`` (B, S) with T = B S; padding counts for nothing.
    """
    experts = logits.shape[-1]
    load = torch.bincount(chosen[real.flatten()].flatten(), minlength=experts)
    if recipe.family == "deepseek_v3":
        return _sequence_balance(logits.float().sigmoid(), chosen, real), load
    probabilities = logits[real.flatten()].float().softmax(-1)  # Switch Transformer, equation 4
    return experts * (load / load.sum() * probabilities.mean(0)).sum(), load


def _sequence_balance(scores: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """DeepSeek-V3's complementary loss (equations 17 to 20), the mean over the rows of a batch that hold text."""
    rows, length = real.shape
    experts, top_k = scores.shape[-1], chosen.shape[-1]
    shares = (scores / scores.sum(-1, keepdim=True)).view(rows, length, experts) * real[..., None]
    hits = F.one_hot(chosen.view(rows, length * top_k), experts).view(rows, length, top_k, experts).sum(2)
    tokens = real.sum(1).clamp(min=1)[:, None]
    fraction = (hits * real[..., None]).sum(1) * experts / (top_k * tokens)
    return (fraction * shares.sum(1) / tokens).sum(-1)[real.any(1)].mean()


@torch.no_grad()
def move_bias(model: PreTrainedModel, load: Tensor, done: float) -> None:
    """DeepSeek-V3's balancing without a loss: up for experts with less than the mean load (layers, E), else down.

    ``done`` is the share of training that has passed. A family without a correction bias stays as it is.
    """
    if done >= BIAS_MOVES_UNTIL:
        return
    for router, tokens in zip(routers(model), load, strict=True):
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias += BIAS_SPEED * torch.sign(tokens.mean() - tokens).to(bias.dtype)
