"""Cells that leave fewer experts than the model chooses a token."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.cells import run as experiment
from harness.cells.cell import model_name, prepare
from harness.cells.dry_run import report
from harness.errors import WinnowError
from harness.reference import MODEL_FOLDER
from tests.tiny import save_tiny

CONF = str(Path(experiment.__file__).parents[2] / "conf")


def configured(folder: Path, family: str, *more: str, top_k: int = 8):
    if not (folder / "model").exists():
        save_tiny(folder / "model", family)
        config = json.loads((folder / "model" / "config.json").read_text())
        (folder / "model" / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))
        (folder / "corpus.jsonl").write_text(json.dumps({"text": "def add(a, b):\n    return a + b"}) + "\n")
    given = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none",
        f"output_dir={folder / 'out'}", "progress=false", "ratio=0.25", *more,
    ]  # fmt: skip
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=given)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_top_k_is_lowered_to_what_is_left(tmp_path: Path, family: str) -> None:
    record = experiment.run_cell(configured(tmp_path, family, "method=reap"))  # all 8 are chosen: it need not be said
    folder = tmp_path / "out" / "cells" / record.cell["id"] / "checkpoint"
    assert json.loads((folder / "config.json").read_text())["num_experts_per_tok"] == 6
    plan = json.loads((folder / "plan.json").read_text())
    kept = {
        layer["layer"]: [row for row, new in enumerate(layer["route"]) if new is not None] for layer in plan["layers"]
    }
    # The original, with all router rows of the others silent and all that is left chosen.
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, layer in enumerate(whole.model.layers):
        router = layer.mlp.gate
        router.weight.data = router.weight.data[kept[number]]
        for name in ("num_experts", "top_k"):
            setattr(router, name, 6)
        experts = layer.mlp.experts
        experts.num_experts = 6
        experts.gate_up_proj.data = experts.gate_up_proj.data[kept[number]]
        experts.down_proj.data = experts.down_proj.data[kept[number]]
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, whole(tokens).logits)


def test_a_model_that_chooses_some_experts_lowers_top_k_where_it_is_told_to(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="leaves 6 of 8 experts, fewer than top-k = 7.*lower_top_k=true"):
        prepare(configured(tmp_path, "olmoe", "method=reap", top_k=7))
    cell = prepare(configured(tmp_path, "olmoe", "method=reap", "lower_top_k=true"))
    assert cell.lower_top_k and cell.shape.top_k == 1


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_a_dry_run_knows_the_sizes(tmp_path: Path, family: str) -> None:
    text, refusal = report(configured(tmp_path, family, "method=reap"))
    record = experiment.run_cell(configured(tmp_path, family, "method=reap"))
    folder = tmp_path / "out" / "cells" / record.cell["id"] / "checkpoint"
    tensors = load_file(folder / "model.safetensors")
    (row,) = (line.split() for line in text.splitlines() if line.startswith("0.25 "))
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert refusal == "" and row[1:3] == ["6", "6"] and f"{written:,}" in row
    _, refusal = report(configured(tmp_path / "other", family, "method=reap", top_k=7))
    assert "lower_top_k=true" in refusal
    assert report(configured(tmp_path / "other", family, "method=reap", "lower_top_k=true"))[1] == ""


def test_merging_keeps_top_k_and_all_rows(tmp_path: Path) -> None:
    record = experiment.run_cell(configured(tmp_path, "olmoe", "method=hc_smoe"))
    folder = tmp_path / "out" / "cells" / record.cell["id"] / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_experts_per_tok"] == 8
    assert {layer["experts"] for layer in config["winnow"]["layers"].values()} == {6}


def test_what_cannot_be_lowered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="does not go with method=naee"):
        prepare(configured(tmp_path, "olmoe", "method=naee", "lower_top_k=true"))


def test_another_folder_is_not_called_reference() -> None:
    def named(name: str | None, path: str | Path) -> str:
        return model_name(OmegaConf.create({"name": name, "path": str(path)}))

    assert named("reference", MODEL_FOLDER) == "reference" and named("reference", "some/smollm2-moe") == "smollm2-moe"
    assert named(None, "some/smollm2-moe") == "smollm2-moe" and named("qwen3-30b-a3b", "Qwen/X") == "qwen3-30b-a3b"
