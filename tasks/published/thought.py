"""What a model thinks aloud before it answers, apart from the answer.

The marks are those that model families put around a thought: ``<think>`` (Qwen, DeepSeek, GLM, MiniMax, Hunyuan,
ERNIE), ``[THINK]`` (Mistral) and others of this shape, and the channels of gpt-oss.
"""

import re

from harness.backends.tokens import THOUGHT_MARKS

_OPENS = r"<\|channel\|>(?:analysis|commentary)[^<\n]*<\|message\|>"
_CLOSES = r"(?:<\|end\|>\s*)?(?:<\|start\|>assistant\s*)?<\|channel\|>final[^<\n]*<\|message\|>"
# A mark that is quoted stands in a program or in a sentence about marks.
_MARK = re.compile(
    rf"""(?<!["'`])(?:(?P<opens>{"|".join([*map(re.escape, THOUGHT_MARKS), _OPENS])})"""
    rf"""|(?P<closes>{"|".join([*map(re.escape, THOUGHT_MARKS.values()), _CLOSES])}))"""
)


def split_thought(text: str) -> tuple[str, str, bool]:
    """(thought, answer, truncated) of what a model wrote; a text without marks is all answer, letter for letter.

    ``truncated``: the text ends inside a thought. What stands before a first closing mark without an opening one is
    thought: many templates open it in the prompt. Where they do and the text may end before the closing mark, give the
    opening one with the text.
    """
    thoughts: list[str] = []
    answers: list[str] = []
    inside, place = False, 0
    for mark in _MARK.finditer(text):
        before = text[place : mark.start()]
        if inside or (mark["closes"] and not thoughts):
            thoughts += [*answers, before] if not inside else [before]
            answers = answers if inside else []
        else:
            answers.append(before)
        inside, place = bool(mark["opens"]), mark.end()
    if not place:
        return "", text, False
    (thoughts if inside else answers).append(text[place:])
    thought = "\n".join(part.strip() for part in thoughts if part.strip())
    return thought, re.sub(r"\A\s*\n", "", "".join(answers)), inside
