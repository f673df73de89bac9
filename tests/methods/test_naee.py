"""NAEE against subsets tried one by one, on made-up tokens and on blocks of real models with experts cut out."""

import copy
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from harness.calibration.calibrate import calibrate
from harness.calibration.tokens import TokenSequence
from harness.contracts.shape import MoeShape
from harness.contracts.statistics import restricted, sampled_tokens
from harness.errors import WinnowError
from harness.families.table import FAMILIES
from methods.naee import NAEE, best_subset, greedy_subset, reconstruction_loss
from tests.methods.conftest import Case, RawLayer, made_up_case, with_statistic
from tests.tiny import ALL_FAMILIES, save_tiny

GROUPED = ("deepseek_v2", "deepseek_v3")
HALF = Fraction(1, 2)


def output(raw: RawLayer, t: int, kept: tuple[int, ...], top_k: int) -> np.ndarray:
    """The made-up layer's output for one token where only ``kept`` have router rows, one expert after another."""
    mass = sum(np.exp(raw.logits[t, j]) for j in kept)
    chosen = sorted(kept, key=lambda j: -raw.logits[t, j])[:top_k]
    return sum(np.exp(raw.logits[t, j]) / mass * raw.outputs[t, j] for j in chosen)


def made_up_loss(case: Case, layer: int, kept: tuple[int, ...]) -> float:
    raw, top_k = case.raw[layer], case.statistics.top_k
    everyone = tuple(range(case.num_experts))
    differences = [output(raw, t, kept, top_k) - output(raw, t, everyone, top_k) for t in range(len(raw.logits))]
    return float(np.linalg.norm(differences))


def kept_by(plan, layer: int) -> tuple[int, ...]:
    (found,) = [one for one in plan.layers if one.layer == layer]
    return tuple(new.sources[0].expert for new in found.experts)


def test_the_kept_subset_is_the_best_of_all():
    case = made_up_case(3, layers=(0, 2), num_experts=7, top_k=2)
    plan = NAEE("naee").decide(case.statistics, Fraction(3, 7), seed=0).plan
    for layer in case.raw:
        losses = {s: made_up_loss(case, layer, s) for s in itertools.combinations(range(7), 4)}
        assert kept_by(plan, layer) == min(losses, key=losses.__getitem__)


def test_beyond_the_limit_the_worst_expert_goes_one_after_the_other():
    case = made_up_case(4, layers=(0, 2), num_experts=7, top_k=2)
    plan = NAEE("naee", exhaustive_up_to=6).decide(case.statistics, Fraction(3, 7), seed=0).plan
    for layer in case.raw:
        kept = tuple(range(7))
        while len(kept) > 4:
            losses = {s: made_up_loss(case, layer, s) for s in itertools.combinations(kept, len(kept) - 1)}
            kept = min(losses, key=losses.__getitem__)
        assert kept_by(plan, layer) == kept


def test_the_greedy_search_can_miss_the_best():
    losses = {(1, 2, 3): 1.0, (0, 1): 2.0}  # 0 is best removed first, but then every pair is bad

    def loss(kept) -> float:
        return losses.get(tuple(kept), 3.0 if len(kept) == 3 else 10.0)

    assert tuple(best_subset(loss, 4, 2)) == (0, 1)
    assert tuple(greedy_subset(loss, 4, 2)) == (1, 2)


def test_the_saliency_is_the_loss_without_the_expert():
    case = made_up_case(5, layers=(1,), num_experts=6, top_k=2)
    saliency = NAEE("naee").decide(case.statistics, HALF, seed=0).saliency[1]
    wanted = [made_up_loss(case, 1, tuple(k for k in range(6) if k != j)) for j in range(6)]
    np.testing.assert_allclose(saliency, wanted)


def test_of_equal_losses_the_lower_index_is_kept():
    case = made_up_case(6, layers=(0,), num_experts=6, top_k=2)
    silent = with_statistic(case.statistics, 0, "sampled_output_gram", np.zeros((6, 6, 84)))
    for limit in (0, 16):
        assert kept_by(NAEE("naee", limit).decide(silent, HALF, seed=0).plan, 0) == (0, 1, 2)


def cut_out(block: nn.Module, kept: tuple[int, ...], num_experts: int) -> nn.Module:
    """A copy of an MoE block that has the experts ``kept`` only: whatever has an axis of E loses its other places."""
    block = copy.deepcopy(block)
    for module in block.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or num_experts not in tensor.shape:
                    continue
                (axis,) = [a for a, size in enumerate(tensor.shape) if size == num_experts]
                left = tensor.detach().index_select(axis, torch.tensor(kept))
                held[name] = nn.Parameter(left) if held is module._parameters else left
        for name, value in list(vars(module).items()):
            if "experts" in name and value == num_experts:
                setattr(module, name, len(kept))
    return block


@pytest.mark.parametrize("family", [name for name in ALL_FAMILIES if name not in GROUPED])
def test_losses_are_those_of_the_models_own_blocks_with_experts_cut_out(tmp_path, family):
    model = save_tiny(tmp_path / "model", family, num_experts=6)
    tokens = np.random.default_rng(0).integers(0, 256, 45)
    sequences = [TokenSequence(tokens, (45,), ("text",))]
    statistics, _ = calibrate(tmp_path / "model", lambda: model, sequences, NAEE("naee").requires, tmp_path / "cache")
    plan = NAEE("naee").decide(statistics, HALF, seed=0).plan
    inputs: dict[int, torch.Tensor] = {}
    blocks = {layer: model.get_submodule(FAMILIES[family].block.format(layer=layer)) for layer in statistics.layers}
    for layer, block in blocks.items():
        block.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0].clone()}))
    with torch.no_grad():
        model(torch.from_numpy(tokens)[None], use_cache=False)
        for layer, block in blocks.items():

            def run(part: nn.Module, x: torch.Tensor = inputs[layer]) -> torch.Tensor:
                answer = part(x)
                return (answer[0] if isinstance(answer, tuple) else answer).double()

            intact = run(block)
            subsets = list(itertools.combinations(range(6), 3))
            wanted = [float((run(cut_out(block, kept, 6)) - intact).norm()) for kept in subsets]
            gram = statistics.get(layer, "sampled_output_gram")
            loss = reconstruction_loss(gram, statistics.router(layer, statistics.get(layer, "sampled_inputs")))
            np.testing.assert_allclose([loss(kept) for kept in subsets], wanted, rtol=1e-3)
            assert min(wanted) < 0.95 * max(wanted)
            assert kept_by(plan, layer) == subsets[int(np.argmin(wanted))]


def test_restricted_statistics_route_among_what_is_left():
    case = made_up_case(7, layers=(0,), num_experts=8, top_k=2)
    inputs = case.statistics.get(0, "sampled_inputs")
    fewer = restricted(case.statistics, {0: [1, 3, 4, 7]})
    assert fewer.get(0, "sampled_inputs") is inputs
    gram = case.statistics.get(0, "sampled_output_gram")
    np.testing.assert_array_equal(fewer.get(0, "sampled_output_gram"), gram[[1, 3, 4, 7]][:, [1, 3, 4, 7]])
    for got, wanted in zip(
        fewer.router(0, inputs)([0, 2, 3]), case.statistics.router(0, inputs)([1, 4, 7]), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_what_does_not_fit_is_refused():
    with pytest.raises(WinnowError, match="'naee' does not fit a group-limited router"):
        NAEE("naee").check(MoeShape(8, 2, 2), HALF)
    with pytest.raises(WinnowError, match="exhaustive_up_to must be a whole number of at least 0, not -1"):
        NAEE("naee", -1)
    case = made_up_case(8, layers=(0,), num_experts=6, top_k=2)
    gram = case.statistics.get(0, "sampled_output_gram").copy()
    gram[2, 3, 1] = np.nan
    with pytest.raises(WinnowError, match="'sampled_output_gram' of layer 0 is NaN or infinite for expert"):
        NAEE("naee").decide(with_statistic(case.statistics, 0, "sampled_output_gram", gram), HALF, seed=0)


def test_a_sample_is_bounded_in_memory():
    assert [sampled_tokens(count) for count in (8, 64, 128, 256)] == [2048, 2048, 512, 128]
