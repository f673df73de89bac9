import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.check import check_checkpoint
from harness.checkpoints.config import read_config
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.weight_files import INDEX, WEIGHTS
from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert, Source
from harness.contracts.plan_files import load_plan, plan_to_json
from harness.families.table import FAMILIES
from tests.harness.checkpoints.compressed import (
    identity_plan,
    merged,
    merged_layer,
    narrowed,
    pruned,
    ragged_plan,
    sliced,
)
from tests.tiny import FAMILY_NAMES, save_tiny

GROUPS = ([[0, 3], [1], [2, 5, 7], [4, 6]], [[0], [1, 2, 3, 4, 5], [6, 7]])


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


@pytest.fixture(scope="module")
def source(originals) -> Path:
    return originals["qwen3_moe"][0]


def write(source: Path, plan: CompressionPlan, target: Path, **options):
    return apply_plan(source, plan, target, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names()}


def experts_of(folder: Path, family: str, layer: int, expert: int) -> list[torch.Tensor]:
    reader = CheckpointReader(folder)
    return [reader.tensor(t.name.format(layer=layer, expert=expert)) for t in FAMILIES[family].expert_tensors]


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(
    "plan",
    [
        identity_plan(),
        pruned([0, 2, 3], [4, 5, 6]),
        merged(*GROUPS, permute=True),
        narrowed(merged(*GROUPS), [3, 16, 7, 1], [2, None, 9]),
    ],
)
@pytest.mark.parametrize("layout", ["compact", "expanded"])
def test_shards_change_nothing(originals, tmp_path, name, plan, layout):
    for folder, target in zip(originals[name], ("single", "sharded"), strict=True):
        write(folder, plan, tmp_path / target, layout=layout)
    single, sharded = tensors_of(tmp_path / "single"), tensors_of(tmp_path / "sharded")
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert read_config(tmp_path / "single") == read_config(tmp_path / "sharded")
    assert (tmp_path / "single" / WEIGHTS).is_file() and not (tmp_path / "single" / INDEX).exists()
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    on_disk = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == on_disk and len(on_disk) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in sharded.values())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_identity_copies_every_bit_and_the_config(originals, tmp_path, name):
    source = originals[name][0]
    write(source, identity_plan(), tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert read_config(source) == read_config(tmp_path / "out")
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    assert load_plan(tmp_path / "out" / "plan.json") == identity_plan()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_pruned_rows_follow_their_experts_whatever_order_the_plan_lists_them_in(originals, tmp_path, name):
    source, family = originals[name][1], FAMILIES[name]
    kept = [6, 1, 4]
    experts = tuple(NewExpert((Source(old),)) for old in kept)
    route = tuple(kept.index(j) if j in kept else None for j in range(8))
    sizes = write(source, CompressionPlan(tuple(LayerPlan(i, experts, route) for i in (0, 1))), tmp_path / "out")
    assert sizes["layout"] == "plain"
    assert family.num_experts(read_config(tmp_path / "out")) == 3
    for layer in (0, 1):
        router = family.router_tensors[0].format(layer=layer)
        assert torch.equal(tensors_of(tmp_path / "out")[router], tensors_of(source)[router][kept])
        for new, old in enumerate(kept):
            pairs = zip(
                experts_of(tmp_path / "out", name, layer, new),
                experts_of(source, name, layer, old),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)],
)
def test_sums_are_rounded_once_to_the_stored_dtype(source, tmp_path, stored, computed):
    tensors = {name: tensor.to(stored) for name, tensor in load_file(source / WEIGHTS).items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "in" / "config.json").write_text((source / "config.json").read_text())
    weights = [0.1234567, 0.6123456, 0.2641977]  # decimals of one place would make ties
    expert = NewExpert(tuple(Source(old, weight) for old, weight in zip((2, 5, 7), weights, strict=True)))
    layers = (
        LayerPlan(0, (expert,), (0,) * 8),
        identity_plan().layers[1],
    )
    write(tmp_path / "in", CompressionPlan(layers), tmp_path / "out")
    for place, matrix in enumerate(experts_of(tmp_path / "out", "qwen3_moe", 0, 0)):
        old = [experts_of(tmp_path / "in", "qwen3_moe", 0, e)[place].to(computed) for e in (2, 5, 7)]
        expected = (old[0] * weights[0] + old[1] * weights[1] + old[2] * weights[2]).to(stored)
        assert matrix.dtype == stored
        twice_rounded = sum((tensor.to(stored) * weight for tensor, weight in zip(old, weights, strict=True)))
        assert (matrix != expected).float().mean() < 0.01 < (matrix != twice_rounded).float().mean()


def test_channels_of_one_size_patch_the_width(originals, tmp_path):
    for name in FAMILY_NAMES:
        plan = sliced(identity_plan(), [5, 2, 9, 15], [0, 1, 2, 3])
        sizes = write(originals[name][1], plan, tmp_path / name)
        assert sizes["layout"] == "plain"
        assert read_config(tmp_path / name)[FAMILIES[name].width_key] == 4
        assert sizes["expert_parameters"] * 4 == sizes["expert_parameters_before"]
        gate, _, down = experts_of(originals[name][1], name, 0, 6)
        new_gate, _, new_down = experts_of(tmp_path / name, name, 0, 6)
        assert torch.equal(new_gate, gate[[5, 2, 9, 15]]) and torch.equal(new_down, down[:, [5, 2, 9, 15]])


def test_the_compact_config_says_where_rows_lead_and_keeps_the_rest(source, tmp_path):
    first = merged_layer(0, [[0, 3], [1, 2, 4, 5, 6, 7]], removed=(1, 2, 5))
    write(source, CompressionPlan((first, merged_layer(1, GROUPS[1]))), tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config.pop("winnow") == {
        "version": 1,
        "layers": {
            "0": {"experts": 2, "width": 16, "route": [0, 0, 1, 1, 1]},
            "1": {"experts": 3, "width": 16, "route": [0, 1, 1, 1, 1, 1, 2, 2]},
        },
    }
    assert config == read_config(source)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_ragged_plan_stores_each_expert_at_its_own_width(originals, tmp_path, name):
    source, plan = originals[name][1], ragged_plan()
    sizes = write(source, plan, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert sizes["layout"] == "compact"
    assert config["winnow"] == {
        "version": 1,
        "layers": {
            "0": {"experts": 4, "width": [5, 16, 12, 1], "route": [0, 1, 2, 0, 3, 2, 2]},
            "1": {"experts": 5, "width": [4, 9, 4, 13, 8], "route": [0, 1, 2, 3, 4]},
        },
    }
    check_checkpoint(tmp_path / "out", FAMILIES[name], config)
    for new, old in enumerate([0, 2, 3, 6, 7]):
        channels = list(plan.layers[1].experts[new].channels)
        gate, up, down = experts_of(source, name, 1, old)
        new_gate, new_up, new_down = experts_of(tmp_path / "out", name, 1, new)
        assert torch.equal(new_gate, gate[channels]) and torch.equal(new_up, up[channels])
        assert torch.equal(new_down, down[:, channels])


def test_ragged_sizes_are_true_on_disk_and_say_what_padding_would_add(source, tmp_path):
    sizes = write(source, ragged_plan(), tmp_path / "out")
    stored, padding = (5 + 16 + 12 + 1) + (4 + 9 + 4 + 13 + 8), (11 + 0 + 4 + 15) + (9 + 4 + 9 + 0 + 5)
    assert sizes["expert_parameters"] == stored * 3 * 32
    assert (sizes["padding_bytes"], sizes["padding_bytes_before"]) == (padding * 3 * 32 * 4, 0)
    on_disk = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sizes["weight_bytes"] == sum(on_disk)
    to_the_widest = narrowed(ragged_plan(), [16] * 4, [13] * 5)
    padded = write(source, to_the_widest, tmp_path / "padded")
    assert padded["expert_bytes"] - sizes["expert_bytes"] == sizes["padding_bytes"]
    assert abs(padded["weight_bytes"] - sizes["weight_bytes"] - sizes["padding_bytes"]) < 100  # digits in the header
    assert padded["padding_bytes"] == 0


def test_padding_is_counted_in_the_stored_dtype(source, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / WEIGHTS).items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "in" / "config.json").write_text((source / "config.json").read_text())
    sizes = write(tmp_path / "in", narrowed(identity_plan(), [7] + [16] * 7, [2] * 8), tmp_path / "out")
    assert sizes["padding_bytes"] == 9 * 3 * 32 * 2


def test_a_plan_that_stores_one_old_expert_twice(source, tmp_path):
    twice = LayerPlan(0, (NewExpert((Source(3),)), NewExpert((Source(3),))), (0, 1) * 4)
    write(source, CompressionPlan((twice, identity_plan().layers[1])), tmp_path / "out")
    first, second = (experts_of(tmp_path / "out", "qwen3_moe", 0, new) for new in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sizes_state_what_is_on_disk(originals, tmp_path):
    sizes = write(originals["mixtral"][1], merged(*GROUPS), tmp_path / "out")
    files = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert (sizes["weight_bytes"], sizes["largest_shard_bytes"]) == (sum(files), max(files))
    assert sizes["expert_parameters_before"] == 2 * 8 * 3 * 16 * 32
    assert sizes["expert_parameters"] == (4 + 3) * 3 * 16 * 32
    assert sizes["expert_bytes"] == 4 * sizes["expert_parameters"]
    removed = sizes["expert_parameters_before"] - sizes["expert_parameters"]
    assert sizes["parameters_before"] - sizes["parameters"] == removed


MEMORY = """
import ctypes, json, sys, threading
from pathlib import Path
from harness.checkpoints.reader import CheckpointReader
from harness.checkpoints.apply_plan import apply_plan
from harness.contracts.plan_files import load_plan

folder = Path(sys.argv[1])
plan = load_plan(folder / "plan.json")

def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def rise_during(work):
    done, seen = threading.Event(), [before]
    def watch():
        while not done.wait(0.0005):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    seen.append(anonymous())
    done.set()
    watcher.join()
    return max(seen) - before

def read_everything():
    reader = CheckpointReader(folder)
    return [reader.tensor(name).clone() for name in reader.names()]

M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 131072)
before = anonymous()
rises = {layout: rise_during(lambda: apply_plan(folder, plan, folder.parent / layout, layout))
         for layout in ("compact", "expanded")}
print(json.dumps(rises | {"everything": rise_during(read_everything)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_within_a_shard_and_the_experts_of_a_layer(tmp_path):
    """Twelve layers of 6 MB, one a shard, experts merged in pairs, in a process of its own.

    Counted is memory that is not backed by a file, and the allocator is told to return at once what is freed:
    what it would keep for later says nothing about the program. Reading everything is the control.
    """
    layers, experts, side = 12, 8, 256
    folder, weight_map = tmp_path / "big", {}
    folder.mkdir()
    for layer in range(layers):
        tensors = FAMILIES["qwen3_moe"].expert_tensors
        shard = {
            tensor.name.format(layer=layer, expert=e): torch.full((side, side), 1.0 + e)
            for tensor in tensors
            for e in range(experts)
        }
        shard[f"model.layers.{layer}.mlp.gate.weight"] = torch.zeros(experts, side)
        save_file(shard, folder / f"{layer}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{layer}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": side,
    }
    config |= {"moe_intermediate_size": side, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    plan = merged(*[[[e, e + 1] for e in range(0, experts, 2)]] * layers)
    (folder / "plan.json").write_text(json.dumps(plan_to_json(plan)))
    rises = json.loads(run_python(MEMORY, folder).stdout)
    layer_bytes = experts * 3 * side * side * 4
    bound = 2 * layer_bytes  # the largest shard and the experts of one layer
    assert max(rises["compact"], rises["expanded"]) < bound < layers * layer_bytes < rises["everything"]


def run_python(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    folder = Path(__file__).parents[3]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
