"""The bars that tasks and backends show; ``progress=false`` silences them all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_shown = True
_start = tqdm.__init__


def _start_unseen(self: Any, *args: Any, **options: Any) -> None:
    _start(self, *args, **options | {"disable": True})


@contextmanager
def showing(wanted: bool) -> Iterator[None]:
    """Meanwhile bars are shown in this process, or none, not even those of libraries (of lm-eval one cannot ask it)."""
    global _shown
    before, _shown = (_shown, tqdm.__init__), wanted
    tqdm.__init__ = _start if wanted else _start_unseen
    try:
        yield
    finally:
        _shown, tqdm.__init__ = before


def shown() -> bool:
    """Whether bars are shown in this process."""
    return _shown


def bar(label: str, total: int, items: Iterable[Any] | None = None, unit: str = "it") -> Any:
    """A bar of ``total`` steps over ``items`` or by hand, gone when it is done; none at all without a label.

    Steps with a ``unit`` of their own (tokens) are shown in thousands and millions.
    """
    hidden = not (label and _shown)
    return tqdm(items, total=total, desc=label, disable=hidden, leave=False, unit=unit, unit_scale=unit != "it")
