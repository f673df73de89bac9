"""Choices scored by lm-eval on rows: against our own log-likelihoods, and against an lm-eval task on the same text."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from harness import progress
from harness.backends.hf import HFBackend
from harness.contracts import intervals
from harness.errors import WinnowError
from tasks.published.choice import ChoiceBenchmark
from tasks.published.lm_eval_task import LmEvalTask
from tests.tasks.staged import stage
from tests.tiny import byte_tokenizer, tiny_model

QUESTIONS = [
    {
        "id": str(i),
        "contexts": [f"Question: what is {i} plus {i}?\nAnswer:"],
        "choices": [str(i), f"it is {2 * i}", "none"],
        "answer": i % 3,
        "group": "",
    }
    for i in range(6)
]
BLANKS = [
    {
        "id": str(i),
        "contexts": [f"{name} saw {i} birds because {who}" for who in ("Ann", "Robert")],
        "choices": ["was outside."] * 2,
        "answer": i % 2,
        "group": "",
    }
    for i, name in enumerate(["Ann", "Robert", "The twins", "Everyone"])
]


@pytest.fixture(scope="module")
def backend() -> HFBackend:
    return HFBackend(tiny_model("qwen3_moe"), byte_tokenizer(), batch_size=4)


def by_hand(backend: HFBackend, rows: list[dict[str, Any]], by_length: bool = False) -> list[float]:
    """Whether the likeliest choice is right, for each row."""
    outcomes = []
    for row in rows:
        contexts = row["contexts"] * (len(row["choices"]) // len(row["contexts"]))
        pairs = [(context, f" {choice}") for context, choice in zip(contexts, row["choices"], strict=True)]
        found = [
            r.logprob / (len(c) if by_length else 1)
            for r, c in zip(backend.loglikelihood(pairs), row["choices"], strict=True)
        ]
        outcomes.append(float(found.index(max(found)) == row["answer"]))
    return outcomes


def test_one_context_for_all_choices(backend: HFBackend, tmp_path: Path) -> None:
    root = stage(tmp_path, "arc_easy", QUESTIONS)
    result = ChoiceBenchmark("arc", "arc_easy", root).run(backend)
    assert [(score.metric, score.part) for score in result.scores] == [("acc", "arc_easy"), ("acc_norm", "arc_easy")]
    for score, outcomes in zip(
        result.scores, (by_hand(backend, QUESTIONS), by_hand(backend, QUESTIONS, True)), strict=True
    ):
        assert score.value == pytest.approx(sum(outcomes) / 6) and (score.low, score.high) == intervals.wilson(
            sum(outcomes), 6
        )
    assert [sample.score for sample in result.samples] == by_hand(backend, QUESTIONS)
    assert len({sample.item for sample in result.samples}) == 6
    part = ChoiceBenchmark("arc", "arc_easy", root, items=3).run(backend)
    assert {sample.item for sample in part.samples} < {sample.item for sample in result.samples} and part.scores[
        0
    ].n == 3


def test_a_context_for_each_choice(backend: HFBackend, tmp_path: Path) -> None:
    result = ChoiceBenchmark("wg", "winogrande", stage(tmp_path, "winogrande", BLANKS)).run(backend)
    assert [score.metric for score in result.scores] == ["acc"]
    assert [sample.score for sample in result.samples] == by_hand(backend, BLANKS)
    mixed = [BLANKS[0], QUESTIONS[0] | {"id": "q"}]
    with pytest.raises(WinnowError, match="a context for each choice"):
        ChoiceBenchmark("wg", "winogrande", stage(tmp_path / "b", "winogrande", mixed)).run(backend)


def test_groups_are_scored_alone_and_together_by_their_sizes(backend: HFBackend, tmp_path: Path) -> None:
    rows = [
        row | {"id": f"{group}-{row['id']}", "group": group}
        for group, part in (("law", QUESTIONS[:4]), ("art", QUESTIONS[4:]))
        for row in part
    ]
    result = ChoiceBenchmark("mmlu", "mmlu", stage(tmp_path, "mmlu", rows)).run(backend)
    scores = {score.part: score for score in result.scores}
    assert set(scores) == {"mmlu", "mmlu_law", "mmlu_art"} and scores["mmlu"].n == 6
    assert scores["mmlu"].value == pytest.approx(sum(by_hand(backend, QUESTIONS)) / 6)
    assert scores["mmlu_law"].value == pytest.approx(sum(by_hand(backend, QUESTIONS[:4])) / 4)


def test_lambada(backend: HFBackend, tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "context": f"He looked {i} times and saw the", "continuation": word}
        for i, word in enumerate(["sun", "moon"])
    ]
    result = ChoiceBenchmark("lambada", "lambada", stage(tmp_path, "lambada", rows)).run(backend)
    pairs = [(row["context"], f" {row['continuation']}") for row in rows]
    nll = [-found.logprob for found in backend.loglikelihood(pairs)]
    scores = {score.metric: score for score in result.scores}
    assert scores["acc"].value == 0.0
    assert scores["perplexity"].value == pytest.approx(intervals.perplexity(nll, [1, 1]), rel=1e-4)


def test_the_numbers_are_those_of_lm_evals_own_task(backend: HFBackend, tmp_path: Path) -> None:
    """ARC's questions rendered by lm-eval's ARC template, against rows that hold the same text."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [
        {
            "id": q["id"],
            "question": f"what is {i} plus {i}?",
            "choices": {"text": q["choices"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i, q in enumerate(QUESTIONS)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    config = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "own.yaml").write_text(json.dumps(config))
    theirs = LmEvalTask("own", ("own",), str(folder)).run(backend)
    ours = ChoiceBenchmark("arc", "arc_easy", stage(tmp_path, "arc_easy", QUESTIONS)).run(backend)
    assert [(s.metric, s.value, s.low, s.high) for s in ours.scores] == [
        (s.metric, s.value, s.low, s.high) for s in theirs.scores
    ]
    assert [s.detail["logprobs"] for s in ours.samples] == [s.detail["logprobs"] for s in theirs.samples]


def test_other_sets_are_refused(backend: HFBackend, tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="choose arc_challenge"):
        ChoiceBenchmark("x", "gsm8k", str(tmp_path)).run(backend)


def test_without_progress_there_is_no_bar(
    backend: HFBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ChoiceBenchmark("arc", "arc_easy", stage(tmp_path, "arc_easy", QUESTIONS))
    with progress.showing(False):
        task.run(backend)
    assert "\r" not in capsys.readouterr().err
    with progress.showing(True):
        task.run(backend)
    assert "Running loglikelihood requests" in capsys.readouterr().err
