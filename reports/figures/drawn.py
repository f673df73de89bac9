"""The files of figures: drawn side by side in processes, and only those whose data have changed since they were drawn.

``FILE`` beside the figures says what each was drawn from, and the hashes of its files. A figure is drawn again where
its data, the code of the reports or the versions of what draws are others, and where a file is not the one that was
written. Where processes can be forked, they draw while the rest of a report is computed; what one of them did not
finish is drawn here.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.figure import Figure

from reports.figures import scores
from reports.numbers.load import Row

FILE = ".figures.json"
KINDS = ("png", "pdf")
_NOTHING = "nothing"  # a figure that would show nothing
_KEPT = ("cell", "scores", "sizes", "expert_usage", "broken")  # what of a record is drawn


@dataclass(frozen=True)
class Drawing:
    """A figure that ``draw(*given)`` makes, None where there is nothing to show; ``data`` is a hash of all it shows."""

    draw: Callable[..., Figure | None]
    given: tuple[Any, ...]
    data: str


@dataclass(frozen=True)
class Drawn:
    """``shown`` names the figures that show something; ``contents`` are the files that are to be written."""

    shown: frozenset[str]
    contents: dict[Path, bytes]


def row_hash(row: Row) -> str:
    """Of all of the row that a figure may show."""
    records = [[getattr(record, name) for name in _KEPT] for record in row.records]
    return digest(row.method, row.ratio, row.calibration, row.odd, records)


def digest(*data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()


@contextmanager
def drawing(drawings: Mapping[str, Drawing], out: Path) -> Iterator[Callable[[], Drawn]]:
    """Draws into ``out``, by name, what has to be drawn, beside the caller's own work; gives what waits for it."""
    known = _known(out)
    wanted = {name: digest(_code(), one.draw.__qualname__, one.data) for name, one in drawings.items()}
    kept = {name: known[name] for name, data in wanted.items() if name in known and _is_kept(out, name, known, data)}
    todo = {name: one for name, one in drawings.items() if name not in kept}
    with tempfile.TemporaryDirectory(prefix="winnow-figures-") as folder, _drawers(todo, Path(folder)) as finish:

        def wait() -> Drawn:
            finish()
            notes = dict(kept)
            contents: dict[Path, bytes] = {}
            for name, one in todo.items():
                found = _found(Path(folder), name)
                made = _files(one) if found is None else found
                hashes = {kind: hashlib.sha256(content).hexdigest() for kind, content in made.items()}
                notes[name] = {"data": wanted[name], "files": hashes}
                contents |= {out / f"{name}.{kind}": content for kind, content in made.items()}
            ordered = {name: notes[name] for name in drawings}
            if drawings and ordered != known:
                contents[out / FILE] = json.dumps(ordered, indent=1).encode()
            return Drawn(frozenset(name for name, note in notes.items() if note["files"]), contents)

        yield wait


@contextmanager
def _drawers(todo: Mapping[str, Drawing], folder: Path) -> Iterator[Callable[[], None]]:
    """Processes that leave the files of the figures in ``folder``; gives what waits for them."""
    names = list(todo)
    # Forked, since the results that are drawn take longer to send than to draw. Not on macOS, whose libraries break.
    can = sys.platform == "linux" and len(names) > 1
    count = min(len(os.sched_getaffinity(0)), len(names)) if can else 0
    context: Any = multiprocessing.get_context("fork" if can else None)
    processes = [
        context.Process(target=_draw_some, args=([(name, todo[name]) for name in names[place::count]], folder))
        for place in range(count if count > 1 else 0)
    ]
    try:
        for process in processes:
            process.start()

        def finish() -> None:
            for process in processes:
                process.join()

        yield finish
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _draw_some(drawings: Sequence[tuple[str, Drawing]], folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's: it ends this process
    (folder / "part").mkdir(exist_ok=True)
    for name, one in drawings:
        with suppress(Exception):  # the parent draws it once more, and says what is wrong
            made = _files(one)
            for kind in made or (_NOTHING,):
                path = folder / "part" / f"{name}.{kind}"
                path.write_bytes(made.get(kind, b""))
                path.rename(folder / path.name)


def _found(folder: Path, name: str) -> dict[str, bytes] | None:
    """What a process left of a figure; None where it did not finish it."""
    if (folder / f"{name}.{_NOTHING}").exists():
        return {}
    paths = {kind: folder / f"{name}.{kind}" for kind in KINDS}
    return {kind: path.read_bytes() for kind, path in paths.items()} if all(map(Path.exists, paths.values())) else None


def _files(one: Drawing) -> dict[str, bytes]:
    figure = one.draw(*one.given)
    return {} if figure is None else {kind: scores.render(figure, kind) for kind in KINDS}


def _known(out: Path) -> dict[str, Any]:
    """What the figures of before were drawn from; nothing where that is not known."""
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
        return {name: {"data": str(note["data"]), "files": dict(note["files"])} for name, note in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _is_kept(out: Path, name: str, known: Mapping[str, Any], data: str) -> bool:
    if known[name]["data"] != data:
        return False
    try:
        return all(
            hashlib.sha256((out / f"{name}.{kind}").read_bytes()).hexdigest() == content
            for kind, content in known[name]["files"].items()
        )
    except OSError:
        return False


@cache
def _code() -> str:
    """Of all that draws: the code of the reports and the versions of the libraries."""

    def sources(folder: Traversable) -> Iterator[bytes]:
        for one in sorted(folder.iterdir(), key=lambda one: one.name):
            if one.is_dir():
                yield from sources(one)
            elif one.name.endswith(".py"):
                yield one.read_bytes()

    return digest(matplotlib.__version__, numpy.__version__, list(sources(files("reports"))))
