"""Lettered listings of published multiple choice, turned round: text, letters and answers."""

from pathlib import Path

import pytest

from harness.errors import WinnowError
from tasks.published.choice_order import ChoiceOrder, lettered, unlisted
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

ARC = [
    {
        "id": str(i),
        "contexts": [f"Question: what is {i} plus {i}?\nAnswer:"],
        "choices": [f"it is {2 * i}", "unknown", "a fish"],
        "answer": 0,
        "group": "",
    }
    for i in range(4)
]
MMLU = [
    {
        "id": f"law-{i}",
        "contexts": [f"About law.\n\nWhich A?\nA. not a listing\nA. one{i}\nB. two\nC. three\nD. four\nAnswer:"],
        "choices": list("ABCD"),
        "answer": 2,
        "group": "law",
    }
    for i in range(2)
]


@pytest.mark.parametrize(("name", "rows", "right"), [("arc_easy", ARC, "it is"), ("mmlu", MMLU, "three")])
def test_a_model_that_reads_the_choices_is_consistent(tmp_path: Path, name: str, rows: list, right: str) -> None:
    def score(context: str, text: str) -> float:
        line = next(
            line for line in context.splitlines() if line.startswith(f"{text.strip()}. ") and "not a" not in line
        )
        return float(right in line)

    backend = ScriptedBackend(score=score)
    result = ChoiceOrder("order", name, stage(tmp_path, name, rows)).run(backend)
    assert {s.metric: s.value for s in result.scores} == {"consistent": 1.0, "acc": 1.0, "all_right": 1.0}
    n = 3 if name == "arc_easy" else 4
    assert backend.calls == [("order: scoring", len(rows) * n * n)], "n orders, n letters each"
    assert {s.domain for s in result.samples} == {name}


def test_a_model_that_always_says_a_is_never_consistent(tmp_path: Path) -> None:
    backend = ScriptedBackend(score=lambda context, text: -float(ord(text.strip())))
    result = ChoiceOrder("order", "arc_easy", stage(tmp_path, "arc_easy", ARC)).run(backend)
    values = {s.metric: s.value for s in result.scores}
    assert values["consistent"] == 0.0 and values["all_right"] == 0.0 and values["acc"] == pytest.approx(1 / 3)


def test_listings_are_written_and_taken_apart() -> None:
    assert lettered("Q?", ["x", "y"]) == "Q?\nA. x\nB. y\nAnswer:"
    assert unlisted("Q?", ["x", "y"]) == ("Q?", ["x", "y"])
    stem = MMLU[0]["contexts"][0].removesuffix("\nAnswer:")
    assert unlisted(stem, list("ABCD")) == (
        "About law.\n\nWhich A?\nA. not a listing", ["one0", "two", "three", "four"]
    )  # fmt: skip
    with pytest.raises(WinnowError, match="not listed in the question"):
        unlisted("Q?", ["A", "B"])


def test_questions_that_cannot_be_listed_are_refused(tmp_path: Path) -> None:
    plain = [row | {"contexts": ["The sky is"]} for row in ARC]
    with pytest.raises(WinnowError, match="order: the choices of hellaswag cannot be listed"):
        ChoiceOrder("order", "hellaswag", stage(tmp_path / "a", "hellaswag", plain)).run(ScriptedBackend())
    two = [row | {"contexts": ["a\nAnswer:", "b\nAnswer:", "c\nAnswer:"]} for row in ARC]
    with pytest.raises(WinnowError, match="cannot be listed"):
        ChoiceOrder("order", "winogrande", stage(tmp_path / "b", "winogrande", two)).run(ScriptedBackend())
    with pytest.raises(WinnowError, match="data_set=gsm8k"):
        ChoiceOrder("order", "gsm8k", str(tmp_path)).run(ScriptedBackend())
