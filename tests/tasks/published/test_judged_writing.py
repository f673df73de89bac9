"""Texts, a judge behind an endpoint of the test's own, and what becomes of its verdicts."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.intervals import wilson
from harness.contracts.record import Sample, Score
from harness.contracts.task import TaskResult
from harness.data.sets import packed_rows
from harness.errors import WinnowError
from harness.files import write_files
from tasks.published.judge import Judge
from tasks.published.writing import JudgedWritingTask, outcome
from tests.judge_endpoint import asked, serving
from tests.tasks.scripted import ScriptedBackend

ROWS = [
    {"id": f"p{n}", "prompt": f"Write poem {n} with {{braces}}.", "checklist": ["It rhymes.", "It is short."]}
    for n in range(4)
]
THEIRS = [Sample("poems", row["id"], 1.0, output=f"their {row['id']}") for row in ROWS]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def root(tmp_path: Path) -> str:
    stage(tmp_path, ROWS)
    return str(tmp_path)


def stage(folder: Path, rows: list[dict[str, Any]]) -> None:
    """``rows`` as the staged data set writingbench."""
    data = packed_rows(rows)
    manifest = {
        "name": "writingbench",
        "source": "a test",
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": len(rows),
    }
    place = folder / "writingbench"
    write_files({place / "data.jsonl.gz": data, place / "manifest.json": json.dumps(manifest).encode()})


def run(
    root: str,
    judge: Judge | None,
    baseline: list[Sample] | None = None,
    write: Callable[[str], str] = lambda prompt: f"our {prompt}",
) -> TaskResult:
    task = JudgedWritingTask("poems", "writingbench", root, judge=judge)
    return task.run_against(ScriptedBackend(write), [], baseline)


def scores(result: TaskResult) -> dict[str, Score]:
    return {f"{score.task} {score.metric}": score for score in result.scores}


def samples(result: TaskResult, task: str) -> dict[str, float]:
    return {sample.item: sample.score for sample in result.samples if sample.task == task}


def fair(body: dict[str, Any]) -> str:
    """Prefers what is not theirs; gives the two criteria 9 and the number of the poem plus 1."""
    question = asked(body)
    if '"winner"' in question:
        ours_first = question.index("our Write") < question.index("their p")
        return json.dumps({"winner": "A" if ours_first else "B"})
    number = int(question.partition("Write poem ")[2][0])
    return json.dumps({"scores": [9, number + 1]})


def test_without_a_judge_texts_are_written_and_nothing_is_scored_but_their_length(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(root, None, THEIRS)
    assert "not judged" in caplog.text
    assert list(scores(result)) == ["poems characters"]
    assert [sample.output for sample in result.samples] == [f"our {row['prompt']}" for row in ROWS]
    assert result.samples[0].prompt == ROWS[0]["prompt"] and not result.samples[0].detail
    assert result.scores[0].value == len("our ") + len(str(ROWS[0]["prompt"]))


def rubric(result: TaskResult) -> dict[str, float]:
    """Item -> its mean number from 1 to 10; samples hold it as a share."""
    return {item: 1 + 9 * share for item, share in samples(result, "poems_rubric").items()}


def test_rubric_and_pairwise_verdicts_become_scores(root: str) -> None:
    with serving(fair) as endpoint:
        result = run(root, endpoint.judge(concurrency=3), THEIRS)
        questions = [asked(body) for body in endpoint.requests[1:]]  # the first is the sign of life
    assert len(questions) == 4 * 3
    assert rubric(result) == pytest.approx({f"p{n}": (9 + n + 1) / 2 for n in range(4)})
    assert samples(result, "poems_pairwise") == dict.fromkeys(("p0", "p1", "p2", "p3"), 1.0)
    found = scores(result)
    assert found["poems_rubric score"].value == pytest.approx(5.75)
    low, high = wilson(4, 4)
    assert found["poems_pairwise win_rate"] == Score("poems_pairwise", "win_rate", 1.0, 4, low, high)
    assert found["poems_pairwise wins"].value == found["poems_pairwise consistency"].value == 1.0
    assert found["poems_pairwise losses"].value == 0.0
    missing = Score("poems_missing", "verdicts", 0, 8, 0, 0, higher_is_better=False, kind="probe")
    assert found["poems_missing verdicts"] == missing
    assert found["poems_rubric share"].value == pytest.approx((5.75 - 1) / 9)
    probes = {"poems characters", "poems_rubric score", "poems_missing verdicts"}
    assert {name for name, score in found.items() if score.kind == "probe"} == probes


def test_questions_and_raw_replies_are_kept(root: str) -> None:
    with serving(fair) as endpoint:
        result = run(root, endpoint.judge(), THEIRS)
        sent = {asked(body) for body in endpoint.requests[1:]}
    details = [sample.detail for sample in result.samples if sample.task == "poems"]
    kept = [detail[kind] for detail in details for kind in ("rubric", "pairwise")]
    assert {prompt for one in kept for prompt in one["prompts"]} == sent
    assert details[2]["rubric"]["replies"] == [['{"scores": [9, 3]}']]
    assert details[2]["pairwise"]["replies"] == [['{"winner": "A"}'], ['{"winner": "B"}']]
    question = details[2]["rubric"]["prompts"][0]
    assert "Write poem 2 with {braces}." in question and "1. It rhymes.\n2. It is short." in question


def test_a_judge_that_always_names_the_first_text_only_makes_ties(root: str) -> None:
    def biased(body: dict[str, Any]) -> str:
        return '{"winner": "A"}' if '"winner"' in asked(body) else '{"scores": [5, 5]}'

    with serving(biased) as endpoint:
        found = scores(run(root, endpoint.judge(), THEIRS))
    assert found["poems_pairwise win_rate"].value == 0.5
    assert found["poems_pairwise wins"].value == found["poems_pairwise losses"].value == 0.0
    assert found["poems_pairwise consistency"].value == 0.0


def test_outcomes() -> None:
    assert [outcome(*pair) for pair in (("A", "B"), ("B", "A"), ("tie", "tie"))] == [1.0, 0.0, 0.5]
    assert {outcome(*pair) for pair in (("A", "A"), ("B", "B"), ("A", "tie"), ("tie", "A"), ("B", "tie"))} == {0.5}


@pytest.mark.parametrize("scores_given", ["[5, 11]", "[0, 5]", "[5]", "[5, 5.5]", "[5, true]", '"55"'])
def test_a_rubric_out_of_range_is_missing_and_never_a_zero(
    scores_given: str, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    def partly(body: dict[str, Any]) -> str:
        return f'{{"scores": {scores_given}}}' if "poem 1" in asked(body) else '{"scores": [6, 8]}'

    with serving(partly) as endpoint, caplog.at_level(logging.WARNING):
        result = run(root, endpoint.judge(retries=1))
    assert rubric(result) == pytest.approx({"p0": 7.0, "p2": 7.0, "p3": 7.0})
    found = scores(result)
    assert (found["poems_rubric score"].value, found["poems_rubric score"].n) == (7.0, 3)
    assert (found["poems_missing verdicts"].value, found["poems_missing verdicts"].n) == (1.0, 4)
    assert 'poems: 1 of 4 verdicts are missing and count nowhere (no valid verdict: "scores" must be' in caplog.text
    detail = result.samples[1].detail["rubric"]
    assert detail["replies"] == [[f'{{"scores": {scores_given}}}'] * 2]
    assert not any(score.task == "poems_pairwise" for score in result.scores)  # no baseline: this is it


def test_one_order_without_a_verdict_leaves_the_pair_missing(root: str) -> None:
    def half(body: dict[str, Any]) -> str:
        question = asked(body)
        if "their p1" in question and question.index("their p1") < question.index("our Write"):
            return "I cannot say"
        return fair(body)

    with serving(half) as endpoint:
        result = run(root, endpoint.judge(retries=0), THEIRS)
    assert samples(result, "poems_pairwise") == {"p0": 1.0, "p2": 1.0, "p3": 1.0}
    assert scores(result)["poems_missing verdicts"].value == 1.0


def test_a_judge_that_is_down_leaves_everything_missing(root: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda body: (503, "out for lunch")) as endpoint, caplog.at_level(logging.WARNING):
        result = run(root, endpoint.judge(retries=0), THEIRS)
    assert list(scores(result)) == ["poems characters", "poems_missing verdicts"]
    assert scores(result)["poems_missing verdicts"].value == 8.0
    assert {sample.task for sample in result.samples} == {"poems"}
    assert "does not answer" in caplog.text and "8 of 8 verdicts are missing" in caplog.text


def test_a_judge_that_refuses_is_found_out_before_anything_is_written(root: str) -> None:
    backend = ScriptedBackend()
    with serving(lambda body: (401, "bad key")) as endpoint, pytest.raises(WinnowError, match="bad key"):
        task = JudgedWritingTask("poems", "writingbench", root, judge=endpoint.judge())
        task.run_against(backend, [], None)
    assert not backend.calls


def test_empty_and_equal_texts_are_settled_without_the_judge(root: str) -> None:
    """p0: ours is empty; p1: theirs is; p2: both are the same; p3: both are empty."""
    theirs = [Sample("poems", f"p{n}", 1.0, output=text) for n, text in enumerate(["their p0", " ", "the same", ""])]
    ours = {"0": " \n", "1": "our Write", "2": "the same ", "3": ""}
    with serving(fair) as endpoint:
        result = run(root, endpoint.judge(), theirs, lambda prompt: ours[prompt.partition("poem ")[2][0]])
        questions = [asked(body) for body in endpoint.requests[1:]]
    assert len(questions) == 2 and not any('"winner"' in question for question in questions)
    assert rubric(result) == pytest.approx({"p0": 1.0, "p1": 5.5, "p2": 6.0, "p3": 1.0})
    assert samples(result, "poems_pairwise") == {"p0": 0.0, "p1": 1.0, "p2": 0.5, "p3": 0.5}
    assert "poems_pairwise consistency" not in scores(result)
    assert scores(result)["poems_missing verdicts"].value == 0.0


def test_a_baseline_whose_texts_are_not_kept_leaves_pairs_missing(root: str) -> None:
    with serving(fair) as endpoint:
        result = run(root, endpoint.judge(), [])
    assert scores(result)["poems_missing verdicts"].value == 4.0
    assert result.samples[0].detail["pairwise"] == {"faults": ["the baseline's text is not kept"]}


def test_a_prompt_without_a_checklist_has_one_criterion(tmp_path: Path) -> None:
    stage(tmp_path, [{**ROWS[0], "checklist": []}])
    with serving(lambda body: '{"scores": [7]}') as endpoint:
        result = run(str(tmp_path), endpoint.judge())
    assert rubric(result) == pytest.approx({"p0": 7.0})


def test_a_model_with_a_chat_template_is_asked_in_messages(root: str) -> None:
    task = JudgedWritingTask("poems", "writingbench", root, items=1)
    backend = ScriptedBackend(lambda prompt: prompt, has_chat_template=True)
    (sample,) = task.run_against(backend, [], None).samples
    assert sample.output == sample.prompt and sample.prompt.startswith("[user]Write poem")


def test_a_data_set_without_prompts_is_refused(root: str) -> None:
    with pytest.raises(WinnowError, match="data_set=gsm8k: choose wildbench, writingbench"):
        JudgedWritingTask("poems", "gsm8k", root).run_against(ScriptedBackend(), [], None)
