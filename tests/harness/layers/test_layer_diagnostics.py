"""Layer diagnostics of tiny models: against loops over tokens, and from end to end as part of a cell."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration.drive import drive
from harness.calibration.tokens import TokenSequence
from harness.cells import diagnostics
from harness.cells.cell import Cell
from harness.checkpoints.load import load_model
from harness.contracts.alignment import align_channels
from harness.contracts.plan import CompressionPlan, prune
from harness.contracts.plan_files import plan_to_json
from harness.errors import WinnowError
from harness.families.table import family_of
from harness.layers.diagnose import diagnose, sample
from harness.layers.theory import spread
from harness.layers.watch import Watch
from harness.records.store import RecordStore
from tests.brute_force import expert_function, moe_blocks, routed_documents
from tests.harness.cells.test_iterative import _logging_as_before, winnow  # noqa: F401
from tests.harness.checkpoints.compressed import (
    at_layers,
    compressed_by_hand,
    identity_plan,
    merged_layer,
    narrowed,
    pruned,
)
from tests.in_process import everything_here
from tests.tiny import ALL_FAMILIES, save_tiny

DOCUMENTS = [np.random.default_rng(i).integers(0, 256, size=size).tolist() for i, size in enumerate((20, 11, 17))]


def sequences() -> list[TokenSequence]:
    return [TokenSequence(np.array(tokens), (len(tokens),), ("",)) for tokens in DOCUMENTS]


def diagnosed(folder: Path, plan: CompressionPlan, **options: int) -> dict:
    found = diagnose(folder, plan, sequences(), folder.parent / "scratch", load_model, align_channels, **options)
    assert not (folder.parent / "scratch").exists()
    return json.loads(json.dumps(found))


def score(found: dict, metric: str, layer: int) -> float:
    (value,) = [s["value"] for s in found["scores"] if (s["metric"], s["part"]) == (metric, str(layer))]
    return value


def block_outputs(model, layer: int, hidden: np.ndarray) -> np.ndarray:
    """What the experts of a stock model's block add up to for ``hidden`` (T, H), one token at a time."""
    block = moe_blocks(model)[layer]
    parent = next(m for m in model.modules() if block.experts in m.children())
    seen = []
    handle = block.experts.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        for x in hidden:
            parent(torch.from_numpy(x).float().view(1, 1, -1))
    handle.remove()
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_against_the_stock_model_changed_by_hand(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    layers = list(moe_blocks(model))
    plan = CompressionPlan((merged_layer(layers[0], [[0, 3], [1], [2, 5, 7], [4, 6]], permute=True),
                            prune(layers[1], 8, [0, 2, 3, 4, 5, 7])))  # fmt: skip
    found = diagnosed(tmp_path / "model", plan)
    assert found["tokens"] == 48
    seen = {
        layer: np.concatenate([d.hidden for d in docs]) for layer, docs in routed_documents(model, DOCUMENTS).items()
    }
    by_hand = compressed_by_hand(copy.deepcopy(model), plan)
    for layer in layers:
        before, after = (block_outputs(m, layer, seen[layer]) for m in (model, by_hand))
        error = np.mean(np.sum((before - after) ** 2, axis=1))
        numbers = found["layers"][str(layer)]
        assert numbers["error_square"] == pytest.approx(error, rel=1e-3)
        assert score(found, "measured_error", layer) == pytest.approx(error / np.mean(np.sum(before**2, 1)), rel=1e-3)
        assert score(found, "predicted_error", layer) > 0
    assert [found["layers"][str(layer)]["largest_group"] for layer in layers] == [3, 1]
    assert [found["layers"][str(layer)]["singleton_share"] for layer in layers] == [0.25, 1.0]
    assert [found["layers"][str(layer)]["kept"] for layer in layers] == [None, [0, 2, 3, 4, 5, 7]]


def test_every_estimate_is_kept_without_one_fold_at_a_time(tmp_path: Path) -> None:
    """Of 48 tokens in three documents; numbers of one fold are of the same tokens for every plan."""
    save_tiny(tmp_path / "model", "qwen3_moe")
    one, other = (diagnosed(tmp_path / "model", plan) for plan in (pruned([0, 1, 2], [0, 1, 2]), at_layers(
        identity_plan(), [0, 1])))  # fmt: skip
    assert one["sample"] == other["sample"] and len(one["sample"]) == 12
    for numbers in one["layers"].values():
        for name in ("measured_error", "predicted_error", "spread_ratio"):
            value, low, high = numbers[name]
            left_out = numbers["left_out"][name]
            error = np.sqrt(9 / 10 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
            assert len(left_out) == 10 and error > 0
            assert (low, high) == pytest.approx((max(0.0, value - 1.959964 * error), value + 1.959964 * error))
    assert other["layers"]["0"]["left_out"]["spread_ratio"] == pytest.approx([1.0] * 10)


def test_nothing_happens_to_a_layer_that_stays_as_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "deepseek_v3")
    found = diagnosed(tmp_path / "model", at_layers(identity_plan(), [1, 2]))
    for layer in (1, 2):
        assert score(found, "measured_error", layer) < 1e-10 and score(found, "predicted_error", layer) == 0.0
        assert score(found, "spread_ratio", layer) == pytest.approx(1.0)
        numbers = found["layers"][str(layer)]
        assert numbers["load_entropy_before"] == numbers["load_entropy_after"] > 1.0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_numbers_of_a_layer_against_loops(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    groups = [[0, 3], [1, 2, 6], [4], [5, 7]]
    plan = CompressionPlan((merged_layer(0, groups), prune(1, 8, [0, 1, 2, 5, 6])))
    found = diagnosed(tmp_path / "model", plan, pairs=4)
    routed = routed_documents(model, DOCUMENTS)
    hidden, gates, outputs = {}, {}, {}
    for layer in (0, 1):
        hidden[layer] = np.concatenate([document.hidden for document in routed[layer]])
        gates[layer] = np.zeros((48, 8))
        chosen = [(j, g) for d in routed[layer] for j, g in zip(d.indices, d.gates, strict=True)]
        for t, (experts, values) in enumerate(chosen):
            gates[layer][t, experts] = values
        functions = [expert_function(model, layer, expert) for expert in range(8)]
        outputs[layer] = np.array([[f(x) for x in hidden[layer]] for f in functions])
    energy = [np.mean(np.sum(np.einsum("te,eth->th", gates[i], outputs[i]) ** 2, axis=1)) for i in (0, 1)]
    predicted = 0.0
    for number, group in zip(found["layers"]["0"]["groups"], [groups[0], groups[1], groups[3]], strict=True):
        mass = gates[0][:, group].sum(1)
        active = mass > 0
        shares = gates[0][active][:, group] / mass[active, None]
        gap = np.array([[np.mean(np.sum((outputs[0][i, active] - outputs[0][j, active]) ** 2, axis=1))
                         for j in group] for i in group])  # fmt: skip
        covariance = np.cov(shares.T, bias=True)
        error = -0.5 * np.mean(mass**2) * np.sum(covariance * gap) / energy[0]
        predicted += error
        assert number["rows"] == group
        assert number["mass_square"] == pytest.approx(np.mean(mass**2), rel=1e-4)
        assert number["policy_variability"] == pytest.approx(np.mean(np.var(shares, axis=0)), rel=1e-4)
        pairs = len(group) * (len(group) - 1)
        assert number["functional_gap"] == pytest.approx(np.sum(gap) / pairs, rel=1e-4)
        assert number["predicted_error"] == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert score(found, "predicted_error", 0) == pytest.approx(predicted, rel=1e-4) and predicted > 0
    lost = sum(np.mean(gates[1][:, j] ** 2 * np.sum(outputs[1][j] ** 2, axis=1)) for j in (3, 4, 7))
    assert score(found, "predicted_error", 1) == pytest.approx(lost / energy[1], rel=1e-4)
    kept = spread(outputs[1][[0, 1, 2, 5, 6]])
    assert score(found, "spread_ratio", 1) == pytest.approx(np.sum(kept) / np.sum(spread(outputs[1])), rel=1e-4)
    assert found["layers"]["0"]["spread_before"] == pytest.approx(np.mean(spread(outputs[0])), rel=1e-4)
    assert score(found, "spread_ratio", 0) < 1
    explained = found["layers"]["1"]["explained_before"]
    assert sum(explained) == pytest.approx(1.0) and explained == sorted(explained, reverse=True)
    load = np.sum(gates[1] > 0, axis=0)[np.sum(gates[1] > 0, axis=0) > 0] / np.sum(gates[1] > 0)
    assert found["layers"]["1"]["load_entropy_before"] == pytest.approx(-np.sum(load * np.log(load)))
    weights = found["layers"]["0"]
    assert [len(weights[name]) for name in ("distance", "aligned_distance", "overlap")] == [4, 4, 4]
    assert [len(weights[f"average_{name}"]) for name in ("distance", "overlap")] == [4, 4]
    assert all(a <= b for a, b in zip(weights["aligned_distance"], weights["distance"], strict=True))
    assert [pair[0] for pair in weights["pairs"]] == [0, 1, 1, 3]  # new experts, of groups of 2, 3, 1 and 2
    members = [{old for to, *pair in weights["pairs"] if to == new for old in pair} for new in (0, 1, 3)]
    assert members == [{0, 3}, {1, 2, 6}, {5, 7}] and len({pair[1] for pair in weights["pairs"][1:3]}) == 1
    assert "distance" not in found["layers"]["1"] and score(found, "aligned_distance", 0) > 0.5


def test_of_removed_channels_nothing_is_predicted(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    found = diagnosed(tmp_path / "model", narrowed(identity_plan(), *[[8] * 8] * 2))
    assert {s["metric"] for s in found["scores"]} == {
        "measured_error",
        "spread_ratio",
        "singleton_share",
        "largest_group",
    }
    assert score(found, "measured_error", 0) > 0.01


def test_padding_is_left_out_and_batches_do_not_matter(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    family = family_of(model.config.to_dict())
    watched = {size: [Watch(layer, np.zeros(48, dtype=int)) for layer in identity_plan().layers] for size in (1, 3)}
    for size, watches in watched.items():
        drive(model, family, sequences(), watches, size)
    for one, three in zip(watched[1], watched[3], strict=True):
        before, after = one.original.passed, three.original.passed
        assert before.hidden.shape == (48, 32)
        assert torch.allclose(before.hidden, after.hidden, atol=1e-5)
        assert torch.equal(before.indices, after.indices)


def test_a_model_that_computes_nan_is_named(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:] = float("nan")
    with pytest.raises(WinnowError, match="layer 1 computes NaN"):
        diagnose(tmp_path / "model", pruned([0, 1, 2], [0, 1, 2]), sequences(), tmp_path / "s", lambda folder: (
            model if folder.name == "model" else load_model(folder)
        ), align_channels)  # fmt: skip


def test_a_sample_is_of_whole_sequences() -> None:
    many = [TokenSequence(np.full(10, i), (10,), ("",)) for i in range(30)]
    chosen = sample(many, 95)
    places = [int(sequence.input_ids[0]) for sequence in chosen]
    assert len(places) == 10 and places == sorted(places) and places != list(range(10))
    assert [s is t for s, t in zip(sample(many, 95), chosen, strict=True)] == [True] * 10
    assert len(sample(many, 10_000)) == 30
    with pytest.raises(WinnowError, match="diagnostics.tokens"):
        sample(many, 0)


def test_a_cell_gets_its_diagnostics_whether_it_is_finished_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []
    everything_here(monkeypatch)
    monkeypatch.setattr(diagnostics, "diagnose", lambda *args: ran.append(args[0]) or diagnose(*args))
    out, merging = tmp_path / "out", ("method=hc_smoe", "diagnostics.tokens=60")
    assert winnow(monkeypatch, tmp_path, "method=hc_smoe") == 0
    (record,) = (out / "records").glob("*.json")
    before = record.read_bytes()
    assert not (out / "diagnostics").exists()
    shutil.rmtree(out / "cells", ignore_errors=True)  # so the plan is decided once more
    (out / "plan.json").rename(out / "plan_before.json")
    assert winnow(monkeypatch, tmp_path, *merging, "diagnostics=layers") == 0
    (found,) = (out / "diagnostics").glob("*.json")
    told = json.loads(found.read_text())
    assert found.name == record.name and record.read_bytes() == before
    assert told["cell"] == record.stem and told["corpus"] == "local" and set(told["layers"]) == {"0", "1"}
    assert 60 <= told["tokens"] < 60 + 64 and not list(out.rglob("diagnosed"))
    metrics = {"measured_error", "predicted_error", "spread_ratio", "aligned_distance"}
    for metric in metrics:
        own = [s for s in told["scores"] if s["metric"] == metric]
        assert {(s["task"], s["kind"]) for s in own} == {("layers", "probe")} and {s["part"] for s in own} == {"0", "1"}
        assert all(s["low"] <= s["value"] <= s["high"] for s in own)
    assert winnow(monkeypatch, tmp_path, *merging, "diagnostics=layers") == 0
    assert len(ran) == 1, "once is enough"
    # A method without calibration is diagnosed on the corpus that the configuration names.
    other = tmp_path / "other"
    assert winnow(monkeypatch, tmp_path, "method=random", "diagnostics=layers", f"output_dir={other}") == 0
    assert len(ran) == 2 and len(list((other / "diagnostics").glob("*.json"))) == 1


def test_another_plan_than_the_recorded_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert winnow(monkeypatch, tmp_path, "method=random") == 0
    store = RecordStore(out)
    (cell,) = store.ids()
    folder = out / "cells" / cell
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan_to_json(pruned([0, 1, 2], [0, 1, 2]))))
    assert winnow(monkeypatch, tmp_path, "method=random", "diagnostics=layers") == 2
    assert "not the recorded one" in capsys.readouterr().err
    assert not list((out / "diagnostics").glob("*.json"))


def test_diagnostics_are_no_part_of_what_a_cell_is(tmp_path: Path) -> None:
    from tests.harness.cells.test_iterative import cell

    assert cell(tmp_path, "method=reap").id == cell(tmp_path, "method=reap", "diagnostics=layers").id
    assert isinstance(cell(tmp_path, "method=reap"), Cell)
