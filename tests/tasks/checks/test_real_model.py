"""The comparison with lm-eval alone: lm-eval's own tasks on local documents ask what the staged rows ask."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from harness.contracts.record import Record, Score
from harness.data import packages as staging_wheels
from harness.records.store import RecordStore
from tasks.checks import real_model
from tasks.checks.real_model import ORIGINALS, arc, by_harness, compare, lambada, lm_eval_task, numbered

ARC = [{"id": "A1", "query": "Question: Which is wet?\nAnswer:", "choices": ["sand", "sea"], "gold": 1}]
PIQA = [{"goal": "Open a tin", "sol1": "Use an opener.", "sol2": "Ask it.", "label": 0}]
HELLASWAG = [
    {
        "activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix.", "ctx_b": "she", "label": "2",
        "endings": ["sings [step] aloud.", "leaves.", "mixes  it.", "sleeps."],
    }
]  # fmt: skip
LAMBADA = [{"id": 5, "query": "He took the boat out to", "answers_text": ["sea"]}]
DOCS = {
    "arc_easy": (arc(ARC), staging_wheels.arc(ARC)),
    "piqa": (numbered(PIQA), staging_wheels.piqa(PIQA)),
    "hellaswag": (numbered(HELLASWAG), staging_wheels.hellaswag(HELLASWAG)),
    "lambada": (lambada(LAMBADA), staging_wheels.lambada(LAMBADA)),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_both_ask_the_same(name: str, tmp_path: Path) -> None:
    original, (docs, staged) = ORIGINALS[name], DOCS[name]
    (row,) = staged
    data = tmp_path / "docs.jsonl"
    data.write_text(json.dumps(docs[row["id"]]) + "\n")
    (tmp_path / f"{original.task}.yaml").write_text(json.dumps(lm_eval_task(original, data)))
    task = TaskManager(include_path=str(tmp_path), include_defaults=False).load([original.task])["tasks"][original.task]
    (doc,) = list(task.eval_docs)
    assert task.get_config("num_fewshot") in (None, 0)
    if name == "lambada":
        assert (task.doc_to_text(doc), task.doc_to_target(doc)) == (row["context"], f" {row['continuation']}")
    else:
        answer = task.doc_to_target(doc)
        assert (task.doc_to_text(doc), task.doc_to_choice(doc)) == (row["contexts"][0], row["choices"])
        assert int(answer) == row["answer"]


def lines(ours: dict[str, float], theirs: dict[str, float]) -> list[tuple[str, bool]]:
    return list(compare({"piqa": ours}, {"piqa": theirs}, 300))


def test_accuracies_may_differ_by_one_item_and_perplexities_by_rounding() -> None:
    (_, same), (_, near), (_, far) = lines(
        {"acc": 0.5, "acc_norm": 0.5, "accuracy": 0.5},
        {"acc": 0.5, "acc_norm": 0.5 + 1 / 300, "accuracy": 0.5 - 2 / 300},
    )
    assert same and near and not far
    (line, near), (_, far), (_, missing) = lines(
        {"perplexity": 50.01, "word_perplexity": 51.0}, {"perplexity": 50.0, "word_perplexity": 50.0, "acc": 0.5}
    )
    assert near and not far and not missing and "50.0100 lm-eval 50.0000" in line


def test_the_record_of_the_right_suite_is_read(tmp_path: Path) -> None:
    def store(suite: str, value: float) -> None:
        cell: dict[str, Any] = {
            "id": suite, "model": "m", "method": "none", "ratio": 0.0, "calibration": "none", "seed": 0, "suite": suite,
        }  # fmt: skip
        score = Score("piqa", "acc", value, 4, 0.0, 1.0, "piqa")
        record = Record(cell=cell, config={}, scores=[score], sizes={}, timings={}, versions={}, fingerprints={})
        RecordStore(tmp_path, "baseline").write(record, [])

    store("quick", 0.25)
    with pytest.raises(real_model.WinnowError, match="holds 0 records of suite=real_model"):
        by_harness(tmp_path)
    store("real_model", 0.75)
    assert by_harness(tmp_path)["piqa"] == {"acc": 0.75}


def test_without_staged_data_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["real_model", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        real_model.main()
    assert stop.value.code == 2 and "winnow-data stage" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
