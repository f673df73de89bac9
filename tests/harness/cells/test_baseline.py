"""What becomes of a sweep whose uncompressed model is evaluated, left out, or was evaluated elsewhere."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import harness.cli
from harness.cells.cell import prepare
from harness.cells.run import run_cell
from harness.cells.settings import spelled
from harness.contracts.record import Record
from harness.errors import WinnowError
from harness.records.store import RecordStore
from reports.claims.report import write_claims
from reports.cli import write_report
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Hydra leaves handlers on streams that pytest closes; later tests would write to them."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(False)


DROPPED = ("code", "math", "multiple_choice", "perplexity", "diversity", "generation")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder, "olmoe")
    return folder


@pytest.fixture(scope="module")
def elsewhere(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the uncompressed model's record."""
    folder = tmp_path_factory.mktemp("elsewhere") / "out"
    run(model, folder, "method=none", "ratio=0")
    return folder


def words(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=local", f"model.path={model}", "method=random", "ratio=0.5", "suite=diagnostics", "suite.items=2",
        *(f"~suite.tasks.{task}" for task in DROPPED), "+suite.tasks.writing.max_new_tokens=8", "backend=hf",
        "suite.tasks.drift.texts=2", "suite.tasks.drift.positions=4", f"output_dir={out}", "progress=false", *more,
    ]  # fmt: skip


def config(model: Path, out: Path, *more: str):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", spelled(words(model, out, *more)))


def run(model: Path, out: Path, *more: str) -> Record:
    return run_cell(config(model, out, *more))


EVALUATED = "evaluating the uncompressed model once for all cells"
COMPARED = "load_baseline"  # the stage that opens the uncompressed model beside a cell


def of(record: Record) -> set[str]:
    return {score.task for score in record.scores}


def test_a_model_whose_baseline_is_left_out_is_compressed_scored_and_reported(model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    record = run(model, tmp_path / "out", "baseline=skip")
    assert of(record) == {"writing"}
    assert record.not_measured == {"drift": "it needs the uncompressed model, which baseline=skip does not open"}
    assert EVALUATED not in caplog.text and COMPARED not in record.timings
    assert not RecordStore(tmp_path / "out", "baseline").ids()
    run(model, tmp_path / "out", "baseline=skip")
    assert f"cell {record.cell['id']} is finished: skipped" in caplog.text
    assert "There is no record of the uncompressed model" in write_report(tmp_path / "out", tmp_path / "r").read_text()
    assert "not tested" in write_claims([tmp_path / "out"], tmp_path / "claims")


def test_what_was_left_out_is_measured_once_it_can_be(model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = run(model, tmp_path / "out", "baseline=skip")
    second = run(model, tmp_path / "out")
    assert f"cell {first.cell['id']} was measured without the uncompressed model: again for drift" in caplog.text
    assert second.cell == first.cell and of(second) == {"writing", "drift"} and not second.not_measured
    straight = run(model, tmp_path / "straight")
    assert second.scores == straight.scores and second.cell == straight.cell
    caplog.clear()
    assert [run(model, tmp_path / "out", *more) for more in (["baseline=skip"], [])] == 2 * [
        RecordStore(tmp_path / "out").read(second.cell["id"])
    ]
    assert caplog.text.count("is finished: skipped") == 2 and EVALUATED not in caplog.text


def test_a_baseline_is_taken_from_another_folder(model, elsewhere, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    record = run(model, tmp_path / "out", f"baseline=from={elsewhere}")
    told = f"it needs the uncompressed model, which baseline=from={elsewhere} does not open"
    assert record.not_measured == {"drift": told} and of(record) == {"writing"}
    here, there = RecordStore(tmp_path / "out", "baseline"), RecordStore(elsewhere, "baseline")
    (name,) = there.ids()
    assert here.ids() == [name] == [record.cell["baseline"]]
    taken = here.read(name)
    assert taken.taken_from == str(elsewhere) and taken.scores == there.read(name).scores
    assert here.read_samples(name) == there.read_samples(name) != []
    assert f"taken from {elsewhere}" in write_report(tmp_path / "out", tmp_path / "report").read_text()
    # Where it was measured stays known when it is taken on.
    assert run(model, tmp_path / "third", "method=none", "ratio=0", f"baseline=from:{tmp_path / 'out'}").taken_from == (
        str(elsewhere)
    )
    assert EVALUATED not in caplog.text and COMPARED not in record.timings


def test_after_taking_the_record_the_rest_is_measured_without_evaluating_it_again(model, elsewhere, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = run(model, tmp_path / "out", f"baseline=from={elsewhere}")
    second = run(model, tmp_path / "out")
    assert of(second) == {"writing", "drift"} and second.cell == first.cell
    assert RecordStore(tmp_path / "out", "baseline").read(first.cell["baseline"]).taken_from == str(elsewhere)
    assert EVALUATED not in caplog.text and COMPARED in second.timings


@pytest.mark.parametrize(
    "more, told",
    [
        (["suite.items=1"], "suite.items 2 -> 1"),
        (["model.dtype=float64"], "dtype auto -> float64"),
        (["backend.open.max_length=512"], "backend.max_length None -> 512"),
        (["model.name=other"], "model tiny -> other"),
    ],
)
def test_another_baseline_is_refused_and_what_differs_is_said(model, elsewhere, tmp_path, more, told):
    with pytest.raises(WinnowError, match=r"is not what is asked for here: ") as error:
        run(model, tmp_path / "out", f"baseline=from={elsewhere}", *more)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not RecordStore(tmp_path / "out", "baseline").ids() and not RecordStore(tmp_path / "out").ids()


def test_another_model_and_another_version_of_a_task_are_refused(model, elsewhere, tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny", "mixtral")
    with pytest.raises(WinnowError, match=r"the model's weights or config.json changed"):
        run(tmp_path / "tiny", tmp_path / "out", f"baseline=from={elsewhere}")
    monkeypatch.setattr("tasks.made.writing.WritingTask.version", 99)
    with pytest.raises(WinnowError, match=r"task_versions.writing \d+ -> 99"):
        run(model, tmp_path / "out", f"baseline=from={elsewhere}")


def test_folders_without_a_baseline_and_files_under_another_name_are_refused(model, elsewhere, tmp_path):
    with pytest.raises(WinnowError, match="there is no such folder"):
        run(model, tmp_path / "out", f"baseline=from={tmp_path / 'nowhere'}")
    with pytest.raises(WinnowError, match="holds no record of an uncompressed model"):
        run(model, tmp_path / "out", f"baseline=from={tmp_path}")
    name = prepare(config(model, tmp_path / "out", "suite.items=1")).baseline["id"]
    (record,) = (elsewhere / "baseline").glob("*.json")
    renamed = tmp_path / "renamed" / "baseline" / f"{name}.json"
    renamed.parent.mkdir(parents=True)
    renamed.write_bytes(record.read_bytes())
    with pytest.raises(WinnowError, match="suite.items 2 -> 1"):
        run(model, tmp_path / "out", "suite.items=1", f"baseline=from={tmp_path / 'renamed'}")


def test_damaged_records_beside_the_right_one_do_not_matter_and_lost_samples_are_said(
    model, elsewhere, tmp_path, caplog
):
    folder = tmp_path / "copy" / "baseline"
    folder.mkdir(parents=True)
    (record,) = (elsewhere / "baseline").glob("*.json")
    (folder / record.name).write_bytes(record.read_bytes())
    (folder / "other.json").write_text("{")
    cell = run(model, tmp_path / "out", f"baseline=from={tmp_path / 'copy'}")
    assert RecordStore(tmp_path / "out", "baseline").read(cell.cell["baseline"]).scores
    assert "keeps no samples of the uncompressed model" in caplog.text
    (folder / record.name).write_text("[]")
    with pytest.raises(WinnowError, match="is damaged"):
        run(model, tmp_path / "again", f"baseline=from={tmp_path / 'copy'}")


def test_the_uncompressed_model_itself_cannot_be_left_out(model, elsewhere, tmp_path):
    with pytest.raises(WinnowError, match="method=none is the uncompressed model, which baseline=skip leaves out"):
        run(model, tmp_path / "out", "method=none", "ratio=0", "baseline=skip")
    taken = run(model, tmp_path / "out", "method=none", "ratio=0", f"baseline=from={elsewhere}")
    assert run(model, tmp_path / "out", "method=none", "ratio=0", "baseline=skip") == taken


def test_the_choice_is_no_part_of_what_a_cell_is(model, tmp_path):
    ids = {
        prepare(config(model, tmp_path / "out", *more)).id
        for more in ([], ["baseline=skip"], [f"baseline=from={tmp_path}"])
    }
    assert len(ids) == 1


@pytest.mark.parametrize("given", ["maybe", "from=", "true", "null", "'from= '"])
def test_other_choices_are_refused(model, tmp_path, given):
    with pytest.raises(WinnowError, match=r"should be evaluate, skip, or from=DIR"):
        prepare(config(model, tmp_path / "out", f"baseline={given}"))


def test_a_damaged_twin_of_the_record_is_not_written(model, elsewhere, tmp_path):
    (record,) = (elsewhere / "baseline").glob("*.json")
    folder = tmp_path / "copy" / "baseline"
    folder.mkdir(parents=True)
    (folder / record.name).write_bytes(record.read_bytes())
    (folder / record.with_suffix(".parquet").name).write_bytes(b"nothing")
    with pytest.raises(WinnowError, match="are damaged"):
        run(model, tmp_path / "out", f"baseline=from={tmp_path / 'copy'}")
    assert not list((tmp_path / "out" / "baseline").glob("*.json"))
    assert json.loads(record.read_text())["taken_from"] == ""


@pytest.mark.parametrize("more", [[], ["-m"]])
@pytest.mark.parametrize("given", ["from={}", "from:{}"])
def test_a_folder_is_named_on_the_command_line_as_it_is(model, elsewhere, tmp_path, monkeypatch, capsys, more, given):
    typed = [*more, *words(model, tmp_path / "out", f"baseline={given.format(elsewhere)}")]
    monkeypatch.setattr(sys, "argv", ["winnow", *typed])
    harness.cli.failed.clear()
    harness.cli.main()
    assert f"baseline: evaluated elsewhere, taken from {elsewhere}" in capsys.readouterr().out
