"""Nothing stale is served as fresh: what a cell is made of changes, and so does its id; what changed is said."""

import json
import logging
import sys
import textwrap
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import harness.cli  # noqa: F401  (registers the resolvers of the configuration)
from harness.cells.cell import prepare
from harness.cells.finished import made_from
from harness.cells.run import run_cell
from harness.records.store import RecordStore
from tests.tasks.staged import stage
from tests.tiny import save_tiny

ROWS = [{"id": str(i), "question": f"What is {i} + 1?", "answer": str(i + 1), "solution": "x"} for i in range(3)]
SUITE = {"gsm8k": {"_target_": "tasks.published.math.MathBenchmark", "name": "gsm8k", "data_set": "gsm8k"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", "qwen3_moe")
    (tmp_path / "corpus.jsonl").write_text(3 * (json.dumps({"text": "Tom has 3 apples and buys 4 more."}) + "\n"))
    stage(tmp_path / "data", "gsm8k", ROWS)
    return tmp_path


def config(folder: Path, *more: str):
    overrides = [
        "model=local", f"model.path={folder / 'model'}", "calibration=local",
        f"calibration.path={folder / 'corpus.jsonl'}", "calibration.max_length=64", "suite=none", "backend=hf",
        f"output_dir={folder / 'out'}", "progress=false", "ratio=0.5", "keep_checkpoint=false", *more,
    ]  # fmt: skip
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides)


def with_suite(folder: Path):
    found = config(folder)
    found.suite = {"name": "mine", "tasks": {"gsm8k": SUITE["gsm8k"] | {"root": str(folder / "data")}}}
    return found


def ids(folder: Path) -> tuple[str, str]:
    cell = prepare(with_suite(folder))
    return cell.id, cell.baseline["id"]


def edit_json(path: Path, **more) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | more))


# What changes -> how, and whether the uncompressed model's numbers change with it.
CHANGES = {
    "the calibration text": (lambda f: (f / "corpus.jsonl").write_text('{"text": "Something else."}\n'), False),
    "tokenizer.json": (lambda f: add_a_space(f / "model" / "tokenizer.json"), True),
    "the template": (lambda f: (f / "model" / "chat_template.jinja").write_text("{{ messages }}"), True),
    "generation_config.json": (lambda f: edit_json(f / "model" / "generation_config.json", eos_token_id=5), True),
    "config.json": (lambda f: edit_json(f / "model" / "config.json", rope_theta=12345.0), True),
    "a weight": (lambda f: flip(f / "model" / "model.safetensors"), True),
    "staged data": (lambda f: stage_other(f / "data"), True),
}


def add_a_space(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def stage_other(root: Path) -> None:
    for file in (root / "gsm8k").iterdir():
        file.unlink()
    (root / "gsm8k").rmdir()
    stage(root, "gsm8k", [*ROWS[:2], ROWS[2] | {"answer": "7"}])
    from tasks.published.items import benchmark_rows

    benchmark_rows.cache_clear()  # a later run is another process


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_content_is_another_cell(folder: Path, what: str):
    change, of_baseline = CHANGES[what]
    before = ids(folder)
    assert ids(folder) == before
    change(folder)
    after = ids(folder)
    assert after[0] != before[0]
    assert (after[1] != before[1]) is of_baseline


def test_a_changed_own_method_is_another_cell(folder: Path, monkeypatch: pytest.MonkeyPatch):
    source = """
        from methods.prune_experts import ExpertPruning
        class Mine(ExpertPruning):
            pass
    """

    def own_id(code: str) -> str:
        (folder / "own_method.py").write_text(textwrap.dedent(code))
        sys.modules.pop("own_method", None)
        return prepare(config(folder, "method._target_=own_method.Mine")).id

    monkeypatch.syspath_prepend(str(folder))
    first = own_id(source)
    assert own_id(source) == first
    assert own_id(source + "        # other\n") != first


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
