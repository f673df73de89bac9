"""A quantised checkpoint in vLLM's own process: the same text as from transformers, from a copy that does not stay."""

import tempfile
from pathlib import Path

import pytest

from harness.backends import hf, vllm, vllm_guard
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.quantize import Quantization, quantize_checkpoint
from tests.harness.checkpoints.compressed import ragged_plan
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(vllm_guard.installed_version() is None, reason="vLLM is not installed: `make vllm`")

PROMPTS = ["once upon a time", "12 apples and 7", "def f(x):", "zz"]


def test_packed_experts_of_many_widths_write_as_they_do_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    save_tiny(tmp_path / "model", "qwen3_moe", hidden=128)
    apply_plan(tmp_path / "model", ragged_plan(), tmp_path / "packed")
    int4 = Quantization("int4", 4, symmetric=False)
    quantize_checkpoint(tmp_path / "packed", tmp_path / "packed", int4)
    expected = hf.open_checkpoint(str(tmp_path / "packed"), "float32", "cpu", 4, None).generate(PROMPTS, 24)
    backend = vllm.open_checkpoint(str(tmp_path / "packed"), "float32", "cpu", max_length=256, kv_cache_gib=0.03)
    try:
        assert not list(temporary.glob("winnow-served-*"))
        assert "dequantised" in backend.facts["weights"]
        assert backend.generate(PROMPTS, 24) == expected
    finally:
        backend.close()
