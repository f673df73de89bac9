"""Dense models of random weights, and the MoE carved from each."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from harness.checkpoints.load import load_model
from harness.contracts.plan import CompressionPlan
from harness.errors import WinnowError
from harness.tools import carve as carving
from harness.tools.carve import carve, largest_difference, main, source_at
from tests.harness.checkpoints.compressed import logits, narrowed, pruned
from tests.tiny import byte_tokenizer

NEURONS = 48
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def save_dense(folder: Path, family: str = "llama", **settings: Any) -> None:
    """Weights and biases wide enough that a lost one shows; norms that are not 1, a RoPE base of its own."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": NEURONS, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "bos_token_id": None, "eos_token_id": 256,
        "tie_word_embeddings": False, "sliding_window": None,
    }  # fmt: skip
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**common | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "experts", "seed", "settings"),
    [
        ("llama", 8, None, {"tie_word_embeddings": True}),
        ("llama", 3, 5, {}),
        ("mistral", 4, 0, {}),
        ("qwen2", 8, 1, {"tie_word_embeddings": True}),
    ],
)
def test_the_carved_model_has_the_logits_of_the_dense_one(
    family: str, experts: int, seed: int | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    save_dense(tmp_path / "dense", family, **settings)
    source = source_at(tmp_path / "dense")
    carve(source, tmp_path / "moe", experts, seed)
    dense, carved = logits(source.model()), logits(load_model(tmp_path / "moe"))
    assert float(dense.abs().max()) > 1 and float((dense - carved).abs().max()) < 1e-4
    assert largest_difference(source, tmp_path / "moe") < 1e-4
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_neurons_are_dealt_without_loss_and_in_another_order_for_another_seed(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    source = source_at(tmp_path / "dense")
    dense = source.weights()
    config = carving.carved_config(source.config(), 4)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        orders = []
        for seed in (None, 0, 1):
            carved = carving.carved_weights(dense, config, seed)
            downs = torch.cat([carved[f"{mlp}experts.{e}.down_proj.weight"] / 4 for e in range(4)], dim=1)
            match = (downs.T[:, None] == dense[f"{mlp}down_proj.weight"].T[None]).all(-1)
            orders.append(tuple(match.int().argmax(1).tolist()))
            assert sorted(orders[-1]) == list(range(NEURONS))
            ups = torch.cat([carved[f"{mlp}experts.{e}.up_proj.weight"] for e in range(4)])
            assert torch.equal(ups, dense[f"{mlp}up_proj.weight"][list(orders[-1])])
        assert orders[0] == tuple(range(NEURONS)) and len(set(orders)) == 3


def test_the_carved_model_can_lose_channels_but_no_experts(tmp_path: Path) -> None:
    from harness.checkpoints.apply_plan import apply_plan

    save_dense(tmp_path / "dense")
    carve(source_at(tmp_path / "dense"), tmp_path / "moe", 4)
    everything = pruned([0, 1, 2, 3], [0, 1, 2, 3], num_experts=4)
    plan: CompressionPlan = narrowed(everything, [6] * 4, [6] * 4, width=NEURONS // 4)
    apply_plan(tmp_path / "moe", plan, tmp_path / "small")
    assert load_model(tmp_path / "small").config.moe_intermediate_size == 6
    with pytest.raises(WinnowError, match="3 router rows are left, but the model selects 4"):
        apply_plan(tmp_path / "moe", pruned([0, 1, 2], [0, 1, 2], num_experts=4), tmp_path / "none")


@pytest.mark.parametrize(
    ("family", "settings", "experts", "said"),
    [
        ("llama", {}, 7, "48 neurons do not divide among 7 experts; of 2 to 64: 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ("llama", {"mlp_bias": True}, 8, "no place for its model.layers.0.mlp.down_proj.bias"),
        ("llama", {"attention_bias": True}, 8, "no place for its model.layers.0.self_attn.o_proj.bias"),
        ("mistral", {"head_dim": 16}, 8, "its 4 attention heads are not 32 wide together"),
        ("mistral", {"sliding_window": 16}, 8, "sliding_window=16"),
    ],
)
def test_what_cannot_be_carved_is_refused(
    family: str, settings: dict[str, Any], experts: int, said: str, tmp_path: Path
) -> None:
    save_dense(tmp_path / "dense", family, **settings)
    with pytest.raises(WinnowError) as error:
        carve(source_at(tmp_path / "dense"), tmp_path / "moe", experts)
    assert said in str(error.value)
    assert not (tmp_path / "moe").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["carve", *map(str, arguments)])
        return main()

    save_dense(tmp_path / "dense")
    assert command(tmp_path / "dense", tmp_path / "moe", "--experts", 4, "--check") == 0
    said = capsys.readouterr().out
    assert "4 experts in every layer" in said
    assert float(said.rpartition(":")[2]) < 1e-4
    assert command(tmp_path / "moe", tmp_path / "twice") == 2
    assert "cannot carve a 'qwen2_moe' model, only llama, mistral, qwen2" in capsys.readouterr().err
    assert command(tmp_path / "nowhere", tmp_path / "twice") == 2
    assert "no model at" in capsys.readouterr().err
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(carving, "find_spec", lambda name: None)
    assert command(tmp_path / "model.gguf", tmp_path / "twice") == 2
    assert "pip install gguf" in capsys.readouterr().err
