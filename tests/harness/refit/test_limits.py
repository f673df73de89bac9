"""The closed form for channels, few tokens, experts that nothing reaches, broken numbers, small memory, kills."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration.streamed import open_for_pass
from harness.checkpoints.load import load_model
from harness.contracts.plan import CompressionPlan
from harness.contracts.recovery import Fit
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from harness.refit import layer as of_layer
from harness.refit.run import refit, within
from harness.refit.solve import relative_error, ridge
from tests.harness.refit import direct
from tests.harness.refit.test_refit import KINDS, OTHER, TEXT, downs, layers_of, merged, narrowed, pruned, run
from tests.tiny import save_tiny

ALPHA = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    save_tiny(folder, "olmoe")
    return folder


def plan_of(folder: Path, kind) -> CompressionPlan:
    return CompressionPlan(tuple(kind(layer) for layer in layers_of(folder)))


def test_channels_are_the_closed_form_from_one_matrix_an_expert(folder: Path):
    """methods_3.md, 1.2: V = W[:,S] + W[:,S'] C[S',S] (C[S,S] + lambda I)^-1, C = sum of (g h)(g h)^T."""
    plan, model = plan_of(folder, narrowed), direct.intact(folder)
    found = run(folder, plan, Fit("routed", ALPHA))
    for before, after in zip(plan.layers, found.plan.layers, strict=True):
        block = moe_block(model, FAMILIES["olmoe"], before.layer)
        seen = direct.seen(model, "olmoe", before.layer, TEXT)
        for place, new in enumerate(before.experts):
            whole = direct.new_expert(block, replace(new, channels=None), seen.x)
            h = seen.gates[:, [place]] * whole.hidden
            c, stay = h.T @ h, list(new.channels)
            gone = sorted(set(range(16)) - set(stay))
            damped = c[np.ix_(stay, stay)] + ALPHA * np.trace(c[np.ix_(stay, stay)]) / len(stay) * np.eye(len(stay))
            wanted = whole.down[:, stay] + whole.down[:, gone] @ c[np.ix_(gone, stay)] @ np.linalg.inv(damped)
            assert np.abs(after.experts[place].down.values - wanted).max() < 1e-7


def test_the_ridge_draws_to_the_prior():
    rng = np.random.default_rng(0)
    z, y, prior = (torch.from_numpy(rng.normal(size=shape)) for shape in ((40, 6), (40, 3), (3, 6)))
    gram, cross = z.T @ z, y.T @ z
    np.testing.assert_allclose(ridge(gram, cross, prior, 1e-12), np.linalg.lstsq(z, y, rcond=None)[0].T, atol=1e-9)
    np.testing.assert_allclose(ridge(gram, cross, prior, 1e9), prior, atol=1e-6)
    assert torch.equal(ridge(0 * gram, 0 * cross, prior, 0.01), prior)
    with pytest.raises(WinnowError, match="singular with alpha=0"):
        ridge(z[:3].T @ z[:3], y[:3].T @ z[:3], prior, 0)
    assert relative_error(2 * y, y) == pytest.approx(1.0) and relative_error(0 * y, 0 * y) == 0.0


@pytest.mark.parametrize(("name", "kind"), [("routed", merged), ("all_tokens", merged), ("joint", pruned)])
def test_with_fewer_tokens_than_channels_it_is_still_the_ridge(folder: Path, name: str, kind):
    few = [replace(each, input_ids=each.input_ids[:3], lengths=(3,)) for each in TEXT[:2]]
    plan, model = plan_of(folder, kind), direct.intact(folder)
    found = run(folder, plan, Fit(name, ALPHA), text=few)
    for before, after in zip(plan.layers, found.plan.layers, strict=True):
        block = moe_block(model, FAMILIES["olmoe"], before.layer)
        seen = direct.seen(model, "olmoe", before.layer, few)
        for place, down in downs(after).items():
            assert np.isfinite(down).all()
            if name == "routed":
                assert np.abs(down - direct.routed(before, place, block, seen, ALPHA)).max() < 1e-5
            elif name == "all_tokens":
                assert np.abs(down - direct.all_tokens(before, place, block, seen.x, ALPHA)).max() < 1e-5
        told = found.told["layers"][str(before.layer)]["calibration"]
        assert name == "all_tokens" or told[1] < told[0]


def test_an_expert_that_nothing_reaches_stays(folder: Path, tmp_path: Path):
    """One token alone: most groups see nothing."""
    one = [replace(TEXT[0], input_ids=TEXT[0].input_ids[:1], lengths=(1,))]
    plan, model = plan_of(folder, merged), direct.intact(folder)
    found = run(folder, plan, Fit("routed", ALPHA), text=one, other=())
    stayed = 0
    for before, after in zip(plan.layers, found.plan.layers, strict=True):
        block = moe_block(model, FAMILIES["olmoe"], before.layer)
        seen = direct.seen(model, "olmoe", before.layer, one)
        for place, down in downs(after).items():
            if not seen.gates[:, direct.members(before, place)].any():
                stayed += 1
                prior = direct.new_expert(block, before.experts[place], seen.x).down
                np.testing.assert_allclose(down, prior, rtol=1e-6, atol=1e-8)
    assert stayed and found.told["layers"]["0"]["heldout"] is None and found.told["heldout_tokens"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_the_same(folder: Path, kind: str, tmp_path: Path):
    load_model(folder, "bfloat16").save_pretrained(tmp_path)
    plan = plan_of(folder, KINDS[kind])
    name = "joint" if kind in ("pruned", "standing_in") else "routed"
    exact, rounded = (run(tmp_path, plan, Fit(name, ALPHA), dtype=dtype) for dtype in ("float64", "bfloat16"))
    for one, other in zip(exact.plan.layers, rounded.plan.layers, strict=True):
        for place, down in downs(one).items():
            assert other.experts[place].down.values.dtype == np.float32
            assert np.linalg.norm(downs(other)[place] - down) < 0.25 * np.linalg.norm(down)
    for layer, told in exact.told["layers"].items():
        np.testing.assert_allclose(rounded.told["layers"][layer]["calibration"], told["calibration"], rtol=0.1)


def test_chunks_and_batches_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(folder, merged)
    found = [run(folder, plan, Fit("routed", ALPHA), Fit("joint", ALPHA))]
    monkeypatch.setattr("harness.refit.experts.CHUNK", 7)
    found.append(run(folder, plan, Fit("routed", ALPHA), Fit("joint", ALPHA)))
    for one, other in zip(*(each.plan.layers for each in found), strict=True):
        for place, down in downs(one).items():
            np.testing.assert_allclose(downs(other)[place], down, rtol=1e-9, atol=1e-12)


def test_each_fit_goes_on_from_the_one_before(folder: Path):
    plan = plan_of(folder, merged)
    first = run(folder, plan, Fit("all_tokens", ALPHA))
    both = run(folder, plan, Fit("all_tokens", ALPHA), Fit("routed", 0.5))
    again = run(folder, first.plan, Fit("routed", 0.5))
    for one, other in zip(both.plan.layers, again.plan.layers, strict=True):
        for place, down in downs(one).items():
            np.testing.assert_allclose(downs(other)[place], down, rtol=1e-6, atol=1e-8)
    errors = both.told["layers"]["0"]["calibration"]
    assert len(errors) == 3 and errors[2] < min(errors[:2])


def test_all_tokens_may_be_fewer(folder: Path):
    plan = plan_of(folder, merged)
    text = direct.sequences(1, seed=3)
    half = len(text[0].input_ids) // 2
    found = run(folder, plan, Fit("all_tokens", ALPHA), text=text, all_tokens=half)
    assert found.told["all_tokens"] == half
    model, layer = direct.intact(folder), plan.layers[1]
    block, seen = moe_block(model, FAMILIES["olmoe"], 1), direct.seen(model, "olmoe", 1, text)
    x = seen.x[np.arange(half) * len(seen.x) // half]
    for place, down in downs(found.plan.layers[1]).items():
        assert np.abs(down - direct.all_tokens(layer, place, block, x, ALPHA)).max() < 1e-5


def test_what_is_not_finite_is_one_line(folder: Path, tmp_path: Path):
    model = load_model(folder, "float32")
    with torch.no_grad():
        moe_block(model, FAMILIES["olmoe"], 1).experts.down_proj[2] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(WinnowError, match="^refit=routed, layer 1: its outputs are NaN or infinite: check") as caught:
        run(tmp_path, plan_of(folder, merged), Fit("routed", ALPHA))
    assert "\n" not in str(caught.value)


def test_a_text_that_does_not_fit_the_memory_is_refused(folder: Path):
    model = replace(open_for_pass(folder, "float32", "cpu", "always"), memory=2 * 60 * 4 * 32 * 4 - 1)
    told = "do not fit 5.72e-05 GiB: set refit.tokens lower, or calibration.memory_gib higher"
    with pytest.raises(WinnowError, match=told):
        refit(model, plan_of(folder, merged), [Fit("routed")], TEXT, OTHER, 4)


def test_the_text_is_cut_to_so_many_tokens_in_whole_sequences():
    alike = [replace(TEXT[0], sources=(str(number),)) for number in range(10)]
    tokens = len(TEXT[0].input_ids)
    assert within(alike, 10 * tokens) == alike
    for asked, places in ((5 * tokens, [0, 2, 4, 6, 8]), (2 * tokens + 1, [0, 5]), (1, [0])):
        assert [int(each.sources[0]) for each in within(alike, asked)] == places


def test_a_killed_pass_goes_on_behind_the_last_layer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan, fits = plan_of(folder, merged), [Fit("routed", ALPHA)]
    wanted = run(folder, plan, *fits)
    fitted, asked = of_layer.fit_layer, []

    def opened():
        return open_for_pass(folder, "float64", "cpu", "always", state=tmp_path)

    def stopping(layer, *args):
        asked.append(layer.layer)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return fitted(layer, *args)

    monkeypatch.setattr("harness.refit.watch.fit_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        refit(opened(), plan, fits, TEXT, OTHER, 4)
    found = refit(opened(), plan, fits, TEXT, OTHER, 4)
    assert asked == [0, 1, 1]
    assert found.plan == wanted.plan and found.told == wanted.told
