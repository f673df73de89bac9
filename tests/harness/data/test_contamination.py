"""Evaluation items inside a calibration corpus are counted; what merely resembles them is not."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.data import contamination
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


# --- what is remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The names of tasks of each comparison that is really made; nothing is remembered at first, and all afterwards."""
    calls: list[list[str]] = []

    def counted(documents, of_task):
        calls.append(list(of_task))
        return overlaps(documents, of_task)

    monkeypatch.setattr(contamination, "overlaps", counted)
    monkeypatch.setattr(contamination, "_LARGE", 0)
    monkeypatch.setattr(contamination, "_memory", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "_memory", {})


def test_the_same_texts_are_compared_once(compared, monkeypatch, caplog) -> None:
    first = check("mine", iter([LONG, "b"]), [Task("one"), Task("two")])
    assert first["one"] == {"items": 2, "checked": 2, "found": 1} and compared == [["one", "two"]]
    assert check("yours", iter([LONG, "b"]), [Task("one")]) == {"one": first["one"]}
    another_process(monkeypatch)
    caplog.clear()
    assert check("mine", iter([LONG, "b"]), [Task("two"), Task("one")]) == first
    assert len(compared) == 1
    assert "contains 1 of the 2 items of one" in caplog.text  # said every time


def test_other_texts_and_rules_are_compared_anew(compared, monkeypatch) -> None:
    check("c", [LONG, "b"], [Task("one")])
    for documents in ([LONG], [LONG, "b", ""], ["b", LONG], [LONG + "b"]):
        check("c", documents, [Task("one")])
    assert len(compared) == 5
    other = Task("one")
    monkeypatch.setattr(other, "rows", lambda: [{"id": "0", "question": OTHER}])
    assert check("c", [LONG, "b"], [other])["one"]["found"] == 0
    monkeypatch.setattr(contamination, "SHARE", 0.9)
    check("c", [LONG, "b"], [Task("one")])
    assert len(compared) == 7


def test_new_items_alone_are_compared(compared, monkeypatch) -> None:
    check("c", [LONG], [Task("one")])
    another_process(monkeypatch)
    other = Task("two")
    monkeypatch.setattr(other, "rows", lambda: [{"id": "0", "question": OTHER}])
    found = check("c", [LONG], [Task("one"), other])
    assert compared == [["one"], ["two"]]
    assert list(found) == ["one", "two"] and (found["one"]["found"], found["two"]["found"]) == (1, 0)


def test_small_corpora_leave_no_file(compared, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(contamination, "_LARGE", 10_000)
    check("c", [LONG], [Task("one")])
    check("c", [LONG], [Task("one")])
    assert len(compared) == 1 and list(tmp_path.rglob("*")) == []


def test_no_flipped_byte_of_what_is_remembered_is_used(compared, monkeypatch, tmp_path, caplog) -> None:
    first = check("c", [LONG], [Task("one")])
    file = tmp_path / "winnow" / "contamination.json"
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        another_process(monkeypatch)
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert check("c", [LONG], [Task("one")]) == first
    assert "is damaged" in caplog.text
    another_process(monkeypatch)
    file.write_bytes(b"")
    assert check("c", [LONG], [Task("one")]) == first
    another_process(monkeypatch)
    before = len(compared)
    assert check("c", [LONG], [Task("one")]) == first and len(compared) == before


def test_where_nothing_can_be_remembered_it_is_said(compared, monkeypatch, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert check("c", [LONG], [Task("one")])["one"]["found"] == 1
    assert "is not remembered: cannot write in" in caplog.text


def test_what_is_remembered_is_bounded(compared, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(contamination, "_KEPT", 3)
    for number in range(5):
        check("c", [LONG, str(number)], [Task("one")])
    another_process(monkeypatch)
    check("c", [LONG, "4"], [Task("one")])
    assert len(compared) == 5
    check("c", [LONG, "1"], [Task("one")])
    assert len(compared) == 6
