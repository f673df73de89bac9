"""What is logged: this project's own lines, and of libraries their warnings."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

OWN = ("harness", "methods", "tasks", "reports")


def say_what_we_do() -> None:
    """From now on this project's lines are logged in this process."""
    for name in OWN:
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def each_line_once(name: str) -> Iterator[None]:
    """Meanwhile the logger ``name`` says no line twice: cells of a sweep mostly say the same."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        new = line not in said
        said.add(line)
        return new

    logger = logging.getLogger(name)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def levels() -> dict[str, int]:
    """Those of this process, for another one that is to log the same."""
    return {name: logging.getLogger(name).level for name in ("", *OWN)}


def set_levels(levels: dict[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
