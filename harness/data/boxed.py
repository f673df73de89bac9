r"""Answers in boxes: what ``\boxed{...}`` holds in a solution of a data set, and in what a model writes."""

import re

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` (or ``\fbox{}``) of the text holds; None where there is none that closes."""
    contents = (_up_to_closing(text[opened.end() :]) for opened in reversed(list(_BOX.finditer(text))))
    return next((content for content in contents if content is not None), None)


def answer_of(solution: str) -> str:
    r"""What the last box of a solution holds: between its braces or, where it has none (``\boxed 7``), up to the next
    ``$``. "" where there is no box, and where the last one does not close."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return ""
    box = solution[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if box.startswith("{"):
        return _up_to_closing(box[1:]) or ""
    return box.strip().partition("$")[0].strip()


def _up_to_closing(text: str) -> str | None:
    """What stands before the brace that closes one opened before ``text``; None where there is no such."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:place]
    return None
