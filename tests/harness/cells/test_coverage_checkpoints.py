"""Coverage from statistics to logits: plan, rewrite, load, and compare with the original model, masked by hand."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration.calibrate import calibrate
from harness.calibration.tokens import TokenSequence
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import read_config
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.load import load_model
from harness.checkpoints.reader import CheckpointReader
from harness.contracts.composition import compose
from harness.contracts.plan import CompressionPlan, prune
from harness.families.table import FAMILIES
from methods.chain import Chain
from methods.coverage import Coverage
from methods.prune_experts import ExpertPruning
from tests.harness.checkpoints.compressed import brute_force_logits, logits, merged_layer, pruned, sliced
from tests.tiny import FAMILY_NAMES, save_tiny

COVERAGE = Coverage("coverage", min_channels=6)
CHAIN = Chain("chain", ExpertPruning("reap", "reap"), COVERAGE)
UNIFORM = Coverage("uniform", layout="uniform", layer_budget="uniform")
EXPERTS, WIDTH, HIDDEN, LAYERS = 8, 16, 32, 2


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def calibrated(request, tmp_path_factory):
    """Name, folder and statistics of a tiny model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(folder / "model", request.param)
    generator = np.random.default_rng(2)
    sequences = [TokenSequence(generator.integers(0, 256, n), (n,), ("text",)) for n in (40, 25, 3)]
    names = COVERAGE.requires | CHAIN.requires
    statistics, _ = calibrate(folder / "model", lambda: model, sequences, names, folder / "cache")
    return request.param, folder / "model", statistics


def masked(folder: Path, plan: CompressionPlan) -> torch.Tensor:
    """Logits of the original: removed channels are set to zero, removed experts are out of the routers' choice."""
    model = load_model(folder)
    with torch.no_grad():
        for layer in plan.layers:
            experts = model.model.layers[layer.layer].mlp.experts
            for new in layer.experts:
                gone = set() if new.channels is None else set(range(WIDTH)) - set(new.channels)
                for channel in gone:
                    experts.gate_up_proj[new.sources[0].expert][channel] = 0
                    experts.gate_up_proj[new.sources[0].expert][WIDTH + channel] = 0
                    experts.down_proj[new.sources[0].expert][:, channel] = 0
    whole = (prune(p.layer, EXPERTS, [e.sources[0].expert for e in p.experts]) for p in plan.layers)
    return brute_force_logits(model, CompressionPlan(tuple(whole)))


@pytest.mark.parametrize("method", [COVERAGE, CHAIN, UNIFORM], ids=lambda method: method.name)
def test_the_compressed_model_is_the_masked_original(calibrated, tmp_path, method):
    family, folder, statistics = calibrated
    plan = method.decide(statistics, Fraction(1, 2), 0).plan
    sizes = apply_plan(folder, plan, tmp_path / "out")
    total = LAYERS * EXPERTS * WIDTH
    assert sizes["expert_parameters"] == 3 * HIDDEN * (total - math.floor(total / 2))
    assert sizes["layout"] == ("plain" if method is UNIFORM else "compact")
    layouts = layer_layouts(read_config(tmp_path / "out"), FAMILIES[family])
    for layer in plan.layers:
        widths = [WIDTH if new.channels is None else len(new.channels) for new in layer.experts]
        assert list(layouts[layer.layer].widths) == widths
        assert layouts[layer.layer].rows == len(layer.experts)
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out")).double(), masked(folder, plan), rtol=1e-4, atol=1e-4
    )


def test_experts_do_go(calibrated):
    """Else the tests above would say nothing of router rows."""
    _, _, statistics = calibrated
    for method in (COVERAGE, CHAIN):
        plan = method.decide(statistics, Fraction(1, 2), 0).plan
        assert any(None in layer.route for layer in plan.layers)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names()}


def second_stages() -> dict[str, tuple[CompressionPlan, CompressionPlan]]:
    """First plans that leave a plain checkpoint, and what may follow."""
    half = sliced(pruned([0, 2, 3, 5], [1, 2, 3, 7]), [9, 4, 0, 15, 3, 8], [1, 2, 3, 4, 5, 6])
    merging = CompressionPlan(
        tuple(merged_layer(layer, [[0, 3], [1, 2]], width=6, permute=True) for layer in range(LAYERS))
    )
    narrower = sliced(pruned([0, 1, 3], [2, 0, 1], num_experts=4), [5, 0, 2], [1, 3, 4])
    return {"merge": (half, merging), "prune and slice": (half, narrower)}


@pytest.mark.parametrize("name", second_stages())
def test_applying_a_composition_is_applying_one_plan_after_the_other(calibrated, tmp_path, name):
    family, folder, _ = calibrated
    first, second = second_stages()[name]
    apply_plan(folder, first, tmp_path / "first")
    apply_plan(tmp_path / "first", second, tmp_path / "second")
    apply_plan(folder, compose(first, second, width=WIDTH), tmp_path / "both")
    stored = [layer_layouts(read_config(tmp_path / end), FAMILIES[family]) for end in ("second", "both")]
    assert stored[0] == stored[1]
    step, both = tensors(tmp_path / "second"), tensors(tmp_path / "both")
    assert step.keys() == both.keys()
    for tensor in step:
        torch.testing.assert_close(both[tensor], step[tensor], rtol=1e-6, atol=1e-7)


def test_a_chain_is_its_stages_one_after_the_other(calibrated, tmp_path):
    """The second stage as a plan for the pruned checkpoint, which it is applied to; bit by bit."""
    _, folder, statistics = calibrated
    first = CHAIN.first.decide(statistics, Fraction(1, 4), 0).plan
    both = CHAIN.decide(statistics, Fraction(1, 2), 0).plan
    names = {p.layer: [e.sources[0].expert for e in p.experts] for p in first.layers}
    kept = {p.layer: {e.sources[0].expert: e.channels for e in p.experts} for p in both.layers}
    left = [[i for i, old in enumerate(names[layer]) if old in kept[layer]] for layer in names]
    second = pruned(*left, num_experts=len(names[0]))
    second = CompressionPlan(
        tuple(
            type(p)(
                p.layer,
                tuple(type(e)(e.sources, kept[p.layer][names[p.layer][e.sources[0].expert]]) for e in p.experts),
                p.route,
            )
            for p in second.layers
        )
    )
    apply_plan(folder, first, tmp_path / "first")
    apply_plan(tmp_path / "first", second, tmp_path / "second")
    apply_plan(folder, both, tmp_path / "both")
    assert read_config(tmp_path / "both")["winnow"] == read_config(tmp_path / "second")["winnow"]
    step, once = tensors(tmp_path / "second"), tensors(tmp_path / "both")
    assert step.keys() == once.keys()
    assert all(torch.equal(once[name], step[name]) for name in step)
