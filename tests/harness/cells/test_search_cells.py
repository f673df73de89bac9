"""Cells whose budget is searched: from the configuration to the record, stopped in the middle, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from harness.calibration import streamed
from harness.calibration.overlap import Comparison
from harness.cells import compress as compressing
from harness.cells import run as experiment
from harness.cells.cell import prepare
from harness.cells.dry_run import report
from harness.contracts.plan_files import load_plan
from harness.contracts.record import Record
from harness.errors import WinnowError
from harness.records.store import RecordStore
from tests.harness.calibration.test_overlap import by_hand
from tests.harness.cells.test_criteria_cells import configured
from tests.in_process import everything_here
from tests.tiny import FAMILY_NAMES, save_tiny

SEARCHED = ("allocation=evoesap", "method.search.generations=2")
TEXTS = [
    "def add(a, b):\n    return a + b",
    "for i in range(9):\n    print(i)",
    "It was a bright cold day.",
    "1 + 1 = 2",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "olmoe")
    return with_text(tmp_path)


def with_text(folder: Path) -> Path:
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def left_by(folder: Path, record: Record, out: str = "out") -> tuple[dict[str, Any], dict[int, list[int]]]:
    """saliency.json, and who stays in each layer."""
    cell = folder / out / "cells" / record.cell["id"]
    plan = load_plan(cell / "plan.json")
    kept = {layer.layer: [new.sources[0].expert for new in layer.experts] for layer in plan.layers}
    return json.loads((cell / "saliency.json").read_text()), kept


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_search_decides_and_says_what_it_found(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_here(monkeypatch)
    save_tiny(tmp_path / "model", family)
    config = configured(with_text(tmp_path), family, "method=reap", *SEARCHED, "method.search.samples=3")
    config.calibration.batch_size = 2
    with caplog.at_level(logging.INFO):
        record = experiment.run_cell(config)
    why, kept = left_by(tmp_path, record)
    assert {key: why[key] for key in record.search} == record.search
    assert record.search["counts"] == {str(layer): len(experts) for layer, experts in kept.items()}
    assert sum(record.search["counts"].values()) == 2 * 4
    scores = {int(layer): values for layer, values in why["layers"].items()}
    for layer, experts in kept.items():
        assert set(experts) == set(sorted(range(8), key=lambda j, layer=layer: -scores[layer][j])[: len(experts)])
    found, uniform, evaluations = (record.search[name] for name in ("fitness", "uniform", "evaluations"))
    assert 0 < uniform <= found < 1 and 1 < evaluations <= 9  # two layers of which up to six experts can go: nine plans
    assert record.timings["search"] > 0
    assert "search: at most 21 forwards of 3 sequences" in caplog.text  # 1 + 12 + 1 * 8
    sequences = prepare(config).sequences
    chosen = [sequences[0], sequences[1], sequences[2]]  # of four, every 4/3
    checkpoint = tmp_path / "out" / "cells" / record.cell["id"] / "checkpoint"
    assert found == pytest.approx(by_hand(tmp_path / "model", checkpoint, chosen), rel=1e-6)


def test_a_criterion_without_data_reads_the_text_of_the_search(folder: Path) -> None:
    record = experiment.run_cell(configured(folder, "olmoe", "method=router_norm", *SEARCHED))
    why, kept = left_by(folder, record)
    assert record.cell["calibration"] == "local" and record.expert_usage == {}
    assert why["largest_goes"] is True
    for layer, experts in kept.items():
        norms = why["layers"][str(layer)]
        assert set(experts) == set(sorted(range(8), key=lambda j, norms=norms: norms[j])[: len(experts)])


def test_cells_and_rows_of_tables_are_told_apart(folder: Path) -> None:
    budgets = (
        (), ("allocation=global",), ("allocation=list", "method.experts=[5,3]"), SEARCHED, (*SEARCHED, "seed=1"),
        ("allocation=evoesap", "method.search.generations=1"),
    )  # fmt: skip
    configs = [configured(folder, "olmoe", "method=frequency", *budget) for budget in budgets]
    assert len({prepare(config).id for config in configs}) == len(configs)
    told = prepare(configs[3])
    assert told.identity[0]["method"] == {
        "name": "frequency", "criterion": "frequency", "scope": "evoesap", "search": {"generations": 2},
    }  # fmt: skip
    assert told.description["seed"] == 0 and prepare(configs[4]).description["seed"] == 1
    for config in (configs[0], configs[3]):
        experiment.run_cell(config)
    assert "search" not in prepare(configs[0]).identity[0]["method"]
    store = RecordStore(folder / "out")
    assert sorted(bool(store.read(name).search) for name in store.ids()) == [False, True]


def test_a_search_that_was_stopped_goes_on_and_ends_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_here(monkeypatch)
    given = ("method=reap", "allocation=evoesap", "method.search.generations=4", "seed=3")
    save_tiny(folder / "model", "olmoe", num_experts=48)
    looked_at: list[int] = []
    whole = Comparison.overlaps

    def stopping(self, asked, advance):
        if len(looked_at) == 2:
            raise KeyboardInterrupt
        looked_at.append(len(asked))
        return whole(self, asked, advance)

    monkeypatch.setattr(Comparison, "overlaps", stopping)
    with pytest.raises(KeyboardInterrupt):
        experiment.run_cell(configured(folder, "olmoe", *given))
    first, looked_at = looked_at, []

    def counting(self, asked, advance):
        looked_at.append(len(asked))
        return whole(self, asked, advance)

    monkeypatch.setattr(Comparison, "overlaps", counting)
    record = experiment.run_cell(configured(folder, "olmoe", *given))
    assert len(first) == len(looked_at) == 2 and sum(first) + sum(looked_at) == record.search["evaluations"]
    gone_on, looked_at = looked_at, []
    other = experiment.run_cell(configured(folder, "olmoe", *given, f"output_dir={folder / 'other'}"))
    assert looked_at == [*first, *gone_on]
    assert other.search == record.search
    assert left_by(folder, record) == left_by(folder, other, "other")


def test_the_dry_run_says_the_cost(folder: Path) -> None:
    text, refusal = report(configured(folder, "olmoe", "method=reap", "allocation=evoesap"))
    (row,) = (line for line in text.splitlines() if line.startswith("search") and "weights" in line)
    assert refusal == "" and "at most 69 forwards of 64 sequences" in row
    readme = ("method.search.population=32", "method.search.generations=50", "method.search.samples=8")
    text, _ = report(configured(folder, "olmoe", "method=random", "allocation=evoesap", *readme))
    assert "at most 1,405 forwards of 8 sequences" in text
    text, refusal = report(configured(folder, "olmoe", "method=reap", "allocation=evoesap", "ratio=0.75"))
    assert "there is but one budget; use allocation=uniform" in refusal
    assert "search" not in report(configured(folder, "olmoe", "method=reap"))[0].split()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("method=reap", "lower_top_k=true"), "lower_top_k=true does not go with allocation=evoesap"),
        (("method=reap", "schedule=iterative"), "use method.scope=layer, not evoesap"),
        (("method=hc_smoe",), "unexpected keyword argument"),
        (("method=reap", "method.search.samples=-1"), "method.search.samples=-1.*greater than or equal to 1"),
        (("method=reap", "method.search.generations=many"), "method.search.generations=many: should be a whole number"),
        (("method=reap", "method.search.population=5"), "search.population=5 should be a whole number from 12 on"),
        (("method=reap", "+method.search.mutations=5"), "unknown setting search.mutations"),
        (("method=reap", "ratio=0"), "ratio 0 removes 0 of 8 experts a layer"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_cell_is_prepared(folder: Path, given: Any, message: str) -> None:
    with pytest.raises(WinnowError, match=message):
        prepare(configured(folder, "olmoe", "allocation=evoesap", *given))


def test_a_model_larger_than_memory_is_refused_before_it_is_calibrated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_here(monkeypatch)
    monkeypatch.setattr(compressing, "_statistics", lambda *args: pytest.fail("it was calibrated"))
    message = "does not fit the memory of its device.*take more or larger devices"
    with pytest.raises(WinnowError, match=message):
        experiment.run_cell(configured(folder, "olmoe", "method=reap", *SEARCHED, "calibration.stream=always"))
    monkeypatch.setattr(streamed, "free_memory", lambda device: 1000)
    with pytest.raises(WinnowError, match=message):
        experiment.run_cell(configured(folder, "olmoe", "method=reap", *SEARCHED))
