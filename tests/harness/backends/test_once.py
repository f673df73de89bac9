"""What two tasks ask alike is written once, and is what each of them gets where it is alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.backends.hf import HFBackend
from harness.backends.once import Once
from harness.cells import evaluate as evaluation
from harness.cells.evaluate import Clock, Evaluation, evaluate
from harness.contracts.backend import Sampling
from tests.tasks.published.test_benchmark_plus import BIG, HALF, problem
from tests.tasks.staged import stage
from tests.tiny import byte_tokenizer, tiny_model

PROMPTS = ["once upon a time", "12 apples and 7", "def f(x):", "zz"]


class Counted(HFBackend):
    """Keeps what it was asked to write."""

    def __init__(self) -> None:
        super().__init__(tiny_model("qwen3_moe"), byte_tokenizer(), batch_size=3)
        self.asked: list[list[str]] = []

    def generate(self, prompts: Any, *args: Any, **options: Any) -> list[str]:
        self.asked.append(list(prompts))
        return super().generate(prompts, *args, **options)


def test_only_what_is_new_is_asked_and_answers_stand_in_their_order() -> None:
    alone, backend = Counted(), Counted()
    once = Once(backend)
    whole = alone.generate(PROMPTS, 8, ("e",))
    assert backend.generate(PROMPTS[:3], 8, ("e",)) == whole[:3] and once.shared == 0
    assert backend.generate([PROMPTS[2], PROMPTS[3], PROMPTS[0]], 8, ("e",)) == [whole[2], whole[3], whole[0]]
    assert backend.asked == [PROMPTS[:3], [PROMPTS[3]]] and once.shared == 2
    assert backend.generate(PROMPTS, 8, [["e"]] * 4) == whole and once.shared == 6 and len(backend.asked) == 2
    assert backend.generate([], 8) == []


@pytest.mark.parametrize("other", [{"max_new_tokens": 9}, {"stop": ("t",)}, {"stop": [["e"], ["x"], ["e"], ["z"]]}])
def test_another_request_is_written_anew(other: dict[str, Any]) -> None:
    alone, backend = Counted(), Counted()
    once = Once(backend)
    backend.generate(PROMPTS, 8, ("e",))
    given = {"max_new_tokens": 8, "stop": ("e",)} | other
    assert backend.generate(PROMPTS, **given) == alone.generate(PROMPTS, **given)
    same = 2 if isinstance(given["stop"], list) else 0
    assert once.shared == same and len(backend.asked[1]) == 4 - same


def test_sampled_texts_are_always_written() -> None:
    alone, backend = Counted(), Counted()
    once = Once(backend)
    sampling = Sampling(1.0, 1.0, seed=3)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert backend.generate(prompts, 8, (), sampling) == alone.generate(prompts, 8, (), sampling)
    assert once.shared == 0 and backend.asked == [PROMPTS, PROMPTS[::-1]]


def evaluated(monkeypatch: pytest.MonkeyPatch, root: Path, *names: str) -> tuple[Evaluation, Counted]:
    backend = Counted()
    monkeypatch.setattr(evaluation, "_open", lambda config, folder: backend)
    of_code = {"_target_": "tasks.published.code.CodeBenchmark", "root": str(root), "max_new_tokens": 12}
    tasks = {name: of_code | {"name": name, "data_set": name} for name in names}
    config = {"suite": {"name": "code", "tasks": tasks}, "backend": {"name": "hf", "open": {}}}
    return evaluate(config, root, Clock()), backend


def test_humaneval_and_its_plus_set_ask_once_and_have_the_samples_that_each_has_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("evalplus")
    plus = [
        problem("humaneval_plus", 0, "half", HALF, [[2]], [[3]]),
        problem("humaneval_plus", 1, "big", BIG, [[2]], [[3]]),
    ]
    test = "def check(candidate):\n    assert candidate(2)\n"
    keys = ("id", "prompt", "entry_point", "canonical_solution")
    stage(tmp_path, "humaneval", [{key: row[key] for key in keys} | {"test": test} for row in plus])
    stage(tmp_path, "humaneval_plus", plus)
    both, backend = evaluated(monkeypatch, tmp_path, "humaneval", "humaneval_plus")
    alone = [evaluated(monkeypatch, tmp_path, name) for name in ("humaneval", "humaneval_plus")]
    assert len(backend.asked) == len(alone[0][1].asked) == len(alone[1][1].asked) > 0
    assert both.engine["answers_shared"] == {"humaneval_plus": sum(map(len, backend.asked))}
    assert all("answers_shared" not in one.engine for one, _ in alone)
    assert [*map(asdict, both.samples)] == [asdict(sample) for one, _ in alone for sample in one.samples]
    assert [sample.task for sample in both.samples] == ["humaneval"] * 2 + ["humaneval_plus"] * 2
