"""vLLM with a model shared by two devices (tensor parallelism) against vLLM on one, and what a device is given.

An engine with two workers takes half a minute to start and about ten seconds to end, so one kind of checkpoint stands
for all in the fast tests: the ragged one, which has every difficulty at once.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.backends.vllm_plugin import _padding_loader
from harness.backends.vllm_standins import Route
from harness.checkpoints.config import read_config
from harness.checkpoints.layout import LayerLayout, LowRankLayout, layer_layouts
from harness.errors import WinnowError
from harness.families.table import family_of
from tests.harness.backends.vllm_served import PROMPTS, alive_in_group, made, needs_vllm, open_tiny, standin_bytes

PAIRS = [(prompt, ending) for prompt in PROMPTS for ending in (" and so", "7")] + [("", "abc"), ("x" * 100, "yyy")]
KINDS = [
    pytest.param("qwen3_moe", "ragged"),
    *(
        pytest.param(family, kind, marks=pytest.mark.slow)
        for family, kind in [("qwen3_moe", "plain"), ("qwen3_moe", "merged"), ("qwen2_moe", "ragged"),
                             ("mixtral", "merged"), ("olmoe", "other numbers by layer"), ("mixtral", "stand-ins"),
                             ("deepseek_v3", "stand-ins")]
    ),
]  # fmt: skip


@needs_vllm
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_two_devices_compute_what_one_does(family: str, kind: str, tmp_path: Path) -> None:
    folder = made(family, kind, tmp_path)
    if kind == "ragged":
        config = read_config(folder)
        widths = {width for one in layer_layouts(config, family_of(config)).values() for width in one.widths}
        assert {1, 5, 13} <= widths, "two devices cannot share all of them equally"
    found: dict[int, Any] = {}
    for devices in (1, 2):
        backend = open_tiny(folder, tensor_parallel_size=devices)
        group = backend._engine._process.pid
        assert len(alive_in_group(group)) >= (1 if devices == 1 else 4)  # the engine, its core and two workers
        scores = [answer.logprob for answer in backend.loglikelihood(PAIRS)]
        found[devices] = scores, backend.generate(PROMPTS, 16), backend.facts["expert_bytes"]
        backend.close()
        assert not alive_in_group(group) and backend._engine._process.returncode == 0, "it ended by itself"
    near = (
        2e-5 if family == "deepseek_v3" else 1e-5
    )  # at -48 nats float32 has steps of 4e-6, and sums have another order
    assert found[2][0] == pytest.approx(found[1][0], abs=near)
    assert found[2][1] == found[1][1]
    # The CPU kernel pads the channels of an expert, or a device's part of them, to a multiple of 32.
    # What stands for experts is added once, and held by one of them.
    once = standin_bytes(folder)
    assert found[2][2] - once == 2 * (found[1][2] - once)


@needs_vllm
def test_devices_that_cannot_share_the_model_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match=r"4 attention heads, which tensor_parallel_size=3 .* it can be 1, 2$"):
        open_tiny(made("qwen3_moe", "plain", tmp_path), tensor_parallel_size=3)
    with pytest.raises(WinnowError, match="data_parallel_size=2"):
        open_tiny(tmp_path / "qwen3_moe" / "plain", engine={"data_parallel_size": 2})


# The plugin


def test_rows_lead_to_stored_experts_or_to_what_stands_for_them() -> None:
    maps = (LowRankLayout(2, base=1), LowRankLayout(2))
    route = Route(LayerLayout((8, 8), (1, 2, 0, 3, 4, 2), constants=1, low_rank=maps), "cpu")
    rows = torch.tensor([[0, 3], [-1, -1], [2, 1], [1, 5], [4, 0]])
    gates = torch.tensor([[0.5, 0.25], [0.9, 0.9], [0.5, 0.125], [0.75, 0.125], [0.5, 0.25]])
    for chosen in (rows.to(torch.int32), rows, rows.to(torch.int32).view(torch.uint32)):
        experts, left = route(chosen, gates)
        signed = experts.view(torch.int32) if experts.dtype == torch.uint32 else experts
        assert experts.dtype == chosen.dtype
        assert signed.tolist() == [[1, 1], [-1, -1], [0, 0], [0, 0], [0, 1]]
        assert left.tolist() == [[0.5, 0.25], pytest.approx([0.9, 0.9]), [0.5, 0], [0, 0], [0, 0.25]]
        shares = route.shares(chosen, gates, 3)
        assert shares.tolist() == [[0, 0.25, 0], [0, 0, 0], [0.125, 0, 0], [0.875, 0, 0], [0, 0, 0.5]]
    assert gates[2, 1] == 0.125, "vLLM's own are not written over"


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 5, 12])
def test_devices_hold_every_channel_of_an_expert_once(devices: int, width: int) -> None:
    """As vLLM cuts matrices: device i has the i-th of equal parts, and what remains is nobody's."""
    hidden, rng = 6, np.random.default_rng(0)
    gate, up = (torch.tensor(rng.normal(size=(width, hidden))) for _ in range(2))
    down, x = torch.tensor(rng.normal(size=(hidden, width))), torch.tensor(rng.normal(size=hidden))
    parts: dict[str, list[Any]] = {}

    def cut(param: str, loaded_weight: Any, *, shard_id: str) -> bool:
        along = 1 if shard_id == "w2" else 0
        parts[param] = list(loaded_weight.split(loaded_weight.shape[along] // devices, along))[:devices]
        return True

    load = _padding_loader(cut, devices)
    for name, shard, matrix in (("gate", "w1", gate), ("up", "w3", up), ("down", "w2", down)):
        assert load(param=name, loaded_weight=matrix, shard_id=shard)
    silu = torch.nn.functional.silu
    whole = down @ (silu(gate @ x) * (up @ x))
    shared = sum(
        d @ (silu(g @ x) * (u @ x)) for g, u, d in zip(*(parts[n] for n in ("gate", "up", "down")), strict=True)
    )
    assert torch.allclose(shared, whole, atol=1e-12)
