"""Calibration follows the implementation of the experts that loading chose, where grouped products cannot run too."""

import numpy as np
import pytest
import torch

from harness.calibration.collect import collect
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.contracts.statistics import STATISTICS
from harness.families.table import FAMILIES
from tests.brute_force import brute_force_statistics
from tests.harness.checkpoints.compressed import identity_plan, narrowed
from tests.tiny import save_tiny, tiny_model

ALL = frozenset(STATISTICS)
TEXTS = [np.random.default_rng(size).integers(0, 256, size).tolist() for size in (20, 7, 13)]


def sequences() -> list[TokenSequence]:
    return [TokenSequence(np.array(text), (len(text),), ("a",)) for text in TEXTS]


def assert_close(found, expected, bound: float) -> None:
    for layer, arrays in expected.items():
        for name in ALL:
            scale = np.abs(arrays[name]).max()
            np.testing.assert_allclose(found[layer][name], arrays[name], rtol=0, atol=bound * scale, err_msg=name)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_implementation_gives_the_statistics_of_the_grouped_one(family: str, implementation: str) -> None:
    model = tiny_model(family)
    grouped = collect(model, sequences(), FAMILIES[family], ALL, 2)
    model.set_experts_implementation(implementation)
    found = collect(model, sequences(), FAMILIES[family], ALL, 2)
    assert_close(found.layers, grouped.layers, 1e-5)


def test_float64_against_brute_force(tmp_path) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    model = load_model(tmp_path, "float64")
    assert model.config._experts_implementation == "eager"
    found = collect(model, sequences(), FAMILIES["qwen3_moe"], ALL, 2)
    assert_close(found.layers, brute_force_statistics(model, TEXTS).layers, 1e-6)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 12), ("float32", 13)])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_widths_that_grouped_products_refuse(family: str, dtype: str, width: int, tmp_path) -> None:
    save_tiny(tmp_path / "model", family)
    apply_plan(tmp_path / "model", narrowed(identity_plan(), *[[width] * 8] * 2), tmp_path / "out")
    model = load_model(tmp_path / "out", dtype)
    assert model.config._experts_implementation == "eager"
    with torch.inference_mode():
        ids = torch.tensor([TEXTS[0]])
        assert torch.isfinite(model(ids, use_cache=False).logits).all()
    found = collect(model, sequences(), FAMILIES[family], ALL, 2)
    exact = collect(load_model(tmp_path / "out", "float64"), sequences(), FAMILIES[family], ALL, 2)
    for layer, arrays in exact.layers.items():
        assert arrays["channel_square_sum"].shape == (8, 3, width)
        same = found.layers[layer]["frequency"] == arrays["frequency"]  # no routing flip
        assert same.any()
        bound = 1e-4 if dtype == "float32" else 0.05
        for name in ("weighted_ean_sum", "channel_square_sum", "output_mean"):
            scale = np.abs(arrays[name]).max()
            np.testing.assert_allclose(
                found.layers[layer][name][same], arrays[name][same], rtol=0, atol=bound * scale, err_msg=name
            )
