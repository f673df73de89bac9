"""``active=K``: fewer experts for a token to choose, after any plan."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from harness.cells import run as experiment
from harness.cells.cell import prepare
from harness.cells.dry_run import report
from harness.checkpoints.active import choose_fewer
from harness.checkpoints.load import load_model
from harness.errors import WinnowError
from harness.families.moe_block import moe_block
from harness.families.table import FAMILIES
from reports.numbers.load import load_panels
from tests.tiny import ALL_FAMILIES, save_tiny

CONF = str(Path(experiment.__file__).parents[2] / "conf")
FREE = [family for family in ALL_FAMILIES if not FAMILIES[family].fixed_top_k]


def configured(folder: Path, family: str, *more: str, top_k: int = 3):
    if not (folder / "model").exists():
        save_tiny(folder / "model", family, top_k=top_k)
        (folder / "corpus.jsonl").write_text(json.dumps({"text": "def add(a, b):\n    return a + b"}) + "\n")
    given = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none",
        f"output_dir={folder / 'out'}", "progress=false", "ratio=0.5", *more,
    ]  # fmt: skip
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=given)


def answers(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """What the first router of a checkpoint says of a text: logits, gate values and indices."""
    model, row, seen = load_model(folder, "float32", "cpu"), FAMILIES[family], []
    layer = row.moe_layers(model.config.to_dict())[0]
    moe_block(model, row, layer).router.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(torch.arange(24)[None], use_cache=False)
    return dict(zip(row.router_output, seen[0], strict=True))


@pytest.mark.parametrize("family", FREE)
def test_every_router_chooses_the_best_of_what_it_chose_before(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family, top_k=3)
    before = answers(tmp_path, family)
    choose_fewer(tmp_path, 2)
    after = answers(tmp_path, family)
    assert before["indices"].shape == (24, 3) and after["indices"].shape == after["gates"].shape == (24, 2)
    torch.testing.assert_close(after["logits"], before["logits"])
    for one, other in zip(before["indices"].tolist(), after["indices"].tolist(), strict=True):
        assert set(other) < set(one)


@pytest.mark.parametrize("method", ["reap", "hc_smoe", "coverage"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_the_checkpoint_computes_what_its_plan_does_with_fewer_experts(
    tmp_path: Path, family: str, method: str
) -> None:
    whole = experiment.run_cell(configured(tmp_path, family, f"method={method}"))
    fewer = experiment.run_cell(configured(tmp_path, family, f"method={method}", "active=2"))
    assert fewer.cell["active"] == "2-active" and "active" not in whole.cell
    assert fewer.cell["id"].startswith(f"model__{method}__0.5__local__s0__2-active-")
    first, second = (tmp_path / "out" / "cells" / record.cell["id"] for record in (whole, fewer))
    assert (first / "plan.json").read_text() == (second / "plan.json").read_text()
    configs = [json.loads((folder / "checkpoint" / "config.json").read_text()) for folder in (first, second)]
    assert configs[1] == configs[0] | {"num_experts_per_tok": 2}
    # By hand: the checkpoint of the whole top-k, its routers told to choose two.
    by_hand, small = (load_model(folder / "checkpoint", "float32", "cpu") for folder in (first, second))
    for layer in by_hand.model.layers:
        assert layer.mlp.gate.top_k == 3
        layer.mlp.gate.top_k = 2
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        found, wanted = small(tokens).logits, by_hand(tokens).logits
        assert not torch.allclose(found, load_model(first / "checkpoint", "float32", "cpu")(tokens).logits, atol=1e-4)
    torch.testing.assert_close(found, wanted)
    labels = {row.label for panel in load_panels(tmp_path / "out") for row in panel.rows}
    assert {method, f"{method} 2-active"} <= labels


def test_the_uncompressed_model_with_fewer_experts_is_a_row_of_its_own(tmp_path: Path) -> None:
    given = ("method=none", "ratio=0", "active=1")
    cell = prepare(configured(tmp_path, "olmoe", *given))
    assert not cell.is_baseline and cell.id != cell.baseline["id"]
    record = experiment.run_cell(configured(tmp_path, "olmoe", *given))
    assert not record.is_uncompressed() and record.stages() == ["1-active"]
    folder = tmp_path / "out" / "cells" / record.cell["id"] / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.model.layers[0].mlp.gate.top_k == 1
    assert report(configured(tmp_path, "olmoe", *given))[1] == ""


def test_null_is_no_part_of_an_id(tmp_path: Path) -> None:
    plain, null, two = (
        prepare(configured(tmp_path, "olmoe", "method=reap", *more)) for more in ((), ("active=null",), ("active=2",))
    )
    assert plain.id == null.id != two.id
    assert "active" not in plain.identity[0] and two.identity[0]["active"] == 2


@pytest.mark.parametrize("active", [3, 4])
def test_what_is_not_fewer_is_refused_before_anything_is_computed(tmp_path: Path, active: int) -> None:
    config = configured(tmp_path, "olmoe", "method=reap", f"active={active}")
    with pytest.raises(WinnowError, match=rf"active={active}: a token of this model chooses 3 experts; .* from 1 to 2"):
        prepare(config)
    assert "chooses 3 experts" in report(config)[1]


def test_routers_that_cannot_choose_fewer_are_named(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="the router of a phimoe model can choose 2 alone"):
        prepare(configured(tmp_path / "two", "phimoe", "active=1", top_k=2))
    with pytest.raises(WinnowError, match="lower_top_k=true does not go with a phimoe model"):
        prepare(configured(tmp_path / "two", "phimoe", "lower_top_k=true", top_k=2))
    with pytest.raises(WinnowError, match="chooses one expert, and cannot choose fewer"):
        prepare(configured(tmp_path / "one", "olmoe", "active=1", top_k=1))
    with pytest.raises(WinnowError, match="active=0: .*experts that a token chooses after any plan"):
        prepare(configured(tmp_path / "one", "olmoe", "active=0", top_k=1))


def test_a_plan_that_leaves_no_more_is_refused(tmp_path: Path) -> None:
    """With lower_top_k the plan may leave fewer experts than the model chose."""
    config = configured(tmp_path, "olmoe", "method=reap", "ratio=0.75", "lower_top_k=true", "active=2", top_k=3)
    with pytest.raises(WinnowError, match="active=2: a token of this model chooses 2 experts; .* from 1 to 1"):
        experiment.run_cell(config)
