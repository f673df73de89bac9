"""Models whose weights accelerate keeps elsewhere, and moves in for a forward: the same numbers to the last bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import PreTrainedModel

from harness.calibration.collect import collect
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.offload import device_of, forward_replaced, weights_at_hand
from harness.contracts.alignment import align_channels
from harness.contracts.statistics import STATISTICS
from harness.families.table import FAMILIES
from harness.layers.diagnose import diagnose
from tests.harness.checkpoints.compressed import merged
from tests.tiny import ALL_FAMILIES, save_tiny, tiny_model

CPU = torch.device("cpu")
GROUPS = [[[0, 3], [1, 2, 5, 7], [4], [6]]] * 2


def sequences() -> list[TokenSequence]:
    generator = np.random.default_rng(5)
    return [TokenSequence(generator.integers(0, 250, length), (length,), ("a",)) for length in (20, 13, 20, 4)]


def offloaded(model: PreTrainedModel, where: str, folder: Path) -> PreTrainedModel:
    if where == "cpu":
        cpu_offload(model, execution_device=CPU)
    else:
        disk_offload(model, str(folder), execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_statistic_of_an_offloaded_model_is_the_same(family: str, where: str, tmp_path: Path) -> None:
    names, row = frozenset(STATISTICS), FAMILIES[family]
    expected = collect(tiny_model(family), sequences(), row, names, 2)
    model = offloaded(tiny_model(family), where, tmp_path)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    found = collect(model, sequences(), row, names, 2)
    for layer, arrays in expected.layers.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(found.layers[layer][name], values, err_msg=f"{layer} {name}")
    assert found.usage == expected.usage
    assert all(parameter.is_meta for parameter in model.parameters()), "weights stay where they are kept"
    assert before == {name: vars(module).get("forward") for name, module in model.named_modules()}
    counts = gate_ratio_counts(tiny_model(family), sequences(), row, 2)
    for layer, bins in gate_ratio_counts(model, sequences(), row, 2).items():
        np.testing.assert_array_equal(bins, counts[layer])


def test_a_compressed_model_is_offloaded_too(tmp_path: Path) -> None:
    """Its rows are led to other experts by a hook before the forward that is replaced."""
    save_tiny(tmp_path / "model", "olmoe")
    apply_plan(tmp_path / "model", merged(*GROUPS), tmp_path / "out")
    names = frozenset({"ean_sum", "output_mean", "frequency"})
    expected = collect(load_model(tmp_path / "out"), sequences(), FAMILIES["olmoe"], names, 2)
    model = offloaded(load_model(tmp_path / "out"), "cpu", tmp_path)
    found = collect(model, sequences(), FAMILIES["olmoe"], names, 2)
    for layer, arrays in expected.layers.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(found.layers[layer][name], values)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_layer_diagnostics_of_an_offloaded_model_are_the_same(family: str, where: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family)
    kept = (tmp_path / str(i) for i in range(2))  # a folder for each model

    def diagnosed(load) -> dict:
        return diagnose(
            tmp_path / "model", merged(*GROUPS), sequences(), tmp_path / "scratch", load, align_channels, batch_size=2
        )

    assert diagnosed(lambda folder: offloaded(load_model(folder), where, next(kept))) == diagnosed(load_model)


def test_a_replaced_forward_runs_inside_of_the_hook_and_goes_again(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    with forward_replaced(layer, lambda x: x + 1):
        assert layer(torch.tensor(1.0)) == 2
    assert "forward" not in vars(layer) and layer(torch.ones(3)).shape == (2,)
    weight = layer.weight.detach().clone()
    cpu_offload(layer, execution_device=CPU)
    seen = []
    with pytest.raises(ValueError, match="stop"), forward_replaced(layer, lambda x: seen.append(layer.weight.device)):
        layer(torch.ones(3))
        raise ValueError("stop")
    assert seen == [CPU] and layer.weight.is_meta and layer(torch.ones(3)).shape == (2,)
    assert device_of(layer) == CPU
    with weights_at_hand(layer):
        assert torch.equal(layer.weight, weight)
    assert layer.weight.is_meta
