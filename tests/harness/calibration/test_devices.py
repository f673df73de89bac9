"""Calibration on one and on two (pretend) GPUs: the numbers of the CPU to the last bit, no device mixed with another,
and a bounded number of times that the host waits for a GPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.calibration.collect import collect
from harness.calibration.collected import Collected
from harness.calibration.collectors import all_tokens, pairs
from harness.calibration.gate_ratios import gate_ratio_counts
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.load import load_model
from harness.contracts.statistics import RELEASED, SAMPLED, STATISTICS
from harness.families.table import FAMILIES
from tests.pretend import MixedDevicesError, PretendGpus, halves, placed
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, save_tiny, tiny_model

LENGTHS = (20, 13, 20, 4)  # in batches of two, the second has padding
EVERYTHING = frozenset(STATISTICS)
ORDINARY = EVERYTHING - RELEASED - SAMPLED
# Of each layer and batch, times that the host waits for the GPU: sizes that it must know before it can go on.
WAITS = 12
# More of them with the statistics that look at documents one by one, a document; and with those of sampled tokens.
WAITS_A_DOCUMENT, WAITS_FOR_SAMPLES = 4, 4


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[TokenSequence]:
    generator = np.random.default_rng(5)
    return [TokenSequence(generator.integers(0, 250, length), (length,), ("a",)) for length in lengths]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """The one that the pretend GPUs attend with."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def assert_same(found: Collected, expected: Collected, rounding: float = 0.0) -> None:
    assert found.usage == expected.usage and found.layers.keys() == expected.layers.keys()
    for layer, arrays in expected.layers.items():
        assert found.layers[layer].keys() == arrays.keys()
        for name, values in arrays.items():
            ours = found.layers[layer][name]
            np.testing.assert_allclose(ours, values, rounding, rounding, err_msg=f"{layer} {name}", equal_nan=False)


@pytest.mark.parametrize(
    ("family", "gpus"), [*((name, 1) for name in FAMILY_NAMES), *((name, 2) for name in ALL_FAMILIES)]
)
def test_every_statistic_is_the_same_on_gpus(family: str, gpus: int) -> None:
    row = FAMILIES[family]
    expected = collect(tiny_model(family), sequences(), row, EVERYTHING, 2)
    counts = gate_ratio_counts(tiny_model(family), sequences(), row, 2)
    with PretendGpus(gpus):
        model = placed(tiny_model(family), gpus)
        assert_same(collect(model, sequences(), row, EVERYTHING, 2), expected)
        for layer, found in gate_ratio_counts(model, sequences(), row, 2).items():
            np.testing.assert_array_equal(found, counts[layer])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_layers_that_no_gpu_holds_are_brought_to_one(family: str, tmp_path: Path) -> None:
    """As ``model.device=auto`` maps a model that is larger than its GPUs: half of it waits in the host's memory.

    To rounding for gpt_oss: what its products on a CPU round to hangs on how weights are aligned in memory.
    """
    model, row = save_tiny(tmp_path, family), FAMILIES[family]
    expected = collect(load_model(tmp_path), sequences(), row, EVERYTHING, 2)
    where = {name: device if device == "cuda:0" else "cpu" for name, device in halves(model).items()}
    with PretendGpus():
        loaded = load_model(tmp_path, device=where)
        assert {weight.device.type for weight in loaded.parameters()} == {"cuda", "meta"}
        assert_same(collect(loaded, sequences(), row, EVERYTHING, 2), expected, 1e-6 if family == "gpt_oss" else 0.0)


def waits(names: frozenset[str], experts: int = 8, lengths: tuple[int, ...] = LENGTHS) -> tuple[int, Counter[str]]:
    """How often the host waits in a pass for ``names``, a batch of two sequences and a layer; and the lines where it
    does, with those of the end of the pass."""

    def counted(batches: int) -> Counter[str]:
        with PretendGpus() as gpus:
            model = placed(tiny_model("qwen3_moe", num_experts=experts), 1)
            gpus.waits.clear()
            collect(model, sequences(lengths[:2] * batches), FAMILIES["qwen3_moe"], names, 2)
        # what transformers looks at before the first layer is not ours
        return Counter({line: times for line, times in gpus.waits.items() if "model.base_model(" not in line})

    more = counted(3)
    a_batch, left = divmod(sum((more - counted(2)).values()), 2)
    assert not left, "both layers wait alike"
    return a_batch, more


def test_the_host_waits_a_bounded_number_of_times() -> None:
    ordinary, lines = waits(ORDINARY)
    assert 0 < ordinary <= WAITS, lines
    everything, lines = waits(EVERYTHING)
    assert everything <= WAITS + 2 * WAITS_A_DOCUMENT + WAITS_FOR_SAMPLES, lines
    few, lines = waits(frozenset({"frequency", "gate_sum", "ean_sum", "weighted_ean_sum"}))
    assert few < ordinary, lines


def test_the_host_waits_no_longer_where_there_are_more_experts() -> None:
    for names in (ORDINARY, EVERYTHING):
        assert waits(names, experts=32)[0] == waits(names, experts=8)[0]


def test_a_wait_for_each_expert_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the bounds above: what they are there to catch."""
    add: Callable[..., None] = all_tokens.OutputMean.add

    def add_and_look(self: Any, event: Any) -> None:
        add(self, event)
        assert all(self.sums[expert].sum().item() < 1e9 for expert in range(len(self.sums)))

    monkeypatch.setattr(all_tokens.OutputMean, "add", add_and_look)
    found, lines = waits(ORDINARY)
    assert found > WAITS and waits(ORDINARY, experts=32)[0] == found + 24
    assert any("test_devices.py" in line and "_local_scalar_dense" in line for line in lines)


def test_sums_on_another_device_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the first test: a collector that forgets on which device its layer is."""

    def on_the_first(self: Any) -> None:
        shape = (self.sources, self.experts.num_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64, device="cuda:0")

    with PretendGpus(2):
        model = placed(tiny_model("qwen3_moe"), 2)
        monkeypatch.setattr(pairs.Usage, "__post_init__", on_the_first)
        with pytest.raises(MixedDevicesError, match="cuda:0, cuda:1, at harness/calibration/collectors/pairs.py"):
            collect(model, sequences(), FAMILIES["qwen3_moe"], ORDINARY, 2)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)  # nothing is brought to where it is needed
        with pytest.raises(MixedDevicesError, match="cpu, cuda:0"):
            collect(model, sequences(), FAMILIES["qwen3_moe"], ORDINARY, 2)
