"""What holds for every method that conf/method offers, whatever it does."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.contracts.layerwise import layerwise
from harness.contracts.plan import identity, validate
from harness.contracts.plan_files import plan_arrays, plan_from_json, plan_to_json
from harness.contracts.second_pass import second_pass
from harness.contracts.statistics import STATISTICS
from harness.errors import WinnowError
from methods.coverage import Coverage
from methods.criteria import CRITERIA
from methods.partial import SIMILARITIES
from tests.methods.conftest import Case, made_up_case

FOLDER = Path(__file__).parents[2] / "conf" / "method"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
COMPRESSING = [name for name in NAMES if name != "none"]
UNIFORM_CHANNELS = ["activation_channels", "magnitude_channels", "random_channels"]
MERGING = ["hc_smoe", "m_smoe", "mergemoe", "partial", "ream"]
NOVICES = ["mone", "tilted"]
CHANNELS = ["coverage", "reap_coverage", *UNIFORM_CHANNELS]
# Made-up experts have 5 channels, of which half must go.
FEW_CHANNELS = dict.fromkeys(UNIFORM_CHANNELS, {"min_channels": 1}) | {
    "coverage": {"align": 1},
    "reap_coverage": {"second": {"align": 1}},
}


def configured(name: str, **options: object):
    node = OmegaConf.load(FOLDER / f"{name}.yaml")
    if "defaults" in node:
        node = composed(f"method={name}")
    return instantiate(OmegaConf.merge(node, options))


def composed(*overrides: str):
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        return compose("config", overrides=list(overrides)).method


def test_the_list_of_methods_is_complete():
    assert set(NAMES) == {*CRITERIA, *MERGING, *NOVICES, "naee", "none", *CHANNELS}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_name_is_the_method_name_and_the_method_is_frozen(name: str):
    method = configured(name)
    assert method.name == name
    assert method.requires <= set(STATISTICS)
    with pytest.raises(FrozenInstanceError):
        method.name = "other"


def test_the_defaults_are_the_published_readings():
    hc_smoe, m_smoe = configured("hc_smoe"), configured("m_smoe")
    assert (hc_smoe.linkage, hc_smoe.max_group_size, hc_smoe.merge_weights) == ("average", None, "frequency")
    assert (m_smoe.variant, m_smoe.alignment) == ("exact", "dominant")
    assert configured("naee").exhaustive_up_to == 16
    partial = configured("partial")
    assert (partial.preserved, partial.importance, partial.similarity) == (0.5, "reap", "router_logits")
    coverage, chain = configured("coverage"), configured("reap_coverage")
    assert coverage == Coverage("coverage", align=8)
    assert (chain.first, chain.second, chain.split) == (configured("reap"), coverage, 0.5)
    for name in UNIFORM_CHANNELS:
        ablation = configured(name)
        assert (ablation.layout, ablation.layer_budget) == ("uniform", "uniform")
        assert ablation.channel_score == name.removesuffix("_channels")
        assert replace(ablation, name="coverage", channel_score="activation") == Coverage(
            "coverage", expert_weight="uniform", layer_budget="uniform", layout="uniform"
        )
    for name in CRITERIA:
        assert (configured(name).criterion, configured(name).scope) == (name, "layer")


def test_any_two_methods_can_be_chained_from_the_command_line():
    places = ("method@method.first=frequency", "method@method.second=random_channels")
    chain = instantiate(composed("method=reap_coverage", *places, "method.second.align=2", "method.split=0.25"))
    assert chain.name == "frequency_random_channels"
    assert (chain.first, chain.second.channel_score) == (configured("frequency"), "random")
    assert (chain.second.align, chain.split) == (2, 0.25)


@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_is_the_identity_plan(case: Case, name: str):
    decision = configured(name, **FEW_CHANNELS.get(name, {})).decide(case.statistics, Fraction(0), seed=1)
    assert decision.plan.layers == tuple(identity(layer, case.num_experts) for layer in case.raw)


def decided(method, statistics):
    """Half goes; what is to be seen again is read off the statistics too."""
    decision = method.decide(statistics, Fraction(1, 2), seed=1)
    if (asking := second_pass(method)) is not None:
        assert asking.looks_again_at(statistics, decision).keys() == statistics.layers.keys()
    return decision.plan


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_method_reads_the_statistics_it_requires_and_no_other(name: str):
    method, full = configured(name, **FEW_CHANNELS.get(name, {})), made_up_case(1).statistics
    by_layer = layerwise(method)
    read = method.requires if by_layer is None else by_layer.looks_at
    bare = {
        layer: {key: values for key, values in arrays.items() if key in read} for layer, arrays in full.layers.items()
    }
    wanted = decided(method, full)
    assert decided(method, replace(full, layers=bare)) == wanted
    for missing in read:
        less = {layer: {k: v for k, v in arrays.items() if k != missing} for layer, arrays in bare.items()}
        with pytest.raises(WinnowError, match=f"'{missing}' of layer 0 was not collected"):
            decided(method, replace(full, layers=less))


@pytest.mark.parametrize("name", COMPRESSING)
def test_plans_are_valid_survive_json_and_leave_the_same_number_of_experts_or_channels(case: Case, name: str):
    for ratio in (Fraction(1, 4), Fraction(1, 2)):
        method = configured(name, **FEW_CHANNELS.get(name, {}))
        decision = method.decide(case.statistics, ratio, seed=1)
        validate(decision.plan)
        assert plan_from_json(plan_to_json(decision.plan), plan_arrays(decision.plan)) == decision.plan
        assert ((decision.saliency is None) != (decision.groups is None)) or layerwise(method)
        if name in CHANNELS:
            width = len(case.statistics.expert_weights(min(case.raw), 0).gate)
            everything = width * case.num_experts * len(case.raw)
            kept = everything - int(everything * ratio)
            if name in UNIFORM_CHANNELS:
                kept = (width - int(width * ratio)) * case.num_experts * len(case.raw)
            channels = [e.channels for plan in decision.plan.layers for e in plan.experts]
            assert sum(width if c is None else len(c) for c in channels) == kept
            continue
        left = sum(bool(new.sources) for plan in decision.plan.layers for new in plan.experts)
        assert left == (case.num_experts - int(case.num_experts * ratio)) * len(case.raw)


@pytest.mark.parametrize("name", [name for name in COMPRESSING if name not in NOVICES])
def test_too_high_a_ratio_is_refused_with_the_largest_that_works(name: str):
    # Of 180 channels, 36 are 4 each in top-k = 3 experts of 3 layers, 144 are 4 in every expert.
    largest = {"coverage": "0.8", "reap_coverage": r"\d"} | dict.fromkeys(UNIFORM_CHANNELS, "0.2")
    options = {key: value for key, value in FEW_CHANNELS.get(name, {}).items() if key != "min_channels"}
    with pytest.raises(WinnowError, match=f"largest ratio that works is {largest.get(name, '0.75')}"):
        configured(name, **options).decide(made_up_case(1).statistics, Fraction(5, 6), seed=0)
    with pytest.raises(WinnowError, match="outside"):
        configured(name, **options).decide(made_up_case(1).statistics, Fraction(1), seed=0)


def test_options_change_what_is_decided():
    statistics = made_up_case(1).statistics

    def plan(name: str, **options: object):
        return configured(name, **options).decide(statistics, Fraction(1, 2), seed=0).plan

    assert plan("reap") != plan("reap", scope="global")
    assert len({repr(plan("reap", constants=left)) for left in (False, True, "gate_squared")}) == 3
    assert plan("mone") != plan("mone", score="io_fluctuation")
    assert plan("mone") != plan("mone", scope="global")
    assert plan("mone") != plan("mone", weights="gate_squared")
    assert plan("tilted") != plan("tilted", weights="gate_squared")
    assert plan("hc_smoe") != plan("hc_smoe", linkage="complete")
    assert plan("hc_smoe") != plan("hc_smoe", max_group_size=2)
    assert plan("hc_smoe") != plan("hc_smoe", merge_weights="uniform")
    assert plan("m_smoe") != plan("m_smoe", variant="reap_repo")
    assert plan("m_smoe") != plan("m_smoe", alignment="none")
    assert plan("partial") != plan("partial", preserved="1/3")
    assert plan("partial") != plan("partial", importance="frequency")
    assert plan("partial") != plan("partial", importance="soft_count")
    assert len({str(plan("partial", similarity=name)) for name in SIMILARITIES}) == 3


def test_the_baseline_refuses_a_ratio():
    with pytest.raises(WinnowError, match=r"removes nothing: use ratio=0 \(it was 0.25\)"):
        configured("none").decide(made_up_case(1).statistics, Fraction(1, 4), seed=0)


def test_methods_need_no_torch():
    modules = (
        "methods.prune_experts, methods.hc_smoe, methods.m_smoe, methods.coverage, methods.chain, methods.schedule"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], check=False).returncode == 0
