"""The bars that tasks and backends show; ``progress=false`` silences them all."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_shown = True


def show(wanted: bool) -> None:
    """Whether bars are shown from now on in this process."""
    global _shown
    _shown = wanted


def bar(label: str, total: int, items: Iterable[Any] | None = None) -> Any:
    """A bar of ``total`` steps over ``items`` or by hand, gone when it is done; none at all without a label."""
    return tqdm(items, total=total, desc=label, disable=not (label and _shown), leave=False)
