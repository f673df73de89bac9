"""REAM by the pass against loops in float64 that really build the merged model and run it for the next layer."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration.streamed import StreamedModel, open_for_pass
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.load import load_model
from harness.contracts.method import Decision
from harness.contracts.statistics import Statistics
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import family_of
from harness.layerwise import look as looks
from harness.layerwise.apply import applied
from harness.layerwise.run import decide_by_layer
from methods.ream import REAM
from tests.brute_force import moe_blocks, routed_documents
from tests.harness.layerwise.brute_force_ream import Layer, hidden_of, matrices, ream
from tests.tiny import FAMILY_NAMES, save_tiny

HALF = Fraction(1, 2)
LENGTHS = (31, 9, 22, 40)
DOCUMENTS = [np.random.default_rng([7, number]).integers(0, 256, size).tolist() for number, size in enumerate(LENGTHS)]


def sequences(documents: list[list[int]] = DOCUMENTS) -> list[TokenSequence]:
    return [TokenSequence(np.array(ids), (len(ids),), ("text",)) for ids in documents]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in (*FAMILY_NAMES, "deepseek_v3", "gpt_oss"):
        made[family] = tmp_path_factory.mktemp(family)
        save_tiny(made[family], family)
    return made


def opened(folder: Path, dtype: str = "float64", state: Path | None = None) -> StreamedModel:
    model = open_for_pass(folder, dtype, "cpu", "always", state=state)
    assert isinstance(model, StreamedModel)
    return model


def known(folder: Path) -> Statistics:
    config = read_config(folder)
    family = family_of(config)
    layers = {layer: {} for layer in family.moe_layers(config)}
    return Statistics(
        family.num_experts(config), family.top_k(config), 0, layers, family.router_groups(config),
        expert_weights_reader(folder, family),
    )  # fmt: skip


def decided(folder: Path, method: REAM, ratio: Fraction = HALF, dtype: str = "float64", state=None, **more) -> Decision:
    model = opened(folder, dtype, state)
    return decide_by_layer(model, method, ratio, 0, sequences(), known(folder), 2, **more)[0]


def same(decision: Decision, wanted: dict[int, Layer], folder: Path, tmp_path: Path) -> None:
    for plan in decision.plan.layers:
        layer = wanted[plan.layer]
        # Merged weights are those of a float32 checkpoint, so what is behind them is not exact.
        rtol = 1e-9 if plan is decision.plan.layers[0] else 1e-6
        np.testing.assert_allclose(decision.saliency[plan.layer], layer.saliency, rtol=rtol)
        assert [row for row, new in enumerate(plan.route) if new is not None] == layer.kept
        assert [layer.kept[label] for label in decision.groups[plan.layer]] == layer.leader
        found = {s.expert: list(s.permutation) for new in plan.experts for s in new.sources if s.permutation}
        assert found == layer.orders
        assert all(new.is_whole for new in plan.experts if len(new.sources) == 1)
    apply_plan(folder, decision.plan, tmp_path / "out")
    merged = load_model(tmp_path / "out", "float64")
    for number, layer in wanted.items():
        for place, centroid in enumerate(layer.kept):
            for one, other in zip(matrices(merged, number, place), layer.weights[centroid], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-7)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("size", "ratio"), [(16, HALF), (2, HALF), (3, Fraction(3, 8))])
def test_ream_is_that_of_plain_loops_over_a_model_that_is_really_merged(
    folders: dict[str, Path], family: str, size: int, ratio: Fraction, tmp_path: Path
):
    method = REAM("ream", group_size=size)
    wanted = ream(load_model(folders[family], "float64"), DOCUMENTS, 8 - int(8 * ratio), size)
    decision = decided(folders[family], method, ratio)
    same(decision, wanted, folders[family], tmp_path)
    assert max(map(len, ([s for s in new.sources] for p in decision.plan.layers for new in p.experts))) <= size
    assert decision.all_tokens == sum(LENGTHS)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_without_the_merged_prefix_every_layer_is_scored_on_the_intact_model(
    folders: dict[str, Path], family: str, tmp_path: Path
):
    wanted = ream(load_model(folders[family], "float64"), DOCUMENTS, 4, 16, sequential=False)
    decision = decided(folders[family], REAM("ream", sequential=False))
    same(decision, wanted, folders[family], tmp_path)
    merged = decided(folders[family], REAM("ream"))
    assert (merged.saliency[1] != decision.saliency[1]).any()
    np.testing.assert_array_equal(merged.saliency[0], decision.saliency[0])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_distances_are_those_of_plain_loops(folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch):
    wanted = ream(load_model(folders[family], "float64"), DOCUMENTS, 4, 16)
    seen, distance = {}, REAM._distance

    def remember(self: REAM, statistics: Statistics, layer: int) -> np.ndarray:
        seen[layer] = distance(self, statistics, layer)
        return seen[layer]

    monkeypatch.setattr(REAM, "_distance", remember)
    decided(folders[family], REAM("ream"))
    for layer, found in seen.items():
        np.testing.assert_allclose(found, wanted[layer].distance, atol=1e-12 if layer == min(seen) else 1e-6)


def _equal(one: Decision, other: Decision, exact: bool = False) -> None:
    assert one.groups == other.groups
    for layer, values in one.saliency.items():
        np.testing.assert_allclose(values, other.saliency[layer], rtol=0 if exact else 1e-9)
    for a, b in zip(one.plan.layers, other.plan.layers, strict=True):
        assert a.route == b.route
        for x, y in zip(a.experts, b.experts, strict=True):
            assert [(s.expert, s.permutation) for s in x.sources] == [(s.expert, s.permutation) for s in y.sources]
            assert [s.weight for s in x.sources] == pytest.approx([s.weight for s in y.sources], rel=1e-9)


@pytest.mark.parametrize("variant", ["exact", "released"])
def test_chunks_and_batches_change_nothing(folders: dict[str, Path], variant: str, monkeypatch: pytest.MonkeyPatch):
    method, folder = REAM("ream", variant, 3), folders["qwen3_moe"]
    whole = decided(folder, method)
    sizes = []
    outputs = looks.FusedExperts.outputs_of_all

    def remember(self, x: torch.Tensor) -> torch.Tensor:
        found = outputs(self, x)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(looks.FusedExperts, "outputs_of_all", remember)
    monkeypatch.setattr(looks.Look.__init__, "__defaults__", (None, 8 * 48 * 3))
    _equal(decided(folder, method), whole)
    assert sizes and max(sizes) <= 8 * 32 * 3
    model = opened(folder)
    _equal(decide_by_layer(model, method, HALF, 0, sequences(), known(folder), 3)[0], whole)


def test_a_sample_is_evenly_spaced_over_the_pass_and_says_its_size(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    folder, seen = folders["mixtral"], []
    cosine = looks.Look.output_cosine

    def remember(self: looks.Look) -> np.ndarray:
        seen.append((self.inputs.hidden[self.places], cosine(self)))
        return seen[-1][1]

    monkeypatch.setattr(looks.Look, "output_cosine", remember)
    decision = decided(folder, REAM("ream"), all_tokens=17)
    assert decision.all_tokens == 17
    model = load_model(folder, "float64")
    ordered = sorted(DOCUMENTS, key=lambda ids: -len(ids))  # as a pass has them
    hidden = np.concatenate([document.hidden for document in routed_documents(model, ordered)[0]])
    wanted = hidden[[place * len(hidden) // 17 for place in range(17)]]
    np.testing.assert_allclose(seen[0][0].numpy(), wanted, rtol=1e-9, atol=1e-12)
    outputs = np.array([[(p := matrices(model, 0, j))[2] @ hidden_of(p, x) for j in range(8)] for x in wanted])
    units = outputs / np.linalg.norm(outputs, axis=2, keepdims=True)
    np.testing.assert_allclose(seen[0][1], np.einsum("tih,tjh->ij", units, units) / 17, atol=1e-12)
    whole = decided(folder, REAM("ream"))
    np.testing.assert_array_equal(whole.saliency[0], decision.saliency[0])  # routed tokens are all there


def released(model, layer: int, power: int) -> tuple[np.ndarray, np.ndarray]:
    """Saliency (E,) and mean gated outputs (E, H) by the rules of the released code, one document after the other."""
    parts = [matrices(model, layer, j) for j in range(8)]
    saliency, mean, tokens = np.zeros(8), 0.0, 0
    seen = routed_documents(model, DOCUMENTS)[layer]
    for document in seen:
        total, times = np.zeros(8), np.zeros(8)
        for x, row in zip(document.hidden, document.logits, strict=True):
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            outputs = np.array([part[2] @ hidden_of(part, x) for part in parts])
            mean, tokens = mean + p[:, None] * outputs, tokens + 1
            for j in np.argsort(-p)[:2]:
                total[j] += p[j] ** power * np.linalg.norm(outputs[j])
                times[j] += 1
        saliency += np.where(times > 0, total / np.maximum(times, 1), 0.0) / len(seen)
    return saliency, mean / tokens


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("gated", [True, False])
def test_the_released_saliency_and_likeness(folders: dict[str, Path], family: str, gated: bool):
    model = load_model(folders[family], "float64")
    found = {}

    class Remembering(REAM):
        def _distance(self, statistics: Statistics, layer: int) -> np.ndarray:
            found[layer] = (super()._distance(statistics, layer), statistics.look(layer).output_mean(True))
            return found[layer][0]

    method = Remembering("ream", "released", 4, sequential=False, merging="weights", gated_sim=gated)
    decision = decided(folders[family], method)
    for layer in moe_blocks(model):
        saliency, mean = released(model, layer, 2 if gated else 1)
        np.testing.assert_allclose(decision.saliency[layer], saliency, rtol=1e-9)
        np.testing.assert_allclose(found[layer][1], mean, atol=1e-12)
        if gated:
            logits = np.concatenate([document.logits for document in routed_documents(model, DOCUMENTS)[layer]])
            columns = logits / np.linalg.norm(logits, axis=0)
            apart = np.linalg.norm(columns[:, :, None] - columns[:, None, :], axis=0)
            units = mean / np.linalg.norm(mean, axis=1, keepdims=True)
            wanted = 1 - (1 - apart / apart.max() + (units @ units.T + 1) / 2) / 2
            np.testing.assert_allclose(found[layer][0], wanted, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_layer_with_its_plan_in_memory_computes_what_the_checkpoint_does(
    folders: dict[str, Path], family: str, tmp_path: Path
):
    """With biases, a correction bias and router groups too: the hidden states behind the layer are the same."""
    decision = decided(folders[family], REAM("ream", group_size=4), dtype="float32")
    apply_plan(folders[family], decision.plan, tmp_path / "out")
    intact, merged = (load_model(folder, "float32") for folder in (folders[family], tmp_path / "out"))
    row = family_of(read_config(folders[family]))
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0))
    for plan in decision.plan.layers:
        one, other = (moe_block(model, row, plan.layer) for model in (intact, merged))
        with torch.no_grad(), applied(one, plan, row, row.top_k(read_config(folders[family])), torch.float32):
            found, wanted = (block.block(x) for block in (one, other))
        found, wanted = (y[0] if isinstance(y, tuple) else y for y in (found, wanted))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_router_groups_keep_as_many_experts_each(folders: dict[str, Path]):
    for plan in decided(folders["deepseek_v3"], REAM("ream"), Fraction(1, 4)).plan.layers:
        rows = [row for row, new in enumerate(plan.route) if new is not None]
        assert sum(row < 4 for row in rows) == sum(row >= 4 for row in rows) == 3


def test_a_pass_that_was_killed_goes_on_behind_the_last_layer(folders: dict[str, Path], tmp_path: Path, monkeypatch):
    folder, method, calls = folders["olmoe"], REAM("ream", group_size=3), []
    decide = REAM.decide

    def stop(self: REAM, statistics: Statistics, ratio: Fraction, seed: int) -> Decision:
        calls.append(min(statistics.layers))
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return decide(self, statistics, ratio, seed)

    monkeypatch.setattr(REAM, "decide", stop)
    with pytest.raises(KeyboardInterrupt):
        decided(folder, method, state=tmp_path)
    again = decided(folder, method, state=tmp_path)
    assert calls == [0, 1, 1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    monkeypatch.undo()
    _equal(again, decided(folder, method), exact=True)


def test_inputs_that_do_not_fit_are_refused_and_a_sample_of_them_is_not(folders: dict[str, Path]):
    model = replace(opened(folders["olmoe"]), memory=20 * 40 * 8)
    with pytest.raises(WinnowError, match=r"102 tokens takes .* are left: set calibration.all_tokens"):
        decide_by_layer(model, REAM("ream"), HALF, 0, sequences(), known(folders["olmoe"]), 2)
    found, collected = decide_by_layer(
        model, REAM("ream"), HALF, 0, sequences(), known(folders["olmoe"]), 2, all_tokens=20
    )
    assert found.all_tokens == 20
    assert collected.tokens == 102
    assert sum(collected.usage["text"]["1"]) == 2 * 102


def test_fewer_experts_than_top_k_where_top_k_is_lowered(folders: dict[str, Path]):
    like = replace(known(folders["olmoe"]), top_k=1)
    found, _ = decide_by_layer(
        opened(folders["olmoe"]), REAM("ream"), Fraction(7, 8), 0, sequences(), like, 2, lower_top_k=True
    )
    assert [len(plan.experts) for plan in found.plan.layers] == [1, 1]


def test_features_of_channels_are_principal_components_times_their_variance(tmp_path: Path):
    """With as many components as there are dimensions, where the random start does not matter."""
    save_tiny(tmp_path, "qwen3_moe", hidden=16)
    model = load_model(tmp_path, "float32")
    look = looks.Look(looks.FusedExperts(moe_blocks(model)[0].experts), looks.Inputs(*[torch.zeros(0)] * 3), 2)
    parts = [matrices(model, 0, j) for j in range(8)]
    rows = np.concatenate([np.concatenate([gate, up, down.T], axis=1) for gate, up, down in parts])
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(units - units.mean(0), full_matrices=False)
    wanted = left * values**2
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = look.channel_features()
    assert found.shape == (8, 16, 48)
    flat = found.reshape(128, 48)
    np.testing.assert_allclose(flat @ flat.T, wanted @ wanted.T, atol=1e-4)
    np.testing.assert_array_equal(look.channel_features(), found)
