"""Staged data sets: written, read back, found damaged; the registry is complete; nothing reaches for a network."""

import gzip
import hashlib
import json
import logging
import socket
import sys
from pathlib import Path

import pytest

from harness import cli
from harness.data import sets as data_sets
from harness.data.corpora import hub_dataset, mixture, staged_corpus
from harness.data.hub import CONVERTERS, LM_EVAL_FOLDERS, PLUS_RELEASES
from harness.data.packages import FROM_PACKAGE, PACKAGES, PYTHON
from harness.data.schema import DATA_SETS
from harness.data.sets import NotStaged, packed_rows, read_manifest, rows, staged_rows
from harness.errors import WinnowError
from tasks.published.math import MathBenchmark
from tests.in_process import everything_here
from tests.tasks.scripted import ScriptedBackend
from tests.tiny import save_tiny

QUESTIONS = [
    {"id": str(i), "question": f"What is {i} and {i}?", "solution": f"#### {2 * i}", "answer": str(2 * i)}
    for i in range(6)
]
CORPUS = [{"id": str(i), "text": f"text {i}"} for i in range(5)]


def put(root: Path, name: str, found: list[dict]) -> None:
    packed = packed_rows(found)
    (root / name).mkdir(parents=True)
    (root / name / "data.jsonl.gz").write_bytes(packed)
    manifest = {"name": name, "source": "a test", "sha256": hashlib.sha256(packed).hexdigest(), "rows": len(found)}
    (root / name / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def root(tmp_path: Path) -> str:
    put(tmp_path, "gsm8k", QUESTIONS)
    put(tmp_path, "evol_codealpaca", CORPUS)
    put(tmp_path, "chat", [{"id": "a", "text": "q\n\na", "messages": [{"role": "user", "content": "q"}]}])
    return str(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_task_and_a_corpus_run_from_staged_data_without_a_socket(root: str) -> None:
    assert rows("gsm8k", root) == QUESTIONS
    task = MathBenchmark("gsm8k", "gsm8k", root)
    result = task.run(ScriptedBackend(write=lambda prompt: "It is 4. #### 4"))
    (accuracy,) = [score for score in result.scores if score.metric == "exact_match"]
    assert (accuracy.value, accuracy.n) == (1 / 6, 6)
    documents = hub_dataset("hub/name", "train", 3, seed=1, source="code", root=root, staged_as="evol_codealpaca")
    assert len(documents) == 3
    assert {d.source for d in documents} == {"code"}
    assert documents != hub_dataset(
        "hub/name", "train", 3, seed=3, source="code", root=root, staged_as="evol_codealpaca"
    )
    (document,) = staged_corpus("chat", root)
    assert document.messages == (("user", "q"),)
    assert document.source == "chat"


@pytest.mark.usefixtures("no_network")
def test_every_hub_corpus_of_a_mixture_reads_the_root(root: str) -> None:
    from hydra import initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        documents = mixture(["evol_codealpaca:2"], root=root)
        assert [d.source for d in documents] == ["evol_codealpaca"] * 2
        with pytest.raises(NotStaged, match="c4 is not staged in .*: run winnow-data stage --only c4 --to"):
            mixture(["evol_codealpaca:2", "c4:1"], root=root)


def test_fewer_staged_documents_than_wanted_are_all_taken_with_a_warning(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(staged_corpus("evol_codealpaca", root, 50)) == 5
    assert "50 documents wanted, 5 are staged" in caplog.text


def test_a_corpus_of_packages_needs_a_root() -> None:
    with pytest.raises(WinnowError, match="plays is read from staged data: winnow-data stage --calibration plays"):
        staged_corpus("plays", None)


def test_damage_is_found(root: str) -> None:
    path = Path(root) / "gsm8k" / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "0"}\n'))
    with pytest.raises(WinnowError, match="damaged: its sha256 .* winnow-data stage --only gsm8k"):
        staged_rows("gsm8k", root)
    path.unlink()
    with pytest.raises(WinnowError, match="cannot read .*winnow-data stage --only gsm8k"):
        staged_rows("gsm8k", root)
    (Path(root) / "gsm8k" / "manifest.json").write_text("{")
    with pytest.raises(WinnowError, match="manifest.json is damaged"):
        read_manifest("gsm8k", root)
    (Path(root) / "gsm8k" / "manifest.json").write_text('{"name": "other"}')
    with pytest.raises(WinnowError, match="is not the manifest of gsm8k"):
        read_manifest("gsm8k", root)


def test_what_is_not_there_is_named(root: str) -> None:
    with pytest.raises(NotStaged, match=f"mbpp is not staged in {root}: run winnow-data stage --only mbpp --to {root}"):
        rows("mbpp", root)
    assert not data_sets.is_staged("mbpp", root)
    assert data_sets.is_staged("gsm8k", root)
    assert not data_sets.is_staged("gsm8k", None)
    with pytest.raises(WinnowError, match="unknown data set 'nothing'; known: humaneval"):
        rows("nothing")
    with pytest.raises(WinnowError, match="writingbench is not on the hub: winnow-data stage"):
        rows("writingbench")


def test_rows_are_packed_alike_and_need_ids() -> None:
    assert packed_rows(CORPUS) == packed_rows(CORPUS)
    for found in ([{"id": "a"}, {"id": "a"}], [{"text": "x"}], [{"id": 1}]):
        with pytest.raises(WinnowError, match="string ids that differ"):
            packed_rows(found)


def test_every_set_has_a_way_to_be_had() -> None:
    for name, one in DATA_SETS.items():
        ways = {name in CONVERTERS, name in LM_EVAL_FOLDERS, name in PLUS_RELEASES}
        assert (one.hub is not None) == (True in ways), name
        assert (name in FROM_PACKAGE) == (one.package not in ("", PYTHON)), name
        assert one.hub or one.package, name
        assert one.package in ("", PYTHON, *PACKAGES), name


@pytest.mark.usefixtures("no_network")
def test_a_cell_on_staged_data_notes_contamination_and_forgets_where_the_data_lay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "A farmer sells eighteen eggs on Monday and twice as many on Tuesday; how many eggs are sold in all?"
    for root in ("here", "there"):
        put(tmp_path / root, "gsm8k", [*QUESTIONS, {**QUESTIONS[0], "id": "long", "question": long}])
        put(tmp_path / root, "evol_codealpaca", [*CORPUS, {"id": "x", "text": f"Once more: {long} I do not know."}])
    save_tiny(tmp_path / "model", "olmoe")
    everything_here(monkeypatch)
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])

    def cell(root: str) -> None:
        arguments = [
            "model=local", f"model.path={tmp_path / 'model'}", "calibration=evol_codealpaca", "suite=paper_math",
            "~suite.tasks.math_500", "suite.tasks.gsm8k.max_new_tokens=2", f"data.root={tmp_path / root}", "backend=hf",
            "calibration.max_length=64", "ratio=0.25", f"output_dir={tmp_path / 'out'}", "progress=false",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["winnow", *arguments])
        cli.main()

    cell("here")
    cell("there")
    (record,) = (tmp_path / "out" / "records").glob("*.json")
    assert json.loads(record.read_text())["contamination"] == {"gsm8k": {"items": 7, "checked": 1, "found": 1}}
    log = "".join(path.read_text() for path in (tmp_path / "out" / "logs").rglob("*.log"))
    assert "corpus evol_codealpaca contains 1 of the 7 items of gsm8k" in log
