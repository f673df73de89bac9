"""What stands between a checkpoint and vLLM: faults that it would not tell, and what its engine is given."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.backends import vllm_guard
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
