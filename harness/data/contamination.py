"""Does a calibration corpus contain the items that a suite asks? Compared as runs of words, before any tokenization."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.contracts.task import Task
from harness.data.schema import Row
from harness.errors import WinnowError
from harness.files import user_cache, write_files

log = logging.getLogger(__name__)

# As in Brown et al. 2020 (arXiv 2005.14165, appendix C): runs of 13 words; of no item that is shorter than 8.
RUN = 13
SHORTEST = 8
# Templates and quotations are shared without an item being known: this share of an item's runs must be in the corpus.
SHARE = 0.5
_RULES = 1  # raised where ``overlaps`` comes to find something else by the same numbers
_LARGE = 2**20  # characters of a corpus from which on a comparison takes a noticeable time
_KEPT = 10_000  # comparisons
_memory: dict[str, dict[str, int]] = {}
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0 modulo 2**64


def check(corpus: str, documents: Iterable[str], tasks: Iterable[Task]) -> dict[str, dict[str, int]]:
    """For each task whose items are published: how many of its items were looked at, and how many the documents hold.

    {task: {"items", "checked", "found"}}; items of fewer than ``SHORTEST`` words are not looked at. Warns of every task
    of which something was found, and of data that cannot be had (the task itself says what to do about it).
    """
    of_task: dict[str, list[str]] = {}
    for task in tasks:
        try:
            texts = task.item_texts()
        except WinnowError as error:
            log.warning("calibration corpus %s is not compared with the items of %s: %s", corpus, task.name, error)
            continue
        if texts:
            of_task[task.name] = texts
    found = _remembered(list(documents), of_task) if of_task else {}
    for name, counts in found.items():
        if counts["found"]:
            log.warning(
                "contamination: calibration corpus %s contains %d of the %d items of %s: its scores are not clean",
                corpus, counts["found"], counts["items"], name,
            )  # fmt: skip
    return found


def _remembered(documents: Sequence[str], of_task: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """``overlaps``, or what it has found before of the same texts: in this process, and of many texts ever."""
    corpus = _digest(documents)
    keys = {name: f"{corpus} {_digest(texts)}" for name, texts in of_task.items()}
    many = sum(map(len, documents)) >= _LARGE
    known = (_read() if many else {}) | _memory
    missing = {name: texts for name, texts in of_task.items() if keys[name] not in known}
    new = {keys[name]: counts for name, counts in (overlaps(documents, missing) if missing else {}).items()}
    _memory.update(new)
    if new and many:
        kept = dict(list((_read() | new).items())[-_KEPT:])
        try:
            write_files({_file(): json.dumps({"found": kept, "sha256": _sha256(kept)}).encode()})
        except WinnowError as error:
            log.warning("what a comparison of corpus and items has found is not remembered: %s", error)
    known |= new
    return {name: dict(known[key]) for name, key in keys.items()}


def _digest(texts: Iterable[str]) -> str:
    """Of the texts one by one, and of the rules by which they are compared."""
    digest = hashlib.sha256(json.dumps([_RULES, RUN, SHORTEST, SHARE]).encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()[:32]


def _file() -> Path:
    return user_cache() / "contamination.json"


def _read() -> dict[str, dict[str, int]]:
    """Counts by the digests of corpus and items."""
    try:
        told = json.loads(_file().read_text())
        found: dict[str, dict[str, int]] = told["found"]
        if told["sha256"] != _sha256(found):
            raise ValueError("it was changed after it was written")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): corpus and items are compared anew", _file(), error)
        return {}


def _sha256(found: Mapping[str, Mapping[str, int]]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def item_text(row: Row) -> str:
    """What a model that has read the row would know: the question, and the right choice where it has choices."""
    if "contexts" in row:
        context = row["contexts"][row["answer"] if len(row["contexts"]) > 1 else 0]
        return f"{context} {row['choices'][row['answer']]}"
    if "continuation" in row:
        return f"{row['context']} {row['continuation']}"
    return next(row[column] for column in ("question", "prompt", "text") if column in row)


def overlaps(documents: Iterable[str], of_task: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """{name: {"items", "checked", "found"}} for lists of texts. A text is found when at least half of its runs of 13
    words (a shorter one: all its words in a row) are in the documents; case, punctuation and spacing do not count."""
    vocabulary: dict[str, int] = {}
    items = {name: [_ids(text, vocabulary) for text in texts] for name, texts in of_task.items()}
    # No word has this number: it stands between documents, so that no run crosses from one into the next.
    between = np.full(1, np.iinfo(np.uint32).max, np.uint64)
    parts = [part for text in documents for part in (_ids(text, vocabulary), between)]
    corpus = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    lengths = {min(RUN, len(ids)) for texts in items.values() for ids in texts if len(ids) >= SHORTEST}
    runs = {length: np.unique(_runs(corpus, length)) for length in lengths}

    def held(ids: np.ndarray) -> bool:
        length = min(RUN, len(ids))
        own, all_runs = _runs(ids, length), runs[length]
        if not len(all_runs):
            return False
        nearest = all_runs[np.minimum(np.searchsorted(all_runs, own), len(all_runs) - 1)]
        return bool((nearest == own).mean() >= SHARE)

    counts = {}
    for name, texts in items.items():
        long_enough = [ids for ids in texts if len(ids) >= SHORTEST]
        counts[name] = {"items": len(texts), "checked": len(long_enough), "found": sum(map(held, long_enough))}
    return counts


def _ids(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """(words,) uint64: a number for each word, the same wherever it occurs."""
    words = _WORD.findall(text.lower())
    return np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word in words), np.uint64, len(words))


def _runs(ids: np.ndarray, length: int) -> np.ndarray:
    """(words - length + 1,) uint64: a hash of each run of ``length`` words; empty for a shorter text."""
    total: np.ndarray = np.zeros(max(0, len(ids) - length + 1), np.uint64)
    for offset in range(length):
        total = total * _BASE + (ids[offset : offset + len(total)] + np.uint64(1))
    return total
