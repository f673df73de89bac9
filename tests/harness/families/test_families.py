"""Every family of the table, on a tiny random model of it: statistics, pruning, merging, what is refused."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.calibration.collect import collect
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.load import load_model
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.plan import CompressionPlan
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES, family_of
from methods.budget import kept_experts
from tests.brute_force import brute_force_statistics, moe_blocks, weights_of
from tests.harness.checkpoints.compressed import (
    at_layers,
    compressed_by_hand,
    identity_plan,
    logits,
    merged,
    merged_layer,
    narrowed,
    pruned,
    sliced,
)
from tests.tiny import ALL_FAMILIES, save_tiny, tiny_model

GROUPS = ([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]])
HALF = ([0, 2, 3, 4, 6, 7], [1, 2, 3, 4, 5, 7])  # three of each half, as two router groups need


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model on disk, sharded: its logits and the layers that hold experts in memory."""

    name: str
    folder: Path
    logits: torch.Tensor
    layers: list[int]

    def plan(self, plan: CompressionPlan) -> CompressionPlan:
        return at_layers(plan, self.layers)

    def expected(self, plan: CompressionPlan) -> torch.Tensor:
        found = logits(compressed_by_hand(tiny_model(self.name), self.plan(plan)))
        assert (found - self.logits).abs().max() > 1e-2
        return found

    def apply(self, plan: CompressionPlan, target: Path, **options) -> dict:
        return apply_plan(self.folder, self.plan(plan), target, **options)


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def tiny(request, tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(folder, request.param, max_shard_size="100KB")
    return Tiny(request.param, folder, logits(model), sorted(moe_blocks(model)))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("deepseek")
    model = save_tiny(folder, "deepseek_v3")
    return Tiny("deepseek_v3", folder, logits(model), sorted(moe_blocks(model)))


def loaded(folder: Path) -> torch.Tensor:
    return logits(load_model(folder))


def stock(folder: Path) -> torch.Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return logits(model.eval())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_at_least_fourteen_families_and_each_has_a_tiny_model():
    assert set(ALL_FAMILIES) == set(FAMILIES) and len(FAMILIES) >= 14


def test_an_architecture_without_a_row_is_told_where_to_add_it():
    with pytest.raises(
        WinnowError, match=r"'llama' is not supported; .*a row to FAMILIES in harness/families/table\.py"
    ):
        family_of({"model_type": "llama"})


def test_statistics_equal_brute_force_with_the_models_own_gate_values(tiny):
    model = tiny_model(tiny.name)
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 256, length).tolist() for length in (19, 3, 11, 1)]
    expected = brute_force_statistics(model, texts)
    sequences = [TokenSequence(np.array(text), (len(text),), ("text",)) for text in texts]
    found = collect(model, sequences, FAMILIES[tiny.name], frozenset(STATISTICS), batch_size=3)
    assert list(found.layers) == tiny.layers == sorted(expected.layers)
    assert (found.num_experts, found.top_k, found.tokens) == (8, 2, 34)
    for layer, arrays in expected.layers.items():
        for name, want in arrays.items():
            atol = 1e-5 * np.abs(want).max()
            np.testing.assert_allclose(found.layers[layer][name], want, rtol=1e-5, atol=atol, err_msg=f"{layer} {name}")


def test_the_table_says_whether_packed_documents_see_each_other(tiny, monkeypatch):
    model, generator = tiny_model(tiny.name), np.random.default_rng(1)
    texts = [generator.integers(0, 256, length) for length in (5, 20, 7, 14)]

    def run(*sequences: list[np.ndarray]) -> np.ndarray:
        made = [TokenSequence(np.concatenate(s), tuple(map(len, s)), ("text",) * len(s)) for s in sequences]
        found = collect(model, made, FAMILIES[tiny.name], frozenset({"router_gram"}))
        return found.layers[tiny.layers[-1]]["router_gram"]

    family = FAMILIES[tiny.name]
    if not family.separates_packed:
        with pytest.raises(WinnowError, match="mixes packed documents"):
            run(texts)
        monkeypatch.setitem(FAMILIES, tiny.name, replace(family, separates_packed=True))
    packed, alone = run(texts), run(*([text] for text in texts))
    difference = np.abs(packed - alone).max() / np.abs(alone).max()
    assert difference < 1e-5 if family.separates_packed else difference > 1e-2


def test_weights_on_disk_are_those_in_memory(tiny):
    model, read = tiny_model(tiny.name), expert_weights_reader(tiny.folder, FAMILIES[tiny.name])
    for layer in tiny.layers:
        for expert in (0, 5):
            want, found = weights_of(model, layer, expert), read(layer, expert)
            for matrix in ("gate", "up", "down"):
                np.testing.assert_array_equal(getattr(found, matrix), getattr(want, matrix))


def test_the_identity_gives_the_same_bits(tiny, tmp_path):
    sizes = tiny.apply(identity_plan(), tmp_path / "out")
    assert sizes["layout"] == "plain" and sizes["weight_bytes"] > 0
    assert read_config(tmp_path / "out") == read_config(tiny.folder)
    assert torch.equal(stock(tmp_path / "out"), tiny.logits)
    assert torch.equal(loaded(tmp_path / "out"), tiny.logits)


def test_pruned_equals_masking_the_router_in_stock_transformers(tiny, tmp_path):
    sizes = tiny.apply(pruned(*HALF), tmp_path / "out")
    assert sizes["layout"] == "plain"
    assert sizes["expert_parameters"] * 8 == sizes["expert_parameters_before"] * 6
    expected = tiny.expected(pruned(*HALF))
    close(stock(tmp_path / "out"), expected)
    close(loaded(tmp_path / "out"), expected)


def test_every_tensor_with_a_row_an_expert_is_cut(tiny, tmp_path):
    tiny.apply(pruned(*HALF), tmp_path / "out")
    before, after = CheckpointReader(tiny.folder), CheckpointReader(tmp_path / "out")
    for name in after.names():
        if any(f"layers.{layer}." in name for layer in tiny.layers) and "shared" not in name:
            for size, old in zip(after.shape(name), before.shape(name), strict=True):
                assert size == old or (size, old) == (6, 8), name
    rows = [name for name in before.names() if 8 in before.shape(name) and "norm" not in name and "attn" not in name]
    assert rows and all(8 not in after.shape(name) for name in rows)


def test_merged_loads_at_its_own_size_and_equals_a_model_merged_by_hand(tiny, tmp_path):
    plan = merged(*GROUPS, permute=True)
    sizes = tiny.apply(plan, tmp_path / "out")
    assert sizes["layout"] == "compact"
    assert sizes["expert_parameters"] * 16 == sizes["expert_parameters_before"] * 7
    expected = tiny.expected(plan)
    close(loaded(tmp_path / "out"), expected)
    tiny.apply(plan, tmp_path / "expanded", layout="expanded")
    close(stock(tmp_path / "expanded"), expected)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_merging_after_removing_rows_with_experts_of_many_widths(tiny, tmp_path):
    layers = (
        merged_layer(0, [[0, 3], [1], [2, 5, 7], [4, 6]], permute=True, removed=(2, 6)),
        merged_layer(1, [[0, 4], [5, 2, 1], [3, 6, 7]], removed=(0, 7)),
    )
    plan = narrowed(CompressionPlan(layers), [5, None, 12, 1], [7, 4, 9])
    tiny.apply(plan, tmp_path / "out")
    config = read_config(tmp_path / "out")
    check_checkpoint(tmp_path / "out", FAMILIES[tiny.name], config)
    section = config["winnow"]["layers"]
    stacked = FAMILIES[tiny.name].stacks_experts  # one width a layer
    assert section[str(tiny.layers[0])]["width"] == (16 if stacked else [5, 16, 12, 1])
    assert section[str(tiny.layers[1])]["width"] == (9 if stacked else [7, 4, 9])
    close(loaded(tmp_path / "out"), tiny.expected(plan))


def test_narrower_experts_leave_the_shared_expert_as_it_is(tiny, tmp_path):
    """Half as wide is plain, with twice the shared experts where their width hangs on it; five channels cannot be."""
    family = FAMILIES[tiny.name]
    half = sliced(identity_plan(), [3, 1, 15, 8, 0, 4, 9, 11], list(range(8, 16)))
    sizes = tiny.apply(half, tmp_path / "half")
    config = read_config(tmp_path / "half")
    if family.shared_is_as_wide:
        assert sizes["layout"] == "compact"
    else:
        assert sizes["layout"] == "plain" and config[family.width_key] == 8
        close(stock(tmp_path / "half"), tiny.expected(half))
    if family.shared_count_key:
        assert config[family.shared_count_key] == 2 * read_config(tiny.folder)[family.shared_count_key]
    close(loaded(tmp_path / "half"), tiny.expected(half))
    five = sliced(identity_plan(), [3, 1, 15, 8, 0], [0, 2, 4, 6, 7])
    hangs = family.shared_is_as_wide or family.shared_count_key
    assert tiny.apply(five, tmp_path / "five")["layout"] == ("compact" if hangs else "plain")
    close(loaded(tmp_path / "five"), tiny.expected(five))
    if hangs:
        with pytest.raises(WinnowError, match=f"hangs on {family.width_key}: use layout=compact"):
            tiny.apply(five, tmp_path / "refused", layout="expanded")


def test_router_groups_keep_the_same_number_side_by_side(deepseek, tmp_path):
    for kept, counts in (([0, 1, 2, 3, 4, 5], "4, 2"), ([0, 1, 2, 4, 5], "3, 2")):
        with pytest.raises(WinnowError, match=f"layer 2: the 2 router groups must keep .*, not {counts}"):
            deepseek.apply(pruned(HALF[0], kept), tmp_path / "out")
    with pytest.raises(WinnowError, match="layer 1: 2 router rows are left, .* in 2 router groups: it needs 4"):
        deepseek.apply(pruned([0, 4], [0, 4]), tmp_path / "out")
    assert kept_experts(FAMILIES["deepseek_v3"].shape(read_config(deepseek.folder)), "0.5") == 4
    deepseek.apply(pruned([0, 3, 5, 6], [1, 2, 4, 7]), tmp_path / "out")
    close(stock(tmp_path / "out"), deepseek.expected(pruned([0, 3, 5, 6], [1, 2, 4, 7])))


@pytest.mark.parametrize(
    ("name", "settings", "fewest"),
    [
        ("mixtral", {"num_experts_per_tok": 2}, 2),
        ("deepseek_v2", {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}, 16),
        ("deepseek_v2", {"num_experts_per_tok": 6, "n_group": None, "topk_group": None}, 6),
        ("deepseek_v3", {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, 16),
        ("deepseek_v3", {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 2}, 32),
        ("glm4_moe", {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, 2),  # judged by its two best
        ("hunyuan_v1_moe", {"moe_topk": [8, 8]}, 8),
    ],
)
def test_the_fewest_rows_that_a_router_can_run_with(name, settings, fewest):
    assert FAMILIES[name].fewest_rows(settings) == fewest


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("qwen3_moe", {}, [0, 1, 2, 3, 4, 5]),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ("deepseek_v3", {}, [3, 4, 5]),  # what transformers takes where the key is absent
        ("glm4_moe", {"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ("lfm2_moe", {"num_dense_layers": 4}, [4, 5]),
        ("ernie4_5_moe", {}, [1, 2, 3, 4, 5]),
        ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 4}, [3]),
    ],
)
def test_dense_layers_are_found_in_the_config(name, settings, layers):
    assert FAMILIES[name].moe_layers({"num_hidden_layers": 6, **settings}) == layers


def test_numbers_that_differ_between_layers_are_refused(tmp_path):
    assert FAMILIES["hunyuan_v1_moe"].num_experts({"num_experts": [8, 8]}) == 8
    with pytest.raises(WinnowError, match=r"num_experts differs between layers \(\[8, 4\]\)"):
        FAMILIES["hunyuan_v1_moe"].num_experts({"num_experts": [8, 4]})


def test_what_a_checkpoint_says_beside_its_biases_is_checked(deepseek, tmp_path):
    folder = shutil.copytree(deepseek.folder, tmp_path / "fewer")
    config = read_config(folder) | {"n_routed_experts": 6}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WinnowError, match="more experts than announced"):
        load_model(folder)


def test_the_accessor_finds_the_modules_that_a_search_finds(tiny):
    """The router and the experts are those that the brute force finds by what they do; shared experts by their name."""
    model, family = tiny_model(tiny.name), FAMILIES[tiny.name]
    names = {id(module): name for name, module in model.named_modules()}
    for layer, block in moe_blocks(model).items():
        found = moe_block(model, family, layer)
        assert found.router is block.router and found.experts is block.experts
        assert names[id(found.decoder_layer)] == f"model.layers.{layer}"
        inside = [name for name, _ in found.decoder_layer.named_modules()]
        shared = [name for name in inside if name.endswith(("shared_expert", "shared_experts", "shared_mlp"))]
        gates = [name for name in inside if name.endswith("shared_expert_gate")]
        for module, expected in ((found.shared_experts, shared), (found.shared_gate, gates)):
            assert ([] if module is None else [names[id(module)].removeprefix(f"model.layers.{layer}.")]) == expected


def test_shared_experts_are_told_by_the_names_of_their_tensors(tiny):
    reader = CheckpointReader(tiny.folder)
    shared = [name for name in reader.names() if FAMILIES[tiny.name].is_shared(name)]
    assert shared == [name for name in reader.names() if ".shared_" in name]


def test_a_layer_without_shared_experts_has_none():
    model = tiny_model("ernie4_5_moe")
    model.config.moe_num_shared_experts = 0
    block = moe_block(type(model)(model.config), FAMILIES["ernie4_5_moe"], 1)
    assert block.shared_experts is None and block.experts is not None


@pytest.mark.parametrize(
    ("name", "settings", "elements"),
    [
        ("qwen3_moe", {"num_key_value_heads": 4, "head_dim": 128}, 6 * 2 * 4 * 128),
        ("qwen3_moe", {}, 6 * 2 * 8 * 32),  # as many key-value heads as heads, hidden / heads wide
        ("deepseek_v3", {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 6 * (512 + 64)),
        ("qwen3_next", {"full_attention_interval": 3, "num_key_value_heads": 2}, 2 * 2 * 2 * 32),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"] * 2}, 2 * 2 * 8 * 32),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"] * 3}, 3 * 2 * 8 * 32),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 3}, 6 * 2 * 8 * 32),
    ],
)
def test_what_a_token_leaves_in_the_cache(name, settings, elements):
    config = {"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 256, **settings}
    assert FAMILIES[name].cached_elements(config) == elements
