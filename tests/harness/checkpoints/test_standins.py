"""Constants, low-rank maps and fitted down projections in checkpoints, against sums in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.config import read_config
from harness.checkpoints.experts import expert_weights_reader
from harness.checkpoints.footprint import anatomy_of_folder, compressed, outcome
from harness.checkpoints.load import load_model
from harness.checkpoints.quantize import Quantization, quantize_checkpoint
from harness.contracts.composition import compose
from harness.contracts.plan import Array, CompressionPlan, LayerPlan, LowRank, NewExpert, Source, prune
from harness.contracts.plan_files import load_plan, plan_files
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import family_of
from tests.tiny import save_tiny, tiny_model

KINDS = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
IDS = torch.arange(3, 39).view(2, 18)


def array(rng: np.random.Generator, *shape: int) -> Array:
    return Array((0.3 * rng.standard_normal(shape)).astype(np.float32))


def everything(folder: Path, seed: int = 0) -> CompressionPlan:
    """Of eight experts: two constants, a map, an expert with a map and its twin without, a fitted merge, two whole."""
    config = read_config(folder)
    family, rng = family_of(config), np.random.default_rng(seed)
    hidden, width, count = config["hidden_size"], family.width(config), family.num_experts(config)
    layers = []
    for layer in family.moe_layers(config):
        experts = [NewExpert((Source(j),)) for j in range(count)]
        experts[1] = NewExpert(constant=array(rng, hidden))
        experts[2] = NewExpert(low_rank=LowRank(array(rng, hidden, 3), array(rng, 3, hidden), array(rng, hidden)))
        experts[3] = NewExpert(constant=array(rng, hidden))
        experts[4] = NewExpert((Source(4),), low_rank=LowRank(array(rng, hidden, 2), array(rng, 2, hidden)))
        experts[5] = NewExpert((Source(5, 0.25), Source(6, 0.75)), down=array(rng, hidden, width))
        layers.append(LayerPlan(layer, tuple(experts), tuple(range(count))))
    return CompressionPlan(tuple(layers))


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CompressionPlan, Path]:
    """(model, plan, what the plan leaves of it)"""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "model", request.param)
    plan = everything(folder / "model")
    apply_plan(folder / "model", plan, folder / "out")
    return folder / "model", plan, folder / "out"


def alone(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """(H,) what one expert's own forward gives for x (H,), in float64."""
    rows = torch.full((1, 1), expert)
    return experts(x[None].to(next(experts.parameters()).dtype), rows, torch.ones(1, 1, dtype=x.dtype))[0].double()


def expected(
    folder: Path, plan: LayerPlan, experts: Any, hidden: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """(T, H): the sum over each token's rows of gate value times what the plan has there; experts by their own code."""
    family = family_of(read_config(folder))
    read = expert_weights_reader(folder, family)
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, x in enumerate(hidden):
        for row, gate in zip(rows[t].tolist(), gates[t].double().tolist(), strict=True):
            new = plan.experts[row]
            part = torch.zeros(len(x), dtype=torch.float64)
            if new.constant is not None:
                part = torch.from_numpy(new.constant.values).double()
            if new.low_rank is not None:
                low = new.low_rank
                left, right = (torch.from_numpy(one.values).double() for one in (low.left, low.right))
                part = part + left @ (right @ x.double())
                if low.shift is not None:
                    part = part + torch.from_numpy(low.shift.values).double()
            if new.down is not None:
                weights = [read(plan.layer, source.expert) for source in new.sources]
                shares = [source.weight for source in new.sources]
                gate_up = [
                    sum(s * getattr(w, name).astype(np.float64) for s, w in zip(shares, weights, strict=True))
                    for name in ("gate", "up")
                ]
                a, b = (torch.from_numpy(one) @ x.double() for one in gate_up)
                part = part + torch.from_numpy(new.down.values).double() @ (torch.nn.functional.silu(a) * b)
            elif new.sources:
                part = part + alone(experts, new.sources[0].expert, x)
            total[t] += gate * part
    return total


def through(model: Any, family: Any, layer: int) -> tuple[torch.Tensor, ...]:
    """What the experts of a layer are given, and what they give: hidden, rows, gates as the router has them, output."""
    experts, seen = moe_block(model, family, layer).experts, {}
    before = experts.register_forward_pre_hook(lambda module, args: seen.update(given=args), prepend=True)
    behind = experts.register_forward_hook(lambda module, args, output: seen.update(output=output.clone()))
    with torch.no_grad():
        model(IDS)
    before.remove()
    behind.remove()
    return *(one.clone() for one in seen["given"]), seen["output"]


def test_every_layer_gives_the_sum_of_what_its_rows_lead_to(made):
    folder, plan, out = made
    family = family_of(read_config(folder))
    original, small = load_model(folder), load_model(out)
    for layer in plan.layers:
        hidden, rows, gates, output = through(small, family, layer.layer)
        experts = moe_block(original, family, layer.layer).experts
        if family.model_type == "gpt_oss":  # whose experts have biases and an activation of their own
            keep = ~(rows == 5).any(1)
            hidden, rows, gates, output = hidden[keep], rows[keep], gates[keep], output[keep]
        with torch.no_grad():
            sums = expected(folder, layer, experts, hidden, rows, gates)
        assert len(sums) and (output.double() - sums).abs().max() < 2e-5 * (1 + sums.abs().max())
        used = {int(row) for row in rows.flatten()}
        assert {1, 2, 3, 4} & used  # else nothing was tested


def test_the_router_and_its_gate_values_stay(made):
    folder, plan, out = made
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    family = family_of(read_config(folder))
    names = [
        one.format(layer=layer.layer)
        for layer in plan.layers
        for one in (*family.router_tensors, *family.router_biases)
    ]
    for name in (name for name in names if name in before):
        assert torch.equal(before[name], after[name])


def test_one_layer_at_a_time_is_the_same(made):
    _, _, out = made
    whole, streamed, hidden = load_model(out), ModelByLayer(out), None
    for layer in streamed.layers(range(streamed.depth)):
        hidden = streamed.run(layer, hidden, {"input_ids": IDS})
    assert hidden is not None
    with streamed.head():
        logits = streamed.logits(hidden, {"input_ids": IDS})
    with torch.no_grad():
        assert torch.equal(logits, whole(IDS).logits)


def test_sizes_are_those_on_disk(made, tmp_path):
    folder, plan, _ = made
    sizes = apply_plan(folder, plan, tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    ours = {name: tensor for name, tensor in stored.items() if ".experts." in name}
    assert sizes["expert_bytes"] == sum(tensor.nbytes for tensor in ours.values()) < sizes["expert_bytes_before"]
    assert sizes["expert_parameters"] == sum(tensor.numel() for tensor in ours.values())
    assert sum(name.endswith(".constants") for name in ours) == len(plan.layers)


def test_the_plan_lies_beside_the_weights_where_no_engine_takes_it_for_weights(made):
    _, plan, out = made
    assert load_plan(out / "plan" / "plan.json") == plan
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]


def test_bf16(tmp_path):
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    apply_plan(tmp_path / "model", everything(tmp_path / "model"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    with torch.no_grad():
        assert load_model(tmp_path / "out")(IDS).logits.isfinite().all()


def test_integers_for_experts_and_what_stands_for_them_stays(tmp_path):
    save_tiny(tmp_path / "model", "qwen3_moe")
    apply_plan(tmp_path / "model", everything(tmp_path / "model"), tmp_path / "out")
    before = load_file(tmp_path / "out" / "model.safetensors")
    quantize_checkpoint(
        tmp_path / "out", tmp_path / "int8", Quantization("int8", bits=8, symmetric=True, group_size="row")
    )
    after = load_file(tmp_path / "int8" / "model.safetensors")
    assert load_plan(tmp_path / "int8" / "plan" / "plan.json") == everything(tmp_path / "model")
    ours = [name for name in before if name.endswith((".constants", ".left", ".right", ".shift"))]
    assert ours and all(torch.equal(before[name], after[name]) for name in ours)
    with torch.no_grad():
        exact, rounded = load_model(tmp_path / "out")(IDS).logits, load_model(tmp_path / "int8")(IDS).logits
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path):
    save_tiny(tmp_path / "model", "olmoe")
    plan = everything(tmp_path / "model")
    for path, content in plan_files(plan, tmp_path).items():
        path.write_bytes(content)
    assert load_plan(tmp_path / "plan.json") == plan
    named = json.loads((tmp_path / "plan.json").read_text())["layers"][0]["experts"]
    assert named[1]["constant"] == "layers.0.experts.1.constant" and named[5]["down"] == "layers.0.experts.5.down"
    assert named[2]["low_rank"] == {part: f"layers.0.experts.2.{part}" for part in ("left", "right", "shift")}
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(WinnowError, match=r"names layers\.0\.experts\.1\.constant, which is not in plan\.safetensors"):
        load_plan(tmp_path / "plan.json")


WRONG = [
    (NewExpert(constant=Array(np.zeros(5, np.float32))), r"its constant has shape \(5,\), not 32"),
    (NewExpert(constant=Array(np.full(32, np.nan, np.float32))), "its constant is not finite"),
    (NewExpert((Source(0),), constant=Array(np.zeros(32, np.float32))), "is a constant, and can have nothing else"),
    (NewExpert((Source(0),), down=Array(np.full((32, 16), np.inf, np.float32))), "its down projection is not finite"),
    (NewExpert((Source(0),), (1, 2), down=Array(np.zeros((32, 16), np.float32))), r"shape \(32, 16\), not 32 x 2"),
    (NewExpert((Source(0),), down=Array(np.zeros((32, 16), np.int64))), "is int64, not float32 or float64"),
    (
        NewExpert((), (1,), low_rank=LowRank(*(Array(np.zeros(s, np.float32)) for s in ((32, 2), (2, 32))))),
        "no channels",
    ),
    (
        NewExpert(low_rank=LowRank(*(Array(np.zeros(s, np.float32)) for s in ((32, 3), (2, 32))))),
        r"left factor has shape",
    ),
]


@pytest.mark.parametrize(("expert", "message"), WRONG)
def test_what_cannot_be_is_one_line_and_nothing_is_written(expert, message, tmp_path):
    save_tiny(tmp_path / "model", "olmoe")
    plans = [prune(layer, 8, range(8)) for layer in (0, 1)]
    plans[1] = LayerPlan(1, (expert, *plans[1].experts[1:]), plans[1].route)
    with pytest.raises(WinnowError, match=message) as error:
        apply_plan(tmp_path / "model", CompressionPlan(tuple(plans)), tmp_path / "out")
    assert "plan, layer 1, new expert 0" in str(error.value) and not (tmp_path / "out").exists()


def test_a_layer_needs_an_expert_and_the_expanded_layout_has_no_place(tmp_path):
    save_tiny(tmp_path / "model", "olmoe")
    nothing = LayerPlan(0, (NewExpert(constant=Array(np.zeros(32, np.float32))),) * 8, tuple(range(8)))
    plan = CompressionPlan((nothing, prune(1, 8, range(8))))
    with pytest.raises(WinnowError, match="layer 0: no expert is left, only what replaces experts"):
        apply_plan(tmp_path / "model", plan, tmp_path / "out")
    with pytest.raises(WinnowError, match="layout=expanded has no place for constants"):
        apply_plan(tmp_path / "model", everything(tmp_path / "model"), tmp_path / "out", "expanded")


BROKEN = [
    ({"constants": 3}, "config.json"),
    ({"constants": -1}, "are no numbers"),
    ({"low_rank": [{"rank": 0, "base": None, "shift": True}]}, "are no numbers"),
    ({"low_rank": [{"rank": 3, "base": 99, "shift": True}] * 2}, "does not fit its"),
    ({"low_rank": 3}, "does not describe"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_layout_is_named(change, message, tmp_path):
    save_tiny(tmp_path / "model", "olmoe")
    apply_plan(tmp_path / "model", everything(tmp_path / "model"), tmp_path / "out")
    config = read_config(tmp_path / "out")
    config["winnow"]["layers"]["0"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WinnowError, match=message):
        load_model(tmp_path / "out")


@pytest.mark.parametrize("part", ["experts.constants", "experts.low_rank.0.left", "experts.low_rank.0.shift"])
def test_no_constant_is_ever_left_out(part, tmp_path):
    save_tiny(tmp_path / "model", "olmoe")
    apply_plan(tmp_path / "model", everything(tmp_path / "model"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    del stored[f"model.layers.0.mlp.{part}"]
    save_file(stored, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WinnowError, match=part.replace(".", r"\.")):
        load_model(tmp_path / "out")


# --- compositions -----------------------------------------------------------------------------------------------------


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=torch.float64)(IDS).logits


def test_a_fitted_plan_and_then_another(tmp_path):
    """Of a fitted merge, cut channels and another merge: one plan, or one checkpoint after the other."""
    tiny_model("olmoe").to(torch.float64).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(1)

    def fitted(layer: int) -> LayerPlan:
        pairs = [NewExpert((Source(j, 0.5), Source(j + 1, 0.5)), down=array(rng, 32, 16)) for j in (0, 2, 4, 6)]
        return LayerPlan(layer, tuple(pairs), (0, 0, 1, 1, 2, 2, 3, 3))

    first = CompressionPlan((fitted(0), fitted(1)))
    cut = NewExpert((Source(0),), (1, 3, 8))
    whole = NewExpert((Source(2),)), NewExpert((Source(3),))
    seconds = {
        "pruned": lambda layer: prune(layer, 4, (0, 1, 3)),
        "cut": lambda layer: LayerPlan(layer, (replace_channels(j) for j in range(4)), tuple(range(4))),
        "merged": lambda layer: LayerPlan(
            layer,
            (NewExpert((Source(0, 0.25), Source(1, 0.75, tuple(range(15, -1, -1))))), *whole),
            (0, 0, 1, 2),
        ),
    }  # fmt: skip

    def replace_channels(j: int) -> NewExpert:
        return NewExpert((Source(j),), cut.channels)

    for name, make in seconds.items():
        layers = [make(layer) for layer in (0, 1)]
        second = CompressionPlan(tuple(LayerPlan(one.layer, tuple(one.experts), one.route) for one in layers))
        both = compose(first, second)
        apply_plan(tmp_path / "model", both, tmp_path / name, lower_top_k=True)
        reference = by_hand(tmp_path / "model", first, second, tmp_path / f"{name}-by-hand")
        # A plan's arrays are float32.
        assert torch.allclose(logits(tmp_path / name), reference, rtol=0, atol=1e-5), name


def by_hand(model: Path, first: CompressionPlan, second: CompressionPlan, folder: Path) -> torch.Tensor:
    """``first`` as a checkpoint of its own with as many experts, routers led there, then the sums of ``second``."""
    read = expert_weights_reader(model, family_of(read_config(model)))
    layers = []
    for one, other in zip(first.layers, second.layers, strict=True):
        experts = []
        for new in other.experts:
            parts = []
            for share in new.sources:
                old = one.experts[share.expert]
                assert old.down is not None
                mixed = [
                    sum(s.weight * getattr(read(one.layer, s.expert), name).astype(np.float64) for s in old.sources)
                    for name in ("gate", "up")
                ]
                order = list(range(16)) if share.permutation is None else list(share.permutation)
                parts.append((share.weight, mixed[0][order], mixed[1][order], old.down.values[:, order]))
            kept = list(range(16)) if new.channels is None else list(new.channels)
            experts.append(
                (
                    sum(w * g[kept] for w, g, _, _ in parts),
                    sum(w * u[kept] for w, _, u, _ in parts),
                    sum(w * d[:, kept].astype(np.float64) for w, _, _, d in parts),
                )
            )
        layers.append((experts, [None if j is None else other.route[j] for j in one.route]))
    whole = load_model(model, dtype=torch.float64)
    family = family_of(read_config(model))
    for layer, (experts, route) in zip(first.layers, layers, strict=True):
        block = moe_block(whole, family, layer.layer)
        kept_rows = [row for row, new in enumerate(route) if new is not None]
        block.experts.forward = _forward(experts, [route[row] for row in kept_rows])
        block.router.weight = torch.nn.Parameter(block.router.weight[kept_rows])
        block.router.num_experts = len(kept_rows)
    with torch.no_grad():
        return whole(IDS).logits


def _forward(experts: list[Any], route: list[Any]) -> Any:
    def forward(hidden: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for row, gate in zip(rows[t].tolist(), gates[t].tolist(), strict=True):
                g, u, d = (torch.from_numpy(np.ascontiguousarray(one)).double() for one in experts[route[row]])
                total[t] += gate * (d @ (torch.nn.functional.silu(g @ hidden[t]) * (u @ hidden[t])))
        return total

    return forward


def test_constants_stay_or_go_and_are_not_merged():
    rng = np.random.default_rng(2)
    constant, low = array(rng, 32), LowRank(array(rng, 32, 2), array(rng, 2, 32))
    first = CompressionPlan(
        (LayerPlan(0, (NewExpert((Source(0),)), NewExpert(constant=constant), NewExpert(low_rank=low)), (0, 1, 2)),)
    )
    cut = LayerPlan(0, (NewExpert((Source(0),), (1, 2)), NewExpert((Source(1),)), NewExpert((Source(2),))), (0, 1, 2))
    kept = compose(first, CompressionPlan((cut,))).layers[0]
    assert kept.experts == (NewExpert((Source(0),), (1, 2)), NewExpert(constant=constant), NewExpert(low_rank=low))
    gone = compose(first, CompressionPlan((prune(0, 3, (0, 2)),))).layers[0]
    assert gone.experts == (NewExpert((Source(0),)), NewExpert(low_rank=low)) and gone.route == (0, None, 1)
    for wrong in (
        NewExpert((Source(0, 0.5), Source(1, 0.5))),
        NewExpert((Source(1),), (0,)),
        NewExpert((Source(2, 0.5),)),
    ):
        left = [j for j in range(3) if j not in {source.expert for source in wrong.sources}]
        others = tuple(NewExpert((Source(j),)) for j in left)
        route = tuple(0 if j not in left else 1 + left.index(j) for j in range(3))
        with pytest.raises(WinnowError, match="which a second method cannot merge, cut or fit again"):
            compose(first, CompressionPlan((LayerPlan(0, (wrong, *others), route),)))


# --- dry run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("name", ["mone", "tilted"])
def test_the_dry_run_counts_what_is_written(kind, name, tmp_path):
    from hydra import compose as composed
    from hydra import initialize_config_module
    from hydra.utils import instantiate

    save_tiny(tmp_path / "model", kind)
    with initialize_config_module("conf", version_base="1.3"):
        method = instantiate(composed("config", [f"method={name}"]).method)
    model = anatomy_of_folder(tmp_path / "model", read_config(tmp_path / "model"))
    kept = outcome(method, method.check(model.family.shape(model.config), "1/2"), model)
    assert kept.standins == 4 and len(kept.widths) == 4 and kept.rows == 8 and (kept.rank > 0) == (name == "tilted")
    rng, hidden = np.random.default_rng(0), model.config["hidden_size"]

    def standin() -> NewExpert:
        if not kept.rank:
            return NewExpert(constant=array(rng, hidden))
        factors = array(rng, hidden, kept.rank), array(rng, kept.rank, hidden), array(rng, hidden)
        return NewExpert(low_rank=LowRank(*factors))

    layers = [
        LayerPlan(layer, tuple(NewExpert((Source(j),)) if j % 2 else standin() for j in range(8)), tuple(range(8)))
        for layer in model.family.moe_layers(model.config)
    ]
    written = apply_plan(tmp_path / "model", CompressionPlan(tuple(layers)), tmp_path / "out")
    foreseen, stored = compressed(model, kept), load_file(tmp_path / "out" / "model.safetensors")
    assert foreseen.headers.parameters == written["parameters"]
    assert foreseen.headers.total_bytes == sum(tensor.nbytes for tensor in stored.values())
