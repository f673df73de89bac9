"""Cells of a method that decides layer by layer: from the configuration to checkpoint and record."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.cells import run as experiment
from harness.cells.cell import prepare
from harness.cells.dry_run import report
from harness.cells.run import run_shard
from harness.contracts.plan_files import load_plan
from harness.errors import WinnowError
from tests.brute_force import moe_blocks
from tests.harness.cells.test_criteria_cells import configured
from tests.in_process import everything_here
from tests.tiny import ALL_FAMILIES

TOKENS = len("def add(a, b):\n    return a + b")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_ream_leaves_an_ordinary_smaller_checkpoint(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_here(monkeypatch)
    record = experiment.run_cell(configured(tmp_path, family, "method=ream", "method.group_size=3"))
    folder = tmp_path / "out" / "cells" / record.cell["id"]
    why = json.loads((folder / "saliency.json").read_text())
    assert record.all_tokens == why["all_tokens"] == TOKENS
    assert record.cell["calibration"] == "local"
    assert record.timings["calibration"] > 0
    assert {len(counts) for counts in record.expert_usage["local"].values()} == {8}
    plan = load_plan(folder / "plan.json")
    for layer in plan.layers:
        assert len(layer.experts) == 4
        assert [label is None for label in layer.route].count(False) == 4
        assert sorted(why["groups"][str(layer.layer)]) == sorted(
            place for place, new in enumerate(layer.experts) for _ in new.sources
        )
        assert len(why["layers"][str(layer.layer)]) == 8
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert {block.experts.num_experts for block in moe_blocks(model).values()} == {4}
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20).unsqueeze(0)).logits).all()


def test_a_sample_is_part_of_what_the_cell_is_and_of_no_other_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_here(monkeypatch)
    ids = {
        method: [prepare(configured(tmp_path, "olmoe", f"method={method}", *more)).id for more in ((), SAMPLE)]
        for method in ("ream", "reap", "hc_smoe")
    }
    assert ids["ream"][0] != ids["ream"][1]
    assert ids["reap"][0] == ids["reap"][1]
    assert ids["hc_smoe"][0] == ids["hc_smoe"][1]
    record = experiment.run_cell(configured(tmp_path, "olmoe", "method=ream", *SAMPLE))
    assert record.all_tokens == 7
    assert record.cell["id"] == ids["ream"][1]


SAMPLE = ("calibration.all_tokens=7",)


def test_streamed_or_whole_it_is_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_here(monkeypatch)
    plans = []
    for stream in ("never", "always"):
        config = configured(tmp_path, "qwen3_moe", "method=ream", f"calibration.stream={stream}")
        config.output_dir = str(tmp_path / stream)
        record = experiment.run_cell(config)
        plans.append(load_plan(tmp_path / stream / "cells" / record.cell["id"] / "plan.json"))
    assert plans[0] == plans[1]


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for more, match in (
        (("method.group_size=1",), "group_size=1 is too small: ratio 0.5 leaves 4 groups, which hold 4 of 8 experts"),
        (("schedule=iterative",), "method 'ream' needs schedule=one_shot"),
        (("calibration.all_tokens=0",), "all_tokens"),
    ):
        with pytest.raises(WinnowError, match=match):
            prepare(configured(tmp_path, "olmoe", "method=ream", *more))
    with pytest.raises(WinnowError, match="method=ream reads no statistics: calibration.shard is for those that do"):
        run_shard(configured(tmp_path, "olmoe", "method=ream", "calibration.shards=2", "calibration.shard=0"))


def test_the_dry_run_counts_the_pass(tmp_path: Path) -> None:
    text, refusal = report(configured(tmp_path, "olmoe", "method=ream", "calibration.all_tokens=64"))
    assert not refusal
    (line,) = [line for line in text.splitlines() if line.startswith("layer by layer  ") and "two passes" in line]
    assert "a layer's inputs of 64 tokens (160 bytes each)" in line
    assert ["0.5", "4", "4", "16"] in [line.split()[:4] for line in text.splitlines()]
