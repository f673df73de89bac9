from itertools import islice
from pathlib import Path

import pytest

from tasks.reference import real_text

HELD_OUT = ("calibration", "evaluation")


def test_training_is_endless_and_each_epoch_has_a_new_order():
    size = len(real_text._split_pieces("prose", "train"))
    stream = list(islice(real_text.documents("train", kind="prose"), 2 * size))
    assert sorted(stream[:size]) == sorted(stream[size:])
    assert stream[:size] != stream[size:]


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_documents_come_once(split):
    found = list(real_text.documents(split))
    expected = [piece for kind in real_text.KINDS for piece in real_text.held_out_documents(kind, split)]
    assert sorted(found) == sorted(expected)
    assert found == list(real_text.documents(split))
    assert found != list(real_text.documents(split, seed=1))


def test_files_are_where_they_belong():
    names = {split: set(real_text.split_texts("python", split)) for split in ("train", *HELD_OUT)}
    assert "heapq.py" in names["evaluation"] and "string.py" in names["calibration"]
    assert {"argparse.py", "json/decoder.py"} <= names["train"]
    assert not any(names["train"] & names[split] for split in HELD_OUT)
    assert not names["calibration"] & names["evaluation"]
    everything = set.union(*names.values())
    assert not [n for n in everything if {"test", "tests", "encodings", "pydoc_data"} & set(n.split("/")[:-1])]
    assert not [n for n in everything if "_sysconfigdata" in n]


def test_held_out_lists_exist_in_this_python():
    for (kind, split), names in real_text.HELD_OUT.items():
        assert set(names) == set(real_text.split_texts(kind, split))


@pytest.mark.parametrize("kind", real_text.KINDS)
def test_no_text_of_evaluation_in_the_other_splits(kind):
    """Long paragraphs, since a bare ``return None`` is in every file."""

    def paragraphs(split):
        texts = real_text.split_texts(kind, split).values()
        return {part.strip() for text in texts for part in text.split("\n\n") if len(part) > 150}

    held_out = paragraphs("evaluation")
    assert len(held_out) > 100
    for split in ("train", "calibration"):
        shared = held_out & paragraphs(split)
        assert len(shared) <= (0 if kind == "prose" else 3), shared


def test_pieces_end_at_lines_and_give_the_text_back():
    text = real_text.python_sources()["heapq.py"]
    cut = real_text.pieces(text)
    assert "".join(cut) == text
    assert all(piece.endswith("\n") and len(piece) >= 1500 for piece in cut[:-1])
    assert max(map(len, cut)) < 1700
    assert real_text.pieces("") == []


def test_missing_names_are_skipped_but_an_empty_split_is_an_error(monkeypatch):
    real_text.split_texts.cache_clear()
    monkeypatch.setattr(real_text, "python_sources", lambda: {"heapq.py": "import this\n"})
    assert real_text.held_out_documents("python", "evaluation") == ["import this\n"]
    with pytest.raises(RuntimeError, match="no python text for the calibration split"):
        real_text.held_out_documents("python", "calibration")
    real_text.split_texts.cache_clear()


def test_training_has_no_held_out_documents():
    with pytest.raises(ValueError):
        real_text.held_out_documents("python", "train")


def test_source_is_that_of_the_running_python():
    assert real_text.python_sources()["textwrap.py"] == Path(__import__("textwrap").__file__).read_text("utf-8")
