"""The refit against direct least squares in float64, on models with and without biases, sigmoids and renormalising."""

from pathlib import Path

import numpy as np
import pytest

from harness.calibration.streamed import open_for_pass
from harness.contracts.plan import Array, CompressionPlan, LayerPlan, LowRank, NewExpert, Source, prune
from harness.contracts.recovery import Fit
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from harness.refit.run import refit
from methods.grouping import merge_groups
from tests.harness.refit import direct
from tests.tiny import save_tiny

FAMILY_NAMES = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
ALPHA = 0.01
TEXT, OTHER = direct.sequences(), direct.sequences(5, seed=1)
# Groups of members that are close to each other in number, for routers in groups of four.
LABELS = [0, 0, 1, 1, 1, 2, 3, 3]
SHARES = np.array([3.0, 1, 2, 5, 1, 4, 2, 2])


def layers_of(folder: Path) -> list[int]:
    model = direct.intact(folder)
    return FAMILIES[model.config.model_type].moe_layers(model.config.to_dict())


def merged(layer: int) -> LayerPlan:
    return merge_groups(layer, LABELS, SHARES, {1: tuple(np.random.default_rng(0).permutation(16).tolist())})


def narrowed(layer: int) -> LayerPlan:
    rng = np.random.default_rng(layer)
    channels = [tuple(sorted(rng.choice(16, 9, replace=False).tolist())) for _ in range(8)]
    return LayerPlan(layer, tuple(NewExpert((Source(j),), channels[j]) for j in range(8)), tuple(range(8)))


def pruned(layer: int) -> LayerPlan:
    return prune(layer, 8, [0, 2, 4, 5, 6, 7] if layer % 2 else [1, 2, 3, 4, 5, 6])


def ream_like(layer: int) -> LayerPlan:
    """Merged, with the row of one member alone."""
    whole = merged(layer)
    return LayerPlan(layer, whole.experts, (0, None, None, 1, None, 2, 3, None))


def absorbing(layer: int) -> LayerPlan:
    """One member stands for its group, whose rows all stay."""
    return LayerPlan(layer, tuple(NewExpert((Source(j),)) for j in (0, 3, 5, 6)), tuple(LABELS))


def standing_in(layer: int) -> LayerPlan:
    """Whole experts, one of which also is the base of a low-rank map; a map of the input, and a constant."""
    rng = np.random.default_rng(layer)

    def array(*shape: int) -> Array:
        return Array(rng.normal(0, 0.3, shape).astype(np.float32))

    whole = [NewExpert((Source(j),)) for j in (0, 2, 4, 5)]
    based = NewExpert((Source(2),), low_rank=LowRank(array(32, 3), array(3, 32)))
    of_input = NewExpert(low_rank=LowRank(array(32, 2), array(2, 32), array(32)))
    experts = (*whole, NewExpert(constant=array(32)), of_input, based)
    return LayerPlan(layer, experts, (0, 4, 1, 6, 2, 3, 5, None))


KINDS = {
    "merged": merged,
    "narrowed": narrowed,
    "pruned": pruned,
    "ream_like": ream_like,
    "absorbing": absorbing,
    "standing_in": standing_in,
}


def run(folder: Path, plan: CompressionPlan, *fits: Fit, text=TEXT, other=OTHER, dtype: str = "float64", **more):
    model = open_for_pass(folder, dtype, "cpu", "always")
    return refit(model, plan, fits, text, other, batch_size=4, **more)


def downs(layer: LayerPlan) -> dict[int, np.ndarray]:
    return {place: new.down.values for place, new in enumerate(layer.experts) if new.down is not None}


def close(found: np.ndarray, wanted: np.ndarray, within: float = 1e-6) -> bool:
    return float(np.abs(found - wanted).max()) <= within * float(np.sqrt(np.square(wanted).mean()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param)
    return folder


by_family = pytest.mark.parametrize("folder", FAMILY_NAMES, indirect=True)
# Routers in groups keep as many rows in each: no plan here does but by all of them.
by_family_without_groups = pytest.mark.parametrize(
    "folder", [name for name in FAMILY_NAMES if name != "deepseek_v3"], indirect=True
)


@by_family
@pytest.mark.parametrize("kind", ["merged", "narrowed", "absorbing"])
def test_routed_and_all_tokens_are_direct_least_squares(folder: Path, kind: str):
    layers = layers_of(folder)
    plan = CompressionPlan(tuple(KINDS[kind](layer) for layer in layers))
    model = direct.intact(folder)
    found = {name: run(folder, plan, Fit(name, ALPHA)) for name in ("routed", "all_tokens")}
    for at, layer in enumerate(layers):
        family = model.config.model_type
        block = moe_block(model, FAMILIES[family], layer)
        text, other = (direct.seen(model, family, layer, some) for some in (TEXT, OTHER))
        bare = plan.layers[at]
        led = np.eye(len(bare.experts))[list(bare.route)]
        for name, result in found.items():
            fitted = downs(result.plan.layers[at])
            of_one = {place: direct.members(bare, place) for place in range(len(bare.experts))}
            alone = {place for place, new in enumerate(bare.experts) if new.is_whole and len(of_one[place]) == 1}
            whole = {place for place, new in enumerate(bare.experts) if new.is_whole}
            assert set(fitted) == set(of_one) - (alone if name == "routed" else whole)
            for place, down in fitted.items():
                if name == "routed":
                    wanted = direct.routed(bare, place, block, text, ALPHA)
                else:
                    wanted = direct.all_tokens(bare, place, block, text.x, ALPHA)
                assert close(down, wanted), (layer, name, place)
            told = result.told["layers"][str(layer)]
            for which, seen in (("calibration", text), ("heldout", other)):
                gates = seen.gates @ led
                errors = [direct.error(bare, block, seen, gates, each) for each in ({}, fitted)]
                np.testing.assert_allclose(told[which], errors, rtol=1e-7, atol=1e-14)


@by_family_without_groups
@pytest.mark.parametrize("kind", KINDS)
def test_joint_is_one_regression_over_all_experts(folder: Path, kind: str, tmp_path: Path):
    layers = layers_of(folder)
    plan = CompressionPlan(tuple(KINDS[kind](layer) for layer in layers))
    model = direct.intact(folder)
    family = model.config.model_type
    result = run(folder, plan, Fit("joint", ALPHA, sweeps=400))
    for at, layer in enumerate(layers):
        block = moe_block(model, FAMILIES[family], layer)
        text, other = (direct.seen(model, family, layer, some) for some in (TEXT, OTHER))
        bare = plan.layers[at]
        gates, of_other = (
            direct.left_gates(folder, plan, family, layer, s.x, tmp_path / "left") for s in (text, other)
        )
        shares = {6: 1} if kind == "standing_in" else {}
        wanted = direct.joint(bare, block, text, gates, ALPHA, shares)
        fitted = downs(result.plan.layers[at])
        told = result.told["layers"][str(layer)]
        np.testing.assert_allclose(told["calibration"][0], direct.error(bare, block, text, gates, {}), rtol=1e-6)
        np.testing.assert_allclose(told["calibration"][1], direct.error(bare, block, text, gates, wanted), rtol=1e-3)
        np.testing.assert_allclose(told["heldout"][1], direct.error(bare, block, other, of_other, fitted), rtol=1e-6)
        assert set(fitted) == set(wanted)
        for place, down in wanted.items():
            assert close(fitted[place], down, 0.02), (layer, place)
