"""What the tests of streamed passes share."""

from pathlib import Path

import numpy as np

from harness.calibration.collected import Collected
from harness.calibration.streamed import Model, StreamedModel, open_for_pass
from harness.calibration.tokens import TokenSequence


def plain(lengths: tuple[int, ...] = (40, 33, 40, 21, 9)) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    return [
        TokenSequence(generator.integers(0, 250, length), (length,), ("ab"[number % 2],))
        for number, length in enumerate(lengths)
    ]


def packed() -> list[TokenSequence]:
    generator = np.random.default_rng(1)
    return [TokenSequence(generator.integers(0, 250, 40), (17, 20, 3), ("a", "b", "a")) for _ in range(3)]


def streamed(
    folder: Path, dtype: str = "float32", memory_gib: float | None = None, state: Path | None = None
) -> StreamedModel:
    model: Model = open_for_pass(folder, dtype, stream="always", memory_gib=memory_gib, state=state)
    assert isinstance(model, StreamedModel)
    return model


def assert_same(found: Collected, expected: Collected, bound: float = 0.0) -> None:
    """To the last bit, or within ``bound`` of the largest number of each array."""
    assert found.layers.keys() == expected.layers.keys()
    for layer, arrays in expected.layers.items():
        assert arrays.keys() == found.layers[layer].keys()
        for name, want in arrays.items():
            got = found.layers[layer][name]
            assert got.dtype == want.dtype and got.shape == want.shape, (layer, name)
            if bound and want.dtype != bool:
                limit = bound * np.abs(want).max()
                np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=f"{layer} {name}")
            else:
                np.testing.assert_array_equal(got, want, err_msg=f"{layer} {name}")
    assert found.usage == expected.usage
    assert (found.tokens, found.sequences, found.part) == (expected.tokens, expected.sequences, expected.part)
    assert (found.num_experts, found.top_k, found.n_group) == (expected.num_experts, expected.top_k, expected.n_group)
