from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.backends import choice, vllm_guard
from harness.errors import WinnowError
from tasks.made.multiple_choice import MultipleChoiceTask
from tasks.published.math import MathBenchmark
from tests.tasks.staged import stage

BACKENDS: dict[str, Any] = {"name": "auto", "hf": {"name": "hf"}, "vllm": {"name": "vllm"}}
QWEN = {"model_type": "qwen3_moe"}


PARAMETERS = 2_000_000


def parameters() -> int:
    return PARAMETERS


def writing(items: int, max_new_tokens: int = 100) -> list[Any]:
    return [SimpleNamespace(tokens_to_write=lambda: items * max_new_tokens), SimpleNamespace(tokens_to_write=lambda: 0)]


@pytest.fixture(params=["cpu", "gpu"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(vllm_guard, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(vllm_guard, "is_cpu_build", lambda: request.param == "cpu")
    return str(request.param)


def test_auto_weighs_the_work_against_the_start_on_a_cpu_only(build: str) -> None:
    enough = -(-choice.WORTH_A_START // PARAMETERS // 100)
    small, why = choice.choose(BACKENDS, QWEN, writing(enough - 1), parameters)
    assert small["name"] == ("hf" if build == "cpu" else "vllm") and why
    assert choice.choose(BACKENDS, QWEN, writing(enough), parameters)[0]["name"] == "vllm"
    larger, _ = choice.choose(BACKENDS, QWEN, writing(enough // 10), lambda: 11 * PARAMETERS)
    assert larger["name"] == "vllm", "what each token costs counts as well"


def test_auto_takes_transformers_where_nothing_is_written(build: str) -> None:
    assert choice.choose(BACKENDS, QWEN, [], parameters) == ({"name": "hf"}, "the suite writes nothing")


def test_auto_takes_transformers_where_vllm_would_be_wrong_or_absent(
    build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, why = choice.choose(BACKENDS, {"model_type": "lfm2_moe"}, writing(10**6), parameters)
    assert node["name"] == "hf" and "wrong text" in why
    monkeypatch.setattr(vllm_guard, "installed_version", lambda: None)
    node, why = choice.choose(BACKENDS, QWEN, writing(10**6), parameters)
    assert node["name"] == "hf" and "not installed" in why


def test_auto_takes_transformers_beside_a_version_that_was_not_tried(
    build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_guard, "installed_version", lambda: "0.33.0")
    node, why = choice.choose(BACKENDS, QWEN, writing(10**6), parameters)
    assert node["name"] == "hf" and "need vLLM 0.32.x, and 0.33.0 is installed" in why


def test_a_backend_asked_for_by_name_is_taken_or_refused(build: str) -> None:
    for asked in ({"name": "vllm", "open": {}}, {"name": "hf", "open": {}}):
        assert choice.choose(asked, QWEN, [], parameters) == (asked, "")
    assert choice.choose({"name": "hf"}, {"model_type": "lfm2_moe"}, [], parameters)[1] == ""
    with pytest.raises(WinnowError, match="backend=vllm: architecture 'lfm2_moe'"):
        choice.choose({"name": "vllm"}, {"model_type": "lfm2_moe"}, [], parameters)


def test_a_task_says_itself_what_it_writes(tmp_path: Path) -> None:
    root = stage(tmp_path, "gsm8k", [{"id": str(i), "question": "q", "answer": "1", "solution": "1"} for i in range(7)])
    whole = MathBenchmark("gsm8k", "gsm8k", root, max_new_tokens=100)
    assert whole.tokens_to_write() == 700
    assert MathBenchmark("gsm8k", "gsm8k", root, items=3, max_new_tokens=100).tokens_to_write() == 300
    assert MultipleChoiceTask(items=7).tokens_to_write() == 0
