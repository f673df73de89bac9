"""Evaluation items inside a calibration corpus are counted; what merely resembles them is not."""

from dataclasses import dataclass

import pytest

from harness.data.contamination import check, item_text, overlaps
from harness.errors import WinnowError

LONG = "A farmer sells eighteen eggs on Monday and twice as many on Tuesday; how many eggs does the farmer sell in all?"
SHORT = "Name the capital city of the largest French region"
OTHER = "Three trains leave the station at noon and each of them travels for two hours before it stops for coal again."


def found(documents: list[str], texts: list[str]) -> int:
    return overlaps(documents, {"task": texts})["task"]["found"]


def test_an_item_is_found_whatever_its_case_punctuation_and_spacing() -> None:
    inside = f"Here is one.\n\n{LONG.upper().replace(' ', chr(10)).replace(';', ' --')} And more."
    assert overlaps(["nothing", inside], {"task": [LONG, OTHER, "too short"]}) == {
        "task": {"items": 3, "checked": 2, "found": 1}
    }
    assert found([f"so: {SHORT.lower()}!"], [SHORT]) == 1


def test_a_short_item_must_be_there_in_one_piece() -> None:
    assert found([SHORT.replace("largest", "smallest")], [SHORT]) == 0


def test_half_of_a_long_item_is_needed() -> None:
    words = [f"word{i}" for i in range(52)]  # 40 runs of 13
    for kept, expected in ((32, 1), (31, 0)):  # 20 runs, and 19
        assert found([" ".join(words[:kept])], [" ".join(words)]) == expected


def test_runs_do_not_cross_documents() -> None:
    first, second = LONG.split(";")
    assert found([first, second], [LONG]) == 0
    assert found([f"{first} {second}"], [LONG]) == 1


def test_nothing_is_found_in_an_empty_corpus() -> None:
    assert found([], [LONG]) == 0
    assert found(["a"], [LONG]) == 0


@dataclass
class Task:
    name: str
    data_set: str = "gsm8k"
    fails: bool = False

    def rows(self) -> list[dict]:
        if self.fails:
            raise WinnowError("not staged")
        return [{"id": "0", "question": LONG}, {"id": "1", "question": OTHER}]

    def item_texts(self) -> list[str]:
        return [item_text(row) for row in self.rows()]


class Reference:
    name = "code"

    def item_texts(self) -> list[str]:
        return []


def test_a_contaminated_task_is_named_with_the_count(caplog: pytest.LogCaptureFixture) -> None:
    tasks = [Task("sums"), Task("gone", fails=True), Reference()]
    assert check("mine", [LONG], tasks) == {"sums": {"items": 2, "checked": 2, "found": 1}}
    assert "calibration corpus mine contains 1 of the 2 items of sums" in caplog.text
    assert "mine is not compared with the items of gone: not staged" in caplog.text
    caplog.clear()
    assert check("mine", ["something else"], [Task("sums")])["sums"]["found"] == 0
    assert check("mine", [LONG], [Reference()]) == {}
    assert not caplog.text


def test_the_text_of_an_item() -> None:
    choice = {"contexts": ["It is"], "choices": ["red", "blue"], "answer": 1}
    assert item_text(choice) == "It is blue"
    two = {"contexts": ["Ann said", "Bob said"], "choices": ["yes", "yes"], "answer": 1}
    assert item_text(two) == "Bob said yes"
    assert item_text({"context": "a b", "continuation": "c"}) == "a b c"
    assert item_text({"prompt": "write", "checklist": []}) == "write"
    assert item_text({"text": "task", "code": "x", "test_list": []}) == "task"
