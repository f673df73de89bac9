"""layout=vllm_constants: the format of vLLM's main branch, and that it computes what layout=compact computes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.config import read_config
from harness.checkpoints.footprint import Kept, anatomy_of_folder, compressed
from harness.checkpoints.load import load_model
from harness.checkpoints.quantize import Quantization, quantize_checkpoint
from harness.contracts.plan import Array, CompressionPlan, NewExpert, Source
from harness.errors import WinnowError
from tests.harness.checkpoints.compressed import constants_plan, identity_plan, merged, pruned, standins_plan, tokens
from tests.tiny import save_tiny

PATHS = {"olmoe": "mlp.experts", "mixtral": "block_sparse_moe.experts", "deepseek_v3": "mlp.experts"}


@pytest.fixture(scope="module", params=sorted(PATHS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, CompressionPlan]:
    """(family, folder with model, vllm and compact, plan)"""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "model", family)
    plan, first = constants_plan(32), 1 if family == "deepseek_v3" else 0
    plan = CompressionPlan(tuple(replace(layer, layer=layer.layer + first) for layer in plan.layers))
    assert apply_plan(folder / "model", plan, folder / "vllm", "vllm_constants")["layout"] == "vllm_constants"
    assert apply_plan(folder / "model", plan, folder / "compact")["layout"] == "compact"
    return family, folder, plan


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_format(made: tuple[str, Path, CompressionPlan]) -> None:
    family, folder, plan = made
    before, after = tensors(folder / "model"), tensors(folder / "vllm")
    gone = {f"{layer.layer}": [j for j, new in enumerate(layer.experts) if new.constant] for layer in plan.layers}
    told = json.loads((folder / "vllm" / "config.json").read_text())
    assert told == json.loads((folder / "model" / "config.json").read_text()) | {"approximate_experts": gone}
    expected = dict(before)
    for layer in plan.layers:
        for old, new in enumerate(layer.experts):
            prefix = f"model.layers.{layer.layer}.{PATHS[family]}.{old}."
            if new.constant is not None:
                assert [expected.pop(name) is not None for name in list(expected) if name.startswith(prefix)] == [
                    True
                ] * 3
                expected[f"{prefix}approx_value"] = torch.from_numpy(new.constant.values)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) and after[name].shape == expected[name].shape for name in after)


def test_it_computes_what_a_compact_one_does(made: tuple[str, Path, CompressionPlan]) -> None:
    _, folder, _ = made
    with torch.no_grad():
        ours, theirs, before = (
            load_model(folder / name, "float64")(tokens(), use_cache=False).logits
            for name in ("vllm", "compact", "model")
        )
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, before, atol=1e-2)
    by_layer = ModelByLayer(folder / "vllm", "float64")
    hidden, inputs = None, {"input_ids": tokens()}
    with torch.no_grad():
        for layer in by_layer.layers(range(by_layer.depth)):
            hidden = by_layer.run(layer, hidden, inputs)
        with by_layer.head():
            assert hidden is not None
            assert torch.allclose(by_layer.logits(hidden, inputs), ours, atol=1e-10)


def test_sizes(made: tuple[str, Path, CompressionPlan]) -> None:
    family, folder, _ = made
    model = anatomy_of_folder(folder / "model", read_config(folder / "model"))
    told = compressed(model, Kept((16,) * 6, 8, standins=2), "vllm_constants")
    plan = CompressionPlan(
        tuple(
            replace(
                layer,
                experts=tuple(
                    NewExpert(constant=Array(np.ones(32, np.float32))) if old > 5 else NewExpert((Source(old),))
                    for old in range(8)
                ),
            )
            for layer in made[2].layers
        )
    )
    sizes = apply_plan(folder / "model", plan, folder / "two", "vllm_constants")
    assert told.config == read_config(folder / "two")
    assert {name: tuple(tensor.shape) for name, tensor in tensors(folder / "two").items()} == told.headers.shapes
    expert = 3 * 16 * 32
    assert sizes["expert_parameters"] == 2 * (6 * expert + 2 * 32)
    assert sizes["expert_bytes"] == 4 * sizes["expert_parameters"]


def test_dtype(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "olmoe")
    model.bfloat16().save_pretrained(tmp_path / "model")
    apply_plan(tmp_path / "model", constants_plan(32), tmp_path / "out", "vllm_constants")
    found = tensors(tmp_path / "out")["model.layers.0.mlp.experts.4.approx_value"]
    assert found.dtype == torch.bfloat16 and found.shape == (32,)


@pytest.mark.parametrize(
    "plan",
    [
        pruned([0, 1, 2], [0, 1, 2, 3]),
        merged([[0, 1, 2, 3, 4, 5], [6, 7]], [[0, 1], [2, 3, 4, 5, 6, 7]]),
        standins_plan(32),
        CompressionPlan(
            (
                replace(constants_plan(32).layers[0], route=(2, 1, 0, *range(3, 8))),
                constants_plan(32).layers[1],
            )
        ),
    ],
)  # fmt: skip
def test_other_plans_are_refused(plan: CompressionPlan, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    with pytest.raises(WinnowError, match="layer [01]: layout=vllm_constants takes whole experts and constants"):
        apply_plan(tmp_path / "model", plan, tmp_path / "out", "vllm_constants")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kept", [Kept((16,) * 4, 4), Kept((16,) * 4, 8), Kept((8,) * 8, 8), Kept((16,) * 6, 8, 2, rank=2)]
)
def test_the_dry_run_refuses_them_too(kept: Kept, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    model = anatomy_of_folder(tmp_path / "model", read_config(tmp_path / "model"))
    with pytest.raises(WinnowError, match="^layout=vllm_constants takes whole experts and constants"):
        compressed(model, kept, "vllm_constants")


def test_nothing_pruned_is_plain_and_stacked_experts_have_no_place(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    assert apply_plan(tmp_path / "model", identity_plan(), tmp_path / "same", "vllm_constants")["layout"] == "plain"
    save_tiny(tmp_path / "stacked", "gpt_oss")
    with pytest.raises(WinnowError, match="name every expert's matrices"):
        apply_plan(tmp_path / "stacked", constants_plan(32), tmp_path / "out", "vllm_constants")


def test_quantised_experts_have_no_place(made: tuple[str, Path, CompressionPlan]) -> None:
    _, folder, _ = made
    with pytest.raises(WinnowError, match="quantize=int8: vLLM takes no quantised experts beside constants"):
        quantize_checkpoint(folder / "vllm", folder / "packed", Quantization("int8", 8))


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ({"0": [1, 1]}, "of layer 0 must list some of its 8 experts, each once"),
        ({"0": [8]}, "of layer 0 must list"),
        ({"1": list(range(8))}, "of layer 1 must list"),
        ({"0": "1"}, "of layer 0 must list"),
        ({"2": [1]}, "must name MoE layers"),
        ([[1], [2]], "must name MoE layers"),
        ({"0": [1, 4], "1": [0, 7]}, "does not account for|has no tensor|experts.6"),
        ({"0": [1, 4, 6], "1": [0, 2, 7]}, "experts.2"),
    ],
)
def test_a_broken_config(told: Any, wrong: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    apply_plan(tmp_path / "model", constants_plan(32), tmp_path / "out", "vllm_constants")
    config = read_config(tmp_path / "out") | {"approximate_experts": told}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WinnowError, match=wrong):
        load_model(tmp_path / "out")


def test_a_missing_value(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "olmoe")
    apply_plan(tmp_path / "model", constants_plan(32), tmp_path / "out", "vllm_constants")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    held = load_file(path)
    del held["model.layers.0.mlp.experts.4.approx_value"]
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(WinnowError, match=r"experts\.4\.approx_value"):
        load_model(tmp_path / "out")
