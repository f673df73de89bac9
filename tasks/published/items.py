"""What the tasks on published benchmarks share: their items, and how a model is asked."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from harness.contracts.backend import Reader
from harness.data.contamination import item_text
from harness.data.schema import Row
from harness.data.sets import rows
from harness.errors import WinnowError


@lru_cache(maxsize=32)
def benchmark_rows(data_set: str, root: str | None, items: int | None, seed: int) -> tuple[Row, ...]:
    """All rows of a data set, or ``items`` of them: those whose hashed ids come first, in the order of the source.

    What is drawn depends on the ids and the seed alone, so it is the same in every cell and from either source. A set
    that holds fewer gives all it has. Raises WinnowError as ``data_sets.rows`` does, and for fewer than one item.
    """
    if items is not None and items < 1:
        raise WinnowError(f"items={items}: a task needs at least one evaluation item; null takes all")
    found = rows(data_set, root)
    if items is None or items >= len(found):
        return tuple(found)
    drawn = sorted((hashlib.sha256(f"{seed}:{row['id']}".encode()).digest(), row["id"]) for row in found)[:items]
    kept = {name for _, name in drawn}
    return tuple(row for row in found if row["id"] in kept)


@dataclass(frozen=True)
class Benchmark:
    """A task on a published data set. ``root``: the folder of staged data (None: the hub); ``items``: how many of its
    items, drawn with ``seed`` (None: all)."""

    version: ClassVar[int] = 1

    name: str
    data_set: str
    root: str | None = None
    items: int | None = None
    seed: int = 0
    domain: str = ""

    def rows(self) -> tuple[Row, ...]:
        """The items of this task. Raises WinnowError where they cannot be had."""
        return benchmark_rows(self.data_set, self.root, self.items, self.seed)

    def item_texts(self) -> list[str]:
        return [item_text(row) for row in self.rows()]

    def items_content(self) -> tuple[Row, ...]:
        return self.rows()

    def longest_answers(self, tokens: int) -> int:
        """How many tokens are written where each answer may have ``tokens``."""
        return tokens * (len(self.rows()) if self.items is None else self.items)

    def require(self, known: Sequence[str]) -> None:
        """Raises WinnowError for a data set that this kind of task cannot score."""
        if self.data_set not in known:
            raise WinnowError(f"{self.name}: data_set={self.data_set}: choose {', '.join(known)}")


def tokens_to_write(backend: Reader, wanted: int) -> int:
    """How many tokens an answer may have: ``wanted``, and at most half of what fits into the model with its prompt."""
    return max(1, min(wanted, backend.max_length // 2))


def asks_in_chat(backend: Reader, chat: bool | str, task: str) -> bool:
    """Whether a task asks in messages: ``chat`` is true, false, or "auto" (where the model has a chat template).

    Raises WinnowError for true without a template, and for anything else.
    """
    if chat == "auto":
        return backend.has_chat_template
    if chat is True and not backend.has_chat_template:
        raise WinnowError(f"{task}: chat=true, but the model's tokenizer has no chat template")
    if not isinstance(chat, bool):
        raise WinnowError(f"{task}: chat={chat}: choose auto, true or false")
    return chat
