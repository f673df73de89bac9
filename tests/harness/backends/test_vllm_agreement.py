"""vLLM and transformers write the same 64 tokens after 64 prompts, whatever a plan leaves in the place of experts.

Plans by hand, on the reference MoEs (softmax; sigmoid in groups with a correction bias, a scaling factor and a shared
expert): every other test has tiny models at random.
"""

from pathlib import Path

import numpy as np
import pytest

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.config import config_integer, read_config
from harness.contracts.plan import Array, CompressionPlan, LayerPlan, LowRank, NewExpert, Source
from harness.families.table import family_of
from harness.reference import model_path
from harness.speed.agreement import MAX_DIFFERENCE, compared, prompts
from tests.harness.backends.vllm_served import needs_vllm

pytestmark = [needs_vllm, pytest.mark.slow]


def plan_of(kind: str, source: Path) -> CompressionPlan:
    """Half of the experts of every layer: "constants" and "maps" in their place, their rows removed after a merge
    ("ream"), or their rows led to a sum with a down projection of its own ("refit")."""
    config = read_config(source)
    shape, hidden = family_of(config).shape(config), config_integer(config, "hidden_size")
    draw, half = np.random.default_rng(0), shape.num_experts // 2

    def array(*size: int) -> Array:
        return Array((draw.normal(size=size) * 0.1 / size[-1] ** 0.5).astype(np.float32))

    def merged(old: int) -> NewExpert:
        down = array(hidden, shape.width) if kind == "refit" else None
        return NewExpert((Source(old, 0.75), Source(old + 1, 0.25)), down=down)

    def layer(number: int) -> LayerPlan:
        evens = range(0, shape.num_experts, 2)
        if kind in ("ream", "refit"):
            route = [None if kind == "ream" and old % 2 else old // 2 for old in range(shape.num_experts)]
            return LayerPlan(number, tuple(map(merged, evens)), tuple(route))
        whole = [NewExpert((Source(old),)) for old in evens]
        stand = [
            NewExpert(constant=array(hidden))
            if kind == "constants"
            else NewExpert(low_rank=LowRank(array(hidden, 4), array(4, hidden), array(hidden)))
            for _ in range(half)
        ]
        return LayerPlan(number, (*whole, *stand), tuple(n // 2 + half * (n % 2) for n in range(shape.num_experts)))

    return CompressionPlan(tuple(map(layer, family_of(config).moe_layers(config))))


@pytest.mark.parametrize("kind", ["constants", "maps", "ream", "refit"])
@pytest.mark.parametrize("model", ["model", "model_deepseek"])
def test_the_same_texts(model: str, kind: str, tmp_path: Path) -> None:
    source = Path(model_path(model))
    apply_plan(source, plan_of(kind, source), tmp_path / kind)
    found = compared(tmp_path / kind, prompts(64), 64)
    print(f"{model}, {kind}: {found}")
    assert found.unexplained == 0 and found.identical >= 0.95
    assert found.difference < MAX_DIFFERENCE
