"""The quantised checkpoint of any plan: what is stored, what loads it, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.load import load_model
from harness.checkpoints.packed_weights import Scheme, dequantize, quantize
from harness.checkpoints.quantize import (
    Quantization,
    plain_copy,
    quantize_checkpoint,
    served_facts,
    served_folder,
)
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.sizes import checkpoint_sizes
from harness.checkpoints.weight_files import INDEX
from harness.contracts.plan import CompressionPlan
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from tests.harness.checkpoints.compressed import identity_plan, logits, merged, narrowed, pruned, ragged_plan
from tests.tiny import FAMILY_NAMES, save_tiny

GROUPS = ([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]])
PLANS = {
    "identity": identity_plan(),
    "pruned": pruned([0, 2, 3], [4, 5, 6]),
    "merged": merged(*GROUPS, permute=True),
    "ragged": ragged_plan(),
    "aligned": narrowed(pruned([0, 2, 3], [4, 5, 6]), [8, 16, 8], [16, 16, 8]),
}
INT4, INT8 = Quantization("int4", 4), Quantization("int8", 8)
HIDDEN, WIDTH = 32, 16


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
def source(originals, tmp_path) -> Path:
    """A copy of a plain checkpoint, to be written in."""
    apply_plan(originals["qwen3_moe"][0], identity_plan(), tmp_path / "source")
    return tmp_path / "source"


def compressed(source: Path, plan: CompressionPlan, target: Path) -> Path:
    apply_plan(source, plan, target)
    return target


def packed_copy(source: Path, target: Path, quantization: Quantization = INT4) -> dict:
    return quantize_checkpoint(source, target, quantization)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names()}


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | values))


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_have_the_quantised_values_and_all_else_is_as_it_was(originals, tmp_path, name, plan, symmetric):
    plain = compressed(originals[name][0], PLANS[plan], tmp_path / "plain")
    for folder in originals[name]:
        compressed(folder, PLANS[plan], tmp_path / folder.name)
        packed_copy(tmp_path / folder.name, tmp_path / folder.name, Quantization("int4", 4, symmetric))
    single, sharded = (tmp_path / folder.name for folder in originals[name])
    assert (sharded / INDEX).is_file() and not (single / INDEX).exists()
    before, after, parted = tensors_of(plain), tensors_of(single), tensors_of(sharded)
    assert before.keys() == after.keys() == parted.keys()
    aligned = plan != "ragged"
    for tensor, value in before.items():
        assert torch.equal(after[tensor], parted[tensor])
        if ".experts." not in tensor:
            assert torch.equal(after[tensor], value)
            continue
        inputs = value.shape[1]
        group = HIDDEN if inputs == HIDDEN else (8 if plan == "aligned" else WIDTH) if aligned else None
        expected = dequantize(*quantize(value, Scheme(4, symmetric, group)))
        assert torch.equal(after[tensor], expected)
        assert inputs == 1 or not torch.equal(expected, value)
    check_checkpoint(single, FAMILIES[name], read_config(single))
    assert (single / "plan.json").read_bytes() == (plain / "plan.json").read_bytes()
    assert (single / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("plan", PLANS)
def test_the_loaded_model_computes_with_the_quantised_values(originals, tmp_path, name, plan):
    plain = compressed(originals[name][0], PLANS[plan], tmp_path / "plain")
    packed_copy(plain, tmp_path / "packed", Quantization("int8", 8, symmetric=False))
    tensors = tensors_of(tmp_path / "packed")
    change_weights(plain, lambda stored: stored.update({key: value.contiguous() for key, value in tensors.items()}))
    by_hand, loaded = logits(load_model(plain)), logits(load_model(tmp_path / "packed"))
    assert torch.equal(by_hand, loaded)
    original = logits(load_model(compressed(originals[name][0], PLANS[plan], tmp_path / "again")))
    assert 0 < (loaded - original).abs().max() < 0.2 * original.abs().max()


def test_sizes_count_what_is_stored(originals, tmp_path):
    plain = compressed(originals["qwen3_moe"][0], pruned([0, 2, 3], [4, 5, 6]), tmp_path / "plain")
    change_weights(plain, lambda stored: stored.update({key: value.bfloat16() for key, value in stored.items()}))
    symmetric = packed_copy(plain, tmp_path / "symmetric")
    asymmetric = packed_copy(plain, tmp_path / "asymmetric", Quantization("int4", 4, False, 16))
    matrices, elements = 2 * 3 * 3, HIDDEN * WIDTH
    assert symmetric["expert_parameters"] == matrices * elements
    scales = 6 * (2 * WIDTH * 1 + HIDDEN * 1)  # gate and up in groups of 32, down in groups of 16
    assert symmetric["expert_bytes"] == matrices * (elements // 2 + 16) + 2 * scales
    scales, zero_points = 6 * (2 * WIDTH * 2 + HIDDEN), 6 * (2 * WIDTH * 2 + HIDDEN) // 2
    assert asymmetric["expert_bytes"] == matrices * (elements // 2 + 16) + 2 * scales + zero_points
    assert symmetric["parameters"] == asymmetric["parameters"] == checkpoint_sizes(plain)["parameters"]
    assert symmetric["weight_bytes"] == (tmp_path / "symmetric" / "model.safetensors").stat().st_size
    facts = asymmetric["quantization"]
    assert (facts["bits"], facts["symmetric"], set(facts["groups"].values())) == (4, False, {16})
    assert (facts["matrices"], facts["parameters"]) == (matrices, matrices * elements)
    assert facts["bytes"] == asymmetric["expert_bytes"]


@pytest.mark.parametrize(
    ("plan", "group_size", "groups"),
    [("identity", "auto", {32, 16}), ("ragged", "auto", {32, "row"}), ("aligned", "auto", {32, 8}),
     ("aligned", 8, {8}), ("aligned", 4, {4}), ("ragged", "row", {"row"})],
)  # fmt: skip
def test_groups_fit_every_matrix_of_a_kind(originals, tmp_path, plan, group_size, groups):
    plain = compressed(originals["qwen3_moe"][0], PLANS[plan], tmp_path / "plain")
    done = packed_copy(plain, tmp_path / "packed", Quantization("int4", 4, group_size=group_size))
    assert set(done["quantization"]["groups"].values()) == groups


@pytest.mark.parametrize(
    ("plan", "group_size", "message"),
    [
        ("identity", 32, r"group_size=32 does not divide .*down_proj.* \(16\): 16, 8, 4 would fit"),
        ("aligned", 16, r"\(8\): 8, 4 would fit, and so do auto and row"),
        ("ragged", 8, r"\(1, 4, 5, \.\.\.\): no size from 4 on fits"),
    ],
)
def test_a_group_that_does_not_fit_is_told_what_would(originals, tmp_path, plan, group_size, message):
    plain = compressed(originals["qwen3_moe"][0], PLANS[plan], tmp_path / "plain")
    with pytest.raises(WinnowError, match=message):
        packed_copy(plain, tmp_path / "packed", Quantization("int4", 4, group_size=group_size))
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2"])
def test_linear_takes_attention_and_shared_experts_but_no_router(tmp_path, name):
    save_tiny(tmp_path / "plain", name)
    done = packed_copy(tmp_path / "plain", tmp_path / "packed", Quantization("int8", 8, targets="linear"))
    reader = CheckpointReader(tmp_path / "packed")
    packed = {name for name in reader.names() if reader.scheme(name) is not None}
    assert len(packed) == done["quantization"]["matrices"]
    for part in ("self_attn.o_proj", "shared_expert", "mlp.experts.0.up_proj", "layers.0.mlp.down_proj"):
        assert any(part in name for name in packed)
    for part in (".gate.weight", "shared_expert_gate", "norm", "embed_tokens", "lm_head"):
        assert any(part in name for name in reader.names()) or part == "shared_expert_gate"
        assert not any(part in name for name in packed)
    assert torch.isfinite(logits(load_model(tmp_path / "packed"))).all()


def test_a_served_folder_is_a_copy_for_as_long_as_it_is_needed(source, tmp_path):
    with served_folder(source) as folder:
        assert folder == source
    assert served_facts(source) == {}
    packed_copy(source, tmp_path / "packed", INT8)
    with served_folder(tmp_path / "packed") as folder:
        assert "quantization_config" not in read_config(folder)
        assert tensors_of(folder).keys() == tensors_of(source).keys()
        assert (folder / "tokenizer.json").is_file()
    assert not folder.exists() and not folder.parent.exists()
    assert "dequantised" in served_facts(tmp_path / "packed")["weights"]


@pytest.mark.parametrize("quantization", [INT4, INT8], ids=lambda q: q.name)
@pytest.mark.parametrize("plan", ["identity", "pruned"])
def test_stock_transformers_loads_symmetric_plain_checkpoints(originals, tmp_path, quantization, plan):
    pytest.importorskip("compressed_tensors")
    plain = compressed(originals["qwen3_moe"][0], PLANS[plan], tmp_path / "plain")
    packed_copy(plain, tmp_path / "packed", quantization)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="float32").eval()
    torch.testing.assert_close(logits(stock), logits(load_model(tmp_path / "packed")), rtol=1e-5, atol=1e-5)


def test_quantised_twice_or_changed_afterwards_is_refused(source, tmp_path):
    packed_copy(source, source)
    with pytest.raises(WinnowError, match="quantised already"):
        packed_copy(source, tmp_path / "twice")
    with pytest.raises(WinnowError, match="apply the plan to the unquantised model"):
        apply_plan(source, identity_plan(), tmp_path / "plan")


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_stacked_experts_are_refused(tmp_path, name):
    save_tiny(tmp_path / "model", name)
    with pytest.raises(WinnowError, match=f"{name}.* stack the experts"):
        packed_copy(tmp_path / "model", tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3: choose 4 or 8"),
        ({"symmetric": "yes"}, "symmetric=yes"),
        ({"group_size": 0}, "group_size=0: choose auto, row, or a number"),
        ({"group_size": True}, "group_size=True"),
        ({"group_size": "column"}, "group_size=column"),
        ({"targets": "router"}, "targets=router: choose experts or linear"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(WinnowError, match=message):
        Quantization(**{"name": "int4", "bits": 4} | options)


def test_labels_name_what_differs():
    labels = [
        INT4.label,
        Quantization("int8", 8, False).label,
        Quantization("int4", 4, group_size=16, targets="linear").label,
        Quantization("int4", 4, group_size="row").label,
    ]
    assert labels == ["int4-sym", "int8-asym", "int4-g16-sym-linear", "int4-row-sym"]


def test_broken_packed_checkpoints_are_named(source):
    packed_copy(source, source)
    matrix = "model.layers.0.mlp.experts.0.gate_proj.weight"
    good = load_file(source / "model.safetensors")
    config = read_config(source)

    def check() -> None:
        check_checkpoint(source, FAMILIES["qwen3_moe"], read_config(source))

    check()
    change_weights(source, lambda tensors: tensors.update({f"{matrix}_scale": torch.ones(16, 2)}))
    with pytest.raises(WinnowError, match=r"the weight_scale of .*experts\.0\.gate_proj.* has shape \(16, 2\)"):
        check()
    change_weights(source, lambda tensors: tensors.update(good) or tensors.pop(f"{matrix}_scale"))
    with pytest.raises(WinnowError, match=rf"no tensor {matrix}_scale"):
        check()
    change_weights(source, lambda tensors: tensors.update(good) or tensors.update({f"{matrix}_g_idx": torch.ones(1)}))
    with pytest.raises(WinnowError, match="g_idx"):
        check()
    save_file(good, source / "model.safetensors", metadata={"format": "pt"})
    groups = config["quantization_config"]["config_groups"]
    change_config(source, quantization_config=config["quantization_config"] | {"config_groups": {}})
    with pytest.raises(WinnowError, match="does not say how .* is packed"):
        check()
    groups["group_0"]["weights"]["group_size"] = 7
    change_config(source, quantization_config=config["quantization_config"] | {"config_groups": groups})
    with pytest.raises(WinnowError, match="no groups of 7"):
        check()


def test_not_finite_weights_leave_the_checkpoint_as_it_was(source):
    matrix = "model.layers.1.mlp.experts.2.down_proj.weight"
    change_weights(source, lambda tensors: tensors[matrix].fill_(float("inf")))
    with pytest.raises(WinnowError, match="not finite"):
        packed_copy(source, source)
    assert "quantization_config" not in read_config(source)
    assert not list(source.parent.glob(".*"))


def test_dequantising_what_is_not_packed_is_refused(source, tmp_path):
    change_config(source, quantization_config={"quant_method": "gptq", "format": "x"})
    with pytest.raises(WinnowError, match="quantised as gptq"):
        plain_copy(source, tmp_path / "out")
