"""What decides a cell's numbers, by content: a fingerprint each, which its id and its record hold."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.calibration.tokens import TokenSequence, corpus_fingerprint
from harness.checkpoints.fingerprint import model_fingerprint, tokenizer_fingerprint
from harness.contracts.method import Method
from harness.contracts.task import Task

# Code of these packages is known by the versions of its methods and tasks.
_OWN = ("harness", "methods", "tasks")


def contents_of(
    folder: Path, method: Method, tasks: Mapping[str, Task], sequences: Sequence[TokenSequence]
) -> dict[str, str]:
    """``model`` (weights and config.json), ``tokenizer`` (its files, the template, generation_config.json), ``corpus``
    (the tokens that calibration reads), ``items/TASK`` and, of a user's own methods and tasks, ``code/NAME``.

    Raises WinnowError where weights, or the items of a task, cannot be read.
    """
    found = {"model": model_fingerprint(folder), "tokenizer": tokenizer_fingerprint(folder)}
    if sequences:
        found["corpus"] = corpus_fingerprint(sequences)
    items = {name: task.items_content() for name, task in tasks.items()}
    found |= {f"items/{name}": digest(content) for name, content in items.items() if content is not None}
    code = {"method": _code(method)} | {name: _code(task) for name, task in tasks.items()}
    return found | {f"code/{name}": source for name, source in code.items() if source}


def digest(content: Any) -> str:
    """``sha256:...`` of plain data."""
    text = json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _code(thing: Any) -> str:
    """The hash of the file that holds the class of a user's own method or task; empty for ours."""
    kind = type(thing)
    if kind.__module__.partition(".")[0] in _OWN:
        return ""
    try:
        source = inspect.getsourcefile(kind)
        return "" if source is None else f"sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()}"
    except (OSError, TypeError):  # made at the prompt
        return ""
