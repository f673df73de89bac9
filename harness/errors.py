"""The one exception a person at the keyboard is meant to read."""


class WinnowError(Exception):
    """Something the user can mend: the message is one line, says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class BrokenModel(WinnowError):
    """The model's numbers are not finite, so a task cannot score it; its record says so and keeps the other tasks."""
