r"""Answers in boxes: what ``\boxed{...}`` holds in a solution of a data set, and in what a model writes."""

import re

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
# A box that opens, an escaped letter (so that ``\{`` is no brace), a brace.
_TOKEN = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
_EMPTY_BOX = re.compile(r"\\f?box(?:ed)?\s*\{\s*\}")
# What stands in a request in the place of an answer.
_PLACEHOLDER = re.compile(r"(\\[lc]?dots|[\W_]|\\text|(your|the|final|answer|here)\b)*", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` (or ``\fbox{}``) that holds something holds; None where there is no such that closes.

    A box in a box counts as the inner one, or as the whole without the boxes where there are several. Empty boxes and
    placeholders, as requests have them, hold nothing.
    """
    for content in reversed(boxes(text)):
        if not _PLACEHOLDER.fullmatch(content):
            return content
    return None


def boxes(text: str) -> list[str]:
    """What the outermost boxes that close hold, in order."""
    spans: list[tuple[int, int]] = []
    opened: list[tuple[bool, int]] = []
    for token in _TOKEN.finditer(text):
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append((len(token[0]) > 1, token.end()))
        elif token[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                while spans and spans[-1][0] > start:
                    spans.pop()
                spans.append((start, token.start()))
    return [_unwrapped(text[start:end]) for start, end in spans]


def _unwrapped(content: str) -> str:
    content = _EMPTY_BOX.sub("", content)
    while len(_BOX.findall(content)) == 1:
        content = next(iter(boxes(content)), _BOX.sub("", content))
    return _BOX.sub("{", content)


def answer_of(solution: str) -> str:
    r"""What the last box of a solution holds: between its braces or, where it has none (``\boxed 7``), up to the next
    ``$``. "" where there is no box, and where the last one does not close."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return ""
    box = solution[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if box.startswith("{"):
        return next(iter(boxes(solution[start:])), "")
    return box.strip().partition("$")[0].strip()
