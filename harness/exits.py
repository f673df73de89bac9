"""How a command ends on an error: one line for the person at the keyboard, and the exit status."""

import sys
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from harness.errors import WinnowError


def explain(error: BaseException | None) -> str | None:
    """The one line for a person, where the error is of a kind that a person can mend."""
    if isinstance(error, MissingConfigException) and error.options:
        known = ", ".join(sorted(option for option in error.options if not option.startswith("_")))
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}'; known: {known}"
    while error is not None:
        if isinstance(error, WinnowError):
            return str(error)
        if isinstance(error, OmegaConfBaseException) and isinstance(cause := _first(error), WinnowError):
            return str(cause)  # of a resolver of ours
        # What an override that cannot be read was caused by says less than the error itself.
        itself = error.__cause__ is None or isinstance(error, OverrideParseException)
        if isinstance(error, HydraException | OmegaConfBaseException) and itself:
            return " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:
            return f"{error.strerror}: {error.filename}"
        if error.__cause__ is None and isinstance(error, ValueError) and _raised_in(error).startswith("hydra."):
            return " ".join(str(error).split())  # of an override that it cannot read
        error = error.__cause__
    return None


def _first(error: BaseException) -> BaseException:
    """What an error was raised while handling, to the first."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _raised_in(error: BaseException) -> str:
    """The module that raised it."""
    found = error.__traceback__
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    return "" if found is None else str(found.tb_frame.f_globals.get("__name__", ""))


def fail(error: Exception) -> NoReturn:
    """Print the one line and exit with status 2; an error without such a line is a fault of ours and goes on."""
    line = explain(error)
    if line is None:
        raise error
    print(f"winnow: {line}", file=sys.stderr)
    sys.exit(2)
