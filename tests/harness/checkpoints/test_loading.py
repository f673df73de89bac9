import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert, Source
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from tests.harness.checkpoints.compressed import (
    brute_force_logits,
    identity_plan,
    logits,
    merged,
    merged_layer,
    narrowed,
    pruned,
    ragged_plan,
    sliced,
)
from tests.tiny import FAMILY_NAMES, save_tiny, tiny_model

GROUPS = ([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]])


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILY_NAMES}
    for name, folder in folders.items():
        save_tiny(folder, name, max_shard_size="100KB")
    return folders


@pytest.fixture
def single(tmp_path) -> Path:
    save_tiny(tmp_path / "single", "qwen3_moe")
    return tmp_path / "single"


def loaded_logits(folder: Path, **options) -> torch.Tensor:
    return logits(load_model(folder, **options))


def stock_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(
    "plan",
    [identity_plan(), pruned(range(8), range(8)), merged(*[[[j] for j in range(8)]] * 2)],
    ids=["identity", "nothing pruned", "groups of one"],
)
def test_a_plan_that_changes_nothing_gives_the_same_bits(originals, tmp_path, name, plan):
    sizes = apply_plan(originals[name], plan, tmp_path / "out")
    assert sizes["layout"] == "plain" and sizes["parameters"] == sizes["parameters_before"]
    expected = logits(tiny_model(name))
    assert torch.equal(loaded_logits(tmp_path / "out"), expected)
    assert torch.equal(stock_logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_pruned_is_the_original_with_the_removed_rows_masked(originals, tmp_path, name):
    kept = ([0, 2, 3, 5, 6], [1, 2, 4, 6, 7])
    sizes = apply_plan(originals[name], pruned(*kept), tmp_path / "out")
    model = tiny_model(name)
    for layer, keep in zip(model.model.layers, kept, strict=True):
        original_linear = torch.nn.functional.linear
        mask = torch.tensor([0.0 if j in keep else -torch.inf for j in range(8)])
        router = layer.mlp.gate
        router.forward = _with_masked_logits(router, original_linear, mask)
    assert sizes["layout"] == "plain"
    assert sizes["expert_parameters"] * 8 == sizes["expert_parameters_before"] * 5
    assert not torch.allclose(logits(model), logits(tiny_model(name)), atol=1e-2)
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), logits(model), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stock_logits(tmp_path / "out"), logits(model), atol=1e-6, rtol=1e-6)


def _with_masked_logits(router, linear, mask):
    """The router's own forward, in which the product with its weight has ``mask`` added to it."""
    own = type(router).forward

    def forward(hidden):
        torch.nn.functional.linear = lambda x, w, *a: linear(x, w, *a) + (mask.to(x) if w is router.weight else 0)
        try:
            return own(router, hidden)
        finally:
            torch.nn.functional.linear = linear

    return forward


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("plan", "layout"),
    [
        (merged(*GROUPS), "compact"),
        (merged(*GROUPS, permute=True), "compact"),
        (pruned([0, 1, 5, 6, 7], [2, 3, 4]), "compact"),
        (sliced(merged(*GROUPS, permute=True), [3, 1, 15, 8], [0, 2, 4, 6, 7, 9, 11]), "compact"),
        (sliced(pruned([0, 1, 5], [2, 3, 4]), [3, 1, 15, 8], [0, 2, 4, 6]), "plain"),
        (
            CompressionPlan(
                (
                    merged_layer(0, GROUPS[0], removed=(2, 3)),  # merging, then dropping two rows
                    LayerPlan(
                        1,
                        (NewExpert((Source(4, 0.5),)), NewExpert((Source(1),))),
                        (1, None, 0, 1, 0, None, 1, 1),
                    ),
                )
            ),
            "compact",
        ),
        (ragged_plan(), "compact"),
        (narrowed(identity_plan(), [16, 3] * 4, [5, 6, 7, 8] * 2), "compact"),
    ],
    ids=[
        "merged", "permuted", "non-uniform", "merged, sliced", "pruned, sliced", "merged, pruned", "ragged, merged",
        "ragged",
    ],
)  # fmt: skip
def test_every_plan_equals_brute_force(originals, tmp_path, name, plan, layout):
    sizes = apply_plan(originals[name], plan, tmp_path / "out")
    assert sizes["layout"] == layout
    expected = brute_force_logits(tiny_model(name), plan)
    torch.testing.assert_close(
        loaded_logits(tmp_path / "out", dtype=torch.float64, experts_implementation="eager"),
        expected,
        atol=1e-6,
        rtol=1e-6,
    )
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_ragged_is_the_original_with_the_dropped_channels_zeroed(originals, tmp_path, name):
    plan = narrowed(identity_plan(), [16, 3] * 4, [5, 6, 7, 8] * 2)
    apply_plan(originals[name], plan, tmp_path / "out")
    model = tiny_model(name)
    for layer, layer_plan in zip(model.model.layers, plan.layers, strict=True):
        for expert, new in enumerate(layer_plan.experts):
            dropped = [channel for channel in range(16) if channel not in new.channels]
            layer.mlp.experts.down_proj.data[expert][:, dropped] = 0
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(tiny_model(name)) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_ragged_layer_is_as_wide_as_its_widest_and_zero_behind_each_expert(originals, tmp_path, name):
    stacking = MergeModulelist.convert
    apply_plan(originals[name], ragged_plan(), tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert MergeModulelist.convert is stacking
    for layer, widths in enumerate([[5, 16, 12, 1], [4, 9, 4, 13, 8]]):
        experts = model.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        assert experts.down_proj.shape == (len(widths), 32, max(widths))
        for expert, width in enumerate(widths):
            for matrix in (gate[expert], up[expert], experts.down_proj[expert].T):
                assert matrix[:width].all() and not matrix[width:].any()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_runs_ragged_layers(originals, tmp_path, implementation):
    plan = narrowed(merged(*GROUPS), [5, 16, 12, 1], [8, 3, 4])
    apply_plan(originals["qwen3_moe"], plan, tmp_path / "out")
    model = load_model(tmp_path / "out", experts_implementation=implementation)
    expected = brute_force_logits(tiny_model("qwen3_moe"), plan)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_the_widest_expert_decides_whether_grouped_mm_runs(originals, tmp_path):
    for width, implementation in ((8, "grouped_mm"), (7, "eager")):
        plan = narrowed(identity_plan(), [width] + [5] * 7, [width] + [3] * 7)
        apply_plan(originals["olmoe"], plan, tmp_path / implementation)
        model = load_model(tmp_path / implementation)
        assert model.config._experts_implementation == implementation
    with pytest.raises(WinnowError, match="choose eager"):
        load_model(tmp_path / "eager", experts_implementation="grouped_mm")


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("widths", [([5, 16, 12, 1], [8, 3, 4]), ([2, 3, 3, 1], [4, 4, 12]), ([2] * 4, [8] * 3)])
def test_expanded_pads_all_experts_to_the_widest(originals, tmp_path, name, widths):
    plan = narrowed(merged(*GROUPS, permute=True), *widths)
    sizes = apply_plan(originals[name], plan, tmp_path / "out", layout="expanded")
    widest = max(map(max, widths))
    assert (sizes["layout"], sizes["padding_bytes"]) == ("plain", 0)
    assert sizes["expert_parameters"] == 2 * 8 * 3 * 32 * widest
    assert read_config(tmp_path / "out")[FAMILIES[name].width_key] == widest
    expected = brute_force_logits(tiny_model(name), plan)
    for found in (stock_logits(tmp_path / "out"), loaded_logits(tmp_path / "out")):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_follows_the_route(originals, tmp_path, implementation):
    apply_plan(originals["qwen3_moe"], merged(*GROUPS), tmp_path / "out")
    model = load_model(tmp_path / "out", experts_implementation=implementation)
    expected = brute_force_logits(tiny_model("qwen3_moe"), merged(*GROUPS))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    model.set_experts_implementation("eager")  # reaches layers whatever their number of experts
    assert all(layer.mlp.experts.config._experts_implementation == "eager" for layer in model.model.layers)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_merging_identical_experts_changes_nothing_beyond_rounding(tmp_path, name):
    model = tiny_model(name)
    with torch.no_grad():
        for layer, groups in zip(model.model.layers, GROUPS, strict=True):
            for group in groups:
                for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    tensor[group] = tensor[group[0]].clone()
    model.save_pretrained(tmp_path / "twins")
    apply_plan(tmp_path / "twins", merged(*GROUPS), tmp_path / "out")
    torch.testing.assert_close(loaded_logits(tmp_path / "out"), logits(model), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_expanded_equals_compact_and_stock_transformers_loads_it(originals, tmp_path, name):
    plan = merged(*GROUPS, permute=True)
    compact = apply_plan(originals[name], plan, tmp_path / "compact")
    expanded = apply_plan(originals[name], plan, tmp_path / "expanded", layout="expanded")
    assert (compact["layout"], expanded["layout"]) == ("compact", "plain")
    assert expanded["parameters"] == expanded["parameters_before"]
    assert compact["expert_parameters"] == 7 * 3 * 16 * 32
    torch.testing.assert_close(
        stock_logits(tmp_path / "expanded"), loaded_logits(tmp_path / "compact"), atol=2e-6, rtol=1e-6
    )
    assert torch.equal(loaded_logits(tmp_path / "expanded"), stock_logits(tmp_path / "expanded"))


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(
    "plan",
    [
        merged(*GROUPS),
        pruned([0, 1, 5, 6, 7], [2, 3, 4]),
        sliced(identity_plan(), [1, 2], [1, 2, 3]),
        narrowed(identity_plan(), [16, 3] * 4, [16] * 8),
    ],
)
def test_stock_transformers_refuses_compact_checkpoints(originals, tmp_path, name, plan):
    assert apply_plan(originals[name], plan, tmp_path / "out")["layout"] == "compact"
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_cached_generation_equals_the_full_forward(originals, tmp_path):
    apply_plan(originals["mixtral"], merged(*GROUPS), tmp_path / "out")
    model = load_model(tmp_path / "out")
    prompt = torch.tensor([[72, 101, 108]])
    written = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for length in range(3, 11):
        following = model(written[:, :length], use_cache=False).logits[0, -1].argmax()
        assert following == written[0, length]


def test_loading_leaves_the_architecture_as_it_was(originals, tmp_path):
    layer_class = FAMILIES["qwen3_moe"].decoder_layer_class()
    before = layer_class.__init__
    apply_plan(originals["qwen3_moe"], merged(*GROUPS), tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert layer_class.__init__ is before
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (8, 16)
    assert [len(layer.mlp.experts.down_proj) for layer in model.model.layers] == [4, 3]
    assert [len(layer.mlp.gate.weight) for layer in model.model.layers] == [8, 8]


@pytest.mark.parametrize("device", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("plan", [merged(*GROUPS), ragged_plan()])
def test_a_device_map_places_the_route_as_well(originals, tmp_path, device, plan):
    apply_plan(originals["qwen3_moe"], plan, tmp_path / "out")
    assert torch.equal(loaded_logits(tmp_path / "out", device=device), loaded_logits(tmp_path / "out"))


def test_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path):
    tiny_model("olmoe").bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_widths_that_grouped_mm_cannot_run_fall_back_to_eager_or_say_so(originals, tmp_path):
    apply_plan(originals["olmoe"], sliced(identity_plan(), [0, 1, 2], [3, 4, 5]), tmp_path)
    assert torch.isfinite(loaded_logits(tmp_path)).all()
    with pytest.raises(WinnowError, match="choose eager"):
        load_model(tmp_path, experts_implementation="grouped_mm")


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(single, change):
    tensors = load_file(single / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.layers.1.self_attn.q_proj.strange"] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WinnowError) as caught:
        load_model(single)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_named(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WinnowError, match="model.safetensors is truncated"):
        load_model(single)


def test_an_unsupported_architecture(single):
    config = json.loads((single / "config.json").read_text()) | {"model_type": "llama"}
    (single / "config.json").write_text(json.dumps(config))
    with pytest.raises(WinnowError, match="'llama' is not supported"):
        load_model(single)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "~/nowhere"])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(WinnowError, match="there is no such folder"):
        resolve_checkpoint(name)


def test_a_hub_model_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WinnowError, match="hub is out of reach") as caught:
        load_model("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_name_that_no_hub_model_can_have():
    with pytest.raises(WinnowError, match="neither a local folder nor a name on the hub"):
        resolve_checkpoint("what is this?")


def test_an_existing_folder_is_itself(single):
    assert resolve_checkpoint(str(single)) == single


def test_tokenizer_pads_with_the_end_of_text_where_it_has_no_padding(single):
    assert load_tokenizer(single).pad_token_id == 257
    path = single / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(single)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256


def test_no_tokenizer(single):
    for path in single.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(WinnowError, match="no usable tokenizer"):
        load_tokenizer(single)
    (single / "tokenizer.json").write_text("{")
    with pytest.raises(WinnowError, match="no usable tokenizer"):
        load_tokenizer(single)


def test_a_compressed_checkpoint_keeps_the_tokenizer(originals, tmp_path):
    apply_plan(originals["olmoe"], pruned([0, 1], [2, 3]), tmp_path / "out")
    before, after = (load_tokenizer(f)("Größe")["input_ids"] for f in (originals["olmoe"], tmp_path / "out"))
    assert before == after and len(after) == len("Größe".encode())
