import numpy as np
import pytest

from harness.calibration.collect import collect
from harness.calibration.collectors import samples
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import SAMPLED
from harness.families.table import FAMILIES
from tests.brute_force import brute_force_statistics
from tests.tiny import tiny_model

LENGTHS = (31, 20, 9, 2)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_sample_is_evenly_spaced_over_the_pass_however_it_is_batched(monkeypatch, batch_size):
    monkeypatch.setattr(samples, "sampled_tokens", lambda num_experts: 7)
    model, generator = tiny_model("qwen3_moe"), np.random.default_rng(2)
    texts = [generator.integers(0, 256, length).tolist() for length in LENGTHS]
    sequences = [TokenSequence(np.array(text), (len(text),), ("text",)) for text in texts]
    found = collect(model, sequences, FAMILIES["qwen3_moe"], SAMPLED, batch_size)
    expected = brute_force_statistics(model, texts)
    places = [0, 8, 17, 26, 35, 44, 53]  # floor(62 n / 7)
    for layer, arrays in found.layers.items():
        assert arrays.keys() == SAMPLED | {"frequency"}
        inputs = expected.get(layer, "sampled_inputs")[places]
        np.testing.assert_allclose(arrays["sampled_inputs"], inputs, rtol=1e-4, atol=1e-5)
        gram = expected.get(layer, "sampled_output_gram")[:, :, places]
        np.testing.assert_allclose(arrays["sampled_output_gram"], gram, rtol=1e-4, atol=1e-5 * np.abs(gram).max())
