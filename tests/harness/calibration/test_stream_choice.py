"""When a model is read one layer at a time, and what is said where there is too little memory."""

from pathlib import Path

import pytest
import torch

from harness.calibration import streamed
from harness.calibration.collect import collect
from harness.calibration.streamed import StreamedModel, free_memory, open_for_pass
from harness.checkpoints.by_layer import ModelByLayer
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from tests.harness.calibration.streams import assert_same, plain
from tests.tiny import tiny_model

NAMES = frozenset({"ean_sum"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(folder: Path, itemsize: int = 4) -> int:
    return itemsize * sum(parameter.numel() for parameter in tiny_model("qwen3_moe").parameters())


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(streamed, "free_memory", lambda device: int(size))


def test_a_model_that_fits_is_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(open_for_pass(model), StreamedModel)
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2), ("auto", 4)):
        size = streamed.MARGIN * weights(model, itemsize)
        free(monkeypatch, size + 1)
        assert not isinstance(open_for_pass(model, dtype), StreamedModel)
        free(monkeypatch, size - 1)
        assert isinstance(open_for_pass(model, dtype), StreamedModel)
        assert not isinstance(open_for_pass(model, dtype, stream="never"), StreamedModel)
        assert not isinstance(open_for_pass(model, dtype, device={"": "cpu"}), StreamedModel), "placed by its map"


def test_memory_gib_is_a_limit_too(model: Path) -> None:
    small = (streamed.MARGIN * weights(model) - 2) / 2**30
    assert isinstance(open_for_pass(model, memory_gib=small), StreamedModel)
    assert not isinstance(open_for_pass(model, memory_gib=2 * small), StreamedModel)


def test_it_is_what_is_left_that_the_text_may_take(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_layer = ModelByLayer(model)
    layer, other = int(4 / 3 * by_layer.layer_bytes()), by_layer.other_bytes()
    assert by_layer.layer_bytes() < weights(model) / 2 and other == 4 * 32 * 301  # the embedding and the last norm
    found = open_for_pass(model, stream="always", memory_gib=1)
    assert isinstance(found, StreamedModel) and found.memory == 2**30 - layer - other
    free(monkeypatch, 2**20)
    found = open_for_pass(model, stream="always")
    assert isinstance(found, StreamedModel) and found.memory == int(2**20 / streamed.MARGIN) - layer


def test_less_memory_than_one_layer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_layer = ModelByLayer(model)
    needed = (4 / 3 * by_layer.layer_bytes() + by_layer.other_bytes()) / 2**30
    line = r"one layer of model at a time needs \S+ GiB of memory .* but {}: set calibration.memory_gib to at least"
    with pytest.raises(WinnowError, match=line.format("calibration.memory_gib=1e-05 is less")) as told:
        open_for_pass(model, stream="always", memory_gib=1e-5)
    enough = float(str(told.value).split("at least ")[1].split()[0])
    assert needed < enough < 1.3 * needed
    found = collect(open_for_pass(model, stream="always", memory_gib=enough), plain(), FAMILIES["qwen3_moe"], NAMES, 1)
    assert_same(found, collect(open_for_pass(model), plain(), FAMILIES["qwen3_moe"], NAMES, 1), bound=1e-6)
    free(monkeypatch, 1000)
    with pytest.raises(WinnowError, match=line.format("what is free here is less")):
        open_for_pass(model)


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_what_is_free(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the group itself and of all that it is in; files that are cached can go."""
    limit, used, cached, root, line = {
        1: (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
            "memory",
            "4:cpu:/x\n3:memory:/a/b",
        ),
        2: ("memory.max", "memory.current", "inactive_file", "", "0::/a/b"),
    }[version]
    (tmp_path / "self").write_text(f"{line}\n")
    for folder, most in (("a/b", 9**9 if version == 1 else "max"), ("a", 6 * 2**20)):
        here = tmp_path / "groups" / root / folder
        here.mkdir(parents=True, exist_ok=True)
        (here / limit).write_text(f"{most}\n")
        (here / used).write_text(f"{5 * 2**20}\n")
        (here / "memory.stat").write_text(f"anon 7\n{cached} {2**20}\n")
    monkeypatch.setattr(streamed, "_GROUPS_OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(streamed, "_GROUPS", tmp_path / "groups")
    assert free_memory(torch.device("cpu")) == 2 * 2**20
    (tmp_path / "groups" / root / "a" / used).write_text(f"{8 * 2**20}\n")
    assert free_memory(torch.device("cpu")) == 0
    monkeypatch.setattr(streamed, "_GROUPS_OF_PROCESS", tmp_path / "none")
    assert free_memory(torch.device("cpu")) > 2**25
