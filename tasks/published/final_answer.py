r"""The final answer that a solution in words ends in, read as a person would read it.

Three kinds of ending say so themselves: a box (``\boxed{18}``), the data set's mark (``#### 18``), and words ("the
answer is 18"). Without one the last number counts. What stands in the question, or behind the next question that a
model makes up, is no answer. A number may have separators, a unit, a currency, a percent sign and bold around it.

*Strict* is an answer in the form that was asked for, a box or the mark; *flexible* takes every ending above, and equals
the strict one where there is one.
"""

import re
from typing import NamedTuple

from harness.data.boxed import last_boxed

_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_CURRENCY = r"$£€¥₹"
NUMBER = re.compile(rf"(?P<sign>[-{_CURRENCY}]{{0,3}})(?P<digits>{_DIGITS})(?:/(?P<below>{_DIGITS}))?(?!\d)")
# Between numbers these make an expression; a dash with no space before it is a range or a word.
_OPERATOR = re.compile(rf"\s*(?:[+*/^×÷·]|-\s|(?<=\s)-|\\(?:times|cdot|div)\b)\s*[({_CURRENCY}]*\d")
_EXPRESSION = re.compile(r"\\[dt]?frac|\\sqrt|\\binom|\^|\d\s*(?:[+*/×÷·-]|\\(?:times|cdot|div)\b)\s*\\?[$(]*\d")
_IN_WORDS = re.compile(rf"(?:[A-Za-z]{{2,}}[\s:]+)*{NUMBER.pattern}%?(?:\s+[A-Za-z]{{3,}})*\s*")
_SECOND = re.compile(r"[)\s]*(?:,|\bor\b|\band\b)[\s(]*[-$]?\d")  # of several answers none is the answer
_EQUAL = re.compile(r"=|≈|\\approx\b|\\(?:implies|Rightarrow|to)\b|→|⇒")
_REASON = re.compile(r"\b(?:because|since|as|so|where|given)\b|;|,\s")

# The mark: what may stand between it and its number, and as lm-eval has it any run of digits, commas and points.
_MARKED = re.compile(
    rf"####(?P<rest>[ \t*_:=(\\`{_CURRENCY}]*(?P<number>[-\u2212]?[\\{_CURRENCY}]{{0,2}}[\d.,]*\d[\d.,]*)[^\n]*)"
)
_HEADING = re.compile(r"[ \t]*(\d{1,2})[.):][ \t]+[A-Za-z]")
_BOX_WITH_ANSWER = re.compile(r"\\f?box(?:ed)?\s*\{[^}]*\w")
_SAID = re.compile(
    r"\banswer(?:\s+(?!is\b|was\b|equals\b)[a-z]+){0,4}?\s*(?:\bis\b|\bwas\b|\bequals\b"
    r"|\b(?:should|would|must|will) be\b|=|:)\s*:?\s*(?P<rest>[^\n]*)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:(?!\.\s|\.$|[!?](?:\s|$)).)*", re.DOTALL)
_MATH = re.compile(r"\$\$?(?P<dollars>[^$]+)\$|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]", re.DOTALL)
_ASKED = re.compile(r"^[ \t*_#>]*(?:question|q|human|user)\b[ \t*_\d#]*:[ \t*_]*", re.IGNORECASE | re.MULTILINE)
_END_OF_ASKED = re.compile(
    r"^[ \t*_#>]*(?:answer|solution|a)\b[ \t*_]*:|\?(?=\s|$)|\n\s*\n|\Z", re.IGNORECASE | re.MULTILINE
)

_LATEX_SPACE = re.compile(r"\\[,!;: ]|\\q?quad\b|[\u00a0\u2009\u202f]|\{\s*\}|~")
_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|bf|rm)\s*\{([^{}]*)\}")


class FinalAnswer(NamedTuple):
    """Nothing ("") where the text has none of that kind."""

    flexible: str
    strict: str


def final_answer(text: str, question: str = "", number: bool = False) -> FinalAnswer:
    """The answer in ``text``, which holds no thought, to ``question``.

    ``number``: the answer is a number, which is read out of the words around it; else it is what stands there, such as
    an expression in LaTeX. Of several boxes the last that holds something counts; of several marks the first, as for
    lm-eval's strict match; of a mark and a box the mark for numbers, and for other answers the box.
    """
    text = without_question(text, question)
    boxed = last_boxed(text)
    if not number:
        strict = _without_words(_behind_mark(text) if boxed is None else _trimmed(boxed))
        return FinalAnswer(strict or _in_words(text) or last_number(text), strict)
    strict = _marked_number(text) or (stated_number(boxed, box=True) if boxed is not None else "")
    return FinalAnswer(strict or _number_in_words(text) or last_number(text), strict)


def without_question(text: str, question: str) -> str:
    """The text without repetitions of the question, and without a next question and what follows it."""
    words = question.split()
    if words:
        repeated = r"\s+".join(map(re.escape, words))
        text = re.sub(f"(?:{_ASKED.pattern})?{repeated}", " ", text, flags=re.IGNORECASE | re.MULTILINE)
    ends = [found.end() for ending in (_BOX_WITH_ANSWER, _MARKED, _SAID) if (found := ending.search(text))]
    following = _ASKED.search(text, min(ends)) if ends else None
    return _without_asked(text[: following.start()] if following else text)


def _without_asked(text: str) -> str:
    kept, place = [], 0
    for asked in _ASKED.finditer(text):
        if asked.start() >= place:
            end = _END_OF_ASKED.search(text, asked.end())
            kept.append(text[place : asked.start()])
            place = end.end() if end else asked.end()
    return "\n".join([*kept, text[place:]])


def plain(text: str) -> str:
    """The text without bold, styles of LaTeX and escapes, and with one kind of minus and of thousands separator."""
    text = text.replace("\u2212", "-").replace("**", "").replace("__", "").replace("`", "").replace("{,}", ",")
    text = re.sub(r"(?<=\d)(?:\\[,!; ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=,)\\!(?=\d)", "", text)
    text = _STYLE.sub(r" \1 ", _STYLE.sub(r" \1 ", text))
    return (
        _LATEX_SPACE.sub(" ", text).replace("\\$", "$").replace("\\%", "%").replace("\\left", "").replace("\\right", "")
    )


def last_number(text: str) -> str:
    """The last number in the text, without separators and signs of money; a fraction as ``a/b``."""
    readable = plain(text)
    found = list(NUMBER.finditer(readable))
    return _written(readable, found[-1]) if found else ""


def _written(text: str, found: re.Match[str]) -> str:
    """A dash is a minus where no word, number or bracket ends before it."""
    dash = "-" in found["sign"] and not re.match(r"[\w.)\]}%]", text[max(found.start() - 1, 0) : found.start()])
    below = f"/{found['below'].replace(',', '')}" if found["below"] else ""
    return f"{'-' if dash else ''}{found['digits'].replace(',', '')}{below}"


def stated_number(statement: str, box: bool = False) -> str:
    """The number that a statement such as "x = 18 eggs" gives: the first of its last side, or all of an expression.
    ``box``: the statement stands in a box, which gives no reasons. "" where there is no number."""
    readable = plain(statement)
    if box and re.fullmatch(r"[\s$]*-?\d{1,3}(?: \d{3})+[\s$]*", readable):
        return re.sub(r"[\s$]", "", readable)
    first = NUMBER.search(readable)
    reason = _REASON.search(readable, first.end()) if first and not box else None
    sides = _EQUAL.split(readable[: reason.start()] if reason else readable)
    side = next((side for side in reversed(sides) if NUMBER.search(side)), "")
    side = next((part for part in reversed(re.split(r":\s", side)) if NUMBER.search(part)), "")
    found = NUMBER.search(side)
    if found is None:
        return ""
    if box and (_EXPRESSION.search(side) or _SECOND.match(side, found.end())):
        return _trimmed(statement)
    if not box and _OPERATOR.match(side, found.end()):
        return _trimmed(re.match(r"(?:[^a-zA-Z\\]|\\[a-zA-Z]+)*", side[found.start() :])[0])  # type: ignore[index]
    return _written(side, found)


def _marked_number(text: str) -> str:
    """The number behind the first mark that is no heading of a step ("#### 1. First we ...")."""
    steps = 0
    for marked in _MARKED.finditer(text):
        rest = plain(marked["rest"])
        heading = _HEADING.match(rest)
        if heading and int(heading[1]) == steps + 1:
            steps += 1
            continue
        first = NUMBER.search(rest)
        if first and (_OPERATOR.match(rest, first.end()) or re.match(r"[^.;]*=[^.;]*\d", rest[first.end() :])):
            return stated_number(rest)
        digits = re.sub(rf"[,\\{_CURRENCY}]", "", marked["number"].replace("\u2212", "-")).rstrip(".")
        return _written(rest, first) if first and first["below"] else digits
    return ""


def _number_in_words(text: str) -> str:
    """The number in the sentence behind the last "the answer is"."""
    for said in reversed(list(_SAID.finditer(plain(text)))):
        rest = said["rest"].strip() or said.string[said.end() :].strip().partition("\n")[0]
        sentence = _SENTENCE.match(rest)[0]  # type: ignore[index]
        denied = re.match(r"\s*not\b.*?\bbut\b(.*)", sentence)
        if re.match(r"\s*not\b", sentence) and not denied:
            continue
        number = stated_number(denied[1] if denied else sentence)
        if number:
            return number
    return ""


def _behind_mark(text: str) -> str:
    """What stands behind the mark in the last line; above that it may be a heading."""
    _, marked, behind = text.rstrip().rpartition("####")
    return _trimmed(behind) if marked and "\n" not in behind else ""


def _in_words(text: str) -> str:
    """What stands behind the last "the answer is": the formula there, else the sentence."""
    for said in reversed(list(_SAID.finditer(text))):
        rest = said["rest"].strip("* \t") or said.string[said.end() :].strip().partition("\n")[0]
        formula = _MATH.search(rest)
        found = next(filter(None, formula.groups()), "") if formula else _SENTENCE.match(rest)[0]  # type: ignore[index]
        if _trimmed(found):
            return _trimmed(found)
    return ""


def _without_words(answer: str) -> str:
    """The number alone where nothing but words stands around it, such as "18 dollars"."""
    found = _IN_WORDS.fullmatch(plain(answer))
    number = NUMBER.search(plain(answer))
    return _written(plain(answer), number) if found and number else answer


def _trimmed(answer: str) -> str:
    """Without spaces, bold, ``$`` and a last point around it."""
    answer = answer.strip().strip("*`").strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$")
    return answer.strip().rstrip(".,").strip()
