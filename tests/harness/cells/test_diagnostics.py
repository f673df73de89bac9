"""Cells of the diagnostics suite from end to end: drift against the uncompressed model, and models that are broken."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness import cli
from harness.cells import evaluate as evaluation
from harness.records.store import RecordStore
from harness.sweeps import plugin
from tests.harness.test_cli import _logging_as_before  # noqa: F401
from tests.in_process import everything_here
from tests.tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "olmoe")
    return tmp_path / "model"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folders of the models that were opened; two at once are an error."""
    everything_here(monkeypatch)
    folders: list[str] = []
    is_open = [False]
    really_open = evaluation._open

    def only_one(config: dict[str, Any], checkpoint: Path) -> Any:
        assert not is_open[0]
        folders.append(checkpoint.name)
        backend, is_open[0] = really_open(config, checkpoint), True
        close = backend.close
        monkeypatch.setattr(backend, "close", lambda: (close(), is_open.__setitem__(0, False)))
        return backend

    monkeypatch.setattr(evaluation, "_open", only_one)
    yield folders
    assert not is_open[0]


def winnow(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["winnow", *arguments, "progress=false"])
    plugin.failed.clear()
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def diagnose(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=local", f"model.path={model}", "suite=diagnostics", "suite.items=2", "suite.tasks.drift.positions=8",
        "+suite.tasks.math.max_new_tokens=12", "+suite.tasks.writing.max_new_tokens=12", "backend=hf",
        "~suite.tasks.code", "~suite.tasks.multiple_choice", f"output_dir={out}", *more,
    ]  # fmt: skip


def test_drift_of_an_unchanged_model_is_exactly_nothing_and_of_a_pruned_one_is_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    out = tmp_path / "out"
    assert winnow(monkeypatch, "-m", *diagnose(model, out, "method=random", "ratio=0,0.5")) == 0
    assert opened == ["model", "checkpoint", "model", "checkpoint", "model"]
    (baseline,) = (json.loads(path.read_text()) for path in (out / "baseline").glob("*.json"))
    cells = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    unchanged, pruned = sorted(cells, key=lambda record: record["cell"]["ratio"])
    for record, is_same in ((baseline, True), (unchanged, True), (pruned, False)):
        scores = {(s["metric"], s["part"]): s["value"] for s in record["scores"] if s["task"] == "drift"}
        for name in ("js", "kl_from_baseline", "kl_to_baseline", "tv", "free_js"):
            values = [value for (metric, _), value in scores.items() if metric == name]
            assert len(values) >= 2 and (set(values) == {0.0} if is_same else min(values) > 0)
        assert (scores["esap", ""] == 1.0) == is_same
        assert scores["cross_perplexity", ""] > 1
        assert "compare_drift" in record["timings"] and not record["broken"]
        assert {score["task"] for score in record["scores"]} >= {"generation", "diversity"}
    assert "load_baseline" not in baseline["timings"] and "load_baseline" in pruned["timings"]
    texts = RecordStore(out, "baseline").read_samples(baseline["cell"]["id"])
    assert texts is not None
    assert all(sample.prompt for sample in texts if sample.task in ("math", "writing"))
    assert {sample.domain for sample in texts if sample.task == "drift"} <= {"math", "writing"}


def test_a_broken_model_has_a_record_that_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    assert winnow(monkeypatch, *diagnose(model, out, "method=none", "ratio=0")) == 0
    (record,) = (json.loads(path.read_text()) for path in (out / "baseline").glob("*.json"))
    assert "not finite" in record["broken"]["perplexity"]
    measured = {score["task"] for score in record["scores"]}
    assert "perplexity" not in measured and measured >= {"math", "writing", "generation"}
    assert "broken" in capfd.readouterr().out
