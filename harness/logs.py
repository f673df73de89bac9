"""What is logged: this project's own lines, and of libraries their warnings."""

import logging

OWN = ("harness", "methods", "tasks", "reports")


def say_what_we_do() -> None:
    """From now on this project's lines are logged in this process."""
    for name in OWN:
        logging.getLogger(name).setLevel(logging.INFO)


def levels() -> dict[str, int]:
    """Those of this process, for another one that is to log the same."""
    return {name: logging.getLogger(name).level for name in ("", *OWN)}


def set_levels(levels: dict[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
