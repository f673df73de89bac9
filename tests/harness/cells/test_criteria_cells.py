"""Cells of criteria, budgets and partial preservation: their ids and versions, and what the checkpoint computes."""

import json
import platform
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from harness import cli  # noqa: F401  (it registers what conf/model/reference.yaml asks for)
from harness.cells import run as experiment
from harness.cells.cell import Cell, prepare
from harness.cells.dry_run import report
from harness.contracts.plan_files import load_plan
from harness.records.identity import without
from harness.records.store import RecordStore
from tests.brute_force import SIGMOID, weights_of
from tests.harness.checkpoints.compressed import brute_force_logits, logits
from tests.tiny import ALL_FAMILIES, FAMILY_NAMES, save_tiny

CONF = str(Path(experiment.__file__).parents[2] / "conf")
RESULTS = Path(__file__).parents[3] / "results" / "reference"


def configured(folder: Path, family: str, *more: str):
    if not (folder / "model").exists():
        save_tiny(folder / "model", family)
        (folder / "corpus.jsonl").write_text(json.dumps({"text": "def add(a, b):\n    return a + b"}) + "\n")
    given = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none",
        f"output_dir={folder / 'out'}", "progress=false", "ratio=0.5", *more,
    ]  # fmt: skip
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=given)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_of_sigmoid_routers_have_a_version_of_their_own(tmp_path: Path, family: str) -> None:
    versions = {
        name: prepare(configured(tmp_path, family, f"method={name}")).method_version
        for name in ("soft_count", "importance_product", "reap", "frequency")
    }
    changed = "1 (sigmoid scores)" if family in SIGMOID else "1"
    assert versions == {"soft_count": changed, "importance_product": changed, "reap": "1", "frequency": "1"}


def test_the_record_says_the_version_and_a_run_under_the_old_one_is_another_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = experiment.run_cell(configured(tmp_path, "deepseek_v3", "method=soft_count"))
    assert record.method_version == "1 (sigmoid scores)"
    monkeypatch.setattr("harness.cells.cell.method_version", lambda method, family: method.version)
    assert prepare(configured(tmp_path, "deepseek_v3", "method=soft_count")).id != record.cell["id"]


@pytest.mark.parametrize("method", ["soft_count", "importance_product", "reap", "hc_smoe"])
def test_committed_cells_are_found_by_the_configuration_of_today(method: str) -> None:
    """Of the reference MoE: with and without ``allocation=uniform``, under the versions that they were made with."""
    store = RecordStore(RESULTS)
    record = store.read(next(name for name in store.ids() if name.startswith(f"reference__{method}__0.25__code__")))
    given = ["+experiment=reference", f"method={method}", "ratio=0.25", "calibration=code", "seed=0"]

    def cell(*more: str) -> Cell:
        with initialize_config_dir(CONF, version_base="1.3"):
            return prepare(compose("config", overrides=[*given, *more]))

    now = cell()
    assert cell("allocation=uniform").id == now.id
    assert now.method_version == record.method_version
    assert now.identity[0]["method"] == without(record.config["method"], ())
    if record.versions["python"] == platform.python_version():  # text of Python's own library changes with it
        assert now.id == record.cell["id"]
    if method != "hc_smoe":
        assert cell("allocation=global").id != now.id


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_list_of_budgets_reaches_the_checkpoint_and_the_dry_run(tmp_path: Path, family: str) -> None:
    given = ("method=router_norm", "allocation=list", "method.experts=[5,3]")
    record = experiment.run_cell(configured(tmp_path, family, *given))
    folder = tmp_path / "out" / "cells" / record.cell["id"]
    plan = load_plan(folder / "plan.json")
    assert [len(layer.experts) for layer in plan.layers] == [5, 3]
    why = json.loads((folder / "saliency.json").read_text())
    assert why["largest_goes"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for layer in plan.layers:
        norms = next(p for n, p in model.named_parameters() if f"layers.{layer.layer}.mlp.gate.weight" in n).norm(dim=1)
        assert why["layers"][str(layer.layer)] == pytest.approx(norms.tolist(), rel=1e-5)
        kept = [new.sources[0].expert for new in layer.experts]
        assert kept == sorted(norms.argsort()[: len(kept)].tolist())
    text, refusal = report(configured(tmp_path, family, *given))
    (row,) = (line.split() for line in text.splitlines() if line.startswith("0.5 "))
    assert refusal == "" and row[1:3] == ["4", "4"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("similarity", ["router_logits", "router_rows", "weights"])
def test_partial_leaves_an_ordinary_checkpoint_of_whole_and_averaged_experts(
    tmp_path: Path, family: str, similarity: str
) -> None:
    record = experiment.run_cell(configured(tmp_path, family, "method=partial", f"method.similarity={similarity}"))
    folder = tmp_path / "out" / "cells" / record.cell["id"]
    plan = load_plan(folder / "plan.json")
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert "winnow" not in config and 4 in (config.get("num_local_experts"), config.get("num_experts"))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    for layer in plan.layers:
        assert sorted(len(new.sources) > 1 for new in layer.experts)[:2] == [False, False]  # two are whole
        for place, new in enumerate(layer.experts):
            found = weights_of(after, layer.layer, place)
            for name in ("gate", "up", "down"):
                wanted = sum(s.weight * getattr(weights_of(before, layer.layer, s.expert), name) for s in new.sources)
                torch.testing.assert_close(torch.tensor(getattr(found, name)), torch.tensor(wanted))
    torch.testing.assert_close(logits(after).double(), brute_force_logits(before, plan), rtol=1e-4, atol=1e-4)
