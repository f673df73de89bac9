"""The errors that a person at the keyboard is meant to read."""


class WinnowError(Exception):
    """Something the user can mend: the message is one line, says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class BrokenModel(WinnowError):
    """The model's numbers are not finite, so a task cannot score it; its record says so and keeps the other tasks."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first, or the name of its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
