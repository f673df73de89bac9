"""Rows in the shapes that people have, and one line for every row that cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from harness.data.corpora import local_files
from harness.errors import WinnowError

SAID = (("user", "hi"), ("assistant", "hello"))
CALL = {"name": "weather", "arguments": "{}"}


def written(tmp_path: Path, *rows: Any, name: str = "corpus.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, SAID),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, SAID),
        ({"prompt": "hi", "completion": "hello"}, SAID),
        ({"question": "hi", "answer": "hello"}, SAID),
        ({"instruction": "hi", "input": "", "output": "hello"}, SAID),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, (("user", "Add.\n\n1, 2"), ("assistant", "3"))),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": "hello"}, SAID),
        ({"messages": json.dumps([{"role": "user", "content": "hi"}])}, (("user", "hi"),)),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": CALL}]}]},
            (("user", "?"), ("assistant", json.dumps(CALL))),
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, (("assistant", ""),)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {}]}]}, (("user", "a"),)),
        ({"conversations": [{"from": "system", "value": "Be brief."}]}, (("system", "Be brief."),)),
    ],
)  # fmt: skip
def test_the_shapes_of_chat(tmp_path: Path, row: dict, turns: tuple):
    (document,) = local_files(written(tmp_path, row))
    assert document.messages == turns
    assert document.text == "\n\n".join(content for _, content in turns)


def test_text_comes_before_any_other_shape(tmp_path: Path):
    (document,) = local_files(written(tmp_path, {"text": "mine", "prompt": "a", "completion": "b"}))
    assert document.text == "mine"


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.txt", "corpus.json"])
def test_the_mark_before_utf8_is_no_text(tmp_path: Path, name: str):
    path = tmp_path / name
    content = "hello" if name.endswith("txt") else '{"text": "hello"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [document.text for document in local_files(str(path))] == ["hello"]


def test_compressed_files(tmp_path: Path):
    content = b'{"text": "one"}\n{"text": "two"}\n'
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(content)
    with pa.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    assert [document.text for document in local_files(str(tmp_path))] == ["one", "two"] * 2


def test_a_list_of_rows(tmp_path: Path):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert [document.text for document in local_files(str(path))] == ["one", "two"]


def test_settings_say_what_columns_are_called(tmp_path: Path):
    path = written(tmp_path, {"title": "T", "body": "B", "asked": "hi", "answered": "hello", "dialogue": [
        {"role": "user", "content": "hi"}]})  # fmt: skip
    assert local_files(path, template="{title}: {body}")[0].text == "T: B"
    assert local_files(path, chat={"user": "asked", "assistant": "answered"})[0].messages == SAID
    assert local_files(path, columns={"messages": "dialogue"})[0].messages == SAID[:1]
    assert local_files(path, columns={"text": "body"})[0].text == "B"
    for setting, value in (("template", "{none}"), ("chat", {"user": "none"}), ("columns", {"text": "none"})):
        with pytest.raises(WinnowError, match=f"line 1: {setting} needs column 'none'; columns: title, body"):
            local_files(path, **{setting: value})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, r"line 2: no text in column 'text' \(it is null\); columns: text; a row needs a text column"),
        ({"body": "x"}, "line 2: no text in column 'text'; columns: body; a row needs .*prompt/completion"),
        ('{"text": "bad \\ud83d half"}', r"line 2 holds half a character \(.ud83d\)"),
        ({"messages": [{"content": "x"}]}, "line 2: 'messages' is not a list of {role, content}"),
        ({"conversations": [{"value": "x"}]}, "line 2: 'conversations' is not a list of {from, value}"),
        ("[" * 100_000, "line 2 is nested too deeply"),
        ('{"text": ', "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
    ],
)  # fmt: skip
def test_one_line_names_file_and_row(tmp_path: Path, row: Any, message: str):
    with pytest.raises(WinnowError, match=message) as told:
        local_files(written(tmp_path, {"text": "fine"}, row))
    assert "\n" not in str(told.value) and str(tmp_path / "corpus.jsonl") in str(told.value)


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(WinnowError, match="corpus.jsonl is not UTF-8 text"):
        local_files(str(path))
