"""The items of a benchmark, and whether a model is asked in chat."""

from pathlib import Path

import pytest

from harness.data.sets import NotStaged
from harness.errors import WinnowError
from tasks.published.items import Benchmark, asks_in_chat, benchmark_rows, tokens_to_write
from tests.tasks.scripted import ScriptedBackend
from tests.tasks.staged import stage

ROWS = [{"id": str(i), "text": f"text {i}"} for i in range(40)]


def test_a_fixed_part_is_drawn_by_id_whatever_the_order_of_the_source(tmp_path: Path) -> None:
    here, there = stage(tmp_path / "a", "c4", ROWS), stage(tmp_path / "b", "c4", ROWS[::-1])
    drawn = benchmark_rows("c4", here, 10, 0)
    ids = [row["id"] for row in drawn]
    assert len(ids) == 10 and ids == sorted(ids, key=int), "in the order of the source"
    assert ids != [row["id"] for row in ROWS[:10]]
    assert [row["id"] for row in benchmark_rows("c4", there, 10, 0)] == ids[::-1]
    assert {row["id"] for row in benchmark_rows("c4", here, 10, 1)} != set(ids)
    assert set(ids) < {row["id"] for row in benchmark_rows("c4", here, 20, 0)}


def test_all_items_and_more_than_there_are(tmp_path: Path) -> None:
    root = stage(tmp_path, "c4", ROWS)
    assert list(benchmark_rows("c4", root, None, 0)) == ROWS == list(benchmark_rows("c4", root, 99, 0))
    with pytest.raises(WinnowError, match="items=0"):
        benchmark_rows("c4", root, 0, 0)
    with pytest.raises(NotStaged, match="winnow-data stage"):
        Benchmark("c4", "wikitext", root).rows()
    with pytest.raises(WinnowError, match="choose gsm8k"):
        Benchmark("c4", "c4", root).require(["gsm8k"])


def test_chat_is_for_models_with_a_template() -> None:
    base, chat = ScriptedBackend(), ScriptedBackend(has_chat_template=True)
    assert [asks_in_chat(backend, "auto", "t") for backend in (base, chat)] == [False, True]
    assert asks_in_chat(chat, False, "t") is False and asks_in_chat(chat, True, "t") is True
    with pytest.raises(WinnowError, match="no chat template"):
        asks_in_chat(base, True, "t")
    with pytest.raises(WinnowError, match="choose auto"):
        asks_in_chat(chat, "sometimes", "t")


def test_an_answer_leaves_room_for_its_prompt() -> None:
    backend = ScriptedBackend()
    assert tokens_to_write(backend, 100) == 100 and tokens_to_write(backend, 10**6) == backend.max_length // 2
