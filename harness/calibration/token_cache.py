"""Tokens of a corpus, made once: kept for the next cell of the process, and those of a large corpus for later ones."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness.calibration import tokens
from harness.calibration.archive import Damaged, read_archive, write_archive
from harness.calibration.tokens import TokenSequence, tokenize
from harness.checkpoints.fingerprint import tokenizer_fingerprint
from harness.checkpoints.tokenizer import load_tokenizer
from harness.data.rows import Document
from harness.errors import WinnowError
from harness.files import user_cache

log = logging.getLogger(__name__)

_LARGE = 2**22  # characters from which on reading tokens is worth a file; fewer take a second at most
_BYTES = 2**31  # of all files together; those that were read longest ago go first
_REMEMBERED = 2  # corpora in this process
_memory: dict[str, list[TokenSequence]] = {}


def tokenized(documents: Sequence[Document], folder: Path, settings: Mapping[str, Any]) -> list[TokenSequence]:
    """``tokenize(documents, ..., **settings)`` by the tokenizer in ``folder``, or what it has given before.

    Known by the content of the documents, the tokenizer and the settings. A chat template that asks for the date is
    asked every time. Raises WinnowError as ``tokenize`` does.
    """
    characters = sum(len(each.text) + sum(len(turn) for _, turn in each.messages) for each in documents)
    key = _key(documents, folder, settings)
    path = user_cache() / "tokens" / f"{key}.npz" if characters >= _LARGE else None
    found = _memory.get(key) or (_read(path) if path else None)
    if found is None:
        tokenizer = load_tokenizer(folder)
        with _warnings() as told:
            found = tokenize(documents, tokenizer, **settings)
        if "strftime_now" in str(tokenizer.chat_template):
            return found
        if path:
            _write(path, found, told)
    _memory.pop(key, None)
    _memory[key] = found
    while len(_memory) > _REMEMBERED:
        del _memory[next(iter(_memory))]
    return list(found)


def _key(documents: Sequence[Document], folder: Path, settings: Mapping[str, Any]) -> str:
    config = Path(folder) / "config.json"  # which may say what kind of tokenizer it is
    kind = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else ""
    code = [version(name) for name in ("transformers", "tokenizers")]
    digest = hashlib.sha256(json.dumps([tokenizer_fingerprint(folder), kind, code, dict(settings)]).encode())
    for each in documents:
        digest.update(json.dumps([each.text, each.source, each.messages]).encode())
    return digest.hexdigest()[:32]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What ``tokenize`` warns of, which is to be said again when its tokens are read."""
    told: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Kept(logging.WARNING)
    tokens.log.addHandler(handler)
    try:
        yield told
    finally:
        tokens.log.removeHandler(handler)


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[TokenSequence] | None:
    try:
        manifest, arrays = read_archive(path)
        ids = np.split(arrays["ids"].astype(np.int64), np.cumsum(arrays["ids_of"])[:-1])
        ends = np.cumsum(arrays["documents_of"]).tolist()
        lengths, labels = arrays["lengths"].tolist(), [manifest["sources"][place] for place in arrays["sources"]]
        places = [slice(end - count, end) for end, count in zip(ends, arrays["documents_of"].tolist(), strict=True)]
        found = [
            TokenSequence(some, tuple(lengths[place]), tuple(labels[place]))
            for some, place in zip(ids, places, strict=True)
        ]
    except FileNotFoundError:
        return None
    except (Damaged, KeyError, IndexError, ValueError) as error:
        log.warning("%s is damaged (%s): the corpus is tokenized anew", path, error)
        return None
    for message in manifest["warnings"]:
        log.warning("%s", message)
    with suppress(OSError):
        os.utime(path)
    return found


def _write(path: Path, sequences: Sequence[TokenSequence], told: Sequence[str]) -> None:
    labels = sorted({source for each in sequences for source in each.sources})
    number = {label: place for place, label in enumerate(labels)}
    arrays = {
        "ids": np.concatenate([each.input_ids for each in sequences]).astype(np.int32),
        "ids_of": np.array([len(each.input_ids) for each in sequences]),
        "documents_of": np.array([len(each.lengths) for each in sequences]),
        "lengths": np.array([length for each in sequences for length in each.lengths]),
        "sources": np.array([number[source] for each in sequences for source in each.sources]),
    }
    size = sum(array.nbytes for array in arrays.values())
    if size > _BYTES // 2:
        return
    try:
        _make_room(path.parent, _BYTES - size)
        write_archive(path, {"sources": labels, "warnings": list(told)}, arrays)
    except (OSError, WinnowError) as error:
        log.warning("the tokens of the corpus are not kept: %s", error)


def _make_room(folder: Path, room: int) -> None:
    """Files that were read longest ago go until the rest, left-overs of killed writers too, takes at most ``room``."""
    there = [(path, path.stat()) for path in folder.iterdir()] if folder.is_dir() else []
    taken = 0
    for path, about in sorted(there, key=lambda each: -each[1].st_mtime):
        taken += about.st_size
        if taken > room:
            path.unlink(missing_ok=True)
