"""Models that think before they answer: how they are asked, how much they may write, and what of it is scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.record import Sample
from harness.contracts.task import TaskResult
from harness.errors import WinnowError
from tasks.probes.diversity import DiversityTask
from tasks.published.code import ANSWER, CodeBenchmark
from tasks.published.contest import ContestBenchmark
from tasks.published.lm_eval_task import LmEvalTask
from tasks.published.math import MathBenchmark
from tasks.published.writing import JudgedWritingTask
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage
from tests.tiny import byte_tokenizer

PROBLEMS = [
    {"id": str(n), "question": f"{n} and 2?", "solution": f"#### {n + 2}", "answer": str(n + 2)} for n in range(3)
]
DOUBLE = {
    "id": "0", "task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
    "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip
CONTEST = {
    "id": "0", "prompt": "Print the number.", "starter_code": "", "function": None, "difficulty": "easy",
    "tests": [["7\n", "7"]],
}  # fmt: skip
WRITING = [{"id": str(n), "prompt": f"A poem {n}.", "checklist": []} for n in range(2)]


class Thinker(ScriptedBackend):
    """A chat model whose template has the switch enable_thinking, and opens every thought itself where ``opens``."""

    def __init__(self, write: Callable[[str], str], opens: bool = False, chat: bool = True) -> None:
        super().__init__(write, has_chat_template=chat)
        self.opens, self.options = opens, []  # type: ignore[var-annotated]

    def prompt(self, prompt: Any, **options: Any) -> str:
        self.options.append(options)
        return super().prompt(prompt, **options) + ("<think>\n" if self.opens else "")


def gsm8k(tmp_path: Path, **options: Any) -> MathBenchmark:
    return MathBenchmark("gsm8k", "gsm8k", stage(tmp_path, "gsm8k", PROBLEMS), max_new_tokens=100, **options)


def scores(result: TaskResult) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in result.scores}


@pytest.mark.parametrize(
    ("options", "passed", "tokens"),
    [
        ({}, {}, 100),
        ({"template": {"enable_thinking": False, "style": "dry"}}, {"enable_thinking": False, "style": "dry"}, 100),
        ({"thinking": "on", "template": {"enable_thinking": False}}, {"enable_thinking": True}, 1100),
        ({"thinking": True}, {"enable_thinking": True}, 1100),
        ({"thinking": "off"}, {"enable_thinking": False}, 100),
        ({"thinking": False}, {"enable_thinking": False}, 100),
    ],
)
def test_the_switch_and_the_room_for_a_thought(
    tmp_path: Path, options: dict[str, Any], passed: dict[str, Any], tokens: int
) -> None:
    task = gsm8k(tmp_path, thinking_tokens=1000, **options)
    backend = Thinker(lambda prompt: "#### 2")
    result = task.run(backend)
    assert backend.options == [passed] * 3 and backend.max_new_tokens == tokens
    assert task.tokens_to_write() == tokens * 3
    thinks = tokens > 100
    assert (("gsm8k_truncated", "truncated") in scores(result)) == thinks
    assert result.facts == ({"thinking of gsm8k": {"mode": "on", "tokens": 1000}} if thinks else {})


def test_a_thought_and_its_answer_take_at_most_half_of_what_fits(tmp_path: Path) -> None:
    backend = Thinker(lambda prompt: "#### 2")
    result = gsm8k(tmp_path, thinking="on").run(backend)
    assert backend.max_new_tokens == 2048 and result.facts["thinking of gsm8k"]["tokens"] == 1948


def test_nothing_changes_where_nobody_thinks(tmp_path: Path) -> None:
    result = gsm8k(tmp_path).run(Thinker(lambda prompt: "It is \\boxed{2}."))
    assert {sample.task for sample in result.samples} == {score.task for score in result.scores} == {"gsm8k"}
    assert not any({"truncated", "without_thought"} & sample.detail.keys() for sample in result.samples)


@pytest.mark.parametrize("opens", [True, False])
def test_answers_cut_inside_a_thought_are_counted_and_never_scored_by_it(tmp_path: Path, opens: bool) -> None:
    """Thoughts say the right answer each time; the answers are right, wrong, and missing."""
    begin = "" if opens else "<think>"
    written = {
        "0 and 2?": f"{begin}It is \\boxed{{2}}.</think>So \\boxed{{2}}.",
        "1 and 2?": f"{begin}It is \\boxed{{3}}.</think>So \\boxed{{9}}.",
        "2 and 2?": f"{begin}It is \\boxed{{4}}. #### 4",
    }
    backend = Thinker(lambda prompt: next(text for key, text in written.items() if key in prompt), opens)
    result = gsm8k(tmp_path, thinking_tokens=1000).run(backend)
    assert backend.max_new_tokens == (1100 if opens else 100), "no room is made for thoughts that nobody asked for"
    assert result.facts == {"thinking of gsm8k": {"mode": "auto", "tokens": 1000 if opens else 0}}
    found = scores(result)
    assert found["gsm8k", "exact_match"] == pytest.approx(1 / 3)
    assert found["gsm8k_truncated", "truncated"] == pytest.approx(1 / 3)
    (score,) = (score for score in result.scores if score.task == "gsm8k_truncated")
    assert (score.kind, score.higher_is_better, score.n) == ("probe", False, 3) and score.low < 1 / 3 < score.high
    own = [sample for sample in result.samples if sample.task == "gsm8k"]
    assert [sample.score for sample in own] == [1.0, 0.0, 0.0]
    assert [sample.detail["truncated"] for sample in own] == [False, False, True]
    assert [sample.detail["without_thought"] for sample in own] == ["So \\boxed{2}.", "So \\boxed{9}.", ""]
    assert [sample.output for sample in own] == list(written.values()), "the record keeps all that was written"
    cut = [sample for sample in result.samples if sample.task == "gsm8k_truncated"]
    assert [(sample.item, sample.score) for sample in cut] == [("0", 0.0), ("1", 0.0), ("2", 1.0)]


def test_stop_strings_end_answers_and_not_thoughts(tmp_path: Path) -> None:
    text = "Let me see.\n\n\nQuestion: which?\n</think>\nIt is #### 2\nQuestion: 7?\n#### 7"
    backend = Thinker(lambda prompt: text, opens=True, chat=False)
    result = gsm8k(tmp_path).run(backend)
    assert backend.stop == ()
    assert {sample.detail["without_thought"] for sample in result.samples if sample.task == "gsm8k"} == {"It is #### 2"}
    assert scores(result)["gsm8k", "exact_match"] == pytest.approx(1 / 3)


def test_code_is_not_begun_for_a_model_that_shall_think(tmp_path: Path) -> None:
    root = stage(tmp_path, "humaneval", [DOUBLE])
    right = "```python\ndef double(x):\n    return 2 * x\n```\n"
    seen: list[str] = []
    thinker = Thinker(lambda prompt: seen.append(prompt) or f"<think>\nprint(\n```\n</think>\n\n{right}")
    result = CodeBenchmark("humaneval", "humaneval", root, thinking="on").run(thinker)
    assert ANSWER not in seen[0] and scores(result)["humaneval", "pass@1"] == 1.0
    cut = Thinker(lambda prompt: f"<think>\nIt is {right}")
    result = CodeBenchmark("humaneval", "humaneval", root, thinking="on").run(cut)
    assert scores(result) == {("humaneval", "pass@1"): 0.0, ("humaneval_truncated", "truncated"): 1.0}
    plain = Thinker(lambda prompt: seen.append(prompt) or "def double(x):\n    return 2 * x\n```\n")
    result = CodeBenchmark("humaneval", "humaneval", root).run(plain)
    assert ANSWER in seen[-1] and scores(result) == {("humaneval", "pass@1"): 1.0}


def test_a_contest_takes_no_program_from_a_thought(tmp_path: Path) -> None:
    root = stage(tmp_path, "livecodebench", [CONTEST])
    right = "```python\nprint(input())\n```"
    task = ContestBenchmark("livecodebench", "livecodebench", root, cpu_seconds=2)
    result = task.run(Thinker(lambda prompt: f"Try\n{right}\nno</think>```python\nprint(8)\n```", opens=True))
    assert scores(result) == {("livecodebench", "pass@1"): 0.0, ("livecodebench_truncated", "truncated"): 0.0}
    result = task.run(Thinker(lambda prompt: f"Hm.</think>\n{right}", opens=True))
    assert scores(result)["livecodebench", "pass@1"] == 1.0


def test_writing_is_measured_without_its_thought(tmp_path: Path) -> None:
    root = stage(tmp_path, "wildbench", WRITING)
    task = JudgedWritingTask("wildbench", "wildbench", root)
    texts = {"A poem 0.": "Roses are red and violets are blue", "A poem 1.": "Once"}
    backend = Thinker(lambda p: f"<think>Which one? Which one?</think>\n{next(t for k, t in texts.items() if k in p)}")
    result = task.run_against(backend, [], None)
    own = [sample for sample in result.samples if sample.task == "wildbench"]
    assert [sample.score for sample in own] == [float(len(text)) for text in texts.values()]
    assert all(sample.output.startswith("<think>") for sample in own)
    plain = [Sample("wildbench", str(n), 0.0, output=text) for n, text in enumerate(texts.values())]
    with_thought, without = (
        DiversityTask(sources=("wildbench",)).run_on(own),
        DiversityTask(sources=("wildbench",)).run_on(plain),
    )
    assert with_thought.scores == without.scores and with_thought.scores


class Said(ScriptedBackend):
    """As much of a backend as lm-eval's adapter needs to write."""

    name, tokenizer = "vllm", byte_tokenizer()

    def score_tokens(self, *arguments: Any, **options: Any) -> list[Any]:
        raise AssertionError

    def generate(self, prompts: Any, max_new_tokens: int, stop: Any, sampling: Any, progress: str = "") -> list[str]:  # type: ignore[override]
        return [self.write(prompt) for prompt in prompts]


def test_lm_evals_tasks_score_no_thought(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"q": q, "a": "7"}) + "\n" for q in "abc"))
    task = {
        "task": "sevens", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.jsonl")}}, "doc_to_text": "{{q}}?",
        "doc_to_target": "a", "generation_kwargs": {"until": [], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "sevens.yaml").write_text(json.dumps(task))
    texts = {"a?": "<think>8?</think>7", "b?": "7", "c?": "<think>7"}
    result = LmEvalTask("lm", ("sevens",), str(tmp_path)).run(Said(texts.__getitem__))  # type: ignore[arg-type]
    assert scores(result) == {("lm", "exact_match"): pytest.approx(2 / 3), ("lm_truncated", "truncated"): 1 / 3}
    assert [sample.output for sample in result.samples] == ["7", "7", ""]
    plain = LmEvalTask("lm", ("sevens",), str(tmp_path)).run(Said(lambda prompt: "7"))  # type: ignore[arg-type]
    assert scores(plain) == {("lm", "exact_match"): 1.0}


def test_settings_that_make_no_sense_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="gsm8k: thinking=perhaps: choose auto, on, off"):
        gsm8k(tmp_path / "a", thinking="perhaps")
    with pytest.raises(WinnowError, match="thinking_tokens=-1"):
        gsm8k(tmp_path / "b", thinking_tokens=-1)
    for number, wanted in enumerate(("on", "off")):
        task = gsm8k(tmp_path / str(number), thinking=wanted)
        with pytest.raises(WinnowError, match=f"thinking={wanted} is for models that are asked in chat"):
            task.run(Thinker(lambda prompt: "", chat=False))
