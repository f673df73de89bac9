import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader, padded
from harness.checkpoints.layout import LayerLayout, is_compact, layer_layouts, with_layouts
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.sizes import checkpoint_sizes
from harness.checkpoints.weight_files import INDEX, WEIGHTS
from harness.errors import WinnowError
from harness.families.table import FAMILIES, family_of
from tests.harness.checkpoints.compressed import ragged_plan
from tests.tiny import FAMILY_NAMES, save_tiny

DOWN = 2  # place of the down matrix in Family.expert_tensors of families that store experts apart


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Family -> (single file, shards of at most 100 KB) of the same model."""
    folders = {}
    for name in FAMILY_NAMES:
        single, sharded = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-sharded")
        save_tiny(single, name)
        save_tiny(sharded, name, max_shard_size="100KB")
        folders[name] = (single, sharded)
    return folders


@pytest.fixture
def single(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["qwen3_moe"][0], tmp_path / "single"))


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["qwen3_moe"][1], tmp_path / "sharded"))


def check(folder: Path) -> None:
    config = read_config(folder)
    check_checkpoint(folder, family_of(config), config)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_one_file_and_many_shards_read_the_same(originals, name):
    single, sharded = (CheckpointReader(folder) for folder in originals[name])
    assert len(single.files) == 1 and len(sharded.files) > 2
    assert sorted(single.names()) == sorted(sharded.names())
    for tensor in single.names():
        assert torch.equal(single.tensor(tensor), sharded.tensor(tensor))
        assert single.shape(tensor) == tuple(single.tensor(tensor).shape)
    check(originals[name][0])
    check(originals[name][1])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_expert_weights_are_those_of_the_model_in_memory(tmp_path, name):
    model = save_tiny(tmp_path, name, max_shard_size="100KB")
    read = expert_weights_reader(tmp_path, FAMILIES[name])
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for expert in range(8):
            weights = read(layer, expert)
            gate, up = experts.gate_up_proj[expert].detach().numpy().reshape(2, 16, 32)
            np.testing.assert_array_equal(weights.gate, gate)
            np.testing.assert_array_equal(weights.up, up)
            np.testing.assert_array_equal(weights.down, experts.down_proj[expert].detach().numpy())
            assert weights.down.dtype == np.float32


def test_expert_weights_of_a_bfloat16_model_come_in_float32(single):
    exact = expert_weights_reader(single, FAMILIES["qwen3_moe"])(1, 3).up
    change_weights(single, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    rounded = expert_weights_reader(single, FAMILIES["qwen3_moe"])(1, 3).up
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, torch.tensor(exact).bfloat16().float().numpy())


def test_sizes_count_every_parameter(tmp_path):
    model = save_tiny(tmp_path, "olmoe", max_shard_size="100KB")
    sizes = checkpoint_sizes(tmp_path)
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert sizes["parameters"] == sum(p.numel() for p in model.parameters())
    assert sizes["expert_parameters"] == 2 * 8 * 3 * 16 * 32
    assert sizes["expert_bytes"] == 4 * sizes["expert_parameters"]
    assert (sizes["weight_bytes"], sizes["largest_shard_bytes"]) == (sum(files), max(files))
    assert sizes["padding_bytes"] == 0


def test_no_weights(single):
    (single / WEIGHTS).unlink()
    with pytest.raises(WinnowError, match="no weights in"):
        check(single)


@pytest.mark.parametrize("length", [0, 5, 300, -10])
def test_a_truncated_file_is_named(single, length):
    content = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(WinnowError, match=f"{WEIGHTS} is truncated"):
        check(single)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WinnowError, match=f"{shard.name} is truncated"):
        check(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WinnowError, match=f"shard {shard.name} is missing"):
        check(sharded)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(WinnowError, match="not a valid index"):
        check(sharded)


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.gate.weight"])
def test_a_missing_tensor_is_named(single, tensor):
    change_weights(single, lambda tensors: tensors.pop(tensor))
    with pytest.raises(WinnowError, match=f"no tensor {tensor}"):
        check(single)


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.experts.5.down_proj.weight", "model.layers.0.mlp.gate.weight"])
def test_a_tensor_of_another_shape_is_named(single, tensor):
    change_weights(single, lambda tensors: tensors.update({tensor: tensors[tensor][:-1].clone()}))
    with pytest.raises(WinnowError, match=f"{tensor} has shape"):
        check(single)


def test_more_experts_than_announced(single):
    change_config(single, num_local_experts=7)
    with pytest.raises(WinnowError, match=r"experts\.7\..* more experts than announced"):
        check(single)


def test_quantised_expert_tensors_are_refused(single):
    scale = "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv"
    change_weights(single, lambda tensors: tensors.update({scale: torch.ones(1)}))
    with pytest.raises(WinnowError, match="weight_scale_inv"):
        check(single)


def test_an_incomplete_config(single):
    config = read_config(single)
    for key in ("hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_local_experts"):
        with pytest.raises(WinnowError):
            check_checkpoint(single, FAMILIES["qwen3_moe"], {k: v for k, v in config.items() if k != key})


def two_experts(width) -> dict:
    return {"version": 1, "layers": {layer: {"experts": 2, "width": width, "route": [0, 1]} for layer in "01"}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"version": 2, "layers": {}}, "version 2"),
        ({"version": 1, "layers": {"0": {"experts": 2, "width": 16, "route": [0, 1]}}}, "complete"),
        (
            {"version": 1, "layers": dict.fromkeys("01", {"experts": 2, "width": 16, "route": [0, 2]})},
            "route",
        ),
        ({"version": 1, "layers": dict.fromkeys("01", {"experts": 0, "width": [], "route": []})}, "route"),
        (two_experts([16]), "layer 0 has 2 experts, but 1 widths"),
        (two_experts([16, 8, 4]), "layer 0 has 2 experts, but 3 widths"),
        (two_experts([]), "layer 0 has 2 experts, but 0 widths"),
        (two_experts([16, 0]), "whole numbers of at least 1"),
        (two_experts([16, -8]), "whole numbers of at least 1"),
        (two_experts([16, 8.5]), "whole numbers of at least 1"),
        (two_experts([16, None]), "whole numbers of at least 1"),
        (two_experts([16, [8]]), "whole numbers of at least 1"),
        (two_experts(0), "whole numbers of at least 1"),
        (two_experts(None), "complete"),
        (two_experts({"0": 16}), "complete"),
        (two_experts("wide"), "complete"),
    ],
)
def test_a_broken_compact_section(single, section, message):
    change_config(single, winnow=section)
    with pytest.raises(WinnowError, match=message) as caught:
        layer_layouts(read_config(single), FAMILIES["qwen3_moe"])
    assert "\n" not in str(caught.value)


def test_a_layer_has_one_width_or_one_for_each_expert():
    config = {"num_hidden_layers": 2, "winnow": two_experts([16, 8])}
    config["winnow"]["layers"]["1"] = {"experts": 2, "width": 16, "route": [1, 0, 1]}
    first, second = layer_layouts(config, FAMILIES["qwen3_moe"]).values()
    assert (first.widths, first.width, first.experts, first.is_ragged) == ((16, 8), 16, 2, True)
    assert (second.widths, second.width, second.experts, second.is_ragged) == ((16, 16), 16, 2, False)


def test_layouts_are_read_as_they_were_written():
    layouts = {0: LayerLayout((16, 8), (1, 0, 1)), 1: LayerLayout((12, 12, 12), (0, 1, 2))}
    plain = {"num_hidden_layers": 2, "num_experts": 3, "moe_intermediate_size": 16}
    config = with_layouts(plain, layouts)
    assert is_compact(config) and not is_compact(plain)
    assert layer_layouts(json.loads(json.dumps(config)), FAMILIES["qwen3_moe"]) == layouts
    assert {key: config[key] for key in plain} == plain
    assert config["winnow"]["layers"]["1"]["width"] == 12  # one number, where all experts have it


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("place", range(3))
def test_every_expert_is_held_to_its_own_width(originals, tmp_path, name, place):
    family, target = FAMILIES[name], tmp_path / "out"
    apply_plan(originals[name][0], ragged_plan(), target)
    check(target)
    assert load_file(target / WEIGHTS)[family.expert_tensors[DOWN].name.format(layer=1, expert=3)].shape == (32, 13)
    tensor = family.expert_tensors[place].name.format(layer=1, expert=2)  # 4 channels become the 13 of the widest

    def widen(tensors):
        rows, columns = (32, 13) if place == DOWN else (13, 32)
        tensors[tensor] = padded(tensors[tensor], rows, columns)

    change_weights(target, widen)
    with pytest.raises(WinnowError, match=f"{tensor} has shape"):
        check(target)


def test_padding_puts_zeros_behind_the_channels():
    matrix = torch.arange(1.0, 7.0).reshape(2, 3)
    assert padded(matrix, 2, 3) is matrix
    expected = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(padded(matrix, 3, 4), expected)
