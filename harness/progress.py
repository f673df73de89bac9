"""The bars that tasks and backends show; ``progress=false`` silences them all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_shown = True


@contextmanager
def showing(wanted: bool) -> Iterator[None]:
    """Meanwhile bars are shown in this process, or not."""
    global _shown
    before, _shown = _shown, wanted
    try:
        yield
    finally:
        _shown = before


def bar(label: str, total: int, items: Iterable[Any] | None = None) -> Any:
    """A bar of ``total`` steps over ``items`` or by hand, gone when it is done; none at all without a label."""
    return tqdm(items, total=total, desc=label, disable=not (label and _shown), leave=False)
