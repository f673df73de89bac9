"""What a finished cell says of itself, and what is said of one that was made from something else (which changes are
noticed is tested in ``tests.attack``)."""

import json
import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import harness.cli  # noqa: F401  (registers the resolvers of the configuration)
from harness.cells.cell import prepare
from harness.cells.finished import made_from
from harness.cells.run import run_cell
from harness.records.store import RecordStore
from tests.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "qwen3_moe")
    (tmp_path / "corpus.jsonl").write_text(3 * (json.dumps({"text": "Tom has 3 apples and buys 4 more."}) + "\n"))
    return tmp_path


def config(folder: Path, *more: str):
    overrides = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none", "backend=hf",
        f"output_dir={folder / 'out'}", "progress=false", "ratio=0.5", "keep_checkpoint=false", *more,
    ]  # fmt: skip
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides)


def test_what_changed_is_said_and_a_finished_cell_says_what_it_was_made_from(folder: Path, caplog):
    caplog.set_level(logging.INFO)
    first = run_cell(config(folder))
    assert "computing anew" not in caplog.text
    assert first.fingerprints.keys() == {"model", "tokenizer", "corpus"}
    assert run_cell(config(folder)).cell == first.cell
    assert f"cell {first.cell['id']} is finished: skipped (model " in caplog.text
    assert "corpus " in made_from(first) and "torch " in made_from(first)
    caplog.clear()
    (folder / "corpus.jsonl").write_text('{"text": "Something else."}\n')
    second = run_cell(config(folder))
    assert second.cell["id"] != first.cell["id"]
    assert f"the calibration text changed; computing anew (the record {first.cell['id']} stays)" in caplog.text
    assert RecordStore(folder / "out").ids() == sorted([first.cell["id"], second.cell["id"]])


def test_versions_count_where_they_are_strict(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def made(torch: str, *more: str) -> str:
        monkeypatch.setattr("harness.cells.cell.versions", lambda: {"torch": torch})
        return prepare(config(folder, *more)).id

    assert made("2.13") == made("2.14")
    assert made("2.13", "strict_versions=true") != made("2.14", "strict_versions=true")


def test_the_uncompressed_model_says_the_same_of_itself(folder: Path, caplog):
    caplog.set_level(logging.INFO)
    others = [f"~suite.tasks.{task}" for task in ("code", "math", "writing", "perplexity", "diversity")]
    alone = config(folder, "method=none", "ratio=0", "suite=reference", "suite.items=1", *others)
    first = run_cell(alone)
    assert run_cell(alone).cell == first.cell
    assert "the uncompressed model is evaluated: skipped (model " in caplog.text
    caplog.clear()
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert run_cell(alone).cell["id"] != first.cell["id"]
    assert f"the tokenizer's files changed; computing anew (the record {first.cell['id']} stays)" in caplog.text


def test_what_a_killed_writer_of_another_host_left_goes(folder: Path):
    cell = prepare(config(folder)).id
    left = folder / "out" / "cells" / cell / ".checkpoint.elsewhere-1.partial"
    left.mkdir(parents=True)
    run_cell(config(folder))
    assert not left.exists() and (left.parent / "plan.json").is_file()
