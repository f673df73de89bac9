"""Recalibrated routers against direct least squares on whole models, layer by layer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration.streamed import open_for_pass
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.contracts.composition import compose
from harness.contracts.plan import Array, CompressionPlan, LayerPlan, identity, prune, validate
from harness.contracts.plan_files import load_plan, plan_files
from harness.contracts.recovery import Recalibration
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from harness.refit.recalibrate import recalibrate
from tests.harness.refit import direct
from tests.harness.refit.test_refit import OTHER, TEXT, layers_of, merged, standing_in
from tests.tiny import save_tiny

ALPHA = 0.02


def turned(layer: int) -> LayerPlan:
    """Pruned; the new experts in another order than the old ones."""
    plan = prune(layer, 8, [0, 2, 3, 4, 6, 7])
    order = (4, 1, 0, 5, 2, 3)
    experts = tuple(plan.experts[place] for place in np.argsort(order))
    return LayerPlan(layer, experts, tuple(None if new is None else order[new] for new in plan.route))


KINDS = {
    "olmoe": turned,
    "gpt_oss": turned,  # a bias, which stays
    "deepseek_v3": merged,  # sigmoids, groups, and a layer without experts
    "granitemoe": lambda layer: prune(layer, 8, [1, 2, 3, 5, 6, 7]),  # a router inside of the router
}


def given(model: torch.nn.Module, family: str, layer: int, text) -> np.ndarray:
    """(T, H): what the router is given."""
    parts: list[np.ndarray] = []
    router = moe_block(model, FAMILIES[family], layer).router
    handle = router.register_forward_pre_hook(
        lambda _, args: parts.append(args[0].reshape(-1, args[0].shape[-1]).numpy().copy())
    )
    with torch.no_grad():
        for sequence in text:
            model(torch.from_numpy(sequence.input_ids).unsqueeze(0))
    handle.remove()
    return np.concatenate(parts)


def matrix(model: torch.nn.Module, family: str, layer: int) -> torch.Tensor:
    router = moe_block(model, FAMILIES[family], layer).router
    return next(each.data for name, each in router.named_parameters() if each.ndim == 2)


@pytest.mark.parametrize("family", KINDS)
def test_rows_are_those_of_direct_least_squares_layer_by_layer(family: str, tmp_path: Path):
    folder, left = tmp_path / "model", tmp_path / "left"
    save_tiny(folder, family)
    layers = layers_of(folder)
    plan = CompressionPlan(tuple(KINDS[family](layer) for layer in layers))
    apply_plan(folder, plan, left)
    result = recalibrate(
        *(open_for_pass(each, "float64", "cpu", "always") for each in (folder, left)),
        plan, Recalibration("recalibrated", ALPHA), TEXT, OTHER, batch_size=4,
    )  # fmt: skip
    intact, compressed = direct.intact(folder), load_model(left, "float64")
    for at, layer in enumerate(layers):
        route = plan.layers[at].route
        kept = [row for row, new in enumerate(route) if new is not None]
        rows = matrix(intact, family, layer).numpy()[kept]
        text, other = (
            (given(intact, family, layer, some) @ rows.T, given(compressed, family, layer, some))
            for some in (TEXT, OTHER)
        )
        wanted = direct.least_squares(text[1], text[0], rows, ALPHA)
        found = result.plan.layers[at].router.values
        assert np.abs(found - wanted).max() < 1e-7
        told = result.told["layers"][str(layer)]
        for name, (logits, x) in (("calibration", text), ("heldout", other)):
            errors = [np.square(logits - x @ r.T).sum() / np.square(logits).sum() for r in (rows, wanted)]
            np.testing.assert_allclose(told[name], errors, rtol=1e-6, atol=1e-12)
        # what is behind sees what the recalibrated layer gives
        order = (
            [kept.index(row) for row in sorted(kept, key=lambda row: route[row])] if plan.layers[at].is_pruning else ...
        )
        matrix(compressed, family, layer).copy_(torch.from_numpy(wanted[order]))
    if family == "olmoe":  # never renormalised: mass goes with the rows
        mass = told["gate_mass"]
        seen = direct.seen(intact, family, layers[-1], TEXT)
        np.testing.assert_allclose(mass["intact"], seen.gates.sum(1).mean(), rtol=1e-7)
        after = direct.seen(compressed, family, layers[-1], TEXT)
        np.testing.assert_allclose(mass["recalibrated"], after.gates.sum(1).mean(), rtol=1e-7)
        assert mass["as_is"] != mass["recalibrated"]
    apply_plan(folder, result.plan, tmp_path / "again")
    again = load_model(tmp_path / "again", "float64")
    for layer in layers:  # written in the order of the stored rows, rounded to float32
        written, wanted_there = (matrix(each, family, layer).numpy() for each in (again, compressed))
        np.testing.assert_allclose(written, wanted_there, rtol=1e-6, atol=1e-7)


def test_a_plan_with_router_rows_is_stored_checked_and_composed(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    layer = replace(prune(3, 8, [0, 2, 3, 4, 6, 7]), router=Array(rows))
    plan = CompressionPlan((layer,))
    for path, content in plan_files(plan, tmp_path).items():
        path.write_bytes(content)
    assert '"router": "layers.3.router"' in (tmp_path / "plan.json").read_text()
    assert load_plan(tmp_path / "plan.json") == plan
    validate(plan, 8, None, 4)
    for wrong, told in ((rows[:5], r"its router has shape \(5, 4\), not 6 x 4"), (rows * np.inf, "is not finite")):
        with np.errstate(invalid="ignore"), pytest.raises(WinnowError, match=told):
            validate(CompressionPlan((replace(layer, router=Array(wrong)),)), 8, None, 4)
    second = CompressionPlan((prune(3, 6, [0, 1, 5]),))
    np.testing.assert_array_equal(compose(plan, second).layers[0].router.values, rows[[0, 1, 5]])
    with pytest.raises(WinnowError, match="the second has router rows of its own in layer 3"):
        compose(CompressionPlan((identity(3, 8),)), plan)


def test_rows_that_lead_to_constants_and_maps_count_in_the_gate_mass(tmp_path: Path):
    save_tiny(tmp_path / "model", "olmoe")
    plan = CompressionPlan(
        tuple(replace(standing_in(layer), route=(0, 4, 1, 6, 2, 3, 5, 5)) for layer in layers_of(tmp_path / "model"))
    )
    apply_plan(tmp_path / "model", plan, tmp_path / "left")
    result = recalibrate(
        *(open_for_pass(tmp_path / each, "float64", "cpu", "always") for each in ("model", "left")),
        plan, Recalibration("recalibrated", ALPHA), TEXT, batch_size=4,
    )  # fmt: skip
    first = result.told["layers"]["0"]["gate_mass"]
    assert first["as_is"] == pytest.approx(first["intact"], rel=1e-9)  # the same rows on the same tokens
    assert result.told["layers"]["1"]["heldout"] is None
