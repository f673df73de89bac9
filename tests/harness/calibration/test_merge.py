"""Parts of a corpus, merged, against one pass over all of it; and each rule against arithmetic by hand."""

import numpy as np
import pytest

from harness.calibration.batches import in_order_of_pass
from harness.calibration.collect import collect
from harness.calibration.collected import AffineStep, Collected, Part
from harness.calibration.collectors import samples
from harness.calibration.merge import merged
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import RELEASED, SAMPLED, STATISTICS
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from tests.tiny import tiny_model

ALL = frozenset(STATISTICS)


def corpus(lengths: tuple[int, ...], seed: int = 0) -> list[TokenSequence]:
    generator = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        pieces = (length,) if length < 8 else (length - 5, 5)  # some are packed
        sources = tuple("abc"[(number + place) % 3] for place in range(len(pieces)))
        found.append(TokenSequence(generator.integers(0, 250, length), pieces, sources))
    return found


def passes(model, sequences: list[TokenSequence], cuts: tuple[int, ...], batch_size: int = 2) -> list[Collected]:
    """A pass over each part; ``cuts`` are the first sequences of the second, third, ... in the order of a pass."""
    family, ordered = FAMILIES[model.config.model_type], in_order_of_pass(sequences)
    total, found = sum(len(sequence.input_ids) for sequence in ordered), []
    for start, end in zip((0, *cuts), (*cuts, len(ordered)), strict=True):
        offset = sum(len(sequence.input_ids) for sequence in ordered[:start])
        part = Part(offset, total)
        found.append(collect(model, ordered[start:end], family, ALL, batch_size, part=part))
    return found


def assert_equal(actual: Collected, expected: Collected) -> None:
    assert actual.layers.keys() == expected.layers.keys()
    for layer, arrays in expected.layers.items():
        assert arrays.keys() == actual.layers[layer].keys() == ALL
        for name, want in arrays.items():
            got = actual.layers[layer][name]
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=f"{layer} {name}")
    assert actual.usage == expected.usage
    assert (actual.tokens, actual.sequences) == (expected.tokens, expected.sequences)
    assert actual.part is None and actual.steps == {}


@pytest.mark.parametrize("cuts", [(3, 4), (1, 2), (5, 8)])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_three_parts_equal_one_pass(family: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = tiny_model(family), corpus((40, 33, 7, 21, 9, 40, 1, 14, 2))
    whole = collect(model, sequences, FAMILIES[family], ALL, 2)
    assert_equal(merged(passes(model, sequences, cuts)), whole)
    monkeypatch.setattr(samples, "sampled_tokens", lambda num_experts: 7)  # the last part has none of them
    few = collect(model, sequences, FAMILIES[family], ALL, 2)
    assert few.layers[1]["sampled_inputs"].shape == (7, 32)
    assert_equal(merged(passes(model, sequences, cuts)), few)


def test_an_average_that_begins_in_a_later_part() -> None:
    model, sequences = tiny_model("mixtral"), corpus((3, 3, 2, 2, 2, 2, 1, 1), seed=2)
    parts = passes(model, sequences, (1, 5))
    begun = [step.decay < 1 for step in (part.steps[0]["released_activation"] for part in parts)]
    assert (~begun[0] & begun[1]).any() and (begun[0] & ~begun[1]).any() and (~begun[0] & ~begun[1] & begun[2]).any()
    assert_equal(merged(parts[::-1]), collect(model, sequences, FAMILIES["mixtral"], ALL, 2))


def test_what_a_pass_leaves_out_does_not_matter_to_the_rest_of_it() -> None:
    """A part alone has the statistics of its own tokens, but for the samples, of which it has its share."""
    model, sequences = tiny_model("olmoe"), corpus((20, 11, 6))
    (_, second) = passes(model, sequences, (1,))
    alone = collect(model, in_order_of_pass(sequences)[1:], FAMILIES["olmoe"], ALL, 2)
    for layer, arrays in alone.layers.items():
        for name in ALL - SAMPLED:
            np.testing.assert_array_equal(second.layers[layer][name], arrays[name])


def part(offset: int, tokens: int, total: int, arrays: dict, steps: dict | None = None, source: str = "a") -> Collected:
    usage = {source: {"0": [tokens, 0]}}
    return Collected(2, 1, 1, 1, tokens, 1.5, {0: arrays}, usage, Part(offset, total), {0: steps or {}})


def test_each_rule_by_hand() -> None:
    two = lambda *values: np.array(values, dtype=float)  # noqa: E731
    averages = {name: AffineStep(two(0.9, 1.0), np.array([[0.4], [0.0]])) for name in ("released_activation",)}
    first = part(
        0, 3, 4,
        {
            "frequency": two(1, 2), "max_activation": two(5, 0), "output_mean": np.array([[4.0], [8.0]]),
            "sampled_inputs": np.array([[1.0], [2.0]]), "released_activation": np.array([[4.0], [0.0]]),
        },
        averages,
    )  # fmt: skip
    second = part(
        3, 1, 4,
        {
            "frequency": two(1, 0), "max_activation": two(3, 7), "output_mean": np.array([[0.0], [4.0]]),
            "sampled_inputs": np.array([[3.0]]), "released_activation": np.array([[1.0], [6.0]]),
        },
        {"released_activation": AffineStep(two(0.5, 0.5), np.array([[0.5], [3.0]]))},
        source="b",
    )  # fmt: skip
    found = merged([second, first])
    arrays = found.layers[0]
    assert arrays["frequency"].tolist() == [2, 2] and arrays["max_activation"].tolist() == [5, 7]
    assert arrays["output_mean"].tolist() == [[3.0], [7.0]]
    assert arrays["sampled_inputs"].tolist() == [[1.0], [2.0], [3.0]]
    assert arrays["released_activation"].tolist() == [[0.5 * 4.0 + 0.5], [6.0]]
    assert found.usage == {"a": {"0": [3, 0]}, "b": {"0": [1, 0]}}
    assert (found.tokens, found.sequences, found.seconds) == (4, 2, 3.0)


def test_steps_of_an_average_are_those_of_a_loop() -> None:
    """v -> 0.9 v + 0.1 x, the first x as it is; whatever v was before, decay * v + from_zero is what it becomes."""
    model, sequences = tiny_model("qwen3_moe"), corpus((6, 5, 4))
    family = FAMILIES["qwen3_moe"]
    whole = collect(model, sequences, family, RELEASED, part=Part(0, 15))
    each = [collect(model, [sequence], family, RELEASED, part=Part(0, 15)) for sequence in sequences]
    for name in RELEASED:
        bound = 1e-6 * np.abs(whole.layers[0][name]).max()
        for expert in range(8):
            steps = [one.layers[0][name][expert] for one in each if one.steps[0][name].decay[expert] < 1]
            value, before, begun = np.zeros_like(whole.layers[0][name][expert]), 5.0, False
            for x in steps:
                value = 0.9 * value + 0.1 * x if begun else x
                before, begun = 0.9 * before + 0.1 * x, True
            step = whole.steps[0][name]
            np.testing.assert_allclose(whole.layers[0][name][expert], value, rtol=0, atol=bound)
            np.testing.assert_allclose(step.decay[expert] * 5.0 + step.from_zero[expert], before, rtol=1e-6, atol=bound)


FREQUENCY = {"frequency": np.zeros(2)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no parts"),
        ([part(0, 3, 9, FREQUENCY), part(5, 4, 9, FREQUENCY)], "from token 3 to 5 is missing"),
        ([part(3, 6, 9, FREQUENCY)], "from token 0 to 3 is missing"),
        ([part(0, 3, 9, FREQUENCY), part(3, 4, 9, FREQUENCY)], "from token 7 to 9 is missing"),
        ([part(0, 9, 9, FREQUENCY), part(0, 9, 9, FREQUENCY)], "from token 0 is there twice"),
        ([part(0, 3, 9, FREQUENCY), part(3, 6, 8, FREQUENCY)], "different models, corpora or statistics"),
        ([part(0, 3, 9, FREQUENCY), part(3, 6, 9, FREQUENCY | {"ean_sum": np.zeros(2)})], "different models"),
        ([Collected(2, 1, 1, 1, 9, 1.5, {0: FREQUENCY}, {})], "saw all of it"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: list[Collected], message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        merged(parts)
