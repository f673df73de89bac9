"""Text that people wrote and every Python brings along: its library's source and its reference manual.

The held-out parts are fixed by name, so the splits are the same files under every Python version; the text
inside them is that of the Python that runs.
"""

import importlib
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from tasks.reference.problem import Split

Kind = Literal["python", "prose"]
KINDS: tuple[Kind, ...] = ("python", "prose")
PIECE = 1500

EVALUATION_FILES = (
    "bisect.py",
    "calendar.py",
    "colorsys.py",
    "filecmp.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "queue.py",
    "shelve.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)
CALIBRATION_FILES = (
    "base64.py",
    "cmd.py",
    "csv.py",
    "fileinput.py",
    "fnmatch.py",
    "glob.py",
    "linecache.py",
    "netrc.py",
    "pprint.py",
    "sched.py",
    "string.py",
    "timeit.py",
    "wave.py",
)
EVALUATION_TOPICS = (
    "assert",
    "comparisons",
    "debugger",
    "formatstrings",
    "identifiers",
    "lambda",
    "operator-summary",
    "strings",
)
CALIBRATION_TOPICS = (
    "del",
    "dict",
    "exprlists",
    "global",
    "raise",
    "return",
    "typesseq-mutable",
    "yield",
)
HELD_OUT: dict[tuple[Kind, Split], tuple[str, ...]] = {
    ("python", "evaluation"): EVALUATION_FILES,
    ("python", "calibration"): CALIBRATION_FILES,
    ("prose", "evaluation"): EVALUATION_TOPICS,
    ("prose", "calibration"): CALIBRATION_TOPICS,
}
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "__pycache__",
        "encodings",
    }
)


@cache
def python_sources() -> dict[str, str]:
    """Path below the standard library (with forward slashes) -> source, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        # The build writes _sysconfigdata and config-*: they describe one machine.
        generated = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if generated or SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            sources[relative.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return sources


@cache
def prose_topics() -> dict[str, str]:
    """Topic -> text of the language reference; empty where this Python has none."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return {}
    return {name: topics[name] for name in sorted(topics)}


def _texts(kind: Kind) -> dict[str, str]:
    return python_sources() if kind == "python" else prose_topics()


def split_of_name(kind: Kind, name: str) -> Split:
    """The split to which a file or a topic belongs, by its name alone."""
    if name in HELD_OUT[kind, "evaluation"]:
        return "evaluation"
    return "calibration" if name in HELD_OUT[kind, "calibration"] else "train"


def _without_paragraphs(text: str, taken: set[str]) -> str:
    return "\n\n".join(part for part in text.split("\n\n") if part.strip() not in taken)


@cache
def split_texts(kind: Kind, split: Split) -> dict[str, str]:
    """Name -> text of one kind in one split.

    The manual repeats whole sections under several topics. A paragraph that evaluation holds is therefore
    cut out of calibration and training, and one that calibration holds out of training.
    """
    own = {name: text for name, text in _texts(kind).items() if split_of_name(kind, name) == split}
    if kind == "prose":
        order: tuple[Split, ...] = ("evaluation", "calibration", "train")
        stronger = order[: order.index(split)]
        taken = {
            part.strip()
            for name, text in _texts(kind).items()
            if split_of_name(kind, name) in stronger
            for part in text.split("\n\n")
        }
        own = {name: _without_paragraphs(text, taken) for name, text in own.items()}
    own = {name: text for name, text in own.items() if text.strip()}
    if not own:
        raise RuntimeError(f"this Python installation has no {kind} text for the {split} split")
    return own


def pieces(text: str, size: int = PIECE) -> list[str]:
    """``text`` cut at the first line end after every ``size`` characters; joined, the pieces give it back."""
    result, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            result.append("".join(lines))
            lines, length = [], 0
    return result + ["".join(lines)] if lines else result


def _split_pieces(kind: Kind, split: Split) -> list[str]:
    return [piece for text in split_texts(kind, split).values() for piece in pieces(text) if piece.strip()]


def held_out_documents(kind: Kind, split: Split) -> list[str]:
    """The pieces of one kind held out for ``split`` (calibration or evaluation), in the order of the text."""
    if split == "train":
        raise ValueError("nothing is held out for training")
    return _split_pieces(kind, split)


def documents(split: Split, seed: int = 0, kind: Kind | None = None) -> Iterator[str]:
    """Pieces of both kinds, or of one, shuffled: one pass over a held-out split, endless for training."""
    rng = random.Random(f"{split}-{seed}-real-text")
    pool = [piece for each in KINDS if kind in (None, each) for piece in _split_pieces(each, split)]
    while True:
        yield from rng.sample(pool, len(pool))
        if split != "train":
            return
