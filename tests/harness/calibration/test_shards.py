"""Shards of a calibration pass, computed apart and merged, against one pass; and every way in which they do not fit."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.calibration import shards as shards_module
from harness.calibration.calibrate import calibrate, calibrate_shard
from harness.calibration.shards import check_shard, parts
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.load import load_model
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError
from tests.harness.calibration.test_merge import corpus
from tests.tiny import save_tiny

ALL = frozenset(STATISTICS)
SEQUENCES = corpus((40, 33, 7, 21, 9, 40, 1, 14, 2))  # 167 tokens, some packed; batches of 2 have 80, 54, 23, 9 and 1


def unpacked(sequences: list[TokenSequence]) -> list[TokenSequence]:
    return [replace(each, lengths=(len(each.input_ids),), sources=each.sources[:1]) for each in sequences]


class Loader:
    """Counts how often the model is loaded: once a pass."""

    def __init__(self, folder: Path):
        self.folder, self.passes = folder, 0

    def __call__(self):
        self.passes += 1
        return load_model(self.folder, "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    save_tiny(folder, "olmoe")
    return folder


def shard(model: Path, cache: Path, number: int, names=ALL, sequences=SEQUENCES, count=3, batch_size=2, **options):
    load = options.pop("load", Loader(model))
    return calibrate_shard(model, load, sequences, frozenset(names), cache, number, count, batch_size, **options)


def whole(model: Path, cache: Path, names=ALL, sequences=SEQUENCES, count: int | None = 3, batch_size=2, **options):
    def load():
        if count is not None:
            pytest.fail("the model is loaded to merge shards")
        return load_model(model, "float32")

    return calibrate(model, load, sequences, frozenset(names), cache, batch_size, shards=count, **options)


def assert_same(actual, expected, names=ALL) -> None:
    assert actual.layers.keys() == expected.layers.keys()
    for layer, arrays in expected.layers.items():
        for name in names:
            got, want = actual.layers[layer][name], arrays[name]
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=f"{layer} {name}")
    assert actual.usage == expected.usage
    assert (actual.tokens, actual.sequences) == (expected.tokens, expected.sequences)
    assert actual.part is None and actual.steps == {}


@pytest.mark.parametrize(
    ("family", "packed"), [("qwen3_moe", True), ("qwen3_moe", False), ("deepseek_v3", True), ("gpt_oss", False)]
)
@pytest.mark.parametrize("count", [1, 3, 9])  # 9 are more than there are batches
def test_shards_equal_one_pass(family: str, packed: bool, count: int, tmp_path: Path) -> None:
    folder, sequences = tmp_path / "model", SEQUENCES if packed else unpacked(SEQUENCES)
    save_tiny(folder, family)
    files = [shard(folder, tmp_path / "c", number, sequences=sequences, count=count) for number in range(count)]
    assert sum(file is not None for file in files) == min(count, 5)
    statistics, found = whole(folder, tmp_path / "c", sequences=sequences, count=count)
    expected = whole(folder, tmp_path / "one", sequences=sequences, count=None)[1]
    assert_same(found, expected)
    assert statistics.expert_weights(found.layers and min(found.layers), 0).gate.shape == (16, 32)


def test_merged_statistics_are_those_of_the_ordinary_cache(model: Path, tmp_path: Path) -> None:
    for number in range(3):
        shard(model, tmp_path, number, {"ean_sum"})
    merged = whole(model, tmp_path, {"ean_sum"})[1]
    for file in tmp_path.glob("*.shards/*.npz"):
        file.unlink()
    for count in (3, None):
        again = calibrate(
            model, lambda: pytest.fail("computed"), SEQUENCES, frozenset({"ean_sum"}), tmp_path, shards=count
        )
        np.testing.assert_array_equal(again[1].layers[0]["ean_sum"], merged.layers[0]["ean_sum"])


def test_statistics_of_the_cache_stay_beside_those_of_new_shards(model: Path, tmp_path: Path) -> None:
    whole(model, tmp_path, {"ean_sum"}, count=None)
    for number in range(3):
        shard(model, tmp_path, number, {"gate_sum"})
    both = whole(model, tmp_path, {"gate_sum"})[1]
    assert both.names == {"frequency", "ean_sum", "gate_sum"}
    assert_same(both, whole(model, tmp_path / "one", both.names, count=None)[1], both.names)


def test_a_finished_shard_is_not_computed_again(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load = Loader(model)
    first = shard(model, tmp_path, 1, {"ean_sum", "gate_sum"}, load=load)
    content = first.read_bytes()
    assert shard(model, tmp_path, 1, {"gate_sum"}, load=load) == first
    assert load.passes == 1 and first.read_bytes() == content and "shard 1 of 3 is there" in caplog.text
    shard(model, tmp_path, 1, {"max_activation"}, load=load)
    assert load.passes == 2  # the union
    shard(model, tmp_path, 1, {"max_activation", "ean_sum", "gate_sum"}, load=load)
    assert load.passes == 2
    shard(model, tmp_path, 0, {"max_activation"}, load=load)
    shard(model, tmp_path, 2, {"max_activation"}, load=load)
    assert whole(model, tmp_path, {"max_activation"})[1].names == {"frequency", "max_activation"}


def test_a_killed_pass_leaves_the_other_shards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = shard(model, tmp_path, 0)
    with monkeypatch.context() as patched:
        patched.setattr(
            np, "savez", lambda file, **arrays: (file.write(b"half"), (_ for _ in ()).throw(KeyboardInterrupt))
        )
        with pytest.raises(KeyboardInterrupt):
            shard(model, tmp_path, 1)
    left = kept.parent / ".1-of-3.abc.tmp"
    left.write_bytes(b"half")
    with pytest.raises(WinnowError, match=r"shards 1, 2 of 3 missing: .* calibration.shard=1 computes the first"):
        whole(model, tmp_path)
    load = Loader(model)
    for number in range(3):
        shard(model, tmp_path, number, load=load)
    assert load.passes == 2 and not left.exists()
    assert_same(whole(model, tmp_path)[1], whole(model, tmp_path / "one", count=None)[1])


def test_a_missing_shard_is_named_with_what_computes_it(model: Path, tmp_path: Path) -> None:
    for number in (0, 2):
        shard(model, tmp_path, number, {"ean_sum"})
    with pytest.raises(WinnowError) as caught:
        whole(model, tmp_path, {"ean_sum"})
    assert str(caught.value) == (
        "calibration: shard 1 of 3 missing: the same command with calibration.shard=1 computes it"
    )
    shard(model, tmp_path, 1, {"gate_sum"})
    with pytest.raises(WinnowError, match="shard 1 of 3 without ean_sum: the same command with calibration.shard=1"):
        whole(model, tmp_path, {"ean_sum"})


def test_shards_of_something_else_are_not_mixed_in(model: Path, tmp_path: Path) -> None:
    other = corpus((40, 33, 7, 21, 9, 40, 1, 14, 2), seed=1)
    for number in (0, 1):
        shard(model, tmp_path, number, {"ean_sum"})
    for options, told in (
        ({"sequences": other}, "calibration text"),
        ({"dtype": "bfloat16"}, "number format"),
        ({"fingerprint": "m"}, "model"),
        ({"fingerprint": "m", "sequences": other}, "model and calibration text"),
    ):
        cache = tmp_path / told
        shard(model, cache, 2, {"ean_sum"}, **options)
        for number in (0, 1):
            shard(model, cache, number, {"ean_sum"})
        message = rf"shard 2 of 3 missing \(the one that is there is of another {told}\): the same command"
        with pytest.raises(WinnowError, match=message):
            whole(model, cache, {"ean_sum"})
    shard(model, tmp_path, 2, {"ean_sum"}, batch_size=4)
    with pytest.raises(WinnowError, match=r"shard 2 of 3 made with calibration.batch_size=4, not 2"):
        whole(model, tmp_path, {"ean_sum"})
    load = Loader(model)
    shard(model, tmp_path, 2, {"ean_sum"}, load=load)
    assert load.passes == 1
    assert whole(model, tmp_path, {"ean_sum"})[1].tokens == 167
    with pytest.raises(WinnowError, match="shards 0, 1, 2, 3 of 4 missing"):
        whole(model, tmp_path, {"gate_sum"}, count=4, batch_size=1)


def test_no_flipped_byte_of_a_shard_is_used(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = frozenset({"ean_sum", "released_attribution"})
    files = [shard(model, tmp_path, number, names) for number in range(3)]
    expected = whole(model, tmp_path / "one", names, count=None)[1]
    content = files[1].read_bytes()
    refused = 0
    for place in np.linspace(0, len(content) - 1, 150).astype(int):
        flipped = bytearray(content)
        flipped[place] ^= 4
        files[1].write_bytes(bytes(flipped))
        found = shards_module.Shards(tmp_path, _key(model), SEQUENCES, 2, 3)
        try:
            assert_same(found.merged(names), expected, names)
        except WinnowError as error:
            assert "shard 1 of 3 damaged (" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100  # the others are in what the archive says of dates and the like
    files[1].write_bytes(content[: len(content) // 2])
    load = Loader(model)
    shard(model, tmp_path, 1, names, load=load)
    assert load.passes == 1 and "damaged" in caplog.text
    assert_same(whole(model, tmp_path, names)[1], expected, names)


def _key(model: Path) -> dict[str, str]:
    from harness.calibration.tokens import corpus_fingerprint
    from harness.checkpoints.fingerprint import model_fingerprint

    return {"model": model_fingerprint(model), "corpus": corpus_fingerprint(SEQUENCES), "dtype": "float32"}


def test_a_shard_beyond_the_last_batch_has_nothing_to_do(model: Path, tmp_path: Path, caplog) -> None:
    load = Loader(model)
    assert [shard(model, tmp_path, n, {"ean_sum"}, count=4, batch_size=99, load=load) is None for n in range(4)].count(
        False
    ) == 1
    assert load.passes == 1 and "nothing is left for shard" in caplog.text
    assert whole(model, tmp_path, {"ean_sum"}, count=4, batch_size=99)[1].tokens == 167


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_parts_are_contiguous_whole_batches_of_about_as_many_tokens(count: int, batch_size: int) -> None:
    sequences = corpus(tuple(int(n) for n in np.random.default_rng(3).integers(1, 60, 41)))
    found = parts(sequences, batch_size, count)
    assert len(found) == count
    ordered = sorted(sequences, key=lambda each: -len(each.input_ids))
    assert [id(each) for of, _ in found for each in of] == [id(each) for each in ordered]
    place = 0
    largest = max(sum(len(s.input_ids) for s in ordered[i : i + batch_size]) for i in range(0, 41, batch_size))
    total = sum(len(each.input_ids) for each in ordered)
    batches = -(-41 // batch_size)
    assert [bool(of) for of, _ in found] == [True] * min(count, batches) + [False] * (count - min(count, batches))
    for of, part in found:
        assert place % batch_size == 0 or not of
        assert (part.offset, part.total) == (sum(len(each.input_ids) for each in ordered[:place]), total)
        place += len(of)
        assert abs(sum(len(each.input_ids) for each in of) - total / count) <= largest


def test_shards_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    check_shard(None, None)
    check_shard(None, 3)
    check_shard(2, 3)
    with pytest.raises(WinnowError, match="calibration.shard=3: with calibration.shards=3 they count from 0 to 2"):
        shard(model, tmp_path, 3)
    with pytest.raises(WinnowError, match=r"calibration.shard=1 is one of how many\? Set calibration.shards"):
        check_shard(1, None)
    with pytest.raises(WinnowError, match="the calibration corpus is empty"):
        shard(model, tmp_path, 0, sequences=[])
    with pytest.raises(WinnowError, match="calibration.batch_size must be at least 1"):
        shard(model, tmp_path, 0, batch_size=0)
    with pytest.raises(WinnowError, match="unknown statistic 'x'"):
        shard(model, tmp_path, 0, {"x"})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WinnowError, match="cannot write in"):
        shard(model, tmp_path / "file", 0, {"ean_sum"})
