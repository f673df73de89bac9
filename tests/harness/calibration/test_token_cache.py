"""Tokens that are kept are those that tokenizing gives; another corpus, tokenizer or setting has its own."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from harness.calibration import token_cache
from harness.calibration.token_cache import tokenized
from harness.calibration.tokens import TokenSequence, corpus_fingerprint, tokenize
from harness.checkpoints.tokenizer import load_tokenizer
from harness.data.rows import Document
from harness.errors import WinnowError
from tests.tiny import byte_tokenizer

SETTINGS = {"max_length": 9, "packing": False, "chat_template": False, "max_blocks": None, "bos": "auto"}
DOCUMENTS = [
    Document("def f(x): return x", "code"), Document("", "empty"), Document("né à 3 h", "prose"),
    Document("a\nb", "code", (("user", "a"), ("assistant", "b"))),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "_memory", {})
    monkeypatch.setattr(token_cache, "_LARGE", 0)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "olmoe"}')
    return tmp_path / "model"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that documents are really tokenized."""
    made: list[int] = []

    def counted(documents, *args, **settings):
        made.append(len(documents))
        return tokenize(documents, *args, **settings)

    monkeypatch.setattr(token_cache, "tokenize", counted)
    return made


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_memory", {})


def files(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache").rglob("*.npz"))


def same(found: list[TokenSequence], expected: list[TokenSequence]) -> bool:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        assert one.input_ids.dtype == other.input_ids.dtype == np.int64
        assert (one.lengths, one.sources) == (other.lengths, other.sources)
        assert all(type(length) is int for length in one.lengths)
    return corpus_fingerprint(found) == corpus_fingerprint(expected)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"packing": True, "max_blocks": 2}, {"max_length": 1}])
def test_kept_tokens_are_those_of_tokenizing(settings, folder, calls, monkeypatch) -> None:
    given = SETTINGS | settings
    expected = tokenize(DOCUMENTS, load_tokenizer(folder), **given)
    assert same(tokenized(DOCUMENTS, folder, given), expected)
    assert same(tokenized(DOCUMENTS, folder, given), expected)
    another_process(monkeypatch)
    assert same(tokenized(DOCUMENTS, folder, given), expected)
    assert len(calls) == 1 and len(files(folder)) == 1


def test_anything_else_is_tokenized_anew(folder, calls, monkeypatch) -> None:
    tokenized(DOCUMENTS, folder, SETTINGS)
    for documents, settings in (
        (DOCUMENTS[:3], {}),
        (DOCUMENTS[::-1], {}),
        ([*DOCUMENTS[:3], Document("a\nb", "other", DOCUMENTS[3].messages)], {}),
        ([*DOCUMENTS[:3], Document("a\nb", "code")], {}),
        (DOCUMENTS, {"max_length": 8}),
        (DOCUMENTS, {"packing": True}),
        (DOCUMENTS, {"bos": False}),
    ):
        another_process(monkeypatch)
        tokenized(documents, folder, SETTINGS | settings)
    assert len(calls) == 8
    another_process(monkeypatch)
    tokenized([Document(**{**vars(each), "where": "row 7"}) for each in DOCUMENTS], folder, SETTINGS)
    assert len(calls) == 8
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    tokenized(DOCUMENTS, folder, SETTINGS)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": "{{ messages[0].content }}"}))
    tokenized(DOCUMENTS, folder, SETTINGS)
    assert len(calls) == 10


def test_warnings_are_said_by_every_process(folder, calls, monkeypatch, caplog) -> None:
    for _ in range(2):
        another_process(monkeypatch)
        caplog.clear()
        tokenized(DOCUMENTS, folder, SETTINGS | {"chat_template": "auto"})
        assert caplog.text.count("1 of 4 calibration documents are empty") == 1
        assert caplog.text.count("the tokenizer has no chat template: 1 documents") == 1
    assert len(calls) == 1
    assert not any(type(handler).__name__ == "Kept" for handler in logging.getLogger(tokenize.__module__).handlers)


def test_errors_are_those_of_tokenizing(folder) -> None:
    for _ in range(2):
        with pytest.raises(WinnowError, match="the calibration corpus is empty"):
            tokenized([Document("")], folder, SETTINGS)
    assert files(folder) == []


def test_small_corpora_are_kept_in_the_process_alone(folder, calls, monkeypatch) -> None:
    monkeypatch.setattr(token_cache, "_LARGE", 10_000)
    first = tokenized(DOCUMENTS, folder, SETTINGS)
    first.clear()  # a list of the caller's own
    assert tokenized(DOCUMENTS, folder, SETTINGS) and len(calls) == 1 and files(folder) == []
    for number in range(2):
        tokenized(DOCUMENTS[number + 2 :], folder, SETTINGS)
    tokenized(DOCUMENTS, folder, SETTINGS)
    assert len(calls) == 4  # two are remembered
    tokenized(DOCUMENTS[3:], folder, SETTINGS)
    assert len(calls) == 4


def test_a_template_that_asks_for_the_date_is_asked_every_time(folder, calls) -> None:
    told = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": template}))
    for _ in range(2):
        tokenized(DOCUMENTS, folder, SETTINGS | {"chat_template": True})
    assert len(calls) == 2 and files(folder) == []


def test_no_flipped_byte_of_a_file_is_used(folder, calls, monkeypatch, caplog) -> None:
    expected = tokenized(DOCUMENTS, folder, SETTINGS)
    (file,) = files(folder)
    content = file.read_bytes()
    for place in np.linspace(0, len(content) - 1, 60).astype(int):
        another_process(monkeypatch)
        flipped = bytearray(content)
        flipped[place] ^= 8
        file.write_bytes(bytes(flipped))
        assert same(tokenized(DOCUMENTS, folder, SETTINGS), expected)
    assert "is damaged" in caplog.text and len(calls) > 30
    another_process(monkeypatch)
    file.write_bytes(content[:50])
    made = len(calls)
    assert same(tokenized(DOCUMENTS, folder, SETTINGS), expected) and len(calls) == made + 1
    another_process(monkeypatch)
    assert same(tokenized(DOCUMENTS, folder, SETTINGS), expected) and len(calls) == made + 1


def test_files_that_were_read_longest_ago_make_room(folder, calls, monkeypatch) -> None:
    import os

    tokenized(DOCUMENTS, folder, SETTINGS)
    (first,) = files(folder)
    size = first.stat().st_size
    monkeypatch.setattr(token_cache, "_BYTES", 3 * size)
    tokenized(DOCUMENTS[1:], folder, SETTINGS)
    (second,) = set(files(folder)) - {first}
    left = first.parent / ".killed.tmp"
    left.write_bytes(b"half")
    for age, path in ((300, first), (200, second), (400, left)):
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    another_process(monkeypatch)
    tokenized(DOCUMENTS, folder, SETTINGS)  # the first is read, and so the newer one
    monkeypatch.setattr(token_cache, "_BYTES", 2 * size)
    tokenized(DOCUMENTS[2:], folder, SETTINGS)
    assert first.exists() and not second.exists() and not left.exists() and len(files(folder)) == 2
    monkeypatch.setattr(token_cache, "_BYTES", 10)
    tokenized(DOCUMENTS[3:], folder, SETTINGS)
    assert len(files(folder)) == 2  # too large to be kept


def test_where_nothing_can_be_kept_it_is_said(folder, calls, monkeypatch, caplog) -> None:
    (folder.parent / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    assert len(tokenized(DOCUMENTS, folder, SETTINGS)) == 3
    assert "the tokens of the corpus are not kept: cannot write in" in caplog.text
