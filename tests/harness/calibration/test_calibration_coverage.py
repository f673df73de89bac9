"""Attribution in closed form against autograd on a perturbed block."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from harness.calibration.cache import cached_statistics
from harness.calibration.calibrate import calibrate
from harness.calibration.collect import collect
from harness.calibration.tokens import TokenSequence
from harness.contracts.statistics import STATISTICS
from harness.families.table import FAMILIES
from tests.tiny import FAMILY_NAMES, save_tiny, tiny_model

ALPHA, EPSILON = 0.9, 1e-6
LENGTHS = (31, 4, 18, 1, 9)
COVERAGE = frozenset({"attribution_sum", "channel_square_sum", "channel_saliency_sum", "input_square_sum"})


def texts() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, 256, length).tolist() for length in LENGTHS]


def sequences() -> list[TokenSequence]:
    return [TokenSequence(np.array(text, dtype=np.int64), (len(text),), ("text",)) for text in texts()]


def perturbed_by_autograd(model, layer: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, sum over tokens of <z, dL/dz> (E,), and of |h * dL/dh| (E, I), all routed experts scaled by ALPHA.

    z is an expert's output before the scale, h what goes into its down projection.
    """
    experts = model.model.layers[layer].mlp.experts
    width = experts.down_proj.shape[2]
    attribution, saliency = np.zeros(experts.num_experts), np.zeros((experts.num_experts, width))
    loss_sum, kept = 0.0, {}
    handle = model.model.layers[layer].register_forward_hook(lambda m, args, output: kept.update(y=output))

    def scaled(hidden, indices, gates):
        kept["leaves"] = []
        rows = []
        for x, chosen, shares in zip(hidden, indices.tolist(), gates, strict=True):
            row = torch.zeros_like(x)
            for j, g in zip(chosen, shares, strict=True):
                gate, up = (experts.gate_up_proj[j] @ x).chunk(2)
                h = (silu(gate) * up).detach().requires_grad_()
                z = experts.down_proj[j] @ h
                z.retain_grad()
                kept["leaves"].append((j, h, z))
                row = row + g.detach() * ALPHA * z
            rows.append(row)
        return torch.stack(rows)

    for text in texts():
        ids = torch.tensor([text])
        with torch.no_grad():
            model(ids, use_cache=False)
        y = kept["y"].detach()
        experts.forward = scaled
        model(ids, use_cache=False)
        del experts.forward
        moved = ((kept["y"] - y) ** 2).sum(-1) / ((y**2).sum(-1) + EPSILON)
        loss = moved.sum()
        loss.backward()
        loss_sum += float(loss.detach())
        for j, h, z in kept["leaves"]:
            attribution[j] += float((z * z.grad).sum().detach())
            saliency[j] += (h * h.grad).abs().detach().numpy()
    handle.remove()
    return loss_sum, attribution, saliency


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_attribution_loss_and_saliency_equal_autograd_on_the_perturbed_block(family):
    model = tiny_model(family)
    collected = collect(model, sequences(), FAMILIES[family], COVERAGE, batch_size=8)
    model.set_experts_implementation("eager")
    model = model.double()
    for layer, arrays in collected.layers.items():
        loss, attribution, saliency = perturbed_by_autograd(model, layer)
        factor = 2 * (1 - ALPHA) * ALPHA
        closed = -factor * arrays["attribution_sum"]
        np.testing.assert_allclose(closed, attribution, rtol=1e-4, atol=1e-4 * np.abs(attribution).max())
        assert (1 - ALPHA) ** 2 * arrays["attribution_sum"].sum() == pytest.approx(loss, rel=1e-4)
        channels = factor * arrays["channel_saliency_sum"]
        np.testing.assert_allclose(channels, saliency, rtol=1e-4, atol=1e-4 * saliency.max())


def test_bfloat16_sums_in_float32():
    """A dot product over H that is rounded to 8 bits would be off by far more than its bfloat16 factors."""
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    low = collect(model, sequences(), FAMILIES["qwen3_moe"], COVERAGE)
    high = collect(model.float(), sequences(), FAMILIES["qwen3_moe"], COVERAGE)
    for layer in low.layers:
        same = low.layers[layer]["frequency"] == high.layers[layer]["frequency"]  # no routing flip
        assert same.any()
        for name in COVERAGE:
            got, want = low.layers[layer][name][same], high.layers[layer][name][same]
            np.testing.assert_allclose(got, want, rtol=0.1, atol=0.03 * np.abs(want).max(), err_msg=name)


def test_a_cache_of_an_older_pass_is_completed(tmp_path):
    """Older passes lack the new names: the union is computed once, and then both are found."""
    folder = tmp_path / "model"
    model = save_tiny(folder, "qwen3_moe")
    passes = []

    def load():
        passes.append(1)
        return model

    def go(*names):
        return calibrate(folder, load, sequences(), frozenset(names), tmp_path / "cache")

    go("weighted_ean_sum", "output_mean")
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    _, second = go(*COVERAGE)
    assert len(passes) == 2
    assert second.names == COVERAGE | {"weighted_ean_sum", "output_mean", "frequency"}
    _, third = go("channel_square_sum", "output_mean")
    assert len(passes) == 2
    for name in second.names:
        np.testing.assert_array_equal(third.layers[1][name], second.layers[1][name])
    assert third.layers[0]["channel_square_sum"].shape == (8, 3, 16)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [entry]


def test_everything_asked_for_survives_the_cache(tmp_path):
    model = tiny_model("olmoe")

    def compute(names):
        return collect(model, sequences(), FAMILIES["olmoe"], names)

    first = cached_statistics(tmp_path, {"key": 1}, frozenset(STATISTICS), compute)
    again = cached_statistics(tmp_path, {"key": 1}, frozenset(STATISTICS), lambda names: pytest.fail("not found"))
    for layer, arrays in first.layers.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(again.layers[layer][name], values)
