"""What stands between a checkpoint and vLLM: faults that it would not tell, and what its engine is given."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.backends import vllm_guard
from harness.backends.choice import choose
from harness.errors import WinnowError
from tests.harness.backends.vllm_served import edited, made, needs_vllm

pytestmark = needs_vllm


def test_routes_on_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_guard, "installed_version", lambda: "0.33.1")
    with pytest.raises(WinnowError, match=r"need vLLM 0\.32\.x, and 0\.33\.1 is installed"):
        vllm_guard.check(made("mixtral", "merged", tmp_path))
    assert vllm_guard.check(made("mixtral", "pruned", tmp_path)) == {}, "plain checkpoints need no plugin"


def test_experts_narrower_than_announced_are_caught(tmp_path: Path) -> None:
    """vLLM would leave the rest of each expert uninitialised."""
    folder = edited(made("qwen3_moe", "plain", tmp_path), tmp_path / "wide", moe_intermediate_size=32)
    with pytest.raises(WinnowError, match="has shape"):
        vllm_guard.check(folder)


def test_gate_values_that_vllm_would_not_renormalise_are_caught(tmp_path: Path) -> None:
    folder = edited(made("olmoe", "plain", tmp_path), tmp_path / "normed", norm_topk_prob=True)
    with pytest.raises(WinnowError, match="norm_topk_prob=False"):
        vllm_guard.check(folder)


def test_a_shared_expert_that_vllm_would_cut_is_caught(tmp_path: Path) -> None:
    config = {"model_type": "glm4_moe", "moe_intermediate_size": 16, "n_shared_experts": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.zeros(64, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        WinnowError, match="has 64 rows, but moe_intermediate_size x n_shared_experts of config.json is 32"
    ):
        vllm_guard.check(tmp_path)


def test_architectures_with_known_faults_are_refused_or_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in ("phimoe", "lfm2_moe", "minimax_m2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(WinnowError, match=f"architecture '{model_type}'"):
            vllm_guard.check(tmp_path)
    assert "was not tried with vLLM" in vllm_guard.reason_against({"model_type": "qwen3_next"})
    assert vllm_guard.reason_against({"model_type": "granitemoe"}) == ""
    assert "layout=expanded" in vllm_guard.reason_against({"model_type": "granitemoe", "winnow": {}})
    assert "topk_method" in vllm_guard.reason_against({"model_type": "deepseek_v3", "scoring_func": "sigmoid"})
    monkeypatch.setattr(vllm_guard, "find_spec", lambda name: None)
    assert "not installed: install it with" in vllm_guard.reason_against({"model_type": "mixtral"})


# Several devices

QWEN3 = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "intermediate_size": 96,
    "hidden_size": 64,
}  # fmt: skip
QWEN2 = QWEN3 | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 36}


def layout_of(*experts_and_widths: tuple[list[int], list[int]]) -> dict[str, object]:
    """A compact config with, for each layer, its route and the widths of its experts."""
    layers = {
        str(i): {"experts": len(widths), "width": widths, "route": route}
        for i, (route, widths) in enumerate(experts_and_widths)
    }
    return QWEN3 | {"winnow": {"version": 1, "layers": layers}}


def test_latent_attention_of_another_size_is_written_out_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_MLA_DISABLE", raising=False)
    small = {"model_type": "deepseek_v3", "kv_lora_rank": 64, "qk_rope_head_dim": 32}
    monkeypatch.setattr(vllm_guard, "is_cpu_build", lambda: True)
    assert vllm_guard.environment(small) == {"VLLM_MLA_DISABLE": "1"}
    assert vllm_guard.environment(small | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}) == {}
    assert vllm_guard.environment({"model_type": "qwen3_moe"}) == {}
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    assert vllm_guard.environment(small) == {}, "what a user says counts"
    monkeypatch.delenv("VLLM_MLA_DISABLE")
    monkeypatch.setattr(vllm_guard, "is_cpu_build", lambda: False)
    assert vllm_guard.environment(small) == {}


@pytest.mark.parametrize(
    ("config", "devices", "wrong"),
    [
        (QWEN3, 1, ""),
        (QWEN3, 2, ""),
        (QWEN3, 4, ""),  # each key-value head on two devices
        (QWEN3, 3, "8 attention heads, which tensor_parallel_size=3 does not divide: it can be 1, 2"),
        (QWEN3 | {"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "4 key-value heads"),
        (QWEN3 | {"num_attention_heads": 16}, 16, "24 channels in an expert.* it can be 1, 2, 4, 8"),
        (QWEN3 | {"moe_intermediate_size": 25}, 2, "25 channels in an expert"),
        (QWEN3 | {"mlp_only_layers": [0], "intermediate_size": 97}, 2, "97 channels in a dense layer"),
        (QWEN3 | {"intermediate_size": 97}, 2, ""),  # no layer is dense
        (QWEN2, 4, ""),
        (QWEN2 | {"num_attention_heads": 24}, 8, "36 channels in the shared expert"),
        (layout_of(([0, 1, 0], [5, 7]), ([0, 1], [24, 1])), 4, ""),  # the plugin pads them
        (layout_of(([0, 1, 0], [5, 7]), ([0, 1], [24, 1])), 3, "8 attention heads"),
    ],
)
def test_devices_that_cannot_share_a_model(config: dict[str, object], devices: int, wrong: str) -> None:
    if not wrong:
        assert vllm_guard.reason_against_sharing(config, devices) == ""
        assert vllm_guard.engine_arguments(config, {"tensor_parallel_size": devices})
        return
    with pytest.raises(WinnowError, match=f"^the model has {wrong}"):
        vllm_guard.engine_arguments(config, {"tensor_parallel_size": devices})
    with pytest.raises(WinnowError, match=f"^backend=vllm: the model has {wrong}"):  # in the dry run too
        choose({"name": "vllm", "open": {"tensor_parallel_size": devices}}, config, [], lambda: 1)


def test_whole_experts_need_no_width_that_divides() -> None:
    odd = QWEN3 | {"moe_intermediate_size": 25}
    given = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert vllm_guard.engine_arguments(odd, given) == given
    with pytest.raises(WinnowError, match="enable_expert_parallel: compact checkpoints were not tried"):
        vllm_guard.engine_arguments(layout_of(([0, 0], [4]), ([0, 0], [4])), given)


def test_the_engine_quantises_no_compact_checkpoint() -> None:
    given = {"quantization": "fp8"}
    assert vllm_guard.engine_arguments(QWEN3, given)["quantization"] == "fp8"
    with pytest.raises(WinnowError, match="^quantization=fp8: the engine quantises no compact checkpoint"):
        vllm_guard.engine_arguments(layout_of(([0, 0], [4]), ([0, 0], [4])), given)


def test_engines_that_do_not_know_of_each_other_are_refused() -> None:
    for more in ({}, {"enable_expert_parallel": True}):
        with pytest.raises(WinnowError, match="data_parallel_size=2: .*take tensor_parallel_size"):
            vllm_guard.engine_arguments(QWEN3, {"data_parallel_size": 2, **more})


def test_router_logits_are_not_padded_where_vllm_would_misread_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_guard.engine_arguments(QWEN3, {}) == {}, "the CPU build has no such kernel"
    monkeypatch.setattr(vllm_guard, "is_cpu_build", lambda: False)

    def compiled(config: dict[str, object], given: object = None) -> object:
        arguments = vllm_guard.engine_arguments(config, {} if given is None else {"compilation_config": given})
        return arguments.get("compilation_config")

    unpadded = {"inductor_compile_config": {"shape_padding": False}}
    assert compiled(QWEN3) == unpadded
    assert compiled(QWEN3 | {"num_experts": 64}) is None
    even, odd = ([*range(8)], [4] * 8), ([0, 1, 2, 3, 0, 1, 2], [4] * 4)
    assert compiled(layout_of(even, even)) is None
    assert compiled(layout_of(even, odd)) == unpadded
    assert compiled(layout_of(([0] * 16, [4]), even)) is None, "rows count, and not experts"
    assert compiled(QWEN3, 3) == {"mode": 3} | unpadded
    given = {"cudagraph_mode": "NONE", "inductor_compile_config": {"max_autotune": True}}
    before = json.loads(json.dumps(given))
    assert compiled(QWEN3, given) == {
        "cudagraph_mode": "NONE", "inductor_compile_config": {"shape_padding": False, "max_autotune": True}
    }  # fmt: skip
    assert given == before
    asked = {"inductor_compile_config": {"shape_padding": True}}
    assert compiled(QWEN3, asked) == asked, "the user has the last word"
    from vllm.config import CompilationConfig

    assert CompilationConfig(**unpadded).inductor_compile_config["shape_padding"] is False
